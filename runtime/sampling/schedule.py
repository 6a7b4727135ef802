"""The noise schedule a model was trained with, and the timesteps a sampler visits.

The forward process is variance preserving: ``x_t = alpha_t x_0 + sigma_t eps`` with
``alpha_t² = alpha_bar_t`` and ``sigma_t² = 1 - alpha_bar_t`` (DDPM, arXiv 2006.11239). What is *data* here
(betas, alpha_bar, noise levels) is rounded to float32, as the training code and diffusers have it: the first
betas are 1e-3, so that rounding moves the smallest noise levels by 1e-4. What is *computed* from it is
float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dnp.engine.errors import SettingsError

Float32s = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction")
SPACINGS = ("leading", "linspace", "trailing")
KARRAS_RHO = 7.0
LCM_TRAINING_STEPS = 50
"""Latent consistency models are distilled on that many timesteps: LCMScheduler's original_inference_steps."""
TERMINAL_ALPHA_BAR = 2.0**-24
"""Stands for zero where a noise level is a ratio sigma/alpha, which zero terminal SNR makes infinite."""

# diffusers_key: (the only values we can honour, why not others)
_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "thresholding": ((False, None), "dynamic thresholding is not linear in the latents, a sampler table is"),
    "clip_sample": ((False, None), "clipping x_0 is not linear in the latents, a sampler table is"),
    "trained_betas": ((None,), "only schedules given by beta_schedule, beta_start and beta_end are known"),
    "use_flow_sigmas": ((False, None), "flow matching models are not supported"),
    "use_dynamic_shifting": ((False, None), "flow matching models are not supported"),
    "timestep_type": (("discrete", None), "EDM models, with a continuous timestep, are not supported"),
    "interpolation_type": (("linear", None), "noise levels are interpolated linearly"),
    "sigma_min": ((None,), "the noise levels follow from the betas"),
    "sigma_max": ((None,), "the noise levels follow from the betas"),
    "variance_type": (("fixed_small", None), "a network that predicts variances has twice the channels"),
}


class Level(NamedTuple):
    """One noise level: ``x = alpha x_0 + sigma eps`` with ``alpha² + sigma² = 1``."""

    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma/alpha, what k-diffusion and Karras et al. call sigma."""
        return self.sigma / self.alpha

    @property
    def log_snr(self) -> float:
        """lambda = log(alpha/sigma), the time of the DPM-Solver papers."""
        return math.log(self.alpha / self.sigma)

    @classmethod
    def of_alpha_bar(cls, alpha_bar: float) -> Level:
        """The level of a DDPM timestep."""
        return cls(math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar))

    @classmethod
    def of_ratio(cls, ratio: float) -> Level:
        """The level at which sigma/alpha is ``ratio``."""
        alpha = 1.0 / math.sqrt(ratio * ratio + 1.0)
        return cls(alpha, ratio * alpha)


CLEAN = Level(1.0, 0.0)


@dataclass(frozen=True)
class NoiseSchedule:
    """How much noise each training timestep has, and what the network predicts. The defaults are SD 1.5's.

    Attributes:
        train_timesteps: how many timesteps the model was trained with.
        beta_start, beta_end: the first and last variance added per timestep.
        beta_schedule: how beta goes from one to the other, of BETA_SCHEDULES (the cosine one ignores both).
        prediction_type: ``epsilon``, the noise, or ``v_prediction``, alpha eps - sigma x_0 (2202.00512).
        steps_offset: added to the timesteps of leading spacing.
        set_alpha_to_one: the last step of DDIM and PNDM ends at alpha_bar = 1 rather than alpha_bar_0;
            None is what diffusers does when the configuration does not say: yes for DDIM, no for PNDM.
        timestep_spacing: the spacing for every sampler that knows it; None leaves each its own default.
        rescale_zero_terminal_snr: move the schedule to end in pure noise (arXiv 2305.08891).

    Raises SettingsError for values outside their range.
    """

    train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    steps_offset: int = 1
    set_alpha_to_one: bool | None = False
    timestep_spacing: str | None = None
    rescale_zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        check_choice("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        check_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        if self.timestep_spacing is not None:
            check_choice("timestep_spacing", self.timestep_spacing, SPACINGS)
        for name, least, most in (("train_timesteps", 2, 100_000), ("steps_offset", 0, 100_000)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise SettingsError(f"{name} is {value!r}; give a whole number from {least} to {most}")
        for name in ("beta_start", "beta_end"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
                raise SettingsError(f"{name} is {value!r}; give a number between 0 and 1")
        if self.rescale_zero_terminal_snr and self.prediction_type == "epsilon":
            raise SettingsError(
                "rescale_zero_terminal_snr is true with prediction_type 'epsilon', which tells nothing of "
                "x_0 in pure noise; such a model is trained with 'v_prediction'"
            )
        if not (np.diff(self.sigmas, prepend=0.0) > 0).all():
            raise SettingsError(
                f"betas from {self.beta_start!r} to {self.beta_end!r} give {self.train_timesteps} noise "
                "levels that do not all differ in float32; give the betas the model was trained with"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule of a diffusers ``scheduler_config.json``, whichever scheduler class wrote it.

        What only chooses a sampler (solver order, Karras sigmas) is left out: here the sampler's name does.
        Raises SettingsError when the schedule is incomplete or holds what a sampler table cannot do.
        """
        for key, (honoured, reason) in _REFUSED.items():
            value = config.get(key)
            # The two oldest classes clip when their configuration does not say.
            if key == "clip_sample" and config.get("_class_name") in ("DDIMScheduler", "DDPMScheduler"):
                value = config.get(key, True)
            if value not in honoured:
                raise SettingsError(
                    f"the scheduler configuration has {key} = {value!r}, but {reason}; "
                    f"set it to {honoured[0]!r} if the model does well without"
                )
        missing = [key for key in ("beta_start", "beta_end", "beta_schedule") if key not in config]
        if missing:
            raise SettingsError(
                f"the scheduler configuration lacks {', '.join(missing)}; "
                "give the contents of the model's scheduler/scheduler_config.json"
            )
        return cls(
            train_timesteps=config.get("num_train_timesteps", 1000),
            beta_start=config["beta_start"],
            beta_end=config["beta_end"],
            beta_schedule=config["beta_schedule"],
            prediction_type=config.get("prediction_type", "epsilon"),
            steps_offset=config.get("steps_offset", 0),
            set_alpha_to_one=config.get("set_alpha_to_one"),
            timestep_spacing=config.get("timestep_spacing"),
            rescale_zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
        )

    @cached_property
    def alphas_cumprod(self) -> Float32s:
        """alpha_bar by timestep, float32 [train_timesteps]; diffusers' bit for bit unless rescaled."""
        betas = self._betas()
        if self.rescale_zero_terminal_snr:
            betas = _zero_terminal_snr(betas)
        return _read_only(np.cumprod(1 - betas, dtype=np.float64).astype(np.float32))

    @cached_property
    def sigmas(self) -> Float32s:
        """sigma/alpha by timestep, float32 [train_timesteps], ascending."""
        alpha_bar = self.alphas_cumprod.copy()
        if self.rescale_zero_terminal_snr:
            alpha_bar[-1] = TERMINAL_ALPHA_BAR
        return _read_only(np.sqrt((1 - alpha_bar) / alpha_bar))

    def level(self, timestep: int) -> Level:
        """The noise level of a training timestep."""
        return Level.of_alpha_bar(float(self.alphas_cumprod[timestep]))

    def sigmas_at(self, timesteps: Floats) -> Floats:
        """sigma/alpha at any timesteps [n], whole or not, interpolated linearly."""
        sigmas = np.interp(timesteps, np.arange(self.train_timesteps), self.sigmas)
        return sigmas.astype(np.float32).astype(np.float64)

    def karras(self, steps: int) -> tuple[Floats, Floats]:
        """Timesteps and sigma/alpha [steps], even in the latter's seventh root: arXiv 2206.00364, equation 5.

        The timesteps are those with the nearest noise level, as DPMSolverMultistepScheduler rounds them.
        """
        low, high = (float(self.sigmas[i]) ** (1 / KARRAS_RHO) for i in (0, -1))
        sigmas = (high + np.linspace(0, 1, steps) * (low - high)) ** KARRAS_RHO
        timesteps = np.interp(np.log(sigmas), np.log(self.sigmas), np.arange(self.train_timesteps))
        # diffusers does not round for the cosine schedule, and then drops the fraction.
        whole = np.floor(timesteps) if self.beta_schedule == "squaredcos_cap_v2" else np.rint(timesteps)
        return whole, sigmas.astype(np.float32).astype(np.float64)

    def timesteps(self, steps: int, spacing: str, *, whole: bool = True, interval: bool = False) -> Floats:
        """``steps`` timesteps in the order they are visited, descending: [steps].

        Table 2 of arXiv 2305.08891, in which diffusers' schedulers differ in two ways. ``whole``: linspace is
        rounded to whole timesteps (by all but Euler, Heun and LMS). ``interval``: leading and linspace have
        one point more, at the clean end, which is not visited (by DPM-Solver, DEIS and UniPC).

        Raises SettingsError when a timestep would lie outside the schedule or come twice.
        """
        last = self.train_timesteps
        points = steps + 1 if interval else steps
        visited: npt.NDArray[np.floating[Any]]
        if spacing == "linspace":
            visited = np.linspace(0.0, last - 1, points)[::-1]
            if whole:
                visited = np.rint(visited)
        elif spacing == "leading":
            visited = np.arange(points)[::-1] * (last // points) + float(self.steps_offset)
        else:
            visited = np.rint(np.arange(last, 0, -last / steps)) - 1.0
        visited = visited[:steps]  # for 61 steps and some others, rounding makes arange one too long
        if visited[0] >= last or (steps > 1 and not (np.diff(visited) < 0).all()):
            raise SettingsError(
                f"{steps} steps do not fit into {last} training timesteps with {spacing} spacing; "
                "use fewer steps, or another spacing"
            )
        return visited.astype(np.float64)

    def lcm_timesteps(self, steps: int) -> Floats:
        """``steps`` of the timesteps that a latent consistency model is distilled on, descending: [steps]."""
        trained = min(LCM_TRAINING_STEPS, self.train_timesteps)
        if steps > trained:
            raise SettingsError(f"steps is {steps}, but lcm knows only {trained} timesteps; use 2 to 8 steps")
        timesteps = np.arange(trained, 0, -1) * (self.train_timesteps // trained) - 1.0
        chosen = np.floor(np.linspace(0, trained, steps, endpoint=False)).astype(np.int64)
        return timesteps[chosen].astype(np.float64)

    def _betas(self) -> Float32s:
        if self.beta_schedule == "linear":
            return _linspace32(self.beta_start, self.beta_end, self.train_timesteps)
        if self.beta_schedule == "scaled_linear":
            betas = _linspace32(self.beta_start**0.5, self.beta_end**0.5, self.train_timesteps)
            return np.square(betas, dtype=np.float32)
        # Nichol & Dhariwal, arXiv 2102.09672: alpha_bar is a squared cosine, each beta at most 0.999.
        time = np.arange(self.train_timesteps + 1) / self.train_timesteps
        alpha_bar = np.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
        return np.asarray(betas, np.float32)


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """SettingsError unless ``value`` is one of ``known``; the message names the nearest and all of them."""
    if value in known:
        return
    near = get_close_matches(str(value).lower(), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise SettingsError(f"{name} {value!r} is unknown; {hint}known: {', '.join(known)}")


def _linspace32(start: float, end: float, count: int) -> Float32s:
    """torch.linspace in float32: counted from the nearer end, and rounded once (a fused multiply-add)."""
    first, final = np.float32(start), np.float32(end)
    step = float((final - first) / np.float32(count - 1))
    up = np.arange(count)
    return np.asarray(np.where(up < count // 2, first + step * up, final - step * up[::-1]), np.float32)


def _zero_terminal_snr(betas: Float32s) -> Float32s:
    """Algorithm 1 of arXiv 2305.08891: sqrt(alpha_bar) shifted to end at 0, and scaled to begin as before."""
    root = np.sqrt(np.cumprod(1 - betas, dtype=np.float64).astype(np.float32))
    alpha_bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    alphas: Float32s = np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return 1 - alphas


def _read_only(values: Float32s) -> Float32s:
    values.flags.writeable = False
    return values
