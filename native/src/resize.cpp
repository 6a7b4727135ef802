#include <algorithm>
#include <cmath>

#include "captioner.hpp"

namespace dnp::core {

namespace {

// Keys' cubic convolution kernel with a = -1/2, zero beyond two pixels.
double cubic(double x) {
    x = std::abs(x);
    if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1.0;
    return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5 : 0.0;
}

}  // namespace

std::vector<float> resize_weights(std::int64_t source, std::int64_t target) {
    if (source < 1 || source > max_side) throw settings_error("an image has a side of ", source, " pixels; 1 to ", max_side, " are read");
    std::vector<float> matrix(static_cast<std::size_t>(target * source));
    double scale = static_cast<double>(source) / static_cast<double>(target), stretch = std::max(scale, 1.0);  // antialiasing
    for (std::int64_t row = 0; row < target; ++row) {
        double center = (static_cast<double>(row) + 0.5) * scale;
        auto first = static_cast<std::int64_t>(std::max(std::trunc(center - 2 * stretch + 0.5), 0.0));
        auto last = static_cast<std::int64_t>(std::min(std::trunc(center + 2 * stretch + 0.5), static_cast<double>(source)));  // one past
        Doubles weights;
        double sum = 0;
        for (std::int64_t tap = first; tap < last; ++tap) sum += weights.emplace_back(cubic((static_cast<double>(tap) - center + 0.5) / stretch));
        for (std::int64_t tap = first; tap < last; ++tap) {
            double weight = weights[static_cast<std::size_t>(tap - first)] / sum;
            weight = std::trunc(weight * 0x1p22 + std::copysign(0.5, weight)) * 0x1p-22;
            matrix[static_cast<std::size_t>(row * source + tap)] = static_cast<float>(weight);
        }
    }
    return matrix;
}

}  // namespace dnp::core
