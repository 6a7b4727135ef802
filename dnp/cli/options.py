"""Options that several commands share, and what they turn into."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from dnp.cli.streams import swallow

if TYPE_CHECKING:
    from dnp.runtime.job import Job
    from dnp.runtime.pipeline.pipeline import Pipeline
    from dnp.runtime.result import Step

F = TypeVar("F", bound=Callable[..., Any])
MB: Final = 1_000_000  # bytes, as everywhere in what is printed


class _PathType(click.Path):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":  # of a shell variable that is not set; as a path it would be the working folder
            self.fail("the path is empty; name one, or leave it out", param, ctx)
        return super().convert(value, param, ctx)


PATH: Final = _PathType(path_type=Path)


def _stacked(*options: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


@dataclass(frozen=True)
class PipelineOptions:
    """Where the model comes from and what runs it; None where nothing was said."""

    bundle: Path | None
    backend: str | None
    precision: str | None
    threads: int | None
    device: int | None
    eager: bool
    memory_limit: int | None
    plans: Path | None

    @property
    def of_backend(self) -> dict[str, Any]:
        """By the names of ``BackendOptions``."""
        return {
            "threads": self.threads,
            "precision": self.precision,
            "device": self.device or 0,
            "eager": self.eager,
            "memory_limit": None if self.memory_limit is None else self.memory_limit * MB,
            "plans": self.plans,
        }

    def open(self) -> Pipeline:
        """The pipeline asked for, closed when the command ends; raises what ``Pipeline.open`` raises."""
        from dnp.runtime.pipeline.pipeline import Pipeline

        pipeline = Pipeline.open(self.bundle, self.backend or "cpu", **self.of_backend)
        return click.get_current_context().with_resource(pipeline)


def backend_options(function: F) -> F:
    """The options behind ``PipelineOptions``, which the command gets as ``options``; a bundle where it has one."""

    @wraps(function)
    def packed(*arguments: Any, **settings: Any) -> Any:
        values = {field.name: settings.pop(field.name, None) for field in fields(PipelineOptions)}
        return function(*arguments, options=PipelineOptions(**values), **settings)

    return _stacked(
        click.option("--backend", help="What runs the graphs, cpu when left out; `dnp doctor` lists them."),
        click.option("--precision", help="Arithmetic of the openvino backend: f32 (its default) or bf16."),
        click.option("--threads", type=int, help="Threads of the backend; all cores when left out."),
        click.option("--device", type=int, help="Number of the GPU, where the backend runs on one; 0 when left out."),
        click.option("--eager", is_flag=True, help="Run without captured CUDA graphs, where the backend has them."),
        click.option("--memory-limit", type=int, metavar="MB", help="Most GPU memory to use."),
        click.option("--plans", type=PATH, help="Folder of compiled plans, see `dnp build`."),
    )(packed)  # type: ignore[return-value]


def pipeline_options(function: F) -> F:
    """``backend_options`` and the bundle."""
    bundle = click.option("--bundle", type=PATH, help="A bundle folder; the shipped default when left out.")
    return bundle(backend_options(function))


def json_option(function: F) -> F:
    """One machine-readable line on stdout."""
    return click.option("--json", "as_json", is_flag=True, help="Print one line of JSON on stdout.")(function)


def out_options(function: F) -> F:
    """Where the pictures go."""
    return _stacked(
        click.option("--out", type=PATH, default=Path("out"), show_default=True, help="Folder for the pictures."),
        click.option(
            "--overwrite",
            is_flag=True,
            help="Replace what is in a picture's place. Without it only the same picture, made before, is replaced: of "
            "the same prompt and settings, bundle, backend and precision.",
        ),
    )(function)


def given_options() -> dict[str, str]:
    """The options on the command line, by their names: those that were written out, as they are written."""
    context = click.get_current_context()
    return {
        option.name: max(option.opts, key=len)
        for option in context.command.params
        if option.name and context.get_parameter_source(option.name) is click.core.ParameterSource.COMMANDLINE
    }


def caption_options(function: F) -> F:
    """How the captioner searches; lengths in tokens."""
    return _stacked(
        click.option("--beams", type=int, default=1, show_default=True, help="Beams of the captioner; 1 is greedy."),
        click.option("--prefix", default="", help="Text that every caption begins with."),
        click.option("--min-length", type=int, default=0, help="Fewest tokens of a caption, prefix included."),
        click.option("--max-length", type=int, help="Most tokens of a caption; the bundle's own when left out."),
    )(function)


def _by_name(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    """``("rescale=0.7",)`` as a dict of numbers."""
    found = {}
    for text in values:
        name, _, number = text.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise click.BadParameter(f"{text!r} is no NAME=VALUE, such as rescale=0.7") from None
    return found


def image_options(function: F) -> F:
    """What the images of both passes have in common. A size that is left out is the bundle's."""
    return _stacked(
        click.option("--seed", type=int, default=0, show_default=True, help="Starting noise; image i uses seed + i."),
        click.option("--height", type=int, help="In pixels."),
        click.option("--width", type=int, help="In pixels."),
        click.option(
            "--windows",
            type=int,
            default=1,
            show_default=True,
            help="Read so many times the encoder's length.",
        ),
    )(function)


def final_options(function: F) -> F:
    """The settings of the final pass. What is left out is the bundle's default."""
    return _stacked(
        click.option("--sampler", help="Sampler of the final pass, e.g. ddim, euler, dpmpp_2m, unipc."),
        click.option("--steps", type=int, help="Steps of the final pass."),
        click.option("--guidance", type=float, help="Guidance scale w of the final pass."),
        click.option("--eta", type=float, default=0.0, help="Share of fresh noise in the final pass (ddim), 0 to 1."),
        click.option("--spacing", help="Timesteps of the final pass: leading, linspace or trailing."),
        click.option(
            "--embedded-guidance",
            type=float,
            default=1.0,
            help="Guidance scale that a distilled network takes.",
        ),
        click.option(
            "--method",
            "methods",
            multiple=True,
            metavar="NAME=VALUE",
            callback=_by_name,
            help="Parameter of a guidance method, where the bundle was exported with them: rescale, norm_limit, "
            "parallel, zero_star, norm_cap, perp_neg.",
        ),
    )(function)


def dns_options(function: F) -> F:
    """The settings of the DNS pass. What is left out is the bundle's default."""
    return _stacked(
        click.option("--dns-seed", type=int, help="Starting noise of the DNS pass; --seed when left out."),
        click.option("--dns-sampler", help="Sampler of the DNS pass."),
        click.option("--dns-steps", type=int, help="Steps of the DNS pass."),
        click.option("--dns-guidance", type=float, help="Guidance scale s of the DNS pass."),
        click.option("--dns-eta", type=float, default=0.0, help="Share of fresh noise in the DNS pass (ddim), 0 to 1."),
        click.option("--dns-spacing", help="Timesteps of the DNS pass."),
    )(function)


def warn_if_truncated(pipeline: Pipeline, job: Job, name: str, *texts: str | None) -> None:
    """Say on stderr what the text encoder does not see of ``texts``."""
    for text in texts:
        lost = pipeline.tokenizer.truncated(text, job.windows) if text else None
        if lost:
            shown = lost if len(lost) <= 60 else f"{lost[:57]}..."
            click.echo(
                f"dnp: the {name} is too long for the model; left out: {shown!r}; --windows 2 reads on", err=True
            )


class Progress:
    """A progress bar per phase on a terminal, nothing otherwise. A callback for ``Pipeline``."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._tqdm = tqdm
        self._bar: Any = None
        self._phase = ""

    def __call__(self, step: Step) -> None:
        """Move the bar to ``step``; a new phase, or one that begins again, gets a new bar."""
        if step.phase != self._phase or step.index < self._bar.n:
            self.close()
            self._phase = step.phase
            self._bar = self._tqdm(
                total=step.total, desc=f"{step.phase:>7}", unit="step", disable=None, file=sys.stderr
            )
        self._bar.update(step.index - self._bar.n)

    def close(self) -> None:
        """End the present bar."""
        if self._bar is not None:
            self._bar.close()


def say(report: dict[str, Any], as_json: bool, text: str) -> None:
    """The outcome of a command on stdout: a line of JSON, or text for people."""
    from dnp.engine.errors import OutputError

    try:
        click.echo(json.dumps(report, ensure_ascii=False, allow_nan=False) if as_json else text)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader went away (`dnp inspect | head`); the work was done
        swallow("stdout")
    except OSError as error:
        swallow("stdout")
        raise OutputError(f"cannot write to stdout: {error.strerror or error}; what it tells of was done") from error
