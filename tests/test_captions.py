"""Captions against transformers' own BLIP: the exported graphs, and the searches over them, token for token."""

import json
import shutil
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import BlipForConditionalGeneration, BlipProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from dnp.engine.backends.registry import open_graph
from dnp.engine.bundle.contract import signatures
from dnp.engine.bundle.manifest import CaptionSpec, GraphSpec, GuidanceSpec, LatentSpec, TextSpec, TokenizerSpec
from dnp.engine.bundle.tensors import TensorSpec
from dnp.engine.errors import ExportError, SettingsError
from dnp.export.families.blip import GRAPHS, caption_manifest, caption_tokenizer, load_blip
from dnp.export.families.blip_modules import resize_exactly
from dnp.export.graph import export_graph
from dnp.runtime.captioning.captioner import MAX_BEAMS, Captioner
from dnp.runtime.captioning.resize import resize, resize_matrices
from dnp.runtime.captioning.search import BeamSearch, greedy_ids

PREFIXES = ["", "a", "the red circle", "a small blue star!"]


def pictures(count=50):
    """Noise, gradients and drawn shapes, of many sizes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        height, width = rng.integers(8, 120, 2).tolist()
        if number % 3 == 0:
            yield rng.integers(0, 256, (height, width, 3), np.uint8)
        elif number % 3 == 1:
            y, x = np.mgrid[:height, :width] / max(height, width)
            yield (np.stack([y, x, y * x, 1 - y], -1) @ rng.uniform(0, 63, (4, 3))).astype(np.uint8)
        else:
            image = Image.new("RGB", (width, height), tuple(rng.integers(0, 256, 3).tolist()))
            for _ in range(3):
                left, top = rng.integers(0, width), rng.integers(0, height)
                box = [int(left), int(top), int(left + width // 2), int(top + height // 2)]
                ImageDraw.Draw(image).ellipse(box, fill=tuple(rng.integers(0, 256, 3).tolist()))
            yield np.asarray(image)


@pytest.fixture(scope="module")
def images():
    return list(pictures())


@pytest.fixture(scope="module")
def folder(tiny_blip_folder, tmp_path_factory):
    """The caption half of a bundle, in fp32."""
    return export(tiny_blip_folder, tmp_path_factory.mktemp("captions"), "fp32")


def export(source, folder, precision):
    parts = load_blip(source)
    spec = CaptionSpec(**caption_manifest(parts))
    text = TextSpec(4, (TokenizerSpec("none", 0, 1, 1),), "encoded")
    others = {"text": text, "conditioning": {}, "guidance": GuidanceSpec(2, methods=False, embedded=False)}
    model = SimpleNamespace(caption=spec, precision=precision, latents=LatentSpec(4, 8, 8, 1, 8, 8, 8), **others)
    contract = signatures(model)
    graphs = {
        name: export_graph(make(load_blip(source), contract[name], precision), folder).manifest
        for name, make in GRAPHS.items()
    }
    (folder / "tokenizers").mkdir()
    caption_tokenizer(parts).save(str(folder / "tokenizers" / "caption.json"))
    (folder / "caption.json").write_text(json.dumps({"caption": caption_manifest(parts), "graphs": graphs}))
    return folder


def open_captioner(folder):
    manifest = json.loads((folder / "caption.json").read_text())
    sessions = {}
    for name, graph in manifest["graphs"].items():
        inputs, outputs = (
            {key: TensorSpec(tuple(value["shape"]), value["dtype"]) for key, value in graph[side].items()}
            for side in ("inputs", "outputs")
        )
        sessions[name] = open_graph(GraphSpec(name, folder / graph["file"], inputs, outputs))
    bundle = SimpleNamespace(path=folder, caption=CaptionSpec(**manifest["caption"]))
    return Captioner(bundle, sessions["encode_image"], sessions["caption_step"])


@pytest.fixture(scope="module")
def captioner(folder):
    return open_captioner(folder)


@pytest.fixture(scope="module")
def original(tiny_blip_folder):
    """``generate`` of transformers: for each image the ids up to and with the end token, and the text."""
    model = BlipForConditionalGeneration.from_pretrained(tiny_blip_folder).eval()
    tokenizer = load_blip(tiny_blip_folder).tokenizer
    processor = BlipProcessor(BlipImageProcessorPil.from_pretrained(tiny_blip_folder), tokenizer)

    def generate(images, prefix="", **settings):
        narrow = [Image.fromarray(x).resize((32, x.shape[0]), Image.Resampling.BICUBIC) for x in images]
        text = [prefix] * len(images) if prefix else None
        inputs = processor(images=narrow, text=text, return_tensors="pt")
        start = inputs.input_ids.shape[1] - 1 if prefix else 1  # [SEP] is dropped
        found = []
        for ids in model.generate(**inputs, do_sample=False, **settings).tolist():
            ends = [place for place in range(start, len(ids)) if ids[place] == tokenizer.sep_token_id]
            ids = ids[: ends[0] + 1] if ends else ids
            found.append((ids, processor.decode(ids, skip_special_tokens=True)))
        return found

    return generate


def ids_of(steps):
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def assert_same(captioner, original, images, prefix="", beams=1, **settings):
    expected = original(images, prefix, num_beams=beams, **({"max_length": 32} | settings))
    for image, (ids, text) in zip(images, expected, strict=True):
        how = captioner.settings(beams=beams, prefix=prefix, **settings)
        assert ids_of(captioner.tokens(image[None], how)) == [ids]
        assert captioner.captions(image[None], how) == [text]


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_equal_transformers(captioner, original, images, beams):
    assert_same(captioner, original, images, beams=beams)
    captions = [ids_of(captioner.tokens(image[None], captioner.settings(beams=beams)))[0] for image in images]
    assert len({tuple(ids) for ids in captions}) > 30  # the test would say little if all were alike
    assert len({len(ids) for ids in captions}) > 8


@pytest.mark.parametrize("beams", [1, 2, 5])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_captions_with_a_prefix(captioner, original, images, prefix, beams):
    assert_same(captioner, original, images[:6], prefix=prefix, beams=beams)


@pytest.mark.parametrize("beams", [1, 3, 4])
@pytest.mark.parametrize("lengths", [(0, 2), (0, 5), (3, 3), (6, 20), (12, 12), (30, 32)])
def test_captions_within_lengths(captioner, original, images, lengths, beams):
    low, high = lengths
    prefix = "a" if high % 2 else ""
    assert_same(captioner, original, images[:8], prefix, beams, min_length=low, max_length=high)


@pytest.mark.parametrize("beams", [1, 3])
def test_images_of_a_batch_do_not_influence_each_other(captioner, images, beams):
    batch = np.stack([resize(image, 40) for image in images[:7]])
    settings = captioner.settings(beams=beams, prefix="the", min_length=4)
    alone = [captioner.captions(image[None], settings)[0] for image in batch]
    assert captioner.captions(batch, settings) == alone
    assert captioner.captions(batch[::-1].copy(), settings) == alone[::-1]


@pytest.mark.parametrize("prefix", ["", "the red circle"])
def test_a_host_that_looks_every_few_tokens_sees_the_same(captioner, images, monkeypatch, prefix):
    settings = captioner.settings(prefix=prefix)
    expected = [ids_of(captioner.tokens(image[None], settings)) for image in images[:12]]
    monkeypatch.setattr(type(captioner._step), "asynchronous", True)
    assert [ids_of(captioner.tokens(image[None], settings)) for image in images[:12]] == expected


def test_every_token_is_a_step(captioner, images):
    image = images[0][None]
    settings = captioner.settings(prefix="a small", min_length=8, max_length=9)
    steps = captioner.steps(image, settings)
    lengths = []
    while True:
        try:
            lengths.append(next(steps))
        except StopIteration as stop:
            assert stop.value == captioner.captions(image, settings)
            break
    assert lengths == list(range(2, lengths[-1] + 1))
    assert lengths[-1] in (8, 9)


def test_a_search_that_was_dropped_leaves_no_trace(captioner, images):
    whole = captioner.captions(images[4][None], captioner.settings(beams=3))
    steps = captioner.steps(images[3][None], captioner.settings(beams=2, max_length=20))
    next(steps)
    steps.close()
    assert captioner.captions(images[4][None], captioner.settings(beams=3)) == whole


def test_stale_caches_are_never_read(captioner, images):
    expected = ids_of(captioner.tokens(images[0][None], captioner.settings(beams=3)))
    for name in ("keys", "values"):
        cache = captioner._step.inputs[name]
        cache.write(np.full(cache.shape, np.nan, cache.dtype))
    assert ids_of(captioner.tokens(images[0][None], captioner.settings(beams=3))) == expected


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"beams": 0}, "beams"), ({"beams": MAX_BEAMS + 1}, "beams"), ({"beams": 1.5}, "beams"),
     ({"beams": True}, "beams"), ({"max_length": 1}, "max_length"), ({"max_length": 33}, "max_length"),
     ({"max_length": "9"}, "max_length"), ({"min_length": -1}, "min_length"), ({"min_length": 33}, "min_length"),
     ({"min_length": 9, "max_length": 8}, "min_length"), ({"prefix": "a " * 31}, "31 tokens"),
     ({"prefix": "a a a", "max_length": 4}, "3 tokens"), ({"prefix": "\ud800"}, "UTF-8"),
     ({"prefix": None}, "text")],
)  # fmt: skip
def test_bad_settings_are_refused(captioner, settings, reason):
    with pytest.raises(SettingsError, match=reason):
        captioner.settings(**settings)


@pytest.mark.parametrize(
    "images",
    [np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8, 4), np.uint8), np.zeros((1, 8, 8, 3), np.float32),
     np.zeros((0, 8, 8, 3), np.uint8), np.zeros((1, 0, 8, 3), np.uint8), [[1]], None],
)  # fmt: skip
def test_bad_images_are_refused(captioner, images):
    with pytest.raises(SettingsError, match="images"):
        captioner.steps(images, captioner.settings())


@pytest.mark.parametrize("shape", [(64, 64), (100, 40), (17, 300), (32, 32), (500, 700)])
def test_the_graph_resizes_as_pillow_does(shape):
    image = np.random.default_rng(shape[0]).integers(0, 256, (2, *shape, 3), np.uint8)
    image[1] = np.random.default_rng(shape[1]).integers(0, 2, (*shape, 3)) * 255
    columns, rows = (torch.tensor(matrix) for matrix in resize_matrices(*shape, 32))
    pixels = resize_exactly(torch.tensor(image), columns, rows)
    expected = np.stack([resize(one, 32) for one in image]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(pixels.numpy(), expected)


@pytest.mark.slow  # exports another captioner
def test_fp16_captions_are_nearly_those_of_fp32(tiny_blip_folder, tmp_path, captioner, images):
    half = open_captioner(export(tiny_blip_folder, tmp_path, "fp16"))
    assert half._step.inputs["keys"].dtype == np.float16
    settings = captioner.settings()
    same = [half.captions(image[None], settings) == captioner.captions(image[None], settings) for image in images]
    assert sum(same) >= 0.7 * len(same)  # random weights leave many tokens nearly tied


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("beams", [2, 3, 6])
def test_beam_search_of_full_width_finds_the_best_caption(seed, beams):
    """On a table of logits: a search wide enough for every beginning finds the highest mean log-probability."""
    vocab, most, end = 14, 3, 13
    logits = np.random.default_rng(seed).normal(size=(vocab, vocab)).astype(np.float32) * 2
    search = BeamSearch([0], 1, beams, end, 0, most)
    token = np.zeros(beams, np.int64)
    while not search.done:
        parent = search.advance(logits[token])
        token = search.running[0, :, -1]
        assert set(parent) <= set(range(beams))
    (found,) = search.results()
    chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def mean(ids):
        return np.mean([chances[a, b] for a, b in pairwise(ids)])

    likeliest = [0]
    while len(likeliest) < most:
        likeliest.append(int(logits[likeliest[-1]].argmax()))
    assert len(found) == most or found[-1] == end
    if beams == 6:
        assert mean(found) >= mean(greedy_ids(likeliest, 1, end)) - 1e-5


def test_pickled_weights_are_refused(tiny_blip_folder, tmp_path):
    folder = tmp_path / "blip"
    shutil.copytree(tiny_blip_folder, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ExportError, match=r"pytorch_model\.bin.*never loaded"):
        load_blip(folder)


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [("config.json", None, r"no config\.json"), ("model.safetensors", None, r"no model\.safetensors"),
     ("model.safetensors", b"broken", "cannot be loaded"), ("config.json", b"{}", "cannot be loaded|lacks")],
)  # fmt: skip
def test_folders_that_are_no_captioner_are_refused(tiny_blip_folder, tmp_path, file, change, reason):
    folder = tmp_path / "blip"
    shutil.copytree(tiny_blip_folder, folder)
    if change is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(change)
    with pytest.raises(ExportError, match=reason):
        load_blip(folder)


# How images are prepared

# What a setting of the processor's signature is good for, where no graph has to follow it.
UNUSED = {
    "default_to_square": "how a size is read",
    "do_convert_rgb": "images are RGB here",
    "data_format": "the order of the output's axes",
    "input_data_format": "images come from Pillow",
    "device": "where it runs",
    "return_tensors": "the type of the output",
    "disable_grouping": "how it runs",
    "image_seq_length": "of models that put images among their tokens",
}
HONOURED = [
    {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.9, 0.8, 0.7]},
    {"image_mean": 0.5, "image_std": 0.25},
    {"do_normalize": False},
    {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 55.0, 50.0]},
    {"rescale_factor": 1 / 127.5},
    {"size": 32},
    {"size": [32, 32]},
    {"do_center_crop": True, "crop_size": 32},
    {"do_pad": True},
    {"resample": None},
    {"image_processor_type": "BlipImageProcessorFast"},
    dict.fromkeys(("image_mean", "image_std", "do_resize", "rescale_factor")),
]
REFUSED = [
    ({"resample": 2}, "resample = 2"),
    ({"size": 48}, "size = .*48"),
    ({"size": {"shortest_edge": 32}}, "shortest_edge"),
    ({"size": "large"}, "cannot be read"),
    ({"do_resize": False}, "do_resize = False"),
    ({"do_center_crop": True, "crop_size": 24}, "crop_size = .*24"),
    ({"do_pad": True, "pad_size": 40}, "pad_size = .*40"),
    ({"image_std": 0.0}, "image_std = 0"),
    ({"image_mean": [0.5, 0.5]}, "three numbers each"),
    ({"image_processor_type": "ViTImageProcessor"}, "a ViTImageProcessor"),
]


def blip_with(folder, settings, target, nested):
    """A copy of the captioner that has other processor settings, in the new or the old file."""
    target = shutil.copytree(folder, target / "blip")
    path = target / "processor_config.json"
    content = json.loads(path.read_text())
    own = {**content["image_processor"], **settings}
    own = {key: value for key, value in own.items() if value is not None}
    if nested:
        path.write_text(json.dumps({**content, "image_processor": own}))
    else:
        path.unlink()
        (target / "preprocessor_config.json").write_text(json.dumps(own))
    return target


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("settings", HONOURED)
def test_images_are_prepared_as_the_processor_does(tiny_blip_folder, tmp_path, settings, nested):
    copy = blip_with(tiny_blip_folder, settings, tmp_path, nested)
    parts = load_blip(copy)
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    expected = BlipImageProcessorPil.from_pretrained(copy)(Image.fromarray(image), return_tensors="np")
    pixels = (resize(image, 32) / 255 - parts.mean) / parts.std
    np.testing.assert_allclose(pixels.transpose(2, 0, 1), expected["pixel_values"][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_images_prepared_in_another_way_are_refused(tiny_blip_folder, tmp_path, settings, message):
    with pytest.raises(ExportError, match=message):
        load_blip(blip_with(tiny_blip_folder, settings, tmp_path, nested=True))


def test_every_setting_of_the_processor_is_known():
    tried = {key for settings in (*HONOURED, *(settings for settings, _ in REFUSED)) for key in settings}
    signature = set(BlipImageProcessorPil.valid_kwargs.__annotations__)
    assert signature == (tried - {"image_processor_type"}) | set(UNUSED)
