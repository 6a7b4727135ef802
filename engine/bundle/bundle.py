"""A bundle: the folder that is a deployment. ``Bundle.open`` trusts nothing in it; ``seal`` finishes one.

``bundle.json`` lists every other file with its SHA-256, and ``bundle.sha256`` holds that of ``bundle.json``'s bytes, as
``sha256sum --check bundle.sha256`` reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from importlib.resources import files as package_files
from pathlib import Path, PurePosixPath
from typing import Any, Final

from dnp.engine.bundle.manifest import (
    FileRecord,
    GraphSpec,
    Manifest,
)
from dnp.engine.bundle.reading import parse
from dnp.engine.bundle.schema import nearest
from dnp.engine.errors import BundleError, SettingsError
from dnp.engine.system.files import is_lfs_pointer, write_together

MANIFEST: Final = "bundle.json"
SEAL: Final = "bundle.sha256"
_MOST_BYTES: Final = 16 << 20  # of a manifest; a real one has some kilobytes
_CHUNK: Final = 4 << 20
_RECOPY: Final = "copy the bundle again, or export it again"


@dataclass(frozen=True)
class Bundle(Manifest):
    """An opened bundle: its manifest, checked, and its folder, every file with the hash it should have.

    Attributes:
        path: the folder, absolute.
        fingerprint: 16 hexadecimal digits that change when anything in the bundle does.
    """

    path: Path
    fingerprint: str

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Open the bundle in the folder ``path`` and verify all of it.

        Raises BundleError, naming the file, the reason and the remedy, when it is missing, truncated, edited,
        of a newer schema, or names a file outside the folder.
        """
        try:
            root = Path(path).absolute()
        except FileNotFoundError as error:  # the working directory is gone
            raise BundleError(f"bundle {str(path)!r} does not exist, and nor does the working directory") from error
        raw = _read_manifest(root)
        try:
            manifest = parse(json.loads(raw), root)
        except RecursionError:
            raise BundleError(f"{root / MANIFEST}: nested too deeply for a manifest; {_RECOPY}") from None
        except ValueError as error:
            raise BundleError(f"{root / MANIFEST}: not valid JSON ({error}); {_RECOPY}") from error
        _check_seal(root, raw)
        _verify(root, manifest.files)
        shared = {f.name: getattr(manifest, f.name) for f in fields(Manifest)}
        return cls(**shared, path=root, fingerprint=hashlib.sha256(raw).hexdigest()[:16])

    @classmethod
    def default(cls) -> Bundle:
        """The bundle that is shipped inside the package. Raises BundleError when there is none."""
        folder = Path(str(package_files("dnp"))) / "default"
        if not (folder / MANIFEST).is_file():
            raise BundleError(
                f"this installation ships no default bundle ({folder} is missing); "
                "name one, or install dnp-engine again from where it came from"
            )
        return cls.open(folder)

    def graph_sha256(self, graph: str) -> str:
        """One hash for a graph's file and the weights beside it, from the hashes that ``open`` verified."""
        file = self.graph(graph).path.relative_to(self.path).as_posix()
        own = [name for name in (file, f"{file}.data") if name in self.files]
        return hashlib.sha256("".join(f"{self.files[name].sha256}  {name}\n" for name in own).encode()).hexdigest()

    def unlike(self, other: Bundle) -> list[str]:
        """The graphs that ``other`` has in another form, or with other weights."""
        return [name for name in self.graphs if self.graph_sha256(name) != other.graph_sha256(name)]

    def check_same_model(self, other: Bundle) -> None:
        """Raises SettingsError, naming what differs, unless all that may differ are weights, schedule and defaults."""
        unlike = [
            name
            for name in ("family", "precision", "text", "conditioning", "guidance", "latents", "caption")
            if getattr(self, name) != getattr(other, name)
        ]
        texts = [file for file in self._tokenizers() if self.files[file] != other.files.get(file)]
        if found := unlike or texts:
            raise SettingsError(
                f"{other.path} is of another model than {self.path}: {found[0]!r} differs, and weights are exchanged "
                "only between exports of equal sizes, tokenizers and precision; open a pipeline on it instead"
            )

    def _tokenizers(self) -> list[str]:
        return [*(tokenizer.file for tokenizer in self.text.tokenizers), self.caption.tokenizer]

    def graph(self, name: str) -> GraphSpec:
        """The graph called ``name``. Raises BundleError naming the known ones."""
        if name not in self.graphs:
            raise BundleError(f"{self.path}: no graph {name!r}, {nearest(name, self.graphs)}")
        return self.graphs[name]

    def chosen(self, names: str | Sequence[str]) -> list[GraphSpec]:
        """The graph or graphs of these names, all when there is none. Raises BundleError as ``graph``."""
        names = [names] if isinstance(names, str) else names
        return [self.graph(name) for name in names] or list(self.graphs.values())


def seal(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write ``folder/bundle.json``, last and atomically: ``manifest``, and size and hash of every file.

    Compiled plans (``plans/``) and hidden files are left out. Raises BundleError when ``Bundle.open`` would
    not take the manifest.
    """
    folder = folder.absolute()
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.relative_to(folder).parts[0] != "plans"
    )
    names = [name for name in names if name not in (MANIFEST, SEAL)]
    with ThreadPoolExecutor() as pool:
        records = pool.map(lambda name: file_record(folder / name), names)
        listed = {name: asdict(record) for name, record in zip(names, records, strict=True)}
    whole = {**manifest, "files": listed}
    parse(whole, folder)
    raw = (json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    digest = f"{hashlib.sha256(raw).hexdigest()}  {MANIFEST}\n"
    write_together({folder / SEAL: digest.encode(), folder / MANIFEST: raw})


def file_record(path: Path) -> FileRecord:
    """Size and SHA-256 of a file, read in pieces. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)  # releases the interpreter lock, so that threads hash in parallel
            size += len(chunk)
    return FileRecord(size, digest.hexdigest())


def _read_manifest(root: Path) -> bytes:
    manifest = root / MANIFEST
    try:
        if not root.is_dir():
            what = "is no folder" if root.exists() else "does not exist"
            raise BundleError(f"bundle {str(root)!r} {what}; name the folder that `dnp export` wrote")
        if not manifest.is_file():
            raise BundleError(f"{root}: no bundle, it has no {MANIFEST}; name the folder that `dnp export` wrote")
        if manifest.stat().st_size > _MOST_BYTES:
            raise BundleError(f"{manifest}: too large for a manifest; {_RECOPY}")
        return manifest.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise BundleError(f"{str(manifest)!r} cannot be read: {error}") from error


def _check_seal(root: Path, raw: bytes) -> None:
    """Raises BundleError unless ``bundle.sha256`` holds the SHA-256 of the manifest's bytes."""
    seal = root / SEAL
    try:
        held = seal.read_bytes()[:64].decode("ascii", "replace")
    except OSError as error:
        raise BundleError(f"{seal}: cannot be read ({error.strerror}); {_RECOPY}") from error
    if held != hashlib.sha256(raw).hexdigest():
        raise BundleError(f"{root / MANIFEST}: edited since it was written, {SEAL} has another SHA-256; {_RECOPY}")


def _verify(root: Path, files: Mapping[str, FileRecord]) -> None:
    """Check places and sizes first, which costs nothing, then the hashes."""
    paths = {name: _place(root, name) for name in files}
    for name, path in paths.items():
        expected, size = files[name].size, path.stat().st_size
        if size != expected and is_lfs_pointer(path):
            raise BundleError(
                f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in the clone that it is from"
            )
        if size != expected:
            what = "truncated" if size < expected else "longer than it was"
            raise BundleError(f"{path}: {what}, {size} bytes where {expected} are expected; {_RECOPY}")

    def wrong(name: str) -> str | None:
        try:
            return None if file_record(paths[name]) == files[name] else "edited or damaged, its SHA-256 differs"
        except OSError as error:
            return f"cannot be read: {error}"

    with ThreadPoolExecutor() as pool:
        for name, reason in zip(paths, pool.map(wrong, paths), strict=True):
            if reason is not None:
                raise BundleError(f"{paths[name]}: {reason}; {_RECOPY}")


def _place(root: Path, name: str) -> Path:
    """The path of a listed file, whose name lies inside ``root``.

    What a link leads to may lie elsewhere, as in the hub's caches: its hash is that of the file or it is refused.
    """
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name or ":" in name:
        raise BundleError(f"{root / MANIFEST}: lists {name!r}, which is outside the bundle; do not use this bundle")
    path = root / parts
    try:
        real = Path(os.path.realpath(path))  # refuses what no file can be called
        if not real.is_file():
            raise BundleError(f"{path}: missing; {_RECOPY}")
    except (OSError, ValueError) as error:
        raise BundleError(f"{root / MANIFEST}: lists {name!r}, which cannot be a file: {error}") from error
    return path
