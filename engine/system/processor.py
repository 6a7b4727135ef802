"""The machine under this process: its cores, what the processor is called, and the memory that was used."""

from __future__ import annotations

import math
import os
import platform
import re
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def core_count() -> int:
    """Physical cores that this process may use: hyper-threads count once, affinity and quota are respected."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cpus = affinity(0) if affinity else range(os.cpu_count() or 1)
    cores = {_read(_CPUS / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    return max(1, min(len(cores), _quota() or len(cores)))


def processor_name() -> str:
    """What the processor calls itself."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def processor_features() -> tuple[str, ...]:
    """The vector units that it has, in the system's words, as ``avx2``; nothing where the system does not tell."""
    told = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    vector = r"(?:avx|amx|fma|f16c|asimd|sve|i8mm|bf16)\w*|sme\d?"
    return tuple(sorted(name for name in told[1].split() if re.fullmatch(vector, name))) if told else ()


def free_memory() -> float:
    """Bytes of memory that nothing uses; infinite where the system does not tell."""
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return math.inf


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes; 0 where the system does not tell.

    Not ``getrusage``: what it tells of a process that was just started includes the size of the one that started it.
    """
    match = re.search(r"^VmHWM:\s*(\d+) kB$", _read(Path("/proc/self/status")), re.MULTILINE)
    return int(match[1]) << 10 if match else 0


def _quota() -> int | None:
    """Whole processors that the control group grants, None when it sets no limit."""
    match = re.fullmatch(r"(\d+) (\d+)", _read(_QUOTA))
    return max(1, round(int(match[1]) / int(match[2]))) if match else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
