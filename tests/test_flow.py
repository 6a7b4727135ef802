"""Samplers of flow matching models against diffusers' own schedulers: the same latents from the same noise."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import schedulers
from test_samplers import Array, make_network, parameters_of, relative_error, walk_table

from dnp.engine.errors import SettingsError
from dnp.runtime.sampling.flow import FlowSchedule
from dnp.runtime.sampling.noise import TorchNoise
from dnp.runtime.sampling.samplers import SamplerTable, sampler_names, sampler_of, sampler_table
from dnp.runtime.sampling.settings import FLOW_SCHEDULE_KEYS, FLOW_SCHEDULERS, KEYS, Setting

# diffusers mixes numpy and torch in a way that numpy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

SHAPE, TOLERANCE, SIZE = (4, 4, 4), 1e-4, (96, 128)
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
CLASSES = {
    "dpmpp_2m": ("DPMSolverMultistepScheduler", FLOW),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {**FLOW, "algorithm_type": "sde-dpmsolver++"}),
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", FLOW),
}
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def theirs_of(sampler: str, config: dict[str, Any], steps: int, sigmas: Array | None = None) -> Any:
    """diffusers' scheduler, ready to run; the dynamic shift is that of SIZE."""
    name, options = CLASSES[sampler]
    scheduler_class = getattr(schedulers, name)
    if "shift" in config and sampler not in ("euler", "heun"):
        options = {**options, "flow_shift": config["shift"]}  # which a pipeline's user has to do
    scheduler = scheduler_class.from_config(config, **options)
    given: dict[str, Any] = {}
    if config.get("use_dynamic_shifting"):
        tokens = SIZE[0] // 2 * (SIZE[1] // 2)
        given["mu"] = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    if sigmas is None:
        scheduler.set_timesteps(steps, **given)
    else:
        scheduler.set_timesteps(sigmas=sigmas, **given)
    return scheduler


def walk_scheduler(scheduler: Any, guidance: float, seed: int) -> Iterator[Array]:
    """The loop of the flow pipelines, in which the network sees the latents as they are: those after each call."""
    network, generator = make_network(), torch.Generator("cpu").manual_seed(seed)
    latents = torch.randn((1, *SHAPE), generator=generator)
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        negative, prompt = (torch.from_numpy(network(latents.numpy(), t.item(), c))[None, ...] for c in (0, 1))
        o = (negative + guidance * (prompt - negative)).reshape(latents.shape)
        latents = scheduler.step(o, t, latents, **extra).prev_sample
        yield latents[0].numpy()


def table_of(sampler: str, config: dict[str, Any], steps: int, guidance: float, **options: Any) -> SamplerTable:
    return sampler_table(FlowSchedule.from_config(config).sized(*SIZE), sampler, steps, guidance, **options)


def assert_same(sampler: str, config: dict[str, Any], steps: int, theirs: Any, guidance: float, **options: Any) -> None:
    table = table_of(sampler, config, steps, guidance, **options)
    np.testing.assert_allclose(table.timesteps, theirs.timesteps.numpy(), rtol=1e-6, atol=1e-3)
    expected = list(walk_scheduler(theirs, guidance, seed=steps))
    ours = [latents for latents, _ in walk_table(table, make_network(), 0, 1, seed=steps)]
    if config.get("solver_type") == "bh1":  # diffusers multiplies 0 with B(h) = h, infinite in the last step
        assert np.isnan(expected.pop()).all()
    for actual, wanted in zip(ours, expected, strict=False):
        assert relative_error(actual, wanted) <= TOLERANCE
    assert np.isfinite(ours[-1]).all()


SPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
CASES: list[tuple[str, dict[str, Any]]] = [(name, {"shift": shift}) for name in CLASSES for shift in (1.0, 3.0)]
CASES += [(name, DYNAMIC) for name in ("euler", "unipc")]
CASES += [("euler", {**DYNAMIC, "time_shift_type": "linear"}), ("unipc", {**DYNAMIC, "time_shift_type": "linear"})]
CASES += [("euler", {"shift": 3.0, key: True}) for key in SPACED]
CASES += [("euler", {**DYNAMIC, "shift_terminal": 0.1, "use_karras_sigmas": True})]
CASES += [("euler", {"shift": 2.0, "stochastic_sampling": True}), ("euler", {**DYNAMIC, "stochastic_sampling": True})]
CASES += [(name, {"shift": 2.0, "shift_terminal": 0.1}) for name in ("euler", "unipc")]
CASES += [
    ("dpmpp_2m", {"shift": 3.0, "solver_order": order, "solver_type": kind, "lower_order_final": lower})
    for order in (1, 2, 3)
    for kind in ("midpoint", "heun")
    for lower in (True, False)
]
CASES += [
    ("dpmpp_2m_sde", {"solver_order": order, "solver_type": kind})
    for order in (1, 2, 3)
    for kind in ("midpoint", "heun")
]
CASES += [
    ("unipc", {"shift": 3.0, "solver_order": order, "solver_type": kind})
    for order in (1, 2, 3)
    for kind in ("bh1", "bh2")
]
CASES += [("unipc", {"shift": 5.0, "disable_corrector": [0, 2]})]


@pytest.mark.parametrize(("sampler", "config"), CASES)
def test_final_latents_equal_diffusers(sampler: str, config: dict[str, Any]) -> None:
    for steps in (2, 3, 20) if "shift_terminal" in config else (1, 2, 3, 20):
        for guidance in (4.0, -2.0):
            assert_same(sampler, config, steps, theirs_of(sampler, config, steps), guidance)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_dpm_solver_takes_the_shift_that_the_size_gives(sampler: str) -> None:
    assert_same(sampler, DYNAMIC, 12, theirs_of(sampler, DYNAMIC, 12), 4.0)


@pytest.mark.parametrize("config", [DYNAMIC, {"shift": 2.0, "shift_terminal": 0.1}])
def test_heun_visits_the_levels_of_euler(config: dict[str, Any]) -> None:
    """diffusers' class has neither: it is given the levels that its Euler's has."""
    levels = theirs_of("euler", config, 9)
    theirs = schedulers.FlowMatchHeunDiscreteScheduler()
    theirs.set_timesteps(9)
    theirs.timesteps = torch.cat([levels.timesteps[:1], levels.timesteps[1:].repeat_interleave(2)])
    inner = levels.sigmas[1:-1].repeat_interleave(2)
    theirs.sigmas = torch.cat([levels.sigmas[:1], inner, levels.sigmas[-1:]])
    assert_same("heun", config, 9, theirs, 4.0)


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
@pytest.mark.parametrize("config", [{"shift": 3.0}, DYNAMIC])
def test_trailing_sigmas_are_those_that_the_flux_pipeline_gives(sampler: str, config: dict[str, Any]) -> None:
    for steps in (1, 4, 15):
        theirs = theirs_of(sampler, config, steps, sigmas=np.linspace(1.0, 1 / steps, steps))
        assert_same(sampler, config, steps, theirs, 4.0, spacing="trailing")


@pytest.mark.parametrize("sampler", CLASSES)
def test_clean_latents_are_exact_when_the_network_is(sampler: str) -> None:
    """Of so many steps that whole timesteps come twice."""
    config, target = {"shift": 12.0}, TorchNoise(9).randn(SHAPE)
    table = table_of(sampler, config, 200, 1.0)
    assert len(set(table.timesteps.tolist())) < 200 or sampler in ("euler", "heun")
    sigmas = iter(theirs_of(sampler, config, 200).sigmas.tolist())  # one for each call

    def network(x: Array, t: float, _: int) -> Array:
        return ((x - target) / next(sigmas)).astype(np.float32)

    for _, (_, clean) in zip(range(table.calls), walk_table(table, network, 0, 1, seed=4), strict=False):
        assert relative_error(clean, target) <= TOLERANCE


@pytest.mark.parametrize("sampler", sorted(set(sampler_names()) - set(CLASSES)))
def test_a_sampler_of_diffusion_is_refused(sampler: str) -> None:
    with pytest.raises(
        SettingsError,
        match=f"{sampler} cannot sample a flow matching model; use one of dpmpp_2m, dpmpp_2m_sde, euler, heun, unipc",
    ):
        sampler_table(FlowSchedule(), sampler, 4, 4.0)


@pytest.mark.parametrize(
    ("sampler", "config", "options", "message"),
    [
        ("euler", {"invert_sigmas": True}, {}, "invert_sigmas = True, only False"),
        ("unipc", {"use_karras_sigmas": True}, {}, "use_karras_sigmas = True, only .*; use euler|use euler"),
        ("dpmpp_2m", {"use_lu_lambdas": True}, {}, "use_lu_lambdas = True, only False"),
        ("dpmpp_2m", {"shift_terminal": 0.1}, {}, "shift_terminal, .*; use euler, heun or unipc"),
        ("unipc", {"final_sigmas_type": "sigma_min"}, {}, "final_sigmas_type = 'sigma_min', only 'zero'"),
        ("dpmpp_2m", {}, {"spacing": "trailing"}, "dpmpp_2m has timesteps of its own"),
        ("euler", {}, {"spacing": "leading"}, "use linspace or trailing"),
        ("euler", {}, {"eta": 0.5}, "euler has no eta"),
        ("unipc", {"solver_order": 2, "lower_order_final": False}, {}, "unipc of order 2 cannot end without noise"),
        ("euler", {"use_karras_sigmas": True, "use_beta_sigmas": True}, {}, "both use_karras_sigmas and use_beta"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    sampler: str, config: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        table_of(sampler, config, 8, 4.0, **options)


def test_one_step_cannot_be_stretched() -> None:
    with pytest.raises(SettingsError, match="1 step cannot both begin in noise and end at shift_terminal"):
        table_of("euler", {"shift_terminal": 0.1}, 1, 4.0)


def test_a_dynamic_shift_needs_a_size() -> None:
    with pytest.raises(SettingsError, match="depend on the image size"):
        sampler_table(FlowSchedule.from_config(DYNAMIC), "euler", 4, 4.0)


@pytest.mark.parametrize("scheduler", FLOW_SCHEDULERS)
def test_every_parameter_of_every_class_is_known_with_its_default(scheduler: str) -> None:
    theirs, ours = parameters_of(scheduler), FLOW_SCHEDULERS[scheduler]
    assert set(theirs) - set(FLOW_SCHEDULE_KEYS) == set(ours)
    defaults = {key: setting.default for key, setting in ours.items() if isinstance(setting, Setting)}
    assert defaults == {key: theirs[key] for key in defaults}
    assert {*FLOW_SCHEDULE_KEYS, *defaults} <= KEYS


def test_the_classes_are_those_of_the_samplers() -> None:
    assert {name for name, _ in CLASSES.values()} == set(FLOW_SCHEDULERS)
    known = set().union(*map(parameters_of, FLOW_SCHEDULERS))
    assert set(FLOW_SCHEDULE_KEYS) <= known
    for sampler, (name, options) in CLASSES.items():
        assert sampler_of(name, options) == sampler
