"""The denoiser's training: its loss against diffusers' scheduler, its last run in small, what came of it."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

MODELS = Path(__file__).parents[1] / "models"
SCENES = 6


@pytest.fixture(scope="module")
def models() -> dict[str, ModuleType]:
    """The programs' modules, imported as they import each other; workers are given the same path."""
    sys.path.insert(0, str(MODELS))
    try:
        yield {name: importlib.import_module(name) for name in ("evaluate", "networks", "train_diffusion", "training")}
    finally:
        sys.path.remove(str(MODELS))


@pytest.fixture
def work(models, tmp_path) -> Path:
    """What the stages before leave: latents, text states, and a run named "before" of random weights."""
    training, networks = models["training"], models["networks"]
    torch.manual_seed(0)
    torch.save(torch.randn(SCENES, 4, 16, 16).half(), tmp_path / "latents.pt")
    contexts, empty = torch.randn(SCENES, 2, 32, networks.TEXT_WIDTH), torch.zeros(32, networks.TEXT_WIDTH)
    torch.save({"contexts": contexts.bfloat16(), "empty": empty.bfloat16()}, tmp_path / "contexts.pt")
    before = training.Recipe("before", steps=1, rate=0.0)
    state = training.FlatWeights(networks.new_unet(), before).state(1)
    torch.save(state, training.checkpoint(before, tmp_path))
    return tmp_path


def runs(models: dict[str, ModuleType], **settings) -> tuple:
    """The run "before", and the last of the recipe with some of its settings changed."""
    last = models["train_diffusion"].RUNS[-1]
    before = replace(last, recipe=models["training"].Recipe("before", steps=1, rate=0.0))
    return before, replace(last, **({"scenes": SCENES} | settings))


class Knowing(nn.Module):
    """Answers with diffusers' own velocity, since it knows the one latent; keeps what it was asked."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, scheduler, x_0: torch.Tensor) -> None:
        super().__init__()
        self.scheduler, self.x_0 = scheduler, x_0

    def forward(self, x_t, t, context, return_dict):
        self.t, self.context = t, context
        alpha_bar = self.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        x_0 = self.x_0.expand_as(x_t)
        eps = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        return (self.scheduler.get_velocity(x_0, eps, t),)


def test_the_loss_is_zero_for_diffusers_velocity_and_looks_where_the_recipe_says(models, work):
    train_diffusion = models["train_diffusion"]
    recipe = train_diffusion.RUNS[-1].recipe
    task = train_diffusion.Denoiser(work, runs(models, batch=2000, scenes=1))
    knowing = Knowing(models["networks"].new_scheduler(), train_diffusion.load_latents(work)[:1])
    for step, mean in ((0, 0.4), (recipe.steps, -0.3)):
        loss = task.loss(knowing, torch.Generator().manual_seed(5), step)
        assert loss == pytest.approx(0, abs=1e-6)
        logit = torch.logit((knowing.t + 0.5) / 1000)
        assert logit.mean() == pytest.approx(mean, abs=0.1) and logit.std() == pytest.approx(1.3, abs=0.1)
        assert (knowing.context == 0).all((1, 2)).float().mean() == pytest.approx(0.12, abs=0.03)  # the empty caption
    knowing.x_0 = knowing.x_0 + 0.1
    assert task.loss(knowing, torch.Generator().manual_seed(5), 0) > 1e-3


@pytest.mark.slow  # trains twice
def test_the_last_run_trains_on_from_the_one_before(models, work):
    training, train_diffusion = models["training"], models["train_diffusion"]
    recipe = replace(train_diffusion.RUNS[-1].recipe, steps=3)
    chain = runs(models, batch=2, recipe=recipe)
    training.fit(train_diffusion.Denoiser(work, chain), recipe, work, workers=1)
    state, before = torch.load(training.checkpoint(recipe, work)), torch.load(work / "before.pt")
    assert state["step"] == 3
    moved = (state["vectors"][0] - before["vectors"][0]).abs().max()
    assert 0 < moved < 2 * recipe.rate * (1 + 2 + 3) / recipe.warmup  # an AdamW step is about as long as the rate
    average = torch.cat([p.flatten() for p in train_diffusion.trained_unet(work, chain).parameters()])
    assert torch.equal(average, state["averages"][0])


def test_the_figures_of_the_model_card_keep_the_bounds(models):
    evaluate, lines = models["evaluate"], (MODELS / "README.md").read_text(encoding="utf-8").splitlines()
    rows: dict[str, list[str]] = {}
    for line in lines:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows.setdefault(name, cells)
    report: dict[str, dict[str, float]] = {}
    for name, figure, *_ in evaluate.GATES:
        if figure == "at most":  # of the interval, the last cell
            value = rows[name.removesuffix(", paired")][1].split(" to ")[1]
        else:
            value = rows[name][rows["condition"].index(figure)]
        report.setdefault(name, {})[figure] = float(value)
    assert all(kept for _, kept in evaluate.gates(report)), report
    report["plain w=4"]["adherence"] = 0.7
    assert not all(kept for _, kept in evaluate.gates(report))
