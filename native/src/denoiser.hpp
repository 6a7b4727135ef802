// The denoising loop: samples in the places of one `denoise` session, which all take one step at a time.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "samplers.hpp"
#include "session.hpp"
#include "tokenizer.hpp"

namespace dnp::core {

class Denoiser {
public:
    Denoiser(const Bundle& bundle, const Engine& engine);

    std::int64_t at_most(std::int64_t samples) const { return session_.at_most("places", samples); }  // at once
    void check(const SamplerTable& table, std::int64_t samples, std::int64_t height, std::int64_t width, std::int64_t tokens) const;  // throws settings_error

    // Puts one sample of `table` in a place for each seed: its start, its noise and its table. The bank is the caller's.
    void open(const SamplerTable& table, const std::vector<std::int64_t>& seeds, std::int64_t height, std::int64_t width, std::int64_t tokens);
    void step(Stop& stop);  // of all samples; call it as often as the table has calls

    Buffer& bank(const std::string& name) { return session_.input(name); }  // [places, roles, ...]
    Buffer& latents() { return session_.output("latents"); }                // [places, C, h, w]
    Buffer& clean_latents() { return session_.output("clean_latents"); }    // as they are expected at the end

private:
    Sizes sizes_of(const SamplerTable& table, std::int64_t samples, std::int64_t height, std::int64_t width, std::int64_t tokens) const;
    void set_rows(const std::vector<int>& roles);

    Session session_;
    std::int64_t roles_;
    Sizes sizes_;
    const SamplerTable* table_ = nullptr;
    std::size_t done_ = 0;   // calls so far
    std::vector<int> rows_;  // the roles that each place has a row of, as the session has them
};

// What the network is conditioned on: texts, encoded, and the image's size, written into a denoiser's bank.
class Conditioner {
public:
    Conditioner(const Bundle& bundle, const Engine& engine);

    // One text after the other into the entries of `role` in the places; the empty text is ∅.
    void write(Denoiser& denoiser, std::int64_t role, const std::vector<std::string>& texts, std::int64_t height, std::int64_t width,
               std::int64_t windows, Stop& stop);

    void check(std::int64_t windows) const { session_.check({{"tokens", windows * bundle_.text.length}}); }  // throws settings_error
    std::string runs_on() const { return session_.runs_on(); }

private:
    const Bundle& bundle_;
    std::vector<PromptTokenizer> tokenizers_;
    Session session_;
};

}  // namespace dnp::core
