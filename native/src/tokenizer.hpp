// Text to ids and back, as the `tokenizers` library does it with the tokenizers of a bundle: CLIP's byte-level BPE and
// BERT's WordPiece. What else a tokenizer.json may ask for is refused by name.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "bundle.hpp"
#include "unicode.hpp"

namespace dnp::core {

using Ids = std::vector<std::int64_t>;
using Vocabulary = std::unordered_map<std::string, std::int64_t>;

// Throws settings_error for what cannot be tokenized: too long, or with a NUL character, as binary data has.
void check_text(const std::string& text, const std::string& name);

bool is_blank(const std::string& text);  // nothing but spaces

// One tokenizer.json. Not changed by use: several threads may share it.
class Tokenizer {
public:
    explicit Tokenizer(const std::filesystem::path& file);  // throws bundle_error for what cannot be read

    Ids encode(const std::string& text) const;       // without the tokens that a model wants around it
    std::string decode(const Ids& ids) const;        // without special and unknown tokens
    Ids around() const { return around_; }           // what the post-processor makes of the empty text

private:
    using Step = std::function<Text(const Text&)>;
    using Joining = std::function<void(std::vector<std::string>&)>;

    struct Added {
        Text content;
        std::int64_t id;
        bool before_spaces, after_spaces;  // takes the spaces before or after it, too
    };
    using AddedTokens = std::map<char32_t, std::vector<Added>>;  // by the first character, the longest first

    void read(const Json& json);
    void read_added(const Json& json, const Json& vocabulary);
    void read_model(const Json& json);
    void read_normalizer(const Json& json);
    void read_pre_tokenizer(const Json& json);
    void read_decoder(const Json& json);
    void read_post_processor(const Json& json);
    Text normalized(Text text) const;

    // Cuts `text` at added tokens: appends their ids, and gives what lies between to `rest`.
    void cut(const Text& text, const AddedTokens& tokens, Ids& ids, const std::function<void(const Text&)>& rest) const;

    AddedTokens raw_, after_normalizing_;
    std::vector<Step> normalizer_;
    std::function<std::vector<Text>(const Text&)> split_;
    std::function<void(const Text&, Ids&)> model_;
    std::vector<Joining> decoder_;
    std::unordered_map<std::int64_t, std::string> tokens_;  // by id, those that a text can show
    Ids around_;
};

// The two models; `json` is the "model" of a tokenizer.json. Each takes a piece of text and appends its ids.
std::function<void(const Text&, Ids&)> byte_level_bpe(const Json& json, std::shared_ptr<const Vocabulary> vocabulary);
std::function<void(const Text&, Ids&)> word_piece(const Json& json, std::shared_ptr<const Vocabulary> vocabulary);

// One tokenizer of the text encoder: cut and padded to the windows that the model takes.
class PromptTokenizer {
public:
    PromptTokenizer(const Bundle& bundle, const TokenizerSpec& spec);

    Ids encode(const std::string& prompt, std::int64_t windows) const;  // [windows · length]

private:
    Tokenizer tokenizer_;
    TokenizerSpec spec_;
    std::int64_t length_;
};

}  // namespace dnp::core
