// WordPiece (arXiv 1609.08144), as BERT has it: of each word the longest known beginning, then of what is left.
#include "tokenizer.hpp"

namespace dnp::core {

std::function<void(const Text&, Ids&)> word_piece(const Json& json, std::shared_ptr<const Vocabulary> vocabulary) {
    if (!json.value("unk_token", Json()).is_string() || !json.value("continuing_subword_prefix", Json()).is_string() ||
        !is_integer(json.value("max_input_chars_per_word", Json()), 1, 100000))
        throw bundle_error("its model lacks unk_token, continuing_subword_prefix or max_input_chars_per_word");
    auto unknown = vocabulary->find(json["unk_token"].get<std::string>());
    if (unknown == vocabulary->end()) throw bundle_error("its vocab lacks the unk_token ", shown(json["unk_token"]));
    return [vocabulary, unknown = unknown->second, prefix = json["continuing_subword_prefix"].get<std::string>(),
            most = json["max_input_chars_per_word"].get<std::size_t>()](const Text& word, Ids& ids) {
        Ids found;
        for (std::size_t begin = 0; begin < word.size() && word.size() <= most;) {
            std::size_t end = word.size();
            auto piece = vocabulary->end();
            for (; end > begin; --end) {
                piece = vocabulary->find((begin ? prefix : "") + encode_utf8(word.substr(begin, end - begin)));
                if (piece != vocabulary->end()) break;
            }
            if (end == begin) break;
            found.push_back(piece->second);
            begin = end;
            if (begin == word.size()) {
                ids.insert(ids.end(), found.begin(), found.end());
                return;
            }
        }
        ids.push_back(unknown);
    };
}

}  // namespace dnp::core
