"""Sampler tables against diffusers' own schedulers: the same latents from the same noise."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import schedulers
from hypothesis import given
from hypothesis import strategies as st

from dnp.engine.bundle import columns
from dnp.engine.bundle.columns import ADVANCE, CLEAN_OUTPUT, CLEAN_STATE, DRAW, EMBEDDED, NEGATIVE_OUTPUT, ROW, SLOTS
from dnp.engine.bundle.columns import GUIDANCE as W
from dnp.engine.bundle.columns import INPUT as E
from dnp.engine.bundle.columns import NOISE as C
from dnp.engine.bundle.columns import OUTPUT as B
from dnp.engine.bundle.columns import STATE as A
from dnp.engine.bundle.columns import TIMESTEP as T
from dnp.engine.errors import SettingsError
from dnp.runtime.sampling.noise import TorchNoise
from dnp.runtime.sampling.samplers import METHODS, SamplerTable, identity_row, sampler_names, sampler_of, sampler_table
from dnp.runtime.sampling.schedule import BETA_SCHEDULES, PREDICTION_TYPES, SPACINGS, NoiseSchedule
from dnp.runtime.sampling.settings import SCHEDULE_KEYS, SCHEDULERS, Setting

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
REFERENCE: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
OWN_TIMESTEPS = ("dpmpp_2m_karras", "lcm")
ZERO_SNR = ("ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_2m_sde", "euler", "euler_a", "lcm", "unipc")
TOLERANCE = 1e-4
SHAPE = (4, 4, 4)
CASES = [
    (sampler, spacing)
    for sampler in REFERENCE
    for spacing in (None, *SPACINGS)
    if spacing is None or sampler not in OWN_TIMESTEPS
]

Array = np.ndarray
Network = Callable[[Array, float, int], Array]


def reference(sampler: str, **config: Any) -> Any:
    name, options = REFERENCE[sampler]
    config = {key: value for key, value in config.items() if value is not None}
    return getattr(schedulers, name).from_config({**SD15, **config}, **options)


def make_network(seed: int = 0) -> Network:
    """A small stand-in for the UNet: float64 inside, nonlinear in x, t and the context (a number here)."""
    rng = np.random.default_rng(seed)
    size = math.prod(SHAPE)
    mix, back = rng.normal(size=(2, size, size)) / math.sqrt(size)
    contexts, phases = 0.3 * rng.normal(size=(4, size)), rng.normal(size=size)

    def network(x: Array, t: float, context: int) -> Array:
        hidden = mix @ x.astype(np.float64).ravel() + contexts[context] + np.sin(t / 100 + phases)
        return (back @ np.tanh(hidden) + 0.3 * np.cos(t / 300)).reshape(SHAPE).astype(np.float32)

    return network


def walk_table(
    table: SamplerTable, network: Network, base: int, prompt: int, seed: int
) -> Iterator[tuple[Array, Array]]:
    """The step graph in numpy, float32, as ``columns.py`` has it: the latents and clean latents after each call.

    The network computes the roles that the table names, and nothing else. Three calls too many change nothing.
    """
    generator = TorchNoise(seed)
    state = np.zeros((SLOTS, *SHAPE), np.float32)
    state[0] = generator.randn(SHAPE) * np.float32(table.init_noise_sigma)
    noise = [generator.randn(SHAPE) for _ in table.noise_steps] or [np.zeros(SHAPE, np.float32)]
    index = 0
    for number in range(table.calls + 3):
        row = table.rows[index]
        x = np.tensordot(row[E], state, 1)
        roles = table.roles[number] if number < table.calls else (0, 1)
        outputs = {role: network(x, row[T], (base, prompt)[role]) for role in roles}
        negative, prompted = (outputs.get(role, outputs[roles[0]]) for role in (0, 1))
        o = negative + row[W] * (prompted - negative)
        clean = np.tensordot(row[CLEAN_STATE], state, 1) + row[CLEAN_OUTPUT] * o
        state = (
            np.tensordot(row[A].reshape(SLOTS, SLOTS), state, 1)
            + np.multiply.outer(row[B], o)
            + np.multiply.outer(row[NEGATIVE_OUTPUT], negative)
            + np.multiply.outer(row[C], noise[int(row[DRAW])])
        )
        assert state.dtype == clean.dtype == np.float32
        index += int(row[ADVANCE])
        yield state[0], clean
    assert index == table.calls


def run_table(table: SamplerTable, network: Network, base: int, prompt: int, seed: int) -> Array:
    """The latents that the step graph ends with."""
    return list(walk_table(table, network, base, prompt, seed))[-1][0]


def walk_diffusers(
    scheduler: Any,
    steps: int,
    network: Network,
    uncond: int,
    text: int,
    guidance_scale: float | Sequence[float],
    seed: int,
    eta: float = 0.0,
) -> Iterator[Any]:
    """The loop of StableDiffusionPipeline.__call__, with ``network`` for the UNet: what each step returns."""
    generator = torch.Generator("cpu").manual_seed(seed)
    scheduler.set_timesteps(steps)
    latents = torch.randn((1, *SHAPE), generator=generator) * scheduler.init_noise_sigma
    known = inspect.signature(scheduler.step).parameters
    extra = {key: value for key, value in {"eta": eta, "generator": generator}.items() if key in known}
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.scale_model_input(torch.cat([latents] * 2), t).numpy()
        noise_uncond, noise_text = (
            torch.from_numpy(network(x[half], t.item(), context))[None] for half, context in ((0, uncond), (1, text))
        )
        scale = guidance_scale if isinstance(guidance_scale, int | float) else guidance_scale[i]
        noise_pred = noise_uncond + scale * (noise_text - noise_uncond)
        output = scheduler.step(noise_pred, t, latents, **extra)
        latents = output.prev_sample
        yield output


def run_diffusers(*args: Any, **options: Any) -> Array:
    """The latents that the loop ends with."""
    return list(walk_diffusers(*args, **options))[-1].prev_sample[0].numpy()


def predicting_noise(network: Network) -> Network:
    """The same network for schedulers that know of no x_0: from the x_0 that it predicts, the noise."""
    alpha_bar = schedulers.DDIMScheduler.from_config(SD15).alphas_cumprod.double().numpy()
    ratios = ((1 - alpha_bar) / alpha_bar) ** 0.5

    def noise(x: Array, t: float, context: int) -> Array:
        ratio = float(np.interp(t, np.arange(1000), ratios))
        alpha = 1 / math.hypot(1, ratio)
        return ((x - alpha * network(x, t, context)) / (ratio * alpha)).astype(np.float32)

    return noise


def relative_error(actual: Array, expected: Array) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("sampler", "spacing"), CASES)
def test_final_latents_equal_diffusers(sampler: str, spacing: str | None, prediction_type: str) -> None:
    config = {"prediction_type": prediction_type, "timestep_spacing": spacing}
    schedule = NoiseSchedule.from_config({**SD15, "prediction_type": prediction_type})
    empty, prompt, other = range(3)
    network = judged = make_network()
    if prediction_type == "sample" and sampler == "pndm":
        return  # refused, as diffusers does: see below
    if prediction_type == "sample" and sampler == "euler_a":  # diffusers raises NotImplementedError
        config["prediction_type"], judged = "epsilon", predicting_noise(network)
    for steps in (1, 2, 3, 20, 50):
        table = sampler_table(schedule, sampler, steps, 7.5, spacing=spacing)
        ours = run_table(table, network, other, prompt, seed=steps)
        theirs = run_diffusers(reference(sampler, **config), steps, judged, other, prompt, 7.5, seed=steps)
        assert relative_error(ours, theirs) <= TOLERANCE, f"{steps} steps, CFG"
        if steps in (3, 20):
            s = 4.0
            table = sampler_table(schedule, sampler, steps, -s, spacing=spacing)
            ours = run_table(table, network, empty, prompt, seed=steps)
            theirs = run_diffusers(reference(sampler, **config), steps, judged, prompt, empty, s + 1, seed=steps)
            assert relative_error(ours, theirs) <= TOLERANCE, f"{steps} steps, DNS"


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_fresh_noise_equals_diffusers(eta: float, prediction_type: str) -> None:
    schedule = NoiseSchedule(prediction_type=prediction_type)
    network = make_network()
    for steps in (1, 3, 20):
        table = sampler_table(schedule, "ddim", steps, 7.5, eta=eta)
        scheduler = reference("ddim", prediction_type=prediction_type)
        theirs = run_diffusers(scheduler, steps, network, 0, 1, 7.5, seed=3, eta=eta)
        assert relative_error(run_table(table, network, 0, 1, seed=3), theirs) <= TOLERANCE


@pytest.mark.parametrize("sampler", ZERO_SNR)
def test_zero_terminal_snr_equals_diffusers(sampler: str) -> None:
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    spacing = None if sampler in OWN_TIMESTEPS else "trailing"
    table = sampler_table(NoiseSchedule.from_config({**SD15, **config}), sampler, 20, 7.5, spacing=spacing)
    network = make_network()
    scheduler = reference(sampler, timestep_spacing=spacing, **config)
    theirs = run_diffusers(scheduler, 20, network, 0, 1, 7.5, seed=3)
    # diffusers scales the betas in float32 with cancellation, and starts from sigma 4096.
    assert relative_error(run_table(table, network, 0, 1, seed=3), theirs) <= 5 * TOLERANCE


# What changes each class's numbers, one value at a time and some together, each with what it needs to matter.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "ddim": [{"steps_offset": 3}, {"set_alpha_to_one": True}],
    "ddpm": [{"variance_type": kind} for kind in ("fixed_small_log", "fixed_large")]
    + [{"variance_type": "fixed_large", "timestep_spacing": "linspace"}],
    "deis": [{"solver_order": order, "lower_order_final": lower} for order in (1, 2, 3) for lower in (True, False)]
    + [{"algorithm_type": "dpmsolver++", "solver_type": "bh2"}],
    "dpmpp_2m": [
        {"solver_order": order, "solver_type": kind, "final_sigmas_type": final, "lower_order_final": lower}
        for order in (1, 2, 3)
        for kind in ("midpoint", "heun", "logrho")
        for final in ("zero", "sigma_min")
        for lower in (True, False)
    ]
    + [{"euler_at_final": True, "final_sigmas_type": "sigma_min"}, {"use_lu_lambdas": True}],
    "dpmpp_2m_sde": [
        {"solver_order": order, "solver_type": kind, "final_sigmas_type": final}
        for order in (1, 2, 3)
        for kind in ("midpoint", "heun")
        for final in ("zero", "sigma_min")
    ],
    "euler": [
        {"final_sigmas_type": "sigma_min"},
        {"interpolation_type": "log_linear"},
        {"interpolation_type": "log_linear", "use_karras_sigmas": True, "timestep_spacing": "leading"},
        {"sigma_min": 0.1, "sigma_max": 10.0, "use_karras_sigmas": True},
        {"sigma_min": 0.1, "sigma_max": 10.0},
    ],
    "lcm": [{"original_inference_steps": 100}, {"timestep_scaling": 3.0}],
    "pndm": [{"set_alpha_to_one": True}, {"steps_offset": 0}],
    "unipc": [
        {"solver_order": order, "solver_type": kind, "final_sigmas_type": "sigma_min", "lower_order_final": lower}
        for order in (1, 2, 3)
        for kind in ("bh1", "bh2", "midpoint")
        for lower in (True, False)
    ]
    + [{"solver_order": 3}, {"disable_corrector": [0, 2, 18]}, {"solver_order": 3, "disable_corrector": [1, 3]}],
}
SPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
SETTINGS_CASES = [(sampler, settings) for sampler, each in SETTINGS.items() for settings in each] + [
    (sampler, {key: True, "timestep_spacing": spacing})
    for sampler in ("deis", "dpmpp_2m", "dpmpp_2m_sde", "euler", "heun", "lms", "unipc")
    for key in SPACED
    for spacing in (None, "leading")
]
SETTINGS_CASES += [
    (sampler, {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"})
    for sampler in ("dpmpp_2m", "dpmpp_2m_sde", "unipc")
]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("sampler", "settings"), SETTINGS_CASES)
def test_every_setting_is_honoured(sampler: str, settings: dict[str, Any], prediction_type: str) -> None:
    config = {**SD15, **{key: value for key, value in settings.items() if value is not None}}
    config["prediction_type"] = prediction_type
    if prediction_type == "sample" and sampler == "pndm":
        return  # refused, as diffusers does: see below
    kind, options = REFERENCE[sampler]
    network = make_network()
    for steps in (4, 20):
        scheduler = getattr(schedulers, kind).from_config(config, **options)
        theirs = run_diffusers(scheduler, steps, network, 0, 1, 2.0, seed=steps)
        table = sampler_table(NoiseSchedule.from_config(config), sampler, steps, 2.0)
        np.testing.assert_allclose(table.timesteps, scheduler.timesteps.numpy(), rtol=1e-5, atol=1e-2)
        # DEIS cancels: diffusers in float32 is 1.15e-4 from itself in float64, from which a table is 2e-6.
        tolerance = TOLERANCE * (2 if (sampler, prediction_type) == ("deis", "sample") else 1)
        assert relative_error(run_table(table, network, 0, 1, seed=steps), theirs) <= tolerance, steps


def parameters_of(scheduler: str) -> dict[str, Any]:
    parameters = inspect.signature(getattr(schedulers, scheduler).__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_parameter_of_every_class_is_known_with_its_default(scheduler: str) -> None:
    theirs = parameters_of(scheduler)
    ours = SCHEDULERS[scheduler]
    assert set(theirs) - set(SCHEDULE_KEYS) == set(ours)
    defaults = {key: setting.default for key, setting in ours.items() if isinstance(setting, Setting)}
    # StableDiffusionPipeline turns clipping off, whatever the class's default.
    expected = {key: theirs[key] for key in defaults} | ({"clip_sample": False} if "clip_sample" in ours else {})
    assert defaults == expected


def test_the_classes_are_those_of_the_samplers() -> None:
    assert {name for name, _ in REFERENCE.values()} == set(SCHEDULERS)
    assert set(REFERENCE) == set(sampler_names())


@pytest.mark.parametrize(
    ("sampler", "key", "value"),
    [
        ("ddim", "thresholding", True),
        ("ddim", "clip_sample", True),
        ("ddim", "timestep_spacing", "logarithmic"),
        ("ddim", "steps_offset", -1),
        ("ddpm", "variance_type", "learned_range"),
        ("dpmpp_2m", "lambda_min_clipped", -5.1),
        ("dpmpp_2m", "variance_type", "learned"),
        ("dpmpp_2m", "solver_order", 4),
        ("dpmpp_2m", "use_flow_sigmas", True),
        ("dpmpp_2m_sde", "use_dynamic_shifting", True),
        ("euler", "timestep_type", "continuous"),
        ("euler", "sigma_min", "0.1"),
        ("heun", "clip_sample", True),
        ("unipc", "predict_x0", False),
        ("unipc", "disable_corrector", 3),
        ("unipc", "solver_type", "bh3"),
    ],
)
def test_a_setting_that_cannot_be_honoured_is_refused_by_name(sampler: str, key: str, value: Any) -> None:
    schedule = NoiseSchedule.from_config({**SD15, key: value})
    with pytest.raises(SettingsError, match=f"{key} = {re.escape(repr(value))}, only .* can be honoured"):
        sampler_table(schedule, sampler, 20, 7.5)
    others = (name for name in sampler_names() if key not in SCHEDULERS[REFERENCE[name][0]])
    for other in others:  # as diffusers' from_config drops what the class does not know
        np.testing.assert_array_equal(
            sampler_table(schedule, other, 20, 7.5).rows,
            sampler_table(NoiseSchedule.from_config(SD15), other, 20, 7.5).rows,
        )


def test_two_ways_to_space_the_levels_are_refused() -> None:
    schedule = NoiseSchedule.from_config({**SD15, "use_karras_sigmas": True, "use_beta_sigmas": True})
    with pytest.raises(SettingsError, match="both use_karras_sigmas and use_beta_sigmas"):
        sampler_table(schedule, "euler", 20, 7.5)


def test_a_network_that_predicts_x_0_is_refused_where_diffusers_refuses_it() -> None:
    with pytest.raises(SettingsError, match="pndm cannot follow a network that predicts x_0; use one of ddim"):
        sampler_table(NoiseSchedule(prediction_type="sample"), "pndm", 4, 7.5)
    with pytest.raises(ValueError, match="prediction_type given as sample"):
        run_diffusers(reference("pndm", prediction_type="sample"), 4, make_network(), 0, 1, 7.5, seed=0)


def test_an_order_that_cannot_end_without_noise_is_refused() -> None:
    config = {**SD15, "final_sigmas_type": "zero", "lower_order_final": False}  # where diffusers gives NaN
    with pytest.raises(SettingsError, match="unipc of order 2 cannot end without noise; set lower_order_final"):
        sampler_table(NoiseSchedule.from_config(config), "unipc", 20, 7.5)


@pytest.mark.parametrize(
    ("scheduler", "config", "sampler"),
    [
        ("PNDMScheduler", {"skip_prk_steps": True}, "pndm"),
        ("DPMSolverMultistepScheduler", {}, "dpmpp_2m"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "deis", "use_karras_sigmas": True}, "dpmpp_2m_karras"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
        ("EulerAncestralDiscreteScheduler", {"algorithm_type": "dpmsolver"}, "euler_a"),
        ("KDPM2DiscreteScheduler", {}, None),
    ],
)
def test_the_sampler_of_a_scheduler(scheduler: str, config: dict[str, Any], sampler: str | None) -> None:
    assert sampler_of(scheduler, config) == sampler


def state_needed(scheduler: Any, steps: int) -> int:
    """The rank of the map from past to future, at its largest: how many latents a table has to carry."""
    with pytest.MonkeyPatch.context() as patch:
        inputs = np.stack([x for x, _ in responses_of_diffusers(scheduler, steps, 0.0, patch)])
    calls = len(inputs)
    return max(np.linalg.matrix_rank(inputs[i + 1 :, : i + 2], tol=1e-5) for i in range(calls - 1))


def test_runge_kutta_steps_need_more_than_a_table_holds() -> None:
    config = {key: value for key, value in SD15.items() if key != "skip_prk_steps"}
    assert state_needed(schedulers.PNDMScheduler.from_config(config), 12) == SLOTS + 1
    assert state_needed(schedulers.PNDMScheduler.from_config(SD15), 12) == SLOTS
    with pytest.raises(SettingsError, match="skip_prk_steps = False, only True"):
        sampler_of("PNDMScheduler", config)


@pytest.mark.parametrize("set_alpha_to_one", [True, False, None])
@pytest.mark.parametrize("sampler", ["ddim", "pndm"])
def test_the_end_of_the_last_step_equals_diffusers(sampler: str, set_alpha_to_one: bool | None) -> None:
    config = {key: value for key, value in SD15.items() if key != "set_alpha_to_one"}
    if set_alpha_to_one is not None:
        config["set_alpha_to_one"] = set_alpha_to_one
    scheduler = getattr(schedulers, REFERENCE[sampler][0]).from_config(config)
    table = sampler_table(NoiseSchedule.from_config(config), sampler, 4, 7.5)
    theirs = run_diffusers(scheduler, 4, make_network(), 0, 1, 7.5, seed=3)
    assert relative_error(run_table(table, make_network(), 0, 1, seed=3), theirs) <= TOLERANCE / 10


def responses_of_table(table: SamplerTable) -> Iterator[tuple[Array, Array]]:
    """Each call's network input and next latents, as linear maps of (starting noise, outputs, fresh noise).

    Fresh noise is numbered by the call that draws it, in torch's order of draws.
    """
    rows = table.calls
    state = np.zeros((SLOTS, 1 + 2 * rows))
    state[0, 0] = table.init_noise_sigma
    for number, row in enumerate(table.rows[:rows].astype(np.float64)):
        x = row[E] @ state
        state = row[A].reshape(SLOTS, SLOTS) @ state
        state[:, 1 + number] += row[B]
        drawn = table.noise_steps[int(row[DRAW])] if table.noise_steps else 0
        state[:, 1 + rows + drawn] += row[C]
        yield x, state[0]


def responses_of_diffusers(
    scheduler: Any, steps: int, eta: float, patch: pytest.MonkeyPatch
) -> Iterator[tuple[Array, Array]]:
    """The same maps, found by feeding unit vectors to the scheduler: one element of the batch per input."""
    scheduler.set_timesteps(steps)
    rows = len(scheduler.timesteps)
    units = torch.eye(1 + 2 * rows).reshape(1 + 2 * rows, -1, 1, 1, 1)
    row = 0
    module = inspect.getmodule(type(scheduler))
    patch.setattr(module, "randn_tensor", lambda *_, **__: units[1 + rows + row], raising=False)
    latents = units[0] * scheduler.init_noise_sigma
    known = inspect.signature(scheduler.step).parameters
    extra = {"eta": eta} if "eta" in known else {}
    for row, t in enumerate(scheduler.timesteps):  # the patched randn_tensor looks at row
        x = scheduler.scale_model_input(latents, t)
        latents = scheduler.step(units[1 + row], t, latents, **extra).prev_sample
        yield x.numpy().ravel(), latents.numpy().ravel()


@given(
    case=st.sampled_from(CASES),
    prediction_type=st.sampled_from(PREDICTION_TYPES),
    # not the cosine schedule: it goes up to sigma 20000, where diffusers' own float32 loses three digits
    beta_schedule=st.sampled_from(["linear", "scaled_linear"]),
    steps=st.integers(1, 50),
    eta=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_every_coefficient_equals_a_probe_of_diffusers(
    case: tuple[str, str | None], prediction_type: str, beta_schedule: str, steps: int, eta: float
) -> None:
    sampler, spacing = case
    if prediction_type == "sample" and sampler in ("euler_a", "pndm"):
        return  # which diffusers does not do
    config = {"prediction_type": prediction_type, "beta_schedule": beta_schedule, "timestep_spacing": spacing}
    eta = eta if sampler == "ddim" else 0.0
    schedule = NoiseSchedule.from_config({**SD15, **config})
    table = sampler_table(schedule, sampler, steps, 1.0, eta=eta)
    scheduler = reference(sampler, **config)
    with pytest.MonkeyPatch.context() as patch:
        theirs = list(responses_of_diffusers(scheduler, steps, eta, patch))
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy().astype(np.float32))
    for ours, expected in zip(responses_of_table(table), theirs, strict=True):
        for actual, wanted in zip(ours, expected, strict=True):
            # diffusers computes coefficients in float32: 3e-6 for most samplers, 2e-5 for DEIS, which cancels
            np.testing.assert_allclose(actual, wanted, rtol=0, atol=5e-5 * max(1.0, np.abs(wanted).max()))


@given(
    sampler=st.sampled_from(sampler_names()),
    beta_schedule=st.sampled_from(BETA_SCHEDULES),
    prediction_type=st.sampled_from(PREDICTION_TYPES),
    train_timesteps=st.integers(50, 2000),
    share=st.floats(0.0, 1.0),
    betas=st.tuples(st.floats(1e-5, 5e-3), st.floats(6e-3, 3e-2)),
    guidance=st.floats(-1e6, 1e6),
)
def test_every_row_is_finite_or_the_settings_are_refused(
    sampler: str,
    beta_schedule: str,
    prediction_type: str,
    train_timesteps: int,
    share: float,
    betas: tuple[float, float],
    guidance: float,
) -> None:
    schedule = NoiseSchedule(train_timesteps, *betas, beta_schedule, prediction_type)
    steps = max(1, round(share * train_timesteps))
    try:
        table = sampler_table(schedule, sampler, steps, guidance)
    except SettingsError as error:
        known = ("fewer steps", "lcm knows only", "pndm cannot follow a network that predicts x_0")
        assert any(words in str(error) for words in known)
        return
    assert table.rows.dtype == np.float32
    assert not table.rows.flags.writeable
    assert table.rows.shape == (table.calls + 1, ROW)
    assert table.calls == len(table.step_of_row) == len(table.roles)
    assert np.isfinite(table.rows).all()
    assert math.isfinite(table.init_noise_sigma)
    assert sorted(set(table.step_of_row)) == list(range(steps))
    undrawn = np.delete(np.arange(len(table.rows)), table.noise_steps)
    assert not table.rows[undrawn, C].any()


@given(st.sampled_from(sampler_names()), st.integers(1, 25), st.floats(-20, 20))
def test_guidance_is_a_column_and_nothing_else(sampler: str, steps: int, guidance: float) -> None:
    table = sampler_table(NoiseSchedule(), sampler, steps, guidance)
    listed = sampler_table(NoiseSchedule(), sampler, steps, np.full(steps, guidance))
    np.testing.assert_array_equal(table.rows, listed.rows)
    other = sampler_table(NoiseSchedule(), sampler, steps, 1.0).rows
    np.testing.assert_array_equal(np.delete(table.rows, W, 1), np.delete(other, W, 1))


@pytest.mark.parametrize("sampler", ["euler", "heun", "pndm"])
def test_a_guidance_schedule_belongs_to_steps(sampler: str) -> None:
    schedule = [float(w) for w in range(5)]
    table = sampler_table(NoiseSchedule(), sampler, 5, schedule)
    by_row = [schedule[step] for step in table.step_of_row]
    np.testing.assert_array_equal(table.rows[:-1, W], by_row)
    theirs = run_diffusers(reference(sampler), 5, make_network(), 0, 1, by_row, seed=1)
    assert relative_error(run_table(table, make_network(), 0, 1, seed=1), theirs) <= TOLERANCE


def test_which_rows_draw_noise() -> None:
    def draws(sampler: str, **options: Any) -> tuple[int, ...]:
        return sampler_table(NoiseSchedule(), sampler, 4, 7.5, **options).noise_steps

    assert draws("euler_a") == draws("dpmpp_2m_sde") == draws("ddim", eta=0.5) == (0, 1, 2, 3)
    assert draws("ddpm") == (0, 1, 2, 3)
    assert draws("ddpm", spacing="linspace") == draws("lcm") == (0, 1, 2)
    for sampler in set(sampler_names()) - {"euler_a", "dpmpp_2m_sde", "ddpm", "lcm"}:
        assert draws(sampler) == ()


@pytest.mark.parametrize(("sampler", "spacing"), CASES)
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_noise_is_drawn_where_and_in_the_order_that_torch_draws(sampler: str, spacing: str | None, eta: float) -> None:
    eta = eta if sampler == "ddim" else 0.0
    table = sampler_table(NoiseSchedule(), sampler, 6, 7.5, eta=eta, spacing=spacing)
    scheduler = reference(sampler, timestep_spacing=spacing)
    scheduler.set_timesteps(6)
    drawn, calls = [], []

    def record(shape: Sequence[int], *_: Any, **__: Any) -> torch.Tensor:
        drawn.append(len(calls) - 1)
        return torch.zeros(tuple(shape))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect.getmodule(type(scheduler)), "randn_tensor", record, raising=False)
        extra = {"eta": eta} if "eta" in inspect.signature(scheduler.step).parameters else {}
        for t in scheduler.timesteps:
            calls.append(t)
            latents = scheduler.scale_model_input(torch.zeros(1, *SHAPE), t)
            scheduler.step(torch.zeros(1, *SHAPE), t, latents, **extra)
    assert table.noise_steps == tuple(drawn)
    assert table.rows[drawn, DRAW].tolist() == list(range(len(drawn)))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "euler_a", "heun", "lms"])
def test_clean_latents_are_what_diffusers_expects_of_the_end(sampler: str, prediction_type: str) -> None:
    config = {**SD15, "prediction_type": prediction_type}
    table = sampler_table(NoiseSchedule.from_config(config), sampler, 7, 7.5)
    theirs = list(walk_diffusers(reference(sampler, **config), 7, make_network(), 0, 1, 7.5, seed=2))
    ours = list(walk_table(table, make_network(), 0, 1, seed=2))
    assert len(theirs) == table.calls
    for (_, clean), output in zip(ours, theirs, strict=False):
        assert relative_error(clean, output.pred_original_sample[0].numpy()) <= TOLERANCE
    for latents, clean in ours[table.calls :]:  # of a finished sample
        np.testing.assert_array_equal(clean, latents)


@pytest.mark.parametrize("sampler", sampler_names())
def test_clean_latents_are_exact_when_the_network_is(sampler: str) -> None:
    """A network that knows x_0 says so at every call, whichever latents the sampler shows it."""
    target = TorchNoise(9).randn(SHAPE)
    table = sampler_table(NoiseSchedule(), sampler, 6, 1.0)
    scheduler = schedulers.EulerDiscreteScheduler.from_config(SD15)
    ratios = (1 / scheduler.alphas_cumprod.double().numpy() - 1) ** 0.5

    def network(x: Array, t: float, _: int) -> Array:
        ratio = np.interp(t, np.arange(1000), ratios)
        if sampler == "dpmpp_2m_karras":  # whose timesteps are rounded, and whose levels are not
            ratio = levels[float(t)]
        alpha, sigma = 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio)
        return ((x - alpha * target) / sigma).astype(np.float32)

    karras = reference("dpmpp_2m_karras")
    karras.set_timesteps(6)
    levels = dict(zip(karras.timesteps.tolist(), karras.sigmas.double().tolist(), strict=False))
    for number, (_, clean) in enumerate(walk_table(table, network, 0, 1, seed=4)):
        if number < table.calls and not (sampler == "pndm" and number):  # pndm extrapolates outputs of other levels
            assert relative_error(clean, target) <= 1e-3


def test_rows_of_the_network_by_guidance() -> None:
    w = [1.0, 0.0, 7.5, -2.0, 1.0 + 1e-9, 1.001]
    expected = ((1,), (0,), (0, 1), (0, 1), (1,), (0, 1))  # the column is float32, where 1 + 1e-9 is 1
    assert sampler_table(NoiseSchedule(), "ddim", 6, w).roles == expected
    heun = sampler_table(NoiseSchedule(), "heun", 3, [2.0, 1.0, 0.0])
    assert heun.roles == ((0, 1), (0, 1), (1,), (1,), (0,))


@pytest.mark.parametrize("w", [0.0, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m_sde", "heun", "pndm"])
def test_a_branch_without_weight_need_not_be_computed(sampler: str, w: float) -> None:
    """walk_table computes the roles named, run_diffusers both branches."""
    theirs = run_diffusers(reference(sampler), 6, make_network(), 0, 1, w, seed=1)
    table = sampler_table(NoiseSchedule(), sampler, 6, w)
    assert relative_error(run_table(table, make_network(), 0, 1, seed=1), theirs) <= TOLERANCE


@pytest.mark.parametrize("sampler", ["lcm", "heun"])
def test_embedded_guidance_is_one_less_as_lcm_models_take_it(sampler: str) -> None:
    rows = sampler_table(NoiseSchedule(), sampler, 4, 1.0, embedded=8.5).rows
    assert (rows[:-1, EMBEDDED] == 7.5).all()
    assert rows[-1, EMBEDDED] == 0
    plain = sampler_table(NoiseSchedule(), sampler, 4, 1.0).rows
    np.testing.assert_array_equal(np.delete(rows, EMBEDDED, 1), np.delete(plain, EMBEDDED, 1))
    assert not plain[:, EMBEDDED].any()


METHOD_COLUMNS = {
    "rescale": columns.RESCALE,
    "norm_limit": columns.NORM_LIMIT,
    "parallel": columns.PARALLEL,
    "zero_star": columns.ZERO_STAR,
    "norm_cap": columns.NORM_CAP,
}


@pytest.mark.parametrize(("name", "column"), METHOD_COLUMNS.items())
def test_a_guidance_method_is_its_column_and_nothing_else(name: str, column: int) -> None:
    plain = sampler_table(NoiseSchedule(), "heun", 4, 7.5).rows
    rows = sampler_table(NoiseSchedule(), "heun", 4, 7.5, methods={name: 0.5}).rows
    assert (rows[:-1, column] == 0.5).all()
    np.testing.assert_array_equal(rows[-1], identity_row())
    np.testing.assert_array_equal(np.delete(rows, column, 1), np.delete(plain, column, 1))


def test_the_methods_are_those_with_a_column_and_perp_neg() -> None:
    assert set(METHODS) == {*METHOD_COLUMNS, "perp_neg"}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in METHODS for value in (math.nan, math.inf, -0.1, 1e39, "1", None, True)]
    + [("rescale", 1.1), ("zero_star", 2)],
)
def test_a_value_that_a_method_cannot_have_is_refused(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=f"guidance method {name} is .*; give a number from 0"):
        sampler_table(NoiseSchedule(), "ddim", 4, 7.5, methods={name: value})


def perp_neg(empty: Array, prompt: Array, negative: Array, w: float, s: float) -> Array:
    """Equation 7 of arXiv 2304.04968, as written."""
    p, n = prompt - empty, negative - empty
    return empty + w * (p - s * (n - np.vdot(n, p) / np.vdot(p, p) * p))


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_perp_neg_is_the_papers_formula(sampler: str) -> None:
    w, s = [7.5, 1.0, -2.0, 0.0], 1.5
    table = sampler_table(NoiseSchedule(), sampler, 4, w, methods={"perp_neg": s})
    assert table.perp_neg
    rng = np.random.default_rng(0)
    for row, roles in zip(table.rows[:-1], table.roles, strict=True):
        o = rng.normal(size=(3, 50))
        assert roles == ((0, 1, 2) if row[W] else (0,))
        p, n = o[1] - o[0], o[2] - o[0]
        n = n - row[columns.PERPENDICULAR] * np.vdot(n, p) / np.vdot(p, p) * p
        found = o[0] + row[W] * p + row[columns.THIRD] * n  # as the graph combines its rows
        np.testing.assert_allclose(found, perp_neg(*o, row[W], s), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(table.rows[-1], identity_row())


def test_without_perp_neg_there_is_no_third_branch() -> None:
    table = sampler_table(NoiseSchedule(), "ddim", 4, 7.5)
    assert not table.perp_neg
    assert not table.rows[:, [columns.THIRD, columns.PERPENDICULAR]].any()


def test_a_third_branch_of_no_weight_is_not_computed() -> None:
    table = sampler_table(NoiseSchedule(), "ddim", 2, [7.5, 1.0], methods={"perp_neg": 0.0})
    assert table.perp_neg  # the negative prompt is role 2 all the same
    assert table.roles == ((0, 1), (1,))


def test_perp_neg_that_leaves_float32_is_refused() -> None:
    with pytest.raises(SettingsError, match="perp_neg times guidance is too large"):
        sampler_table(NoiseSchedule(), "ddim", 2, 1e30, methods={"perp_neg": 1e30})


def test_an_unknown_guidance_method_is_refused_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match="guidance method 'rescal' is unknown; did you mean 'rescale'"):
        sampler_table(NoiseSchedule(), "ddim", 4, 7.5, methods={"rescal": 0.7})


def test_rows_and_steps() -> None:
    assert sampler_table(NoiseSchedule(), "heun", 3, 1.0).step_of_row == (0, 0, 1, 1, 2)
    assert sampler_table(NoiseSchedule(), "pndm", 3, 1.0).step_of_row == (0, 0, 1, 2)
    assert sampler_table(NoiseSchedule(), "ddim", 3, 1.0).step_of_row == (0, 1, 2)


@pytest.mark.parametrize("sampler", sampler_names())
def test_a_table_ends_in_a_row_that_stands_still(sampler: str) -> None:
    rng = np.random.default_rng(0)
    state, o, z = rng.normal(size=(SLOTS, 8)), rng.normal(size=8), rng.normal(size=8)
    rows = sampler_table(NoiseSchedule(), sampler, 3, 7.5).rows
    assert (rows[:-1, ADVANCE] == 1).all()
    row = rows[-1]
    after = row[A].reshape(SLOTS, SLOTS) @ state + np.outer(row[B] + row[NEGATIVE_OUTPUT], o) + np.outer(row[C], z)
    np.testing.assert_array_equal(after, state)
    np.testing.assert_array_equal(row[E] @ state, state[0])
    np.testing.assert_array_equal(row[CLEAN_STATE] @ state + row[CLEAN_OUTPUT] * o, state[0])
    assert row[ADVANCE] == 0
    np.testing.assert_array_equal(row, identity_row())


def test_the_schedule_may_name_the_spacing() -> None:
    trailing = NoiseSchedule(settings={**NoiseSchedule().settings, "timestep_spacing": "trailing"})
    for sampler in set(sampler_names()) - set(OWN_TIMESTEPS):
        expected = sampler_table(NoiseSchedule(), sampler, 7, 1.0, spacing="trailing")
        np.testing.assert_array_equal(sampler_table(trailing, sampler, 7, 1.0).rows, expected.rows)
        leading = sampler_table(trailing, sampler, 7, 1.0, spacing="leading")
        assert not np.array_equal(leading.rows, expected.rows)
    for sampler in OWN_TIMESTEPS:
        expected = sampler_table(NoiseSchedule(), sampler, 7, 1.0)
        np.testing.assert_array_equal(sampler_table(trailing, sampler, 7, 1.0).rows, expected.rows)


@pytest.mark.parametrize("steps", [0, -1, 10**6, 1001, True, 2.5, "20", None, math.nan])
def test_impossible_steps_are_refused(steps: Any) -> None:
    with pytest.raises(SettingsError, match=r"steps is .*from 1 to 1000"):
        sampler_table(NoiseSchedule(), "ddim", steps, 7.5)


@pytest.mark.parametrize(
    "guidance",
    [math.nan, math.inf, -math.inf, 1e39, [7.5] * 4, [], [7, math.nan, 1], "7", None, True, [[1], 2, 3]],
)
def test_impossible_guidance_is_refused(guidance: Any) -> None:
    with pytest.raises(SettingsError, match=r"guidance .*finite number, or one for each step"):
        sampler_table(NoiseSchedule(), "ddim", 3, guidance)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan, "1", None, True])
def test_impossible_eta_is_refused(eta: Any) -> None:
    with pytest.raises(SettingsError, match="eta is"):
        sampler_table(NoiseSchedule(), "ddim", 3, 7.5, eta=eta)


def test_eta_is_for_ddim_only() -> None:
    with pytest.raises(SettingsError, match="euler has no eta"):
        sampler_table(NoiseSchedule(), "euler", 3, 7.5, eta=0.5)


def test_unknown_names_are_refused_with_the_nearest_and_all() -> None:
    with pytest.raises(SettingsError, match=r"'eular' is unknown; did you mean 'euler'\? known: ddim, .*uni"):
        sampler_table(NoiseSchedule(), "eular", 3, 7.5)
    with pytest.raises(SettingsError, match=r"'lead' is unknown; did you mean 'leading'\? known: leading"):
        sampler_table(NoiseSchedule(), "ddim", 3, 7.5, spacing="lead")
    with pytest.raises(SettingsError, match="unknown"):
        sampler_table(NoiseSchedule(), 3, 3, 7.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", OWN_TIMESTEPS)
def test_spacing_is_refused_where_it_means_nothing(sampler: str) -> None:
    with pytest.raises(SettingsError, match="timesteps of its own"):
        sampler_table(NoiseSchedule(), sampler, 3, 7.5, spacing="leading")


def test_more_steps_than_there_are_timesteps() -> None:
    with pytest.raises(SettingsError, match="lcm knows only 50 timesteps"):
        sampler_table(NoiseSchedule(), "lcm", 51, 7.5)
    for sampler in ("ddim", "euler", "dpmpp_2m"):  # steps_offset pushes the first beyond the last trained
        with pytest.raises(SettingsError, match="fewer steps"):
            sampler_table(NoiseSchedule(), sampler, 1000, 7.5, spacing="leading")


@pytest.mark.parametrize("sampler", sorted(set(REFERENCE) - set(ZERO_SNR)))
def test_zero_terminal_snr_is_refused_where_diffusers_ignores_it(sampler: str) -> None:
    schedule = NoiseSchedule(prediction_type="v_prediction", rescale_zero_terminal_snr=True)
    with pytest.raises(SettingsError, match="zero terminal SNR; use one of ddim"):
        sampler_table(schedule, sampler, 20, 7.5)
