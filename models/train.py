"""Make the tiny model from nothing: ``python models/train.py``.

Runs the stages in order, each from where it stopped; ``--stages`` picks some. States are kept in ``--work``, the result
is written to ``--out`` and the scorer beside it. Then ``python models/evaluate.py`` measures it. Where there is a GPU,
the denoiser is trained on it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pictures
import torch
import train_blip
import train_diffusion
import train_scorer
import train_text
import train_vae
from package import package
from training import CPU, GPU, Recipe, Task, fit

HERE = Path(__file__).parent


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="states and caches")
    parser.add_argument("--out", type=Path, default=HERE, help="receives tiny/ and scorer/")
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="processes without a GPU; but for the denoiser's, the effective batch grows with them",
    )
    parser.add_argument("--stages", nargs="+", help="only these")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = arguments.work.resolve()

    def training(task: Task, recipe: Recipe, workers: int = arguments.workers) -> Callable[[], None]:
        return lambda: fit(task, recipe, work, workers)

    def denoising(count: int) -> Callable[[], None]:
        runs = train_diffusion.RUNS[:count]
        workers, device = (1, GPU) if torch.cuda.is_available() else (arguments.workers, CPU)
        return lambda: fit(train_diffusion.Denoiser(work, runs), runs[-1].recipe, work, workers, device)

    stages: dict[str, Callable[[], None]] = {
        "scenes": lambda: pictures.render(work),
        "scorer": training(train_scorer.Reading(work), train_scorer.RECIPE, 1),
        "vae": training(train_vae.Vae(work), train_vae.RECIPE),
        "captions": lambda: train_text.tokenize(work),
        "text": training(train_text.Reader(work), train_text.RECIPE, 1),
        "latents": lambda: train_diffusion.cache_latents(work),
        "contexts": lambda: train_diffusion.cache_contexts(work),
        **{run.recipe.name: denoising(count) for count, run in enumerate(train_diffusion.RUNS, start=1)},
        "decoded": lambda: train_blip.decode_some(work),
        "looking": training(train_blip.Looking(work), train_blip.VISION, 1),
        "captioning": training(train_blip.Captioning(work), train_blip.CAPTIONS, 1),
        "package": lambda: package(work, arguments.out),
    }
    unknown = set(arguments.stages or ()) - stages.keys()
    if unknown:
        parser.error(f"unknown stages {sorted(unknown)}; there are {', '.join(stages)}")
    for name, run in stages.items():
        if not arguments.stages or name in arguments.stages:
            run()


if __name__ == "__main__":
    main()
