"""Compiled plans on disk: found by everything that changes one, verified before use, rebuilt when in doubt.

``engines/<graph>-<key>.plan`` and a sidecar of the same name in JSON, which says what the key is made of; beside them
``.weights``, where a plan keeps its weights in a file of their own. The key never holds the plan's own hash: two builds
of the same thing differ in bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from dnp.engine.bundle import file_record
from dnp.engine.errors import BackendError, Cancelled, OutputError, missing_extra
from dnp.engine.files import TEMPORARY, write_together
from dnp.engine.interrupts import uninterrupted
from dnp.engine.manifest import FileRecord
from dnp.engine.processor import peak_memory

FOLDER: Final = "engines"
WEIGHTS: Final = ".weights"
_BLOCK: Final = 64 << 20


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
class BuildProgress:
    """Where a build is: the compiler's own phase, how many of its steps are done, and the seconds so far."""

    graph: str
    phase: str
    done: int
    total: int
    seconds: float


Progress = Callable[[BuildProgress], object]
"""Called some times a second while a plan is compiled, and from no other thread; ``False`` stops the build."""
Report = Callable[[str], None]
"""Told, in one line, why a plan is built anew, and what the build will need."""


def tell(progress: Progress | None, state: BuildProgress) -> None:
    """Tell ``progress`` where a build is. Raises Cancelled when it answers ``False``."""
    if progress is not None and progress(state) is False:
        raise Cancelled(f"the build of {state.graph!r} was stopped; no plan is half-written")


def cost(started: float) -> dict[str, Any]:
    """The facts about a build that began at ``started`` of ``time.perf_counter`` and ends now: what it took, and when.

    The memory is the largest that the process ever had.
    """
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "peak_memory_bytes": peak_memory(),
        "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@dataclass(frozen=True)
class Plan:
    """A plan that was verified.

    Attributes:
        path: the plan itself; its sidecar lies beside it.
        spec: what it is.
        facts: what building it cost and what it will need, by the module that builds it.
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
        damage = _damage(path, sidecar, file_record)
        if not damage and "weights" in sidecar:
            damage = _damage(path.with_suffix(WEIGHTS), sidecar["weights"], _record_in_blocks)
        return (None, damage) if damage else (plan, "")

    def obtain(
        self,
        spec: PlanSpec,
        make: Callable[[], Plan],
        *,
        needs: Callable[[], str],
        force: bool = False,
        report: Report | None = None,
        progress: Progress | None = None,
    ) -> Plan:
        """The plan for ``spec``, verified, or the one that ``make`` stores where there is none that can be used.

        ``needs`` says what making it will take. Raises what ``building`` and ``make`` raise.
        """
        plan = None if force else self.find(spec)[0]  # of some gigabytes, it takes seconds
        if plan is not None:
            return plan
        waiting = BuildProgress(spec.graph, "waiting for another process", 0, 1, 0.0)
        with self.building(spec, lambda: progress is not None and progress(waiting) is False):
            plan, reason = self.find(spec)  # another process may have been faster
            if plan is not None and not force:
                return plan
            if report is not None:
                if reason:
                    report(f"{spec.graph}: building anew: {reason}")
                report(f"{spec.graph}: {needs()}")
            return make()

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
    def room(self, spec: PlanSpec) -> Iterator[Path]:
        """An empty folder for a library that writes its plan itself: ``take`` moves it to its place from there.

        It is removed at the end, with what is left in it. Raises OutputError when it cannot be made.
        """
        try:
            folder = tempfile.TemporaryDirectory(dir=self.folder, prefix=f"{TEMPORARY}{self._path(spec).stem}.")
        except OSError as error:
            raise OutputError(f"plans cannot be written to {self.folder}: {error}; name another folder") from error
        with folder as name:
            yield Path(name)

    def name(self, spec: PlanSpec) -> str:
        """The name of the plan's file; that of its weights differs from it in the ending, which is ``WEIGHTS``."""
        return self._path(spec).name

    def take(self, spec: PlanSpec, room: Path, facts: Mapping[str, Any]) -> Plan:
        """Move the plan and its weights from ``room``, where they have the names that they keep, to their place.

        Raises OutputError when the folder cannot be written.
        """
        path = self._path(spec)
        made, weights = room / path.name, room / path.with_suffix(WEIGHTS).name
        try:
            sidecar = {"spec": asdict(spec), "facts": dict(facts), **asdict(file_record(made))}
            if weights.exists():
                sidecar["weights"] = asdict(_record_in_blocks(weights))
            with uninterrupted():
                if weights.exists():
                    weights.replace(path.with_suffix(WEIGHTS))
                write_together({path.with_suffix(".json"): _json(sidecar)})
                made.replace(path)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}; name another folder") from error
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
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
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
        if "weights" in sidecar:
            FileRecord(**sidecar["weights"])
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


def _damage(path: Path, wanted: Mapping[str, Any], record: Callable[[Path], FileRecord]) -> str:
    """How a file differs from what was written; empty when it does not."""
    try:
        size = path.stat().st_size
        if size != wanted["size"]:
            return f"{path.name} is damaged: {size} bytes, wanted are {wanted['size']}"
        if record(path).sha256 != wanted["sha256"]:
            return f"{path.name} is damaged: its SHA-256 differs"
    except OSError as error:
        return f"{path.name} cannot be read ({error})"
    return ""


def _record_in_blocks(path: Path) -> FileRecord:
    """Size, and the SHA-256 of the SHA-256 of each 64 MiB: all cores work on one file of some gigabytes."""

    def digest(start: int) -> bytes:
        found, left = hashlib.sha256(), _BLOCK
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while left and (chunk := file.read(min(left, 4 << 20))):
                found.update(chunk)
                left -= len(chunk)
        return found.digest()

    size = path.stat().st_size
    with ThreadPoolExecutor() as pool:
        digests = b"".join(pool.map(digest, range(0, size, _BLOCK)))
    return FileRecord(size, hashlib.sha256(digests).hexdigest())


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(value), indent=1).encode() + b"\n"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
