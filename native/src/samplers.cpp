#include "samplers.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "solvers.hpp"

namespace dnp::core {

namespace {

constexpr double from_noise = 1e-6;  // how far from pure noise UniPC begins with a flow; diffusers' number
constexpr double float32_max = std::numeric_limits<float>::max();

bool honoured(const Json& values, const Json& value) {
    if (auto among = values.find("among"); among != values.end())
        return std::any_of(among->begin(), among->end(), [&](const Json& known) { return same(known, value); });
    if (values.value("or_null", false) && value.is_null()) return true;
    if (values.contains("steps"))
        return value.is_array() && std::all_of(value.begin(), value.end(), [](const Json& step) { return is_integer(step, 0); });
    if (values["whole"].get<bool>() ? !is_integer(value) : !is_number(value)) return false;
    double number = value.get<double>();
    return values["low"].get<double>() <= number && (values["high"].is_null() || number <= values["high"].get<double>());
}

std::string described(const Json& values) {
    std::string text;
    if (auto among = values.find("among"); among != values.end()) {
        for (const Json& known : *among) text += (text.empty() ? "" : " or ") + known.dump();
        return text;
    }
    if (values.contains("steps")) return "a list of whole numbers";
    text = cat(values.value("or_null", false) ? "null or " : "", values["whole"].get<bool>() ? "a whole number" : "a number", " from ",
               values["low"].get<double>());
    return values["high"].is_null() ? text : cat(text, " to ", values["high"].get<double>());
}

// How the noise levels are spaced anew, if they are.
std::string conversion_of(const Json& settings) {
    for (const Json& pair : sampler_data()["conversions"])
        if (settings.contains(pair[0]) && truthy(settings[pair[0].get<std::string>()])) return pair[1].get<std::string>();
    return {};
}

// The settings of a class that knows `keys`, under a configuration with some values fixed, checked.
Json read_settings(const Json& keys, const Json& config, const Json& fixed) {
    Json settings = Json::object();
    for (const auto& [key, setting] : keys.items()) {
        Json value = fixed.contains(key) ? fixed[key] : config.contains(key) ? config[key] : setting["default"];
        if (value.is_null() && !honoured(setting["values"], value)) value = setting["default"];
        if (value.is_string() && setting["instead"].contains(value.get<std::string>())) value = setting["instead"][value.get<std::string>()];
        if (!honoured(setting["values"], value)) {
            std::string reason = setting["reason"].get<std::string>();
            throw settings_error("the scheduler configuration has ", key, " = ", shown(value), ", only ", described(setting["values"]),
                                 " can be honoured", reason.empty() ? "" : "; ", reason);
        }
        settings[key] = value;
    }
    Names chosen;
    for (const Json& pair : sampler_data()["conversions"])
        if (auto key = pair[0].get<std::string>(); settings.contains(key) && truthy(settings[key])) chosen.push_back(key);
    if (chosen.size() > 1)
        throw settings_error("the scheduler configuration has both ", chosen[0], " and ", chosen[1], "; only one can be true");
    return settings;
}

// The sampler of a name, for models of the schedule's kind.
const Json& sampler_of(const Schedule& schedule, const std::string& name) {
    check_choice("sampler", name, sampler_names());
    const Json& known = sampler_data()[schedule.flow ? "flow_samplers" : "samplers"];
    if (known.contains(name)) return known[name];
    Names names;
    for (const auto& [other, spec] : known.items()) names.push_back(other);
    throw settings_error(name, " cannot sample a flow matching model; use one of ", joined(names));
}

Names samplers_with(const char* flag) {
    Names names;
    for (const auto& [name, spec] : sampler_data()["samplers"].items())
        if (spec[flag].get<bool>()) names.push_back(name);
    return names;
}

struct Walk {
    Grid grid;
    double init_noise_sigma;
};

void round_to_float(Doubles& values) {
    for (double& value : values) value = static_cast<double>(static_cast<float>(value));
}

Walk flow_walk(const Schedule& schedule, const Json& spec, const SamplerSettings& asked) {
    Json settings = read_settings(sampler_data()["flow_schedulers"][spec["scheduler"].get<std::string>()], schedule.settings, spec["fixed"]);
    bool zero_snr = spec["zero_snr"].get<bool>(), interval = spec["interval"].get<bool>();
    if (!asked.spacing.empty()) {
        check_choice("spacing", asked.spacing, sampler_data()["spacings"].get<Names>());
        if (!zero_snr) throw settings_error("spacing is '", asked.spacing, "', but ", asked.sampler, " has timesteps of its own; leave it out");
        if (asked.spacing == "leading")
            throw settings_error("spacing is 'leading', which a flow matching model has not; use linspace or trailing");
    }
    Doubles sigmas = zero_snr ? schedule.flow_sigmas(asked.steps, asked.spacing.empty() ? "linspace" : asked.spacing, interval)
                              : schedule.inner_sigmas(asked.steps);
    if (auto kind = conversion_of(settings); !kind.empty()) sigmas = spaced(kind, asked.steps, sigmas.back(), sigmas.front());
    if (interval && sigmas[0] > 1 - from_noise) sigmas[0] -= from_noise;
    Doubles timesteps = sigmas;
    for (double& t : timesteps) {
        t *= static_cast<double>(schedule.train_timesteps);
        if (spec["whole"].get<bool>()) t = std::floor(t);
    }
    round_to_float(sigmas);
    std::vector<Level> levels;
    for (double sigma : sigmas) levels.push_back(Level::of_flow(sigma));
    levels.push_back(clean);
    return {{schedule, timesteps, levels, asked.eta, settings}, 1.0};
}

// The timesteps of levels spaced anew; where they must be whole, as diffusers makes them so.
Doubles nearest_timesteps(const Schedule& schedule, const Json& spec, const std::string& conversion, const Doubles& ratios) {
    Doubles timesteps = schedule.timesteps_at(ratios);
    if (!spec["whole"].get<bool>()) return timesteps;
    bool unrounded = spec["scheduler"] == "DPMSolverMultistepScheduler" && schedule.beta_schedule == "squaredcos_cap_v2";
    bool rounded = (conversion == "karras" || conversion == "lu") && !unrounded;
    for (double& t : timesteps) t = rounded ? std::nearbyint(t) : std::floor(t);
    return timesteps;
}

Walk walk(const Schedule& schedule, const Json& spec, const SamplerSettings& asked) {
    Json settings = read_settings(sampler_data()["schedulers"][spec["scheduler"].get<std::string>()], schedule.settings, spec["fixed"]);
    std::string conversion = conversion_of(settings), spacing = asked.spacing;
    bool interval = spec["interval"].get<bool>(), whole = spec["whole"].get<bool>(), anew = !conversion.empty() && interval;
    if (!spacing.empty()) {
        check_choice("spacing", spacing, sampler_data()["spacings"].get<Names>());
        if (anew || !settings.contains("timestep_spacing"))
            throw settings_error("spacing is '", spacing, "', but ", asked.sampler, " has timesteps of its own; leave it out");
    } else if (settings.contains("timestep_spacing")) {
        spacing = settings["timestep_spacing"].get<std::string>();
    }

    Doubles timesteps;
    if (spacing.empty()) {
        timesteps = schedule.lcm_timesteps(asked.steps, settings["original_inference_steps"].get<std::int64_t>());
    } else if (anew) {
        for (std::int64_t t = schedule.train_timesteps - 1; t >= 0; --t) timesteps.push_back(static_cast<double>(t));
    } else {
        timesteps = schedule.timesteps(asked.steps, spacing, settings["steps_offset"].get<std::int64_t>(), whole, interval);
    }
    Doubles ratios = schedule.sigmas_at(timesteps);
    bool is_clean = spec["clean_end"].get<bool>();
    if (settings.contains("final_sigmas_type")) is_clean = settings["final_sigmas_type"] == "zero";
    if (settings.contains("set_alpha_to_one")) is_clean = truthy(settings["set_alpha_to_one"]);
    Level end = is_clean ? clean : schedule.level(0);
    auto lowest = static_cast<double>(schedule.sigmas.front()), highest = static_cast<double>(schedule.sigmas.back());
    bool log_linear = settings.contains("interpolation_type") && settings["interpolation_type"] == "log_linear";
    if (log_linear) ratios = spaced("exponential", asked.steps + 1, lowest, highest);
    if (!conversion.empty()) {
        auto or_else = [&](const char* key, double otherwise) {
            return settings.contains(key) && truthy(settings[key]) ? settings[key].get<double>() : otherwise;
        };
        ratios = spaced(conversion, asked.steps, or_else("sigma_min", ratios.back()), or_else("sigma_max", ratios.front()));
        timesteps = nearest_timesteps(schedule, spec, conversion, ratios);
        end = is_clean ? clean : Level::of_ratio(lowest);  // the last level again, to the last bit
    } else if (log_linear) {  // levels that the timesteps do not have, one of them in the end's place
        end = Level::of_ratio(ratios.back());
        ratios.pop_back();
    }
    round_to_float(ratios);
    std::vector<Level> levels;
    for (double ratio : ratios) levels.push_back(Level::of_ratio(ratio));
    levels.push_back(end);
    double init_noise_sigma = 1.0;
    if (spec["exploding"].get<bool>()) init_noise_sigma = spacing != "leading" ? ratios[0] : std::hypot(ratios[0], 1.0);
    return {{schedule, timesteps, levels, asked.eta, settings}, init_noise_sigma};
}

void check_methods(const std::map<std::string, double>& methods, const Doubles& w) {
    const Json& known = sampler_data()["methods"];
    Names names;
    for (const auto& [name, method] : known.items()) names.push_back(name);
    for (const auto& [name, value] : methods) {
        check_choice("guidance method", name, names);
        double most = known[name]["most"].is_null() ? float32_max : known[name]["most"].get<double>();
        if (!(value >= 0 && value <= most))
            throw settings_error("the guidance method ", name, " is ", value, "; give a number ",
                                 most == float32_max ? "from 0 up" : cat("from 0 to ", most));
    }
    if (auto perp = methods.find("perp_neg"); perp != methods.end())
        for (double value : w)
            if (!(std::abs(value * perp->second) <= float32_max))
                throw settings_error("perp_neg times guidance is too large for a number; give smaller ones");
}

// The branches that a row has a use for.
std::vector<int> roles_of(const Columns& row) {
    float w = row[column::guidance];
    bool measured = row[column::rescale] != 0 || row[column::zero_star] != 0 || row[column::norm_cap] != 0;
    bool negative = std::any_of(&row[column::negative_output], &row[column::noise], [](float value) { return value != 0; });
    if (row[column::third] != 0) return {0, 1, 2};
    if (w == 1 && !negative) return {1};
    return w == 0 && !measured ? std::vector<int>{0} : std::vector<int>{0, 1};
}

}  // namespace

SamplerTable sampler_table(const Schedule& schedule, const SamplerSettings& asked) {
    const Json& spec = sampler_of(schedule, asked.sampler);
    if (asked.steps < 1 || asked.steps > schedule.train_timesteps)
        throw settings_error("steps is ", asked.steps, "; give a whole number from 1 to ", schedule.train_timesteps, ", such as 20");
    const Doubles& w = asked.guidance;
    if (static_cast<std::int64_t>(w.size()) != asked.steps)
        throw settings_error("guidance has ", w.size(), " values for ", asked.steps, " steps; give a finite number, or one for each step");
    if (!(asked.eta >= 0 && asked.eta <= 1)) throw settings_error("eta is ", asked.eta, "; give a number from 0 (no fresh noise) to 1");
    if (asked.eta > 0 && asked.sampler != "ddim")
        throw settings_error("eta is ", asked.eta, ", but ", asked.sampler, " has no eta; leave it at 0, or use ddim");
    if (schedule.zero_terminal_snr && !spec["zero_snr"].get<bool>())
        throw settings_error(asked.sampler, " cannot start from zero terminal SNR; use one of ", joined(samplers_with("zero_snr")));
    if (schedule.prediction == Prediction::sample && !spec["sample"].get<bool>())
        throw settings_error(asked.sampler, " cannot follow a network that predicts x_0; use one of ", joined(samplers_with("sample")));
    check_methods(asked.methods, w);

    auto [grid, init_noise_sigma] = schedule.flow ? flow_walk(schedule, spec, asked) : walk(schedule, spec, asked);
    std::vector<Row> described;
    try {
        described = solve(spec["run"].get<std::string>(), grid);
    } catch (const EndsWithoutNoise&) {
        throw settings_error(asked.sampler, " of order ", shown(grid.settings["solver_order"]),
                             " cannot end without noise; set lower_order_final to true, or final_sigmas_type to 'sigma_min', in the scheduler "
                             "configuration");
    }
    SamplerTable table{{}, init_noise_sigma, {}, 0};
    std::int64_t step = -1;
    for (const Row& row : described) {
        step += !row.extra;
        std::array<double, column::count> wide{};
        Form predicted = grid.predict(row.x, grid.levels[static_cast<std::size_t>(step + row.extra)]).x0;
        double guidance = w[static_cast<std::size_t>(step)];
        wide[column::timestep] = row.timestep, wide[column::guidance] = guidance, wide[column::embedded] = asked.embedded - 1;
        wide[column::advance] = 1, wide[column::parallel] = 1;
        if (row.draws) wide[column::draw] = static_cast<double>(table.noise_steps++);
        for (std::size_t k = 0; k < column::slots; ++k) wide[column::input + k] = row.x[k], wide[column::clean_state + k] = predicted[k];
        for (std::size_t j = 0; j < row.state.size(); ++j) {
            for (std::size_t k = 0; k < column::slots; ++k) wide[column::state + j * column::slots + k] = row.state[j][k];
            wide[column::output + j] = row.state[j][column::slots], wide[column::noise + j] = row.state[j][column::slots + 1];
        }
        wide[column::clean_output] = predicted[column::slots];
        for (const auto& [name, value] : asked.methods) wide[sampler_data()["methods"][name]["column"].get<std::size_t>()] = value;
        if (asked.methods.count("perp_neg")) wide[column::third] *= -guidance, wide[column::perpendicular] = 1;
        Columns narrow;
        for (std::size_t k = 0; k < wide.size(); ++k) {
            narrow[k] = static_cast<float>(wide[k]);
            if (!std::isfinite(narrow[k])) throw settings_error(asked.sampler, " of ", asked.steps, " steps gives no finite table; take other settings");
        }
        table.rows.push_back(narrow);
        table.roles.push_back(roles_of(narrow));
    }
    table.rows.push_back(identity_row());
    return table;
}

Columns identity_row() {
    Columns row{};
    row[column::input] = 1;  // the network still sees the finished latents: finite in, finite out
    for (std::size_t k = 0; k < column::slots; ++k) row[column::state + k * (column::slots + 1)] = 1;
    row[column::clean_state] = 1, row[column::parallel] = 1;
    return row;
}

bool is_guidance(const Json& value) { return is_number(value) && std::abs(value.get<double>()) <= float32_max; }

const Json& sampler_data() {
    static const Json data = Json::parse(
#include "generated/samplers.inc"
    );
    return data;
}

Names sampler_names() {
    Names names;
    for (const auto& [name, spec] : sampler_data()["samplers"].items()) names.push_back(name);
    return names;
}

}  // namespace dnp::core
