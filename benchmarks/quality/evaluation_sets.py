"""What the quality of images is measured on: prompts, a judge that is not the captioner, and what it needs to know."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors.torch import load_file

MODELS = Path(__file__).parents[2] / "models"
sys.path.insert(0, str(MODELS))
import scenes as grammar  # noqa: E402
from networks import Scorer  # noqa: E402
from scenes import Scene, Thing, adherence, agreements, parse  # noqa: E402
from train_scorer import read  # noqa: E402
from train_vae import to_model  # noqa: E402

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]


class EvaluationSet(Protocol):
    """A set of prompts and their judge. ``control`` negatives are what n* has to be better than."""

    name: str
    unit: str
    prompts: list[str]
    control_names: tuple[str, ...]

    def part(self, chosen: slice) -> EvaluationSet:
        """The same with some of the prompts."""

    def scores(self, images: Pixels) -> Floats:
        """How well image ``i`` shows prompt ``i``: ``[N]``, higher is better."""

    def features(self, images: Pixels) -> Floats:
        """What the judge sees in any images, ``[N, D]``: for distances between sets of them."""

    def controls(self, dns_images: Pixels) -> dict[str, list[str]]:
        """The negatives of ``control_names``, one for each prompt; the DNS images are those of the same prompts."""


def shuffled(texts: Sequence[str]) -> list[str]:
    """Another text for each text: the next one. Raises ValueError when two neighbours are the same."""
    moved = [*texts[1:], *texts[:1]]
    if any(text == other for text, other in zip(texts, moved, strict=True)):
        raise ValueError("the prompts repeat themselves; give at least two, and each of them once")
    return moved


@dataclass(frozen=True)
class Scenes:
    """Held-out scenes of the default model's grammar, and the scorer, which reads every attribute of a picture."""

    scenes: tuple[Scene, ...]
    name = "held-out scenes of the default model's grammar"
    unit = "adherence (share of the prompt's attributes that are there)"
    control_names = ("another caption", "opposite words", "oracle caption")

    @classmethod
    def draw(cls, count: int) -> Scenes:
        """``count`` different compositions that no model was trained on.

        Raises ValueError when the grammar has fewer held out.
        """
        rng, drawn, misses = np.random.default_rng(20), {}, 0
        while len(drawn) < count:
            scene = grammar.draw_scene(rng)
            new = scene.held_out and scene.caption() not in drawn
            misses = 0 if new else misses + 1
            if misses > 5_000:
                raise ValueError(f"the grammar has about {len(drawn)} compositions held out, not {count}; take fewer")
            if new:
                drawn[scene.caption()] = scene
        return cls(tuple(drawn.values()))

    @property
    def prompts(self) -> list[str]:
        """One caption for each scene."""
        return [scene.caption() for scene in self.scenes]

    def part(self, chosen: slice) -> Scenes:
        return replace(self, scenes=self.scenes[chosen])

    def scores(self, images: Pixels) -> Floats:
        """Adherence, 0 to 1."""
        return np.array([adherence(*pair) for pair in zip(self.scenes, self.read(images), strict=True)])

    def strict(self, images: Pixels) -> Floats:
        """1 where every attribute is right, ``[N]``."""
        return np.array([float(a == b) for a, b in zip(self.scenes, self.read(images), strict=True)])

    def features(self, images: Pixels) -> Floats:
        """The scorer's last hidden layer, ``[N, 160]``."""
        with torch.inference_mode():
            parts = [self._judge.trunk(to_model(part)) for part in torch.from_numpy(images).split(250)]
        return torch.cat(parts).double().numpy()

    def controls(self, dns_images: Pixels) -> dict[str, list[str]]:
        """A caption of another scene; the opposite of the prompt; and what the scorer sees in the DNS image."""
        return {
            "another caption": shuffled(self.prompts),
            "opposite words": [opposite(scene).caption() for scene in self.scenes],
            "oracle caption": [scene.caption() for scene in self.read(dns_images)],
        }

    def read(self, images: Pixels) -> list[Scene]:
        """The scenes that the scorer sees."""
        return read(self._judge, images)

    def real(self, seed: int) -> Pixels:
        """Pictures of the same scenes as they are drawn, uint8 ``[N, 64, 64, 3]``."""
        rng = np.random.default_rng(seed)
        return np.stack([grammar.paint(scene, grammar.coverage(scene, rng)) for scene in self.scenes])

    def right_and_shared(self, images: Pixels, negatives: Sequence[str]) -> tuple[list[bool], list[bool]]:
        """For every attribute of every prompt: is it right in the image, and does the negative name it too?

        A negative outside the grammar names nothing.
        """
        right: list[bool] = []
        shared: list[bool] = []
        for wanted, seen, negative in zip(self.scenes, self.read(images), negatives, strict=True):
            named = parse(negative)
            for attribute, hits in agreements(wanted, seen).items():
                right += hits
                shared += [False] * len(hits) if named is None else agreements(wanted, named)[attribute]
        return right, shared

    @cached_property
    def _judge(self) -> Scorer:
        return _scorer()


def _scorer() -> Scorer:
    judge = Scorer().eval()
    weights = load_file(MODELS / "scorer" / "scorer.safetensors")
    judge.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return judge


def opposite(scene: Scene) -> Scene:
    """A scene that shares nothing with ``scene``: other colours, shapes and layout, the other size and texture.

    Where one object of ``scene`` is small and the other large, one of them has a size that is shared. The same for the
    same scene: where several would do, a checksum of the caption decides.
    """
    rng = np.random.default_rng(zlib.crc32(scene.caption().encode()))
    taken = {scene.ground, *(thing.colour for thing in scene.things)}
    ground, *colours = (str(colour) for colour in rng.permutation([c for c in grammar.COLOUR_NAMES if c not in taken]))
    shapes = [shape for shape in grammar.SHAPES if shape not in {thing.shape for thing in scene.things}]
    size = _other(scene.things[0].size, grammar.SIZE_NAMES)
    things = tuple(Thing(size, colour, str(rng.choice(shapes))) for colour in colours[:2])
    layout = {"single": "row", "row": "column", "column": "row"}[scene.layout]
    return Scene(layout, things, _other(scene.texture, grammar.TEXTURES), ground)


def _other(word: str, pair: tuple[str, ...]) -> str:
    return pair[1 - pair.index(word)]


@dataclass(frozen=True)
class ClipTexts:
    """Prompts of one's own, and a CLIP model as the judge: for bundles of real models.

    Attributes:
        texts: the prompts.
        folder: a transformers folder of a CLIP model with its processor, such as ``openai/clip-vit-large-patch14``'s.
    """

    texts: tuple[str, ...]
    folder: Path
    name = "prompts of the user's own"
    unit = "CLIP score (100 × cosine of image and prompt)"
    control_names = ("another caption",)

    @classmethod
    def load(cls, file: Path, folder: Path) -> ClipTexts:
        """One prompt a line; empty lines are skipped. Raises ValueError when there is none, OSError as reading does."""
        texts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not texts:
            raise ValueError(f"{file} has no prompts; write one on each line")
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} is no transformers folder of a CLIP model: it has no config.json")
        return cls(tuple(dict.fromkeys(texts)), folder)

    @property
    def prompts(self) -> list[str]:
        """As they stand in the file, once each."""
        return list(self.texts)

    def part(self, chosen: slice) -> ClipTexts:
        return replace(self, texts=self.texts[chosen])

    def scores(self, images: Pixels) -> Floats:
        """Hessel et al. 2021 without its clipping and weight: 100 × cosine."""
        words = self._embedded(text=self.prompts)
        return np.asarray(100 * (self.features(images) * words).sum(axis=1))

    def features(self, images: Pixels) -> Floats:
        """Image embeddings of length 1."""
        return self._embedded(images=[Image.fromarray(image) for image in images])

    def controls(self, dns_images: Pixels) -> dict[str, list[str]]:
        """A caption of another image."""
        return {"another caption": shuffled(self.prompts)}

    def _embedded(self, **inputs: list) -> Floats:
        (kind, values), (model, processor) = next(iter(inputs.items())), self._clip
        parts = []
        with torch.inference_mode():
            for at in range(0, len(values), 16):
                part = {kind: values[at : at + 16]}
                if kind == "text":
                    tensors = processor.tokenizer(part["text"], padding=True, truncation=True, return_tensors="pt")
                    out = model.text_projection(model.text_model(**tensors).pooler_output)
                else:
                    tensors = processor.image_processor(part["images"], return_tensors="pt")
                    out = model.visual_projection(model.vision_model(**tensors).pooler_output)
                parts.append(torch.nn.functional.normalize(out, dim=-1))
        return torch.cat(parts).double().numpy()

    @cached_property
    def _clip(self):
        from transformers import CLIPModel, CLIPProcessor

        return CLIPModel.from_pretrained(self.folder).eval(), CLIPProcessor.from_pretrained(self.folder)
