"""The experiment: settings are chosen on one set of prompts and reported on another, never on the same.

A condition is a method (what stands in the place of the negative) at a setting (w, s, steps, sampler). The seed of an
image is fixed by its number: all conditions of a prompt start from the same noise, so differences are paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt
from estimates import Floats, estimate, frechet_distance, spread
from evaluation_sets import EvaluationSet, Pixels, Scenes, adherence, parse
from joblib import Memory
from tqdm import tqdm

from dnp import Pipeline, Request
from dnp.runtime.pipeline.pipeline import drive
from dnp.runtime.result import to_images

MOST_PROMPTS = 100_000  # seeds of the further images of a prompt are so far apart
PLAIN, DNP = "plain (∅)", "DNP (n*)"


@dataclass(frozen=True)
class Setting:
    """How an image is sampled. ``s`` is that of the DNS image behind n*; plain guidance has none."""

    w: float
    s: float
    sampler: str
    steps: int


@dataclass(frozen=True)
class Grid:
    """What settings are chosen from."""

    w: tuple[float, ...] = (1.5, 2.5, 4.0, 6.0, 9.0, 13.0, 18.0)
    s: tuple[float, ...] = (1.0, 2.0)
    samplers: tuple[str, ...] = ("ddim", "dpmpp_2m")
    steps: tuple[int, ...] = (12, 6)


def sampled(pipeline: Pipeline, _runs: str, prompts: list[str], negatives: list[str], settings: dict) -> Pixels:
    """Images of pairs, uint8 ``[N, H, W, 3]``. What ran, ``_runs``, is named so that a cache tells it apart."""
    return drive(pipeline.sample(prompts, negatives, Request("-", dnp=False, **settings)))


class Experiment:
    """Samples and captions the prompts of a set with one pipeline, each condition once; ``cache`` keeps images."""

    def __init__(self, pipeline: Pipeline, evaluated: EvaluationSet, first_seed: int, cache: Memory) -> None:
        self.pipeline, self.evaluated, self.first_seed = pipeline, evaluated, first_seed
        self._cache = cache
        self._sampled = cache.cache(sampled, ignore=["pipeline"])
        self._runs = f"{pipeline.bundle.fingerprint} {pipeline.runs_on}"
        self._captions: dict[tuple, list[str]] = {}

    def sample(self, negatives: Sequence[str], guidance: float, sampler: str, steps: int, repeat: int = 0) -> Pixels:
        """Images of the prompts, uint8 ``[N, H, W, 3]``; ``repeat`` counts further images of the same, other seeds."""
        prompts = self.evaluated.prompts
        seed = self.first_seed + repeat * MOST_PROMPTS
        settings = {"seed": seed, "sampler": sampler, "steps": steps, "guidance": guidance}
        return self._sampled(self.pipeline, self._runs, prompts, list(negatives), settings)

    def of_first(self, count: int) -> Experiment:
        """The same with the first prompts only."""
        experiment = Experiment(self.pipeline, self.evaluated.part(slice(count)), self.first_seed, self._cache)
        experiment._captions = {at: captions[:count] for at, captions in self._captions.items()}
        return experiment

    def plain(self, w: float, sampler: str, steps: int) -> Pixels:
        """Guidance against the empty prompt; ``w`` = 0 is the unconditional image, a negative one is DNS."""
        return self.sample([""] * len(self.evaluated.prompts), w, sampler, steps)

    def captions(self, s: float, sampler: str, steps: int) -> list[str]:
        """n* of each prompt: the caption of its DNS image."""
        key = (s, sampler, steps)
        if key not in self._captions:
            self._captions[key] = self.pipeline.caption(to_images(self.plain(-s, sampler, steps)))
        return self._captions[key]

    def negatives(self, method: str, setting: Setting) -> list[str]:
        """What stands in the negative's place."""
        if method == PLAIN:
            return [""] * len(self.evaluated.prompts)
        if method == DNP:
            return self.captions(setting.s, setting.sampler, setting.steps)
        dns = self.plain(-setting.s, setting.sampler, setting.steps)
        return self.evaluated.controls(dns)[method]

    def images(self, method: str, setting: Setting) -> Pixels:
        """One condition."""
        return self.sample(self.negatives(method, setting), setting.w, setting.sampler, setting.steps)

    def scores(self, method: str, setting: Setting) -> Floats:
        """One condition, judged."""
        return self.evaluated.scores(self.images(method, setting))


def methods(evaluated: EvaluationSet) -> list[str]:
    """Plain, DNP and the controls that the evaluated has."""
    return [PLAIN, DNP, *evaluated.control_names]


def candidates(method: str, grid: Grid, sampler: str, steps: int) -> list[Setting]:
    """The settings of a method at one sampler and number of steps: every w, and every s where a DNS image is used."""
    s_values = grid.s if method in (DNP, "oracle caption") else grid.s[:1]
    return [Setting(w, s, sampler, steps) for s in s_values for w in grid.w]


def choose(experiment: Experiment, grid: Grid) -> tuple[list[dict], dict[tuple[str, str, int], Setting]]:
    """Try the grid. Returns all its rows, and the best setting of each (method, sampler, steps).

    Controls are tried with the first sampler and number of steps only.
    """
    todo = [
        (method, sampler, steps)
        for sampler in grid.samplers
        for steps in grid.steps
        for method in methods(experiment.evaluated)
        if method in (PLAIN, DNP) or (sampler, steps) == (grid.samplers[0], grid.steps[0])
    ]
    rows: list[dict] = []
    best: dict[tuple[str, str, int], Setting] = {}
    with tqdm(total=sum(len(candidates(m, grid, *at)) for m, *at in todo), desc="choosing", mininterval=5) as bar:
        for method, sampler, steps in todo:
            means = {}
            for setting in candidates(method, grid, sampler, steps):
                means[setting] = float(experiment.scores(method, setting).mean())
                rows.append({"method": method, **asdict(setting), "mean": means[setting]})
                bar.update()
            best[method, sampler, steps] = max(means, key=means.__getitem__)
    return rows, best


def measure(experiment: Experiment, grid: Grid, best: dict[tuple[str, str, int], Setting]) -> dict:
    """Judge the chosen settings on prompts that did not choose them."""
    sampler, steps = grid.samplers[0], grid.steps[0]
    plain = best[PLAIN, sampler, steps]
    equal = [(method, replace(best[method, sampler, steps], w=plain.w)) for method in methods(experiment.evaluated)]
    conditions = [(method, setting) for (method, *_), setting in best.items()]
    rows = []
    for method, setting in tqdm([*conditions, *equal[1:]], desc="reporting", mininterval=5):
        scores = experiment.scores(method, setting)
        rival = experiment.scores(PLAIN, best[PLAIN, setting.sampler, setting.steps])
        row = {"method": method, **asdict(setting), "score": asdict(estimate(scores))}
        if method != PLAIN:
            row["minus plain"] = asdict(estimate(scores - rival))
        rows.append(row)
    return {
        "conditions": rows[: len(conditions)],
        "equal w": rows[len(conditions) :],
        "by w": [by_w(experiment, w, best, (sampler, steps)) for w in tqdm(grid.w, desc="by w", mininterval=5)],
        "dns": dns_images(experiment, grid),
        **(scene_figures(experiment, grid, best) if isinstance(experiment.evaluated, Scenes) else {}),
    }


def by_w(experiment: Experiment, w: float, best: dict[tuple[str, str, int], Setting], at: tuple[str, int]) -> dict:
    """Plain and DNP at the same w, paired."""
    scores = {method: experiment.scores(method, replace(best[(method, *at)], w=w)) for method in (PLAIN, DNP)}
    means = {method: asdict(estimate(values)) for method, values in scores.items()}
    return {"w": w, **means, "difference": asdict(estimate(scores[DNP] - scores[PLAIN]))}


def dns_images(experiment: Experiment, grid: Grid) -> list[dict]:
    """Unconditional images and those of DNS against the prompts that they should not show."""
    sampler, steps = grid.samplers[0], grid.steps[0]
    free = experiment.evaluated.scores(experiment.plain(0.0, sampler, steps))
    rows: list[dict] = [{"s": 0.0, "score": asdict(estimate(free))}]
    for s in grid.s:
        scores = experiment.evaluated.scores(experiment.plain(-s, sampler, steps))
        rows.append({"s": s, "score": asdict(estimate(scores)), "minus unconditional": asdict(estimate(scores - free))})
    return rows


def scene_figures(experiment: Experiment, grid: Grid, best: dict[tuple[str, str, int], Setting]) -> dict:
    """What only drawn scenes can tell: captions, fidelity, diversity, and where the negative agrees with the prompt."""
    evaluated, sampler, steps = experiment.evaluated, grid.samplers[0], grid.steps[0]
    assert isinstance(evaluated, Scenes)
    chosen = [(method, best[method, sampler, steps]) for method in (PLAIN, DNP)]
    real = evaluated.features(evaluated.real(1))
    fidelity = {"other real pictures": frechet_distance(evaluated.features(evaluated.real(2)), real)}
    fidelity |= {m: frechet_distance(evaluated.features(experiment.images(m, s)), real) for m, s in chosen}
    fidelity |= {
        f"DNS s={s:g}": frechet_distance(evaluated.features(experiment.plain(-s, sampler, steps)), real) for s in grid.s
    }
    return {
        "captions": [caption_figures(experiment, s, sampler, steps) for s in grid.s],
        "frechet": fidelity,
        "spread": {
            "real pictures": asdict(estimate(spread(_stack(evaluated.features(evaluated.real(n)) for n in range(4)))))
        }
        | {method: asdict(estimate(diversity(experiment, method, setting))) for method, setting in chosen},
        "strict": {
            method: asdict(estimate(evaluated.strict(experiment.images(method, setting)))) for method, setting in chosen
        },
        "why": why(experiment, best, sampler, steps),
    }


def caption_figures(experiment: Experiment, s: float, sampler: str, steps: int) -> dict:
    """Does n* describe the DNS image? Its attributes against those that the scorer reads from the same image."""
    assert isinstance(experiment.evaluated, Scenes)
    seen = experiment.evaluated.read(experiment.plain(-s, sampler, steps))
    named = [parse(caption) for caption in experiment.captions(s, sampler, steps)]
    right = [adherence(*pair) for pair in zip(seen, named, strict=True)]
    return {"s": s, "attributes": asdict(estimate(right)), "all of them": asdict(estimate(np.equal(right, 1)))}


def diversity(experiment: Experiment, method: str, setting: Setting, samples: int = 4) -> Floats:
    """Distance between ``samples`` images of each of the first 60 prompts, in the judge's features, ``[N]``."""
    experiment = experiment.of_first(60)
    negatives = experiment.negatives(method, setting)
    sets = (
        experiment.sample(negatives, setting.w, setting.sampler, setting.steps, repeat=number)
        for number in range(samples)
    )
    return spread(_stack(experiment.evaluated.features(images) for images in sets))


def _stack(sets: Iterator[Floats]) -> Floats:
    return np.stack(list(sets), axis=1)


def why(experiment: Experiment, best: dict[tuple[str, str, int], Setting], sampler: str, steps: int) -> list[dict]:
    """Attributes apart by whether n* names the prompt's own value: there the negative pushes the wrong way."""
    assert isinstance(experiment.evaluated, Scenes)
    rows = []
    for w in sorted({best[PLAIN, sampler, steps].w, best[DNP, sampler, steps].w}):
        setting = replace(best[DNP, sampler, steps], w=w)
        negatives = experiment.negatives(DNP, setting)
        right: dict[str, npt.NDArray[np.bool_]] = {}
        for method in (PLAIN, DNP):
            hits, shared = experiment.evaluated.right_and_shared(experiment.images(method, setting), negatives)
            right[method] = np.array(hits)
        for same in (True, False):
            rows_of = np.array(shared) == same
            if not rows_of.any():
                continue
            differences = right[DNP][rows_of].astype(float) - right[PLAIN][rows_of]
            rows.append(
                {
                    "w": w,
                    "n* names the same": same,
                    "attributes": int(rows_of.sum()),
                    PLAIN: float(right[PLAIN][rows_of].mean()),
                    DNP: float(right[DNP][rows_of].mean()),
                    "difference": asdict(estimate(differences)),
                }
            )
    return rows
