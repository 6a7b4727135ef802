// Images into words: BLIP's image encoder once, then its decoder token by token over caches of a fixed size.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "job.hpp"
#include "session.hpp"
#include "tokenizer.hpp"

namespace dnp::core {

// Images of one size, uint8 [count, height, width, 3].
struct Pixels {
    std::int64_t count = 0, height = 0, width = 0;
    std::vector<std::uint8_t> values;

    const std::uint8_t* image(std::int64_t index) const { return values.data() + index * height * width * 3; }
};

class Captioner {
public:
    Captioner(const Bundle& bundle, const Engine& engine);

    void check(const CaptionSettings& settings) const;  // throws settings_error when a prefix leaves no room

    std::int64_t at_most(std::int64_t images, const CaptionSettings& settings) const;  // at once
    void check(std::int64_t images, std::int64_t height, std::int64_t width, const CaptionSettings& settings) const;  // throws settings_error

    // One caption for each image; `report` hears the length so far after each token.
    std::vector<std::string> captions(const Pixels& images, const CaptionSettings& settings, Stop& stop,
                                      const std::function<void(std::int64_t)>& report);

private:
    void see(const Pixels& images, Stop& stop);
    void begin(const Ids& prompt, std::int64_t images, const CaptionSettings& settings);
    void run(bool first, Stop& stop);
    void write_tokens(const std::vector<Ids>& rows);
    std::vector<Ids> greedily(const Ids& prompt, std::int64_t images, const CaptionSettings&, Stop&, const std::function<void(std::int64_t)>&);
    std::vector<Ids> with_beams(const Ids& prompt, std::int64_t images, const CaptionSettings&, Stop&, const std::function<void(std::int64_t)>&);

    const Bundle& bundle_;
    Session encode_, step_;
    Tokenizer tokenizer_;
};

// Pillow's bicubic resize as a constant matrix [target, source], every weight a multiple of 2^-22:
// dnp/runtime/captioning/resize.py.
std::vector<float> resize_weights(std::int64_t source, std::int64_t target);

}  // namespace dnp::core
