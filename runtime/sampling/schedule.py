"""The noise schedule a model was trained with, and the timesteps a sampler visits: of diffusion, and of flow matching.

The forward process of diffusion is variance preserving: ``x_t = alpha_t x_0 + sigma_t eps`` with
``alpha_t² = alpha_bar_t`` and ``sigma_t² = 1 - alpha_bar_t`` (DDPM, arXiv 2006.11239). What is *data* here
(betas, alpha_bar, noise levels) is rounded to float32, as the training code and diffusers have it: the first
betas are 1e-3, so that rounding moves the smallest noise levels by 1e-4. What is *computed* from it is
float64. Flow matching goes straight from noise to data instead, ``x_t = (1 - sigma) x_0 + sigma eps``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Final, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt

from dnp.engine.errors import SettingsError

Float32s = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
FLOW_PREDICTION: Final = "flow_prediction"
SPACINGS = ("leading", "linspace", "trailing")
KARRAS_RHO = 7.0
BETA_SHAPE = 0.6
"""Both parameters of the beta distribution by which noise levels are spaced, of arXiv 2407.12173."""
TERMINAL_ALPHA_BAR = 2.0**-24
"""Stands for zero where a noise level is a ratio sigma/alpha, which zero terminal SNR makes infinite."""


class Level(NamedTuple):
    """One noise level, ``x = alpha x_0 + sigma eps``: ``alpha² + sigma² = 1`` in diffusion, ``alpha + sigma = 1`` in a
    flow.
    """

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

    @classmethod
    def of_flow(cls, sigma: float) -> Level:
        """The level of a flow: as far as ``sigma`` from data to noise."""
        return cls(1.0 - sigma, sigma)


CLEAN = Level(1.0, 0.0)


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
        _check_train_timesteps(self.train_timesteps)
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
        if not all(_is_number(value) and abs(value) <= 10 for value in self.mu):
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
        _check_train_timesteps(self.train_timesteps)
        if not (self.shift is None and self.dynamic) and not (_is_number(self.shift) and 0 < self.shift <= 1e6):
            raise SettingsError(f"shift is {self.shift!r}; give a number above 0, such as 3.0")
        if self.terminal is not None and not (_is_number(self.terminal) and 0 < self.terminal < 1):
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


def spaced(kind: str, steps: int, low: float, high: float) -> Floats:
    """``steps`` noise levels from ``high`` to ``low``, [steps]: values of sigma/alpha, or a flow's sigmas.

    ``kind``: ``karras``, even in the seventh root (arXiv 2206.00364, equation 5); ``exponential`` and ``lu``, even
    in the logarithm (2206.00927); ``beta``, quantiles of a beta distribution (2407.12173).
    """
    ramp = np.linspace(0, 1, steps)
    if kind == "karras":
        first, last = high ** (1 / KARRAS_RHO), low ** (1 / KARRAS_RHO)
        return np.asarray((first + ramp * (last - first)) ** KARRAS_RHO, np.float64)
    if kind == "beta":
        return low + _beta_quantiles(1 - ramp) * (high - low)
    return np.asarray(np.exp(np.linspace(math.log(high), math.log(low), steps)), np.float64)


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """SettingsError unless ``value`` is one of ``known``; the message names the nearest and all of them."""
    if value in known:
        return
    near = get_close_matches(str(value).lower(), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise SettingsError(f"{name} {value!r} is unknown; {hint}known: {', '.join(known)}")


def _check_train_timesteps(count: object) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 2 <= count <= 100_000:
        raise SettingsError(f"train_timesteps is {count!r}; give a whole number from 2 to 100000")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_beta(value: object) -> bool:
    return _is_number(value) and 0 < value < 1


def _beta_quantiles(shares: Floats) -> Floats:
    """The quantiles [n] of the symmetric beta distribution with both parameters BETA_SHAPE.

    By bisection of its power series on the lower half, where that converges to the last bit.
    """
    a, lower = BETA_SHAPE, np.minimum(shares, 1 - shares)
    n = np.arange(1, 64)
    terms = np.concatenate([[1.0], np.cumprod((n - a) / n)]) / (a + np.arange(64))
    scale = math.gamma(2 * a) / math.gamma(a) ** 2
    low, high = np.zeros_like(lower), np.full_like(lower, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = scale * middle**a * np.polynomial.polynomial.polyval(middle, terms) < lower
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.asarray(np.where(shares <= 0.5, low, 1 - low), np.float64)


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
