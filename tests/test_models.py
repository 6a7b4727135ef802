"""The default model's data and package: the grammar, the pictures, the tokenizers, the shipped weights."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

MODELS = Path(__file__).parents[1] / "models"


@pytest.fixture(scope="module")
def scenes() -> ModuleType:
    sys.path.insert(0, str(MODELS))
    try:
        return importlib.import_module("scenes")
    finally:
        sys.path.remove(str(MODELS))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("index", range(40))
def test_a_caption_names_its_scene(scenes: ModuleType, index: int, swapped: bool) -> None:
    scene, _, _ = scenes.example(7, index)
    assert scenes.parse(scene.caption(swapped)) == scene
    assert scenes.from_labels(scene.labels()) == scene
    assert set(scene.caption(swapped).split()) <= set(scenes.WORDS)


def test_pictures_repeat_and_show_their_colours(scenes: ModuleType) -> None:
    for index in range(20):
        scene, picture, masks = scenes.example(3, index)
        again = scenes.example(3, index)
        assert scene == again[0]
        assert np.array_equal(picture, again[1])
        for thing, mask in zip(scene.things, masks, strict=True):
            assert (picture[mask == 1] == scenes.COLOURS[thing.colour]).all()
            assert mask.sum() > 100  # pixels


def test_splits_share_no_composition(scenes: ModuleType) -> None:
    training = {scene.caption() for scene, _, _ in scenes.examples(0, 300)}
    held_out = {scene.caption() for scene, _, _ in scenes.examples(0, 300, held_out=True)}
    assert not training & held_out


def test_adherence_counts_attributes_under_the_best_match(scenes: ModuleType) -> None:
    wanted = scenes.parse("a large red circle left of a small blue square on a striped yellow background")
    turned = scenes.parse("a large red circle right of a small blue square on a striped yellow background")
    alone = scenes.parse("a small blue square on a striped yellow background")
    assert scenes.adherence(wanted, wanted) == 1
    assert scenes.adherence(wanted, turned) == pytest.approx(8 / 9)  # only the relation is wrong
    assert scenes.adherence(wanted, alone) == pytest.approx(5 / 9)  # one object and the ground
    assert scenes.adherence(alone, wanted) == pytest.approx(5 / 6)  # all but being alone
    assert scenes.matched(wanted, turned) == ([(thing, thing) for thing in wanted.things], False)
    assert scenes.matched(wanted, wanted)[1]
    assert scenes.parse("a photo of a cat") is None


def test_the_package_is_small_and_its_weights_are_half_precision() -> None:
    from safetensors import safe_open

    files = sorted(MODELS.glob("tiny/**/*.safetensors"))
    assert len(files) == 4
    assert sum(path.stat().st_size for path in MODELS.glob("tiny/**/*") if path.is_file()) < 20e6
    for path in files:
        with safe_open(path, "np") as weights:
            for name in weights.keys():  # noqa: SIM118
                tensor = weights.get_tensor(name)
                assert tensor.dtype == np.float16, name
                assert np.isfinite(tensor).all(), name


def test_each_word_of_the_grammar_is_one_token(scenes: ModuleType) -> None:
    from tokenizers import Tokenizer

    for name in ("stable-diffusion/tokenizer", "blip"):
        tokenizer = Tokenizer.from_file(str(MODELS / "tiny" / name / "tokenizer.json"))
        for word in scenes.WORDS:
            assert len(tokenizer.encode(word, add_special_tokens=False).ids) == 1, (name, word)
