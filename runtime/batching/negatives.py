"""The n* that were found, kept: a request for what was found before runs neither DNS nor the captioner."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from dnp.engine.errors import DnpError, SettingsError
from dnp.runtime.job import Job
from dnp.runtime.pictures import png, read_settings, write_atomically

_log = logging.getLogger("dnp.runtime")
MB: Final = 1_000_000
# What a DNS image and its caption depend on, besides the seed and what runs.
_SETTINGS: Final = (
    "prompt", "windows", "height", "width", "embedded_guidance", "dns_sampler", "dns_steps", "dns_guidance", "dns_eta",
    "dns_spacing", "beams", "prefix", "min_length", "max_length",
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A DNS image, uint8 ``[height, width, 3]``, and the caption that is n*."""

    image: npt.NDArray[np.uint8]
    text: str


class NegativeCache:
    """DNS images and their captions by everything that they depend on; any number of threads and batchers may share it.

    What was used longest ago goes first, from memory beyond ``memory`` MB, and from ``folder``, where one is named,
    beyond ``disk`` MB. There each is a PNG with n* inside, to be looked at, and to be deleted at any time.

    Attributes:
        hits, misses: how often one was found for another request, before or meanwhile, and how often anew.
    """

    def __init__(self, memory: float = 256, folder: Path | None = None, disk: float = 4096) -> None:
        """Raises SettingsError when there can be no such folder."""
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SettingsError(f"n* cannot be kept in {str(folder)!r}: {error}; name another folder") from error
        self._most, self._folder, self._disk = memory * MB, folder, disk * MB
        self._found: OrderedDict[str, Found] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._writer = None if folder is None else ThreadPoolExecutor(1, "dnp-negatives")
        self.hits = self.misses = 0

    def of(self, job: Job, made_with: Mapping[str, Any]) -> Kept:
        """What there is for a job, on what is ``made_with``."""
        return Kept(self, job, made_with)

    def get(self, key: str) -> Found | None:
        """What is kept by a key."""
        with self._lock:
            found = self._found.get(key)
            if found is not None:
                self._found.move_to_end(key)
        if found is None and (found := self._read(key)) is not None:
            self._remember(key, found)
        with self._lock:
            self.hits += found is not None
        return found

    def put(self, key: str, found: Found, settings: Mapping[str, Any]) -> None:
        """Keep something, with ``settings`` in its picture. The disk is written by another thread."""
        with self._lock:
            known = key in self._found
            self.hits += known
            self.misses += not known
        if known:
            return
        self._remember(key, found)
        if self._writer is not None:
            self._writer.submit(self._write, key, found, settings)

    def close(self) -> None:
        """Write what is not on the disk yet."""
        if self._writer is not None:
            self._writer.shutdown()

    def _remember(self, key: str, found: Found) -> None:
        with self._lock:
            if (old := self._found.pop(key, None)) is not None:
                self._bytes -= old.image.nbytes
            self._found[key] = found
            self._bytes += found.image.nbytes
            while self._bytes > self._most:
                _, old = self._found.popitem(last=False)
                self._bytes -= old.image.nbytes

    def _read(self, key: str) -> Found | None:
        if self._folder is None:
            return None
        path = self._folder / f"{key}.png"
        try:
            text = str(read_settings(path)["negative"])
            with Image.open(path) as image:
                found = Found(np.asarray(image.convert("RGB")), text)
            path.touch()  # used now
        except (OSError, DnpError, KeyError):  # none, or none of ours
            return None
        return found

    def _write(self, key: str, found: Found, settings: Mapping[str, Any]) -> None:
        assert self._folder is not None
        try:
            write_atomically(self._folder / f"{key}.png", png(Image.fromarray(found.image), settings))
            files = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in self._folder.glob("*.png"))
            beyond = sum(size for _, size, _ in files) - self._disk
            for _, size, path in files:
                if beyond <= 0:
                    break
                path.unlink(missing_ok=True)
                beyond -= size
        except (OSError, DnpError) as error:
            _log.warning("n* is not kept in %s: %s", self._folder, error)


class Kept:
    """The part of a cache that is a job's, by the number of its image.

    Attributes:
        keys: of each image, equal for equal n*.
    """

    def __init__(self, cache: NegativeCache, job: Job, made_with: Mapping[str, Any]) -> None:
        self._cache, self._job, self._made_with = cache, job, made_with
        self.keys = tuple(self._key(seed) for seed in job.dns_seeds)

    def found(self) -> dict[int, Found]:
        """What was found before."""
        found = {number: self._cache.get(key) for number, key in enumerate(self.keys)}
        return {number: known for number, known in found.items() if known is not None}

    def put(self, number: int, found: Found) -> None:
        """Keep what was found now."""
        job = self._job
        alone = replace(job.request, images=1, seed=job.seeds[number], dns_seed=job.dns_seeds[number])
        settings = {"request": alone.to_dict(), "negative": found.text, **self._made_with}
        self._cache.put(self.keys[number], found, settings)

    def _key(self, seed: int) -> str:
        settings = {name: getattr(self._job.request, name) for name in _SETTINGS}
        whole = {**settings, "seed": seed, **self._made_with}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
