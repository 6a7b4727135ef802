"""The files of a model's folder: settings in JSON, weights in safetensors, whole or in shards, in a variant or not.

A link is as good as a file, for the hub's caches are made of links. Pickle is never loaded.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dnp.engine.errors import ExportError
from dnp.engine.system.files import is_lfs_pointer

PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")
_TO_SAFETENSORS = (
    "pickle is never loaded, it can run any code. Where you trust the file, convert it once with the library that "
    "wrote it: from_pretrained(SOURCE, use_safetensors=False).save_pretrained(FOLDER, safe_serialization=True), "
    "of StableDiffusionPipeline or BlipForConditionalGeneration"
)


def check_content(path: Path) -> None:
    """Raises ExportError when ``path`` is the pointer that a clone without Git LFS leaves, or cannot be read."""
    try:
        pointer = is_lfs_pointer(path)
    except FileNotFoundError as error:
        if path.is_symlink():
            raise ExportError(f"{path} is a link to {path.readlink()}, which is missing; download it again") from error
        raise ExportError(f"{path} is missing; the folder is not complete") from error
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error}") from error
    if pointer:
        raise ExportError(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in the clone that it is from"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises ExportError when there is none."""
    check_content(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ExportError(f"{path} holds no JSON object")
    return content


def check_settings_files(folder: Path) -> None:
    """Raises ExportError when a file of a tokenizer or of settings in ``folder`` is a Git LFS pointer."""
    for pattern in ("*.json", "*.txt"):
        for path in sorted(folder.glob(pattern)):
            check_content(path)


def find_weights(folder: Path, stem: str) -> str | None:
    """Which variant of ``stem``'s safetensors to load from ``folder``: None for the plain one, else its name.

    Of several variants it is ``"fp16"``. Raises ExportError when there are none, or not all of their shards, or when
    they are pickled; the message says how to get them.
    """
    name = re.escape(stem)
    whole = re.compile(rf"{name}(?:\.(?!.*-of-)([^.]+))?\.safetensors")
    index = re.compile(rf"{name}\.safetensors\.index(?:\.([^.]+))?\.json")
    found: dict[str | None, Path] = {}
    for path in sorted(folder.glob(f"{stem}*")):
        if match := whole.fullmatch(path.name) or index.fullmatch(path.name):
            found.setdefault(match[1], path)  # the file itself, where an index lies beside it
    if not found:
        raise ExportError(_why_none(folder, stem))
    variant = next((v for v in (None, "fp16") if v in found), None) if len(found) > 1 else next(iter(found))
    if variant not in found:
        raise ExportError(f"{folder} has its weights as {', '.join(map(str, found))}; leave one of them there")
    check_content(found[variant])
    if found[variant].suffix == ".json":
        shards = read_json(found[variant]).get("weight_map")
        if not isinstance(shards, dict):
            raise ExportError(f"{found[variant]} does not say which file holds which weight; download it again")
        for shard in sorted({str(file) for file in shards.values()}):
            check_content(folder / shard)
    return variant


def _why_none(folder: Path, stem: str) -> str:
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards := [name for name in others if re.search(r"-\d+-of-\d+", name)]:
        return (
            f"{folder} has {shards[0]}, but not the index that says which file holds which weight "
            f"({stem}.safetensors.index.json); copy it, too"
        )
    if others:
        return f"{folder} has {others[0]}, but no {stem}.safetensors, which is what its library loads; rename it"
    if pickles := [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]:
        return f"{folder} holds its weights as {pickles[0]} only; {_TO_SAFETENSORS}"
    return f"{folder} has no {stem}.safetensors; the folder is not complete"
