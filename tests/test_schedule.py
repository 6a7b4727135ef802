"""The noise schedule: diffusers' numbers, and clear words for what it cannot honour."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers import schedulers
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from scipy import stats

from dnp.engine.errors import SettingsError
from dnp.runtime.sampling.flow import DynamicShift, FlowSchedule
from dnp.runtime.sampling.levels import spaced
from dnp.runtime.sampling.schedule import BETA_SCHEDULES, NoiseSchedule, read_schedule

# diffusers mixes numpy and torch in a way that numpy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

SD15 = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("train_timesteps", [50, 777, 1000])
def test_alphas_cumprod_are_diffusers_bit_for_bit(beta_schedule: str, train_timesteps: int) -> None:
    config = {**SD15, "beta_schedule": beta_schedule, "num_train_timesteps": train_timesteps}
    theirs = schedulers.DDIMScheduler.from_config(config).alphas_cumprod.numpy()
    np.testing.assert_array_equal(NoiseSchedule.from_config(config).alphas_cumprod, theirs)


def test_trailing_spacing_gives_as_many_steps_as_asked() -> None:
    """diffusers gives one more for 61 steps and 58 other counts, the last at timestep -1."""
    for steps in range(1, 1001):
        timesteps = NoiseSchedule().timesteps(steps, "trailing")
        assert len(timesteps) == steps
        assert timesteps[-1] >= 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trained_betas", [0.1, 0.2]),
        ("trained_betas", 0.1),
        ("trained_betas", [2.0] * 1000),
        ("prediction_type", "original"),
        ("prediction_type", "flow_prediction"),
        ("beta_schedule", "sigmoid"),
        ("beta_start", 0),
        ("beta_end", 1.5),
        ("beta_end", "0.012"),
        ("beta_start", 1e-12),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", 1000.0),
        ("rescale_betas_zero_snr", True),
    ],
)
def test_a_schedule_we_cannot_honour_is_refused(key: str, value: Any) -> None:
    with pytest.raises(SettingsError):
        NoiseSchedule.from_config({**SD15, key: value})


def test_a_schedule_without_betas_is_refused() -> None:
    with pytest.raises(SettingsError, match="lacks beta_start"):
        NoiseSchedule.from_config({"beta_end": 0.012, "beta_schedule": "linear"})


def test_trained_betas_are_diffusers_bit_for_bit() -> None:
    config = {**SD15, "trained_betas": np.geomspace(1e-4, 0.03, 1000).tolist()}
    theirs = schedulers.DDIMScheduler.from_config(config).alphas_cumprod.numpy()
    np.testing.assert_array_equal(NoiseSchedule.from_config(config).alphas_cumprod, theirs)


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 999])
def test_beta_spacing_equals_scipy(steps: int) -> None:
    expected = 0.03 + 14.6 * stats.beta.ppf(1 - np.linspace(0, 1, steps), 0.6, 0.6)
    np.testing.assert_allclose(spaced("beta", steps, 0.03, 14.63), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        {**SD15, "use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
        {"prediction_type": "flow_prediction", "shift": 3.0},
    ],
)
def test_a_flow_schedule_is_told_by_its_configuration(config: dict[str, Any]) -> None:
    schedule = read_schedule(config)
    assert isinstance(schedule, FlowSchedule)
    assert (schedule.shift, schedule.prediction_type) == (3.0, "flow_prediction")
    assert isinstance(read_schedule(SD15), NoiseSchedule)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("size", [(32, 32), (128, 128), (96, 200), (160, 160)])
def test_a_dynamic_shift_is_that_of_the_flux_pipeline(kind: str, size: tuple[int, int]) -> None:
    config = {"use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 1.2, "time_shift_type": kind}
    schedule = FlowSchedule.from_config(config)
    mu = calculate_shift(size[0] // 2 * (size[1] // 2), 256, 4096, 0.4, 1.2)
    assert schedule.sized(*size).shift == pytest.approx(np.exp(mu) if kind == "exponential" else mu, rel=1e-12)
    assert schedule.sized(*size).sized(64, 64) == schedule.sized(64, 64)


def test_the_size_changes_nothing_where_the_shift_is_fixed() -> None:
    for schedule in (NoiseSchedule(), FlowSchedule(shift=3.0)):
        assert schedule.sized(64, 128) is schedule


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"shift": 0}, "shift is 0; give a number above 0"),
        ({"shift": "3"}, "shift is '3'"),
        ({"shift": float("nan")}, "shift is nan"),
        ({"shift": 3.0, "flow_shift": 5.0}, "shift is 3.0 and flow_shift 5.0; give one"),
        ({"shift_terminal": 1.0}, "shift_terminal is 1.0; give a number between 0 and 1"),
        ({"num_train_timesteps": 1}, "train_timesteps is 1"),
        ({"prediction_type": "epsilon", "use_flow_sigmas": True}, "prediction_type is 'epsilon'"),
        ({"use_dynamic_shifting": True, "time_shift_type": "cubic"}, "time_shift_type 'cubic' is unknown"),
        ({"use_dynamic_shifting": True, "base_image_seq_len": 4096}, "give two whole numbers, the larger last"),
        ({"use_dynamic_shifting": True, "max_shift": "1.15"}, "give numbers from -10 to 10"),
    ],
)
def test_a_flow_we_cannot_honour_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        FlowSchedule.from_config(config)


def test_a_linear_shift_that_is_not_above_0_is_refused() -> None:
    schedule = FlowSchedule(shift=None, dynamic=DynamicShift(mu=(-1.0, 1.0), kind="linear"))
    with pytest.raises(SettingsError, match="the shift for latents of 32x32 is -1, not above 0"):
        schedule.sized(32, 32)
