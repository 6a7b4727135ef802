"""``dnp bench-serve``: its arithmetic, and a run against a server."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from served import QUICK

from dnp.cli import run
from dnp.engine.errors import SettingsError
from dnp.serving.load import bodies, percentile, read_mix


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.sampled_from([1, 50, 95, 99, 100]))
def test_percentiles_are_numpys(values, share):
    assert percentile(sorted(values), share) == np.percentile(values, share, method="inverted_cdf")


def test_the_same_seed_draws_the_same_requests():
    mix = {"prompt": ["a", "b"], "steps": [1, 2, 3]}
    first, again, other = (list(islice(bodies(mix, seed), 50)) for seed in (1, 1, 2))
    assert first == again != other
    assert {body["prompt"] for body in first} == {"a", "b"} and len({body["seed"] for body in first}) == 50


def test_a_mix_is_lists(tmp_path):
    for text in ("[]", "{", '{"steps": 3}', '{"steps": []}'):
        (tmp_path / "mix.json").write_text(text)
        with pytest.raises(SettingsError, match="mix"):
            read_mix(tmp_path / "mix.json")


def test_a_run_counts_answers_and_errors_by_kind(served, tmp_path, capsys):
    """Half of these requests ask for nothing that there is."""
    mix = {**{name: [value] for name, value in QUICK.items() if name != "seed"}, "sampler": ["ddim", "nonsense"]}
    (tmp_path / "mix.json").write_text(json.dumps(mix))
    command = ["bench-serve", served.url, "--clients", "2", "--rate", "1000", "--requests", "12", "--deadline", "1e-6"]
    command += ["--mix", str(tmp_path / "mix.json"), "--plot", str(tmp_path / "plot.png"), "--json"]
    assert run(command) == 0
    report = json.loads(capsys.readouterr().out)
    bad = sum(body["sampler"] == "nonsense" for body in islice(bodies(mix, 0), 12))
    assert 0 < bad < 12
    for load in report["loads"]:
        assert (load["requests"], load["answered"]) == (12, 12 - bad)
        assert load["errors"] == {"invalid_value": bad}
        assert load["images_per_second"] > 0 and load["goodput"] == load["within"] == 0
        assert load["latency"]["p50"] <= load["latency"]["p95"] <= load["latency"]["max"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_server_that_is_not_there(capsys):
    assert run(["bench-serve", "http://127.0.0.1:9", "--clients", "1", "--requests", "2"]) == 1
    assert "ConnectError" in capsys.readouterr().out


@pytest.mark.slow
def test_the_parts_of_a_lone_request_are_all_of_it(tmp_path):
    """Measured by ``benchmarks/serving.py share``, of a server in a process of its own."""
    script = Path(__file__).parents[1] / "benchmarks" / "serving.py"
    command = [sys.executable, script, "share", "--requests", "1", "--threads", "1", "--out", tmp_path]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for parts in json.loads((tmp_path / "share.json").read_text())["milliseconds"].values():
        assert all(milliseconds > 0 for milliseconds in parts.values())
        own = sum(parts[name] for name in ("read", "resolve", "engine and back", "answer", "wire"))
        assert parts["own"] == pytest.approx(own, abs=0.1)
        assert parts["whole"] == pytest.approx(own + parts["engine"] + parts["png"], abs=0.1)
