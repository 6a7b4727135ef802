"""Twelve prompts as one picture: plain, DNS with its caption n*, DNP. One seed, none chosen.

python benchmarks/gallery.py docs/images/gallery.png
"""

from __future__ import annotations

from pathlib import Path

import click
from tqdm import tqdm

from dnp import Pipeline
from dnp.runtime.pictures import png, sheet, write_atomically

PROMPTS = [
    "a large red circle left of a small blue square on a plain yellow background",
    "a small white cross above a large green triangle on a plain black background",
    "a large yellow triangle right of a large black circle on a striped white background",
    "a small green square below a small red cross on a plain white background",
    "a large blue cross on a plain red background",
    "a small black circle on a striped green background",
    "a large white square left of a large red triangle on a striped blue background",
    "a small yellow cross below a large white circle on a plain blue background",
    "a large green circle above a small yellow square on a striped black background",
    "a small red triangle right of a large blue circle on a plain green background",
    "a large black square on a plain yellow background",
    "a small blue triangle left of a small green cross on a striped yellow background",
]


@click.command()
@click.argument("out", type=click.Path(path_type=Path), default=Path("out/gallery.png"))
@click.option("--bundle", type=click.Path(path_type=Path), help="A bundle folder; the shipped default when left out.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(out: Path, bundle: Path | None, seed: int) -> None:
    """Write the sheet of twelve prompts to OUT."""
    pipeline = Pipeline.open(bundle)
    cells = []
    for prompt in tqdm(PROMPTS, unit="prompt", disable=None):
        result = pipeline(prompt, seed=seed, compare=True)
        cells += [
            (result.plain_images[0], prompt),
            (result.dns_images[0], f"n* = {result.negatives[0]}"),
            (result.images[0], ""),
        ]
    rows = [cells[i : i + 6] for i in range(0, len(cells), 6)]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, png(sheet(rows, headings=["plain", "DNS image", "DNP"] * 2)))
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
