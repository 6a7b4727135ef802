"""Compiled plans on disk: found by everything that changes one, verified before use.

``plans/<graph>-<key>.plan`` and a sidecar of the same name in JSON, which says what the key is made of; beside them
``<graph>-<key>.<token>.weights``, where a plan keeps its weights in a file of their own, which plans for other sizes
may share. The key never holds the plan's own hash: two builds of the same thing differ in bytes. Each build has a token
of its own, so that a plan and the weights of another build never meet.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dnp.engine.bundle.bundle import file_record
from dnp.engine.bundle.manifest import FileRecord
from dnp.engine.bundle.schema import REMEDY, record, shown
from dnp.engine.errors import BundleError, Cancelled, OutputError
from dnp.engine.plans.plan import BuildMessageCallback, BuildProgress, BuildProgressCallback, Plan, PlanSpec
from dnp.engine.system.files import TEMPORARY, refuse_folder, write_together
from dnp.engine.system.interrupts import uninterrupted

if TYPE_CHECKING:
    from filelock import BaseFileLock

WEIGHTS: Final = ".weights"
_BLOCK: Final = 64 << 20
_EXCHANGES: Final = (0.0, 0.05, 0.2)  # seconds to wait before a plan that cannot be used is looked at again
_MOST_BYTES: Final = 1 << 20  # of a sidecar; a real one has some hundreds


@dataclass(frozen=True)
class _WeightsFile(FileRecord):
    file: str


@dataclass(frozen=True)
class _Sidecar(FileRecord):
    """What the file beside a plan holds: the plan's record, and what it is."""

    spec: PlanSpec
    statistics: dict[str, Any]
    weights: _WeightsFile | None = None


class PlanStore:
    """The plans in one folder."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        with suppress(OSError):  # the working folder was removed: nothing will be found in it
            self.folder = self.folder.absolute()

    def find(self, spec: PlanSpec) -> tuple[Plan | None, str]:
        """The plan for ``spec``, or why there is none that can be used: an empty reason when there never was one."""
        plan, reason = self._find(spec)
        for pause in _EXCHANGES:  # another process may be giving the files of a new build their names
            if plan is None and reason:
                time.sleep(pause)
                plan, reason = self._find(spec)
        return plan, reason

    def _find(self, spec: PlanSpec) -> tuple[Plan | None, str]:
        path = self._path(spec)
        try:
            if not path.exists():
                return None, self._nearest(spec)
            try:
                sidecar = self._read(path)
            except (OSError, ValueError) as error:
                return None, f"{path.name} has no sidecar that can be read ({error})"
            if different := spec.difference(sidecar.spec):
                return None, f"{path.name}: {different}"
            damage = _damage(path, sidecar, file_record)
            if not damage and sidecar.weights is not None:
                damage = _damage(self.folder / sidecar.weights.file, sidecar.weights, _record_in_blocks)
        except OSError as error:
            return None, f"{path} cannot be read ({error.strerror or error})"
        return (None, damage) if damage else (Plan(path, sidecar.size, sidecar.spec, sidecar.statistics), "")

    def obtain(
        self,
        spec: PlanSpec,
        make: Callable[[], Plan],
        *,
        needs: Callable[[], str],
        force: bool = False,
        report: BuildMessageCallback | None = None,
        progress: BuildProgressCallback | None = None,
    ) -> Plan:
        """The plan for ``spec``, verified, or the one that ``make`` stores where there is none that can be used.

        ``needs`` says what making it will take. Raises what ``building`` and ``make`` raise.
        """

        def say(line: str) -> None:
            if report is not None:
                report(f"{spec.graph}: {line}")

        plan = None if force else self.find(spec)[0]  # of some gigabytes, it takes seconds
        if plan is not None:
            say(f"there already, {plan.path.name}")
            return plan
        waiting = BuildProgress(spec.graph, "waiting for another process", 0, 1, 0.0)
        with self.building(spec, lambda: progress is not None and progress(waiting) is False):
            plan, reason = self._find(spec)  # another process may have been faster; none exchanges it now
            if plan is not None and not force:
                say(f"built meanwhile, {plan.path.name}")
                return plan
            if reason:
                say(f"building, since {reason}")
            say(needs())
            return make()

    def write(self, spec: PlanSpec, data: Any, statistics: Mapping[str, Any]) -> Plan:
        """Store a plan, the sidecar first; both get their names only when they are complete.

        Raises OutputError when the folder cannot be written.
        """
        path = self._path(spec)
        view = memoryview(data)
        digest = hashlib.sha256(view).hexdigest()
        sidecar = {"spec": asdict(spec), "statistics": dict(statistics), "size": len(view), "sha256": digest}
        write_together({path.with_suffix(".json"): _json(sidecar), path: view})
        return Plan(path, len(view), spec, dict(statistics))

    @contextmanager
    def room(self, spec: PlanSpec) -> Iterator[tuple[Path, Path]]:
        """Where a library that writes its plan itself may put it, and its weights: ``take`` moves them to their place.

        Both names are those that they keep. What is not taken is removed at the end. Raises OutputError when there can
        be no such room.
        """
        stem = self._path(spec).stem
        try:
            folder = tempfile.TemporaryDirectory(
                dir=self.folder, prefix=f"{TEMPORARY}{stem}.", ignore_cleanup_errors=True
            )
        except OSError as error:
            raise self._unwritable(error) from error
        with folder as name:
            yield Path(name, f"{stem}.plan"), Path(name, f"{stem}.{secrets.token_hex(4)}{WEIGHTS}")

    def take(
        self, spec: PlanSpec, plan: Path, weights: Path, statistics: Mapping[str, Any], shared: Path | None = None
    ) -> Plan:
        """Move a plan, and its weights where there are any, from their ``room`` to their place.

        ``shared`` is a file of ``weights_of`` that the plan uses, so that it has none of its own. A plan that was there
        before stays as good as it was until all of the new one is on the disk. Raises OutputError when the folder
        cannot be written.
        """
        path = self._path(spec)
        told = plan.with_suffix(".json")
        moved = {told: path.with_suffix(".json"), plan: path}
        try:
            refuse_folder(path)
            own = file_record(plan)
            sidecar = {"spec": asdict(spec), "statistics": dict(statistics), **asdict(own)}
            if shared is not None:
                sidecar["weights"] = {"file": shared.name, **asdict(_record_in_blocks(shared))}
            elif weights.exists():
                sidecar["weights"] = {"file": weights.name, **asdict(_record_in_blocks(weights))}
                moved = {weights: self.folder / weights.name, **moved}
            told.write_bytes(_json(sidecar))
            for source in moved:
                _sync(source)
            with uninterrupted():
                for source, target in moved.items():
                    source.replace(target)
        except OSError as error:
            with suppress(OSError):
                (self.folder / weights.name).unlink()
            raise OutputError(f"cannot write {path}: {error.strerror or error}; name another folder") from error
        self._forget_weights(path, weights.name if shared is None else shared.name)
        return Plan(path, own.size, spec, dict(statistics))

    @contextmanager
    def building(self, spec: PlanSpec, stop: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Hold the right to build ``spec``: another process that wants the same plan waits, and then finds it.

        ``stop`` is asked twice a second while waiting. Raises OutputError when the folder cannot be written, Cancelled
        when ``stop`` said so.
        """
        with self._locked(self._path(spec).stem, stop):
            self._tidy(spec)
            yield

    @contextmanager
    def _locked(self, name: str, stop: Callable[[], bool] = lambda: False) -> Iterator[None]:
        from filelock import Timeout

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = self._lock(name)
            while not lock.is_locked:
                try:
                    lock.acquire(timeout=0.5)
                except Timeout:
                    if stop():
                        raise Cancelled(f"waiting for another process that holds {name!r} was stopped") from None
        except (OSError, ValueError) as error:  # the latter for a name that no file can have
            raise self._unwritable(error) from error
        try:
            yield
        finally:
            lock.release()

    def plans(self) -> list[Plan]:
        """Every plan that has a readable sidecar and the name that it says; not verified. All others are left out."""
        found = []
        with suppress(OSError):
            for path in sorted(self.folder.glob("*.plan")):
                with suppress(OSError, ValueError, RecursionError):
                    sidecar = self._read(path)
                    if path == self._path(sidecar.spec):
                        found.append(Plan(path, sidecar.size, sidecar.spec, sidecar.statistics))
        return found

    def newest(self, graph: str, backend: str) -> list[Plan]:
        """The plans of a graph for a backend, the newest first; of two built at once, the greater name."""
        found = [plan for plan in self.plans() if (plan.spec.graph, plan.spec.backend) == (graph, backend)]
        return sorted(found, key=lambda plan: (str(plan.statistics.get("built")), plan.path.name), reverse=True)

    def weights_of(self, spec: PlanSpec) -> list[Path]:
        """The files of weights that lie beside plans of the same graph and backend."""
        kin = [plan.path for plan in self.newest(spec.graph, spec.backend)]
        return [self.folder / name for name in dict.fromkeys(self._weights(kin))]

    def _weights(self, plans: Sequence[Path]) -> list[str]:
        """The names of the files of weights that these plans use, without those that are not there."""
        found = []
        for path in plans:
            with suppress(OSError, ValueError):
                weights = self._read(path).weights
                if weights is not None and (self.folder / weights.file).is_file():
                    found.append(weights.file)
        return found

    def _others(self, path: Path) -> set[str]:
        """The names of the files of weights that other plans than the one at ``path`` use."""
        return set(self._weights([plan.path for plan in self.plans() if plan.path != path]))

    def prune(self, keep: Sequence[Plan]) -> list[Path]:
        """Remove the other plans of the graphs and the backend of ``keep``, with all that lies beside them.

        Returns the plans that were removed. Raises OutputError.
        """
        kinds = {(plan.spec.graph, plan.spec.backend) for plan in keep}
        kept = {plan.path for plan in keep}
        gone = [p.path for p in self.plans() if (p.spec.graph, p.spec.backend) in kinds and p.path not in kept]
        for path in gone:
            try:
                with self._locked(path.stem):
                    own = [self.folder / name for name in self._weights([path])]
                    others = self._others(path)
                    for part in [path, *self.folder.glob(f"{path.stem}.*"), *own]:
                        if part.name not in others:
                            part.unlink(missing_ok=True)
            except OSError as error:
                raise self._unwritable(error) from error
        return gone

    def _path(self, spec: PlanSpec) -> Path:
        return self.folder / f"{spec.graph}-{spec.key}.plan"

    def _lock(self, stem: str) -> BaseFileLock:
        from filelock import FileLock  # only to build: asyncio comes with it

        return FileLock(self.folder / f".{stem}.lock")

    def _unwritable(self, error: Exception) -> OutputError:
        return OutputError(f"plans cannot be written to {self.folder}: {error}; name another folder")

    def _tidy(self, spec: PlanSpec) -> None:
        """Remove what builds of this graph left that were killed; those that another process is at work on stay."""
        from filelock import Timeout

        own = self._path(spec)
        with suppress(OSError):
            for left in self.folder.glob(f"{TEMPORARY}{spec.graph}-*"):
                if ".cache." in left.name:  # a session's, which holds no lock
                    continue
                stem = left.name.removeprefix(TEMPORARY).split(".")[0]
                held = stem == own.stem
                with suppress(OSError, Timeout), nullcontext() if held else self._lock(stem).acquire(timeout=0):
                    shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
            try:
                weights = self._read(own).weights
            except (FileNotFoundError, ValueError):  # no plan, then no weights either
                weights = None
            self._forget_weights(own, weights.file if weights else "")

    def _forget_weights(self, path: Path, keep: str) -> None:
        """Remove the weights of builds before. Where a process has them open, the system may not allow it."""
        others = self._others(path)
        for left in self.folder.glob(f"{path.stem}.*{WEIGHTS}"):
            if left.name != keep and left.name not in others:
                with suppress(OSError):
                    left.unlink()

    def _read(self, path: Path) -> _Sidecar:
        """The sidecar of a plan. Raises OSError, and ValueError for one that is not as it was written."""
        told = path.with_suffix(".json")
        if (not told.is_file() and told.exists()) or told.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{told.name}: no file, or too large for one")
        try:
            sidecar = record(_Sidecar, json.loads(told.read_text(encoding="utf-8")), told.name)
        except RecursionError:
            raise ValueError(f"{told.name}: nested too deep") from None
        except BundleError as error:
            raise ValueError(str(error).removesuffix(f"; {REMEDY}")) from None
        for name, value in sidecar.statistics.items():
            if name.endswith("_bytes") and (type(value) is not int or not 0 <= value < 1 << 63):
                raise ValueError(f"{told.name}: statistics: {name}: must be a number of bytes, not {shown(value)}")
        if sidecar.weights is not None and Path(sidecar.weights.file).name != sidecar.weights.file:
            raise ValueError(f"{told.name}: weights: file: must be a file's name, not {shown(sidecar.weights.file)}")
        return sidecar

    def _nearest(self, spec: PlanSpec) -> str:
        """What is different about the plan that has most in common with ``spec``."""
        candidates = [
            (sum(getattr(plan.spec, field.name) == getattr(spec, field.name) for field in fields(spec)), plan)
            for plan in self.newest(spec.graph, spec.backend)
        ]
        if not candidates:
            return ""
        _, plan = max(candidates, key=lambda candidate: candidate[0])
        return f"{plan.path.name}: {spec.difference(plan.spec)}"


def _damage(path: Path, wanted: FileRecord, record: Callable[[Path], FileRecord]) -> str:
    """How a file differs from what was written; empty when it does not."""
    try:
        size = path.stat().st_size
        if size != wanted.size:
            return f"{path.name} is damaged: {size} bytes, wanted are {wanted.size}"
        if record(path).sha256 != wanted.sha256:
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


def _sync(path: Path) -> None:
    """Have the disk hold a file before it gets its name."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(value), indent=1).encode() + b"\n"
