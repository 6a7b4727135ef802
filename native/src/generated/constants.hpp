// Written by native/generate.py; do not edit.
#pragma once

#include <cstdint>

namespace dnp::core {

// The columns of a sampler table: see dnp/engine/bundle/columns.py.
namespace column {
constexpr std::int64_t slots = 4;
constexpr std::int64_t timestep = 0;
constexpr std::int64_t embedded = 1;
constexpr std::int64_t guidance = 2;
constexpr std::int64_t third = 3;
constexpr std::int64_t advance = 4;
constexpr std::int64_t draw = 5;
constexpr std::int64_t input = 6;
constexpr std::int64_t state = 10;
constexpr std::int64_t output = 26;
constexpr std::int64_t negative_output = 30;
constexpr std::int64_t noise = 34;
constexpr std::int64_t clean_state = 38;
constexpr std::int64_t clean_output = 42;
constexpr std::int64_t rescale = 43;
constexpr std::int64_t norm_limit = 44;
constexpr std::int64_t parallel = 45;
constexpr std::int64_t zero_star = 46;
constexpr std::int64_t norm_cap = 47;
constexpr std::int64_t perpendicular = 48;
constexpr std::int64_t count = 49;
}  // namespace column

constexpr std::int64_t schema_version = 2;
constexpr std::int64_t batch = 8;
constexpr std::int64_t max_images = 256;
constexpr std::int64_t max_windows = 8;
constexpr std::int64_t max_beams = 16;
constexpr std::int64_t max_characters = 100000;
constexpr std::int64_t max_side = 32768;
constexpr std::int64_t usual_steps = 128;
constexpr std::int64_t beams_at_most = 4;
constexpr std::int64_t cuda_revision = 2;
constexpr std::int64_t tensorrt_revision = 1;
constexpr std::int64_t oldest_gpu = 75;

}  // namespace dnp::core
