"""``python convert.py KIND OUT < job.json``: one contender's own format of the weights, written in its environment."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from job import Job

if __name__ == "__main__":
    module, kind = sys.argv[1].split(":")
    getattr(import_module(f"contenders.{module}"), kind).convert(Job.from_json(sys.stdin.read()), Path(sys.argv[2]))
