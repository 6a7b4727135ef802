"""What a ``Batcher`` serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dnp.engine.bundle.contract import STEPS
from dnp.engine.errors import SettingsError
from dnp.runtime.batching.negatives import NegativeCache
from dnp.runtime.job import Job


@dataclass(frozen=True)
class BatchOptions:
    """How a ``Batcher`` runs.

    Attributes:
        samples: the most images that share a step; measured at warm-up when ``None``.
        queue: the most requests that wait to be begun.
        sizes: (height, width) in pixels of the images that are served; the bundle's own size when empty.
        windows: the windows of prompts that are served.
        steps: the most calls of the network that a pass may take.
        negatives: where n* that were found are kept; found anew each time when ``None``.
    """

    samples: int | None = None
    queue: int = 64
    sizes: tuple[tuple[int, int], ...] = ()
    windows: tuple[int, ...] = (1,)
    steps: int = STEPS - 1
    negatives: NegativeCache | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("samples", self.samples, 1), ("queue", self.queue, 1), ("steps", self.steps, 8)):
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and value >= least):
                raise SettingsError(f"{name} must be a whole number from {least}, not {value!r}")


def check_served(job: Job, sizes: Sequence[tuple[int, int]], windows: Sequence[int], steps: int) -> None:
    """Raises SettingsError for a job outside of what ``BatchOptions`` say is served, with the option that widens it."""
    if (job.height, job.width) not in sizes:
        served = [f"{width}x{height}" for height, width in sizes]
        wanted = " ".join(f"--size {size}" for size in (*served, f"{job.width}x{job.height}"))
        raise SettingsError(
            f"images of {job.width}x{job.height} are not served here, only {', '.join(served)} (width x height); start "
            f"with {wanted}"
        )
    if job.windows not in windows:
        raise SettingsError(f"prompts of {job.windows} windows are not served here; start with --windows {job.windows}")
    for table in job.tables:
        if table.calls > steps:
            raise SettingsError(
                f"a pass of {table.calls} calls of the network is not served here, at most {steps} "
                f"are; ask for fewer steps, or start with --max-steps {table.calls}"
            )
