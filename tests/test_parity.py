"""The default model against the libraries that define it: the same weights, noise and settings in diffusers."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from dnp.engine import open_session
from dnp.runtime.denoise import Sample, denoise, load_samples
from dnp.runtime.samplers import sampler_table
from dnp.runtime.schedule import NoiseSchedule
from dnp.runtime.tokenizer import PromptTokenizer

# diffusers mixes numpy and torch in a way that numpy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

STEPS = 20
PROMPT = "a large red circle left of a small blue square on a plain yellow background"

# Our name → the diffusers scheduler, and how it is made from the model's own configuration.
SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "lms": (diffusers.LMSDiscreteScheduler, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {}),
}
CASES = [(name, 0.0) for name in SCHEDULERS] + [("ddim", 0.5), ("ddim", 1.0)]


@pytest.fixture(scope="module")
def peer(model_folder):
    """diffusers' own pipeline on the shipped weights."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        model_folder / "stable-diffusion", safety_checker=None, dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.own_schedule = dict(pipe.scheduler.config)
    return pipe


@pytest.fixture(scope="module")
def graphs(default_bundle):
    return {name: open_session(default_bundle, name) for name in ("encode_text", "denoise", "decode_latents")}


def their_latents(pipe, sampler, eta, prompt, negative, guidance, seed):
    kind, changes = SCHEDULERS[sampler]
    pipe.scheduler = kind.from_config(pipe.own_schedule, **changes)
    return pipe(
        prompt,
        negative_prompt=negative,
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        eta=eta,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="latent",
    ).images.numpy()


def our_latents(bundle, graphs, samples, pairs):
    """Final latents ``[B, C, h, w]`` of ``samples`` for ``pairs`` of (prompt, base) texts."""
    latents = bundle.latents
    tokenizer = PromptTokenizer(bundle)
    rows = load_samples(graphs["denoise"], samples, (latents.channels, latents.height, latents.width))
    encode = graphs["encode_text"]
    encode.reshape(batch=len(samples))
    for name, texts in zip(("prompt_context", "base_context"), zip(*pairs, strict=True), strict=True):
        encode.inputs["ids"].write(tokenizer.encode(list(texts)))
        encode.run()
        graphs["denoise"].inputs[name].copy(encode.outputs["context"])
    for _ in denoise(graphs["denoise"], rows):
        pass
    return graphs["denoise"].outputs["latents"].read().copy()


@pytest.mark.parametrize(("sampler", "eta"), CASES)
def test_cfg_ends_at_diffusers_latents(default_bundle, graphs, peer, sampler, eta):
    table = sampler_table(NoiseSchedule.from_config(default_bundle.schedule), sampler, STEPS, 4.0, eta=eta)
    ours = our_latents(default_bundle, graphs, [Sample(table, 3)], [(PROMPT, "")])
    theirs = their_latents(peer, sampler, eta, PROMPT, "", 4.0, 3)
    assert np.abs(ours - theirs).max() <= 1e-3


@pytest.mark.parametrize(("sampler", "eta"), CASES)
def test_dns_is_the_swapped_pair_at_s_plus_one(default_bundle, graphs, peer, sampler, eta):
    s = 2.5
    table = sampler_table(NoiseSchedule.from_config(default_bundle.schedule), sampler, STEPS, -s, eta=eta)
    ours = our_latents(default_bundle, graphs, [Sample(table, 5)], [(PROMPT, "")])
    theirs = their_latents(peer, sampler, eta, "", PROMPT, s + 1, 5)
    assert np.abs(ours - theirs).max() <= 1e-3


def test_every_sampler_and_phase_in_one_batch_equals_each_alone(default_bundle, graphs):
    """Mixed samplers, lengths, and signs of the guidance share each call without touching one another."""
    schedule = NoiseSchedule.from_config(default_bundle.schedule)
    samples, pairs = [], []
    for i, name in enumerate(SCHEDULERS):
        w = 4.0 if i % 2 else -2.0
        samples.append(Sample(sampler_table(schedule, name, 4 + i, w), i))
        pairs.append((PROMPT, "") if i % 3 else (PROMPT, "a small green triangle on a plain red background"))
    together = our_latents(default_bundle, graphs, samples, pairs)
    for i in range(len(samples)):
        alone = our_latents(default_bundle, graphs, samples[i : i + 1], pairs[i : i + 1])
        assert np.abs(together[i] - alone[0]).max() <= 1e-3, list(SCHEDULERS)[i]


def test_decoded_image_equals_diffusers(default_bundle, graphs, peer):
    table = sampler_table(NoiseSchedule.from_config(default_bundle.schedule), "ddim", STEPS, 4.0)
    our_latents(default_bundle, graphs, [Sample(table, 3)], [(PROMPT, "")])
    decode = graphs["decode_latents"]
    decode.link("latents", graphs["denoise"].outputs["latents"])
    decode.reshape(batch=1, height=default_bundle.latents.height, width=default_bundle.latents.width)
    decode.run()
    ours = decode.outputs["image"].read().astype(int)
    peer.scheduler = diffusers.DDIMScheduler.from_config(peer.own_schedule)
    theirs = peer(
        PROMPT,
        negative_prompt="",
        guidance_scale=4.0,
        num_inference_steps=STEPS,
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="pil",
    ).images[0]
    assert np.abs(ours[0] - np.asarray(theirs).astype(int)).max() <= 1
