"""The noise schedule: diffusers' numbers, and clear words for what it cannot honour."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers import schedulers
from scipy import stats

from dnp.engine.errors import SettingsError
from dnp.runtime.sampling.schedule import BETA_SCHEDULES, NoiseSchedule

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
        ("prediction_type", "sample"),
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
    np.testing.assert_allclose(NoiseSchedule().spaced("beta", steps, 0.03, 14.63), expected, rtol=1e-12, atol=1e-12)
