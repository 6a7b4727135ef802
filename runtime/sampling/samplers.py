"""Samplers as tables: one row of numbers per network call, nothing else.

Every sampler here is linear in its state and in what the network returns, so one graph can run them all. What a row
holds is in ``dnp/engine/bundle/columns.py``; the algorithms that fill it are in ``solvers.py``. Nothing depends on the
sign or the size of the guidance scale, a column like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    NEGATIVE_OUTPUT,
    NOISE,
    NORM_CAP,
    NORM_LIMIT,
    OUTPUT,
    PARALLEL,
    PERPENDICULAR,
    RESCALE,
    ROW,
    SLOTS,
    STATE,
    THIRD,
    TIMESTEP,
    ZERO_STAR,
)
from dnp.engine.bundle.manifest import Defaults
from dnp.engine.bundle.schema import shown
from dnp.engine.errors import SettingsError
from dnp.runtime.sampling.checks import check_choice
from dnp.runtime.sampling.flow import FlowSchedule
from dnp.runtime.sampling.grids import SAMPLERS, SamplerSpec, diffusion_grid, flow_grid, known_samplers
from dnp.runtime.sampling.schedule import Schedule, is_flow
from dnp.runtime.sampling.settings import read_settings

Table = npt.NDArray[np.float32]

FLOAT32_MAX = float(np.finfo(np.float32).max)


class Method(NamedTuple):
    """A guidance method's parameter: a number from 0 to ``most``, and the column that holds it."""

    column: int
    most: float = FLOAT32_MAX


PERP_NEG: Final = "perp_neg"
METHODS: Final[Mapping[str, Method]] = {
    "rescale": Method(RESCALE, 1.0),
    "norm_limit": Method(NORM_LIMIT),
    "parallel": Method(PARALLEL),
    "zero_star": Method(ZERO_STAR, 1.0),
    "norm_cap": Method(NORM_CAP),
    PERP_NEG: Method(THIRD),  # as -w times it
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
        roles: the roles that each call has a row of, [calls]: 0 the negative prompt, 1 the prompt. With Perp-Neg 0 is
            the empty prompt, and 2 the negative one.
        noise_steps: the calls that draw fresh noise, ascending; those where diffusers draws noise only to multiply it
            by zero are among them, so that a generator ends where diffusers' would.
    """

    rows: Table
    init_noise_sigma: float
    step_of_row: tuple[int, ...]
    roles: tuple[tuple[int, ...], ...]
    noise_steps: tuple[int, ...]

    @property
    def calls(self) -> int:
        """How often the network is called."""
        return len(self.step_of_row)

    @property
    def perp_neg(self) -> bool:
        """Whether the negative prompt is role 2, and role 0 the empty one."""
        return bool(self.rows[0, PERPENDICULAR])

    @property
    def timesteps(self) -> Table:
        """The timestep of each network call, float32 [calls]."""
        return self.rows[: self.calls, TIMESTEP]


def sampler_names() -> tuple[str, ...]:
    """The samplers ``sampler_table`` knows, in alphabetical order."""
    return tuple(SAMPLERS)


def sampler_of(scheduler: str, config: Mapping[str, Any]) -> str | None:
    """The sampler that gives what diffusers' class ``scheduler`` does under ``config``; None for an unknown class.

    Raises SettingsError when the configuration says what no sampler can honour.
    """
    samplers, keys = known_samplers(flow=is_flow({**config, "_class_name": scheduler}))
    known = {name: spec for name, spec in samplers.items() if spec.scheduler == scheduler}
    if not known:
        return None
    settings = read_settings(keys[scheduler], config)
    fits = [name for name, spec in known.items() if spec.fixed.items() <= settings.items()]
    return max(fits, key=lambda name: len(known[name].fixed))


def sampler_table(
    schedule: Schedule,
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
    methods, by the names of METHODS. One of them, ``perp_neg``, adds a third branch.
    ``eta`` in 0..1 is the share of fresh noise, of ddim only. ``spacing`` is one of SPACINGS; by default the
    schedule's own. The schedule's other settings count as far as the sampler's class knows them.

    Raises SettingsError for what cannot be honoured.
    """
    spec = _sampler(schedule, sampler)
    count = _check_steps(steps, schedule)
    w = _check_guidance(guidance, count)
    if not (isinstance(eta, int | float | np.floating) and 0 <= eta <= 1) or isinstance(eta, bool):
        raise SettingsError(f"eta is {shown(eta)}; give a number from 0 (no fresh noise) to 1")
    if eta > 0 and sampler != "ddim":
        raise SettingsError(f"eta is {shown(eta)}, but {sampler} has no eta; leave it at 0, or use ddim")
    if schedule.rescale_zero_terminal_snr and not spec.zero_snr:
        known = ", ".join(name for name, other in SAMPLERS.items() if other.zero_snr)
        raise SettingsError(f"{sampler} cannot start from zero terminal SNR; use one of {known}")
    if schedule.prediction_type == "sample" and not spec.sample:
        known = ", ".join(name for name, other in SAMPLERS.items() if other.sample)
        raise SettingsError(f"{sampler} cannot follow a network that predicts x_0; use one of {known}")
    _check_methods(methods, w)

    if isinstance(schedule, FlowSchedule):
        grid, init_noise_sigma = flow_grid(schedule, spec, sampler, count, spacing, float(eta)), 1.0
    else:
        grid, init_noise_sigma = diffusion_grid(schedule, spec, sampler, count, spacing, float(eta))
    try:
        described = list(spec.run(grid))
    except ZeroDivisionError:  # the distance in log_snr to x_0 itself is infinite
        raise SettingsError(
            f"{sampler} of order {grid.settings['solver_order']} cannot end without noise; set lower_order_final to "
            "true, or final_sigmas_type to 'sigma_min', in the scheduler configuration"
        ) from None
    step_of_row = np.cumsum([not row.extra for row in described]) - 1
    noise_steps = tuple(number for number, row in enumerate(described) if row.draws)
    rows = np.tile(identity_row().astype(np.float64), (len(described) + 1, 1))
    for columns, row, step in zip(rows, described, step_of_row, strict=False):
        state = np.zeros((SLOTS, SLOTS + 2))
        state[: len(row.state)] = row.state
        clean, _ = grid.predict(row.x, grid.levels[step + row.extra])
        columns[TIMESTEP], columns[GUIDANCE], columns[EMBEDDED] = row.timestep, w[step], embedded - 1
        columns[ADVANCE], columns[INPUT] = 1, row.x[:SLOTS]
        columns[STATE], columns[OUTPUT], columns[NOISE] = state[:, :SLOTS].ravel(), state[:, SLOTS], state[:, SLOTS + 1]
        columns[CLEAN_STATE], columns[CLEAN_OUTPUT] = clean[:SLOTS], clean[SLOTS]
    rows[list(noise_steps), DRAW] = range(len(noise_steps))
    for name, value in methods.items():
        rows[:-1, METHODS[name].column] = value
    if PERP_NEG in methods:  # o_0 + w (p - s n') is o_0 + w p + v n'
        rows[:-1, THIRD] *= -rows[:-1, GUIDANCE]
        rows[:-1, PERPENDICULAR] = 1
    assert np.isfinite(rows).all(), (sampler, steps)
    table = rows.astype(np.float32)
    table.flags.writeable = False
    roles = tuple(map(_roles, table[:-1]))
    return SamplerTable(table, init_noise_sigma, tuple(step_of_row.tolist()), roles, noise_steps)


def check_defaults(schedule: Schedule, defaults: Defaults) -> None:
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


def _roles(row: Table) -> tuple[int, ...]:
    """The branches that a row, float32 [ROW], has a use for.

    Guidance drops the negative one at w = 1, as diffusers' guiders do, and the prompt's at 0, unless a method measures
    the result against the prompt's. A third branch goes with both.
    """
    w, measured = row[GUIDANCE], row[[RESCALE, ZERO_STAR, NORM_CAP]].any()
    if row[THIRD]:
        return 0, 1, 2
    if w == 1 and not row[NEGATIVE_OUTPUT].any():
        return (1,)
    return (0,) if w == 0 and not measured else (0, 1)


def _sampler(schedule: Schedule, sampler: str) -> SamplerSpec:
    """The sampler of a name, for models of the schedule's kind."""
    check_choice("sampler", sampler, sampler_names())
    known, _ = known_samplers(flow=isinstance(schedule, FlowSchedule))
    if sampler not in known:
        raise SettingsError(f"{sampler} cannot sample a flow matching model; use one of {', '.join(known)}")
    return known[sampler]


def _check_steps(steps: Any, schedule: Schedule) -> int:
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


def _check_methods(methods: Mapping[str, float], w: Sequence[float]) -> None:
    """Raises SettingsError for a method or a value that a table cannot hold."""
    for name, value in methods.items():
        check_choice("guidance method", name, tuple(METHODS))
        most = METHODS[name].most
        if not is_guidance(value) or not 0 <= value <= most:
            allowed = "from 0 up" if most == FLOAT32_MAX else f"from 0 to {most:g}"
            raise SettingsError(f"the guidance method {name} is {shown(value)}; give a number {allowed}")
    if not all(is_guidance(value * methods.get(PERP_NEG, 0.0)) for value in w):
        raise SettingsError("perp_neg times guidance is too large for a number; give smaller ones")


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
