"""The settings of samplers: what each key of diffusers' scheduler configurations does here.

A sampler gives the results of one class of diffusers, made as ``Class.from_config(configuration)`` makes it: keys that
the class knows carry over from the configuration, whichever class wrote it, and the others have the class's defaults.
Every parameter of every class is below. It is honoured, or has to have a certain value, or changes nothing; what
belongs to the noise schedule instead is in ``SCHEDULE_KEYS`` and ``FLOW_SCHEDULE_KEYS``.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dnp.engine.bundle.schema import shown
from dnp.engine.errors import SettingsError
from dnp.runtime.sampling.schedule import SPACINGS


class Setting(NamedTuple):
    """A key that changes numbers.

    Attributes:
        default: the class's own, where the configuration does not say.
        values: what can be honoured.
        reason: why nothing else can.
        instead: values of other classes, and what this class takes them for.
    """

    default: Any
    values: Container[Any]
    reason: str = ""
    instead: Mapping[str, str] = {}


@dataclass(frozen=True)
class _Numbers:
    """The numbers of a kind from ``low`` to ``high``."""

    kind: type
    low: float
    high: float = math.inf

    def __contains__(self, value: object) -> bool:
        numbers = int | float if self.kind is float else int
        return isinstance(value, numbers) and not isinstance(value, bool) and self.low <= value <= self.high

    def __str__(self) -> str:
        whole = "a number" if self.kind is float else "a whole number"
        return f"{whole} from {self.low:g}" + (f" to {self.high:g}" if self.high < math.inf else "")


@dataclass(frozen=True)
class _OrNone:
    """Nothing, or one of ``values``."""

    values: Container[Any]

    def __contains__(self, value: object) -> bool:
        return value is None or value in self.values

    def __str__(self) -> str:
        return f"null or {self.values}"


class _Steps:
    """Lists of step indices."""

    def __contains__(self, value: object) -> bool:
        step = _Numbers(int, 0)
        return isinstance(value, list | tuple) and all(index in step for index in value)

    def __str__(self) -> str:
        return "a list of whole numbers"


Keys = Mapping[str, "Setting | str"]
"""By key: what it may be, or why it changes nothing."""

CONVERSIONS: Mapping[str, str] = {
    "use_karras_sigmas": "karras",
    "use_lu_lambdas": "lu",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
}
"""The keys that space the noise levels anew: see ``schedule.spaced``."""

SCHEDULE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
"""The keys that are the model's, whichever sampler runs: see NoiseSchedule."""

FLOW_SCHEDULE_KEYS = (
    "num_train_timesteps",
    "prediction_type",
    "use_flow_sigmas",
    "shift",
    "flow_shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "time_shift_type",
    "shift_terminal",
)
"""The keys that are a flow matching model's, whichever sampler runs: see FlowSchedule."""

_OFF = (False, None)  # a configuration may say null for a switch
_LINEAR = "is not linear in the latents, a sampler table is"
_FLOW = "the noise levels of flow matching are not those of betas"
_UNUSED_FLOW = "part of flow matching, which is refused"
_ORDERS = Setting(2, (1, 2, 3), "a table's state holds no more latents than order 3 needs")


def _switch(default: bool) -> Setting:
    return Setting(default, (True, False, None))


def _spacing(default: str) -> Keys:
    return {"timestep_spacing": Setting(default, SPACINGS), "steps_offset": Setting(0, _Numbers(int, 0, 100_000))}


# The two oldest classes clip by default. StableDiffusionPipeline turns that off, whichever way it is turned on, so
# what a configuration leaves out is off here.
_CLIPPING: Keys = {
    "clip_sample": Setting(False, _OFF, f"clipping x_0 {_LINEAR}"),
    "clip_sample_range": "part of clipping, which is refused",
}
_THRESHOLDING: Keys = {
    "thresholding": Setting(False, _OFF, f"dynamic thresholding {_LINEAR}"),
    "dynamic_thresholding_ratio": "part of thresholding, which is refused",
    "sample_max_value": "part of thresholding, which is refused",
}
_LEVELS: Keys = {key: _switch(False) for key in CONVERSIONS if key != "use_lu_lambdas"}
_NOT_FLOW: Keys = {
    "use_flow_sigmas": Setting(False, _OFF, _FLOW),
    "use_dynamic_shifting": Setting(False, _OFF, _FLOW),
    "flow_shift": _UNUSED_FLOW,
    "time_shift_type": _UNUSED_FLOW,
}
_FINAL = Setting("zero", ("zero", "sigma_min"))
_TWICE_THE_CHANNELS = "a network that predicts variances has twice the channels"

SCHEDULERS: Mapping[str, Keys] = {
    "DDIMScheduler": {
        **_spacing("leading"),
        **_CLIPPING,
        **_THRESHOLDING,
        "set_alpha_to_one": _switch(True),
    },
    "DDPMScheduler": {
        **_spacing("leading"),
        **_CLIPPING,
        **_THRESHOLDING,
        "variance_type": Setting(
            "fixed_small",
            ("fixed_small", "fixed_small_log", "fixed_large"),
            f"{_TWICE_THE_CHANNELS}, and fixed_large_log gives no number",
        ),
    },
    "DEISMultistepScheduler": {
        **_spacing("linspace"),
        **_THRESHOLDING,
        **_LEVELS,
        **_NOT_FLOW,
        "solver_order": _ORDERS,
        "algorithm_type": Setting("deis", ("deis",), "", {"dpmsolver": "deis", "dpmsolver++": "deis"}),
        "solver_type": Setting("logrho", ("logrho",), "", dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho")),
        "lower_order_final": _switch(True),
    },
    "DPMSolverMultistepScheduler": {
        **_spacing("linspace"),
        **_THRESHOLDING,
        **_LEVELS,
        **_NOT_FLOW,
        "use_lu_lambdas": _switch(False),
        "solver_order": _ORDERS,
        "algorithm_type": Setting(
            "dpmsolver++",
            ("dpmsolver++", "sde-dpmsolver++"),
            "the first DPM-Solver is not among the samplers",
            {"deis": "dpmsolver++"},
        ),
        "solver_type": Setting(
            "midpoint", ("midpoint", "heun"), "", dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint")
        ),
        "lower_order_final": _switch(True),
        "euler_at_final": _switch(False),
        "final_sigmas_type": _FINAL,
        "lambda_min_clipped": Setting(-math.inf, (-math.inf, None), "timesteps reach up to the last one trained"),
        "variance_type": Setting(
            None,
            (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
            _TWICE_THE_CHANNELS,
        ),
    },
    "EulerDiscreteScheduler": {
        **_spacing("linspace"),
        **_LEVELS,
        "interpolation_type": Setting("linear", ("linear", "log_linear")),
        "sigma_min": Setting(None, _OrNone(_Numbers(float, 1e-6, 1e6))),
        "sigma_max": Setting(None, _OrNone(_Numbers(float, 1e-6, 1e6))),
        "timestep_type": Setting(
            "discrete", ("discrete",), "EDM models, with a continuous timestep, are not supported"
        ),
        "final_sigmas_type": _FINAL,
    },
    "EulerAncestralDiscreteScheduler": {**_spacing("linspace")},
    "HeunDiscreteScheduler": {**_spacing("linspace"), **_CLIPPING, **_LEVELS},
    "LCMScheduler": {
        **_CLIPPING,
        **_THRESHOLDING,
        "original_inference_steps": Setting(50, _Numbers(int, 1, 100_000)),
        "timestep_scaling": Setting(10.0, _Numbers(float, 0.0)),
        "timestep_spacing": "the timesteps are those of the distillation",
        "steps_offset": "the timesteps are those of the distillation",
        "set_alpha_to_one": "the last step ends at x_0",
    },
    "LMSDiscreteScheduler": {**_spacing("linspace"), **_LEVELS},
    "PNDMScheduler": {
        **_spacing("leading"),
        "skip_prk_steps": Setting(
            False,
            (True,),
            "the Runge-Kutta steps at the start need to keep five latents, a table's state has four; set it to true, "
            "as Stable Diffusion is published",
        ),
        "set_alpha_to_one": _switch(False),
    },
    "UniPCMultistepScheduler": {
        **_spacing("linspace"),
        **_THRESHOLDING,
        **_LEVELS,
        **_NOT_FLOW,
        "solver_order": _ORDERS,
        "predict_x0": Setting(True, (True,), "only the form that predicts x_0 is known"),
        "solver_type": Setting("bh2", ("bh1", "bh2"), "", dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")),
        "lower_order_final": _switch(True),
        "disable_corrector": Setting([], _Steps()),
        "solver_p": Setting(None, (None,), "a predictor of another kind is not supported"),
        "final_sigmas_type": _FINAL,
        "sigma_min": Setting(None, (None,), "the noise levels follow from the betas"),
        "sigma_max": Setting(None, (None,), "the noise levels follow from the betas"),
        "shift_terminal": Setting(None, (None,), _FLOW),
    },
}
"""By class: all of its parameters but ``SCHEDULE_KEYS``."""

_UNUSED_BETAS: Keys = dict.fromkeys(
    ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    "the noise levels of flow matching follow from no betas",
)
_FLOW_SOLVER: Keys = {
    **_UNUSED_BETAS,
    **_THRESHOLDING,
    **{
        key: Setting(False, _OFF, "this class spaces noise levels anew by betas, which a flow has not; use euler")
        for key in _LEVELS
    },
    "timestep_spacing": "the timesteps follow from the noise levels",
    "steps_offset": "the timesteps follow from the noise levels",
    "final_sigmas_type": Setting("zero", ("zero",), "the last step of a flow ends without noise"),
}


def _without_flow(scheduler: str) -> Keys:
    return {key: setting for key, setting in SCHEDULERS[scheduler].items() if key not in FLOW_SCHEDULE_KEYS}


FLOW_SCHEDULERS: Mapping[str, Keys] = {
    "DPMSolverMultistepScheduler": {
        **_without_flow("DPMSolverMultistepScheduler"),
        **_FLOW_SOLVER,
        "use_lu_lambdas": Setting(False, _OFF, "lambdas are spaced anew by betas, which a flow has not"),
    },
    "FlowMatchEulerDiscreteScheduler": {
        **_LEVELS,
        "invert_sigmas": Setting(False, _OFF, "a sampler goes from noise to data"),
        "stochastic_sampling": _switch(False),
    },
    "FlowMatchHeunDiscreteScheduler": {},
    "UniPCMultistepScheduler": {
        **_without_flow("UniPCMultistepScheduler"),
        **_FLOW_SOLVER,
        "sigma_min": "part of levels spaced anew, which are refused",
        "sigma_max": "part of levels spaced anew, which are refused",
    },
}
"""The same for flow matching models: by class, all of its parameters but ``FLOW_SCHEDULE_KEYS``."""

KEYS = frozenset((*SCHEDULE_KEYS, *FLOW_SCHEDULE_KEYS)).union(
    key
    for keys in (*SCHEDULERS.values(), *FLOW_SCHEDULERS.values())
    for key, setting in keys.items()
    if isinstance(setting, Setting)
)
"""All keys of a configuration that count for some sampler."""


def read_settings(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a class that knows ``keys``, under the configuration ``config``, checked; others are left out.

    Raises SettingsError for a value that cannot be honoured, with the key and what can be.
    """
    settings = {}
    for key, setting in keys.items():
        if isinstance(setting, str):
            continue
        value = config.get(key, setting.default)
        if value is None and None not in setting.values:
            value = setting.default
        if isinstance(value, str):
            value = setting.instead.get(value, value)
        if value not in setting.values:
            because = f"; {setting.reason}" if setting.reason else ""
            raise SettingsError(
                f"the scheduler configuration has {key} = {shown(value)}, only {_listed(setting.values)} can be "
                f"honoured{because}"
            )
        settings[key] = value
    if len(chosen := [key for key in CONVERSIONS if settings.get(key)]) > 1:
        raise SettingsError(f"the scheduler configuration has both {chosen[0]} and {chosen[1]}; only one can be true")
    return settings


def _listed(values: Container[Any]) -> str:
    return " or ".join(map(repr, values)) if isinstance(values, tuple) else str(values)
