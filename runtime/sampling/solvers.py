"""Solvers: the algorithms behind the samplers, each run on linear forms instead of latents.

A solver below is the algorithm of its paper. What it adds and scales are *linear forms*, vectors of
coefficients over ``(s_0 .. s_3, o, z)``: the state's slots, the network's output, fresh noise. Started from
unit vectors, what it computes for the next state is the rows of the step's matrices (dnp.runtime.sampling.samplers),
which nobody has to write down. Each docstring ends with the class of diffusers whose results it gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dnp.engine.bundle.columns import SLOTS
from dnp.runtime.sampling.schedule import Level, NoiseSchedule

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
    """

    schedule: NoiseSchedule
    timesteps: list[float]
    levels: list[Level]
    eta: float

    @property
    def steps(self) -> range:
        """The indices of the timesteps."""
        return range(len(self.timesteps))

    def at(self, timestep: float) -> Level:
        """The noise level of a whole timestep; below zero it is the end."""
        return self.schedule.level(int(timestep)) if timestep >= 0 else self.levels[-1]

    def predict(self, x: Form, level: Level, o: Form = OUT) -> tuple[Form, Form]:
        """x_0 and eps, from the network's input at ``level`` and its output: all that knows of v."""
        alpha, sigma = level
        if self.schedule.prediction_type == "v_prediction":
            return alpha * x - sigma * o, sigma * x + alpha * o
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
    """Ancestral sampling, arXiv 2006.11239 equations 6 and 7. DDPMScheduler, variance "fixed_small"."""
    for t, after in zip(grid.timesteps, [*grid.timesteps[1:], -1.0], strict=True):
        now, then = grid.at(t), grid.at(after)
        x0, _ = grid.predict(S0, now)
        kept = (now.alpha / then.alpha) ** 2
        mean = (then.alpha * (1 - kept) * x0 + math.sqrt(kept) * then.sigma**2 * S0) / now.sigma**2
        # The last step has no variance; diffusers draws for it all the same, unless it is at timestep 0.
        std = then.sigma / now.sigma * math.sqrt(1 - kept)
        yield Row(t, S0, (mean + std * NOISE,), draws=t > 0)


def lcm(grid: Grid) -> Iterator[Row]:
    """Multistep latent consistency sampling, arXiv 2310.04378. LCMScheduler; the last step adds no noise."""
    sigma_data, scaling = 0.5, 10.0
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
        x = S0
        for j, past in enumerate((eps, S1, S2, S3)[: len(known)]):
            others = np.delete(known, j)
            lagrange = np.prod((between[:, None] - others) / (known[j] - others), axis=1)
            x = x + half * (weights @ lagrange) * past
        yield Row(t, x_in, (x, eps, S1, S2))


def dpmpp_2m(grid: Grid) -> Iterator[Row]:
    """DPM-Solver++(2M), arXiv 2211.01095 algorithm 2. DPMSolverMultistepScheduler."""
    return _dpmpp(grid, sde=False)


def dpmpp_2m_sde(grid: Grid) -> Iterator[Row]:
    """SDE-DPM-Solver++(2M), arXiv 2211.01095. DPMSolverMultistepScheduler, "sde-dpmsolver++"."""
    return _dpmpp(grid, sde=True)


def _dpmpp(grid: Grid, *, sde: bool) -> Iterator[Row]:
    for i, t in enumerate(grid.timesteps):
        now, then = grid.levels[i : i + 2]
        x0, _ = grid.predict(S0, now)
        decay = then.ratio / now.ratio  # exp(-h), h being the step in log_snr
        estimate = x0  # order 1 for the first step, and for the last, whose log_snr is infinite
        if 0 < i < grid.steps[-1]:
            r = (now.log_snr - grid.levels[i - 1].log_snr) / (then.log_snr - now.log_snr)
            estimate = x0 + (x0 - S1) / (2 * r)
        if sde:
            noise = then.sigma * math.sqrt(1 - decay**2) * NOISE
            x = then.sigma / now.sigma * decay * S0 + then.alpha * (1 - decay**2) * estimate + noise
        else:
            x = then.sigma / now.sigma * S0 + then.alpha * (1 - decay) * estimate
        yield Row(t, S0, (x, x0), draws=sde)


def deis(grid: Grid) -> Iterator[Row]:
    """DEIS, log-rho Adams-Bashforth of order 2, arXiv 2204.13902. DEISMultistepScheduler."""

    def integral(upper: float, to: float, other: float) -> float:
        return upper * (math.log(upper) - math.log(other) - 1) / (math.log(to) - math.log(other))

    for i, t in enumerate(grid.timesteps):
        now, then = grid.levels[i : i + 2]
        _, eps = grid.predict(S0, now)
        # diffusers lowers the last order for few steps only.
        if i == 0 or (i == grid.steps[-1] and len(grid.steps) < 15):
            move = (then.ratio - now.ratio) * eps
        else:
            to, back, at = then.ratio, grid.levels[i - 1].ratio, now.ratio
            move = (integral(to, at, back) - integral(at, at, back)) * eps
            move = move + (integral(to, back, at) - integral(at, back, at)) * S1
        yield Row(t, S0, (then.alpha * (S0 / now.alpha + move), eps))


def unipc(grid: Grid) -> Iterator[Row]:
    """UniPC of order 2 with B(h) = e^h - 1, arXiv 2302.04867. UniPCMultistepScheduler.

    Slot 1 holds the corrected latents of the level before, slots 2 and 3 x_0 there and one level earlier.
    """

    def first_order(x: Form, x0: Form, now: Level, then: Level) -> Form:
        return then.sigma / now.sigma * x + then.alpha * (1 - then.ratio / now.ratio) * x0

    levels = grid.levels
    for i, t in enumerate(grid.timesteps):
        now, then = levels[i : i + 2]
        x0, _ = grid.predict(S0, now)
        x = S0
        if i > 0:  # correct the latents, now that x_0 at this level is known
            before = levels[i - 1]
            correction = (x0 - S2) / 2
            if i > 1:
                h = now.log_snr - before.log_snr
                r = (levels[i - 2].log_snr - before.log_snr) / h
                phi_1 = math.expm1(-h)
                phi_2 = -phi_1 / h - 1
                phi_3 = -phi_2 / h - 1 / 2
                system = np.array([[1.0, 1.0], [r, 1.0]])
                rho, rho_now = np.linalg.solve(system, np.array([phi_2, 2 * phi_3]) / phi_1)
                correction = rho * (S3 - S2) / r + rho_now * (x0 - S2)
            x = first_order(S1, S2, before, now) + now.alpha * (1 - now.ratio / before.ratio) * correction
        predicted = x0
        if 0 < i < grid.steps[-1]:
            r = (levels[i - 1].log_snr - now.log_snr) / (then.log_snr - now.log_snr)
            predicted = x0 + (S2 - x0) / (2 * r)
        yield Row(t, S0, (first_order(x, predicted, now, then), x, x0, S2))
