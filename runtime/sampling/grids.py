"""The samplers by name, and the grid of timesteps and noise levels that each walks over for a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import numpy as np

from dnp.engine.errors import SettingsError
from dnp.runtime.sampling import solvers
from dnp.runtime.sampling.checks import check_choice
from dnp.runtime.sampling.flow import FlowSchedule
from dnp.runtime.sampling.levels import CLEAN, Floats, Level, spaced
from dnp.runtime.sampling.schedule import SPACINGS, NoiseSchedule
from dnp.runtime.sampling.settings import CONVERSIONS, FLOW_SCHEDULERS, SCHEDULERS, Keys, read_settings
from dnp.runtime.sampling.solvers import Grid, Row

FROM_NOISE: Final = 1e-6
"""How far from pure noise UniPC begins with a flow, where log(alpha/sigma) is infinite; diffusers' number."""


class SamplerSpec(NamedTuple):
    """A sampler: the algorithm, and what diffusers' class of the same results does around it."""

    run: Callable[[Grid], Iterator[Row]]
    scheduler: str  # the class of diffusers whose results it gives
    fixed: Mapping[str, Any] = {}  # the settings that the name stands for
    whole: bool = True  # timesteps are whole numbers
    interval: bool = False  # see NoiseSchedule.timesteps; levels spaced anew go over all that were trained
    exploding: bool = False  # the latents are k-diffusion's x_0 + ratio·eps, not alpha x_0 + sigma eps
    zero_snr: bool = True  # can start from pure noise
    sample: bool = True  # can follow a network that predicts x_0
    clean_end: bool = True  # ends without noise, where no setting says; if not, at timestep 0


_DPMPP: Mapping[str, Any] = {"algorithm_type": "dpmsolver++"}
SAMPLERS = {
    "ddim": SamplerSpec(solvers.ddim, "DDIMScheduler"),
    "ddpm": SamplerSpec(solvers.ddpm, "DDPMScheduler"),
    "deis": SamplerSpec(solvers.deis, "DEISMultistepScheduler", interval=True, zero_snr=False, clean_end=False),
    "dpmpp_2m": SamplerSpec(solvers.dpmpp_2m, "DPMSolverMultistepScheduler", _DPMPP, interval=True),
    "dpmpp_2m_karras": SamplerSpec(
        solvers.dpmpp_2m, "DPMSolverMultistepScheduler", {**_DPMPP, "use_karras_sigmas": True}, interval=True
    ),
    "dpmpp_2m_sde": SamplerSpec(
        solvers.dpmpp_2m_sde, "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, interval=True
    ),
    "euler": SamplerSpec(solvers.euler, "EulerDiscreteScheduler", whole=False, exploding=True),
    "euler_a": SamplerSpec(solvers.euler_a, "EulerAncestralDiscreteScheduler", whole=False, exploding=True),
    "heun": SamplerSpec(solvers.heun, "HeunDiscreteScheduler", whole=False, exploding=True, zero_snr=False),
    "lcm": SamplerSpec(solvers.lcm, "LCMScheduler"),
    "lms": SamplerSpec(solvers.lms, "LMSDiscreteScheduler", whole=False, exploding=True, zero_snr=False),
    "pndm": SamplerSpec(solvers.pndm, "PNDMScheduler", {"skip_prk_steps": True}, zero_snr=False, sample=False),
    "unipc": SamplerSpec(solvers.unipc, "UniPCMultistepScheduler", interval=True),
}
FLOW_SAMPLERS = {
    "dpmpp_2m": SamplerSpec(solvers.dpmpp_2m, "DPMSolverMultistepScheduler", _DPMPP, zero_snr=False),
    "dpmpp_2m_sde": SamplerSpec(
        solvers.dpmpp_2m_sde,
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++"},
        zero_snr=False,
    ),
    "euler": SamplerSpec(solvers.flow_euler, "FlowMatchEulerDiscreteScheduler", whole=False),
    "heun": SamplerSpec(solvers.flow_heun, "FlowMatchHeunDiscreteScheduler", whole=False),
    "unipc": SamplerSpec(solvers.unipc, "UniPCMultistepScheduler", interval=True),
}


def known_samplers(*, flow: bool) -> tuple[Mapping[str, SamplerSpec], Mapping[str, Keys]]:
    """The samplers for models of a kind, and what their classes know."""
    return (FLOW_SAMPLERS, FLOW_SCHEDULERS) if flow else (SAMPLERS, SCHEDULERS)


def flow_grid(
    schedule: FlowSchedule, spec: SamplerSpec, sampler: str, steps: int, spacing: str | None, eta: float
) -> Grid:
    """What the sampler walks over, of a flow; it ends without noise."""
    settings = read_settings(FLOW_SCHEDULERS[spec.scheduler], {**schedule.settings, **spec.fixed})
    if spacing is not None:
        check_choice("spacing", spacing, SPACINGS)
        if not spec.zero_snr:
            raise SettingsError(f"spacing is {spacing!r}, but {sampler} has timesteps of its own; leave it out")
        if spacing == "leading":
            raise SettingsError("spacing is 'leading', which a flow matching model has not; use linspace or trailing")
    if spec.zero_snr:
        sigmas = schedule.sigmas(steps, spacing or "linspace", interval=spec.interval)
    else:
        sigmas = schedule.inner_sigmas(steps)
    if kind := _conversion(settings):
        sigmas = spaced(kind, steps, float(sigmas[-1]), float(sigmas[0]))
    if spec.interval and sigmas[0] > 1 - FROM_NOISE:
        sigmas[0] -= FROM_NOISE
    timesteps = sigmas * schedule.train_timesteps
    levels = [*map(Level.of_flow, sigmas.astype(np.float32).tolist()), CLEAN]
    return Grid(schedule, (np.floor(timesteps) if spec.whole else timesteps).tolist(), levels, eta, settings)


def _conversion(settings: Mapping[str, Any]) -> str | None:
    """How the noise levels are spaced anew, if they are."""
    return next((kind for key, kind in CONVERSIONS.items() if settings.get(key)), None)


def diffusion_grid(
    schedule: NoiseSchedule, spec: SamplerSpec, sampler: str, steps: int, spacing: str | None, eta: float
) -> tuple[Grid, float]:
    """What the sampler walks over, of diffusion, and the factor of the noise it starts from."""
    settings = read_settings(SCHEDULERS[spec.scheduler], {**schedule.settings, **spec.fixed})
    conversion = _conversion(settings)
    anew = conversion is not None and spec.interval
    if spacing is not None:
        check_choice("spacing", spacing, SPACINGS)
        if anew or "timestep_spacing" not in settings:
            raise SettingsError(f"spacing is {spacing!r}, but {sampler} has timesteps of its own; leave it out")
    spacing = spacing or settings.get("timestep_spacing")

    if spacing is None:
        timesteps = schedule.lcm_timesteps(steps, settings["original_inference_steps"])
    elif anew:
        timesteps = np.arange(schedule.train_timesteps - 1.0, -1.0, -1.0)
    else:
        offset = settings["steps_offset"]
        timesteps = schedule.timesteps(steps, spacing, offset=offset, whole=spec.whole, interval=spec.interval)
    ratios = schedule.sigmas_at(timesteps)
    clean = settings.get("set_alpha_to_one", settings.get("final_sigmas_type", spec.clean_end) in (True, "zero"))
    end = CLEAN if clean else schedule.level(0)
    if log_linear := settings.get("interpolation_type") == "log_linear":
        low, high = float(schedule.sigmas[0]), float(schedule.sigmas[-1])
        ratios = spaced("exponential", steps + 1, low, high)
    if conversion:
        low, high = settings.get("sigma_min") or ratios[-1], settings.get("sigma_max") or ratios[0]
        ratios = spaced(conversion, steps, float(low), float(high))
        timesteps = _nearest_timesteps(schedule, spec, conversion, ratios)
        end = CLEAN if clean else Level.of_ratio(float(schedule.sigmas[0]))  # the last level again, to the last bit
    elif log_linear:  # levels that the timesteps do not have, one of them in the end's place
        ratios, end = ratios[:-1], Level.of_ratio(float(ratios[-1]))
    ratios = ratios.astype(np.float32).astype(np.float64)
    levels = [*map(Level.of_ratio, ratios.tolist()), end]
    init_noise_sigma = 1.0
    if spec.exploding:
        # The norm of x_0 + ratio·eps, which diffusers simplifies when all timesteps are used.
        init_noise_sigma = ratios[0] if spacing != "leading" else math.hypot(ratios[0], 1.0)
    return Grid(schedule, timesteps.tolist(), levels, eta, settings), float(init_noise_sigma)


def _nearest_timesteps(schedule: NoiseSchedule, spec: SamplerSpec, conversion: str, ratios: Floats) -> Floats:
    """The timesteps of levels spaced anew; where they must be whole, as diffusers makes them so."""
    timesteps = schedule.timesteps_at(ratios)
    if not spec.whole:
        return timesteps
    unrounded = spec.scheduler == "DPMSolverMultistepScheduler" and schedule.beta_schedule == "squaredcos_cap_v2"
    return np.rint(timesteps) if conversion in ("karras", "lu") and not unrounded else np.floor(timesteps)
