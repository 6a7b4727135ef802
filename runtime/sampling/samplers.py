"""Samplers as tables: one row of numbers per network call, nothing else.

Every sampler here is linear in its state and in what the network returns, so one graph can run them all. What a row
holds is in ``dnp/engine/bundle/columns.py``; the algorithms that fill it are in ``solvers.py``. Nothing depends on the
sign or the size of the guidance scale, a column like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dnp.engine.bundle.columns import (
    ADVANCE,
    CLEAN_OUTPUT,
    CLEAN_STATE,
    DRAW,
    EMBEDDED,
    GUIDANCE,
    INPUT,
    NOISE,
    NORM_CAP,
    NORM_LIMIT,
    OUTPUT,
    PARALLEL,
    RESCALE,
    ROW,
    SLOTS,
    STATE,
    TIMESTEP,
    ZERO_STAR,
)
from dnp.engine.bundle.manifest import Defaults
from dnp.engine.bundle.schema import shown
from dnp.engine.errors import SettingsError
from dnp.runtime.sampling import solvers
from dnp.runtime.sampling.schedule import CLEAN, SPACINGS, Level, NoiseSchedule, check_choice
from dnp.runtime.sampling.solvers import Grid, Row

Table = npt.NDArray[np.float32]

FLOAT32_MAX = float(np.finfo(np.float32).max)
METHODS: Final = {
    "rescale": RESCALE,
    "norm_limit": NORM_LIMIT,
    "parallel": PARALLEL,
    "zero_star": ZERO_STAR,
    "norm_cap": NORM_CAP,
}


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """One sampling run as data.

    Attributes:
        rows: float32 [calls + 1, ROW], to be run in order; the last one stands still. The state begins as standard
            normal noise times ``init_noise_sigma`` in slot 0 and zeros elsewhere, and ends with the final latents in
            slot 0.
        init_noise_sigma: the factor of the starting noise.
        step_of_row: the step each call belongs to, [calls], from 0: Heun and PNDM have more calls than steps.
        roles: the roles that each call has a row of, [calls]: 0 the negative prompt, 1 the prompt.
        noise_rows: the calls that draw fresh noise, ascending; those where diffusers draws noise only to multiply it
            by zero are among them, so that a generator ends where diffusers' would.
    """

    rows: Table
    init_noise_sigma: float
    step_of_row: tuple[int, ...]
    roles: tuple[tuple[int, ...], ...]
    noise_rows: tuple[int, ...]

    @property
    def calls(self) -> int:
        """How often the network is called."""
        return len(self.step_of_row)

    @property
    def timesteps(self) -> Table:
        """The timestep of each network call, float32 [calls]."""
        return self.rows[: self.calls, TIMESTEP]


class _Sampler(NamedTuple):
    run: Callable[[Grid], Iterator[Row]]
    spacing: str | None  # the default spacing; None where the timesteps are the sampler's own
    whole: bool = True  # timesteps are whole numbers
    interval: bool = False  # see NoiseSchedule.timesteps
    exploding: bool = False  # the latents are k-diffusion's x_0 + ratio·eps, not alpha x_0 + sigma eps
    zero_snr: bool = True  # can start from pure noise
    clean_end: bool = True  # ends without noise; if not, at timestep 0
    asks_schedule: bool = False  # ... unless the schedule's set_alpha_to_one says otherwise


_SAMPLERS = {
    "ddim": _Sampler(solvers.ddim, "leading", asks_schedule=True),
    "ddpm": _Sampler(solvers.ddpm, "leading"),
    "deis": _Sampler(solvers.deis, "linspace", interval=True, zero_snr=False, clean_end=False),
    "dpmpp_2m": _Sampler(solvers.dpmpp_2m, "linspace", interval=True),
    "dpmpp_2m_karras": _Sampler(solvers.dpmpp_2m, None),
    "dpmpp_2m_sde": _Sampler(solvers.dpmpp_2m_sde, "linspace", interval=True),
    "euler": _Sampler(solvers.euler, "linspace", whole=False, exploding=True),
    "euler_a": _Sampler(solvers.euler_a, "linspace", whole=False, exploding=True),
    "heun": _Sampler(solvers.heun, "linspace", whole=False, exploding=True, zero_snr=False),
    "lcm": _Sampler(solvers.lcm, None),
    "lms": _Sampler(solvers.lms, "linspace", whole=False, exploding=True, zero_snr=False),
    "pndm": _Sampler(solvers.pndm, "leading", zero_snr=False, clean_end=False, asks_schedule=True),
    "unipc": _Sampler(solvers.unipc, "linspace", interval=True),
}


def sampler_names() -> tuple[str, ...]:
    """The samplers ``sampler_table`` knows, in alphabetical order."""
    return tuple(_SAMPLERS)


def sampler_table(
    schedule: NoiseSchedule,
    sampler: str,
    steps: int,
    guidance: float | Sequence[float],
    *,
    eta: float = 0.0,
    spacing: str | None = None,
    embedded: float = 1.0,
    methods: Mapping[str, float] = MappingProxyType({}),
) -> SamplerTable:
    """The table that runs ``sampler`` for ``steps`` steps on a model trained with ``schedule``.

    ``guidance`` is w, a number or one a step: w > 0 is CFG, ``-s`` is diffusion-negative sampling of scale s.
    ``embedded`` is the guidance scale that a distilled model takes as an input. ``methods`` sets parameters of guidance
    methods, by the names of METHODS.
    ``eta`` in 0..1 is the share of fresh noise, of ddim only. ``spacing`` is one of SPACINGS; by default the
    schedule's own, else what diffusers would use for SD 1.5.

    Raises SettingsError for what cannot be honoured.
    """
    check_choice("sampler", sampler, sampler_names())
    spec = _SAMPLERS[sampler]
    count = _check_steps(steps, schedule)
    w = _check_guidance(guidance, count)
    if not (isinstance(eta, int | float | np.floating) and 0 <= eta <= 1) or isinstance(eta, bool):
        raise SettingsError(f"eta is {shown(eta)}; give a number from 0 (no fresh noise) to 1")
    if eta > 0 and sampler != "ddim":
        raise SettingsError(f"eta is {shown(eta)}, but {sampler} has no eta; leave it at 0, or use ddim")
    if schedule.rescale_zero_terminal_snr and not spec.zero_snr:
        known = ", ".join(name for name, other in _SAMPLERS.items() if other.zero_snr)
        raise SettingsError(f"{sampler} cannot start from zero terminal SNR; use one of {known}")

    grid, init_noise_sigma = _grid(schedule, sampler, count, spacing, float(eta))
    described = list(spec.run(grid))
    step_of_row = np.cumsum([not row.extra for row in described]) - 1
    noise_rows = tuple(number for number, row in enumerate(described) if row.draws)
    level_at = dict(zip(grid.timesteps, grid.levels, strict=False))
    rows = np.tile(identity_row().astype(np.float64), (len(described) + 1, 1))
    for columns, row, step in zip(rows, described, step_of_row, strict=False):
        state = np.zeros((SLOTS, SLOTS + 2))
        state[: len(row.state)] = row.state
        clean, _ = grid.predict(row.x, level_at.get(row.timestep) or grid.at(row.timestep))
        columns[TIMESTEP], columns[GUIDANCE], columns[EMBEDDED] = row.timestep, w[step], embedded - 1
        columns[ADVANCE], columns[INPUT] = 1, row.x[:SLOTS]
        columns[STATE], columns[OUTPUT], columns[NOISE] = state[:, :SLOTS].ravel(), state[:, SLOTS], state[:, SLOTS + 1]
        columns[CLEAN_STATE], columns[CLEAN_OUTPUT] = clean[:SLOTS], clean[SLOTS]
    rows[list(noise_rows), DRAW] = range(len(noise_rows))
    for name, value in methods.items():
        check_choice("guidance method", name, tuple(METHODS))
        rows[:-1, METHODS[name]] = value
    assert np.isfinite(rows).all(), (sampler, steps)
    table = rows.astype(np.float32)
    table.flags.writeable = False
    roles = tuple(_roles(np.float32(w[step])) for step in step_of_row)
    return SamplerTable(table, init_noise_sigma, tuple(step_of_row.tolist()), roles, noise_rows)


def check_defaults(schedule: NoiseSchedule, defaults: Defaults) -> None:
    """Raises SettingsError when what a bundle does by default is no table: a bundle that could never run."""
    for of_pass, sign in ((defaults.final, 1), (defaults.dns, -1)):
        sampler_table(schedule, of_pass.sampler, of_pass.steps, sign * of_pass.guidance)


def identity_row() -> Table:
    """The row that stands still, whatever the network returns: float32 [ROW]."""
    row = np.zeros(ROW, np.float32)
    row[INPUT.start] = 1.0  # the network still sees the finished latents: finite in, finite out
    row[STATE] = np.eye(SLOTS).ravel()
    row[CLEAN_STATE.start] = 1.0
    row[PARALLEL] = 1.0
    return row


def _roles(w: np.float32) -> tuple[int, ...]:
    """The branches that guidance of scale w needs: it drops the negative one at 1, and the prompt's at 0."""
    return (1,) if w == 1 else (0,) if w == 0 else (0, 1)


def _grid(schedule: NoiseSchedule, sampler: str, steps: int, spacing: str | None, eta: float) -> tuple[Grid, float]:
    """What the sampler walks over, and the factor of the noise it starts from."""
    spec = _SAMPLERS[sampler]
    if spacing is not None:
        check_choice("spacing", spacing, SPACINGS)
        if spec.spacing is None:
            raise SettingsError(f"spacing is {spacing!r}, but {sampler} has timesteps of its own; leave it out")
    if spec.spacing is not None:
        spacing = spacing or schedule.timestep_spacing or spec.spacing
        timesteps = schedule.timesteps(steps, spacing, whole=spec.whole, interval=spec.interval)
        ratios = schedule.sigmas_at(timesteps)
    elif sampler == "lcm":
        timesteps = schedule.lcm_timesteps(steps)
        ratios = schedule.sigmas_at(timesteps)
    else:
        timesteps, ratios = schedule.karras(steps)

    clean = spec.clean_end
    if spec.asks_schedule and schedule.set_alpha_to_one is not None:
        clean = schedule.set_alpha_to_one
    end = CLEAN if clean else schedule.level(0)
    levels = [*map(Level.of_ratio, ratios.tolist()), end]
    init_noise_sigma = 1.0
    if spec.exploding:
        # The norm of x_0 + ratio·eps, which diffusers simplifies when all timesteps are used.
        init_noise_sigma = ratios[0] if spacing != "leading" else math.hypot(ratios[0], 1.0)
    return Grid(schedule, timesteps.tolist(), levels, eta), float(init_noise_sigma)


def _check_steps(steps: Any, schedule: NoiseSchedule) -> int:
    most = schedule.train_timesteps
    remedy = f"give a whole number from 1 to {most}, such as 20"
    try:
        count = index(steps)
    except TypeError:
        raise SettingsError(f"steps is {shown(steps)}; {remedy}") from None
    if isinstance(steps, bool | np.bool_) or not 1 <= count <= most:
        raise SettingsError(f"steps is {shown(steps)}; {remedy}")
    return count


def is_guidance(value: object) -> bool:
    """Whether ``value`` is a number that a table can hold as guidance scale."""
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return number and bool(abs(value) <= FLOAT32_MAX)  # type: ignore[arg-type]


def _check_guidance(guidance: Any, steps: int) -> list[float]:
    """w of each step, [steps], every value finite in float32."""
    remedy = "give a finite number, or one for each step"
    if isinstance(guidance, np.ndarray):
        guidance = guidance.tolist()
    values = list(guidance) if isinstance(guidance, list | tuple) else [guidance] * steps
    if len(values) != steps:
        raise SettingsError(f"guidance has {len(values)} values for {steps} steps; {remedy}")
    for value in values:
        if not is_guidance(value):
            raise SettingsError(f"guidance is {shown(value)}; {remedy}")
    return [float(value) for value in values]
