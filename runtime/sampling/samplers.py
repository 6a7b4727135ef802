"""Samplers as tables: one row of numbers per network call, nothing else.

Every sampler here is linear in its state and in what the network returns, so one graph can run them all::

    x      = Σ_k E_k s_k                               the network's input
    ob, op = network(x, t; base context), network(x, t; prompt context)
    o      = ob + w (op - ob)                          w > 0: guidance; w < 0: diffusion-negative sampling
    s'     = A s + B o + C z                           z: fresh standard normal noise

with the state s of SLOTS latents, slot 0 the current ones. A row is ``(t, w, E, A, B, C)``, laid out as
dnp.engine.bundle.columns says; the algorithms that fill it are in ``solvers.py``. Nothing depends on the sign or the
size of w, a column like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dnp.engine.bundle.columns import GUIDANCE, INPUT, NOISE, OUTPUT, ROW, SLOTS, STATE, TIMESTEP
from dnp.engine.bundle.manifest import Defaults
from dnp.engine.bundle.schema import shown
from dnp.engine.errors import SettingsError
from dnp.runtime.sampling import solvers
from dnp.runtime.sampling.schedule import CLEAN, SPACINGS, Level, NoiseSchedule, check_choice
from dnp.runtime.sampling.solvers import Grid, Row

Table = npt.NDArray[np.float32]

FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """One sampling run as data.

    Attributes:
        rows: float32 [R, ROW], to be run in order. The state begins as standard normal noise times
            ``init_noise_sigma`` in slot 0 and zeros elsewhere, and ends with the final latents in slot 0.
        init_noise_sigma: the factor of the starting noise.
        step_of_row: the step each row belongs to, [R], from 0: Heun and PNDM have more rows than steps.
        noise_rows: the rows that draw fresh noise, ascending; rows where diffusers draws noise only to
            multiply it by zero are among them, so that a generator ends where diffusers' would.
    """

    rows: Table
    init_noise_sigma: float
    step_of_row: tuple[int, ...]
    noise_rows: tuple[int, ...]

    @property
    def stochastic(self) -> bool:
        """Whether any row draws noise."""
        return bool(self.noise_rows)

    @property
    def timesteps(self) -> Table:
        """The timestep of each network call, float32 [R]."""
        return self.rows[:, TIMESTEP]


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
) -> SamplerTable:
    """The table that runs ``sampler`` for ``steps`` steps on a model trained with ``schedule``.

    ``guidance`` is w, a number or one a step: w > 0 is CFG, ``-s`` is diffusion-negative sampling of scale s.
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
    rows = np.zeros((len(described), ROW))
    for columns, row, step in zip(rows, described, step_of_row, strict=True):
        state = np.zeros((SLOTS, SLOTS + 2))
        state[: len(row.state)] = row.state
        columns[TIMESTEP], columns[GUIDANCE], columns[INPUT] = row.timestep, w[step], row.x[:SLOTS]
        columns[STATE], columns[OUTPUT], columns[NOISE] = state[:, :SLOTS].ravel(), state[:, SLOTS], state[:, SLOTS + 1]
    assert np.isfinite(rows).all(), (sampler, steps)
    noise_rows = tuple(number for number, row in enumerate(described) if row.draws)
    table = rows.astype(np.float32)
    table.flags.writeable = False
    return SamplerTable(table, init_noise_sigma, tuple(step_of_row.tolist()), noise_rows)


def check_defaults(schedule: NoiseSchedule, defaults: Defaults) -> None:
    """Raises SettingsError when what a bundle does by default is no table: a bundle that could never run."""
    for settings, sign in ((defaults.final, 1), (defaults.dns, -1)):
        sampler_table(schedule, settings.sampler, settings.steps, sign * settings.guidance)


def identity_row() -> Table:
    """The row that leaves the state as it is, whatever the network returns: float32 [ROW]."""
    row = np.zeros(ROW, np.float32)
    row[INPUT.start] = 1.0  # the network still sees the finished latents: finite in, finite out
    row[STATE] = np.eye(SLOTS).ravel()
    return row


def stack_tables(tables: Sequence[SamplerTable]) -> Table:
    """Tables of any lengths as one batch, float32 [B, R, ROW]; the shorter ones idle at their end."""
    longest = max(len(table.rows) for table in tables)
    stacked = np.tile(identity_row(), (len(tables), longest, 1))
    for batch, table in zip(stacked, tables, strict=True):
        batch[: len(table.rows)] = table.rows
    return stacked


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
