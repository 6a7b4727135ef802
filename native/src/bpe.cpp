// Byte-level byte pair encoding (arXiv 1508.07909), as CLIP has it: a word's last byte carries the suffix "</w>".
#include <queue>

#include "tokenizer.hpp"

namespace dnp::core {

namespace {

struct Merge {
    std::int64_t rank, id;
};

// The character that stands for a byte in the vocabulary: itself where it can be seen, one from U+0100 on otherwise.
std::string shown_byte(int byte) {
    auto seen = [](int b) { return (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || (b >= 0xAE && b <= 0xFF); };
    if (seen(byte)) return encode_utf8(Text(1, static_cast<char32_t>(byte)));
    char32_t hidden = 0x100;
    for (int before = 0; before < byte; ++before) hidden += !seen(before);
    return encode_utf8(Text(1, hidden));
}

std::uint64_t pair_key(std::int64_t left, std::int64_t right) { return static_cast<std::uint64_t>(left) << 32 | static_cast<std::uint64_t>(right); }

class Bpe {
public:
    Bpe(const Json& json, const Vocabulary& vocabulary) {
        for (const char* key : {"dropout", "fuse_unk", "byte_fallback", "ignore_merges"})
            if (auto value = json.find(key); value != json.end() && truthy(*value)) throw bundle_error("its model has ", key, ", which libdnp has not");
        if (auto prefix = json.find("continuing_subword_prefix"); prefix != json.end() && truthy(*prefix))
            throw bundle_error("its model has a continuing_subword_prefix, which libdnp has not");
        std::string suffix = json.value("end_of_word_suffix", Json()).is_string() ? json["end_of_word_suffix"].get<std::string>() : "";
        auto id_of = [&](const std::string& token) {
            auto found = vocabulary.find(token);
            return found == vocabulary.end() ? -1 : found->second;
        };
        std::int64_t unknown = json.value("unk_token", Json()).is_string() ? id_of(json["unk_token"].get<std::string>()) : -1;
        for (int byte = 0; byte < 256; ++byte) {
            inner_[byte] = id_of(shown_byte(byte)), last_[byte] = id_of(shown_byte(byte) + suffix);
            if (inner_[byte] < 0) inner_[byte] = unknown;
            if (last_[byte] < 0) last_[byte] = unknown;
            if (inner_[byte] < 0 || last_[byte] < 0) throw bundle_error("its vocab lacks the byte ", byte, ", and it has no unk_token");
        }
        const Json& merges = json.value("merges", Json::array());
        if (!merges.is_array()) throw bundle_error("its merges must be a list, not ", shown(merges));
        std::int64_t rank = 0;
        for (const Json& merge : merges) {
            std::string left, right;
            if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
                left = merge[0].get<std::string>(), right = merge[1].get<std::string>();
            } else if (merge.is_string() && merge.get<std::string>().find(' ') != std::string::npos) {
                std::string both = merge.get<std::string>();
                std::size_t space = both.find(' ');
                left = both.substr(0, space), right = both.substr(space + 1);
            } else {
                throw bundle_error("its merges hold ", shown(merge), ", which is no pair");
            }
            std::int64_t a = id_of(left), b = id_of(right), whole = id_of(left + right);
            if (a < 0 || b < 0 || whole < 0) throw bundle_error("its merges name '", left, "' and '", right, "', which are not in its vocab, or not together");
            merges_[pair_key(a, b)] = {rank++, whole};
        }
    }

    void operator()(const Text& piece, Ids& ids) const {
        std::string bytes = encode_utf8(piece);
        std::vector<Symbol> symbols(bytes.size());
        for (std::size_t i = 0; i < bytes.size(); ++i) {
            auto byte = static_cast<unsigned char>(bytes[i]);
            symbols[i] = {i + 1 < bytes.size() ? inner_[byte] : last_[byte], static_cast<std::ptrdiff_t>(i) - 1, static_cast<std::ptrdiff_t>(i) + 1, true};
        }
        merge(symbols);
        for (const Symbol& symbol : symbols)
            if (symbol.there) ids.push_back(symbol.id);
    }

private:
    struct Symbol {
        std::int64_t id;
        std::ptrdiff_t previous, next;
        bool there;
    };

    // The lowest rank first, of equals the leftmost.
    void merge(std::vector<Symbol>& symbols) const {
        using Candidate = std::tuple<std::int64_t, std::ptrdiff_t, std::int64_t>;  // rank, place, new id
        std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
        auto size = static_cast<std::ptrdiff_t>(symbols.size());
        auto at = [&](std::ptrdiff_t place) -> Symbol& { return symbols[static_cast<std::size_t>(place)]; };
        auto consider = [&](std::ptrdiff_t place) {
            if (place < 0 || at(place).next >= size) return;
            auto found = merges_.find(pair_key(at(place).id, at(at(place).next).id));
            if (found != merges_.end()) queue.emplace(found->second.rank, place, found->second.id);
        };
        for (std::ptrdiff_t place = 0; place < size; ++place) consider(place);
        while (!queue.empty()) {
            auto [rank, place, id] = queue.top();
            queue.pop();
            Symbol& left = at(place);
            if (!left.there || left.next >= size) continue;
            Symbol& right = at(left.next);
            auto found = merges_.find(pair_key(left.id, right.id));
            if (found == merges_.end() || found->second.id != id) continue;  // one of the two has changed since
            right.there = false;
            left.id = id, left.next = right.next;
            if (left.next < size) at(left.next).previous = place;
            consider(left.previous), consider(place);
        }
    }

    std::int64_t inner_[256], last_[256];
    std::unordered_map<std::uint64_t, Merge> merges_;
};

}  // namespace

std::function<void(const Text&, Ids&)> byte_level_bpe(const Json& json, std::shared_ptr<const Vocabulary> vocabulary) {
    return [bpe = std::make_shared<const Bpe>(json, *vocabulary)](const Text& piece, Ids& ids) { (*bpe)(piece, ids); };
}

}  // namespace dnp::core
