// A request, resolved: everything decided and checked, with the sampler tables that it runs: dnp/runtime/job.py.
#pragma once

#include <optional>
#include <string>

#include "bundle.hpp"
#include "samplers.hpp"

namespace dnp::core {

// How a caption is searched for. Lengths count tokens, begin token and prefix included.
struct CaptionSettings {
    std::int64_t beams = 1;
    std::string prefix;
    std::int64_t min_length = 0, max_length = 0;
};

struct Job {
    OrderedJson request;  // in a user's words, every setting explicit
    std::string prompt, negative;
    bool runs_dns, compare;
    std::int64_t images, windows, height, width;  // in pixels
    std::int64_t seed, dns_seed;                  // of the first image
    SamplerTable final, dns;
    CaptionSettings caption;
};

// The job that settings are, those of Request in Python, with the defaults of the bundle. Throws settings_error for
// whatever cannot be honoured, before any work is done.
Job resolve(const Json& settings, const Bundle& bundle, const Schedule& schedule);

// The settings of captioning alone; `length` is that of the caches. Throws settings_error.
CaptionSettings caption_settings(const Json& settings, const Bundle& bundle);

// Throws settings_error when what a bundle does by default is no table: a bundle that could never run.
void check_defaults(const Bundle& bundle, const Schedule& schedule);

}  // namespace dnp::core
