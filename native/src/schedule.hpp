// The noise schedule a model was trained with, and the timesteps a sampler visits: dnp/runtime/sampling/schedule.py.
//
// What is data there in float32 (betas, alpha_bar, noise levels) is float here; what is computed from it is double.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "json.hpp"

namespace dnp::core {

using Doubles = std::vector<double>;
using Floats = std::vector<float>;

// One noise level, x = alpha x_0 + sigma eps: alpha² + sigma² = 1 in diffusion, alpha + sigma = 1 in a flow.
struct Level {
    double alpha, sigma;

    double ratio() const { return sigma / alpha; }
    double log_snr() const { return std::log(alpha / sigma); }  // infinite without noise
    bool operator==(const Level& other) const { return alpha == other.alpha && sigma == other.sigma; }

    static Level of_alpha_bar(double alpha_bar) { return {std::sqrt(alpha_bar), std::sqrt(1.0 - alpha_bar)}; }
    static Level of_ratio(double ratio) {
        double alpha = 1.0 / std::sqrt(ratio * ratio + 1.0);
        return {alpha, ratio * alpha};
    }
    static Level of_flow(double sigma) { return {1.0 - sigma, sigma}; }
};

constexpr Level clean{1.0, 0.0};

enum class Prediction { epsilon, sample, v_prediction, flow_prediction };

// Of diffusion, and of flow matching: each has what the other lacks.
struct Schedule {
    bool flow = false;
    std::int64_t train_timesteps = 1000;
    Prediction prediction = Prediction::epsilon;
    Json settings;  // what the scheduler configuration says to samplers

    // Diffusion.
    std::string beta_schedule;
    bool zero_terminal_snr = false;
    Floats alphas_cumprod, sigmas;  // alpha_bar, and sigma/alpha, by timestep

    // Flow matching.
    std::optional<double> shift;  // none before `sized`, where it depends on the image's size
    struct DynamicShift {
        std::int64_t tokens[2];
        double mu[2];
        bool exponential;
    };
    std::optional<DynamicShift> dynamic;
    std::optional<double> terminal;

    Level level(std::int64_t timestep) const { return Level::of_alpha_bar(alphas_cumprod.at(static_cast<std::size_t>(timestep))); }
    Doubles sigmas_at(const Doubles& timesteps) const;
    Doubles timesteps_at(const Doubles& ratios) const;
    Doubles timesteps(std::int64_t steps, const std::string& spacing, std::int64_t offset, bool whole, bool interval) const;
    Doubles lcm_timesteps(std::int64_t steps, std::int64_t trained) const;

    Schedule sized(std::int64_t height, std::int64_t width) const;  // of latents
    Doubles flow_sigmas(std::int64_t steps, const std::string& spacing, bool interval) const;
    Doubles inner_sigmas(std::int64_t steps) const;

private:
    double shifted(double sigma) const;
    Doubles stretched(Doubles sigmas) const;
};

// The schedule of a diffusers scheduler_config.json. Throws settings_error when it cannot be followed.
Schedule read_schedule(const Json& config);

// Noise levels from `high` to `low`; kinds: karras, exponential, lu, beta.
Doubles spaced(const std::string& kind, std::int64_t steps, double low, double high);

Doubles linspace(double start, double stop, std::int64_t count);  // as numpy.linspace

}  // namespace dnp::core
