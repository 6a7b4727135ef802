#include "solvers.hpp"

#include <algorithm>
#include <functional>
#include <limits>
#include <map>

#include "samplers.hpp"

namespace dnp::core {

namespace {

constexpr double few_steps = 15;  // DPM-Solver and DEIS lower their order at the end of fewer steps only
constexpr std::int64_t slots = column::slots;

Form operator+(Form a, const Form& b) {
    for (std::size_t i = 0; i < a.size(); ++i) a[i] += b[i];
    return a;
}
Form operator-(Form a, const Form& b) {
    for (std::size_t i = 0; i < a.size(); ++i) a[i] -= b[i];
    return a;
}
Form operator*(double k, Form a) {
    for (double& value : a) value *= k;
    return a;
}
Form operator/(Form a, double k) {
    for (double& value : a) value /= k;
    return a;
}

constexpr Form s0{1}, s1{0, 1}, s2{0, 0, 1}, s3{0, 0, 0, 1}, out{0, 0, 0, 0, 1}, noise{0, 0, 0, 0, 0, 1}, zero{};

Form weighted(const Doubles& weights, const std::vector<Form>& forms) {
    Form sum{};
    for (std::size_t i = 0; i < weights.size(); ++i) sum = sum + weights[i] * forms[i];
    return sum;
}

// What Python raises a ZeroDivisionError for: the distance in log_snr to x_0 itself is infinite.
double finite_log_snr(const Level& level) {
    if (level.sigma == 0) throw EndsWithoutNoise{};
    return level.log_snr();
}

std::int64_t count_of(const Grid& grid) { return static_cast<std::int64_t>(grid.timesteps.size()); }

const Level& level_at(const Grid& grid, std::int64_t step) { return grid.levels[static_cast<std::size_t>(step)]; }

double timestep_at(const Grid& grid, std::int64_t step) { return grid.timesteps[static_cast<std::size_t>(step)]; }

// The order of a multistep solver: it rises at the start, and falls at the end of less than `few` steps.
std::int64_t order_at(const Grid& grid, std::int64_t step, double few = few_steps) {
    if (level_at(grid, step) == level_at(grid, step + 1)) return 1;  // the step goes nowhere
    bool falls = truthy(grid.settings["lower_order_final"]) && static_cast<double>(count_of(grid)) < few;
    return std::min({grid.settings["solver_order"].get<std::int64_t>(), step + 1, falls ? count_of(grid) - step : slots});
}

// The noise level of a whole timestep of diffusion; below zero it is the end.
Level level_of(const Grid& grid, double timestep) {
    return timestep >= 0 ? grid.schedule.level(static_cast<std::int64_t>(timestep)) : grid.levels.back();
}

// Of each point in `known`, the polynomial that is 1 there and 0 at the others, at a place.
Doubles lagrange(double at, const Doubles& known) {
    Doubles values;
    for (std::size_t j = 0; j < known.size(); ++j) {
        double product = 1;
        for (std::size_t k = 0; k < known.size(); ++k)
            if (k != j) product *= (at - known[k]) / (known[j] - known[k]);
        values.push_back(product);
    }
    return values;
}

// The integrals of those polynomials times `weight` over an interval, by Gauss's quadrature.
template <class Weight>
Doubles moves(const char* nodes, double from, double to, const Doubles& known, Weight weight) {
    const Json& gauss = sampler_data()["gauss"][nodes];
    double half = (to - from) / 2;
    Doubles sums(known.size());
    for (std::size_t i = 0; i < gauss[0].size(); ++i) {
        double at = from + half * (1 + gauss[0][i].get<double>());
        Doubles basis = lagrange(at, known);
        for (std::size_t j = 0; j < sums.size(); ++j) sums[j] += half * gauss[1][i].get<double>() * basis[j] * weight(at);
    }
    return sums;
}

using Rows = std::vector<Row>;

Rows ddim(const Grid& grid) {
    Rows rows;
    std::int64_t stride = grid.schedule.train_timesteps / count_of(grid);
    for (double t : grid.timesteps) {
        Level now = level_of(grid, t), then = level_of(grid, t - static_cast<double>(stride));
        auto [x0, eps] = grid.predict(s0, now);
        double kept = now.alpha / then.alpha, std = grid.eta * then.sigma / now.sigma * std::sqrt(1 - kept * kept);
        Form x = then.alpha * x0 + std::sqrt(then.sigma * then.sigma - std * std) * eps + std * noise;
        rows.push_back({t, s0, {x}, grid.eta > 0});
    }
    return rows;
}

Rows ddpm(const Grid& grid) {
    Rows rows;
    bool large = grid.settings["variance_type"] == "fixed_large";
    for (std::int64_t i = 0; i < count_of(grid); ++i) {
        double t = timestep_at(grid, i), after = i + 1 < count_of(grid) ? timestep_at(grid, i + 1) : -1;
        Level now = level_of(grid, t), then = level_of(grid, after);
        Form x0 = grid.predict(s0, now).x0;
        double root = now.alpha / then.alpha, kept = root * root;
        Form mean = (then.alpha * (1 - kept) * x0 + std::sqrt(kept) * (then.sigma * then.sigma) * s0) / (now.sigma * now.sigma);
        double std = std::sqrt(1 - kept) * (large ? 1.0 : then.sigma / now.sigma);
        rows.push_back({t, s0, {mean + (t > 0 ? std : 0.0) * noise}, t > 0});
    }
    return rows;
}

Rows lcm(const Grid& grid) {
    Rows rows;
    double sigma_data = 0.5, scaling = grid.settings["timestep_scaling"].get<double>();
    for (std::int64_t i = 0; i < count_of(grid); ++i) {
        double t = timestep_at(grid, i), norm = std::hypot(t * scaling, sigma_data), share = sigma_data / norm;
        Form x0 = grid.predict(s0, level_of(grid, t)).x0;
        Form denoised = share * share * s0 + t * scaling / norm * x0;
        if (i + 1 == count_of(grid)) {
            rows.push_back({t, s0, {denoised}});
        } else {
            Level then = level_of(grid, timestep_at(grid, i + 1));
            rows.push_back({t, s0, {then.alpha * denoised + then.sigma * noise}, true});
        }
    }
    return rows;
}

Rows pndm(const Grid& grid) {
    Rows rows;
    double stride = static_cast<double>(grid.schedule.train_timesteps / count_of(grid));
    const Doubles adams_bashforth[] = {{3.0 / 2, -1.0 / 2}, {23.0 / 12, -16.0 / 12, 5.0 / 12}, {55.0 / 24, -59.0 / 24, 37.0 / 24, -9.0 / 24}};
    auto transfer = [&](const Form& x, const Form& o, double t, double after) {
        Level then = level_of(grid, after);
        auto [x0, eps] = grid.predict(x, level_of(grid, t), o);
        return then.alpha * x0 + then.sigma * eps;
    };
    double first = timestep_at(grid, 0);
    rows.push_back({first, s0, {transfer(s0, out, first, first - stride), out, s0}});
    for (std::int64_t i = 1; i < count_of(grid); ++i) {
        double t = timestep_at(grid, i);
        if (i == 1) rows.push_back({t, s0, {transfer(s2, (out + s1) / 2, t + stride, t), s1}, false, true});
        Form o = weighted(adams_bashforth[std::min<std::int64_t>(i, 3) - 1], {out, s1, s2, s3});
        rows.push_back({t, s0, {transfer(s0, o, t, t - stride), out, s1, s2}});
    }
    return rows;
}

Rows euler(const Grid& grid) {
    Rows rows;
    for (std::int64_t i = 0; i < count_of(grid); ++i) {
        Level now = level_at(grid, i), then = level_at(grid, i + 1);
        Form x_in = now.alpha * s0, eps = grid.predict(x_in, now).eps;
        rows.push_back({timestep_at(grid, i), x_in, {s0 + (then.ratio() - now.ratio()) * eps}});
    }
    return rows;
}

Rows euler_a(const Grid& grid) {
    Rows rows;
    for (std::int64_t i = 0; i < count_of(grid); ++i) {
        Level now = level_at(grid, i), then = level_at(grid, i + 1);
        Form x_in = now.alpha * s0, eps = grid.predict(x_in, now).eps;
        double share = then.ratio() / now.ratio(), up = then.ratio() * std::sqrt(1 - share * share);
        double down = then.ratio() * then.ratio() / now.ratio();
        rows.push_back({timestep_at(grid, i), x_in, {s0 + (down - now.ratio()) * eps + up * noise}, true});
    }
    return rows;
}

Rows heun(const Grid& grid) {
    Rows rows;
    for (std::int64_t i = 0; i < count_of(grid); ++i) {
        Level now = level_at(grid, i), then = level_at(grid, i + 1);
        Form x_in = now.alpha * s0, eps = grid.predict(x_in, now).eps;
        double span = then.ratio() - now.ratio();
        rows.push_back({timestep_at(grid, i), x_in, {s0 + span * eps, s0, eps}});
        if (then.ratio() > 0) {
            x_in = then.alpha * s0, eps = grid.predict(x_in, then).eps;
            rows.push_back({timestep_at(grid, i + 1), x_in, {s1 + span * (s2 + eps) / 2}, false, true});
        }
    }
    return rows;
}

Rows flow_euler(const Grid& grid) {
    Rows rows;
    bool stochastic = truthy(grid.settings["stochastic_sampling"]);
    for (std::int64_t i = 0; i < count_of(grid); ++i) {
        Level now = level_at(grid, i), then = level_at(grid, i + 1);
        auto [x0, eps] = grid.predict(s0, now);
        rows.push_back({timestep_at(grid, i), s0, {then.alpha * x0 + then.sigma * (stochastic ? noise : eps)}, stochastic});
    }
    return rows;
}

Rows flow_heun(const Grid& grid) {
    Rows rows;
    for (std::int64_t i = 0; i < count_of(grid); ++i) {
        Level now = level_at(grid, i), then = level_at(grid, i + 1);
        double span = then.sigma - now.sigma;
        auto [x0, eps] = grid.predict(s0, now);
        rows.push_back({timestep_at(grid, i), s0, {s0 + span * (eps - x0), s0, eps - x0}});
        if (then.sigma > 0) {
            auto [x0_then, eps_then] = grid.predict(s0, then);
            rows.push_back({timestep_at(grid, i + 1), s0, {s1 + span * (s2 + eps_then - x0_then) / 2}, false, true});
        }
    }
    return rows;
}

Rows lms(const Grid& grid) {
    Rows rows;
    for (std::int64_t i = 0; i < count_of(grid); ++i) {
        Level now = level_at(grid, i);
        Form x_in = now.alpha * s0, eps = grid.predict(x_in, now).eps;
        Doubles known;  // the levels where eps is known, newest first
        for (std::int64_t k = i; k >= 0 && k > i - 4; --k) known.push_back(level_at(grid, k).ratio());
        Doubles steps = moves("2", now.ratio(), level_at(grid, i + 1).ratio(), known, [](double) { return 1.0; });
        rows.push_back({timestep_at(grid, i), x_in, {s0 + weighted(steps, {eps, s1, s2, s3}), eps, s1, s2}});
    }
    return rows;
}

Rows dpmpp(const Grid& grid, bool sde) {
    Rows rows;
    const Json& settings = grid.settings;
    bool euler_at_final = truthy(settings["euler_at_final"]) || settings["final_sigmas_type"] == "zero";
    for (std::int64_t i = 0; i < count_of(grid); ++i) {
        Level now = level_at(grid, i), then = level_at(grid, i + 1);
        Form x0 = grid.predict(s0, now).x0;
        std::int64_t order = euler_at_final && i + 1 == count_of(grid) ? 1 : order_at(grid, i);
        double decay = then.ratio() / now.ratio();  // exp(-h), h being the step in log_snr
        double grown = 1 - (sde ? decay * decay : decay);
        Form estimate = grown * x0;
        if (order > 1) {
            double h = finite_log_snr(then) - now.log_snr(), span = sde ? 2 * h : h;
            double r = (now.log_snr() - level_at(grid, i - 1).log_snr()) / h;
            Form slope = (x0 - s1) / r;
            bool exact = order == 3 || settings["solver_type"] == "heun";
            if (order == 3) {
                double r_before = (level_at(grid, i - 1).log_snr() - level_at(grid, i - 2).log_snr()) / h;
                Form curve = (slope - (s1 - s2) / r_before) / (r + r_before);
                slope = slope + r * curve;
                estimate = estimate + ((grown - span) / (span * span) + (sde ? -0.5 : 0.5)) * curve;
            }
            estimate = estimate + (exact ? 1 - grown / span : grown / 2) * slope;
        }
        Form x = sde ? then.sigma / now.sigma * decay * s0 + then.alpha * estimate + then.sigma * std::sqrt(1 - decay * decay) * noise
                     : then.sigma / now.sigma * s0 + then.alpha * estimate;
        rows.push_back({timestep_at(grid, i), s0, {x, x0, s1}, sde});
    }
    return rows;
}

Rows deis(const Grid& grid) {
    Rows rows;
    for (std::int64_t i = 0; i < count_of(grid); ++i) {
        Level now = level_at(grid, i), then = level_at(grid, i + 1);
        Form eps = grid.predict(s0, now).eps;
        Doubles known;  // the integral over the ratio of the polynomial in its logarithm through the outputs known
        for (std::int64_t k = i; k > i - order_at(grid, i); --k) known.push_back(std::log(level_at(grid, k).ratio()));
        if (then.ratio() == 0) throw EndsWithoutNoise{};
        Doubles steps = moves("32", known[0], std::log(then.ratio()), known, [](double at) { return std::exp(at); });
        Form x = then.alpha * (s0 / now.alpha + weighted(steps, {eps, s1, s2}));
        rows.push_back({timestep_at(grid, i), s0, {x, eps, s1}});
    }
    return rows;
}

// Solves V x = b for V[k][j] = r_j^k, by Gauss's elimination with pivots: at most three unknowns.
Doubles solve_vandermonde(const Doubles& r, Doubles b) {
    std::size_t n = r.size();
    std::vector<Doubles> v(n, Doubles(n));
    for (std::size_t k = 0; k < n; ++k)
        for (std::size_t j = 0; j < n; ++j) v[k][j] = k == 0 ? 1.0 : v[k - 1][j] * r[j];
    for (std::size_t c = 0; c < n; ++c) {
        std::size_t pivot = c;
        for (std::size_t k = c + 1; k < n; ++k)
            if (std::abs(v[k][c]) > std::abs(v[pivot][c])) pivot = k;
        std::swap(v[c], v[pivot]), std::swap(b[c], b[pivot]);
        for (std::size_t k = c + 1; k < n; ++k) {
            double factor = v[k][c] / v[c][c];
            for (std::size_t j = c; j < n; ++j) v[k][j] -= factor * v[c][j];
            b[k] -= factor * b[c];
        }
    }
    for (std::size_t c = n; c-- > 0;) {
        for (std::size_t j = c + 1; j < n; ++j) b[c] -= v[c][j] * b[j];
        b[c] /= v[c][c];
    }
    return b;
}

// From `begin` at level i to the level after, with x_0 of the levels known, newest first. The corrector knows x_0 at
// the level after too, first in `outputs`.
Form unipc_step(const Grid& grid, std::int64_t i, const Form& begin, const std::vector<Form>& outputs, std::int64_t order, bool corrects) {
    Level now = level_at(grid, i), then = level_at(grid, i + 1);
    Form after = outputs[0], x0 = outputs[corrects ? 1 : 0];
    std::vector<Form> before(outputs.begin() + (corrects ? 2 : 1), outputs.end());
    Form x = then.sigma / now.sigma * begin + then.alpha * (1 - then.ratio() / now.ratio()) * x0;
    if (order == 1 && !corrects) return x;
    double h = now.log_snr() - finite_log_snr(then);  // negative: the papers' formulas in x_0 are those in eps with -h
    Doubles r;
    std::vector<Form> differences;
    for (std::int64_t k = 1; k < order; ++k) {
        r.push_back((level_at(grid, i - k).log_snr() - now.log_snr()) / -h);
        if (static_cast<std::size_t>(k) <= before.size()) differences.push_back((before[static_cast<std::size_t>(k - 1)] - x0) / r.back());
    }
    double b_h = grid.settings["solver_type"] == "bh1" ? h : std::expm1(h);
    if (corrects) differences.push_back(after - x0), r.push_back(1.0);
    Doubles rho{0.5};
    if (differences.size() > 1) {
        Doubles right;
        double phi = std::expm1(h) / h - 1, factorial = 1;
        for (std::size_t k = 1; k <= r.size(); ++k) {
            factorial *= static_cast<double>(k);
            right.push_back(phi * factorial / b_h);
            phi = phi / h - 1 / (factorial * static_cast<double>(k + 1));
        }
        rho = solve_vandermonde(r, right);
    }
    return x - then.alpha * b_h * weighted(rho, differences);
}

Rows unipc(const Grid& grid) {
    Rows rows;
    std::int64_t order = 1;
    double kept = 1;
    Form moved{};  // of the last step: order, and x = kept begin + moved
    const Json& uncorrected = grid.settings["disable_corrector"];
    for (std::int64_t i = 0; i < count_of(grid); ++i) {
        Level now = level_at(grid, i), then = level_at(grid, i + 1);
        Form x0 = grid.predict(s0, now).x0, x = s0;
        bool corrects = i > 0 && std::none_of(uncorrected.begin(), uncorrected.end(), [&](const Json& step) { return step == i - 1; });
        if (corrects) x = unipc_step(grid, i - 1, (s0 - moved) / kept, {x0, s1, s2, s3}, order, true);
        order = order_at(grid, i, std::numeric_limits<double>::infinity());
        Form ahead = unipc_step(grid, i, x, {x0, s1, s2}, order, false);
        kept = then.sigma / now.sigma;
        moved = unipc_step(grid, i, zero, {s1, s2, s3}, order, false);
        rows.push_back({timestep_at(grid, i), s0, {ahead, x0, s1, s2}});
    }
    return rows;
}

}  // namespace

Grid::Predicted Grid::predict(const Form& x, const Level& level) const { return predict(x, level, out); }

Grid::Predicted Grid::predict(const Form& x, const Level& level, const Form& o) const {
    auto [alpha, sigma] = level;
    switch (schedule.prediction) {
        case Prediction::v_prediction: return {alpha * x - sigma * o, sigma * x + alpha * o};
        case Prediction::sample: return {o, (x - alpha * o) / sigma};
        case Prediction::flow_prediction: return {x - sigma * o, x + alpha * o};
        default: return {(x - sigma * o) / alpha, o};
    }
}

std::vector<Row> solve(const std::string& solver, const Grid& grid) {
    static const std::map<std::string, std::function<Rows(const Grid&)>> solvers{
        {"ddim", ddim},
        {"ddpm", ddpm},
        {"lcm", lcm},
        {"pndm", pndm},
        {"euler", euler},
        {"euler_a", euler_a},
        {"heun", heun},
        {"flow_euler", flow_euler},
        {"flow_heun", flow_heun},
        {"lms", lms},
        {"dpmpp_2m", [](const Grid& grid) { return dpmpp(grid, false); }},
        {"dpmpp_2m_sde", [](const Grid& grid) { return dpmpp(grid, true); }},
        {"deis", deis},
        {"unipc", unipc},
    };
    return solvers.at(solver)(grid);
}

}  // namespace dnp::core
