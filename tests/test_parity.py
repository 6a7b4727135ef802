"""The default model against the libraries that define it: the same weights, noise and settings in diffusers."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageDraw

from dnp import Pipeline
from dnp.engine import open_session
from dnp.runtime.pipeline.conditioning import Conditioner
from dnp.runtime.sampling.denoise import Denoiser, Sample
from dnp.runtime.sampling.samplers import sampler_table
from dnp.runtime.sampling.schedule import NoiseSchedule
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


def their_latents(pipe, sampler, eta, prompt, negative, guidance, seed, latents=None):
    kind, changes = SCHEDULERS[sampler]
    pipe.scheduler = kind.from_config(pipe.own_schedule, **changes)
    return pipe(
        prompt,
        negative_prompt=negative,
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        eta=eta,
        generator=torch.Generator("cpu").manual_seed(seed),
        latents=latents,
        output_type="latent",
    ).images.numpy()


def our_latents(bundle, graphs, samples, pairs):
    """Final latents ``[B, C, h, w]`` of ``samples`` for ``pairs`` of (prompt, negative) texts."""
    latents, denoiser = bundle.latents, Denoiser(graphs["denoise"])
    denoiser.open(
        len(samples),
        steps=max(len(sample.table.rows) for sample in samples),
        noise_steps=max(len(sample.table.noise_steps) for sample in samples),
        height=latents.height,
        width=latents.width,
        tokens=bundle.text.length,
    )
    for place, sample in enumerate(samples):
        denoiser.join(place, sample)
    conditioner = Conditioner(bundle, graphs["encode_text"], [PromptTokenizer(bundle)])
    size = latents.height * latents.vae_scale_factor, latents.width * latents.vae_scale_factor
    conditioner.write(denoiser.bank, {place: (negative, p) for place, (p, negative) in enumerate(pairs)}, size=size)
    while denoiser.step():
        pass
    return denoiser.latents.read()


@pytest.mark.parametrize(("sampler", "eta"), CASES)
def test_cfg_ends_at_diffusers_latents(default_bundle, graphs, peer, sampler, eta):
    table = sampler_table(NoiseSchedule.from_config(default_bundle.schedule), sampler, STEPS, 4.0, eta=eta)
    ours = our_latents(default_bundle, graphs, [Sample(table, 3)], [(PROMPT, "")])
    theirs = their_latents(peer, sampler, eta, PROMPT, "", 4.0, 3)
    assert np.abs(ours - theirs).max() <= 1e-3


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "lms", "pndm", "unipc"])
def test_at_large_guidance_the_difference_is_diffusers_own_sensitivity(default_bundle, graphs, peer, sampler):
    """A multistep sampler's latents at w = 12 differ by at most ten times what 1e-6 of noise moves diffusers' own."""
    w, seed = 12.0, 3
    table = sampler_table(NoiseSchedule.from_config(default_bundle.schedule), sampler, STEPS, w)
    ours = our_latents(default_bundle, graphs, [Sample(table, seed)], [(PROMPT, "")])
    shape = (1, default_bundle.latents.channels, default_bundle.latents.height, default_bundle.latents.width)
    noise, other = (torch.randn(shape, generator=torch.Generator("cpu").manual_seed(s)) for s in (seed, 10))
    theirs, moved = (
        their_latents(peer, sampler, 0.0, PROMPT, "", w, seed, latents=start) for start in (noise, noise + 1e-6 * other)
    )
    assert np.abs(ours - theirs).max() <= 10 * np.abs(moved - theirs).max()


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
    decode.reshape(places=1, batch=1, height=default_bundle.latents.height, width=default_bundle.latents.width)
    decode.inputs["latents"].copy(graphs["denoise"].outputs["latents"])
    decode.inputs["decoded"].write(np.zeros(1, np.int64))
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


@pytest.fixture(scope="module")
def pictures():
    """Fifty drawings unlike each other, in sizes that the captioner has to shrink, stretch and enlarge."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(50):
        picture = Image.new("RGB", tuple(int(n) for n in rng.integers(40, 200, 2)), tuple(rng.integers(0, 256, 3)))
        pen = ImageDraw.Draw(picture)
        for _ in range(int(rng.integers(1, 4))):
            x, y = rng.uniform(0, 0.6, 2) * picture.size
            box = (x, y, x + picture.width * rng.uniform(0.1, 0.4), y + picture.height * rng.uniform(0.1, 0.4))
            (pen.ellipse if rng.random() < 0.5 else pen.rectangle)(box, fill=tuple(rng.integers(0, 256, 3)))
        drawn.append(picture)
    return drawn


@pytest.mark.parametrize("beams", [1, 3])
def test_the_shipped_captioner_captions_as_transformers(pictures, model_folder, beams):
    model = transformers.BlipForConditionalGeneration.from_pretrained(model_folder / "blip", dtype=torch.float32).eval()
    processor = transformers.BlipProcessor.from_pretrained(model_folder / "blip", use_fast=False)
    with torch.inference_mode():
        ids = model.generate(**processor(images=pictures, return_tensors="pt"), num_beams=beams, max_length=32)
    theirs = processor.batch_decode(ids, skip_special_tokens=True)
    assert len(set(theirs)) > 10
    assert Pipeline.open().caption(pictures, beams=beams, max_length=32) == theirs


def test_the_shipped_tokenizer_gives_transformers_ids(default_bundle, model_folder):
    reference = transformers.CLIPTokenizer.from_pretrained(model_folder / "stable-diffusion" / "tokenizer")
    words = [
        "a",
        "large",
        "RED",
        "circle",
        "left",
        "of",
        "xyz",
        "é",
        "e\u0301",
        "日本",
        "🙂",
        "'s",
        "12",
        "\t",
        "<b>",
        "ﬁ",
    ]
    rng = np.random.default_rng(1)
    prompts = [" ".join(rng.choice(words, int(rng.integers(0, 60)))) for _ in range(3000)]
    prompts += ["".join(map(chr, rng.integers(1, 0xD800, int(rng.integers(0, 40))))) for _ in range(1000)]
    theirs = reference(prompts, padding="max_length", truncation=True, max_length=default_bundle.text.length)
    ours = PromptTokenizer(default_bundle).encode(prompts)
    np.testing.assert_array_equal(ours, theirs.input_ids)
