"""Measure the packaged models on held-out compositions: ``python models/evaluate.py``.

Prints the figures of the model card, a line of JSON each, then what is demanded of the models and whether they keep it
(exit code 1 when they do not). ``--sheet`` writes a contact sheet. The judge is the scorer; the captioner is judged on
its captions, parsed. Every picture starts from the noise of its own seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from networks import LATENT_SIDE, Scorer
from PIL import Image
from safetensors.torch import load_file
from scenes import Scene, adherence, agreements, examples, parse
from tqdm import tqdm
from train_scorer import read
from train_vae import to_model, to_uint8
from transformers import BlipForConditionalGeneration, BlipProcessor

from dnp.runtime.pictures import sheet

HERE = Path(__file__).parent
SEED = 1  # of the held-out scenes; training used 0
CONDITIONS = {"unconditional": 0.0, "plain w=2": 2.0, "plain w=4": 4.0, "DNS s=1": -1.0, "DNS s=2": -2.0}

VAE, REAL = "scorer on VAE reconstructions", "captions of real pictures"
DNP = {"DNP s=1, w=2": 2.0, "DNP s=1, w=4": 4.0}  # the pair (p, n*), n* being the caption of the image of DNS s=1
LOWER = "{} minus unconditional, paired"

# What is demanded: the condition, its figure, the lowest and the highest value.
GATES = (
    (VAE, "strict", 0.90, 1.0),
    (REAL, "adherence", 0.95, 1.0),
    (REAL, "shape", 0.90, 1.0),
    (REAL, "relation", 0.90, 1.0),
    ("plain w=4", "adherence", 0.75, 1.0),
    (LOWER.format("DNS s=1"), "at most", -1.0, 0.0),
)


@dataclass
class Models:
    """The packaged models in float32, and their judge."""

    pipeline: StableDiffusionPipeline
    blip: BlipForConditionalGeneration
    processor: BlipProcessor
    scorer: Scorer

    @classmethod
    def open(cls, folder: Path, scorer: Path) -> Models:
        """Open a package folder and the scorer's weights."""
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder / "stable-diffusion", torch_dtype=torch.float32, local_files_only=True
        )
        blip = BlipForConditionalGeneration.from_pretrained(folder / "blip", dtype=torch.float32).eval()
        judge = Scorer().eval()
        judge.load_state_dict({name: weight.float() for name, weight in load_file(scorer).items()})
        return cls(pipeline, blip, BlipProcessor.from_pretrained(folder / "blip"), judge)

    def context(self, texts: list[str]) -> torch.Tensor:
        """Text states ``[B, 32, width]``."""
        ids = self.pipeline.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.pipeline.text_encoder(ids).last_hidden_state

    @torch.inference_mode()
    def sample(self, prompts: list[str], scale: float, base: list[str] | None = None, steps: int = 25) -> np.ndarray:
        """``out = out_base + scale (out_prompt - out_base)``, DDIM; a negative ``scale`` is DNS with s = -scale.

        ``base`` is the empty prompt unless given. Returns uint8 ``[B, 64, 64, 3]``.
        """
        parts = [
            self._sample(prompts[at : at + 20], scale, (base or [""] * len(prompts))[at : at + 20], steps, at)
            for at in range(0, len(prompts), 20)
        ]
        return np.concatenate(parts)

    def _sample(self, prompts: list[str], scale: float, base: list[str], steps: int, seed: int) -> np.ndarray:
        unet, scheduler, vae = self.pipeline.unet, self.pipeline.scheduler, self.pipeline.vae
        shape = (1, unet.config.in_channels, LATENT_SIDE, LATENT_SIDE)
        x_t = torch.cat(
            [torch.randn(shape, generator=torch.Generator().manual_seed(seed + n)) for n in range(len(prompts))]
        )
        context = self.context([*base, *prompts])
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            out_base, out_prompt = unet(torch.cat([x_t, x_t]), t, context, return_dict=False)[0].chunk(2)
            x_t = scheduler.step(out_base + scale * (out_prompt - out_base), t, x_t, return_dict=False)[0]
        return to_uint8(vae.decode(x_t / vae.config.scaling_factor, return_dict=False)[0]).numpy()

    @torch.inference_mode()
    def reconstruct(self, pictures: np.ndarray) -> np.ndarray:
        """Through the VAE and back, uint8 in and out ``[B, 64, 64, 3]``."""
        parts = []
        for chunk in torch.from_numpy(pictures).split(50):
            latents = self.pipeline.vae.encode(to_model(chunk)).latent_dist.mode()
            parts.append(to_uint8(self.pipeline.vae.decode(latents, return_dict=False)[0]).numpy())
        return np.concatenate(parts)

    @torch.inference_mode()
    def caption(self, pictures: np.ndarray) -> list[str]:
        """Greedy captions of uint8 pictures."""
        captions = []
        for at in range(0, len(pictures), 50):
            inputs = self.processor(images=[Image.fromarray(p) for p in pictures[at : at + 50]], return_tensors="pt")
            ids = self.blip.generate(**inputs, max_new_tokens=24)
            captions += self.processor.batch_decode(ids, skip_special_tokens=True)
        return captions


def mean_adherence(wanted: list[Scene], seen: list[Scene | None]) -> float:
    """Mean over the pictures; a caption outside the grammar sees nothing."""
    return float(np.mean([adherence(a, b) for a, b in zip(wanted, seen, strict=True)]))


def strict(wanted: list[Scene], seen: list[Scene | None]) -> float:
    """Share of pictures with every attribute right."""
    return float(np.mean([a == b for a, b in zip(wanted, seen, strict=True)]))


def per_attribute(wanted: list[Scene], seen: list[Scene | None]) -> dict[str, float]:
    """Share right of each kind of attribute, objects matched as for the adherence."""
    each = [agreements(a, b) for a, b in zip(wanted, seen, strict=True)]
    return {kind: round(float(np.mean([hit for row in each for hit in row[kind]])), 3) for kind in each[0]}


def judge(wanted: list[Scene], seen: list[Scene | None]) -> dict[str, object]:
    """The three views of one condition."""
    return {
        "adherence": round(mean_adherence(wanted, seen), 3),
        "strict": round(strict(wanted, seen), 3),
        **per_attribute(wanted, seen),
    }


def paired(differences: np.ndarray) -> dict[str, object]:
    """Mean of a paired difference in adherence and its 95 % bootstrap interval over the prompts."""
    rng = np.random.default_rng(0)
    means = rng.choice(differences, (4000, len(differences))).mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5)).round(3).tolist()
    return {"adherence": round(float(differences.mean()), 3), "at least": low, "at most": high}


def gates(report: dict[str, dict[str, object]]) -> list[tuple[str, bool]]:
    """Each demand as a line of text, and whether it is kept."""
    lines = []
    for name, figure, low, high in GATES:
        value = report[name][figure]
        kept = low <= value <= high
        lines.append(
            (f"{name:42}{figure:>10} {value:6.3f}, wanted {low:g} to {high:g}: {'yes' if kept else 'NO'}", kept)
        )
    return lines


def contact_sheet(prompts: list[str], columns: dict[str, np.ndarray], path: Path, rows: int = 12) -> None:
    """One row for each prompt, one labelled column for each condition."""
    cells = [[(Image.fromarray(column[n]), "") for column in columns.values()] for n in range(rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(cells, headings=list(columns), titles=prompts[:rows], cell=128).save(path)


def evaluate(models: Models, count: int, picture: Path | None) -> dict[str, dict[str, object]]:
    """All conditions on ``count`` held-out scenes (the real pictures and captions on five times as many)."""
    drawn = list(examples(SEED, 5 * count, held_out=True))
    scenes, pictures = [scene for scene, _, _ in drawn], np.stack([picture for _, picture, _ in drawn])
    prompts, wanted = [scene.caption() for scene in scenes[:count]], scenes[:count]
    report: dict[str, dict[str, object]] = {}
    bar = tqdm(total=7 + len(CONDITIONS) + len(DNP), desc="conditions")

    def note(name: str, scenes: list[Scene], seen: list[Scene | None]) -> None:
        report[name] = judge(scenes, seen)
        bar.update()

    rebuilt = models.reconstruct(pictures)
    note("scorer on real pictures", scenes, read(models.scorer, pictures))
    note(VAE, scenes, read(models.scorer, rebuilt))
    note(REAL, scenes, [parse(text) for text in models.caption(pictures)])
    note("captions of VAE reconstructions", scenes, [parse(text) for text in models.caption(rebuilt)])
    note("another prompt's real picture (chance)", wanted, scenes[1 : count + 1])

    shown = {"the scene": pictures[:count]}
    scores = {}

    def sample(name: str, scale: float, base: list[str] | None = None) -> None:
        shown[name] = models.sample(prompts, scale, base)
        seen = read(models.scorer, shown[name])
        note(name, wanted, seen)
        scores[name] = np.array([adherence(a, b) for a, b in zip(wanted, seen, strict=True)])

    for name, scale in CONDITIONS.items():
        sample(name, scale)
    captions = {name: models.caption(shown[name]) for name in ("DNS s=1", "DNS s=2")}
    for name, texts in captions.items():
        note(f"captions of {name} against the scorer", read(models.scorer, shown[name]), [parse(t) for t in texts])
    for name, scale in DNP.items():
        sample(name, scale, captions["DNS s=1"])
    bar.close()
    for name in ("DNS s=1", "DNS s=2"):
        report[LOWER.format(name)] = paired(scores[name] - scores["unconditional"])
    for name, scale in DNP.items():
        report[f"{name} minus plain, paired"] = paired(scores[name] - scores[f"plain w={scale:g}"])
    if picture:
        contact_sheet(prompts, shown, picture)
    return report


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=HERE / "tiny")
    parser.add_argument("--scorer", type=Path, default=HERE / "scorer" / "scorer.safetensors")
    parser.add_argument("--prompts", type=int, default=100, help="held-out prompts that are sampled")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet here (PNG)")
    arguments = parser.parse_args()
    report = evaluate(Models.open(arguments.models, arguments.scorer), arguments.prompts, arguments.sheet)
    for name, figures in report.items():
        print(f"{name:42}", json.dumps(figures))
    lines = gates(report)
    print("", *(text for text, _ in lines), sep="\n")
    sys.exit(not all(kept for _, kept in lines))


if __name__ == "__main__":
    main()
