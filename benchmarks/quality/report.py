"""The figures of an experiment as people read them: tables, a plot with intervals, a contact sheet."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
from estimates import Estimate
from evaluation_sets import Scenes
from experiment import DNP, PLAIN, Experiment, Grid, Setting
from PIL import Image

from dnp.runtime.pictures import sheet

matplotlib.use("Agg")
from matplotlib import pyplot

COLOURS = {PLAIN: "#666666", DNP: "#1f6fb4"}


def table(found: dict) -> str:
    """The whole report as Markdown."""
    made = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    prompts = found["prompts"]
    parts = [
        "# Does DNP help?",
        f"`{found['command']}` on {found['machine']}, {found['made']}; {found['runs on']}; {made}. "
        f"Bundle {found['bundle']['name']} ({found['bundle']['fingerprint'][:12]}), {found['evaluation set']}; "
        f"settings chosen on {prompts['choosing']} prompts, reported on {prompts['reporting']} others. "
        f"Score: {found['unit']}. In brackets: 95 % bootstrap intervals over the prompts; differences are paired.",
        "## Each method at its own best setting",
        _grid(
            ("method", "sampler", "steps", "w", "s", "score", "minus plain at its best w"),
            [_condition(row) for row in found["conditions"]],
        ),
        "## At plain guidance's best w",
        _grid(
            ("method", "sampler", "steps", "w", "s", "score", "minus plain"),
            [_condition(row) for row in found["equal w"]],
        ),
        "## Plain and DNP at the same w",
        _grid(
            ("w", PLAIN, DNP, "difference"),
            [(f"{r['w']:g}", _shown(r[PLAIN]), _shown(r[DNP]), _shown(r["difference"], "+")) for r in found["by w"]],
        ),
        "## The images of DNS, against the prompts that they should not show",
        _grid(
            ("s", "score", "minus unconditional (s=0)"),
            [(f"{r['s']:g}", _shown(r["score"]), _shown(r.get("minus unconditional"), "+")) for r in found["dns"]],
        ),
    ]
    if "captions" in found:
        parts += _of_scenes(found)
    return "\n\n".join(parts) + "\n"


def _of_scenes(found: dict) -> list[str]:
    return [
        "## Does n* describe the DNS image?",
        "Attributes of the caption that are those the scorer reads from the same image.",
        _grid(
            ("s", "attributes right", "captions with all of them right"),
            [(f"{r['s']:g}", _shown(r["attributes"]), _shown(r["all of them"])) for r in found["captions"]],
        ),
        "## Every attribute right, fidelity, diversity",
        "Fréchet distance to real pictures of the same scenes in the scorer's features, and the mean distance there "
        "between four images of one prompt.",
        _grid(
            ("images", "every attribute right", "Fréchet distance", "distance within a prompt"),
            [
                (
                    name,
                    _shown(found["strict"].get(name)),
                    _number(found["frechet"].get(name)),
                    _shown(found["spread"].get(name)),
                )
                for name in dict.fromkeys([*found["frechet"], *found["spread"]])
            ],
        ),
        "## Where n* names the prompt's own value, and where not",
        _grid(
            ("w", "n* names the same", "attributes", f"right, {PLAIN}", f"right, {DNP}", "difference"),
            [
                (
                    f"{r['w']:g}",
                    "yes" if r["n* names the same"] else "no",
                    str(r["attributes"]),
                    f"{r[PLAIN]:.3f}",
                    f"{r[DNP]:.3f}",
                    _shown(r["difference"], "+"),
                )
                for r in found["why"]
            ],
        ),
    ]


def _condition(row: dict) -> tuple[str, ...]:
    s = f"{row['s']:g}" if row["method"] in (DNP, "oracle caption") else ""
    return (
        row["method"], row["sampler"], str(row["steps"]), f"{row['w']:g}", s, _shown(row["score"]),
        _shown(row.get("minus plain"), "+"),
    )  # fmt: skip


def _shown(row: dict | None, sign: str = "") -> str:
    if row is None:
        return ""
    figures = Estimate(**row)
    return f"{figures.mean:{sign}.3f} [{figures.low:{sign}.3f}, {figures.high:{sign}.3f}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _grid(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(found: dict) -> bytes:
    """Two panels as PNG: the score against w, and every method's paired difference from plain guidance."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.6), layout="constrained", width_ratios=(1, 1.25))
    w = [row["w"] for row in found["by w"]]
    for method in (PLAIN, DNP):
        rows = [Estimate(**row[method]) for row in found["by w"]]
        left.plot(w, [r.mean for r in rows], marker="o", color=COLOURS[method], label=method)
        left.fill_between(w, [r.low for r in rows], [r.high for r in rows], color=COLOURS[method], alpha=0.2, lw=0)
    first = found["conditions"][0]
    left.set(
        xlabel="guidance scale w",
        ylabel=found["unit"].split(" (")[0],
        title=f"{first['sampler']}, {first['steps']} steps",
    )
    left.legend(frameon=False)

    rows = [("own best w", row) for row in found["conditions"] if row["method"] != PLAIN]
    rows += [("equal w", row) for row in found["equal w"]]
    labels = []
    for y, (kind, row) in enumerate(rows):
        difference = Estimate(**row["minus plain"])
        low, high = difference.mean - difference.low, difference.high - difference.mean
        colour = COLOURS.get(row["method"], "#b4651f")
        right.errorbar(
            difference.mean, y, xerr=[[low], [high]], fmt="o" if kind == "own best w" else "s", color=colour, capsize=3
        )
        labels.append(f"{row['method']}, {kind} ({row['w']:g}), {row['sampler']} {row['steps']}")
    right.axvline(0, color="black", lw=0.8)
    right.set(
        yticks=range(len(rows)), yticklabels=labels, xlabel="difference from plain guidance, paired; 95 % interval"
    )
    right.invert_yaxis()
    right.locator_params(axis="x", nbins=6)  # small differences have long labels
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()


def contact_sheet(
    experiment: Experiment, grid: Grid, best: dict[tuple[str, str, int], Setting], rows: int = 12
) -> Image.Image:
    """The first prompts, none chosen: what was wanted, plain, DNS with n*, DNP."""
    at = grid.samplers[0], grid.steps[0]
    plain, dnp = best[(PLAIN, *at)], best[(DNP, *at)]
    rows = min(rows, len(experiment.evaluated.prompts))
    columns = {
        f"plain, w={plain.w:g}": [(image, "") for image in experiment.images(PLAIN, plain)[:rows]],
        f"DNS, s={dnp.s:g}": [
            (image, f"n* = {caption}")
            for image, caption in zip(
                experiment.plain(-dnp.s, *at)[:rows], experiment.captions(dnp.s, *at), strict=False
            )
        ],
        f"DNP, w={dnp.w:g}": [(image, "") for image in experiment.images(DNP, dnp)[:rows]],
    }
    if isinstance(experiment.evaluated, Scenes):
        columns = {"the scene": [(image, "") for image in experiment.evaluated.real(1)[:rows]]} | columns
    cells = [[(Image.fromarray(column[n][0]), column[n][1]) for column in columns.values()] for n in range(rows)]
    return sheet(cells, headings=list(columns), titles=experiment.evaluated.prompts[:rows])
