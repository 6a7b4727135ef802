"""From the JSON of ``bundle.json`` to a ``Manifest``, and what is refused.

Everything wrong with a manifest is a ``BundleError`` that names the key, the value and the remedy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dnp.engine.bundle.contract import signatures
from dnp.engine.bundle.manifest import SCHEMA, GraphSpec, Manifest, Parity, Ranges
from dnp.engine.bundle.schema import REMEDY, mapping, record, same_names, shown
from dnp.engine.bundle.tensors import TensorSpec
from dnp.engine.errors import BundleError


@dataclass(frozen=True)
class _GraphEntry:
    file: str
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    parity: dict[str, Parity] = field(default_factory=dict)
    ranges: Ranges | None = None


def parse(data: Any, root: Path) -> Manifest:
    """Check the JSON value of a ``bundle.json`` in the folder ``root``. Raises BundleError."""
    where = str(root / "bundle.json")
    if not isinstance(data, dict):
        raise BundleError(f"{where}: not a manifest but {shown(data)}; {REMEDY}")
    schema = data.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise BundleError(f"{where}: no bundle manifest, its 'schema' is {shown(schema)}; {REMEDY}")
    if schema > SCHEMA:
        made_with = data.get("created_with")
        writer = made_with.get("dnp-engine") if isinstance(made_with, dict) else None
        known = f" by dnp-engine {shown(writer)}" if writer else ""
        raise BundleError(
            f"{where}: written{known} in schema {shown(schema)}, and dnp-engine {version('dnp-engine')} reads up to "
            f"schema {SCHEMA}; open it with the dnp-engine that wrote it, or {REMEDY} with this one"
        )
    if schema < SCHEMA:
        raise BundleError(
            f"{where}: written in schema {schema}, by an earlier dnp-engine; this one reads schema {SCHEMA}: export "
            "the model anew, dnp export SOURCE OUT --captioner BLIP"
        )
    entries = mapping(_GraphEntry, data.get("graphs", {}), f"{where}: graphs")
    graphs = {
        name: GraphSpec(name, root / e.file, e.inputs, e.outputs, e.parity, e.ranges) for name, e in entries.items()
    }
    manifest = record(Manifest, data, where, ready={"graphs": graphs})
    listed = [(f"graphs.{name}.file", entry.file) for name, entry in entries.items()]
    listed += [("text.tokenizers", tokenizer.file) for tokenizer in manifest.text.tokenizers]
    listed.append(("caption.tokenizer", manifest.caption.tokenizer))
    for key, file in listed:
        if file not in manifest.files:
            raise BundleError(f"{where}: {key} names {shown(file)}, which 'files' does not list; {REMEDY}")
    _check_numbers(manifest, where)
    _check_graphs(manifest, where)
    return manifest


def _check_numbers(m: Manifest, where: str) -> None:
    for side, most in (("height", "max_height"), ("width", "max_width")):
        size, limit = getattr(m.latents, side), getattr(m.latents, most)
        if size > limit or size % m.latents.multiple:
            raise BundleError(
                f"{where}: latents.{side} is {size}; it must be a multiple of {m.latents.multiple} "
                f"and at most {limit} (latents.{most}); {REMEDY}"
            )
    if m.caption.max_length > m.caption.length:
        raise BundleError(
            f"{where}: caption.max_length is {m.caption.max_length}, but the cache holds {m.caption.length}; {REMEDY}"
        )
    for key in ("bos", "eos", "pad"):
        if getattr(m.caption, key) >= m.caption.vocab:
            raise BundleError(f"{where}: caption.{key} is outside the vocabulary of {m.caption.vocab}; {REMEDY}")
    for name, file in m.files.items():
        if not re.fullmatch(r"[0-9a-f]{64}", file.sha256):
            raise BundleError(f"{where}: files.{name!r}.sha256 is no hash: {shown(file.sha256)}; {REMEDY}")


def _check_graphs(m: Manifest, where: str) -> None:
    expected = signatures(m)
    same_names(m.graphs, expected, f"{where}: graphs")
    for name, signature in expected.items():
        for side in ("inputs", "outputs"):
            found, wanted = getattr(m.graphs[name], side), getattr(signature, side)
            same_names(found, wanted, f"{where}: graphs.{name}.{side}")
            for tensor, spec in wanted.items():
                if found[tensor] != spec:
                    raise BundleError(
                        f"{where}: graphs.{name}.{side}.{tensor} is {found[tensor].to_dict()} and must be "
                        f"{spec.to_dict()}; {REMEDY}"
                    )
