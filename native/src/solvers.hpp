// Solvers: the algorithms behind the samplers, run on linear forms instead of latents: dnp/runtime/sampling/solvers.py.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "schedule.hpp"

namespace dnp::core {

// Coefficients over (s_0 .. s_3, o, z): the state's slots, the network's output, fresh noise.
using Form = std::array<double, 6>;

// One network call: where it looks, and what becomes of the state.
struct Row {
    double timestep;
    Form x;                   // the network's input, of the slots only
    std::vector<Form> state;  // the next state; slots left out become zero
    bool draws = false;
    bool extra = false;  // a second look at the step of the row before
};

// What a solver walks over: timesteps, their noise levels, and one level more, where the last step ends.
struct Grid {
    const Schedule& schedule;
    Doubles timesteps;          // descending, [N]
    std::vector<Level> levels;  // [N + 1]
    double eta;
    Json settings;  // of the sampler, checked

    // x_0 and eps, from the network's input at a level and its output.
    struct Predicted {
        Form x0, eps;
    };
    Predicted predict(const Form& x, const Level& level) const;
    Predicted predict(const Form& x, const Level& level, const Form& o) const;
};

// Runs the solver of a name. Throws EndsWithoutNoise where a step in log_snr would be infinite.
std::vector<Row> solve(const std::string& solver, const Grid& grid);

struct EndsWithoutNoise {};

}  // namespace dnp::core
