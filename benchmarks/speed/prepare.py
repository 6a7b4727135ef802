"""What has to be there before anything is timed: environments, weights, and the peers' own formats. Kept in build/."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from contenders import CONTENDERS, FORMATS
from job import Job

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
BUILD = REPOSITORY / "build" / "bench"
TINY = REPOSITORY / "models" / "tiny" / "stable-diffusion"
PREFIX = "text_model."
TOLD = 300  # characters of a reason


@dataclass(frozen=True)
class Model:
    """One set of weights in every form that a contender reads.

    Attributes:
        name: ``default`` or ``sd15``.
        title: as a table calls it.
        folder: where what is made for it lies; ``source``, ``captioner`` and ``bundle`` may be the repository's.
        pixels, steps: the image and its denoising steps, unless told otherwise.
    """

    name: str
    title: str
    folder: Path
    source: Path
    captioner: Path
    bundle: Path
    pixels: int
    steps: int

    @property
    def plans(self) -> Path:
        """The folder of the bundle's plans."""
        return self.folder / "plans"


MODELS = {
    "default": Model(
        "default",
        "the default model",
        BUILD / "default",
        BUILD / "default" / "source",
        REPOSITORY / "models" / "tiny" / "blip",
        REPOSITORY / "dnp" / "default",
        pixels=64,
        steps=25,
    ),
    "sd15": Model(
        "sd15",
        "Stable Diffusion 1.5 and BLIP base, random weights",
        BUILD / "sd15",
        BUILD / "sd15" / "source",
        BUILD / "sd15" / "blip",
        BUILD / "sd15" / "bundle",
        pixels=512,
        steps=2,
    ),
}


def python_of(environment: str) -> Path:
    """The interpreter of a benchmark environment; this one's own for ``main``."""
    return Path(sys.executable) if environment == "main" else _environment(environment) / "bin" / "python"


def prepare_environment(environment: str) -> str:
    """Make the environment as its requirements say. Returns the reason why not, empty when it is there."""
    if environment == "main":
        return ""
    requirements = HERE / "requirements" / f"{environment}.txt"
    folder = _environment(environment)
    stamp, wanted = folder / "installed", hashlib.sha256(requirements.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return ""
    _say(f"making {folder.name} from {requirements.relative_to(REPOSITORY)}")
    shutil.rmtree(folder, ignore_errors=True)
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--quiet"]
    commands = [[sys.executable, "-m", "venv", folder], [*pip, "install", "-r", requirements]]
    removed = re.findall(r"^# remove: (\S+)", requirements.read_text(), re.MULTILINE)
    for command in [*commands, *([*pip, "uninstall", "--yes", package] for package in removed)]:
        done = subprocess.run(list(map(str, command)), stderr=subprocess.PIPE, text=True, errors="replace")
        if done.returncode:
            return f"does not install: {_last_error(done.stderr)}"
    stamp.write_text(wanted)
    return ""


def prepare_model(model: Model) -> None:
    """The weights, the bundle and its plans. Raises RuntimeError with what the export said when it fails."""
    model.folder.mkdir(parents=True, exist_ok=True)
    if not model.source.exists() or not model.captioner.exists():
        _say(f"making {model.title}")
        made = TINY
        if model.name == "sd15":
            _run([sys.executable, HERE.parent / "random_models.py", model.folder])
            made = model.folder / "sd15"
        partial = model.source.with_name("source.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(made, partial, copy_function=os.link if made != TINY else shutil.copy2)
        use_published_names(partial / "text_encoder" / "model.safetensors")
        partial.rename(model.source)
        if made != TINY:
            shutil.rmtree(made)
    dnp = Path(sys.executable).with_name("dnp")
    if not model.bundle.exists():
        _say(f"exporting {model.title}")
        _run([dnp, "export", model.source, model.bundle, "--captioner", model.captioner])
    _run([dnp, "build", model.bundle, "--backend", "cpu", "--plans", model.plans])


def use_published_names(path: Path) -> None:
    """Put ``text_model.`` before the names of a text encoder's weights, as the published Stable Diffusion has them.

    transformers 5 leaves it out when it saves, and reads both; transformers 4 and stable-diffusion.cpp would find no
    weights and go on with random ones.
    """
    from safetensors.numpy import load_file, save_file

    weights = {f"{PREFIX}{name.removeprefix(PREFIX)}": array for name, array in load_file(path).items()}
    partial = path.with_suffix(".partial")
    save_file(weights, partial, metadata={"format": "pt"})
    partial.replace(path)


def prepare_contender(name: str, job: Job) -> str:
    """Convert the weights to the contender's own format, where it has one. Returns the reason why not, or nothing."""
    entry = CONTENDERS[name]
    if not entry.converted:
        return ""
    out = Path(job.converted) / entry.converted
    if out.exists():
        return ""
    environment, kind = FORMATS[entry.converted]
    _say(f"converting the weights for {entry.title}")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    command = [python_of(environment), HERE / "convert.py", kind, partial]
    done = subprocess.run(
        list(map(str, command)), input=job.to_json(), stderr=subprocess.PIPE, text=True, errors="replace",
        env=quiet_environment(),
    )  # fmt: skip
    if done.returncode:
        return f"cannot convert the weights: {_last_error(done.stderr)}"
    partial.rename(out)
    return ""


def quiet_environment() -> dict[str, str]:
    """Variables for a worker: nothing is asked of any network, and no progress bars are drawn."""
    compiled = str(BUILD / "inductor")
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    return {**os.environ, **offline, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TORCHINDUCTOR_CACHE_DIR": compiled}


def _environment(name: str) -> Path:
    return REPOSITORY / f".venv-bench-{name}"


def _run(command: list[object]) -> None:
    done = subprocess.run(list(map(str, command)), stderr=subprocess.PIPE, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"{Path(str(command[0])).name} failed: {_last_error(done.stderr)}")


def _last_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line and not line.startswith("WARNING")]
    return (errors or lines or ["nothing was said"])[-1][:TOLD]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
