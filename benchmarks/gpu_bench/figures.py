"""A report of ``bench.py`` as a table and a plot: ``python benchmarks/gpu_bench/figures.py FILE`` makes them again."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from rivals import CONTENDERS, EAGER, PEER

from dnp.engine.system.files import write_together

NONE = "–"
Report = dict[str, Any]


def render(path: Path) -> None:
    """Write the Markdown table and the plot of a report beside it."""
    report = json.loads(path.read_text(encoding="utf-8"))
    write_together({path.with_suffix(".md"): page(report).encode(), path.with_suffix(".png"): plot(report)})


def rows(report: Report) -> list[tuple[str, str, str, int, float]]:
    """What is in the table: the title, and what to look for: kind, key, images, and the factor to the unit shown."""
    batches = sorted({m["batch"] for m in report["measured"] if m["do"] == "step"})
    many = max([m["images"] for m in report["measured"] if m["do"] == "dnp"], default=1)
    found = [(f"step, batch {batch}, ms", "step", "ms", batch, 1.0) for batch in batches]
    found += [(f"host a step, batch {batches[0]}, ms", "step", "host_ms", batches[0], 1.0)] if batches else []
    found += [("plain image, ms", "plain", "seconds", 1, 1e3), ("DNP request, ms", "dnp", "seconds", 1, 1e3)]
    return [*found, (f"DNP, {many} at once, ms", "dnp", "seconds", many, 1e3)]


def values(report: Report, name: str, do: str, key: str, images: int, factor: float) -> list[float]:
    """One figure for each round: of the blocks of a step, their median."""
    size = "batch" if do == "step" else "images"
    wanted = [m for m in report["measured"] if m["contender"] == name and m["do"] == do and m[size] == images]
    return [factor * (median(m[key]) if isinstance(m[key], list) else m[key]) for m in wanted]


def page(report: Report) -> str:
    """The tables: times with the smallest and largest round, ratios to the compiled peer, starts and memory."""
    machine, settings = report["machine"], report["settings"]
    names = list(report["contenders"])
    title = (
        f"{machine['gpu']}, driver {machine['driver']}, {machine['cores']} cores, Python {machine['python']}, "
        f"{machine['made']}: Stable Diffusion 1.5 and BLIP base, random weights, fp16, {settings['pixels']}×"
        f"{settings['pixels']}, {settings['steps']} DDIM steps a pass, captions of {settings['tokens']} tokens. "
        f"Medians (smallest–largest) over {settings['rounds']} rounds in turns, each contender a process of its own; "
        f"× is the ratio to {CONTENDERS[PEER][0]}. `{report['command']}`"
    )
    heads = ["", *(head for name in names for head in (CONTENDERS[name][0], "×"))]
    lines = []
    for row_title, *what in rows(report):
        base = values(report, PEER, *what)
        cells = []
        for name in names:
            found = values(report, name, *what)
            cells += [spread(found), ratio(found, base)]
        lines.append([row_title, *cells])
    parts = [title, table(heads, lines), table(["", *STARTS, *MEMORY, "picture"], [start(report, n) for n in names])]
    if shares := arithmetic(report):
        parts.append(shares)
    parts.append("\n".join(f"- {CONTENDERS[name][0]}: {told(report, name)}" for name in names))
    return "\n\n".join(parts) + "\n"


STARTS = ("import, s", "open, s", "first image, s", "all of it, s")
MEMORY = ("memory, batch 1, GB", "memory, most, GB")


def start(report: Report, name: str) -> list[str]:
    """How long until the first image; the memory; and how near its picture is to the eager peer's."""
    facts = report["contenders"][name]
    seconds, memory = facts.get("seconds", {}), facts.get("memory", {})
    times = [seconds.get(key) for key in ("import", "open", "first")]
    cells = [NONE if value is None else f"{value:.2f}" for value in times]
    cells.append(NONE if None in times else f"{sum(value for value in times if value is not None):.2f}")
    sizes = [memory.get("1"), memory.get(max(memory, key=int, default="1"))]
    cells += [NONE if size is None else f"{size / 1e9:.2f}" for size in sizes]
    near = facts.get("picture")
    return [CONTENDERS[name][0], *cells, NONE if near is None else f"{near:.1f} dB"]


def arithmetic(report: Report) -> str:
    """What share of the arithmetic's own time each step is, from the operations counted and the rate reached."""
    ceiling = report["contenders"].get(EAGER, {}).get("ceiling")
    if not ceiling:
        return ""
    lines = []
    for name in report["contenders"]:
        cells = []
        for batch in sorted({m["batch"] for m in report["measured"] if m["do"] == "step"}):
            found = values(report, name, "step", "ms", batch, 1.0)
            alone = ceiling["operations"] * batch / ceiling["per_second"] * 1e3
            cells.append(f"{alone / median(found):.0%} of {median(found):.1f} ms, batch {batch}" if found else NONE)
        lines.append([CONTENDERS[name][0], *cells])
    title = (
        f"The arithmetic alone: {ceiling['operations'] / 1e12:.2f} TFLOP a step and image, at "
        f"{ceiling['per_second'] / 1e12:.0f} TFLOP/s, which a product of 8192×8192 matrices reached there."
    )
    return f"{title}\n\n{table(['', *[''] * (len(lines[0]) - 1)], lines)}"


def told(report: Report, name: str) -> str:
    facts = report["contenders"][name]
    versions = ", ".join(f"{package} {number}" for package, number in facts.get("versions", {}).items())
    failed = f"; FAILED: {facts['failed']}" if "failed" in facts else ""
    return f"{facts.get('runs_on', '')}; {versions}{failed}"


def spread(found: list[float]) -> str:
    if not found:
        return NONE
    return f"{median(found):.4g} ({min(found):.4g}–{max(found):.4g})"


def ratio(found: list[float], base: list[float]) -> str:
    return f"{median(found) / median(base):.2f}" if found and base else NONE


def table(heads: list[str], lines: list[list[str]]) -> str:
    """Markdown's."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *lines])


def plot(report: Report) -> bytes:
    """A PNG: every contender's times as ratios to the compiled peer's, or to the first one's where that is missing."""
    from matplotlib.figure import Figure

    names = [name for name in report["contenders"] if any(m["contender"] == name for m in report["measured"])]
    base = PEER if PEER in names else names[0]
    shown = [row for row in rows(report) if row[2] != "host_ms" and values(report, base, *row[1:])]
    canvas = Figure(figsize=(11, 1.5 + 0.25 * len(shown) * max(1, len(names))), layout="constrained")
    ax = canvas.subplots()
    height = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        for place, (_, *what) in enumerate(shown):
            if found := values(report, name, *what):
                value = median(found) / median(values(report, base, *what))
                label = CONTENDERS[name][0].replace("`", "") if place == 0 else None
                ax.barh(place + number * height, value, height * 0.9, color=f"C{number}", label=label)
                ax.text(value, place + number * height, f" {median(found):.4g}", va="center", fontsize=7)
    ax.axvline(1.0, color="black", linewidth=0.8)
    ax.set_yticks([place + 0.4 - height / 2 for place in range(len(shown))], [row[0] for row in shown])
    ax.invert_yaxis()
    ax.set_xlabel(f"as a ratio to {CONTENDERS[base][0].replace('`', '')}: shorter is faster")
    ax.set_title(f"{report['machine']['gpu']}, {report['machine']['made']}")
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
    png = io.BytesIO()
    canvas.savefig(png, dpi=100, metadata={"Software": None})
    return png.getvalue()


if __name__ == "__main__":
    render(Path(sys.argv[1]))
