#include "schedule.hpp"

#include <algorithm>

#include "samplers.hpp"

namespace dnp::core {

namespace {

constexpr double karras_rho = 7.0;
constexpr double beta_shape = 0.6;
constexpr float terminal_alpha_bar = 0x1p-24f;
constexpr std::int64_t token_side = 2;
constexpr double pi = 3.141592653589793;

Json value_or(const Json& config, const char* key, Json otherwise) {
    auto found = config.find(key);
    return found == config.end() ? otherwise : *found;
}

bool is_beta(const Json& value) { return is_number(value) && value.get<double>() > 0 && value.get<double>() < 1; }

// torch.linspace in float32: counted from the nearer end, and rounded once.
Floats linspace32(double start, double stop, std::size_t count) {
    auto first = static_cast<float>(start), last = static_cast<float>(stop);
    double step = (last - first) / static_cast<float>(count - 1);
    Floats values(count);
    for (std::size_t i = 0; i < count; ++i) {
        bool near = i < count / 2;
        double from = near ? static_cast<double>(first) : static_cast<double>(last);
        values[i] = static_cast<float>(near ? from + step * static_cast<double>(i) : from - step * static_cast<double>(count - 1 - i));
    }
    return values;
}

Floats cumulative_product(const Floats& betas) {
    Floats product(betas.size());
    double running = 1.0;
    for (std::size_t i = 0; i < betas.size(); ++i) product[i] = static_cast<float>(running *= static_cast<double>(1 - betas[i]));
    return product;
}

// Algorithm 1 of arXiv 2305.08891: sqrt(alpha_bar) shifted to end at 0, and scaled to begin as before.
Floats zero_terminal(const Floats& betas) {
    Floats root = cumulative_product(betas), rescaled(betas.size());
    for (float& value : root) value = std::sqrt(value);
    float first = root.front(), last = root.back();
    Floats alpha_bar(root.size());
    for (std::size_t i = 0; i < root.size(); ++i) {
        float moved = (root[i] - last) * (first / (first - last));
        alpha_bar[i] = moved * moved;
    }
    for (std::size_t i = 0; i < root.size(); ++i) rescaled[i] = 1 - (i ? alpha_bar[i] / alpha_bar[i - 1] : alpha_bar[0]);
    return rescaled;
}

Floats betas_of(const Json& config, const std::string& kind, std::size_t count) {
    if (const Json trained = value_or(config, "trained_betas", nullptr); !trained.is_null()) {
        if (!trained.is_array()) throw settings_error("trained_betas is ", shown(trained), "; give a list of numbers");
        if (trained.size() != count || !std::all_of(trained.begin(), trained.end(), is_beta))
            throw settings_error("trained_betas holds ", trained.size(), " values for ", count,
                                 " training timesteps; give one number between 0 and 1 for each");
        return trained.get<Floats>();
    }
    double start = config["beta_start"].get<double>(), end = config["beta_end"].get<double>();
    if (kind == "linear") return linspace32(start, end, count);
    if (kind == "scaled_linear") {
        Floats betas = linspace32(std::pow(start, 0.5), std::pow(end, 0.5), count);
        for (float& beta : betas) beta *= beta;
        return betas;
    }
    Floats betas(count);  // Nichol & Dhariwal, arXiv 2102.09672: alpha_bar is a squared cosine, each beta at most 0.999
    auto alpha_bar = [&](std::size_t i) {
        double cosine = std::cos((static_cast<double>(i) / static_cast<double>(count) + 0.008) / 1.008 * pi / 2);
        return cosine * cosine;
    };
    for (std::size_t i = 0; i < count; ++i) betas[i] = static_cast<float>(std::min(1 - alpha_bar(i + 1) / alpha_bar(i), 0.999));
    return betas;
}

Schedule read_diffusion(const Json& config) {
    Names missing;
    for (const char* key : {"beta_start", "beta_end", "beta_schedule"})
        if (!config.contains(key)) missing.push_back(key);
    if (!missing.empty())
        throw settings_error("the scheduler configuration lacks ", joined(missing),
                             "; give the contents of the model's scheduler/scheduler_config.json");
    Schedule s;
    s.settings = config;
    check_choice("beta_schedule", config["beta_schedule"], sampler_data()["beta_schedules"].get<Names>());
    s.beta_schedule = config["beta_schedule"].get<std::string>();
    Json predicts = value_or(config, "prediction_type", "epsilon");
    check_choice("prediction_type", predicts, sampler_data()["prediction_types"].get<Names>());
    s.prediction = predicts == "epsilon" ? Prediction::epsilon : predicts == "sample" ? Prediction::sample : Prediction::v_prediction;
    for (const char* key : {"beta_start", "beta_end"})
        if (!is_beta(config[key])) throw settings_error(key, " is ", shown(config[key]), "; give a number between 0 and 1");
    s.zero_terminal_snr = truthy(value_or(config, "rescale_betas_zero_snr", false));
    if (s.zero_terminal_snr && s.prediction == Prediction::epsilon)
        throw settings_error("rescale_zero_terminal_snr is true with prediction_type 'epsilon', which tells nothing of x_0 in pure noise; "
                             "such a model is trained with 'v_prediction'");
    Json count = value_or(config, "num_train_timesteps", 1000);
    if (!is_integer(count, 2, 100000)) throw settings_error("train_timesteps is ", shown(count), "; give a whole number from 2 to 100000");
    s.train_timesteps = count.get<std::int64_t>();

    Floats betas = betas_of(config, s.beta_schedule, static_cast<std::size_t>(s.train_timesteps));
    s.alphas_cumprod = cumulative_product(s.zero_terminal_snr ? zero_terminal(betas) : betas);
    Floats alpha_bar = s.alphas_cumprod;
    if (s.zero_terminal_snr) alpha_bar.back() = terminal_alpha_bar;
    float before = 0;
    for (float a : alpha_bar) {
        float sigma = std::sqrt((1 - a) / a);
        if (!(sigma > before))
            throw settings_error("betas from ", betas.front(), " to ", betas.back(), " give ", s.train_timesteps,
                                 " noise levels that do not all differ in float32; give the betas the model was trained with");
        s.sigmas.push_back(before = sigma);
    }
    return s;
}

Schedule::DynamicShift read_dynamic_shift(const Json& config) {
    Json kind = value_or(config, "time_shift_type", "exponential");
    check_choice("time_shift_type", kind, {"exponential", "linear"});
    Json low = value_or(config, "base_image_seq_len", 256), high = value_or(config, "max_image_seq_len", 4096);
    if (!is_integer(low, 1) || !is_integer(high, 1) || low >= high)
        throw settings_error("base_image_seq_len and max_image_seq_len are ", shown(low), " and ", shown(high),
                             "; give two whole numbers, the larger last");
    Json first = value_or(config, "base_shift", 0.5), second = value_or(config, "max_shift", 1.15);
    for (const Json& mu : {first, second})
        if (!is_number(mu) || std::abs(mu.get<double>()) > 10)
            throw settings_error("base_shift and max_shift are ", shown(first), " and ", shown(second), "; give numbers from -10 to 10");
    return {{low.get<std::int64_t>(), high.get<std::int64_t>()}, {first.get<double>(), second.get<double>()}, kind == "exponential"};
}

Schedule read_flow(const Json& config) {
    Json predicts = value_or(config, "prediction_type", "flow_prediction");
    if (predicts != "flow_prediction")
        throw settings_error("prediction_type is ", shown(predicts), ", and a flow matching model's is 'flow_prediction'");
    Json shift = 1.0, one = value_or(config, "shift", nullptr), other = value_or(config, "flow_shift", nullptr);
    if (!one.is_null() && !other.is_null() && !same(one, other))
        throw settings_error("shift is ", shown(one), " and flow_shift ", shown(other), "; give one of them");
    if (!one.is_null() || !other.is_null()) shift = one.is_null() ? other : one;
    Schedule s;
    s.flow = true, s.prediction = Prediction::flow_prediction, s.settings = config;
    if (truthy(value_or(config, "use_dynamic_shifting", false))) {
        s.dynamic = read_dynamic_shift(config);
    } else {
        if (!is_number(shift) || shift.get<double>() <= 0 || shift.get<double>() > 1e6)
            throw settings_error("shift is ", shown(shift), "; give a number above 0, such as 3.0");
        s.shift = shift.get<double>();
    }
    Json count = value_or(config, "num_train_timesteps", 1000);
    if (!is_integer(count, 2, 100000)) throw settings_error("train_timesteps is ", shown(count), "; give a whole number from 2 to 100000");
    s.train_timesteps = count.get<std::int64_t>();
    if (Json terminal = value_or(config, "shift_terminal", nullptr); truthy(terminal)) {
        if (!is_number(terminal) || terminal.get<double>() <= 0 || terminal.get<double>() >= 1)
            throw settings_error("shift_terminal is ", shown(terminal), "; give a number between 0 and 1, or null");
        s.terminal = terminal.get<double>();
    }
    return s;
}

// A quantile of the symmetric beta distribution with both parameters beta_shape: by bisection of its power series on
// the lower half, where that converges to the last bit.
double beta_quantile(double share) {
    const double a = beta_shape, lower = std::min(share, 1 - share);
    double terms[64], product = 1.0;
    for (int n = 0; n < 64; ++n) {
        if (n) product *= (n - a) / n;
        terms[n] = product / (a + n);
    }
    double scale = std::tgamma(2 * a) / (std::tgamma(a) * std::tgamma(a)), low = 0, high = 0.5;
    for (int i = 0; i < 60; ++i) {
        double middle = (low + high) / 2, series = 0;
        for (int n = 63; n >= 0; --n) series = series * middle + terms[n];
        (scale * std::pow(middle, a) * series < lower ? low : high) = middle;
    }
    return share <= 0.5 ? low : 1 - low;
}

}  // namespace

Doubles Schedule::sigmas_at(const Doubles& timesteps) const {
    Doubles found;
    for (double t : timesteps) {
        double last = static_cast<double>(train_timesteps - 1), place = std::clamp(t, 0.0, last);
        auto low = static_cast<std::size_t>(std::min(std::floor(place), last - 1));
        double slope = static_cast<double>(sigmas[low + 1]) - static_cast<double>(sigmas[low]);
        double value = place == last ? sigmas.back() : slope * (place - static_cast<double>(low)) + static_cast<double>(sigmas[low]);
        found.push_back(static_cast<float>(value));
    }
    return found;
}

Doubles Schedule::timesteps_at(const Doubles& ratios) const {
    Floats known(sigmas.size());
    std::transform(sigmas.begin(), sigmas.end(), known.begin(), [](float sigma) { return std::log(sigma); });
    Doubles found;
    for (double ratio : ratios) {
        double wanted = std::log(std::max(ratio, 1e-10));
        auto above = std::upper_bound(known.begin(), known.end(), wanted, [](double value, float k) { return value < static_cast<double>(k); });
        auto low = static_cast<std::size_t>(std::clamp<std::int64_t>(above - known.begin() - 1, 0, train_timesteps - 2));
        double gap = static_cast<double>(known[low] - known[low + 1]);  // in float32, as there
        double share = std::clamp((static_cast<double>(known[low]) - wanted) / gap, 0.0, 1.0);
        found.push_back((1 - share) * static_cast<double>(low) + share * static_cast<double>(low + 1));
    }
    return found;
}

Doubles Schedule::timesteps(std::int64_t steps, const std::string& spacing, std::int64_t offset, bool whole, bool interval) const {
    std::int64_t last = train_timesteps, points = interval ? steps + 1 : steps;
    Doubles visited;
    if (spacing == "linspace") {
        visited = linspace(0.0, static_cast<double>(last - 1), points);
        std::reverse(visited.begin(), visited.end());
        if (whole)
            for (double& t : visited) t = std::nearbyint(t);
    } else if (spacing == "leading") {
        for (std::int64_t i = points - 1; i >= 0; --i) visited.push_back(static_cast<double>(i * (last / points)) + static_cast<double>(offset));
    } else {
        // numpy.arange(last, 0, -last / steps): the length by division, each value by multiplication.
        double start = static_cast<double>(last), delta = -start / static_cast<double>(steps);
        auto length = static_cast<std::int64_t>(std::ceil((0.0 - start) / delta));
        double second = start + delta;
        for (std::int64_t i = 0; i < length; ++i)
            visited.push_back(std::nearbyint(i == 1 ? second : start + static_cast<double>(i) * (second - start)) - 1.0);
    }
    if (static_cast<std::int64_t>(visited.size()) > steps) visited.resize(static_cast<std::size_t>(steps));
    bool descending = std::adjacent_find(visited.begin(), visited.end(), [](double a, double b) { return !(b < a); }) == visited.end();
    if (visited.front() >= static_cast<double>(last) || !descending)
        throw settings_error(steps, " steps do not fit into ", last, " training timesteps with ", spacing,
                             " spacing; use fewer steps, or another spacing");
    return visited;
}

Doubles Schedule::lcm_timesteps(std::int64_t steps, std::int64_t trained) const {
    trained = std::min(trained, train_timesteps);
    if (steps > trained) throw settings_error("steps is ", steps, ", but lcm knows only ", trained, " timesteps; use 2 to 8 steps");
    Doubles chosen;
    double step = static_cast<double>(trained) / static_cast<double>(steps);
    for (std::int64_t i = 0; i < steps; ++i) {
        auto index = static_cast<std::int64_t>(std::floor(static_cast<double>(i) * step));
        chosen.push_back(static_cast<double>((trained - index) * (train_timesteps / trained)) - 1.0);
    }
    return chosen;
}

Schedule Schedule::sized(std::int64_t height, std::int64_t width) const {
    Schedule copy = *this;
    if (!dynamic) return copy;
    auto tokens = static_cast<double>((height / token_side) * (width / token_side));
    double slope = (dynamic->mu[1] - dynamic->mu[0]) / static_cast<double>(dynamic->tokens[1] - dynamic->tokens[0]);
    double mu = tokens * slope + (dynamic->mu[0] - slope * static_cast<double>(dynamic->tokens[0]));
    if (!dynamic->exponential && mu <= 0)
        throw settings_error("the shift for latents of ", height, "x", width, " is ", mu, ", not above 0; take another size");
    copy.shift = dynamic->exponential ? std::exp(mu) : mu;
    return copy;
}

Doubles Schedule::flow_sigmas(std::int64_t steps, const std::string& spacing, bool interval) const {
    double last = 1 / static_cast<double>(train_timesteps);
    Doubles sigmas;
    if (spacing == "trailing") {
        sigmas = linspace(1.0, 1 / static_cast<double>(steps), steps);
    } else if (interval) {
        sigmas = linspace(1.0, last, steps + 1);
        sigmas.pop_back();
    } else {  // a shift that is fixed is applied to the last sigma before, too: diffusers does it twice
        sigmas = linspace(1.0, dynamic ? last : shifted(last), steps);
    }
    for (double& sigma : sigmas) sigma = shifted(sigma);
    return stretched(std::move(sigmas));
}

Doubles Schedule::inner_sigmas(std::int64_t steps) const {
    if (terminal)
        throw settings_error("the scheduler configuration has a shift_terminal, which DPM-Solver does not know; use euler, heun or unipc");
    Doubles sigmas = linspace(1, 1 / static_cast<double>(train_timesteps), steps + 1);
    for (double& sigma : sigmas) sigma = shifted(1.0 - sigma);
    sigmas.erase(sigmas.begin());
    std::reverse(sigmas.begin(), sigmas.end());
    return sigmas;
}

double Schedule::shifted(double sigma) const {
    if (!shift) throw settings_error("the noise levels of this model depend on the image size: give one");
    return *shift * sigma / (1 + (*shift - 1) * sigma);
}

Doubles Schedule::stretched(Doubles sigmas) const {
    if (!terminal) return sigmas;
    double last = sigmas.back();
    if (last == 1) throw settings_error("1 step cannot both begin in noise and end at shift_terminal; use more steps");
    for (double& sigma : sigmas) sigma = 1 - (1 - sigma) / ((1 - last) / (1 - *terminal));
    return sigmas;
}

Schedule read_schedule(const Json& config) {
    Json name = value_or(config, "_class_name", "");
    bool flow_class = name.is_string() && name.get<std::string>().rfind("FlowMatch", 0) == 0;
    bool flow = flow_class || truthy(value_or(config, "use_flow_sigmas", false)) || value_or(config, "prediction_type", "") == "flow_prediction";
    return flow ? read_flow(config) : read_diffusion(config);
}

Doubles spaced(const std::string& kind, std::int64_t steps, double low, double high) {
    Doubles ramp = linspace(0, 1, steps);
    if (kind == "karras") {
        double first = std::pow(high, 1 / karras_rho), last = std::pow(low, 1 / karras_rho);
        for (double& value : ramp) value = std::pow(first + value * (last - first), karras_rho);
        return ramp;
    }
    if (kind == "beta") {
        for (double& value : ramp) value = low + beta_quantile(1 - value) * (high - low);
        return ramp;
    }
    Doubles levels = linspace(std::log(high), std::log(low), steps);
    for (double& value : levels) value = std::exp(value);
    return levels;
}

Doubles linspace(double start, double stop, std::int64_t count) {
    Doubles values(static_cast<std::size_t>(count));
    double gaps = static_cast<double>(count - 1), step = (stop - start) / gaps;
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(i) * step + start;
    if (count == 1) values[0] = start;
    if (count > 1) values.back() = stop;
    return values;
}

}  // namespace dnp::core
