"""The quality benchmark: its statistics against scipy, its judges against transformers, its experiment in small."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dnp.engine import Bundle

QUALITY = Path(__file__).parents[1] / "benchmarks" / "quality"
MODULES = ("estimates", "evaluation_sets", "experiment", "report", "quality")


@pytest.fixture(scope="module")
def quality() -> dict[str, ModuleType]:
    """The benchmark's modules, imported as its program imports them."""
    before = list(sys.path)
    sys.path.insert(0, str(QUALITY))
    try:
        return {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path[:] = before


def test_the_interval_is_scipys(quality):
    from scipy.stats import bootstrap

    values = np.random.default_rng(3).normal(0.4, 0.2, 80)
    ours = quality["estimates"].estimate(values)
    theirs = bootstrap((values,), np.mean, method="percentile", rng=1).confidence_interval
    assert ours.mean == pytest.approx(values.mean()) and ours.count == 80
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.003)
    with pytest.raises(ValueError, match="no values"):
        quality["estimates"].estimate([])


def test_the_frechet_distance_is_the_published_formula(quality):
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (200, 12)), rng.normal(0.3, 2, (200, 12))
    distance = quality["estimates"].frechet_distance
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(covariances[0] @ covariances[1]).real
    wanted = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(sum(covariances) - 2 * root)
    assert distance(a, b) == pytest.approx(wanted) == distance(b, a)
    assert distance(a, a) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="two rows"):
        distance(a[:1], b)


def test_the_committed_table_is_what_the_figures_say(quality):
    results = QUALITY.parent / "results"
    found = json.loads((results / "quality.json").read_text(encoding="utf-8"))
    assert (results / "quality.md").read_text(encoding="utf-8") == quality["report"].table(found)
    assert found["prompts"]["reporting"] >= 300
    assert found["bundle"]["fingerprint"] == Bundle.default().fingerprint, (
        "the default bundle was made anew: make quality"
    )


def test_the_spread_is_the_mean_distance_of_pairs(quality):
    samples = np.array([[[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]])
    assert quality["estimates"].spread(samples) == pytest.approx([10 / 3])
    with pytest.raises(ValueError, match="two samples"):
        quality["estimates"].spread(samples[:, :1])


@given(seed=st.integers(0, 2**32))
def test_opposite_words_share_nothing_with_the_prompt(quality, seed):
    sets = quality["evaluation_sets"]
    scene = sets.grammar.draw_scene(np.random.default_rng(seed))
    other = sets.opposite(scene)
    assert other == sets.opposite(scene) == sets.parse(other.caption())
    agreed = sets.agreements(scene, other)
    mixed = len({thing.size for thing in scene.things}) == 2
    assert sum(agreed.pop("size")) == mixed and not any(hit for hits in agreed.values() for hit in hits)


def test_prompts_are_held_out_and_different(quality):
    scenes = quality["evaluation_sets"].Scenes.draw(60)
    assert len(set(scenes.prompts)) == 60 and all(scene.held_out for scene in scenes.scenes)
    assert not set(scenes.part(slice(20)).prompts) & set(scenes.part(slice(20, 60)).prompts)
    assert scenes.scores(scenes.real(0)).mean() > 0.98  # the judge knows the scenes as they are drawn
    with pytest.raises(ValueError, match="take fewer"):
        quality["evaluation_sets"].Scenes.draw(10**6)


def test_another_caption_is_never_ones_own(quality):
    shuffled = quality["evaluation_sets"].shuffled
    assert shuffled(["a", "b", "c"]) == ["b", "c", "a"]
    for texts in (["a"], ["a", "a", "b"]):
        with pytest.raises(ValueError, match="at least two"):
            shuffled(texts)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A CLIP model of random weights with its processor, as transformers saves it."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(QUALITY.parents[1] / "models/tiny/stable-diffusion/tokenizer")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**small, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 32},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


PROMPTS = [
    "a small red circle",
    "a large blue square",
    "",
    "a large blue square",
    "a white cross on a black background",
]


def test_the_clip_score_is_transformers_own(quality, clip_folder, tmp_path):
    from transformers import CLIPModel, CLIPProcessor

    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    evaluated = quality["evaluation_sets"].ClipTexts.load(tmp_path / "prompts.txt", clip_folder)
    assert evaluated.prompts == [PROMPTS[0], PROMPTS[1], PROMPTS[4]]
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    inputs = processor(
        text=evaluated.prompts, images=[*map(Image.fromarray, images)], return_tensors="pt", padding=True
    )
    wanted = model(**inputs).logits_per_image.diag() / model.logit_scale.exp() * 100
    assert evaluated.scores(images) == pytest.approx(wanted.detach().numpy(), abs=1e-4)


def test_prompts_of_ones_own_are_refused_by_name(quality, clip_folder, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    load = quality["evaluation_sets"].ClipTexts.load
    with pytest.raises(ValueError, match=r"empty\.txt has no prompts"):
        load(tmp_path / "empty.txt", clip_folder)
    with pytest.raises(ValueError, match=r"no config\.json"):
        load(tmp_path / "two.txt", tmp_path)
    main = quality["quality"].main
    for arguments, message in (
        (["--texts", str(tmp_path / "two.txt")], "go together"),
        (["--texts", str(tmp_path / "two.txt"), "--clip", str(clip_folder)], "lower --choosing"),
    ):
        answer = CliRunner().invoke(main, arguments)
        assert answer.exit_code == 2 and message in answer.output, answer.output


SMALL = ["--w", "2", "--w", "4", "--s", "1", "--sampler", "ddim", "--steps", "2", "--backend", "cpu"]


def test_the_experiment_in_small(quality, tmp_path):
    sizes = ["--prompts", "4", "--choosing", "2", "--work", str(tmp_path / "work")]
    for out in ("first", "again"):  # the second time from what is kept
        answer = CliRunner().invoke(quality["quality"].main, [*SMALL, *sizes, "--out", str(tmp_path / out)])
        assert answer.exit_code == 0, answer.output
    found, again = (json.loads((tmp_path / out / "quality.json").read_text()) for out in ("first", "again"))
    for report in (found, again):
        del report["command"], report["seconds"]
    assert found == again
    assert (tmp_path / "first/quality.png").read_bytes() == (tmp_path / "again/quality.png").read_bytes()

    methods = ["plain (∅)", "DNP (n*)", "another caption", "opposite words", "oracle caption"]
    assert [row["method"] for row in found["conditions"]] == methods
    assert len(found["chosen from"]) == 2 * len(methods)
    for row in found["chosen from"]:  # the best of the grid is what is reported
        (best,) = (r for r in found["conditions"] if r["method"] == row["method"])
        chosen = [r for r in found["chosen from"] if r["method"] == row["method"] and r["w"] == best["w"]]
        assert row["mean"] <= chosen[0]["mean"]
    both = sum(row["attributes"] for row in found["why"] if row["w"] == found["conditions"][0]["w"])
    assert both == sum(3 * len(scene.things) + 3 for scene in quality["evaluation_sets"].Scenes.draw(6).scenes[2:])
    table = (tmp_path / "first/quality.md").read_text()
    assert all(f"| {method} |" in table for method in methods)
    with Image.open(tmp_path / "first/quality-sheet.png") as sheet:
        assert sheet.width > 4 * 192 and sheet.height > 4 * 192


def test_a_bundle_with_prompts_and_a_judge_of_ones_own(quality, clip_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, "a red cross"]), encoding="utf-8")
    arguments = ["--texts", str(tmp_path / "prompts.txt"), "--clip", str(clip_folder), "--choosing", "2"]
    folders = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    answer = CliRunner().invoke(quality["quality"].main, [*SMALL, *arguments, *folders])
    assert answer.exit_code == 0, answer.output
    found = json.loads((tmp_path / "out/quality.json").read_text())
    assert [row["method"] for row in found["conditions"]] == ["plain (∅)", "DNP (n*)", "another caption"]
    assert found["prompts"] == {"choosing": 2, "reporting": 2} and "CLIP" in found["unit"]
    assert not {"captions", "frechet", "why"} & set(found)
