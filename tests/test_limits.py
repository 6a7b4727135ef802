"""Sizes of plans from the contract's symbols: profiles, what users ask for, and what sessions fill up to."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import small_bundle, small_manifest

from dnp.engine.bundle.contract import BATCH, STEPS, Symbol, signatures, symbols
from dnp.engine.bundle.manifest import GraphSpec
from dnp.engine.errors import SettingsError
from dnp.engine.plans.limits import Limits
from dnp.engine.plans.profile import Range, any_profile, asked_for, default_profile

MANIFEST = small_manifest()
GRAPHS = {name: GraphSpec(name, None, inputs, outputs) for name, (inputs, outputs) in signatures(MANIFEST).items()}


def ranges(high):
    """Any range up to ``high``."""
    sizes = st.lists(st.integers(1, high), min_size=3, max_size=3).map(sorted)
    return sizes.map(lambda three: Range(*three))


SIDES = ranges(8).map(lambda r: Range(8 * r.low, 8 * r.best, 8 * r.high))  # pixels, in latents of 4, two at a time
ASKED = st.fixed_dictionaries(
    {},
    optional={
        "batch": ranges(40),
        "steps": ranges(300),
        "windows": ranges(5),
        "height": SIDES,
        "width": SIDES,
        "image_height": ranges(900),
        "image_width": ranges(900),
    },
)


def test_a_default_profile_covers_every_symbol_of_every_graph():
    known = symbols(MANIFEST)
    for name, graph in GRAPHS.items():
        profile = default_profile(MANIFEST, graph)
        assert list(profile) == list(graph.symbols), name
        for symbol, sizes in profile.items():
            assert sizes.high % known[symbol].multiple == 0
    denoise = default_profile(MANIFEST, GRAPHS["denoise"])
    assert denoise["places"] == Range(1, 1, BATCH)
    assert denoise["rows"] == Range(1, 2, 2 * BATCH)
    assert denoise["steps"] == denoise["noise_steps"] == Range(1, 25, STEPS)
    assert denoise["height"] == Range(8, 8, 8)
    assert denoise["tokens"] == Range(6, 6, 6)
    assert default_profile(MANIFEST, GRAPHS["caption_step"])["sequences"] == Range(1, 1, 4 * BATCH)
    assert default_profile(MANIFEST, GRAPHS["encode_image"])["image_width"] == Range(32, 32, 32)
    three = small_manifest(guidance=replace(MANIFEST.guidance, roles=3))
    assert default_profile(three, GRAPHS["denoise"])["rows"] == Range(1, 2, 3 * BATCH)


@given(ASKED)
def test_what_was_asked_for_can_be_read_back_from_a_profile(asked):
    """``asked_for`` undoes ``default_profile``, option by option."""
    for graph in GRAPHS.values():
        found = asked_for(default_profile(MANIFEST, graph, asked), symbols(MANIFEST))
        for option, sizes in found.items():
            if option in asked:
                assert sizes == asked[option]


@given(asked=ASKED, sizes=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 60)), min_size=1, max_size=3))
def test_the_command_in_a_refusal_gives_a_plan_that_takes_the_sizes(asked, sizes):
    """And all that the plan before took."""
    graph = GRAPHS["denoise"]
    profile = default_profile(MANIFEST, graph, asked)
    known = symbols(MANIFEST)
    dims = {}
    for which, size in sizes:
        name = graph.symbols[which % len(graph.symbols)]
        size *= known[name].multiple
        most = {"height": 16, "width": 16}.get(name, size)
        dims[name] = min(size, most)
    limits = Limits.of_plan(graph, profile, MANIFEST, "dnp build here")
    beyond = {name for name, size in dims.items() if not profile[name].low <= size <= profile[name].high}
    if not beyond:
        limits.check(**dims)
        return
    with pytest.raises(SettingsError) as caught:
        limits.check(**dims)
    told, command = str(caught.value).split("; build a wider one: dnp build here ")
    for name, size in dims.items():
        assert (f"{name} {profile[name]}, not for {size}" in told) == (name in beyond)
    words = shlex.split(command)
    options = {
        word[2:].replace("-", "_"): Range.parse(text) for word, text in zip(words[::2], words[1::2], strict=True)
    }
    wider = default_profile(MANIFEST, graph, options)
    Limits.of_plan(graph, wider, MANIFEST).check(**dims)
    for name, before in profile.items():
        assert wider[name].low <= before.low
        assert before.high <= wider[name].high


@given(
    captured=st.lists(st.integers(1, 40), max_size=5), largest=st.booleans(), high=st.integers(1, 40),
    size=st.integers(1, 60),
)  # fmt: skip
def test_a_size_is_filled_up_to_the_next_that_is_captured(captured, largest, high, size):
    symbol = Symbol("batch", captured=tuple(captured), largest=largest)
    limits = Limits("g", {}, {"n": symbol}, {"n": high})
    fitted = limits.fit("n", size)
    there = [s for s in captured if s < high] + [high] * largest
    larger = [s for s in there if s >= size]
    assert fitted == (min(larger) if larger else size)
    assert limits.fit("n", fitted) == fitted
    low = max(1, high // 2)
    of_a_plan = Limits("g", {"n": Range(low, low, high)}, {"n": symbol}, {"n": high}).fit("n", size)
    filled = bool(captured or largest)  # what is never filled up cannot be made larger
    assert of_a_plan == (limits.fit("n", max(low, size)) if filled else size)
    assert limits.fit("other", size) == size


@given(ranges(20), st.integers(1, 30))
def test_the_nearest_size_is_one_that_is_taken(sizes, size):
    limits = Limits("g", {"n": sizes})
    nearest = limits.nearest("n", size)
    limits.check(n=nearest)
    assert abs(nearest - size) == min(abs(other - size) for other in range(sizes.low, sizes.high + 1))
    assert limits.nearest("other", size) == size


def test_without_limits_every_size_is_taken_as_it_is():
    limits = Limits()
    limits.check(anything=1 << 40)
    assert (limits.fit("n", 7), limits.nearest("n", 7), dict(limits.ranges)) == (7, 7, {})


def test_a_graph_in_no_bundle_has_limits_and_no_command():
    limits = Limits.of_plan(GRAPHS["denoise"], any_profile(GRAPHS["denoise"]))
    with pytest.raises(SettingsError, match=r"'denoise': the plan was compiled for rows 1:4:8, not for 9$"):
        limits.check(rows=9)
    with pytest.raises(SettingsError, match="unknown size 'row', did you mean 'rows'"):
        limits.check(row=1)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"zoom": Range(1, 1, 1)}, "a profile has no 'zoom', known: batch, steps, windows, height"),
        ({"hieght": Range(1, 1, 1)}, "did you mean 'height'"),
        ({"batch": (1, 1, 2)}, r"the sizes of 'batch' are a Range\(smallest, best, largest\), not \(1, 1, 2\)"),
        ({"height": (1, 1, 2)}, r"the sizes of 'height' are a Range"),
        ({"height": Range(36, 36, 36)}, "height 36 has sizes that are no multiples of 8"),
        ({"width": Range(32, 32, 128)}, "width 32:32:128 goes beyond 64 pixels, the most that this bundle can make"),
    ],
)
def test_what_cannot_be_had_is_said(asked, told):
    for graph in GRAPHS.values():  # whether it has that size or not
        with pytest.raises(SettingsError, match=told):
            default_profile(MANIFEST, graph, asked)


def test_images_to_caption_are_as_large_as_those_that_are_made(tmp_path):
    bundle = small_bundle(tmp_path)
    profile = default_profile(bundle, bundle.graph("encode_image"), {"height": Range(16, 32, 64)})
    assert profile["image_height"] == Range(16, 32, 64)
    asked = {"height": Range(16, 32, 64), "image_height": Range(100, 100, 100)}
    assert default_profile(bundle, bundle.graph("encode_image"), asked)["image_height"] == Range(100, 100, 100)
