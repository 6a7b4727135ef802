"""Every family exported and run, against its own pipeline in diffusers: the same weights, noise and settings."""

from __future__ import annotations

import diffusers
import families
import numpy as np
import onnx_ir
import pytest
import torch

from dnp.engine import Bundle, open_session
from dnp.engine.bundle.contract import signatures
from dnp.engine.bundle.manifest import GraphSpec
from dnp.export.bundle import export_bundle
from dnp.export.families import blip
from dnp.export.families.source import read_source
from dnp.export.families.stable_diffusion import GRAPHS, guidance_embedding
from dnp.export.fp16.float32 import half_values
from dnp.export.fp16.ranges import RangeCheck
from dnp.export.fp16.regions import REGIONS, outside_regions
from dnp.export.fp16.simulation import SimulatedBackend
from dnp.export.graph import export_graph
from dnp.runtime.pipeline.conditioning import Conditioner
from dnp.runtime.sampling.denoise import Denoiser, Sample
from dnp.runtime.sampling.samplers import sampler_table
from dnp.runtime.sampling.schedule import NoiseSchedule
from dnp.runtime.tokenizer import PromptTokenizer

# diffusers mixes numpy and torch in a way that numpy 2 warns about.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")]  # each exports

PROMPTS = ["a large red circle left of a small blue square", "a green star on a plain yellow background"]
NEGATIVES = ["a small circle", "blue square, blue star"]
SEEDS = [3, 8]
STEPS = 4
SIZES = [(32, 32), (24, 40)]
SAMPLERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "lcm": diffusers.LCMScheduler,
}
OF_FAMILY = {"sd2": "ddim", "sdxl": "euler", "bk-sdm": "euler", "ssd": "euler"}
CASES = ["sd2", "sdxl", "bk-sdm", "ssd"]


@pytest.fixture(scope="module")
def exported(tiny_blip_folder, tiny_export, tmp_path_factory):
    """Export a family by its name, once; the captioner and the decoder are copies, for nothing here asks for them."""
    made = {}

    def export(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            families.build(name, folder / "source")
            with pytest.MonkeyPatch.context() as patch:
                families.copy_graphs(patch, tiny_export, {*blip.GRAPHS, "decode_latents"})
                export_bundle(folder / "source", folder / "bundle", captioner=tiny_blip_folder)
            made[name] = folder / "source", Bundle.open(folder / "bundle")
        return made[name]

    return export


def their_latents(folder, sampler, prompts, negatives, guidance, height, width, **extra):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = SAMPLERS[sampler].from_config(pipe.scheduler.config)
    return pipe(
        prompts,
        negative_prompt=negatives,
        guidance_scale=guidance,
        height=height,
        width=width,
        num_inference_steps=STEPS,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in SEEDS],
        output_type="latent",
        **extra,
    ).images.numpy()


def their_dns_latents(folder, bundle, sampler, s, height, width):
    """The empty prompt in the place of the prompt, and the prompt in the place of the negative one, at s + 1."""
    if bundle.text.empty == "encoded":
        return their_latents(folder, sampler, ["", ""], PROMPTS, s + 1, height, width)
    # Zeros, which the pipeline gives to a negative prompt alone, so they are given to it.
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    prompt, _, pooled, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    given = {
        "prompt_embeds": torch.zeros_like(prompt), "pooled_prompt_embeds": torch.zeros_like(pooled),
        "negative_prompt_embeds": prompt, "negative_pooled_prompt_embeds": pooled,
    }  # fmt: skip
    return their_latents(folder, sampler, None, None, s + 1, height, width, **given)


def our_latents(bundle, sampler, prompts, negatives, w, height, width, opened=open_session, **settings):
    table = sampler_table(NoiseSchedule.from_config(bundle.schedule), sampler, STEPS, w, **settings)
    scale = bundle.latents.vae_scale_factor
    with opened(bundle, "encode_text") as encode, opened(bundle, "denoise") as session:
        denoiser = Denoiser(session)
        sizes = {"height": height // scale, "width": width // scale, "tokens": bundle.text.length}
        denoiser.open(len(SEEDS), steps=len(table.rows), noise_steps=len(table.noise_steps), **sizes)
        for place, seed in enumerate(SEEDS):
            denoiser.join(place, Sample(table, seed))
        tokenizers = [PromptTokenizer(bundle, number) for number in range(len(bundle.text.tokenizers))]
        conditioner = Conditioner(bundle, encode, tokenizers)
        conditioner.write(denoiser.bank, dict(enumerate(zip(negatives, prompts, strict=True))), size=(height, width))
        while denoiser.step():
            pass
        return denoiser.latents.read()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_guidance_with_negative_prompts_ends_at_the_pipelines_latents(exported, name, height, width):
    source, bundle = exported(name)
    sampler = OF_FAMILY[name]
    theirs = their_latents(source, sampler, PROMPTS, NEGATIVES, 5.0, height, width)
    ours = our_latents(bundle, sampler, PROMPTS, NEGATIVES, 5.0, height, width)
    assert np.abs(ours - theirs).max() <= 1e-3
    assert np.abs(theirs - their_latents(source, sampler, PROMPTS, NEGATIVES[::-1], 5.0, height, width)).max() > 0.01


@pytest.mark.parametrize("name", CASES)
def test_guidance_without_a_negative_prompt_ends_at_the_pipelines_latents(exported, name):
    source, bundle = exported(name)
    sampler = OF_FAMILY[name]
    theirs = their_latents(source, sampler, PROMPTS, None, 5.0, 32, 32)
    assert np.abs(our_latents(bundle, sampler, PROMPTS, ["", ""], 5.0, 32, 32) - theirs).max() <= 1e-3


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_dns_is_the_swapped_pair_at_s_plus_one(exported, name, height, width):
    source, bundle = exported(name)
    sampler, s = OF_FAMILY[name], 2.5
    theirs = their_dns_latents(source, bundle, sampler, s, height, width)
    ours = our_latents(bundle, sampler, PROMPTS, ["", ""], -s, height, width)
    assert np.abs(ours - theirs).max() <= 1e-3


@pytest.mark.parametrize("name", ["sd2", "bk-sdm", "ssd"])
def test_fp16_graphs_end_near_the_float32_pipelines_latents(exported, name, tmp_path):
    """Guidance and DNS, as a GPU would round them; what XL needs in fp16 is tested below."""
    source, bundle = exported(name)
    sampler, s = OF_FAMILY[name], 2.5
    backend, half = SimulatedBackend(tmp_path), {}
    for stage in ("encode_text", "denoise"):
        signature = signatures(bundle)[stage]
        record = export_graph(GRAPHS[stage](read_source(source), signature, "fp16"), tmp_path)
        half[stage] = GraphSpec(stage, tmp_path / record.manifest["file"], *signature)
        assert half_values(onnx_ir.load(half[stage].path))

    def opened(bundle, stage):
        return backend.session(half[stage])

    for size in SIZES:
        guided = their_latents(source, sampler, PROMPTS, NEGATIVES, 5.0, *size)
        ours = our_latents(bundle, sampler, PROMPTS, NEGATIVES, 5.0, *size, opened)
        assert 0 < np.abs(ours - guided).max() < 0.02 * np.abs(guided).max()
        dns = their_dns_latents(source, bundle, sampler, s, *size)
        ours = our_latents(bundle, sampler, PROMPTS, ["", ""], -s, *size, opened)
        assert 0 < np.abs(ours - dns).max() < 0.02 * np.abs(dns).max()


def test_prompts_of_several_windows_are_encoded_window_by_window(exported):
    """Beside one another, and the pooled text is that of the first."""
    source, bundle = exported("sdxl")
    pipe = diffusers.DiffusionPipeline.from_pretrained(source)
    room = bundle.text.length - 2
    words = [("red", "blue", "green")[number % 3] for number in range(room + 4)]  # each is one token
    windows = [" ".join(words[:room]), " ".join(words[room:])]
    with open_session(bundle, "encode_text") as session:
        session.reshape(batch=1, tokens=2 * bundle.text.length)
        for number, name in enumerate(session.inputs):
            session.inputs[name].write(PromptTokenizer(bundle, number).encode([" ".join(words)], 2))
        session.run()
        embeddings, pooled = (session.outputs[name].read() for name in ("embeddings", "pooled"))
    expected = [pipe.encode_prompt(window, do_classifier_free_guidance=False) for window in windows]
    beside = torch.cat([found[0] for found in expected], 1).detach().numpy()
    np.testing.assert_allclose(embeddings, beside, atol=1e-4)
    np.testing.assert_allclose(pooled, expected[0][2].detach().numpy(), atol=1e-4)


def test_guidance_as_an_input_is_the_latent_consistency_pipelines(exported):
    """One row a step: the guidance scale goes in, and nothing is combined."""
    source, bundle = exported("lcm")
    assert bundle.guidance.embedded
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(source, safety_checker=None)
    w = torch.tensor([0.0, 1.5, 7.5])
    for channels in (24, 25):
        expected = pipe.get_guidance_scale_embedding(w, embedding_dim=channels)
        torch.testing.assert_close(guidance_embedding(w, channels), expected, atol=1e-5, rtol=0)
    pipe = diffusers.LatentConsistencyModelPipeline(
        **{**pipe.components, "scheduler": diffusers.LCMScheduler.from_config(pipe.scheduler.config)},
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        PROMPTS,
        height=32,
        width=32,
        num_inference_steps=STEPS,
        guidance_scale=8.5,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in SEEDS],
        output_type="latent",
    ).images.numpy()
    ours = our_latents(bundle, "lcm", PROMPTS, ["", ""], 1.0, 32, 32, embedded=8.5)
    assert np.abs(ours - theirs).max() <= 1e-3


def test_xl_in_fp16_keeps_its_decoder_in_float32(exported, tiny_blip_folder, tmp_path):
    """As its pipeline does where the VAE says ``force_upcast``; all else is fp16 but for the stated regions."""
    source, exact = exported("sdxl")
    export_bundle(
        source,
        tmp_path / "half",
        captioner=tiny_blip_folder,
        precision="fp16",
        methods=True,
        ranges=RangeCheck(steps=3),
    )
    half = Bundle.open(tmp_path / "half")
    for name, graph in half.graphs.items():
        model, whole = onnx_ir.load(graph.path), name == "decode_latents"
        assert graph.ranges.precision == ("fp32" if whole else "fp16")
        assert bool(half_values(model)) != whole
        assert whole or outside_regions(model, REGIONS[name], graph.ranges.float32) == [], name
    theirs = our_latents(exact, "euler", PROMPTS, NEGATIVES, 5.0, 32, 32)
    ours = our_latents(half, "euler", PROMPTS, NEGATIVES, 5.0, 32, 32)
    assert 0 < np.abs(ours - theirs).max() < 0.02 * np.abs(theirs).max()
    rescaled = our_latents(half, "euler", PROMPTS, NEGATIVES, 5.0, 32, 32, methods={"rescale": 0.7})
    assert np.abs(rescaled - ours).max() > 0.1
