#include "search.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace dnp::core {

namespace {

constexpr float never = -1e9f;  // transformers' score of what must not be chosen

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

// The indices of the `count` largest, largest first, of equals the first first.
std::vector<std::int64_t> largest(const std::vector<float>& scores, std::int64_t count) {
    std::vector<std::int64_t> order(scores.size());
    std::iota(order.begin(), order.end(), std::int64_t{0});
    auto before = [&](std::int64_t a, std::int64_t b) { return scores[at(a)] != scores[at(b)] ? scores[at(a)] > scores[at(b)] : a < b; };
    std::partial_sort(order.begin(), order.begin() + count, order.end(), before);
    order.resize(at(count));
    return order;
}

}  // namespace

BeamSearch::BeamSearch(const Ids& prompt, std::int64_t images, std::int64_t beams, std::int64_t end, std::int64_t min_length, std::int64_t max_length)
    : images_(images), beams_(beams), end_(end), min_length_(min_length), max_length_(max_length),
      start_(static_cast<std::int64_t>(prompt.size())), length_(start_), running_(at(images * beams), prompt), scores_(at(images * beams), never),
      ended_(at(images)), improving_(at(images), true), done_(length_ >= max_length) {
    for (std::int64_t image = 0; image < images; ++image) scores_[at(image * beams)] = 0;  // all beams are equal: continue the first only
}

Ids BeamSearch::advance(const float* logits, std::int64_t vocab) {
    Ids parents;
    std::vector<Ids> running;
    ++length_;
    for (std::int64_t image = 0; image < images_; ++image) {
        std::vector<float> scores(at(beams_ * vocab));
        for (std::int64_t beam = 0; beam < beams_; ++beam) {
            const float* row = logits + (image * beams_ + beam) * vocab;
            float most = *std::max_element(row, row + vocab), sum = 0;
            for (std::int64_t token = 0; token < vocab; ++token) sum += std::exp(row[token] - most);
            float log_sum = std::log(sum), before = scores_[at(image * beams_ + beam)];
            for (std::int64_t token = 0; token < vocab; ++token) scores[at(beam * vocab + token)] = row[token] - most - log_sum + before;
            if (length_ - 1 < min_length_) scores[at(beam * vocab + end_)] = -std::numeric_limits<float>::infinity();
        }
        // Of one beam at most one candidate ends, so twice the beams leave enough that go on.
        auto pick = largest(scores, 2 * beams_);
        std::vector<Ids> candidates;
        std::vector<float> top, going_on;
        for (std::int64_t rank = 0; rank < 2 * beams_; ++rank) {
            std::int64_t parent = pick[at(rank)] / vocab, token = pick[at(rank)] % vocab;
            candidates.push_back(running_[at(image * beams_ + parent)]);
            candidates.back().push_back(token);
            bool ends = token == end_ || length_ >= max_length_;
            top.push_back(scores[at(pick[at(rank)])]), going_on.push_back(top.back() + (ends ? never : 0.0f));
            // Those further down only stand in for the ended ones of the first `beams_`.
            if (ends && rank < beams_ && improving_[at(image)])
                ended_[at(image)].push_back({top.back() / static_cast<float>(length_ - start_), candidates.back()});
        }
        auto& ended = ended_[at(image)];
        std::stable_sort(ended.begin(), ended.end(), [](const Ended& a, const Ended& b) { return a.mean > b.mean; });
        if (ended.size() > at(beams_)) ended.resize(at(beams_));
        auto chosen = largest(going_on, beams_);
        for (std::int64_t beam = 0; beam < beams_; ++beam) {
            std::int64_t rank = chosen[at(beam)];
            scores_[at(image * beams_ + beam)] = going_on[at(rank)];
            running.push_back(candidates[at(rank)]);
            parents.push_back(image * beams_ + pick[at(rank)] / vocab);
        }
        float best = scores_[at(image * beams_)] / static_cast<float>(length_ - start_);
        float worst = ended.size() == at(beams_) ? ended.back().mean : never;
        if (!(best > worst)) improving_[at(image)] = false;
    }
    running_ = std::move(running);
    done_ = length_ >= max_length_ || std::none_of(improving_.begin(), improving_.end(), [](bool improves) { return improves; });
    return parents;
}

std::vector<Ids> BeamSearch::results() const {
    std::vector<Ids> best;
    for (std::size_t image = 0; image < ended_.size(); ++image) best.push_back(ended_[image].empty() ? running_[image * at(beams_)] : ended_[image][0].ids);
    return best;
}

}  // namespace dnp::core
