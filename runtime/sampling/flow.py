"""The schedule of a flow matching model: straight from noise to data, ``x_t = (1 - sigma) x_0 + sigma eps``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from dnp.engine.errors import SettingsError
from dnp.runtime.sampling.checks import check_choice, check_train_timesteps, is_number
from dnp.runtime.sampling.levels import Floats

FLOW_PREDICTION: Final = "flow_prediction"
TOKEN_SIDE: Final = 2
"""Latents on each side of an image token, by whose number dynamic shifting goes."""


@dataclass(frozen=True)
class DynamicShift:
    """A shift that depends on the size of the image: mu is linear in its tokens, and extends beyond both ends.

    Attributes:
        tokens: two numbers of image tokens, ascending.
        mu: of each.
        kind: ``exponential``, the shift is e^mu; or ``linear``, it is mu.

    Raises SettingsError for values outside their range.
    """

    tokens: tuple[int, int] = (256, 4096)
    mu: tuple[float, float] = (0.5, 1.15)
    kind: str = "exponential"

    def __post_init__(self) -> None:
        check_choice("time_shift_type", self.kind, ("exponential", "linear"))
        whole = all(isinstance(count, int) and not isinstance(count, bool) for count in self.tokens)
        if not whole or not 0 < self.tokens[0] < self.tokens[1]:
            raise SettingsError(
                f"base_image_seq_len and max_image_seq_len are {self.tokens[0]!r} and {self.tokens[1]!r}; "
                "give two whole numbers, the larger last"
            )
        if not all(is_number(value) and abs(value) <= 10 for value in self.mu):
            raise SettingsError(
                f"base_shift and max_shift are {self.mu[0]!r} and {self.mu[1]!r}; give numbers from -10 to 10"
            )

    def of_size(self, height: int, width: int) -> float:
        """The shift for latents of this size. Raises SettingsError where a linear one is not above 0."""
        tokens = (height // TOKEN_SIDE) * (width // TOKEN_SIDE)
        slope = (self.mu[1] - self.mu[0]) / (self.tokens[1] - self.tokens[0])
        mu = tokens * slope + (self.mu[0] - slope * self.tokens[0])
        if self.kind == "exponential":
            return math.exp(mu)
        if mu <= 0:
            raise SettingsError(f"the shift for latents of {height}x{width} is {mu:g}, not above 0; take another size")
        return mu


@dataclass(frozen=True)
class FlowSchedule:
    """How a flow matching model was trained: it predicts ``eps - x_0`` (arXiv 2210.02747) at the timestep
    ``train_timesteps · sigma``.

    Attributes:
        train_timesteps: the timestep of pure noise.
        shift: gives the noisy end more steps: sigma becomes shift sigma / (1 + (shift - 1) sigma) (arXiv 2403.03206).
        dynamic: what the shift depends on; it is then that of ``sized``, and None before.
        terminal: sigmas are stretched so that the last but the clean one is this; None leaves them.
        settings: what the scheduler configuration says to samplers, by diffusers' keys: see ``settings.py``.

    Raises SettingsError for values outside their range.
    """

    train_timesteps: int = 1000
    shift: float | None = 1.0
    dynamic: DynamicShift | None = None
    terminal: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    prediction_type = FLOW_PREDICTION
    rescale_zero_terminal_snr = False

    def __post_init__(self) -> None:
        check_train_timesteps(self.train_timesteps)
        if not (self.shift is None and self.dynamic) and not (is_number(self.shift) and 0 < self.shift <= 1e6):
            raise SettingsError(f"shift is {self.shift!r}; give a number above 0, such as 3.0")
        if self.terminal is not None and not (is_number(self.terminal) and 0 < self.terminal < 1):
            raise SettingsError(f"shift_terminal is {self.terminal!r}; give a number between 0 and 1, or null")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FlowSchedule:
        """The schedule of a diffusers ``scheduler_config.json``, whichever scheduler class wrote it.

        Raises SettingsError when it cannot be followed.
        """
        predicts = config.get("prediction_type", FLOW_PREDICTION)
        if predicts != FLOW_PREDICTION:
            raise SettingsError(f"prediction_type is {predicts!r}, and a flow matching model's is {FLOW_PREDICTION!r}")
        shifts = {key: config[key] for key in ("shift", "flow_shift") if config.get(key) is not None}
        if len(set(shifts.values())) > 1:
            raise SettingsError(
                f"shift is {shifts['shift']!r} and flow_shift {shifts['flow_shift']!r}; give one of them"
            )
        dynamic = None
        if config.get("use_dynamic_shifting"):
            known = DynamicShift()
            dynamic = DynamicShift(
                (
                    config.get("base_image_seq_len", known.tokens[0]),
                    config.get("max_image_seq_len", known.tokens[1]),
                ),
                (config.get("base_shift", known.mu[0]), config.get("max_shift", known.mu[1])),
                config.get("time_shift_type", known.kind),
            )
        return cls(
            train_timesteps=config.get("num_train_timesteps", 1000),
            shift=None if dynamic else next(iter(shifts.values()), 1.0),
            dynamic=dynamic,
            terminal=config.get("shift_terminal") or None,
            settings=dict(config),
        )

    def sized(self, height: int, width: int) -> FlowSchedule:
        """The schedule for latents of ``height`` and ``width``, on which a dynamic shift depends."""
        return self if self.dynamic is None else replace(self, shift=self.dynamic.of_size(height, width))

    def sigmas(self, steps: int, spacing: str, *, interval: bool = False) -> Floats:
        """``steps`` sigmas in the order they are visited, descending from 1, shifted and stretched: [steps].

        ``linspace`` ends at the last timestep trained, ``trailing`` a step before 0. ``interval``: linspace has one
        point more, which is not visited (by UniPC).

        Raises SettingsError for one step where sigmas are to be stretched.
        """
        last = 1 / self.train_timesteps
        if spacing == "trailing":
            sigmas = np.linspace(1.0, 1 / steps, steps)
        elif interval:
            sigmas = np.linspace(1.0, last, steps + 1)[:-1]
        else:  # a shift that is fixed is applied to the last sigma before, too: diffusers does it twice
            sigmas = np.linspace(1.0, last if self.dynamic else self._shifted(np.array(last)), steps)
        return self._stretched(self._shifted(sigmas))

    def inner_sigmas(self, steps: int) -> Floats:
        """As ``sigmas``, for samplers that cannot begin in pure noise: from one trained timestep less, and evenly to 0,
        which is not visited (DPM-Solver). Raises SettingsError where sigmas are to be stretched.
        """
        if self.terminal is not None:
            raise SettingsError(
                "the scheduler configuration has a shift_terminal, which DPM-Solver does not know; use euler, heun or "
                "unipc"
            )
        return self._shifted(1.0 - np.linspace(1, 1 / self.train_timesteps, steps + 1))[:0:-1]

    def _shifted(self, sigmas: Floats) -> Floats:
        if self.shift is None:
            raise SettingsError("the noise levels of this model depend on the image size: give one, by sized()")
        return np.asarray(self.shift * sigmas / (1 + (self.shift - 1) * sigmas), np.float64)

    def _stretched(self, sigmas: Floats) -> Floats:
        if self.terminal is None:
            return sigmas
        if sigmas[-1] == 1:
            raise SettingsError("1 step cannot both begin in noise and end at shift_terminal; use more steps")
        return np.asarray(1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - self.terminal)), np.float64)
