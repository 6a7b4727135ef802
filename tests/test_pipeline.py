"""The whole request through the public Python API."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

import dnp
from dnp.engine.errors import Cancelled, DnpError, SettingsError
from dnp.runtime.pictures import png
from dnp.runtime.pipeline.pipeline import drive
from dnp.runtime.request import Request

PROMPT = "a large red circle left of a small blue square on a plain yellow background"
QUICK = {"steps": 3, "dns_steps": 2}


@pytest.fixture(scope="module")
def pipeline():
    return dnp.Pipeline.open()


def test_public_names_are_the_documented_ones():
    for name in dnp.__all__:
        assert getattr(dnp, name) is not None
    assert dir(dnp) == dnp.__all__
    with pytest.raises(AttributeError):
        dnp.nonsense  # noqa: B018


def test_a_call_returns_everything(pipeline):
    result = pipeline(PROMPT, seed=0, compare=True, images=2, **QUICK)
    size = pipeline.bundle.latents.height * pipeline.bundle.latents.vae_scale_factor
    for arrays in (result.arrays, result.dns_arrays, result.plain_arrays):
        assert arrays.shape == (2, size, size, 3)
        assert arrays.dtype == np.uint8
    assert [image.size for image in result.images] == [(size, size)] * 2
    assert len(result.negatives) == 2
    assert all(result.negatives)
    assert {"dns", "caption", "plain", "final", "decode", "total"} <= set(result.seconds)
    assert sum(v for k, v in result.seconds.items() if k != "total") <= result.seconds["total"]
    unsaid = {name for name, value in dataclasses.asdict(result.request).items() if value is None}
    assert unsaid == {"negative", "spacing", "dns_spacing"}


def test_the_same_settings_give_the_same_bits(pipeline):
    first = pipeline(PROMPT, seed=1, **QUICK)
    pipeline("a small green triangle on a striped red background", seed=9, images=3, **QUICK)
    again = dnp.Pipeline.open().run(Request.from_dict(json.loads(json.dumps(first.request.to_dict()))))
    assert np.array_equal(first.arrays, again.arrays)
    assert first.negatives == again.negatives
    assert png(first.images[0], {"a": 1}) == png(again.images[0], {"a": 1})


def test_the_pair_is_what_a_person_would_give_by_hand(pipeline):
    """DNP is its caption used as a negative prompt, and nothing else: both passes start from the same noise."""
    found = pipeline(PROMPT, seed=2, **QUICK)
    given = pipeline(PROMPT, seed=2, negative=found.negatives[0], **QUICK)
    assert np.array_equal(found.arrays, given.arrays)
    assert given.dns_arrays is None
    assert "dns" not in given.seconds


def test_plain_guidance_has_the_empty_negative(pipeline):
    compared = pipeline(PROMPT, seed=3, compare=True, **QUICK)
    plain = pipeline(PROMPT, seed=3, dnp=False, **QUICK)
    assert np.array_equal(compared.plain_arrays, plain.arrays)
    assert plain.negatives == [""]


def test_dns_with_negated_guidance_is_plain(pipeline):
    """The sign of the guidance is data: DNS at s = −w is plain guidance at w."""
    dns = pipeline.dns(PROMPT, seed=4, dns_steps=3, dns_guidance=-4.0)
    plain = pipeline(PROMPT, seed=4, dnp=False, steps=3, guidance=4.0, sampler=dns.request.dns_sampler)
    assert np.array_equal(dns.arrays, plain.arrays)


def test_a_guidance_schedule_is_a_column(pipeline):
    one = pipeline(PROMPT, dnp=False, steps=3, guidance=4.0)
    many = pipeline(PROMPT, dnp=False, steps=3, guidance=[4.0, 4.0, 4.0])
    other = pipeline(PROMPT, dnp=False, steps=3, guidance=[4.0, 0.0, 4.0])
    assert np.array_equal(one.arrays, many.arrays)
    assert not np.array_equal(one.arrays, other.arrays)


def test_a_callback_sees_every_step_in_order(pipeline):
    steps = []
    pipeline(PROMPT, progress=steps.append, compare=True, sampler="ddim", dns_sampler="ddim", **QUICK)
    phases = [step.phase for step in steps]
    assert [p for i, p in enumerate(phases) if i == 0 or phases[i - 1] != p] == ["dns", "caption", "plain", "final"]
    for phase, total in (("dns", 2), ("plain", 3), ("final", 3)):
        assert [(s.index, s.total) for s in steps if s.phase == phase] == [(i + 1, total) for i in range(total)]


@pytest.mark.parametrize("phase", ["dns", "caption", "plain", "final"])
def test_a_callback_cancels_within_a_step(pipeline, phase):
    seen = []

    def stop(step):
        seen.append(step.phase)
        return step.phase != phase

    with pytest.raises(Cancelled, match=phase):
        pipeline(PROMPT, progress=stop, compare=True, **QUICK)
    assert seen.count(phase) == 1
    assert pipeline(PROMPT, **QUICK).images  # and the pipeline is free again


def test_a_callback_that_raises_frees_the_pipeline(pipeline):
    def fail(step):
        raise LookupError("of the caller")

    with pytest.raises(LookupError) as kept:
        pipeline(PROMPT, progress=fail, **QUICK)
    assert kept.value.__traceback__ is not None  # which holds every frame of the call
    assert pipeline(PROMPT, **QUICK).images


def test_opening_is_counted_once():
    fresh = dnp.Pipeline.open()
    first, second = fresh(PROMPT, **QUICK).seconds, fresh(PROMPT, **QUICK).seconds
    assert first["open"] > second["open"]
    assert first["total"] >= sum(v for k, v in first.items() if k != "total")


def test_an_empty_prompt_is_n_alone_beside_a_negative_prompt(pipeline):
    alone = pipeline("", negative="a small circle", seed=1, **QUICK)
    request = Request(PROMPT, seed=1, **QUICK)
    assert np.array_equal(alone.arrays, drive(pipeline.sample([""], ["a small circle"], request)))
    assert not np.array_equal(alone.arrays, pipeline(PROMPT, negative="a small circle", seed=1, **QUICK).arrays)


def test_an_empty_caption_is_no_negative_prompt(pipeline, monkeypatch):
    def silent(*_, **__):
        return [""]
        yield

    monkeypatch.setattr(pipeline.graphs.captioner, "steps", silent)
    with pytest.raises(DnpError, match="min_length"):
        pipeline(PROMPT, **QUICK)


def test_previews_become_the_image(pipeline):
    previews = []
    result = pipeline(
        PROMPT, dnp=False, steps=4, progress=lambda step: previews.append(step.preview()) if step.index else None
    )
    distances = [np.abs(preview.astype(int) - result.arrays).mean() for preview in previews]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1 < 5 < distances[0]  # this sampler ends a little short of the clean latents


def test_a_dropped_generator_frees_the_pipeline(pipeline):
    steps = pipeline.steps(Request(PROMPT))
    next(steps)
    with pytest.raises(DnpError, match="busy"):
        pipeline(PROMPT, **QUICK)
    steps.close()
    assert pipeline(PROMPT, **QUICK).images


def test_two_pipelines_run_side_by_side(pipeline):
    expected = pipeline(PROMPT, seed=5, **QUICK).arrays
    results = {}

    def work(number):
        results[number] = dnp.Pipeline.open()(PROMPT, seed=5, **QUICK).arrays

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(results[i], expected) for i in range(2))


def test_larger_requests_are_cut_into_batches(pipeline):
    many = pipeline(PROMPT, images=9, dnp=False, steps=1)
    ninth = pipeline(PROMPT, seed=8, dnp=False, steps=1)
    assert many.arrays.shape[0] == 9
    assert np.abs(many.arrays[8].astype(int) - ninth.arrays[0]).max() <= 1


def test_other_sizes(pipeline):
    latents = pipeline.bundle.latents
    grain = latents.multiple * latents.vae_scale_factor
    result = pipeline(PROMPT, height=2 * grain, width=5 * grain, **QUICK)
    assert result.arrays.shape == (1, 2 * grain, 5 * grain, 3)
    assert result.negatives[0]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": " \n"}, "empty"),
        ({"prompt": b"bytes"}, "text"),
        ({"prompt": None}, "text"),
        ({"prompt": "\ud800"}, "ud800"),
        ({"prompt": "x" * 10**7}, "characters"),
        ({"steps": 0}, "steps"),
        ({"steps": -1}, "steps"),
        ({"steps": 10**6}, "1000000"),
        ({"steps": 2.5}, "2.5"),
        ({"dns_steps": 0}, "steps"),
        ({"guidance": float("nan")}, "nan"),
        ({"guidance": float("inf")}, "inf"),
        ({"guidance": [1.0, float("-inf")]}, "inf"),
        ({"guidance": "strong"}, "strong"),
        ({"guidance": 10**400}, "finite"),
        ({"guidance": 1j}, "1j"),
        ({"dnp": False, "dns_steps": -7}, "DNS pass: .*-7"),
        ({"dnp": False, "dns_eta": float("nan")}, "nan"),
        ({"dns_guidance": float("nan")}, "nan"),
        ({"height": 63}, "63"),
        ({"height": 0}, "height"),
        ({"width": -64}, "-64"),
        ({"width": 10**9}, "1000000000"),
        ({"sampler": "eular"}, "euler"),
        ({"sampler": 3}, "3"),
        ({"spacing": "odd"}, "odd"),
        ({"eta": 2.0}, "eta"),
        ({"seed": -1}, "-1"),
        ({"seed": True}, "True"),
        ({"seed": 2**70}, "seed .* huge"),
        ({"steps": 10**5000}, "huge"),
        ({"images": 10**5000}, "huge"),
        ({"images": 0}, "images"),
        ({"images": 10**6}, "1000000"),
        ({"beams": 0}, "beams"),
        ({"max_length": 10**6}, "1000000"),
        ({"negative": ""}, "empty"),
        ({"negative": "x", "dnp": False}, "DNP"),
        ({"dnp": "yes"}, "yes"),
        ({"prompts": "x"}, "prompt"),
    ],
)
def test_bad_settings_are_refused_before_any_work(pipeline, settings, word):
    steps = []
    with pytest.raises(SettingsError, match=word):
        pipeline.run(Request.from_dict({"prompt": PROMPT, **settings}), steps.append)
    assert not steps


def test_equal_settings_are_tabled_once(pipeline):
    """Whatever else differs; and what is another value in another type stays one."""
    first = pipeline.resolve(Request(PROMPT, seed=1, steps=1, guidance=[2.0], dns_guidance=0.0))
    again = pipeline.resolve(Request("a cross", seed=2, steps=1, guidance=(2,), dns_guidance=0, compare=True))
    assert again.final is first.final and again.dns is first.dns
    for settings in ({"steps": 2}, {"guidance": 3.0}, {"sampler": "euler"}):
        other = pipeline.resolve(Request(PROMPT, **{"steps": 1, "guidance": 2.0, **settings}))
        assert not np.array_equal(other.final.rows, first.final.rows)
    for settings in ({"steps": True}, {"steps": 1, "eta": False}):  # which equal 1 and 0.0
        with pytest.raises(SettingsError, match=list(settings)[-1]):
            pipeline.resolve(Request(PROMPT, guidance=2.0, **settings))


def test_numbers_of_numpy_are_numbers(pipeline):
    given = {
        "seed": np.int64(4),
        "steps": np.int32(2),
        "guidance": np.array(3.0),
        "dnp": np.False_,
        "eta": np.float32(0),
    }
    ours = pipeline(PROMPT, **given)
    assert json.loads(json.dumps(ours.request.to_dict())) == ours.request.to_dict()
    theirs = pipeline(PROMPT, seed=4, steps=2, guidance=3.0, dnp=False)
    assert np.array_equal(ours.arrays, theirs.arrays)
    long = pipeline(PROMPT, seed=4, steps=2, guidance=np.longdouble(3), eta=np.longdouble(0), dnp=False)
    assert np.array_equal(long.arrays, theirs.arrays)
    with pytest.raises(Cancelled):
        pipeline(PROMPT, steps=2, dnp=False, progress=lambda step: np.False_)


@pytest.mark.parametrize("images", [[np.zeros((8, 8, 3), np.uint8)], ["picture.png"]])
def test_what_is_no_picture_is_not_captioned(pipeline, images):
    with pytest.raises(SettingsError, match=r"PIL\.Image"):
        pipeline.caption(images)
    with pytest.raises(SettingsError, match="beams"):
        pipeline.caption([], beams=-1)
    with pytest.raises(SettingsError, match="list"):
        pipeline.caption(Image.new("RGB", (9, 9)))
    assert len(pipeline.caption(Image.new("RGB", (9, 9)) for _ in range(2))) == 2


def test_a_prompt_is_no_request(pipeline):
    with pytest.raises(SettingsError, match="str"):
        pipeline.run(PROMPT)


def test_a_closed_pipeline_says_so():
    with dnp.Pipeline.open() as pipeline:
        assert pipeline(PROMPT, **QUICK).negatives
        steps = pipeline.steps(Request(PROMPT, dnp=False, steps=2))
        next(steps)
        with pytest.raises(DnpError, match="busy"):
            pipeline.close()
        steps.close()
        step = next(steps := pipeline.steps(Request(PROMPT, dnp=False, steps=2)))
        steps.close()
    with pytest.raises(DnpError, match="closed"):
        step.preview()
    with pytest.raises(DnpError, match="closed"):
        pipeline(PROMPT, **QUICK)
    for use in (pipeline.warm_up, pipeline.__enter__, lambda: pipeline.caption([])):
        with pytest.raises(DnpError, match="closed"):
            use()
    pipeline.close()  # does nothing


def test_latents_that_overflow_are_a_named_error(pipeline):
    with pytest.raises(DnpError, match="guidance"):
        pipeline(PROMPT, dnp=False, steps=3, guidance=1e38)


def test_generating_needs_no_torch_and_no_network(tmp_path):
    """In a process of its own: what is imported, and whether anything opens a socket."""
    code = f"""
import sys, socket
def refuse(*a, **k): raise AssertionError("network")
socket.socket = refuse; socket.create_connection = refuse; socket.getaddrinfo = refuse
import dnp
before = set(sys.modules)
assert "numpy" not in before, "import dnp is light"
r = dnp.Pipeline.open()({PROMPT!r}, steps=1, dns_steps=1)
heavy = {{"torch", "diffusers", "transformers", "onnx", "scipy", "huggingface_hub"}} & set(sys.modules)
assert not heavy, heavy
print(r.negatives[0])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
