"""Solvers: the algorithms behind the samplers, each run on linear forms instead of latents.

A solver below is the algorithm of its paper. What it adds and scales are *linear forms*, vectors of
coefficients over ``(s_0 .. s_3, o, z)``: the state's slots, the network's output, fresh noise. Started from
unit vectors, what it computes for the next state is the rows of the step's matrices (dnp.runtime.sampling.samplers),
which nobody has to write down. Each docstring ends with the class of diffusers whose results it gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dnp.engine.bundle.columns import SLOTS
from dnp.runtime.sampling.flow import FLOW_PREDICTION
from dnp.runtime.sampling.levels import Level
from dnp.runtime.sampling.schedule import NoiseSchedule, Schedule

FEW_STEPS = 15
"""DPM-Solver and DEIS lower their order at the end of fewer steps only."""

Form = npt.NDArray[np.float64]
"""A linear form, float64 [SLOTS + 2]: coefficients over (s_0 .. s_3, o, z)."""

S0, S1, S2, S3, OUT, NOISE = np.eye(SLOTS + 2)


class Row(NamedTuple):
    """One network call: where it looks, and what becomes of the state."""

    timestep: float
    x: Form  # the network's input, of the slots only
    state: tuple[Form, ...]  # the next state; slots left out become zero
    draws: bool = False
    extra: bool = False  # a second look at the step of the row before


@dataclass(frozen=True)
class Grid:
    """What a solver walks over: timesteps, their noise levels, and one level more, where the last step ends.

    Attributes:
        schedule: of the model.
        timesteps: descending, [N].
        levels: the noise level of each timestep, then that of the result, [N + 1].
        eta: DDIM's share of fresh noise, 0 to 1.
        settings: of the sampler, checked: see dnp.runtime.sampling.settings.
    """

    schedule: Schedule
    timesteps: list[float]
    levels: list[Level]
    eta: float
    settings: Mapping[str, Any]

    @property
    def steps(self) -> range:
        """The indices of the timesteps."""
        return range(len(self.timesteps))

    def order(self, step: int, few: float = FEW_STEPS) -> int:
        """The order of a multistep solver: it rises at the start, and falls at the end of less than ``few`` steps."""
        if self.levels[step] == self.levels[step + 1]:
            return 1  # the step goes nowhere
        to_come = len(self.timesteps) - step
        falls = self.settings["lower_order_final"] and len(self.timesteps) < few
        return min(int(self.settings["solver_order"]), step + 1, to_come if falls else SLOTS)

    def at(self, timestep: float) -> Level:
        """The noise level of a whole timestep of diffusion; below zero it is the end."""
        assert isinstance(self.schedule, NoiseSchedule)
        return self.schedule.level(int(timestep)) if timestep >= 0 else self.levels[-1]

    def predict(self, x: Form, level: Level, o: Form = OUT) -> tuple[Form, Form]:
        """x_0 and eps, from the network's input at ``level`` and its output: all that knows what networks predict."""
        alpha, sigma = level
        kind = self.schedule.prediction_type
        if kind == "v_prediction":
            return alpha * x - sigma * o, sigma * x + alpha * o
        if kind == "sample":
            return o, (x - alpha * o) / sigma
        if kind == FLOW_PREDICTION:
            return x - sigma * o, x + alpha * o
        return (x - sigma * o) / alpha, o


def ddim(grid: Grid) -> Iterator[Row]:
    """DDIM, arXiv 2010.02502 equation 12. DDIMScheduler."""
    stride = grid.schedule.train_timesteps // len(grid.timesteps)
    for t in grid.timesteps:
        now, then = grid.at(t), grid.at(t - stride)
        x0, eps = grid.predict(S0, now)
        std = grid.eta * then.sigma / now.sigma * math.sqrt(1 - (now.alpha / then.alpha) ** 2)
        x = then.alpha * x0 + math.sqrt(then.sigma**2 - std**2) * eps + std * NOISE
        yield Row(t, S0, (x,), draws=grid.eta > 0)


def ddpm(grid: Grid) -> Iterator[Row]:
    """Ancestral sampling, arXiv 2006.11239 equations 6 and 7. DDPMScheduler with a fixed variance."""
    large = grid.settings["variance_type"] == "fixed_large"
    for t, after in zip(grid.timesteps, [*grid.timesteps[1:], -1.0], strict=True):
        now, then = grid.at(t), grid.at(after)
        x0, _ = grid.predict(S0, now)
        kept = (now.alpha / then.alpha) ** 2
        mean = (then.alpha * (1 - kept) * x0 + math.sqrt(kept) * then.sigma**2 * S0) / now.sigma**2
        # The last step has no variance, unless it is large; diffusers draws for it all the same, but at timestep 0.
        std = math.sqrt(1 - kept) * (1.0 if large else then.sigma / now.sigma)
        yield Row(t, S0, (mean + (std if t > 0 else 0.0) * NOISE,), draws=t > 0)


def lcm(grid: Grid) -> Iterator[Row]:
    """Multistep latent consistency sampling, arXiv 2310.04378. LCMScheduler; the last step adds no noise."""
    sigma_data, scaling = 0.5, grid.settings["timestep_scaling"]
    for i, t in enumerate(grid.timesteps):
        x0, _ = grid.predict(S0, grid.at(t))
        norm = math.hypot(t * scaling, sigma_data)
        denoised = (sigma_data / norm) ** 2 * S0 + t * scaling / norm * x0
        if i == grid.steps[-1]:
            yield Row(t, S0, (denoised,))
        else:
            then = grid.at(grid.timesteps[i + 1])
            yield Row(t, S0, (then.alpha * denoised + then.sigma * NOISE,), draws=True)


def pndm(grid: Grid) -> Iterator[Row]:
    """Pseudo linear multistep, arXiv 2202.09778. PNDMScheduler with skip_prk_steps.

    The slots hold the last network outputs, newest first. Extrapolating needs two: the first step is taken
    twice, the second time with the mean of both ends, from the latents kept in slot 2.

    The Runge-Kutta start of the paper would need five latents: those that a step began with, those that the
    network sees, the weighted sum of its outputs, and two outputs of the steps before.
    """
    stride = grid.schedule.train_timesteps // len(grid.timesteps)
    adams_bashforth = ((3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))

    def transfer(x: Form, o: Form, t: float, after: float) -> Form:
        then = grid.at(after)
        x0, eps = grid.predict(x, grid.at(t), o)
        return then.alpha * x0 + then.sigma * eps

    first, *rest = grid.timesteps
    yield Row(first, S0, (transfer(S0, OUT, first, first - stride), OUT, S0))
    if rest:
        again = rest[0]
        yield Row(again, S0, (transfer(S2, (OUT + S1) / 2, again + stride, again), S1), extra=True)
    for i, t in enumerate(rest, 1):
        weights = adams_bashforth[min(i, 3) - 1]
        o = np.array(weights) @ np.stack([OUT, S1, S2, S3])[: len(weights)]
        yield Row(t, S0, (transfer(S0, o, t, t - stride), OUT, S1, S2))


def euler(grid: Grid) -> Iterator[Row]:
    """Euler's method on dx/dratio = eps, arXiv 2206.00364. EulerDiscreteScheduler."""
    for i, t in enumerate(grid.timesteps):
        now, then = grid.levels[i : i + 2]
        x_in = now.alpha * S0
        _, eps = grid.predict(x_in, now)
        yield Row(t, x_in, (S0 + (then.ratio - now.ratio) * eps,))


def euler_a(grid: Grid) -> Iterator[Row]:
    """Euler down to sigma_down, then noise up to the next level. EulerAncestralDiscreteScheduler."""
    for i, t in enumerate(grid.timesteps):
        now, then = grid.levels[i : i + 2]
        x_in = now.alpha * S0
        _, eps = grid.predict(x_in, now)
        up = then.ratio * math.sqrt(1 - (then.ratio / now.ratio) ** 2)
        down = then.ratio**2 / now.ratio
        yield Row(t, x_in, (S0 + (down - now.ratio) * eps + up * NOISE,), draws=True)


def heun(grid: Grid) -> Iterator[Row]:
    """Heun's method, arXiv 2206.00364 algorithm 1; the last step is Euler's. HeunDiscreteScheduler."""
    for i, t in enumerate(grid.timesteps):
        now, then = grid.levels[i : i + 2]
        x_in = now.alpha * S0
        _, eps = grid.predict(x_in, now)
        yield Row(t, x_in, (S0 + (then.ratio - now.ratio) * eps, S0, eps))
        if then.ratio > 0:
            x_in = then.alpha * S0
            _, eps = grid.predict(x_in, then)
            x = S1 + (then.ratio - now.ratio) * (S2 + eps) / 2
            yield Row(grid.timesteps[i + 1], x_in, (x,), extra=True)


def flow_euler(grid: Grid) -> Iterator[Row]:
    """Euler's method on dx/dsigma = eps - x_0, arXiv 2210.02747. FlowMatchEulerDiscreteScheduler.

    With ``stochastic_sampling``, from the x_0 that is expected back to the next level by fresh noise.
    """
    stochastic = bool(grid.settings["stochastic_sampling"])
    for i, t in enumerate(grid.timesteps):
        now, then = grid.levels[i : i + 2]
        x0, eps = grid.predict(S0, now)
        yield Row(t, S0, (then.alpha * x0 + then.sigma * (NOISE if stochastic else eps),), draws=stochastic)


def flow_heun(grid: Grid) -> Iterator[Row]:
    """Heun's method on dx/dsigma = eps - x_0; the last step is Euler's. FlowMatchHeunDiscreteScheduler."""
    for i, t in enumerate(grid.timesteps):
        now, then = grid.levels[i : i + 2]
        span = then.sigma - now.sigma
        x0, eps = grid.predict(S0, now)
        yield Row(t, S0, (S0 + span * (eps - x0), S0, eps - x0))
        if then.sigma > 0:
            x0, eps = grid.predict(S0, then)
            yield Row(grid.timesteps[i + 1], S0, (S1 + span * (S2 + eps - x0) / 2,), extra=True)


def lms(grid: Grid) -> Iterator[Row]:
    """Linear multistep (Adams-Bashforth) of order 4 on uneven levels, by K. Crowson. LMSDiscreteScheduler."""
    nodes, weights = np.polynomial.legendre.leggauss(2)  # exact for cubics, which is what order 4 integrates
    ratios = np.array([level.ratio for level in grid.levels])
    for i, t in enumerate(grid.timesteps):
        now = grid.levels[i]
        x_in = now.alpha * S0
        _, eps = grid.predict(x_in, now)
        half = (ratios[i + 1] - ratios[i]) / 2
        between = ratios[i] + half * (1 + nodes)
        known = ratios[i::-1][:4]  # the levels where eps is known, newest first
        moves = [half * (weights @ basis) for basis in _lagrange(between, known)]
        past = (eps, S1, S2, S3)[: len(moves)]
        yield Row(t, x_in, (S0 + np.array(moves) @ np.stack(past), eps, S1, S2))


def dpmpp_2m(grid: Grid) -> Iterator[Row]:
    """DPM-Solver++(2M), arXiv 2211.01095 algorithm 2. DPMSolverMultistepScheduler."""
    return _dpmpp(grid, sde=False)


def dpmpp_2m_sde(grid: Grid) -> Iterator[Row]:
    """SDE-DPM-Solver++(2M), arXiv 2211.01095. DPMSolverMultistepScheduler, "sde-dpmsolver++"."""
    return _dpmpp(grid, sde=True)


def _dpmpp(grid: Grid, *, sde: bool) -> Iterator[Row]:
    settings = grid.settings
    euler_at_final = settings["euler_at_final"] or settings["final_sigmas_type"] == "zero"
    for i, t in enumerate(grid.timesteps):
        now, then = grid.levels[i : i + 2]
        x0, _ = grid.predict(S0, now)
        order = 1 if euler_at_final and i == grid.steps[-1] else grid.order(i)
        decay = then.ratio / now.ratio  # exp(-h), h being the step in log_snr
        grown = 1 - decay ** (2 if sde else 1)
        estimate = grown * x0
        if order > 1:
            h = then.log_snr - now.log_snr
            span = 2 * h if sde else h
            r = (now.log_snr - grid.levels[i - 1].log_snr) / h
            slope = (x0 - S1) / r
            exact = order == 3 or settings["solver_type"] == "heun"
            if order == 3:
                r_before = (grid.levels[i - 1].log_snr - grid.levels[i - 2].log_snr) / h
                curve = (slope - (S1 - S2) / r_before) / (r + r_before)
                slope = slope + r * curve
                # The sign of the half is diffusers'. The derivation has + in both forms.
                estimate = estimate + ((grown - span) / span**2 + (-0.5 if sde else 0.5)) * curve
            estimate = estimate + (1 - grown / span if exact else grown / 2) * slope
        if sde:
            noise = then.sigma * math.sqrt(1 - decay**2) * NOISE
            x = then.sigma / now.sigma * decay * S0 + then.alpha * estimate + noise
        else:
            x = then.sigma / now.sigma * S0 + then.alpha * estimate
        yield Row(t, S0, (x, x0, S1), draws=sde)


def deis(grid: Grid) -> Iterator[Row]:
    """DEIS, log-rho Adams-Bashforth of orders 1 to 3, arXiv 2204.13902. DEISMultistepScheduler."""
    nodes, weights = np.polynomial.legendre.leggauss(32)
    for i, t in enumerate(grid.timesteps):
        now, then = grid.levels[i : i + 2]
        _, eps = grid.predict(S0, now)
        # The integral over the ratio of the polynomial in its logarithm that goes through the outputs known.
        known = np.log([level.ratio for level in grid.levels[i::-1][: grid.order(i)]])
        half = (math.log(then.ratio) - known[0]) / 2
        between = known[0] + half * (1 + nodes)
        moves = [half * (weights @ (basis * np.exp(between))) for basis in _lagrange(between, known)]
        past = (eps, S1, S2)[: len(moves)]
        yield Row(t, S0, (then.alpha * (S0 / now.alpha + np.array(moves) @ np.stack(past)), eps, S1))


def _lagrange(at: npt.NDArray[np.float64], known: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
    """Of each point in ``known`` [n], the polynomial that is 1 there and 0 at the others, ``at`` these places [m]."""
    others = [np.delete(known, j) for j in range(len(known))]
    return [np.prod((at[:, None] - rest) / (point - rest), axis=1) for point, rest in zip(known, others, strict=True)]


def unipc(grid: Grid) -> Iterator[Row]:
    """UniPC of orders 1 to 3, arXiv 2302.04867. UniPCMultistepScheduler.

    Slots 1 to 3 hold x_0 at the levels before, newest first. The latents that the last step began with, which the
    corrector begins with again, are not kept: they follow from where it ended.
    """
    settings, levels = grid.settings, grid.levels
    past = (S1, S2, S3)
    order, kept, moved = 1, 1.0, np.zeros(SLOTS + 2)  # of the last step: order, and x = kept begin + moved
    for i, t in enumerate(grid.timesteps):
        now, then = levels[i : i + 2]
        x0, _ = grid.predict(S0, now)
        x = S0
        if i > 0 and i - 1 not in settings["disable_corrector"]:
            begin = (S0 - moved) / kept
            x = _unipc_step(settings["solver_type"], levels[: i + 1], i - 1, begin, (x0, *past), order, corrects=True)
        order = grid.order(i, few=math.inf)
        outputs = (x0, S1, S2)
        ahead = _unipc_step(settings["solver_type"], levels, i, x, outputs, order, corrects=False)
        kept = then.sigma / now.sigma
        moved = _unipc_step(settings["solver_type"], levels, i, 0 * S0, past, order, corrects=False)
        yield Row(t, S0, (ahead, x0, S1, S2))


def _unipc_step(
    kind: str,
    levels: Sequence[Level],
    i: int,
    begin: Form,
    outputs: Sequence[Form],
    order: int,
    *,
    corrects: bool,
) -> Form:
    """From ``begin`` at level i to the level after, with x_0 of the levels known, newest first.

    The corrector knows x_0 at the level after too, first in ``outputs``. ``kind`` says B(h): "bh1", h; "bh2", e^h - 1.
    """
    now, then = levels[i], levels[i + 1]
    after, x0, *before = outputs if corrects else (outputs[0], *outputs)
    x = then.sigma / now.sigma * begin + then.alpha * (1 - then.ratio / now.ratio) * x0
    if order == 1 and not corrects:
        return x
    h = now.log_snr - then.log_snr  # negative: the papers' formulas in x_0 are those in eps with -h
    r = [(levels[i - k].log_snr - now.log_snr) / -h for k in range(1, order)]
    differences = [(m - x0) / r_k for m, r_k in zip(before, r, strict=False)]
    b_h = h if kind == "bh1" else math.expm1(h)
    if corrects:
        differences.append(after - x0)
        r.append(1.0)
    if len(differences) == 1:
        rho = np.array([0.5])
    else:
        phi, right = math.expm1(h) / h - 1, []
        for k in range(1, len(r) + 1):
            right.append(phi * math.factorial(k) / b_h)
            phi = phi / h - 1 / math.factorial(k + 1)
        rho = np.linalg.solve(np.vander(r, increasing=True).T, np.array(right))
    return x - then.alpha * b_h * (rho @ np.stack(differences))
