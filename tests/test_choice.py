"""Which plan a session opens, and that opening never compiles: on the stand-in for TensorRT, see ``fake_gpu``."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import small_bundle

from dnp.cli import run
from dnp.engine.backends import tensorrt
from dnp.engine.backends.registry import doctor, open_session
from dnp.engine.backends.session import BackendOptions
from dnp.engine.errors import BackendError, SettingsError
from dnp.engine.plans import build
from dnp.engine.plans.build import build_plans, target_for
from dnp.engine.plans.choice import plan_for
from dnp.engine.plans.compiler import REVISION
from dnp.engine.plans.plan import PlanSpec
from dnp.engine.plans.product import PRODUCTS
from dnp.engine.plans.profile import Range
from dnp.engine.plans.settings import BuildSettings
from dnp.engine.plans.store import PlanStore

GRAPH = "encode_text"
_folders = count()


@pytest.fixture
def bundle(tmp_path):
    return small_bundle(tmp_path / "bundle")


@pytest.fixture(params=sorted(PRODUCTS))
def product(request):
    return PRODUCTS[request.param]


@pytest.fixture
def no_compiler(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a plan was compiled")

    for module in (tensorrt, build):
        monkeypatch.setattr(module, "compile_plan", refuse)


def opened(bundle, backend="tensorrt-rtx", graph=GRAPH, **options):
    return open_session(bundle, graph, backend, BackendOptions(**options))


WAYS = ["graph_sha256", "version", "architecture", "revision", "backend", "graph"]
WRONG = st.sets(st.sampled_from(WAYS), max_size=2)
PLANS = st.lists(st.tuples(WRONG, st.integers(1, 4), st.integers(0, 3), st.booleans()), max_size=6)


@given(plans=PLANS)
def test_the_newest_of_those_that_fit_is_opened(gpu, bundle, tmp_path, product, plans):
    """Against the rule itself: whatever else lies there, and in whatever order it was written."""
    target = target_for(product)
    store = PlanStore(tmp_path / f"plans{next(_folders)}")
    fits = {}
    for wrong, batch, built, refit in plans:
        spec = PlanSpec(
            graph="denoise" if "graph" in wrong else GRAPH,
            graph_sha256="0" if "graph_sha256" in wrong else bundle.graph_sha256(GRAPH),
            backend="cpu" if "backend" in wrong else product.name,
            version="9" if "version" in wrong else target.version,
            architecture="sm120" if "architecture" in wrong else target.architecture,
            precision=bundle.precision,
            profile={"batch": [1, 1, batch], "tokens": [6, 6, 6]},
            flags={"refit": refit, "revision": REVISION + ("revision" in wrong)},
        )
        plan = store.write(spec, b"a plan", {"built": f"2026-11-2{built}"})
        fits.pop(plan.path, None)  # the same spec was written before
        if not wrong:
            fits[plan.path] = built, plan.path.name
    if fits:
        found = plan_for(bundle, bundle.graph(GRAPH), target, store)
        assert found.path == max(fits, key=fits.get)
    else:
        with pytest.raises(BackendError, match=rf"needs a plan of '{GRAPH}', and .*; build it: dnp build "):
            plan_for(bundle, bundle.graph(GRAPH), target, store)


def test_opening_takes_what_is_there_and_compiles_nothing(gpu, bundle, product, no_compiler):
    with pytest.raises(BackendError, match=rf"{product.name} needs a plan of 'encode_text', and there is none in \S+;"):
        opened(bundle, product.name)
    assert gpu.trt.built == 0
    assert not (bundle.path / "plans").exists()


def test_all_graphs_open_from_their_plans(gpu, bundle, product, monkeypatch):
    build_plans(bundle, product.name)
    for module in (tensorrt, build):
        monkeypatch.setattr(module, "compile_plan", None)
    for graph in bundle.graphs:
        with opened(bundle, product.name, graph) as session:
            assert session.limits.ranges.keys() == set(bundle.graph(graph).symbols)


@pytest.mark.parametrize("wrong", ["nothing", "version", "architecture", "damaged", "graph"])
def test_the_error_says_what_differs_and_its_command_heals_it(gpu, bundle, tmp_path, product, wrong, capsys):
    ranges = {"batch": Range(1, 2, 5), "windows": Range(1, 1, 2)}
    asked = BuildSettings(optimization_level=2)
    (plan,) = build_plans(bundle, product.name, graphs=[GRAPH], ranges=ranges, settings=asked)
    if wrong == "version":
        gpu.trt.__version__ = "0.0.1.fake"
    elif wrong == "architecture":
        gpu.sm = 120
    elif wrong == "damaged":
        plan.path.write_bytes(plan.path.read_bytes()[:-1] + b"?")
    elif wrong == "graph":
        files = {**bundle.files, f"graphs/{GRAPH}.onnx": replace(bundle.files[f"graphs/{GRAPH}.onnx"], sha256="0" * 64)}
        bundle = replace(bundle, files=files)
    else:
        gpu.trt.built = 0
        with opened(bundle, product.name) as session:
            assert session.limits.ranges["batch"] == ranges["batch"]
        assert gpu.trt.built == 0
        return
    there = {"tensorrt": "sm89 FAKE, no GPU", "tensorrt-rtx": "sm89"}[product.name]
    told = {
        "version": rf"those there do not fit \({plan.path.name}: version is 0\.0\.0\.fake, wanted is 0\.0\.1\.fake\)",
        "architecture": rf"{plan.path.name}: architecture is {there}, wanted is sm120",
        "damaged": rf"cannot be used: {plan.path.name} is damaged: its SHA-256 differs",
        "graph": rf"{plan.path.name}: graph_sha256 is \w+\.\.\., wanted is \w+\.\.\.",
    }[wrong]
    with pytest.raises(BackendError, match=told) as caught:
        opened(bundle, product.name)
    command = re.search(r"build it(?: again)?: (dnp build .*)$", str(caught.value))[1]
    for word in ("--optimization-level 2", "--batch 1:2:5", "--windows 1:1:2", f"--backend {product.name}"):
        assert word in command
    if wrong == "graph":
        return  # that bundle is on no disk
    assert run([*shlex.split(command)[1:], "--graph", GRAPH]) == 0
    with opened(bundle, product.name) as session:
        assert session.limits.ranges["batch"] == ranges["batch"]
    capsys.readouterr()


def test_what_lies_there_is_named_and_no_more_than_three_of_it(gpu, bundle):
    store = PlanStore(bundle.path / "plans")
    target = target_for(PRODUCTS["tensorrt-rtx"])
    spec = PlanSpec(GRAPH, "0", target.product.name, target.version, "sm75", "fp32", {}, {"revision": REVISION})
    for number in range(5):
        store.write(replace(spec, version=str(number)), b"a plan", {"built": str(number)})
    with pytest.raises(BackendError) as caught:
        opened(bundle)
    assert len(re.findall(r"encode_text-\w+\.plan: graph_sha256 is 0", str(caught.value))) == 3
    assert "; and 2 more); build it: dnp build" in str(caught.value)


def test_the_same_build_twice_builds_once_and_says_so(gpu, bundle, capsys):
    command = ["build", str(bundle.path), "--batch", "2"]
    assert run(command) == 0
    first = capsys.readouterr()
    assert first.err.count("compiling") == gpu.trt.built == len(bundle.graphs)
    assert run(command) == 0
    second = capsys.readouterr()
    assert gpu.trt.built == len(bundle.graphs)
    assert re.findall(r"dnp: (\w+): there already, \1-\w+\.plan", second.err) == list(bundle.graphs)
    assert second.out == first.out


def test_a_build_says_when_a_newer_plan_is_opened_instead(gpu, bundle, capsys):
    wide, narrow = (["build", str(bundle.path), "--graph", GRAPH, "--batch", size] for size in ("4", "2"))
    for command in (wide, narrow, wide):
        assert run(command) == 0
    told = capsys.readouterr().err
    (newer,) = re.findall(r"dnp: encode_text: (\S+) is newer, and opened instead; --prune removes it", told)
    with opened(bundle) as session:
        assert session.limits.ranges["batch"].high == 2
    assert run([*wide, "--prune"]) == 0
    assert f"dnp: removed {newer}" in capsys.readouterr().err
    with opened(bundle) as session:
        assert session.limits.ranges["batch"].high == 4


def test_a_plan_for_other_cards_is_none_and_one_for_several_serves_each(gpu, bundle):
    build_plans(bundle, graphs=[GRAPH], settings=BuildSettings(sm=(86, 120)))
    build_plans(bundle, graphs=[GRAPH], settings=BuildSettings(sm=(75,)))  # newer
    for sm in (86, 120):
        gpu.sm = sm
        opened(bundle).close()
    gpu.sm = 89
    told = r"architecture is sm75, wanted is sm89; .*architecture is sm86,sm120, wanted is sm89"
    with pytest.raises(BackendError, match=told):
        opened(bundle)


def test_a_size_that_the_plan_lacks_names_the_command_that_widens_it(gpu, bundle, tmp_path):
    folder = tmp_path / "plans"
    ranges = {"batch": Range(1, 1, 2), "height": Range(32, 32, 48)}
    build_plans(bundle, graphs=["denoise"], ranges=ranges, settings=BuildSettings(refit=True), folder=folder)
    with opened(bundle, graph="denoise", plans=folder) as session:
        session.limits.check(height=8, rows=4)
        told = "compiled for rows 1:2:4, not for 5 and height 8:8:12, not for 14; build a wider one: "
        with pytest.raises(SettingsError, match=told) as caught:
            session.limits.check(rows=5, height=14, width=8)
    command = str(caught.value).split("build a wider one: ")[1]
    assert run([*shlex.split(command)[1:], "--graph", "denoise"]) == 0
    with opened(bundle, graph="denoise", plans=folder) as session:
        session.limits.check(rows=5, height=14, width=8, steps=128)
        session.check_refit()


def test_doctor_compiles_its_own_graph_where_it_is(gpu):
    reports = {report.name: report for report in doctor()}
    assert [reports[name].why_not for name in sorted(PRODUCTS)] == ["", ""]
    assert gpu.trt.built == 2
    assert reports["tensorrt"].hardware.startswith("FAKE")
