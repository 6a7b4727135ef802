"""The results as tables and plots: ``python benchmarks/speed/render.py`` makes them again from the JSON there is."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import tables
from contenders import CONTENDERS, FIRST
from summary import figure, points, ratio, series

from dnp.engine.system.files import write_together

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
PAGE = REPOSITORY / "docs" / "speed.md"  # what is read; RESULTS has all of it
SIZES = ("default", "sd15")  # as shown
MARKERS = ("<!-- speed -->", "<!-- /speed -->")
FURTHEST = 2.2  # ratios beyond it are written at the edge: one slow bar must not flatten all others
UNMEASURED = "Nothing has been measured yet: `make bench` does it."


def render(folder: Path, shown: Path | None) -> None:
    """Write ``speed.md`` and a plot of each report in ``folder``, and the section of the page ``shown`` if any."""
    reports = read(folder)
    files = {folder / f"speed-{report['size']}.png": plot(report) for report in reports}
    files[folder / "speed.md"] = page(reports).encode()
    if shown is not None:
        files[shown] = between_markers(shown.read_text(encoding="utf-8"), section(reports)).encode()
    write_together(files)


def read(folder: Path) -> list[dict[str, Any]]:
    """The reports in ``folder``, the default model's first."""
    paths = [folder / f"speed-{size}.json" for size in SIZES]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def page(reports: Sequence[Mapping[str, Any]]) -> str:
    """Everything, for ``benchmarks/results/speed.md``."""
    parts = ["# Speed", "Made by `benchmarks/speed/render.py` from the JSON beside it, which has every single time."]
    for report in reports:
        parts += [f"## {tables.heading(report)}", tables.caption(report), tables.works(report)]
        parts += [_image(report, "")]
        parts += [tables.shares(report), tables.starts(report), tables.throughput(report), tables.slopes(report)]
        parts += [tables.notes(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def section(reports: Sequence[Mapping[str, Any]]) -> str:
    """What ``docs/speed.md`` shows."""
    if not reports:
        return UNMEASURED
    parts = []
    for report in reports:
        parts += [tables.caption(report), _image(report, "../benchmarks/results/")]
        parts += [tables.works(report), tables.starts(report)]
    parts.append(
        "What is not the network, batches, slopes, versions and what has to be known about each contender: "
        "[benchmarks/results/speed.md](../benchmarks/results/speed.md)."
    )
    return "\n\n".join(parts)


def _image(report: Mapping[str, Any], folder: str) -> str:
    return f"![times as ratios to the first, and cost against size]({folder}speed-{report['size']}.png)"


def between_markers(text: str, section: str) -> str:
    """``text`` with what lies between the markers replaced. Raises ValueError when they are not there, once each."""
    if [text.count(marker) for marker in MARKERS] != [1, 1]:
        raise ValueError(f"the page must hold {MARKERS[0]} and {MARKERS[1]} once each; put them where the section goes")
    before, rest = text.split(MARKERS[0])
    _, after = rest.split(MARKERS[1])
    return f"{before}{MARKERS[0]}\n{section}\n{MARKERS[1]}{after}"


def plot(report: Mapping[str, Any]) -> bytes:
    """A PNG: every contender's ratios, and what an image costs against steps, width and batch on log-log axes.

    Without the second where no other sizes were timed.
    """
    from matplotlib.figure import Figure

    scaled = any(points(report, name) for name in tables.ran(report))
    canvas = Figure(figsize=(12, 9 if scaled else 5), layout="constrained")
    panels = canvas.subplot_mosaic("AAA;BCD" if scaled else "A")
    _bars(panels.pop("A"), report)
    if scaled:
        for ax, (axis, power) in zip(panels.values(), {"steps": 1, "pixels": 2, "batch": 1}.items(), strict=True):
            _lines(ax, report, axis, power)
    canvas.suptitle(f"{report['title']}: {report['machine']['processor']}, {report['settings']['threads']} threads")
    png = io.BytesIO()
    canvas.savefig(png, dpi=100, metadata={"Software": None})
    return png.getvalue()


def _bars(ax: Any, report: Mapping[str, Any]) -> None:
    names = tables.ran(report)
    for number, (kind, title) in enumerate(tables.WORKS.items()):
        for row, name in enumerate(names):
            if (value := ratio(report, name, kind, FIRST)) is None:
                continue
            found, first = figure(report, name, kind), figure(report, FIRST, kind)
            assert found is not None and first is not None
            low, high = value - found.low / first.median, found.high / first.median - value
            label = title if row == 0 else None
            y = row + number * 0.27
            if value > FURTHEST:
                ax.text(FURTHEST, y, f"{value:.1f} → ", ha="right", va="center", color="white", fontsize=7)
            ax.barh(y, value, 0.25, color=f"C{number}", label=label, xerr=[[low], [high]])
    ax.axvline(1.0, color="black", linewidth=0.8)
    ax.set_xlim(0, min(FURTHEST, ax.get_xlim()[1]))
    ax.set_yticks(
        [row + 0.27 for row in range(len(names))], [CONTENDERS[name].title.replace("`", "") for name in names]
    )
    ax.invert_yaxis()
    ax.set_xlabel(f"time as a ratio to {CONTENDERS[FIRST].title}: shorter is faster")
    if ax.get_legend_handles_labels()[0]:
        ax.legend()


def _lines(ax: Any, report: Mapping[str, Any], axis: str, power: int) -> None:
    """Seconds of an image along one axis; the dotted lines have the expected slope, from each first point."""
    for number, name in enumerate(tables.ran(report)):
        if line := series(points(report, name), axis):
            xs, ys = [p[axis] for p in line], [p["seconds"] for p in line]
            ax.loglog(xs, ys, "o-", color=f"C{number}", label=CONTENDERS[name].title.replace("`", ""))
            ax.loglog(xs, [ys[0] * (x / xs[0]) ** power for x in xs], ":", color=f"C{number}", linewidth=0.8)
            ax.set_xticks(xs, [str(x) for x in xs], minor=False)
            ax.minorticks_off()
    ax.set_xlabel(f"{'width' if axis == 'pixels' else axis} (dotted: power {power})")
    ax.set_ylabel("seconds for the images")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=7)


@click.command()
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, help="The folder with the JSON.")
def main(results: Path) -> None:
    """Render what was measured, and the section of docs/speed.md when the results are the repository's own."""
    render(results, PAGE if results == RESULTS else None)


if __name__ == "__main__":
    main()
