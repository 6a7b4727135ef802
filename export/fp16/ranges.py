"""How much of fp16's number range whole DNP requests need, and the values that need more put back to float32.

The requests run on the float32 reference of each graph (``float32.widen``), which shows magnitudes that fp16 could not
hold. Beside it, on the same inputs, its simulated form (``rounding``) shows the error of one run of the fp16 graph.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from dnp.engine.backends.onnxruntime.session import OrtSession
from dnp.engine.backends.session import Backend, BackendOptions
from dnp.engine.bundle.bundle import Bundle
from dnp.engine.bundle.manifest import FP16_LARGEST, GraphSpec, Ranges
from dnp.engine.bundle.tensors import TensorSpec
from dnp.engine.errors import DnpError, ExportError, SettingsError
from dnp.export.fp16.float32 import half_values, keep_float32, widen
from dnp.export.fp16.simulation import simulated_graph, write_reference
from dnp.export.passes.attention import read_model
from dnp.export.passes.onnx_file import write_model
from dnp.runtime.pipeline.pipeline import Pipeline, drive
from dnp.runtime.request import Request

SAFETY: Final = 2.0
LIMIT: Final = FP16_LARGEST / SAFETY
"""The magnitude from which a value stays float32: other prompts, seeds and sizes may need twice what was seen."""
SHARE: Final = 1 / 8
"""Where more of a graph's values pass the limit, the graph is exported in float32 whole: a residual stream that
overflows all along, as in SDXL's VAE, is about a sixth of a network's values, and has every block cast to and fro."""
PROMPTS: Final = ("a photograph of an astronaut riding a horse", "a large red circle left of a small blue square")
FILLER: Final = "an intricate oil painting of a crowded harbour at sunset, with golden light on the waves, "
MOST_STEPS: Final = 1000

LARGEST: Final = "largest_magnitudes"  # the reference's additional output


@dataclass(frozen=True)
class RangeCheck:
    """The requests to measure with: ``PROMPTS``, the empty prompt, one that fills every token, and those given here.

    Attributes:
        prompts: further prompts.
        steps: of each pass, from the first timestep to the last, three at least: ``ddim`` with linear spacing.
    """

    prompts: Sequence[str] = ()
    steps: int = 5

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or not 3 <= self.steps <= MOST_STEPS:
            raise SettingsError(
                f"the ranges are checked with 3 to {MOST_STEPS} steps, the first, middle and last timestep among "
                f"them, not {self.steps!r}"
            )


@dataclass
class Measured:
    """What the requests showed of one graph.

    Attributes:
        largest: the largest magnitude of each value that is fp16 in the graph, in the graph's order.
        error: the largest error of any run's output, relative to the largest value of that output, or to 1; for an
            image too, whose largest value is 255. Integers are not compared. NaN where the fp16 graph gave one.
    """

    largest: dict[str, float]
    error: float = 0.0


def check_ranges(bundle: Bundle, check: RangeCheck, whole: Callable[[str], None]) -> dict[str, Ranges]:
    """Measure every graph of an fp16 bundle that is being made, and put back to float32 what passes ``LIMIT``.

    The graph files are rewritten. ``whole`` is called with the name of each graph of which more than ``SHARE`` would
    have to stay float32, and has to replace its file by a float32 one; only where no input or output is fp16.

    Raises ExportError when a request cannot be run, when a graph overflows even in float32, or when a value that
    passes the limit is an fp16 input or output.
    """
    seen = measure(bundle, check)
    found = {name: _beyond(bundle.graphs[name], graph) for name, graph in seen.items()}
    replaced = set()
    for name, values in found.items():
        spec = bundle.graphs[name]
        if not values:
            continue
        if len(values) > SHARE * len(seen[name].largest) and not _has_half_borders(spec):
            whole(name)
            replaced.add(name)
        else:
            model = read_model(spec.path)
            keep_float32(model, values)
            write_model(model, spec.path)
    after = measure(bundle, check) if any(found.values()) else seen
    ranges = {}
    for name, graph in seen.items():
        at = max(graph.largest, key=graph.largest.__getitem__, default="")
        if not np.isfinite(after[name].error):
            raise ExportError(f"graph {name!r} gives no finite numbers in fp16, whatever is put back; export fp32")
        ranges[name] = Ranges(
            largest=graph.largest.get(at, 0.0),
            at=at,
            limit=LIMIT,
            error=after[name].error,
            precision="fp32" if name in replaced or not graph.largest else "fp16",
            float32=() if name in replaced else tuple(found[name]),
        )
    return ranges


def measure(bundle: Bundle, check: RangeCheck) -> dict[str, Measured]:
    """Run the requests of ``check`` on the float32 references of the bundle's graphs: what they showed, by graph.

    Raises ExportError when a request cannot be run.
    """
    settings: dict[str, Any] = {"sampler": "ddim", "steps": check.steps, "spacing": "linspace"}
    settings |= {f"dns_{name}": value for name, value in settings.items()}
    filling = FILLER * bundle.text.length
    with tempfile.TemporaryDirectory(dir=bundle.path, prefix=".ranges-") as folder:
        backend = RangeBackend(Path(folder))
        with Pipeline(bundle, backend) as pipeline:
            for prompt in (*PROMPTS, filling, *check.prompts):
                try:
                    pipeline(prompt, **settings)
                except DnpError as error:
                    text = prompt if len(prompt) <= 60 else f"{prompt[:57]}..."
                    raise ExportError(f"the ranges cannot be checked with the prompt {text!r}: {error}") from error
            # A request with an empty prompt is refused, but a pair may hold one in either place.
            drive(pipeline.sample([""], [""], Request(prompt=FILLER, **settings)))
    return {name: backend.measured[name] for name in bundle.graphs}


class RangeBackend(Backend):
    """Opens each graph as its float32 reference, written to ``folder``; ``measured`` grows with every run."""

    name = "cpu"

    def __init__(self, folder: Path, options: BackendOptions | None = None) -> None:
        super().__init__(options)
        self.measured: dict[str, Measured] = {}
        self._folder = folder

    def session(self, graph: GraphSpec, bundle: Bundle | None = None) -> RangeSession:
        model = read_model(graph.path)
        names = half_values(model)
        widen(model)
        watch(model, names)
        reference = write_reference(model, graph, self._folder / f"{graph.name}.onnx")
        if names:
            reference = replace(reference, outputs={**reference.outputs, LARGEST: TensorSpec((len(names),))})
        self.measured[graph.name] = Measured(dict.fromkeys(names, 0.0))
        half = OrtSession(simulated_graph(graph, self._folder), self.options)
        return RangeSession(reference, half, self.measured[graph.name], self.options)


class RangeSession(OrtSession):
    """The float32 reference of an fp16 graph; each run also runs the graph in simulated fp16, on the same inputs."""

    def __init__(self, reference: GraphSpec, half: OrtSession, measured: Measured, options: BackendOptions) -> None:
        super().__init__(reference, options)
        self._half = half
        self._measured = measured

    def reshape(self, **dims: int) -> None:
        super().reshape(**dims)
        self._half.reshape(**dims)

    def run(self) -> None:
        for name, buffer in self._half.inputs.items():  # before the run, which may be what changes them
            buffer.write(self.inputs[name].read())
        super().run()
        self._half.run()
        if LARGEST in self.outputs:
            for name, magnitude in zip(self._measured.largest, self.outputs[LARGEST].read(), strict=True):
                self._measured.largest[name] = float(np.maximum(self._measured.largest[name], magnitude))
        for name, buffer in self._half.outputs.items():
            want = self.outputs[name].read().astype(np.float64)
            if buffer.dtype != np.int64:
                error = np.abs(buffer.read() - want).max() / max(1.0, np.abs(want).max())
                self._measured.error = float(np.maximum(self._measured.error, error))  # keeps a NaN

    def close(self) -> None:
        super().close()
        self._half.close()


def watch(model: ir.Model, names: Sequence[str]) -> None:
    """Give the graph the output ``LARGEST``, float32 ``[len(names)]``: the largest magnitude of each named value."""
    if not names:
        return
    values = {value.name: value for node in model.graph for value in node.outputs}
    axis = ir.Value(name=f"{LARGEST}.axis", const_value=ir.tensor(np.array([0]), name=f"{LARGEST}.axis"))
    model.graph.register_initializer(axis)
    magnitudes = []
    for name in names:
        absolute = ir.node("Abs", [values[name]])
        largest = ir.node("ReduceMax", absolute.outputs, {"keepdims": 0})
        entry = ir.node("Unsqueeze", [largest.outputs[0], axis])
        model.graph.extend([absolute, largest, entry])
        magnitudes.append(entry.outputs[0])
    joined = ir.node("Concat", magnitudes, {"axis": 0})
    (output,) = joined.outputs
    output.name, output.type, output.shape = LARGEST, ir.TensorType(ir.DataType.FLOAT), ir.Shape((len(names),))
    model.graph.append(joined)
    model.graph.outputs.append(output)


def _beyond(graph: GraphSpec, measured: Measured) -> list[str]:
    """The values beyond the limit. Raises ExportError where float32 does not hold one, or it is an input or output."""
    values = [name for name, magnitude in measured.largest.items() if not magnitude <= LIMIT]
    for name in values:
        magnitude = measured.largest[name]
        if not np.isfinite(magnitude):
            raise ExportError(f"graph {graph.name!r} overflows even in float32, at {name!r}; the model is damaged")
        if name in graph.outputs:
            raise ExportError(
                f"graph {graph.name!r}: {name!r} reaches {magnitude:.3g} and leaves the graph in fp16, which holds "
                f"{FP16_LARGEST:.0f}; export fp32"
            )
    return values


def _has_half_borders(graph: GraphSpec) -> bool:
    return any(tensor.dtype == "float16" for tensor in [*graph.inputs.values(), *graph.outputs.values()])
