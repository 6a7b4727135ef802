// torch's CPU normal generator: dnp/runtime/sampling/noise.py in C++, equal to it to the bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <random>

namespace dnp::core {

// One torch.Generator("cpu"): successive draws continue one sequence. Only the low 32 bits of a seed matter, as torch
// seeds its twister with those alone.
class TorchNoise {
public:
    explicit TorchNoise(std::int64_t seed) : twister_(static_cast<std::uint32_t>(seed)) {}

    void randn(float* values, std::size_t count);  // torch.randn of so many values

private:
    float uniform();  // [0, 1), 24 random bits
    double scalar();

    std::mt19937 twister_;  // its seeding is Knuth's, as torch's
    std::optional<double> spare_;
};

}  // namespace dnp::core
