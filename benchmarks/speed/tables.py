"""A report as Markdown. What a table says is what the JSON says; nothing is computed anywhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from contenders import CONTENDERS, FIRST
from summary import Spread, events, exponent, figure, points, ratio, runs, series, share

Report = Mapping[str, Any]
WORKS = {"step": "one step", "image": "plain image", "dnp": "DNP request"}
STARTS = {"import": "import", "open": "open", "first": "first image", "image": "next image"}
OURS = {"dnp-cpu": "network-onnxruntime", "dnp-openvino": "network-openvino"}  # and the same network without us
EXPECTED = {"steps": "1", "batch": "1", "pixels": "2 (area) to 4 (attention)"}
AIM = 3.0  # percent of a step, or of a request, that may be outside the network at full size
NONE = "–"


def heading(report: Mapping[str, Any]) -> str:
    """The model's title, as a sentence begins."""
    title: str = report["title"]
    return title[0].upper() + title[1:]


def caption(report: Report) -> str:
    """What was measured, on what, and how to do it again."""
    s, m = report["settings"], report["machine"]
    return (
        f"{heading(report)}: {s['pixels']}×{s['pixels']} pixels, {s['steps']} "
        f"{s['sampler'].upper()} steps a pass, w = {s['guidance']:g}, s = {s['dns_guidance']:g}, batch 1, "
        f"{s['threads']} threads each, float32 unless named otherwise. Medians (smallest–largest) over "
        f"{counted(s['rounds'], 'interleaved round')}, each a process of its own with "
        f"{counted(s['repeats'], 'timed request')} after a first image"
        f"{' and a first DNP request' if s['warmups'] else ''}; × is the ratio to the first row, below 1 is faster.\n\n"
        f"{m['processor']}, {m['cores']} cores, {m['memory_bytes'] / 2**30:.0f} GiB, {m['system']}, Python "
        f"{m['python']}, load before {m['load_before']:.1f}, {m['made']}: `{report['command']}`, "
        f"{report['seconds'] / 60:.0f} minutes"
    )


def counted(count: int, noun: str) -> str:
    """As in: 1 round, 2 rounds."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def works(report: Report) -> str:
    """Who takes how long for a step, a plain image and a DNP request, and whether they made the same picture."""
    rows = []
    for name in report["contenders"]:
        cells = [CONTENDERS[name].title]
        for kind in WORKS:
            cells += [spread(figure(report, name, kind), duration), times(ratio(report, name, kind, FIRST))]
        rows.append([*cells, agrees(report, name)])
    heads = [head for title in WORKS.values() for head in (title, "×")]
    return table(["", *heads, "picture, n*"], rows)


def agrees(report: Report, name: str) -> str:
    """How far a contender's picture is from the first one's, and whether its n* is the same; or why it has none."""
    entry = report["contenders"][name]
    if entry["reason"]:
        return str(entry["reason"]).replace("|", "/")
    found = entry["agreement"]
    if found is None:
        return NONE
    if found.get("shape"):
        return f"another shape, {found['shape']}"
    same = "equal" if found["psnr"] is None else f"{found['psnr']:.0f} dB"
    negatives = [{event["negative"] for run in runs(report, n) for event in events(run, "dnp")} for n in (name, FIRST)]
    return same if not negatives[0] else f"{same}, {'same' if negatives[0] == negatives[1] else 'another'}"


def starts(report: Report) -> str:
    """How long until the first image, and the peak memory, of each contender that ran."""
    rows = []
    for name in ran(report):
        cells = [spread(figure(report, name, kind), duration) for kind in STARTS]
        rows.append([CONTENDERS[name].title, *cells, spread(figure(report, name, "memory"), megabytes)])
    return table(["", *STARTS.values(), "peak memory"], rows)


def shares(report: Report) -> str:
    """What our backends spend outside the library's own run, and a step beside the bare network in a loop."""
    rows = []
    for name, network in OURS.items():
        if name in report["contenders"] and figure(report, name, "step"):
            cells = [spread(share(report, name, kind), percent) for kind in WORKS]
            rows.append([CONTENDERS[name].title, *cells, times(ratio(report, name, "step", network))])
    return table(["outside the network", *(f"of {title}" for title in WORKS.values()), "step × bare network"], rows)


def throughput(report: Report) -> str:
    """Images a second against the batch, of the contenders that were timed at several."""
    lines = {name: series(points(report, name), "batch") for name in ran(report)}
    batches = sorted({point["batch"] for line in lines.values() for point in line})
    rows = []
    for name, line in lines.items():
        if line:
            rates = {point["batch"]: point["batch"] / point["seconds"] for point in line}
            rows.append([CONTENDERS[name].title, *(f"{rates[b]:.3g}" if b in rates else NONE for b in batches)])
    return table(["images/s", *(f"batch {batch}" for batch in batches)], rows) if rows else ""


def slopes(report: Report) -> str:
    """How the cost grows along each axis: the exponents fitted on log-log, beside what is expected."""
    rows = []
    for name in ran(report):
        found = points(report, name)
        cells = []
        for axis in EXPECTED:
            line = series(found, axis)
            measure = "seconds" if axis == "steps" else "step"
            cells.append(f"{exponent([p[axis] for p in line], [p[measure] for p in line]):.2f}" if line else NONE)
        if any(cell != NONE for cell in cells):
            rows.append([CONTENDERS[name].title, *cells])
    heads = ["image against steps", "step against batch", "step against width"]
    return table(["exponent", *heads], [*rows, ["expected", *EXPECTED.values()]]) if rows else ""


def notes(report: Report) -> str:
    """What has to be known about each contender, with its versions."""
    lines = []
    for name in report["contenders"]:
        entry = CONTENDERS[name]
        found = [event for run in runs(report, name) for event in events(run, "versions")][:1]
        versions = [
            f"{package} {number}" for package, number in (found[0] if found else {}).items() if package != "event"
        ]
        lines.append(f"- {entry.title}: {entry.about}{'. ' if versions else ''}{', '.join(versions)}.")
    return "\n".join(lines)


def ran(report: Report) -> list[str]:
    """The contenders that have figures."""
    return [name for name in report["contenders"] if figure(report, name, "open")]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown's."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(found: Spread | None, shown: Callable[[float], str]) -> str:
    """A median and, where there is more than one round, its smallest and largest."""
    if found is None:
        return NONE
    if found.rounds == 1:
        return shown(found.median)
    return f"{shown(found.median)} ({shown(found.low)}–{shown(found.high)})"


def duration(seconds: float) -> str:
    return (
        f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:.0f} s"
    )


def megabytes(size: float) -> str:
    return f"{size / 1e6:.0f} MB"


def percent(part: float) -> str:
    return f"{part * 100:.1f} %"


def times(found: float | None) -> str:
    return NONE if found is None else f"{found:.2f}"
