"""Compiled plans on disk: found by everything that changes one, verified before use, rebuilt when in doubt.

``engines/<graph>-<key>.plan`` and a sidecar of the same name in JSON, which says what the key is made of. The key never
holds the plan's own hash: two builds of the same thing differ in bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from dnp.engine.bundle import file_record
from dnp.engine.errors import BackendError, Cancelled, OutputError, missing_extra
from dnp.engine.files import TEMPORARY, write_together

FOLDER: Final = "engines"


@dataclass(frozen=True)
class PlanSpec:
    """Everything that changes a plan, and nothing else.

    Attributes:
        graph: its name.
        graph_sha256: of the ONNX file, and of its weights where they lie beside it.
        flavour, version: the compiler, in full: plans do not survive a change of version.
        architecture: what it is compiled for, as ``sm89`` or ``sm89,sm120``; with ``tensorrt`` also the GPU's name.
        precision: the bundle's, which is in the graph's hash too; here to be read.
        profile: ``[low, best, high]`` of each symbol.
        flags: what the compiler was told.
    """

    graph: str
    graph_sha256: str
    flavour: str
    version: str
    architecture: str
    precision: str
    profile: dict[str, list[int]]
    flags: dict[str, Any]

    @property
    def key(self) -> str:
        """16 hexadecimal digits over all fields."""
        said = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def difference(self, other: Mapping[str, Any]) -> str:
        """The first field in which ``other`` differs, with both values; empty when none does."""
        for field in fields(self):
            mine, its = getattr(self, field.name), other.get(field.name)
            if mine == its:
                continue
            if isinstance(mine, dict) and isinstance(its, dict):
                inner = next(key for key in {**mine, **its} if mine.get(key) != its.get(key))
                return f"{field.name}.{inner} is {its.get(inner)}, wanted is {mine.get(inner)}"
            return f"{field.name} is {_short(its)}, wanted is {_short(mine)}"
        return ""


@dataclass(frozen=True)
class Plan:
    """A plan that was verified.

    Attributes:
        path: the plan itself; its sidecar lies beside it.
        spec: what it is.
        facts: what building it cost and what it will need, see ``dnp.engine.build``.
    """

    path: Path
    spec: PlanSpec
    facts: dict[str, Any]


class PlanStore:
    """The plans in one folder."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).absolute()

    def find(self, spec: PlanSpec) -> tuple[Plan | None, str]:
        """The plan for ``spec``, or why there is none that can be used: an empty reason when there never was one."""
        path = self._path(spec)
        if not path.exists():
            return None, self._nearest(spec)
        try:
            sidecar = self._read(path)
            plan = Plan(path, PlanSpec(**sidecar["spec"]), sidecar["facts"])
        except (OSError, ValueError, TypeError) as error:
            return None, f"{path.name} has no sidecar that can be read ({error})"
        if different := spec.difference(sidecar["spec"]):
            return None, f"{path.name}: {different}"
        try:
            found = file_record(path)
        except OSError as error:
            return None, f"{path.name} cannot be read ({error})"
        if found.size != sidecar["size"]:
            return None, f"{path.name} is damaged: {found.size} bytes, wanted are {sidecar['size']}"
        if found.sha256 != sidecar["sha256"]:
            return None, f"{path.name} is damaged: its SHA-256 differs"
        return plan, ""

    def write(self, spec: PlanSpec, data: Any, facts: Mapping[str, Any]) -> Plan:
        """Store a plan, the sidecar first; both get their names only when they are complete.

        Raises OutputError when the folder cannot be written.
        """
        path = self._path(spec)
        view = memoryview(data)
        digest = hashlib.sha256(view).hexdigest()
        sidecar = {"spec": asdict(spec), "facts": dict(facts), "size": len(view), "sha256": digest}
        write_together({path.with_suffix(".json"): _json(sidecar), path: view})
        return Plan(path, spec, dict(facts))

    @contextmanager
    def building(self, spec: PlanSpec, stop: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Hold the right to build ``spec``: another process that wants the same plan waits, and then finds it.

        ``stop`` is asked twice a second while waiting. Raises OutputError when the folder cannot be written, Cancelled
        when ``stop`` said so.
        """
        try:
            import filelock
        except ModuleNotFoundError as error:
            raise missing_extra("filelock", spec.flavour, "building plans") from error
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder / f".{spec.graph}-{spec.key}.lock")
            while not lock.is_locked:
                try:
                    lock.acquire(timeout=0.5)
                except filelock.Timeout:
                    if stop():
                        raise Cancelled(f"waiting for the plan of {spec.graph!r} was stopped") from None
            for left in self.folder.glob(f"{TEMPORARY}{spec.graph}-{spec.key}.*"):  # of a process that was killed
                left.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"plans cannot be written to {self.folder}: {error}; name another folder") from error
        try:
            yield
        finally:
            lock.release()

    def plans(self) -> list[tuple[Path, dict[str, Any]]]:
        """Every plan that has a readable sidecar, and the sidecar; not verified."""
        found = []
        for path in sorted(self.folder.glob("*.plan")):
            try:
                found.append((path, self._read(path)))
            except (OSError, ValueError, TypeError):
                continue
        return found

    def settings(self, flavour: str) -> dict[str, Any]:
        """What ``dnp build`` was asked for, by graph: what opening a session looks for. Empty when it never was.

        Raises BackendError when the file is damaged.
        """
        try:
            found = json.loads(self._settings_file(flavour).read_text(encoding="utf-8"))
            if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
                raise ValueError("no object of objects")
        except (FileNotFoundError, NotADirectoryError):  # a folder that cannot be one is told when it is written to
            return {}
        except (OSError, ValueError) as error:
            raise self.damaged(flavour, error) from error
        return found

    def keep_settings(self, flavour: str, settings: Mapping[str, Any]) -> None:
        """Write what ``settings`` reads. Raises OutputError."""
        write_together({self._settings_file(flavour): _json(settings)})

    def damaged(self, flavour: str, error: Exception) -> BackendError:
        """The error for settings that cannot be used."""
        path = self._settings_file(flavour)
        return BackendError(f"{path} is damaged ({error}); remove it, and build the plans again: dnp build")

    def _settings_file(self, flavour: str) -> Path:
        return self.folder / f"{flavour}.json"

    def _path(self, spec: PlanSpec) -> Path:
        return self.folder / f"{spec.graph}-{spec.key}.plan"

    def _read(self, path: Path) -> dict[str, Any]:
        sidecar = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if not isinstance(sidecar, dict):
            raise ValueError("no object")
        for name, kind in (("spec", dict), ("facts", dict), ("size", int), ("sha256", str)):
            if not isinstance(sidecar.get(name), kind):
                raise ValueError(f"{name!r} is missing")
        PlanSpec(**sidecar["spec"])
        return sidecar

    def _nearest(self, spec: PlanSpec) -> str:
        """What is different about the plan that has most in common with ``spec``."""
        candidates = [
            (sum(entry["spec"].get(field.name) == getattr(spec, field.name) for field in fields(spec)), path, entry)
            for path, entry in self.plans()
            if (entry["spec"].get("graph"), entry["spec"].get("flavour")) == (spec.graph, spec.flavour)
        ]
        if not candidates:
            return ""
        _, path, entry = max(candidates, key=lambda candidate: candidate[0])
        return f"{path.name}: {spec.difference(entry['spec'])}"


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(value), indent=1).encode() + b"\n"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
