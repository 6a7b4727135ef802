#include "captioner.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "search.hpp"

namespace dnp::core {

namespace {

Ids repeated(std::int64_t value, std::int64_t count) { return Ids(static_cast<std::size_t>(count), value); }

}  // namespace

Captioner::Captioner(const Bundle& bundle, const Engine& engine)
    : bundle_(bundle), encode_(bundle, "encode_image", engine), step_(bundle, "caption_step", engine), tokenizer_(bundle.path / bundle.caption.tokenizer) {
    for (const char* name : {"cross_keys", "cross_values"}) step_.alias(name, encode_.output(name));
    for (const char* name : {"tokens", "position", "keys", "values"}) step_.feed_back(name, std::string("next_") + name);
}

void Captioner::check(const CaptionSettings& settings) const {
    auto given = static_cast<std::int64_t>(tokenizer_.encode(settings.prefix).size());
    if (given + 1 >= settings.max_length)
        throw settings_error("the caption prefix has ", given, " tokens, which leaves no room for a caption of at most ", settings.max_length,
                             " tokens, the begin token included: shorten it, or raise max_length (up to ", bundle_.caption.length, ")");
}

std::int64_t Captioner::at_most(std::int64_t images, const CaptionSettings& settings) const {
    images = std::min(encode_.at_most("batch", images), step_.at_most("images", images));
    return std::max<std::int64_t>(1, step_.at_most("sequences", images * settings.beams) / settings.beams);
}

void Captioner::check(std::int64_t images, std::int64_t height, std::int64_t width, const CaptionSettings& settings) const {
    encode_.check({{"batch", images}, {"image_height", height}, {"image_width", width}});
    step_.check({{"sequences", images * settings.beams}, {"images", images}});
}

std::vector<std::string> Captioner::captions(const Pixels& images, const CaptionSettings& settings, Stop& stop,
                                             const std::function<void(std::int64_t)>& report) {
    check(settings);
    see(images, stop);
    Ids prompt{bundle_.caption.bos}, prefix = tokenizer_.encode(settings.prefix);
    prompt.insert(prompt.end(), prefix.begin(), prefix.end());
    begin(prompt, images.count, settings);
    auto rows = settings.beams == 1 ? greedily(prompt, images.count, settings, stop, report) : with_beams(prompt, images.count, settings, stop, report);
    std::vector<std::string> found;
    for (const Ids& ids : rows) found.push_back(tokenizer_.decode(ids));
    return found;
}

void Captioner::see(const Pixels& images, Stop& stop) {
    std::int64_t size = bundle_.caption.image_size;
    auto columns = resize_weights(images.width, size), rows = resize_weights(images.height, size);
    encode_.reshape({{"batch", images.count}, {"image_height", images.height}, {"image_width", images.width}});
    encode_.input("image").fill(images.values);
    auto transposed = encode_.input("resize_columns").as<float>();  // [width, size]
    for (std::int64_t x = 0; x < images.width; ++x)
        for (std::int64_t to = 0; to < size; ++to) transposed[x * size + to] = columns[static_cast<std::size_t>(to * images.width + x)];
    encode_.input("resize_rows").fill(rows);
    encode_.run(stop);
}

// Shapes the decoder, and puts it before the first token.
void Captioner::begin(const Ids& prompt, std::int64_t images, const CaptionSettings& settings) {
    std::int64_t sequences = images * settings.beams;
    step_.reshape({{"sequences", sequences}, {"images", images}});
    write_tokens(std::vector<Ids>(static_cast<std::size_t>(sequences), prompt));
    step_.input("position").fill(repeated(0, sequences));
    step_.input("prompt_length").fill(repeated(static_cast<std::int64_t>(prompt.size()), sequences));
    step_.input("min_length").fill(repeated(settings.min_length, sequences));
    Ids parent(static_cast<std::size_t>(sequences));
    for (std::size_t i = 0; i < parent.size(); ++i) parent[i] = static_cast<std::int64_t>(i);
    step_.input("parent").fill(parent);
}

void Captioner::write_tokens(const std::vector<Ids>& rows) {
    Buffer& tokens = step_.input("tokens");  // [sequences, length]
    std::fill_n(tokens.as<std::int64_t>(), tokens.count(), bundle_.caption.pad);
    for (std::size_t row = 0; row < rows.size(); ++row)
        std::copy(rows[row].begin(), rows[row].end(), tokens.as<std::int64_t>({static_cast<std::int64_t>(row)}));
}

void Captioner::run(bool first, Stop& stop) {
    step_.run(stop);
    if (!first) return;
    Buffer& logits = step_.output("logits");
    if (!std::all_of(logits.as<float>(), logits.as<float>() + logits.count(), [](float value) { return std::isfinite(value); }))
        throw Error(Code::general, "what the captioner computes of the image are no longer finite numbers; use a bundle of higher precision, or "
                                   "export it with --check-ranges");
}

// The graph itself chooses.
std::vector<Ids> Captioner::greedily(const Ids& prompt, std::int64_t images, const CaptionSettings& settings, Stop& stop,
                                     const std::function<void(std::int64_t)>& report) {
    std::vector<Ids> rows;
    for (std::int64_t length = 2; length <= settings.max_length; ++length) {
        run(length == 2, stop);
        rows.clear();
        bool all_ended = true;
        for (std::int64_t image = 0; image < images; ++image) {
            auto tokens = step_.output("next_tokens").as<std::int64_t>({image});
            auto chosen = tokens + std::min<std::int64_t>(length, static_cast<std::int64_t>(prompt.size())), last = tokens + length;
            auto end = std::find(chosen, last, bundle_.caption.eos);
            rows.emplace_back(tokens, end == last ? last : end + 1);
            all_ended = all_ended && end != last;
        }
        report(length);
        if (all_ended) break;
    }
    return rows;
}

// The host chooses, token by token.
std::vector<Ids> Captioner::with_beams(const Ids& prompt, std::int64_t images, const CaptionSettings& settings, Stop& stop,
                                       const std::function<void(std::int64_t)>& report) {
    BeamSearch search(prompt, images, settings.beams, bundle_.caption.eos, settings.min_length, settings.max_length);
    for (std::int64_t length = 1; !search.done(); ++length) {
        run(length == 1, stop);
        if (length >= static_cast<std::int64_t>(prompt.size())) {
            Ids parent = search.advance(step_.output("logits").as<float>(), bundle_.caption.vocab);
            write_tokens(search.running());
            step_.input("parent").fill(parent);
        }
        report(length + 1);
    }
    return search.results();
}

}  // namespace dnp::core
