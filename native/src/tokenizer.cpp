#include "tokenizer.hpp"

#include <algorithm>

#include "generated/constants.hpp"

namespace dnp::core {

namespace {

constexpr std::uintmax_t most_bytes = 64u << 20;  // of a tokenizer.json; the largest in use have 4 MB
constexpr std::int64_t most_id = 1 << 24;

// CLIP's own splits of a text. The literals are found as they are written, whatever the special tokens are called.
constexpr const char* clip_pattern =
    R"(<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+)";

[[noreturn]] void unsupported(const char* what, const Json& found) {
    throw bundle_error("its ", what, " is none that libdnp has: ", found.is_object() ? shown(found.value("type", Json())) : shown(found));
}

void require(const Json& json, const char* what, const Json& expected) {
    for (const auto& [key, value] : expected.items())
        if (json.value(key, Json()) != value) throw bundle_error("its ", what, " has ", key, " = ", shown(json.value(key, Json())), ", libdnp has ", shown(value));
}

bool other(char32_t c) { return !unicode::is_space(c) && !unicode::is_letter(c) && !unicode::is_number(c); }

std::size_t run(const Text& text, std::size_t from, bool (*kind)(char32_t)) {
    while (from < text.size() && kind(text[from])) ++from;
    return from;
}

// The end of the match of clip_pattern at `from`; `from` itself when there is none.
std::size_t clip_match(const Text& text, std::size_t from) {
    static const Text literals[] = {U"<|startoftext|>", U"<|endoftext|>", U"'s", U"'t", U"'re", U"'ve", U"'m", U"'ll", U"'d"};
    for (const Text& literal : literals)
        if (text.compare(from, literal.size(), literal) == 0) return from + literal.size();
    if (unicode::is_number(text[from])) return from + 1;
    if (unicode::is_letter(text[from])) return run(text, from, unicode::is_letter);
    return run(text, from, other);
}

// CLIP's pieces, then cut by GPT-2's pattern, which has an effect on the two long literals alone: they come apart.
std::vector<Text> clip_split(const Text& text) {
    std::vector<Text> pieces;
    for (std::size_t i = 0; i < text.size();) {
        std::size_t end = clip_match(text, i);
        if (end == i) {
            ++i;  // a space
        } else if (end - i > 3 && text[i] == U'<' && text[i + 1] == U'|' && unicode::is_letter(text[i + 2])) {
            pieces.push_back(text.substr(i, 2)), pieces.push_back(text.substr(i + 2, end - i - 4)), pieces.push_back(text.substr(end - 2, 2));
            i = end;
        } else {
            pieces.push_back(text.substr(i, end - i));
            i = end;
        }
    }
    return pieces;
}

std::vector<Text> bert_split(const Text& text) {
    std::vector<Text> pieces(1);
    for (char32_t c : text) {
        bool alone = unicode::is_bert_punctuation(c);
        if (alone || unicode::is_bert_space(c)) pieces.emplace_back();
        if (!unicode::is_bert_space(c)) pieces.back() += c;
        if (alone) pieces.emplace_back();
    }
    pieces.erase(std::remove(pieces.begin(), pieces.end(), Text()), pieces.end());
    return pieces;
}

Text spaces_replaced(const Text& text, const Text& by) {
    Text replaced;
    for (std::size_t i = 0; i < text.size();) {
        std::size_t end = run(text, i, unicode::is_space);
        replaced += end > i ? by : Text(1, text[i]);
        i = std::max(end, i + 1);
    }
    return replaced;
}

Text bert_cleaned(const Text& text) {
    Text cleaned;
    for (char32_t c : text)
        if (!unicode::is_bert_removed(c)) cleaned += unicode::is_bert_blank(c) ? U' ' : c;
    return cleaned;
}

Text chinese_spaced(const Text& text) {
    Text spaced;
    for (char32_t c : text) spaced += unicode::is_bert_chinese(c) ? Text{U' ', c, U' '} : Text(1, c);
    return spaced;
}

Text accents_stripped(const Text& text) {
    Text stripped = unicode::nfd(text);
    stripped.erase(std::remove_if(stripped.begin(), stripped.end(), unicode::is_nonspacing_mark), stripped.end());
    return stripped;
}

void replace_all(std::string& text, const std::string& from, const std::string& to) {
    if (from.empty()) return;
    for (std::size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size()) text.replace(at, from.size(), to);
}

const Json& field(const Json& json, const char* key) {
    static const Json null;
    if (!json.is_object()) throw bundle_error("it is no object but ", shown(json));
    auto found = json.find(key);
    return found == json.end() ? null : *found;
}

std::string text_of(const Json& json, const char* key) {
    const Json& value = field(json, key);
    if (!value.is_string()) throw bundle_error("its '", key, "' must be text, not ", shown(value));
    return value.get<std::string>();
}

bool flag_of(const Json& json, const char* key) {
    const Json& value = field(json, key);
    if (!value.is_boolean()) throw bundle_error("its '", key, "' must be true or false, not ", shown(value));
    return value.get<bool>();
}

std::int64_t id_of(const Json& value) {
    if (!is_integer(value, 0, most_id)) throw bundle_error("it has ", shown(value), " where an id is expected");
    return value.get<std::int64_t>();
}

}  // namespace

void check_text(const std::string& text, const std::string& name) {
    auto characters = std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; });
    if (characters > max_characters) throw settings_error("the ", name, " has ", characters, " characters, at most ", max_characters, " are read");
    if (text.find('\0') != std::string::npos) throw settings_error("the ", name, " holds a NUL character, so it is not text");
}

bool is_blank(const std::string& text) {
    Text decoded = decode_utf8(text);
    return std::all_of(decoded.begin(), decoded.end(), unicode::is_python_space);
}

Tokenizer::Tokenizer(const std::filesystem::path& file) {
    try {
        read(parse_json(read_file(file, most_bytes), "it", Code::bundle));
    } catch (const Error& error) {
        throw bundle_error(file.string(), " is no tokenizer that libdnp can read: ", error.what());
    } catch (const Json::exception& error) {
        throw bundle_error(file.string(), " is no tokenizer that libdnp can read: ", error.what());
    }
}

void Tokenizer::read(const Json& json) {
    read_normalizer(field(json, "normalizer"));  // added tokens may need it
    read_model(field(json, "model"));
    read_added(field(json, "added_tokens"), json["model"]["vocab"]);
    read_pre_tokenizer(field(json, "pre_tokenizer"));
    read_decoder(field(json, "decoder"));
    read_post_processor(field(json, "post_processor"));
}

void Tokenizer::read_normalizer(const Json& json) {
    const Json& type = field(json, "type");
    if (type == "Sequence") {
        for (const Json& part : field(json, "normalizers")) read_normalizer(part);
    } else if (type == "NFC") {
        normalizer_.push_back(unicode::nfc);
    } else if (type == "Lowercase") {
        normalizer_.push_back(unicode::lower);
    } else if (type == "Replace") {
        if (field(json, "pattern") != Json{{"Regex", "\\s+"}})
            throw bundle_error("its normalizer replaces ", field(json, "pattern").dump().substr(0, 200),
                               "; libdnp replaces runs of spaces alone, and has no textual inversions of several vectors");
        normalizer_.push_back([by = decode_utf8(text_of(json, "content"))](const Text& text) { return spaces_replaced(text, by); });
    } else if (type == "BertNormalizer") {
        bool lowercase = flag_of(json, "lowercase");
        if (flag_of(json, "clean_text")) normalizer_.push_back(bert_cleaned);
        if (flag_of(json, "handle_chinese_chars")) normalizer_.push_back(chinese_spaced);
        if (field(json, "strip_accents").is_null() ? lowercase : flag_of(json, "strip_accents")) normalizer_.push_back(accents_stripped);
        if (lowercase) normalizer_.push_back(unicode::lower);
    } else {
        unsupported("normalizer", json);
    }
}

void Tokenizer::read_model(const Json& json) {
    const Json& words = field(json, "vocab");
    if (!words.is_object()) throw bundle_error("its vocab must be an object, not ", shown(words));
    auto vocabulary = std::make_shared<Vocabulary>();
    vocabulary->reserve(words.size());
    for (const auto& [word, id] : words.items()) {
        vocabulary->emplace(word, id_of(id));
        tokens_.emplace(id.get<std::int64_t>(), word);
    }
    const Json& type = field(json, "type");
    if (type == "BPE") {
        model_ = byte_level_bpe(json, vocabulary);
    } else if (type == "WordPiece") {
        model_ = word_piece(json, vocabulary);
    } else {
        unsupported("model", json);
    }
}

void Tokenizer::read_added(const Json& json, const Json& vocabulary) {
    if (json.is_null()) return;
    if (!json.is_array()) throw bundle_error("its added_tokens must be a list, not ", shown(json));
    for (const Json& token : json) {
        Added added{decode_utf8(text_of(token, "content")), id_of(field(token, "id")), flag_of(token, "lstrip"), flag_of(token, "rstrip")};
        if (auto known = vocabulary.find(token["content"].get<std::string>()); known != vocabulary.end()) added.id = id_of(*known);  // that one counts
        if (flag_of(token, "single_word")) throw bundle_error("its added token ", shown(token["content"]), " is one of single words, which libdnp has not");
        if (flag_of(token, "special")) {
            tokens_.erase(added.id);
        } else {
            tokens_[added.id] = token["content"].get<std::string>();
        }
        bool normalizes = flag_of(token, "normalized");
        if (normalizes) added.content = normalized(added.content);
        if (added.content.empty()) continue;
        (normalizes ? after_normalizing_ : raw_)[added.content[0]].push_back(added);
    }
    for (AddedTokens* tokens : {&raw_, &after_normalizing_})
        for (auto& [first, same_start] : *tokens)
            std::stable_sort(same_start.begin(), same_start.end(), [](const Added& a, const Added& b) { return a.content.size() > b.content.size(); });
}

void Tokenizer::read_pre_tokenizer(const Json& json) {
    const Json& type = field(json, "type");
    const Json& parts = field(json, "pretokenizers");
    if (type == "BertPreTokenizer") {
        split_ = bert_split;
    } else if (type == "Sequence" && parts.size() == 2) {
        require(parts[0], "pre-tokenizer", {{"type", "Split"}, {"pattern", {{"Regex", clip_pattern}}}, {"behavior", "Removed"}, {"invert", true}});
        require(parts[1], "pre-tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}});
        split_ = clip_split;
    } else {
        unsupported("pre-tokenizer", json);
    }
}

void Tokenizer::read_decoder(const Json& json) {
    if (json.is_null()) return;
    const Json& type = field(json, "type");
    if (type == "Sequence") {
        for (const Json& part : field(json, "decoders")) read_decoder(part);
    } else if (type == "WordPiece") {
        decoder_.push_back([prefix = text_of(json, "prefix"), cleanup = flag_of(json, "cleanup")](std::vector<std::string>& tokens) {
            for (std::size_t i = 0; i < tokens.size(); ++i) {
                std::string& token = tokens[i];
                if (i > 0 && token.compare(0, prefix.size(), prefix) == 0) {
                    token.erase(0, prefix.size());
                } else if (i > 0) {
                    token.insert(0, " ");
                }
                if (!cleanup) continue;
                for (auto [from, to] : {std::pair{" .", "."}, {" ?", "?"}, {" !", "!"}, {" ,", ","}, {" ' ", "'"}, {" n't", "n't"}, {" 'm", "'m"},
                                        {" do not", " don't"}, {" 's", "'s"}, {" 've", "'ve"}, {" 're", "'re"}})
                    replace_all(token, from, to);
            }
        });
    } else if (type == "Fuse") {
        decoder_.push_back([](std::vector<std::string>& tokens) {
            std::string whole;
            for (const auto& token : tokens) whole += token;
            tokens.assign(1, whole);
        });
    } else if (type == "Replace" && field(json, "pattern").is_object() && json["pattern"].contains("String")) {
        decoder_.push_back([from = text_of(json["pattern"], "String"), to = text_of(json, "content")](std::vector<std::string>& tokens) {
            for (auto& token : tokens) replace_all(token, from, to);
        });
    } else if (type != "ByteLevel") {  // that of prompts, which are never decoded here
        unsupported("decoder", json);
    }
}

void Tokenizer::read_post_processor(const Json& json) {
    if (json.is_null() || field(json, "type") != "RobertaProcessing") return;  // a captioner's is never used
    for (const char* key : {"cls", "sep"}) {
        const Json& pair = field(json, key);
        if (!pair.is_array() || pair.size() != 2) throw bundle_error("its post-processor has no ", key);
        around_.push_back(id_of(pair[1]));
    }
}

Text Tokenizer::normalized(Text text) const {
    for (const auto& step : normalizer_) text = step(text);
    return text;
}

void Tokenizer::cut(const Text& text, const AddedTokens& tokens, Ids& ids, const std::function<void(const Text&)>& rest) const {
    std::size_t done = 0;
    for (std::size_t i = 0; i < text.size();) {
        auto starting = tokens.find(text[i]);
        const Added* found = nullptr;
        if (starting != tokens.end())
            for (const Added& added : starting->second)
                if (text.compare(i, added.content.size(), added.content) == 0) {
                    found = &added;
                    break;
                }
        if (!found) {
            ++i;
            continue;
        }
        std::size_t begin = i, end = i += found->content.size();
        while (found->before_spaces && begin > done && unicode::is_bert_space(text[begin - 1])) --begin;
        while (found->after_spaces && end < text.size() && unicode::is_bert_space(text[end])) ++end;
        if (begin > done) rest(text.substr(done, begin - done));
        ids.push_back(found->id);
        done = std::max(done, end), i = std::max(i, end);
    }
    if (done < text.size()) rest(text.substr(done));
}

Ids Tokenizer::encode(const std::string& text) const {
    Ids ids;
    cut(decode_utf8(text), raw_, ids, [&](const Text& part) {
        cut(normalized(part), after_normalizing_, ids, [&](const Text& plain) {
            for (const Text& piece : split_(plain)) model_(piece, ids);
        });
    });
    return ids;
}

std::string Tokenizer::decode(const Ids& ids) const {
    std::vector<std::string> tokens;
    for (std::int64_t id : ids)
        if (auto token = tokens_.find(id); token != tokens_.end()) tokens.push_back(token->second);
    for (const auto& step : decoder_) step(tokens);
    std::string text;
    for (const auto& token : tokens) text += token;
    return text;
}

PromptTokenizer::PromptTokenizer(const Bundle& bundle, const TokenizerSpec& spec)
    : tokenizer_(bundle.path / spec.file), spec_(spec), length_(bundle.text.length) {
    if (tokenizer_.around() != Ids{spec.bos, spec.eos})
        throw bundle_error((bundle.path / spec.file).string(), " puts other tokens around a prompt than the model wants, [", spec.bos, ", ", spec.eos,
                           "]; export the model again");
    if (length_ < 2) throw bundle_error(bundle.path.string(), ": text.length is ", length_, ", which has no room for a prompt; export the model again");
}

Ids PromptTokenizer::encode(const std::string& prompt, std::int64_t windows) const {
    check_text(prompt, "prompt");
    Ids tokens = tokenizer_.encode(prompt), ids(static_cast<std::size_t>(windows * length_), spec_.pad);
    auto room = static_cast<std::size_t>(length_ - 2);
    for (std::size_t window = 0; window < static_cast<std::size_t>(windows); ++window) {
        auto to = ids.begin() + static_cast<std::ptrdiff_t>(window) * length_;
        std::size_t begin = std::min(tokens.size(), window * room), end = std::min(tokens.size(), begin + room);
        *to++ = spec_.bos;
        to = std::copy(tokens.begin() + static_cast<std::ptrdiff_t>(begin), tokens.begin() + static_cast<std::ptrdiff_t>(end), to);
        *to = spec_.eos;
    }
    return ids;
}

}  // namespace dnp::core
