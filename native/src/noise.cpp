#include "noise.hpp"

#include <cmath>

namespace dnp::core {

namespace {

constexpr std::size_t block = 16;  // ATen fills 16 values or more in blocks: 8 radii and 8 angles
constexpr double tau = 6.283185307179586;

struct SineCosine {
    float sine, cosine;
};

// numpy's float32 sine and cosine, on which dnp's noise in Python stands: Cody and Waite's reduction to [-π/4, π/4],
// then a polynomial, each step one fused multiply-add. For angles from 0 to 2π.
SineCosine sine_cosine(float x) {
    constexpr float magic = 0x1.8p+23f;  // rounds to a whole number
    float quadrant = (x * 0x1.45f306p-1f + magic) - magic;
    float r = std::fma(quadrant, -0x1.921fb0p+00f, x);
    r = std::fma(quadrant, -0x1.5110b4p-22f, r);
    r = std::fma(quadrant, -0x1.846988p-48f, r);
    float r2 = r * r;
    float cosine = std::fma(0x1.98e616p-16f, r2, -0x1.6c06dcp-10f);
    cosine = std::fma(cosine, r2, 0x1.55553cp-05f);
    cosine = std::fma(cosine, r2, -0x1.000000p-01f);
    cosine = std::fma(cosine, r2, 1.0f);
    float sine = std::fma(0x1.7d3bbcp-19f, r2, -0x1.a06bbap-13f);
    sine = std::fma(sine, r2, 0x1.11119ap-07f);
    sine = std::fma(sine, r2, -0x1.555556p-03f);
    sine = std::fma(sine, r2, 0.0f);
    sine = std::fma(sine, r, r);
    switch (static_cast<int>(quadrant) & 3) {
        case 0: return {sine, cosine};
        case 1: return {cosine, -sine};
        case 2: return {-sine, -cosine};
        default: return {-cosine, sine};
    }
}

// 16 uniform values to 16 normal ones, in place: the first 8 are radii.
void box_muller(float* u) {
    for (std::size_t i = 0; i < block / 2; ++i) {
        double radius = std::sqrt(-2.0 * std::log(1.0 - static_cast<double>(u[i])));
        auto [sine, cosine] = sine_cosine(static_cast<float>(tau) * u[i + block / 2]);
        u[i] = static_cast<float>(radius * cosine);
        u[i + block / 2] = static_cast<float>(radius * sine);
    }
}

}  // namespace

void TorchNoise::randn(float* values, std::size_t count) {
    if (count < block) {
        for (std::size_t i = 0; i < count; ++i) values[i] = static_cast<float>(scalar());
        return;
    }
    for (std::size_t i = 0; i < count; ++i) values[i] = uniform();
    for (std::size_t i = 0; i + block <= count; i += block) box_muller(values + i);
    if (count % block) {  // the last 16 values are drawn anew, over the end of the block before
        for (std::size_t i = count - block; i < count; ++i) values[i] = uniform();
        box_muller(values + count - block);
    }
}

float TorchNoise::uniform() { return static_cast<float>(twister_() & 0xFFFFFF) * 0x1p-24f; }

// One value as ATen draws it for a small tensor: in double precision, in pairs, the second kept for the next call.
double TorchNoise::scalar() {
    if (spare_) {
        double value = *spare_;
        spare_.reset();
        return value;
    }
    auto random = [&] {
        std::uint64_t high = twister_(), low = twister_();
        return static_cast<double>((high << 32 | low) & ((std::uint64_t{1} << 53) - 1)) * 0x1p-53;
    };
    double angle = random(), radius = random();
    double r = std::sqrt(-2.0 * std::log1p(-radius));
    spare_ = r * std::sin(tau * angle);
    return r * std::cos(tau * angle);
}

}  // namespace dnp::core
