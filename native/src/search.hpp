// Which token comes next: beam search over the logits of `caption_step`: dnp/runtime/captioning/search.py.
#pragma once

#include <cstdint>
#include <vector>

#include "tokenizer.hpp"

namespace dnp::core {

// Keeps the likeliest beginnings of each image, and its best captions that have ended. Token for token transformers'
// `generate` with its defaults. Images never influence each other.
class BeamSearch {
public:
    BeamSearch(const Ids& prompt, std::int64_t images, std::int64_t beams, std::int64_t end, std::int64_t min_length, std::int64_t max_length);

    bool done() const { return done_; }
    const std::vector<Ids>& running() const { return running_; }  // [images · beams]

    // Chooses a token for each sequence, by logits [images · beams, vocab]. Gives the sequence that each one continues.
    Ids advance(const float* logits, std::int64_t vocab);
    std::vector<Ids> results() const;  // of each image: prompt, tokens chosen, and the end token unless the length ran out

private:
    struct Ended {
        float mean;
        Ids ids;
    };

    std::int64_t images_, beams_, end_, min_length_, max_length_, start_, length_;
    std::vector<Ids> running_;
    std::vector<float> scores_;               // [images · beams]
    std::vector<std::vector<Ended>> ended_;   // [images], best first
    std::vector<bool> improving_;             // [images]
    bool done_;
};

}  // namespace dnp::core
