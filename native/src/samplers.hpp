// Samplers as tables, one row of numbers per network call: dnp/runtime/sampling/samplers.py and settings.py.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "generated/constants.hpp"
#include "schedule.hpp"

namespace dnp::core {

using Columns = std::array<float, column::count>;

struct SamplerTable {
    std::vector<Columns> rows;            // one a call, and a last one that stands still
    double init_noise_sigma;              // the factor of the starting noise
    std::vector<std::vector<int>> roles;  // the roles that each call has a row of
    std::int64_t noise_steps;             // how many calls draw fresh noise

    std::int64_t calls() const { return static_cast<std::int64_t>(roles.size()); }
    bool perp_neg() const { return rows[0][column::perpendicular] != 0; }
};

// What a pass asks for, checked but for what depends on the sampler.
struct SamplerSettings {
    std::string sampler;
    std::int64_t steps;
    Doubles guidance;  // w, one a step
    double eta = 0;
    std::string spacing{};  // empty: the schedule's own
    double embedded = 1;
    std::map<std::string, double> methods{};
};

// Throws settings_error for what cannot be honoured.
SamplerTable sampler_table(const Schedule& schedule, const SamplerSettings& asked);

Columns identity_row();  // stands still, whatever the network returns

bool is_guidance(const Json& value);  // a number that a table can hold

// What is taken over from Python as data: samplers, the settings of their classes, quadrature nodes.
const Json& sampler_data();
Names sampler_names();

}  // namespace dnp::core
