"""Samples in the places of one ``denoise`` session: they join and leave between steps, and nobody notices another."""

from __future__ import annotations

import random
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dnp.engine import open_session
from dnp.engine.bundle.columns import ADVANCE
from dnp.engine.errors import DnpError, SettingsError
from dnp.runtime.pipeline.conditioning import Conditioner
from dnp.runtime.sampling.denoise import Denoiser, Sample
from dnp.runtime.sampling.samplers import METHODS, identity_row, sampler_names, sampler_table
from dnp.runtime.sampling.schedule import NoiseSchedule
from dnp.runtime.tokenizer import PromptTokenizer

PROMPTS = ("a large red circle left of a small blue square on a plain yellow background", "a green star", "a cross")
SIZE, TOKENS = 8, 32  # latents of half the default size, to be quick
ROOM = {"steps": 16, "noise_steps": 8, "height": SIZE, "width": SIZE, "tokens": TOKENS}


@pytest.fixture(scope="module", params=["cpu", "openvino"])
def sessions(request, default_bundle):
    opened = {name: open_session(default_bundle, name, request.param) for name in ("encode_text", "denoise")}
    yield opened
    for session in opened.values():
        session.close()


@pytest.fixture(scope="module")
def conditioner(default_bundle, sessions):
    return Conditioner(default_bundle, sessions["encode_text"], [PromptTokenizer(default_bundle)])


@pytest.fixture(scope="module")
def denoiser(sessions):
    return Denoiser(sessions["denoise"])


@pytest.fixture(scope="module")
def schedule(default_bundle):
    return NoiseSchedule.from_config(default_bundle.schedule)


def request_of(schedule, number):
    """One of many different requests: sampler, steps, guidance (of either sign, or for some steps alone), texts."""
    names = [name for name in sampler_names() if name != "ddpm"]
    steps = 2 + number % 5
    w = (4.0, -2.0, 1.0, 0.0, [1.0] * (steps - 1) + [7.5])[number % 5]
    table = sampler_table(schedule, names[number % len(names)], steps, w)
    return Sample(table, seed=number), PROMPTS[number % 3], ("", "a small green triangle")[number % 2]


def join(denoiser, conditioner, place, request):
    sample, prompt, negative = request
    denoiser.join(place, sample)
    conditioner.write(denoiser.bank, {place: (negative, prompt)}, size=(32, 32))


@pytest.fixture(scope="module")
def alone(denoiser, conditioner, schedule):
    """The final latents of a request that has the session for itself."""
    known = {}

    def latents(number):
        if number not in known:
            denoiser.open(1, **ROOM)
            join(denoiser, conditioner, 0, request_of(schedule, number))
            while denoiser.step():
                pass
            known[number] = denoiser.latents.read()[0]
        return known[number]

    return latents


@settings(max_examples=12)
@given(st.integers(2, 4), st.lists(st.integers(0, 59), min_size=2, max_size=7), st.integers(0, 2**32))
def test_joins_and_leaves_between_steps_change_nobody(denoiser, conditioner, schedule, alone, places, waiting, seed):
    rng, expected = random.Random(seed), {number: alone(number) for number in waiting}
    denoiser.open(places, **ROOM)
    running: dict[int, int] = {}
    while waiting or running:
        for place in rng.sample(range(places), places):
            if place not in running and waiting and rng.random() < 0.4:
                running[place] = waiting.pop()
                join(denoiser, conditioner, place, request_of(schedule, running[place]))
        if running and rng.random() < 0.1:
            left = rng.choice(sorted(running))
            denoiser.leave(left)
            del running[left]
        denoiser.step(None if rng.random() < 0.7 else rng.sample(range(places), rng.randint(0, places)))
        for place, number in list(running.items()):
            if not denoiser.left(place):
                np.testing.assert_array_equal(denoiser.latents.read()[place], expected[number])
                denoiser.leave(place)
                del running[place]


def test_a_finished_sample_stands_still_while_others_go_on(denoiser, conditioner, schedule, alone):
    expected = [alone(number) for number in (0, 4)]
    denoiser.open(2, **ROOM)
    requests = [request_of(schedule, number) for number in (0, 4)]  # of 2 and of 6 steps
    for place, request in enumerate(requests):
        join(denoiser, conditioner, place, request)
    calls = 0
    while denoiser.step():
        calls += 1
    assert calls == max(sample.table.calls for sample, _, _ in requests) > requests[0][0].table.calls
    np.testing.assert_array_equal(denoiser.latents.read(), expected)


@pytest.mark.parametrize("among", [None, [0], [1, 2]])
def test_a_step_that_fails_leaves_every_sample_as_it_was(denoiser, conditioner, schedule, alone, monkeypatch, among):
    expected = [alone(number) for number in (4, 7, 9)]
    denoiser.open(3, **ROOM)
    for place, number in enumerate((4, 7, 9)):
        join(denoiser, conditioner, place, request_of(schedule, number))
    denoiser.step()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="gone"):
        patch.setattr(denoiser.session, "run", Mock(side_effect=OSError("the device is gone")))
        denoiser.step(among)
    while denoiser.step():
        pass
    np.testing.assert_array_equal(denoiser.latents.read(), expected)


def test_numbers_that_are_none_stay_in_their_place(denoiser, conditioner, schedule, alone):
    expected = {0: alone(4), 2: alone(9)}
    denoiser.open(3, **ROOM)
    for place, number in enumerate((4, 7, 9)):
        join(denoiser, conditioner, place, request_of(schedule, number))
    denoiser.session.inputs["state"].at(1).write(np.full((4, 4, SIZE, SIZE), np.nan, np.float32))
    while denoiser.step():
        pass
    latents = denoiser.latents.read()
    assert np.isnan(latents[1]).all()
    for place, own in expected.items():
        np.testing.assert_array_equal(latents[place], own)


@pytest.mark.parametrize(("w", "rows"), [(4.0, 2), (-1.5, 2), (1.0, 1), (0.0, 1)])
def test_the_network_computes_the_rows_that_have_a_weight(denoiser, conditioner, schedule, w, rows):
    denoiser.open(1, **ROOM)
    join(denoiser, conditioner, 0, (Sample(sampler_table(schedule, "ddim", 2, w), 0), PROMPTS[0], ""))
    assert denoiser.step()
    assert denoiser.session.inputs["row_place"].shape == (rows,)
    roles = denoiser.session.inputs["row_role"].read().tolist()
    assert roles == {4.0: [0, 1], -1.5: [0, 1], 1.0: [1], 0.0: [0]}[w]


def test_at_guidance_1_the_negative_prompt_is_not_read(denoiser, conditioner, schedule):
    results = []
    for negative in ("", "a small green triangle"):
        denoiser.open(1, **ROOM)
        join(denoiser, conditioner, 0, (Sample(sampler_table(schedule, "ddim", 3, 1.0), 0), PROMPTS[0], negative))
        while denoiser.step():
            pass
        results.append(denoiser.latents.read())
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("sampler", sampler_names())
def test_the_clean_latents_are_those_of_the_formula(denoiser, conditioner, schedule, sampler):
    """x_0 from the network's input and output as the noise level has them: by the sampler's own last step, mostly."""
    denoiser.open(1, **ROOM)
    join(denoiser, conditioner, 0, (Sample(sampler_table(schedule, sampler, 5, 3.0), 1), PROMPTS[0], ""))
    errors = []
    while denoiser.step():
        errors.append(np.abs(denoiser.clean_latents.read() - denoiser.latents.read()).max())
    ends_clean = sampler not in ("pndm", "unipc", "deis", "ddim", "dpmpp_2m", "heun", "lms")
    assert errors[-1] < (2e-4 if ends_clean else 0.5) < errors[0]


def test_tables_end_in_a_row_that_stands_still(schedule):
    for sampler in sampler_names():
        table = sampler_table(schedule, sampler, 4, 2.0)
        assert len(table.rows) == table.calls + 1
        np.testing.assert_array_equal(table.rows[-1], identity_row())
        assert table.rows[:-1, ADVANCE].tolist() == [1.0] * table.calls and identity_row()[ADVANCE] == 0


def test_methods_are_columns(schedule):
    for name, (column, _) in METHODS.items():
        table = sampler_table(schedule, "ddim", 3, 2.0, methods={name: 0.25})
        assert (table.rows[:-1, column] == (-0.5 if name == "perp_neg" else 0.25)).all()
        assert table.rows[-1, column] == identity_row()[column]


def test_a_sample_that_there_is_no_room_for_is_refused_and_changes_nothing(denoiser, conditioner, schedule, alone):
    expected = alone(4)
    denoiser.open(2, **ROOM)
    join(denoiser, conditioner, 0, request_of(schedule, 4))
    with pytest.raises(SettingsError, match=r"steps 18.* room for 16"):
        denoiser.join(1, Sample(sampler_table(schedule, "ddim", 17, 2.0), 0))
    with pytest.raises(SettingsError, match=r"noise_steps 9.* room for 8"):
        denoiser.join(1, Sample(sampler_table(schedule, "euler_a", 9, 2.0), 0))
    with pytest.raises(DnpError, match="place 0 has a sample"):
        denoiser.join(0, request_of(schedule, 0)[0])
    while denoiser.step():
        pass
    np.testing.assert_array_equal(denoiser.latents.read()[0], expected)


@pytest.mark.parametrize(
    ("w", "methods", "roles"),
    [(0.0, {}, (0,)), (1.0, {}, (1,)), (0.0, {"rescale": 0.7}, (0, 1)), (0.0, {"zero_star": 1.0}, (0, 1)),
     (0.0, {"norm_cap": 1.0}, (0, 1)), (0.0, {"norm_limit": 2.0}, (0,)), (1.0, {"rescale": 0.7}, (1,)),
     (2.0, {"rescale": 0.7}, (0, 1))],
)  # fmt: skip
def test_a_branch_without_weight_is_computed_where_a_method_measures_it(schedule, w, methods, roles):
    assert set(sampler_table(schedule, "ddim", 2, w, methods=methods).roles) == {roles}
