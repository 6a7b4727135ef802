"""benchmarks/speed: the worker on our own backend, the arithmetic of its figures, the rendering. No time is judged."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

REPOSITORY = Path(__file__).parents[1]
FOLDER = REPOSITORY / "benchmarks" / "speed"
sys.path.append(str(FOLDER))  # its files are scripts, and import each other as such

import contenders  # noqa: E402
import measure  # noqa: E402
import render  # noqa: E402
import summary  # noqa: E402
import tables  # noqa: E402
from job import Job, Point  # noqa: E402
from prepare import MODELS, _last_error, use_published_names  # noqa: E402

STEPS = 2


def job(tmp_path: Path, **changes) -> Job:
    model = MODELS["default"]
    wanted = Job(
        contender="dnp-cpu",
        model="",
        captioner=str(model.captioner),
        converted=str(tmp_path),
        bundle=str(model.bundle),
        plans=str(tmp_path),
        threads=1,
        prompt="a large blue cross on a plain red background",
        pixels=64,
        steps=STEPS,
        warmups=0,
        points=(Point(2, STEPS, 32),),
        picture=str(tmp_path / "picture-dnp-cpu.npy"),
    )
    return wanted.with_(**changes)


def plan(tmp_path: Path) -> measure.Plan:
    return measure.Plan(MODELS["default"], job(tmp_path), rounds=1, points=(Point(2, STEPS, 32),))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Measured: our backend, the network alone, and a contender that cannot run this model."""
    folder = tmp_path_factory.mktemp("speed")
    asked = measure.Plan(MODELS["default"], job(folder), rounds=2, points=(Point(2, STEPS, 32),))
    found: dict = {}
    measure.measure(asked, ["stable-diffusion-cpp", "dnp-cpu", "network-onnxruntime"], found.update)
    machine = {
        "processor": "a processor", "cores": 1, "memory_bytes": 1 << 30, "system": "a system", "python": "3",
        "load_before": 0.0, "made": "2026-01-01",
    }  # fmt: skip
    told = {"size": "default", "title": MODELS["default"].title, "settings": measure.settings(asked)}
    return json.loads(json.dumps({**told, "machine": machine, "command": "make bench", "seconds": 1.0, **found}))


def test_the_worker_tells_everything(report):
    first, second = summary.runs(report, "dnp-cpu")
    for kind in ("versions", "import", "open", "first", "image", "dnp", "memory"):
        assert len(summary.events(first, kind)) == len(summary.events(second, kind)) == 1
    assert [(p["batch"], p["pixels"]) for p in summary.points(report, "dnp-cpu")] == [(2, 32)]
    assert not summary.events(second, "point")  # once is enough
    (dnp,) = summary.events(first, "dnp")
    assert len(dnp["marks"]) == len(dnp["marks_inside"]) == 2 * STEPS
    assert len(summary.steps_of(dnp, STEPS)) == 2
    assert dnp["negative"] == summary.events(second, "dnp")[0]["negative"] != ""
    assert 0.0 < dnp["inside"] < dnp["seconds"]
    for kind in ("step", "image", "dnp"):
        assert 0.0 <= summary.share(report, "dnp-cpu", kind).median < 1.0
    assert summary.figure(report, "dnp-cpu", "memory").low > 0


def test_the_network_alone_has_only_steps(report):
    assert summary.figure(report, "network-onnxruntime", "step").rounds == 2
    assert summary.figure(report, "network-onnxruntime", "image") is None
    assert summary.ratio(report, "network-onnxruntime", "dnp", "dnp-cpu") is None


def test_who_cannot_run_is_a_row_with_the_reason(report):
    row = next(line for line in tables.works(report).splitlines() if "stable-diffusion.cpp" in line)
    assert "published architectures only" in row
    assert row.count("|") == tables.works(report).splitlines()[0].count("|")
    assert not summary.runs(report, "stable-diffusion-cpp")


def test_a_contender_that_breaks_is_left_out_of_later_rounds(tmp_path, monkeypatch):
    entry = contenders.Entry("broken", "cannot open its model", "main", "ours:Ours", {"backend": "cpu"})
    monkeypatch.setitem(contenders.CONTENDERS, "dnp-cpu", entry)
    asked = measure.Plan(MODELS["default"], job(tmp_path, bundle=str(tmp_path / "nothing")), rounds=3)
    found: dict = {}
    measure.measure(asked, ["dnp-cpu"], found.update)
    assert len(found["runs"]) == 1
    assert "BundleError" in found["contenders"]["dnp-cpu"]["reason"]


def test_a_worker_that_dies_or_hangs_is_told_of(tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\ncat > /dev/null\necho last words >&2\nkill -9 $$\n")
    script.chmod(0o755)
    assert measure.failure(measure.run_worker(script, job(tmp_path), 60)) == "ended by signal 9: last words"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    assert measure.failure(measure.run_worker(script, job(tmp_path), 0.1)).startswith("not done after")
    assert "cannot be started" in measure.failure(measure.run_worker(tmp_path / "absent", job(tmp_path), 1))


def test_arithmetic_the_processor_lacks_is_capped_or_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "processor_flags", lambda: {"avx2"})
    asked, reason = measure.job_of(plan(tmp_path), "diffusers-bf16")
    assert (asked.works, asked.steps, reason) == (("steps",), measure.CAPPED_STEPS, "")
    large = measure.Plan(MODELS["sd15"], job(tmp_path), rounds=1)
    assert "none of avx512_bf16, amx_bf16" in measure.job_of(large, "diffusers-bf16")[1]
    monkeypatch.setattr(measure, "processor_flags", lambda: {"amx_bf16"})
    assert measure.job_of(large, "diffusers-bf16")[0].works == ("image", "dnp")


def test_every_contender_can_be_named():
    for name, entry in contenders.CONTENDERS.items():
        assert entry.environment == "main" or (FOLDER / "requirements" / f"{entry.environment}.txt").is_file()
        assert issubclass(entry.type(), object), name  # nothing that a contender needs is imported before `load`
        assert not entry.converted or entry.converted in contenders.FORMATS


def test_a_job_survives_the_way_to_its_worker(tmp_path):
    assert Job.from_json(job(tmp_path).to_json()) == job(tmp_path)


def test_rounds_are_rotated():
    names = ["a", "b", "c"]
    assert [measure.rotated(names, turn) for turn in range(4)] == [[*"abc"], [*"bca"], [*"cab"], [*"abc"]]
    assert measure.rotated([], 1) == []


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9))
def test_a_spread_is_ordered(values):
    found = summary.Spread.of(values)
    assert found.low <= found.median <= found.high
    assert found.rounds == len(values)


@given(st.floats(-3, 3), st.floats(1e-3, 1e3))
def test_an_exponent_is_found_again(power, scale):
    xs = [1.0, 2.0, 4.0, 8.0]
    assert summary.exponent(xs, [scale * x**power for x in xs]) == pytest.approx(power, abs=1e-9)


def test_steps_are_told_apart_from_what_lies_between_passes():
    assert summary.steps_of({"marks": [1.0, 3.0, 10.0, 13.0]}, 2) == [2.0, 3.0]
    with pytest.raises(ValueError, match="3 steps were marked"):
        summary.steps_of({"marks": [1.0, 3.0, 10.0]}, 2)


def made_up(first: float, other: float) -> dict:
    """A report of two contenders whose rounds are ``first`` and ``other`` times 1, 2 and 4 seconds."""
    runs = [
        {
            "contender": name,
            "round": turn,
            "events": [{"event": "image", "seconds": scale * s, "marks": [0, scale * s]}],
        }
        for name, scale in (("diffusers", first), ("dnp-cpu", other))
        for turn, s in enumerate((4, 1, 2))
    ]
    row = {"works": ["image"], "steps": 2, "reason": "", "agreement": None}
    told = {name: dict(row) for name in ("diffusers", "dnp-cpu")}
    return {"settings": {"steps": 2}, "contenders": told, "runs": runs}


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_medians_and_ratios(first, other):
    found = made_up(first, other)
    assert summary.figure(found, "dnp-cpu", "step") == summary.Spread(2 * other, other, 4 * other, 3)
    assert summary.ratio(found, "dnp-cpu", "image", "diffusers") == pytest.approx(other / first)
    assert summary.ratio(found, "diffusers", "step", "diffusers") == 1.0


def test_a_contender_that_was_capped_is_summed_up_by_its_own_steps():
    found = made_up(1, 1)
    found["contenders"]["diffusers"]["steps"] = 3
    for run in found["runs"][:3]:
        run["events"][0]["marks"] = [0.0, 5.0, 10.0]
    assert summary.figure(found, "diffusers", "step").median == 5
    assert summary.figure(found, "dnp-cpu", "step").median == 2


def test_a_series_is_along_the_longest_line():
    point = {"seconds": 1.0, "step": 1.0}
    found = [{"batch": b, "steps": s, "pixels": 64, **point} for b, s in ((1, 4), (2, 4), (4, 4), (1, 8), (1, 16))]
    assert [p["batch"] for p in summary.series(found, "batch")] == [1, 2, 4]
    assert [p["steps"] for p in summary.series(found, "steps")] == [4, 8, 16]
    assert summary.series(found, "pixels") == []


def test_pictures_are_compared(tmp_path):
    import numpy as np

    one, two = tmp_path / "one.npy", tmp_path / "two.npy"
    np.save(one, np.zeros((2, 2, 3), np.uint8))
    np.save(two, np.full((2, 2, 3), 255, np.uint8))
    assert measure.agreement(one, one) == {"levels": 0.0, "psnr": None}
    assert measure.agreement(one, two) == {"levels": 255.0, "psnr": 0.0}
    assert measure.agreement(one, tmp_path / "absent.npy") is None


def test_rendering_is_the_same_again_and_leaves_the_rest_alone(report, tmp_path):
    reports = [report]
    assert render.page(reports) == render.page(copy.deepcopy(reports))
    page = f"before\n{render.MARKERS[0]}\nold\n{render.MARKERS[1]}\nafter\n"
    written = render.between_markers(page, render.section(reports))
    assert written == render.between_markers(written, render.section(reports))
    assert written.startswith("before\n") and written.endswith("\nafter\n") and "old" not in written
    with pytest.raises(ValueError, match="once each"):
        render.between_markers("no markers", "")


def test_page_and_tables_say_what_the_results_say():
    text, reports = render.PAGE.read_text(encoding="utf-8"), render.read(render.RESULTS)
    assert render.between_markers(text, render.section(reports)) == text
    assert not reports or (render.RESULTS / "speed.md").read_text(encoding="utf-8") == render.page(reports)


def test_results_are_rendered_whole(report, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "speed-default.json").write_text(json.dumps(report))
    page = tmp_path / "page.md"
    page.write_text("\n".join(render.MARKERS))
    render.render(tmp_path, page)
    picture = (tmp_path / "speed-default.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    render.render(tmp_path, page)
    assert (tmp_path / "speed-default.png").read_bytes() == picture
    assert "dnp-engine, `cpu`" in page.read_text() and "dnp-engine, `cpu`" in (tmp_path / "speed.md").read_text()


def test_the_published_names_are_put_back(tmp_path):
    import numpy as np
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "model.safetensors"
    save_file({"encoder.a": np.zeros(1, np.float16), "text_model.b": np.ones(1, np.float16)}, path)
    use_published_names(path)
    use_published_names(path)
    assert set(load_file(path)) == {"text_model.encoder.a", "text_model.b"}


def test_the_reason_is_the_line_that_says_it():
    assert _last_error("WARNING: an error is near\nERROR: no such package\n") == "ERROR: no such package"
    assert _last_error("") == "nothing was said"


def test_the_command_explains_itself():
    done = subprocess.run(
        [sys.executable, str(FOLDER / "bench.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert "--rounds" in done.stdout
