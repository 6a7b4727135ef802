"""Folders as downloads leave them, and what the libraries that load them warn of."""

import json
import os
import random
import re
import shutil
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging

from dnp.engine.bundle.contract import Signature
from dnp.engine.bundle.manifest import TextSpec
from dnp.engine.errors import ExportError
from dnp.export.families import stable_diffusion
from dnp.export.families.blip import load_blip
from dnp.export.families.lora import Lora, check_loras, merge
from dnp.export.families.source import read_source
from dnp.export.families.tokenizer import prompt_tokenizers
from dnp.export.loading import warnings_refused
from dnp.runtime.tokenizer import PromptTokenizer

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 492265168\n"
UNET = "unet/diffusion_pytorch_model"
GRAPHS = {"text_encoder": "encode_text", "unet": "denoise", "vae": "decode_latents"}


@pytest.fixture
def source(tiny_sd_folder, tmp_path):
    return shutil.copytree(tiny_sd_folder, tmp_path / "source")


@pytest.fixture
def blip(tiny_blip_folder, tmp_path):
    return shutil.copytree(tiny_blip_folder, tmp_path / "blip")


def load(source, component):
    """The model that is exported."""
    module = stable_diffusion.GRAPHS[GRAPHS[component]](read_source(source), Signature({}, {}), "fp32").module
    return module.encoders[0] if component == "text_encoder" else getattr(module, component)


def converted_tokenizer(source):
    """The only one of the model, converted, and what the manifest says of it."""
    (converted,) = prompt_tokenizers(read_source(source)).values()
    return converted


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(path, change):
    weights = safetensors.torch.load_file(path)
    change(weights)
    safetensors.torch.save_file(weights, path, {"format": "pt"})


def shard(folder, variant=None, old_names=False):
    """Save the UNet again in shards, and remove the file; ``old_names`` end in the variant."""
    model = UNet2DConditionModel.from_pretrained(folder / "unet")
    (folder / f"{UNET}.safetensors").unlink()
    model.save_pretrained(folder / "unet", max_shard_size="200KB", variant=variant)
    shards = sorted((folder / "unet").glob("*-of-*"))
    assert len(shards) > 1
    if old_names:
        (index,) = (folder / "unet").glob("*.index*.json")
        text = index.read_text()
        for path in shards:
            new = re.sub(rf"\.{variant}(-\d+-of-\d+)", rf"\1.{variant}", path.name)
            text = text.replace(path.name, new)
            path.rename(path.with_name(new))
        index.write_text(text)
    return sorted((folder / "unet").glob("*-of-*"))


# Files


@pytest.mark.parametrize(
    "file",
    [
        f"{UNET}.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "unet/config.json",
        "model_index.json",
    ],
)
def test_a_git_lfs_pointer_in_a_source_is_named(source, file):
    (source / file).write_text(POINTER)
    with pytest.raises(ExportError, match=rf"{re.escape(file)} is a Git LFS pointer.*`git lfs pull`"):
        prompt_tokenizers(read_source(source))


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_in_a_captioner_is_named(blip, file):
    (blip / file).write_text(POINTER)
    with pytest.raises(ExportError, match=rf"{re.escape(file)} is a Git LFS pointer.*`git lfs pull`"):
        load_blip(blip)


def test_a_git_lfs_pointer_in_a_lora_s_or_a_shard_s_place_is_named(source, tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_text(POINTER)
    with pytest.raises(ExportError, match="is a Git LFS pointer"):
        check_loras((Lora(file),))
    shard(source)[-1].write_text(POINTER)
    with pytest.raises(ExportError, match=r"-of-.* is a Git LFS pointer"):
        read_source(source)


def test_a_pointer_that_is_not_needed_does_no_harm(source):
    for name in (f"{UNET}.fp16.safetensors", f"{UNET}.bin"):
        (source / name).write_text(POINTER)
    assert read_source(source).variants["unet"] is None


@pytest.mark.parametrize(
    ("variant", "old_names"), [(None, False), ("fp16", False), ("fp16", True), ("non_ema", False), ("non_ema", True)]
)
def test_shards_and_variants_are_loaded_by_new_names_and_old_ones(source, variant, old_names):
    expected = load(source, "unet").state_dict()
    shard(source, variant, old_names)
    assert read_source(source).variants["unet"] == variant
    found = load(source, "unet").state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: shard(f)[0].unlink(), r"00001-of-.* is missing"),
        (lambda f: shard(f) and (f / f"{UNET}.safetensors.index.json").unlink(), "but not the index"),
        (lambda f: shard(f, "fp16", True) and next((f / "unet").glob("*.index*")).unlink(), "but not the index"),
        (lambda f: (f / f"{UNET}.safetensors").rename(f / "unet/model.safetensors"), r"has model\.safetensors, but no"),
        (lambda f: (f / f"{UNET}.safetensors").rename(f / f"{UNET}.bin"), "pickle is never loaded"),
        (
            lambda f: (
                shutil.copy(f / f"{UNET}.safetensors", f / f"{UNET}.ema.safetensors"),
                (f / f"{UNET}.safetensors").rename(f / f"{UNET}.non_ema.safetensors"),
            ),
            "weights as ema, non_ema; leave one",
        ),
    ],
)
def test_why_weights_are_not_found_is_said(source, spoil, told):
    spoil(source)
    with pytest.raises(ExportError, match=told):
        read_source(source)


def as_cache(folder, blobs):
    """``folder`` with each file a link to a blob outside of it, as the hub's caches are."""
    blobs.mkdir(exist_ok=True)
    for path in [path for path in sorted(folder.rglob("*")) if path.is_file()]:
        blob = blobs / f"{len(list(blobs.iterdir())):040x}"
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))


def test_a_cache_of_links_is_read_as_the_files_are(source, blip, tmp_path):
    lora = tmp_path / "lora" / "x.safetensors"
    lora.parent.mkdir()
    name = "lora_unet_conv_in"
    tensors = {f"{name}.lora_down.weight": torch.ones(1, 4, 3, 3), f"{name}.lora_up.weight": torch.ones(32, 1, 1, 1)}
    safetensors.torch.save_file(tensors, lora)
    before = load(source, "unet").conv_in.weight.clone()
    for folder in (source, blip, lora.parent):
        as_cache(folder, tmp_path / "blobs")
    unet = load(source, "unet")
    check_loras((Lora(lora),))
    merge(unet, "unet", Lora(lora))
    torch.testing.assert_close(unet.conv_in.weight, before + 1)
    assert load_blip(blip).tokenizer("a red circle").input_ids
    assert converted_tokenizer(source)[1].file == "tokenizers/prompt.json"
    (source / f"{UNET}.safetensors").resolve().unlink()
    with pytest.raises(ExportError, match=r"is a link to .*, which is missing"):
        read_source(source)


# What the libraries warn of


def add_weight(name):
    return lambda weights: weights.update({name: torch.zeros(2)})


@pytest.mark.parametrize(
    ("component", "file"),
    [("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")],
)
def test_weights_that_do_not_match_the_configuration_are_refused(source, component, file):
    path = source / component / f"{file}.safetensors"
    original = path.read_bytes()
    first = min(safetensors.torch.load_file(path))
    for change, told in (
        (add_weight("foo.bar"), r"has 1 weights that the model of its config.json has not, foo\.bar"),
        (lambda weights: weights.pop(first), "lacks 1 weights"),
        (lambda weights: weights.update({first: torch.zeros(3)}), "another shape|size mismatch|mismatch"),
        (lambda weights: weights[first].flatten()[:1].fill_(torch.nan), "holds NaN or infinity"),
    ):
        path.write_bytes(original)
        edit_weights(path, change)
        with pytest.raises(ExportError, match=told):
            load(source, component)


def test_weights_known_to_mean_nothing_are_no_fault(source, blip):
    """Counters that old versions saved, and the image half of CLIP."""
    names = ("text_model.embeddings.position_ids", "vision_model.post_layernorm.weight", "logit_scale")
    for name in names:
        edit_weights(source / "text_encoder/model.safetensors", add_weight(name))
    CLIPTextModel.from_pretrained(source / "text_encoder")
    load(source, "text_encoder")
    edit_weights(blip / "model.safetensors", add_weight("text_decoder.bert.embeddings.position_ids"))
    load_blip(blip)


def test_a_captioner_s_unknown_weights_are_refused(blip):
    edit_weights(blip / "model.safetensors", add_weight("itm_head.weight"))
    with pytest.raises(ExportError, match=r"has not, itm_head\.weight"):
        load_blip(blip)


@pytest.mark.parametrize("component", ["unet", "vae"])
def test_a_setting_that_diffusers_ignores_is_refused(source, component, capfd):
    edit(source / component / "config.json", a_new_kind_of_attention=3)
    with pytest.raises(ExportError, match=r"'a_new_kind_of_attention': 3.*will be ignored"):
        load(source, component)
    assert "ignored" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["diffusers", "transformers", "peft"])
def test_any_warning_is_an_error_however_it_is_given(name, tmp_path, monkeypatch):
    import logging as standard

    logger = standard.getLogger(f"{name}.models.some")
    for warn in (
        lambda: logger.warning("weights are %s", "newly initialised"),
        lambda: warnings.warn("weights are newly initialised", RuntimeWarning, stacklevel=1),
        lambda: warnings.warn("weights are newly initialised", UserWarning, stacklevel=1),
    ):
        with pytest.raises(ExportError, match="weights are newly initialised"), warnings_refused(tmp_path):
            warn()
    with warnings_refused(tmp_path):
        logger.info("weights are loaded")
        warnings.warn("call it otherwise", FutureWarning, stacklevel=1)


def test_loggers_are_as_before_and_quiet_ones_are_heard(tmp_path):
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        handlers = [*logging._get_library_root_logger().handlers]
        with pytest.raises(ExportError, match="heard"), warnings_refused(tmp_path):
            logging.get_logger("transformers.x").warning("heard")
        assert logging.get_verbosity() == logging.ERROR
        assert logging._get_library_root_logger().handlers == handlers
    finally:
        logging.set_verbosity(level)


# Textual inversions


@pytest.fixture
def inverted(tiny_sd_folder, tmp_path):
    """A pipeline with textual inversions of several vectors and of one, saved and loaded again; and its folder."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    for token, vectors in (("<toy>", 3), ("sks-dog", 2), ("<Dog>", 2), ("<one>", 1)):
        pipe.load_textual_inversion({token: torch.randn(vectors, 32)}, token=token)
    pipe.save_pretrained(tmp_path / "inverted")
    return StableDiffusionPipeline.from_pretrained(tmp_path / "inverted"), tmp_path / "inverted"


PIECES = [
    "<toy>", "<toy>_1", "<toy>_2", "<toy>_3", "<toy>_12", "<TOY>", "<toy", "toy>", "sks-dog", "SKS-dog", "sks-dog_1",
    "<Dog>", "<dog>", "<dog>_1", "<one>", "<one>_1", " ", " ", "a", "red", "_1", "1", "cat,", "<", "\n",
    "e\u0301", "画",
]  # fmt: skip


def test_a_token_of_several_vectors_gives_all_that_diffusers_gives(inverted, tmp_path):
    pipe, folder = inverted
    tokenizer, spec = converted_tokenizer(folder)
    tokenizer.save(str(tmp_path / "prompt.json"))
    text = TextSpec(16, (replace(spec, file="prompt.json"),), "encoded")
    ours = PromptTokenizer(SimpleNamespace(path=tmp_path, text=text))
    rng = random.Random(5)
    prompts = ["a <toy> cat", "<toy>", "", "a <one>", *PIECES]
    prompts += ["".join(rng.choices(PIECES, k=rng.randint(1, 7))) for _ in range(2000)]
    prompts += [f"{prompt}<|endoftext|>red" for prompt in prompts[:500]]
    converted = pipe.maybe_convert_prompt(prompts, pipe.tokenizer)
    theirs = pipe.tokenizer(converted, padding="max_length", truncation=True, max_length=16, return_tensors="np")
    np.testing.assert_array_equal(ours.encode(prompts), theirs.input_ids)
    assert converted[0] == "a <toy> <toy>_1 <toy>_2 cat"
    assert ours.truncated("red " + "<toy> " * 4) is None
    assert ours.truncated("red " * 14 + "<toy>") is not None


def test_a_tokenizer_without_inversions_stays_as_it_is(tiny_sd_folder):
    theirs = CLIPTokenizer.from_pretrained(tiny_sd_folder / "tokenizer").backend_tokenizer
    theirs.no_padding()
    theirs.no_truncation()
    assert json.loads(converted_tokenizer(tiny_sd_folder)[0].to_str()) == json.loads(theirs.to_str())


def test_the_longest_prompts_of_such_tokens_are_encoded(inverted):
    tokenizer, _ = converted_tokenizer(inverted[1])
    ids = [tokenizer.token_to_id(name) for name in ("<toy>_1", "<toy>_2")]
    assert tokenizer.encode("<toy>_1" * 14_000).ids[1:-1] == ids[:1] * 14_000  # none stands for itself
    assert tokenizer.encode("<toy> " * 14_000).ids.count(ids[1]) == 14_000
