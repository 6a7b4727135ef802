"""The noise schedule: diffusers' numbers, and clear words for what it cannot honour."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers import schedulers

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


def test_karras_levels_equal_diffusers() -> None:
    for beta_schedule in BETA_SCHEDULES:
        config = {**SD15, "beta_schedule": beta_schedule}
        scheduler = schedulers.DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)
        schedule = NoiseSchedule(beta_schedule=beta_schedule)
        for steps in range(1, 101):
            scheduler.set_timesteps(steps)
            timesteps, sigmas = schedule.karras(steps)
            np.testing.assert_array_equal(timesteps, scheduler.timesteps.numpy())
            np.testing.assert_allclose(sigmas, scheduler.sigmas.numpy()[:-1], rtol=1e-6)


def test_trailing_spacing_gives_as_many_steps_as_asked() -> None:
    """diffusers gives one more for 61 steps and 58 other counts, the last at timestep -1."""
    for steps in range(1, 1001):
        timesteps = NoiseSchedule().timesteps(steps, "trailing")
        assert len(timesteps) == steps
        assert timesteps[-1] >= 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("thresholding", True),
        ("clip_sample", True),
        ("trained_betas", [0.1, 0.2]),
        ("prediction_type", "sample"),
        ("prediction_type", "flow_prediction"),
        ("beta_schedule", "sigmoid"),
        ("use_flow_sigmas", True),
        ("timestep_type", "continuous"),
        ("variance_type", "learned_range"),
        ("timestep_spacing", "logarithmic"),
        ("beta_start", 0),
        ("beta_end", 1.5),
        ("beta_end", "0.012"),
        ("beta_start", 1e-12),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", 1000.0),
        ("steps_offset", -1),
        ("rescale_betas_zero_snr", True),
    ],
)
def test_a_schedule_we_cannot_honour_is_refused(key: str, value: Any) -> None:
    with pytest.raises(SettingsError):
        NoiseSchedule.from_config({**SD15, key: value})


def test_what_diffusers_would_assume_counts() -> None:
    silent = {key: value for key, value in SD15.items() if key != "clip_sample"}
    NoiseSchedule.from_config(silent)
    with pytest.raises(SettingsError, match="clip_sample = True"):
        NoiseSchedule.from_config({**silent, "_class_name": "DDIMScheduler"})
    with pytest.raises(SettingsError, match="lacks beta_start"):
        NoiseSchedule.from_config({"beta_end": 0.012, "beta_schedule": "linear"})
