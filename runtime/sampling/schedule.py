"""The noise schedule a diffusion model was trained with, and the timesteps a sampler visits.

The forward process of diffusion is variance preserving: ``x_t = alpha_t x_0 + sigma_t eps`` with
``alpha_t² = alpha_bar_t`` and ``sigma_t² = 1 - alpha_bar_t`` (DDPM, arXiv 2006.11239). What is *data* here
(betas, alpha_bar, noise levels) is rounded to float32, as the training code and diffusers have it: the first
betas are 1e-3, so that rounding moves the smallest noise levels by 1e-4. What is *computed* from it is
float64. That of flow matching is in ``flow.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from dnp.engine.errors import SettingsError
from dnp.runtime.sampling.checks import check_choice, check_train_timesteps, is_number
from dnp.runtime.sampling.flow import FLOW_PREDICTION, FlowSchedule
from dnp.runtime.sampling.levels import Floats, Level

Float32s = npt.NDArray[np.float32]

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "linspace", "trailing")
TERMINAL_ALPHA_BAR = 2.0**-24
"""Stands for zero where a noise level is a ratio sigma/alpha, which zero terminal SNR makes infinite."""


@dataclass(frozen=True)
class NoiseSchedule:
    """How much noise each training timestep has, and what the network predicts. The defaults are SD 1.5's.

    Attributes:
        train_timesteps: how many timesteps the model was trained with.
        beta_start, beta_end: the first and last variance added per timestep.
        beta_schedule: how beta goes from one to the other, of BETA_SCHEDULES (the cosine one ignores both).
        prediction_type: ``epsilon``, the noise; ``sample``, x_0; ``v_prediction``, alpha eps - sigma x_0 (2202.00512).
        rescale_zero_terminal_snr: move the schedule to end in pure noise (arXiv 2305.08891).
        trained_betas: the betas themselves, one a timestep; beta_start, beta_end and beta_schedule then mean nothing.
        settings: what the scheduler configuration says to samplers, by diffusers' keys: see ``settings.py``.

    Raises SettingsError for values outside their range.
    """

    train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    rescale_zero_terminal_snr: bool = False
    trained_betas: tuple[float, ...] | None = None
    settings: Mapping[str, Any] = field(
        default_factory=lambda: {"steps_offset": 1, "set_alpha_to_one": False}, hash=False
    )

    def __post_init__(self) -> None:
        check_choice("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        check_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        check_train_timesteps(self.train_timesteps)
        count = self.train_timesteps
        for name, value in (("beta_start", self.beta_start), ("beta_end", self.beta_end)):
            if not _is_beta(value):
                raise SettingsError(f"{name} is {value!r}; give a number between 0 and 1")
        if self.trained_betas is not None and (
            len(self.trained_betas) != count or not all(map(_is_beta, self.trained_betas))
        ):
            raise SettingsError(
                f"trained_betas holds {len(self.trained_betas)} values for {count} training timesteps; "
                "give one number between 0 and 1 for each"
            )
        if self.rescale_zero_terminal_snr and self.prediction_type == "epsilon":
            raise SettingsError(
                "rescale_zero_terminal_snr is true with prediction_type 'epsilon', which tells nothing of "
                "x_0 in pure noise; such a model is trained with 'v_prediction'"
            )
        if not (np.diff(self.sigmas, prepend=0.0) > 0).all():
            betas = self._betas()
            raise SettingsError(
                f"betas from {betas[0]:g} to {betas[-1]:g} give {self.train_timesteps} noise "
                "levels that do not all differ in float32; give the betas the model was trained with"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule of a diffusers ``scheduler_config.json``, whichever scheduler class wrote it.

        Raises SettingsError when the schedule is incomplete or cannot be followed. What else the configuration says
        is kept for the samplers, which check it.
        """
        missing = [key for key in ("beta_start", "beta_end", "beta_schedule") if key not in config]
        if missing:
            raise SettingsError(
                f"the scheduler configuration lacks {', '.join(missing)}; "
                "give the contents of the model's scheduler/scheduler_config.json"
            )
        betas = config.get("trained_betas")
        if betas is not None and not isinstance(betas, list | tuple):
            raise SettingsError(f"trained_betas is {betas!r}; give a list of numbers")
        return cls(
            train_timesteps=config.get("num_train_timesteps", 1000),
            beta_start=config["beta_start"],
            beta_end=config["beta_end"],
            beta_schedule=config["beta_schedule"],
            prediction_type=config.get("prediction_type", "epsilon"),
            rescale_zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
            trained_betas=None if betas is None else tuple(betas),
            settings=dict(config),
        )

    def sized(self, height: int, width: int) -> NoiseSchedule:
        """The schedule for latents of ``height`` and ``width``: the same for all."""
        return self

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

    def timesteps_at(self, ratios: Floats) -> Floats:
        """The timesteps, whole or not, whose noise levels are ``ratios`` [n], interpolated in their logarithms."""
        known, wanted = np.log(self.sigmas), np.log(np.maximum(ratios, 1e-10))
        low = np.clip(np.searchsorted(known, wanted, side="right") - 1, 0, self.train_timesteps - 2)
        # In diffusers' order and in its float32: samplers that drop the fraction would else differ by a timestep.
        share = np.clip((known[low] - wanted) / (known[low] - known[low + 1]), 0, 1)
        timesteps: Floats = (1 - share) * low + share * (low + 1)
        return timesteps

    def timesteps(
        self, steps: int, spacing: str, *, offset: int = 0, whole: bool = True, interval: bool = False
    ) -> Floats:
        """``steps`` timesteps in the order they are visited, descending: [steps].

        Table 2 of arXiv 2305.08891, in which diffusers' schedulers differ in two ways. ``whole``: linspace is
        rounded to whole timesteps (by all but Euler, Heun and LMS). ``interval``: leading and linspace have
        one point more, at the clean end, which is not visited (by DPM-Solver, DEIS and UniPC). ``offset`` is added to
        leading ones.

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
            visited = np.arange(points)[::-1] * (last // points) + float(offset)
        else:
            visited = np.rint(np.arange(last, 0, -last / steps)) - 1.0
        visited = visited[:steps]  # for 61 steps and some others, rounding makes arange one too long
        if visited[0] >= last or (steps > 1 and not (np.diff(visited) < 0).all()):
            raise SettingsError(
                f"{steps} steps do not fit into {last} training timesteps with {spacing} spacing; "
                "use fewer steps, or another spacing"
            )
        return visited.astype(np.float64)

    def lcm_timesteps(self, steps: int, trained: int) -> Floats:
        """``steps`` of the ``trained`` timesteps that a consistency model is distilled on, descending: [steps]."""
        trained = min(trained, self.train_timesteps)
        if steps > trained:
            raise SettingsError(f"steps is {steps}, but lcm knows only {trained} timesteps; use 2 to 8 steps")
        timesteps = np.arange(trained, 0, -1) * (self.train_timesteps // trained) - 1.0
        chosen = np.floor(np.linspace(0, trained, steps, endpoint=False)).astype(np.int64)
        return timesteps[chosen].astype(np.float64)

    def _betas(self) -> Float32s:
        if self.trained_betas is not None:
            return np.array(self.trained_betas, np.float32)
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


Schedule = NoiseSchedule | FlowSchedule


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a diffusers ``scheduler_config.json`` is a flow matching model's."""
    flow_class = str(config.get("_class_name", "")).startswith("FlowMatch")
    return flow_class or bool(config.get("use_flow_sigmas")) or config.get("prediction_type") == FLOW_PREDICTION


def read_schedule(config: Mapping[str, Any]) -> Schedule:
    """The schedule of a diffusers ``scheduler_config.json``, whichever scheduler class wrote it.

    Raises SettingsError when the schedule is incomplete or cannot be followed.
    """
    return FlowSchedule.from_config(config) if is_flow(config) else NoiseSchedule.from_config(config)


def _is_beta(value: object) -> bool:
    return is_number(value) and 0 < value < 1


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
