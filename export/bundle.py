"""A bundle from a Stable Diffusion folder and a captioner: all of it, checked, or nothing."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from dnp.engine.bundle.bundle import MANIFEST, Bundle, seal
from dnp.engine.bundle.contract import signatures
from dnp.engine.bundle.manifest import SCHEMA, Defaults, Manifest
from dnp.engine.bundle.schema import REMEDY, record, same_names
from dnp.engine.errors import BundleError, ExportError, OutputError, SettingsError
from dnp.engine.system.files import new_folder
from dnp.export.families import blip, stable_diffusion
from dnp.export.families.blip import caption_manifest, caption_tokenizer, load_blip
from dnp.export.families.lora import Lora, check_loras
from dnp.export.families.source import read_source
from dnp.export.families.tokenizer import prompt_tokenizers
from dnp.export.fp16.precision import Precision, check_precision
from dnp.export.fp16.ranges import RangeCheck, check_ranges
from dnp.export.graph import GraphExport, GraphRecord, WrittenGraph, expect, finish_graph, write_graph
from dnp.export.memory import PeakMemory, give_back, seldom_collected
from dnp.runtime.sampling.samplers import check_defaults
from dnp.runtime.sampling.schedule import NoiseSchedule

STAGES = ("encode_text", "denoise", "decode_latents", "encode_image", "caption_step", "seal")
# Beside the samplers, which are the source's own. s is diffusers' usual guidance less 1, for there the base branch is
# the prompt: see the architecture's "denoise".
DEFAULTS: Mapping[str, Any] = {
    "steps": 25,
    "guidance": 7.5,
    "dns_steps": 25,
    "dns_guidance": 6.5,
}

StageCallback = Callable[[str, int, int], None]
"""Called as each stage begins: its name out of ``STAGES``, how many are done, how many there are.

``ranges`` is a stage before ``seal`` where the ranges are checked."""


@dataclass(frozen=True)
class ExportReport:
    """What an export made and what it cost.

    Attributes:
        path: the bundle.
        graphs: the five graphs, with their errors against PyTorch, sizes, times and memory.
        bytes: the size of the whole bundle.
        seconds: from the first check to the last rename.
        peak_memory: the process's largest resident size meanwhile, in bytes.
        notes: sentences on what of the source was read in another way than it is written.
    """

    path: Path
    name: str
    precision: Precision
    graphs: tuple[GraphRecord, ...]
    bytes: int
    seconds: float
    peak_memory: int
    notes: tuple[str, ...] = ()


def export_bundle(
    source: Path,
    out: Path,
    *,
    captioner: Path,
    precision: str = "fp32",
    name: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    loras: Sequence[Lora] = (),
    methods: bool = False,
    ranges: RangeCheck | None = None,
    overwrite: bool = False,
    progress: StageCallback | None = None,
) -> ExportReport:
    """Export the diffusers folder ``source``, Stable Diffusion 1.x, 2.x or XL, and the BLIP folder ``captioner``.

    Everything is made in a hidden folder beside ``out``, which takes its name when all is well. Whatever stops the
    work, an error, Ctrl-C or an exception from ``progress``, leaves neither behind, and an old ``out`` untouched.

    Args:
        precision: the arithmetic of the graphs, ``fp32`` or ``fp16``.
        name: the bundle's name; that of the folder ``out`` when left out.
        defaults: what replaces single ones of ``DEFAULTS`` and of the samplers, which are else the source's own.
        loras: merged into the weights before they are exported, in this order.
        methods: give the step graph what guidance methods need: a third role, and sums over the network's outputs.
        ranges: run whole requests with the fp16 graphs, put back to float32 what overflows, and keep the list in the
            manifest. Only then are the graphs compared with PyTorch.
        overwrite: replace a bundle that is already there.
        progress: see ``StageCallback``.

    Raises:
        ExportError: the models cannot be exported, or a graph differs from PyTorch by more than its bound.
        OutputError: ``out`` is in use or cannot be written.
    """
    started = time.perf_counter()
    out = Path(out).absolute()
    records: list[GraphRecord] = []
    with PeakMemory() as memory, seldom_collected(), _without_bars():
        exact = check_precision(precision)
        if ranges is not None and exact == "fp32":
            raise ExportError("only fp16 graphs have ranges to check; use precision fp16 (--precision fp16)")
        _check_out(out, overwrite)
        check_loras(tuple(loras))
        model = replace(read_source(Path(source)), loras=tuple(loras), methods=methods)
        stable_diffusion.check_loras_fit(model)
        own = {"sampler": model.sampler, "dns_sampler": model.sampler}
        settings = _merge_defaults({**DEFAULTS, **own}, defaults or {})
        try:
            check_defaults(NoiseSchedule.from_config(model.schedule), settings)
        except SettingsError as error:
            raise ExportError(f"the defaults cannot be honoured: {error}") from error
        name = out.name if name is None else name
        prompts = prompt_tokenizers(model)
        captions = load_blip(Path(captioner))
        caption, caption_words = caption_manifest(captions), caption_tokenizer(captions)
        del captions  # its model, which each graph loads for itself
        manifest = {
            "schema": SCHEMA,
            "name": name,
            "family": model.family.name,
            "precision": exact,
            "created_with": {
                **{package: version(package) for package in _PACKAGES},
                **{lora.file.name: f"merged as {lora.scale:g}" for lora in loras},
            },
            "text": {
                "length": model.length,
                "tokenizers": [asdict(spec) for _, spec in prompts.values()],
                "empty": "zeros" if model.zeros else "encoded",
            },
            "conditioning": model.conditioning_manifest(),
            "guidance": model.guidance_manifest(),
            "latents": model.latents_manifest(),
            "schedule": dict(model.schedule),
            "caption": caption,
            "defaults": asdict(settings),
        }
        wanted = signatures(record(Manifest, {**manifest, "graphs": {}, "files": {}}, "the manifest"))

        def build(stage: str, precision: Precision = exact) -> GraphExport:
            give_back()  # what the model before took
            if stage in blip.GRAPHS:
                return blip.GRAPHS[stage](load_blip(Path(captioner)), wanted[stage], precision)
            return stable_diffusion.GRAPHS[stage](model, wanted[stage], precision)

        stages = STAGES if ranges is None else (*STAGES[:-1], "ranges", STAGES[-1])

        def tell(stage: str) -> None:
            if progress is not None:
                progress(stage, stages.index(stage), len(stages))

        with _staging(out) as folder:
            written: list[WrittenGraph] = []
            for stage in STAGES[:-1]:
                tell(stage)
                if ranges is None:
                    # A model is loaded anew for each half, so that it is in memory once, or not at all, and each half
                    # has it in its own precision.
                    half = write_graph(build(stage), folder)
                    records.append(finish_graph(expect(build(stage)), folder, half))
                else:
                    written.append(write_graph(build(stage), folder))
            texts = {file: tokenizer for file, (tokenizer, _) in prompts.items()}
            for file, tokenizer in {**texts, caption["tokenizer"]: caption_words}.items():
                (folder / file).parent.mkdir(exist_ok=True)
                (folder / file).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
            if ranges is not None:
                tell("ranges")
                records = _check_ranges(folder, manifest, written, build, ranges)
            tell("seal")
            manifest["graphs"] = {record.name: record.manifest for record in records}
            seal(folder, manifest)
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            _replace(out, folder)
    seconds = time.perf_counter() - started
    # Each stretch is watched by a look now and then: one of the graphs' may have seen a peak that the whole's missed.
    peak = max(memory.peak, *(record.peak_memory for record in records))
    return ExportReport(out, name, exact, tuple(records), size, seconds, peak, model.notes)


_PACKAGES = ("dnp-engine", "torch", "diffusers", "transformers", "onnx", "onnxscript", "tokenizers")


def _check_ranges(
    folder: Path,
    manifest: Mapping[str, Any],
    written: Sequence[WrittenGraph],
    build: Callable[[str, Precision], GraphExport],
    check: RangeCheck,
) -> list[GraphRecord]:
    """Check the ranges of the graphs in ``folder``, sealed for the time being, and then each against PyTorch."""
    graphs = dict(zip(STAGES, written, strict=False))
    seal(folder, {**manifest, "graphs": {name: graph.manifest for name, graph in graphs.items()}})

    def whole(name: str) -> None:
        graphs[name] = write_graph(build(name, "fp32"), folder)

    found = check_ranges(Bundle.open(folder), check, whole)
    records = []
    for name, graph in graphs.items():
        ranges = found[name]
        record = finish_graph(expect(build(name, ranges.precision)), folder, graph)
        entry = {**record.manifest, "ranges": ranges.to_dict()}
        records.append(replace(record, manifest=entry, ranges=ranges))
    return records


def _merge_defaults(own: Mapping[str, Any], changes: Mapping[str, Any]) -> Defaults:
    """``own`` with ``changes``. Raises ExportError for what the manifest's schema would refuse at the end."""
    try:
        same_names(changes, own, "defaults", own)
        merged = {**own, **changes}
        settings = ("sampler", "steps", "guidance")
        passes = {"final": "", "dns": "dns_"}
        nested = {kind: {key: merged[prefix + key] for key in settings} for kind, prefix in passes.items()}
        return record(Defaults, nested, "defaults")
    except BundleError as error:
        raise ExportError(str(error).removesuffix(f"; {REMEDY}")) from None


def _check_out(out: Path, overwrite: bool) -> None:
    """Raises OutputError unless ``out`` is new, empty, or a bundle that may be replaced."""
    if not out.name:
        raise OutputError(f"{out} cannot be a bundle; name a folder in it")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"{out} exists and is no folder; choose another place")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{out} exists and is not empty; choose another folder, or overwrite it (--overwrite)")
    if not (out / MANIFEST).is_file():
        raise OutputError(f"{out} exists and is no bundle, so it is not overwritten; choose another folder")


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars from the libraries that load the models: progress is told by stages."""
    shown = [lib for lib in (diffusers_logging, transformers_logging) if lib.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` to work in; afterwards it is gone, and so are the parents made for it if all failed."""
    folder = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    try:
        with new_folder(out.parent):
            try:
                folder.mkdir()
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{out} cannot be written: {error}") from error


def _replace(out: Path, folder: Path) -> None:
    """Give ``folder`` the name ``out``; what had it before is removed only once that has worked."""
    if not out.exists():
        folder.rename(out)
        return
    old = folder.with_suffix(".old")
    out.rename(old)
    try:
        folder.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
