"""AUTOMATIC1111's API as three clients use it: the calls are those in their sources, one after the other."""

from __future__ import annotations

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from served import PROMPT, SLOW, serving

from dnp import Pipeline
from dnp.runtime.sampling.samplers import sampler_names
from dnp.serving.sdapi import SAMPLERS
from dnp.serving.settings import ServerSettings

TXT2IMG = "/sdapi/v1/txt2img"


def pixels(b64: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB"))


def test_sillytavern(served):
    """``src/endpoints/stable-diffusion.js``: ping, lists, model, generate; the image is the one that Python gives."""
    options = served.get("/sdapi/v1/options").json()
    assert "forge_preset" not in options  # it would be taken for Forge
    names = {
        what: [one["name"] for one in served.get(f"/sdapi/v1/{what}").json()] for what in ("samplers", "schedulers")
    }
    assert "Euler a" in names["samplers"] and "karras" in names["schedulers"]
    assert [served.get(f"/sdapi/v1/{what}").json() for what in ("upscalers", "latent-upscale-modes", "sd-vae")] == [
        []
    ] * 3
    (model,) = [one["title"] for one in served.get("/sdapi/v1/sd-models").json()]
    assert served.post("/sdapi/v1/options", {"sd_model_checkpoint": model}).status_code == 200
    progress = served.get("/sdapi/v1/progress").json()
    assert progress["progress"] == 0.0 and progress["state"]["job_count"] == 0
    body = {
        "url": served.url, "auth": "", "prompt": PROMPT, "negative_prompt": "a small circle", "scheduler": "karras",
        "sampler_name": "DPM++ 2M", "steps": 3, "cfg_scale": 2, "width": 64, "height": 64, "restore_faces": False,
        "enable_hr": False, "hr_upscaler": "Latent", "hr_scale": 1, "hr_additional_modules": [],
        "denoising_strength": 0.7,
        "hr_second_pass_steps": 0, "seed": 5, "override_settings": {"CLIP_stop_at_last_layers": 1},
        "override_settings_restore_afterwards": True, "clip_skip": 1, "save_images": True, "send_images": True,
    }  # fmt: skip
    (image,) = served.post(TXT2IMG, body).json()["images"]
    with Pipeline.open(threads=1) as pipeline:
        result = pipeline(
            PROMPT,
            negative="a small circle",
            sampler="dpmpp_2m_karras",
            steps=3,
            guidance=2,
            width=64,
            height=64,
            seed=5,
        )
    np.testing.assert_array_equal(pixels(image), result.arrays[0])


def test_open_webui(served):
    """``routers/images.py``: the model by options, ``sd-models`` by title and name, ``txt2img`` with a batch."""
    options = served.get("/sdapi/v1/options").json()
    assert served.post("/sdapi/v1/options", {**options, "sd_model_checkpoint": "dnp-tiny"}).status_code == 200
    assert all(one["title"] and one["model_name"] for one in served.get("/sdapi/v1/sd-models").json())
    answer = served.post(TXT2IMG, {"prompt": PROMPT, "batch_size": 2, "width": 64, "height": 64, "steps": 2})
    assert [pixels(image).shape for image in answer.json()["images"]] == [(64, 64, 3)] * 2
    assert json.loads(answer.json()["info"])["all_negative_prompts"][0]  # nobody wrote one, so DNS found n*


def test_librechat(served):
    """It reads seed, size and infotexts from ``info``, which is a string."""
    body = {
        "prompt": PROMPT, "negative_prompt": "", "cfg_scale": 4.5, "steps": 2, "width": 64, "height": 64, "seed": 11,
        "sampler_name": "Euler a",
    }  # fmt: skip
    info = json.loads(served.post(TXT2IMG, body).json()["info"])
    assert (info["seed"], info["width"], info["height"], info["sampler_name"]) == (11, 64, 64, "Euler a")
    (text,) = info["infotexts"]
    assert text.startswith(
        f"{PROMPT}\nNegative prompt: {info['negative_prompt']}\nSteps: 2, Sampler: Euler a, CFG scale: 4.5"
    )
    assert "Seed: 11, Size: 64x64, Model: dnp-tiny" in text


def test_every_sampler_has_a_name_there():
    assert sorted(SAMPLERS.values()) == sorted(sampler_names())


def test_each_caller_has_progress_and_a_stop_button_of_its_own(go_on):
    """Told apart by their keys: what one stops, and what it sees, is its own."""
    with (
        serving(ServerSettings(keys=("key-of-one", "key-of-two"), sdapi=True)) as served,
        ThreadPoolExecutor() as pool,
    ):
        one, two = ({"Authorization": f"Bearer key-of-{name}"} for name in ("one", "two"))
        body = {"prompt": PROMPT, "steps": 60, "negative_prompt": "x"}
        of_one = pool.submit(served.http.post, TXT2IMG, json=body, headers=one)
        served.until(lambda: served.get("/sdapi/v1/progress", headers=one).json()["progress"] > 0)
        of_two = pool.submit(served.http.post, TXT2IMG, json=body, headers=two)
        served.until(lambda: served.get("/sdapi/v1/progress", headers=two).json()["state"]["job_count"] == 1)
        assert served.get("/sdapi/v1/progress", headers=one).json()["state"]["job_count"] == 1
        stopped = served.http.post("/sdapi/v1/interrupt", headers=one, json={})
        assert stopped.json() == {"interrupted": 1}
        go_on()
        assert (of_one.result().status_code, of_one.result().json()["error"]["code"]) == (409, "cancelled")
        assert len(of_two.result().json()["images"]) == 1
        assert served.http.post("/sdapi/v1/interrupt", headers=one, json={}).json() == {"interrupted": 0}


def test_a_choice_of_model_is_the_callers_own():
    with serving(ServerSettings(keys=("key-of-one", "key-of-two"), sdapi=True, aliases=()), warm=False) as served:
        one = {"Authorization": "Bearer key-of-one"}
        unknown = served.http.post("/sdapi/v1/options", json={"sd_model_checkpoint": "v1-5"}, headers=one)
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


def test_it_is_there_only_where_it_is_asked_for():
    with serving(warm=False) as served:
        assert served.get("/sdapi/v1/options").status_code == 404
        assert served.post(TXT2IMG, SLOW).status_code == 404


@pytest.mark.parametrize("name", ["DPM++ 2M", "dpmpp_2m"])
def test_samplers_by_either_name(served, name):
    body = {
        "prompt": PROMPT,
        "negative_prompt": "x",
        "steps": 2,
        "seed": 1,
        "sampler_name": name,
        "scheduler": "Automatic",
    }
    assert served.post(TXT2IMG, body).status_code == 200
