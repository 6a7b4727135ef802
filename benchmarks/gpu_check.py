"""Everything about a GPU backend that only a GPU can show: ``make gpu-check``, or ``python benchmarks/gpu_check.py``.

Builds the plans, compares every graph and every stage of a request with the ``cpu`` backend, checks that runs are
captured as CUDA graphs, closes sessions in every way, and measures. Prints a table, writes JSON after every part, and
exits with 1 when anything is not as it should be. What cannot be done is said first: options that cannot be honoured
(2), no GPU (4), no place for the JSON (6).
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from dnp import Pipeline
from dnp.engine import Bundle, open_backend, open_session
from dnp.engine.backends.onnxruntime.cuda_plans import build_cuda_plans
from dnp.engine.backends.session import BackendOptions
from dnp.engine.bundle.contract import BATCH
from dnp.engine.bundle.manifest import GraphSpec
from dnp.engine.errors import DnpError, OutputError, SettingsError
from dnp.engine.plans.build import build_plans
from dnp.engine.plans.plan import FOLDER, Plan
from dnp.engine.plans.product import PRODUCTS
from dnp.engine.plans.settings import BuildSettings
from dnp.engine.system import cuda
from dnp.engine.system.cuda import GpuProperties
from dnp.engine.system.files import refuse_folder, write_together
from dnp.runtime.captioning.resize import resize_matrices
from dnp.runtime.pictures import output_folder
from dnp.runtime.sampling.denoise import Denoiser, Sample
from dnp.runtime.sampling.samplers import sampler_table
from dnp.runtime.sampling.schedule import NoiseSchedule

BACKENDS = (*PRODUCTS, "cuda")
PROMPT = "a large red circle left of a small blue square on a plain yellow background"
# The largest difference from the cpu backend, relative to the largest value; images in grey levels, tokens exactly.
BOUNDS = {"fp32": 2e-3, "fp16": 3e-2}
LEVELS = {"fp32": 2, "fp16": 12}
PSNR = {"fp32": 40.0, "fp16": 25.0}  # dB, of the sampled images: 25 steps let a difference grow
REPEATS = 20
CLOSINGS = 5  # times that sessions are closed in each way


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="tensorrt", help="tensorrt, tensorrt-rtx or cuda")
    parser.add_argument("--bundle", type=Path, help="the shipped default when left out")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu-check.json"))
    parser.add_argument("--batches", type=int, default=BATCH, help=f"measure batches from 1 to this, at most {BATCH}")
    parser.add_argument("--dry-run", action="store_true", help="stop once the options and the GPU are found good")
    chosen = parser.parse_args(arguments)
    try:
        check_options(chosen.backend, chosen.batches)
        gpu = cuda.open_cuda().properties()
        gpu.check_age()
        if chosen.dry_run:
            return 0
        with output_folder(chosen.out.parent):
            check_file(chosen.out)
            bundle = Bundle.open(chosen.bundle) if chosen.bundle else Bundle.default()
            with tempfile.TemporaryDirectory(prefix="dnp-gpu-check-") as folder:
                report = check(bundle, gpu, chosen.backend, Path(folder) / FOLDER, chosen.batches, chosen.out)
            print(table(report))
            write(report, chosen.out)
    except DnpError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {chosen.out}")
    return 0 if report["passed"] else 1


def check_options(backend: str, batches: int) -> None:
    """Raises SettingsError for a backend that needs no GPU, and for batches that no pipeline samples."""
    if backend not in BACKENDS:
        raise SettingsError(f"--backend {backend!r} is none that runs on a GPU; choose one of {', '.join(BACKENDS)}")
    if not 1 <= batches <= BATCH:
        raise SettingsError(f"--batches must be from 1 to {BATCH}, not {batches}: a pipeline samples no more at once")


def check_file(path: Path) -> None:
    """Raises OutputError when ``path``, in a folder that can be written to, can be no file."""
    try:
        refuse_folder(path)
    except OSError as error:  # also a name that is too long
        raise OutputError(f"cannot write {path}: {error.strerror}; name another file with --out") from error


def write(report: dict, path: Path) -> None:
    """The report as JSON. Raises OutputError, with the report on stdout: what took so long is not lost."""
    data = as_json(report)
    try:
        write_together({path: data})
    except OutputError:
        print(data.decode())
        raise


def as_json(report: dict) -> bytes:
    return json.dumps(report, indent=1, allow_nan=False).encode() + b"\n"


def check(bundle: Bundle, gpu: GpuProperties, backend: str, folder: Path, batches: int, out: Path) -> dict:
    """All of it, as JSON can hold it. What there is lies in ``out`` after every part, should the next one crash."""
    options = BackendOptions(plans=folder)
    report: dict = {
        "gpu": asdict(gpu),
        "backend": backend,
        "bundle": {"name": bundle.name, "precision": bundle.precision, "fingerprint": bundle.fingerprint},
        "machine": {"python": platform.python_version(), "system": platform.platform(), "packages": packages()},
        "command": " ".join(sys.argv),
        "checks": {},
        "passed": False,
    }

    def keep(part: str) -> None:
        tell(f"{part}: done after {time.perf_counter() - started:.0f} s")
        with suppress(OutputError):  # told at the end, when all of it is to be written
            write_together({out: as_json(report)})

    started = time.perf_counter()
    plans = build(bundle, backend, folder)
    report["build_seconds"] = time.perf_counter() - started
    report["plans"] = [{"graph": plan.spec.graph, **plan.statistics} for plan in plans]
    keep("plans")
    request, report["start"] = compare_requests(bundle, backend, options)  # first: nothing is warm yet
    report["checks"]["request"] = request
    keep("request")
    parts = {
        "graphs": lambda: compare_graphs(bundle, backend, options),
        "capture": lambda: captured(bundle, backend, options),
        "closing": lambda: close_often(bundle, backend, options),
        **({"refit": lambda: refit(bundle, backend, folder.with_name("refit"))} if backend in PRODUCTS else {}),
    }
    for name, part in parts.items():
        report["checks"][name] = part()
        keep(name)
    report["steps"] = time_steps(bundle, backend, options, batches)
    report["passed"] = all(part["passed"] for part in report["checks"].values())
    keep("steps")
    return report


def build(bundle: Bundle, backend: str, folder: Path) -> list[Plan]:
    """The backend's plans."""
    if backend in PRODUCTS:
        return build_plans(bundle, backend, folder=folder, report=tell)
    return build_cuda_plans(bundle, folder=folder, report=tell)


def close_often(bundle: Bundle, backend: str, options: BackendOptions) -> dict:
    """Close sessions with work under way, captured and not, in this thread and in another, and after an error.

    What can go wrong here ends the process: that this returns is the result.
    """

    def once(eager: bool) -> None:
        opened = open_backend(backend, BackendOptions(plans=options.plans, eager=eager))
        session = opened.session(bundle.graphs["encode_text"], bundle)
        session.capture(batch=1, tokens=bundle.text.length)
        session.inputs["ids"].write(np.zeros(session.inputs["ids"].shape, np.int64))
        for _ in range(3):
            session.run()
        with suppress(SettingsError):
            session.reshape(batch=0, tokens=0)
        session.close()
        opened.close()

    for _ in range(CLOSINGS):
        for eager in (False, True):
            once(eager)
            thread = threading.Thread(target=once, args=(eager,))
            thread.start()
            thread.join()
    return {"passed": True, "sessions": 4 * CLOSINGS}


def tell(line: str) -> None:
    print(line, file=sys.stderr)


def compare_graphs(bundle: Bundle, backend: str, options: BackendOptions) -> dict:
    """Every graph with the same random inputs on both backends, at batch 1 and 3."""
    found = {}
    rng = np.random.default_rng(0)
    one, two = open_backend("cpu"), open_backend(backend, options)
    for name, graph in bundle.graphs.items():
        expected_session, session = one.session(graph, bundle), two.session(graph, bundle)
        worst = {}
        for batch in (1, 3):
            dims = example_dims(bundle, graph, batch, session)
            inputs = example_inputs(bundle, graph, dims, rng)
            results = []
            for opened in (expected_session, session):
                opened.reshape(**dims)
                for tensor, array in inputs.items():
                    opened.inputs[tensor].write(array)
                opened.run()
                results.append({tensor: buffer.read() for tensor, buffer in opened.outputs.items()})
            for tensor, expected in results[0].items():
                worst[tensor] = max(worst.get(tensor, 0.0), difference(expected, results[1][tensor]))
        limits = {tensor: limit(bundle, spec.dtype) for tensor, spec in graph.outputs.items()}
        found[name] = {
            "errors": worst,
            "bounds": limits,
            "passed": all(worst[tensor] <= limits[tensor] for tensor in worst),
        }
        expected_session.close()
        session.close()
    two.close()
    return {"passed": all(entry["passed"] for entry in found.values()), **found}


def example_dims(bundle: Bundle, graph: GraphSpec, batch: int, session) -> dict[str, int]:
    """The sizes of a request for ``batch`` images, filled up as ``session`` is captured."""
    latents = bundle.latents
    scale = latents.vae_scale_factor
    sizes = dict.fromkeys(("batch", "places", "images", "sequences"), batch)
    sizes |= {"rows": 2 * batch, "steps": 4, "noise_steps": 1, "tokens": bundle.text.length}
    sizes |= {"height": latents.height, "image_height": latents.height * scale}
    sizes |= {"width": latents.width, "image_width": latents.width * scale}
    return {symbol: session.limits.fit(symbol, sizes[symbol]) for symbol in graph.symbols}


def example_inputs(bundle: Bundle, graph: GraphSpec, dims: dict[str, int], rng: np.random.Generator) -> dict:
    """Inputs as a request has them, but random."""
    arrays = {}
    for name, spec in graph.inputs.items():
        shape = spec.resolve(dims)
        if spec.dtype.startswith("float"):
            arrays[name] = rng.standard_normal(shape).astype(spec.dtype)
        else:
            arrays[name] = rng.integers(0, 255 if spec.dtype == "uint8" else 2, shape).astype(spec.dtype)
    if graph.name == "encode_text":
        for name, tokenizer in zip(arrays, bundle.text.tokenizers, strict=True):
            arrays[name] = rng.integers(0, tokenizer.eos, arrays[name].shape)
    if graph.name == "denoise":
        table = sampler_table(NoiseSchedule.from_config(bundle.schedule), "ddim", 4, 7.5).rows
        arrays["table"][:, : len(table)] = table
        rows, places = np.arange(dims["rows"]), dims["places"]
        arrays |= {"row_place": rows // 2 % places, "row_role": rows % 2}
        first = 2 * np.arange(places)[:, None]
        arrays["place_rows"] = (first + np.arange(arrays["place_rows"].shape[1])) % len(rows)
    if graph.name == "decode_latents":
        arrays["decoded"] = np.arange(dims["batch"])
    if graph.name == "encode_image":
        columns, rows = resize_matrices(dims["image_height"], dims["image_width"], bundle.caption.image_size)
        arrays |= {"resize_columns": columns, "resize_rows": rows}
    if graph.name == "caption_step":
        sequences = dims["sequences"]
        arrays |= {"parent": np.arange(sequences), "position": np.full(sequences, 3)}
        arrays |= {"prompt_length": np.ones(sequences, np.int64), "min_length": np.zeros(sequences, np.int64)}
    return arrays


def difference(expected: np.ndarray, found: np.ndarray) -> float:
    """The largest one: in grey levels for images, in tokens, and relative to the largest value for floats."""
    worst = float(np.abs(expected.astype(np.float64) - found.astype(np.float64)).max())
    if not np.isfinite(worst):
        return 1e30
    return worst / max(1.0, float(np.abs(expected).max())) if expected.dtype.kind == "f" else worst


def limit(bundle: Bundle, dtype: str) -> float:
    if dtype == "int64" and bundle.precision == "fp16":
        return 1e9  # of two tokens that are as good as each other, either may come out; the logits are compared
    return {"uint8": LEVELS[bundle.precision], "int64": 0}.get(dtype, BOUNDS[bundle.precision])


def compare_requests(bundle: Bundle, backend: str, options: BackendOptions) -> tuple[dict, dict]:
    """The same request on both backends; and how long the GPU's first image takes, cold and warm.

    Every stage is judged by what it was given. The images of each have to reach ``PSNR``. n* has to be what the cpu
    backend makes of the GPU's own DNS image, word by word, in fp16 too; and the DNP images of both backends are drawn
    for the GPU's n*. So a stage that is wrong fails alone: the n* that the cpu finds for its own DNS image, which is
    told as well, may be another one where the DNS images differ, and the DNP images are compared all the same.
    """
    with Pipeline(bundle, "cpu") as pipeline:
        dns = pipeline.dns(PROMPT, seed=7)
    start = {}
    for name in ("cold", "warm"):  # the second start finds the driver's work done and its files in the cache
        started = time.perf_counter()
        with Pipeline(bundle, backend, options) as pipeline:
            pipeline.warm_up()
            opened = time.perf_counter()
            result = pipeline(PROMPT, seed=7, compare=True)
            first = time.perf_counter()
            pipeline(PROMPT, seed=8)
            start[name] = {"open_s": opened - started, "first_s": first - opened, "next_s": time.perf_counter() - first}
    with Pipeline(bundle, "cpu") as pipeline:
        caption = pipeline.caption(result.dns_images)[0]
        expected = pipeline(PROMPT, seed=7, compare=True, negative=result.negatives[0])
    found = {
        "plain": compare_images(bundle, result.plain_arrays, expected.plain_arrays),
        "dns": compare_images(bundle, result.dns_arrays, dns.arrays),
        "n*": {
            "found": result.negatives[0],
            "cpu_of_the_same_image": caption,
            "cpu_of_its_own_image": dns.negatives[0],
            "passed": result.negatives[0] == caption,
        },
        "dnp": compare_images(bundle, result.arrays, expected.arrays),
    }
    good = all(stage["passed"] for stage in found.values())
    return {"passed": good, "runs_on": result.runs_on, "stages": found}, start


def compare_images(bundle: Bundle, found: np.ndarray, expected: np.ndarray) -> dict:
    """Two batches of images, uint8 ``[B, H, W, 3]``, and how far apart they may be."""
    reached, bound = psnr(found, expected), PSNR[bundle.precision]
    return {"psnr": reached, "bound": bound, "passed": reached >= bound}


def psnr(one: np.ndarray, two: np.ndarray) -> float:
    """Of images of 255 grey levels, in dB; at most 99."""
    error = float(((one.astype(np.float64) - two) ** 2).mean())
    return min(99.0, 10 * float(np.log10(255**2 / error))) if error else 99.0


def captured(bundle: Bundle, backend: str, options: BackendOptions) -> dict:
    """Whether every graph is captured unless run eagerly, and whether that leaves the images as they are.

    Bit by bit, where two captured runs are the same bit by bit; else, as where a kernel adds up in any order, nearly.
    """
    results = []
    captured: dict[str, list[bool]] = {name: [] for name in bundle.graphs}
    for eager in (False, True):
        with Pipeline(bundle, backend, BackendOptions(plans=options.plans, eager=eager)) as pipeline:
            for _ in range(1 if eager else 2):
                results.append(pipeline(PROMPT, seed=3, steps=5, dns_steps=5))
            for name in bundle.graphs:
                captured[name].append(bool(pipeline.sessions[name].captured))
    found: dict[str, dict] = {
        name: {"captured": usual, "captured_when_eager": eager, "passed": usual and not eager}
        for name, (usual, eager) in captured.items()
    }
    one, again, eager_one = results
    repeats, same = same_bits(one, again), same_bits(one, eager_one)
    near = compare_images(bundle, one.arrays, eager_one.arrays)
    found["images"] = {**near, "repeats": repeats, "same": same, "passed": same if repeats else near["passed"]}
    return {"passed": all(entry["passed"] for entry in found.values()), **found}


def same_bits(one, two) -> bool:
    """Whether two results are the same in every bit."""
    images = [np.array_equal(getattr(one, name), getattr(two, name)) for name in ("dns_arrays", "arrays")]
    return all(images) and one.negatives == two.negatives


def refit(bundle: Bundle, backend: str, folder: Path) -> dict:
    """Weights A, then B, then A again: the last results must be the first, bit by bit, and B's must differ.

    A's must be those of the cpu backend as well: NVIDIA lists a known issue of TensorRT 11.3, where plans that can be
    refitted lose a bias.
    """
    import onnx
    from onnx import numpy_helper

    graph = bundle.graphs["encode_text"]
    try:
        build_plans(bundle, backend, graphs=[graph.name], settings=BuildSettings(refit=True), folder=folder)
        other = folder / "other.onnx"
        model = onnx.load(graph.path)
        for tensor in model.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.dtype.kind == "f" and array.ndim == 2:
                tensor.CopyFrom(numpy_helper.from_array((array * 1.25).astype(array.dtype), tensor.name))
        onnx.save(model, other)
        results = []
        with open_session(bundle, graph.name) as on_cpu:
            expected = context(bundle, on_cpu)
        with open_session(bundle, graph.name, backend, BackendOptions(plans=folder)) as session:
            for weights in (None, other, graph.path):
                if weights is not None:
                    session.refit(weights)
                results.append(context(bundle, session))
    except DnpError as error:
        return {"passed": False, "error": str(error)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    same, different = np.array_equal(results[0], results[2]), not np.array_equal(results[0], results[1])
    error = difference(expected, results[0])
    return {
        "passed": bool(same and different and error <= BOUNDS[bundle.precision]),
        "a_b_a_bit_equal": bool(same),
        "b_differs": bool(different),
        "a_against_cpu": error,
    }


def context(bundle: Bundle, session) -> np.ndarray:
    """What the text encoder makes of the first token ids there are."""
    session.reshape(batch=1, tokens=bundle.text.length)
    for buffer in session.inputs.values():
        buffer.write(np.arange(bundle.text.length, dtype=np.int64)[None])
    session.run()
    return next(iter(session.outputs.values())).read()


def time_steps(bundle: Bundle, backend: str, options: BackendOptions, batches: int) -> list[dict]:
    """Milliseconds a denoising step, launched from a captured graph and enqueued, interleaved; and the host's share."""
    latents = bundle.latents
    sizes = {"height": latents.height, "width": latents.width, "tokens": bundle.text.length}
    table = sampler_table(NoiseSchedule.from_config(bundle.schedule), "ddim", 25, 7.5)
    found = []
    opened = {eager: open_backend(backend, BackendOptions(plans=options.plans, eager=eager)) for eager in (0, 1)}
    sessions = {eager: one.session(bundle.graphs["denoise"], bundle) for eager, one in opened.items()}
    denoisers = {eager: Denoiser(session) for eager, session in sessions.items()}
    for batch in range(1, batches + 1):
        times: dict[int, list[float]] = {0: [], 1: []}
        host: dict[int, list[float]] = {0: [], 1: []}
        for denoiser in denoisers.values():
            denoiser.open(batch, steps=len(table.rows), noise_steps=1, **sizes)
            denoiser.capture(2 * batch)
            denoiser.open(batch, steps=len(table.rows), noise_steps=1, **sizes)
            for place in range(batch):
                denoiser.join(place, Sample(table, 0))
            denoiser.step()  # from here on a step is a run
        for _ in range(REPEATS):
            for eager, session in sessions.items():
                gpu = opened[eager].gpu
                start, end = gpu.cuda.event(), gpu.cuda.event()
                gpu.cuda.synchronize(gpu.stream)
                gpu.cuda.record(start, gpu.stream)
                began = time.perf_counter()
                for _ in range(10):
                    session.run()
                host[eager].append((time.perf_counter() - began) / 10)
                gpu.cuda.record(end, gpu.stream)
                gpu.cuda.wait(end)
                times[eager].append(gpu.cuda.elapsed(start, end) / 10)
                gpu.cuda.free_event(start)
                gpu.cuda.free_event(end)
        found.append(
            {
                "batch": batch,
                "captured_ms": spread(times[0]),
                "eager_ms": spread(times[1]),
                "host_captured_ms": spread(host[0]),
                "host_eager_ms": spread(host[1]),
            }
        )
    for eager in sessions:
        sessions[eager].close()
        opened[eager].close()
    return found


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds."""
    low, median, high = statistics.quantiles([s * 1000 for s in seconds], n=4)
    return {"median": median, "low": low, "high": high}


def packages() -> dict[str, str]:
    found = {}
    names = ("dnp-engine", "tensorrt", "tensorrt-cu13", "tensorrt-rtx-cu13", "cuda-python", "onnxruntime", "numpy")
    for name in (*names, "onnxruntime-gpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def table(report: dict) -> str:
    checks, gpu = report["checks"], report["gpu"]
    lines = [f"{report['backend']} on {gpu['name']} (SM {gpu['sm']}), {report['bundle']['precision']}", ""]
    lines.append(f"{'graph':<16}{'build s':>8}  largest difference from cpu (bound)")
    seconds = {plan["graph"]: f"{plan['seconds']:.1f}" for plan in report["plans"]}
    for name, entry in checks["graphs"].items():
        if name != "passed":
            errors = ", ".join(f"{t} {e:.1e} ({entry['bounds'][t]:g})" for t, e in entry["errors"].items())
            lines.append(f"{name:<16}{seconds.get(name, '-'):>8}  {errors}  {passed(entry)}")
    lines += ["", "whole request, stage by stage against cpu (bound)"]
    for name, stage in checks["request"]["stages"].items():
        if name == "n*":
            told = repr(stage["found"])
            for image in ("the_same_image", "its_own_image"):
                if (caption := stage[f"cpu_of_{image}"]) != stage["found"]:
                    told += f"; cpu of {image.replace('_', ' ')}: {caption!r}"
        else:
            told = f"{stage['psnr']:.1f} dB ({stage['bound']:g})"
        lines.append(f"{name:<8}{told}  {passed(stage)}")
    capture = checks["capture"]
    graphs = {name: found for name, found in capture.items() if name not in ("passed", "images")}
    captured = ", ".join(f"{name} {passed(found)}" for name, found in graphs.items())
    images = capture["images"]
    told = "every bit" if images["same"] else f"{images['psnr']:.1f} dB ({images['bound']:g})"
    told += "" if images["repeats"] else ", where two captured ones are not the same in every bit either"
    lines += ["", f"captured as CUDA graphs: {captured}", f"as eager runs: {told}  {passed(images)}"]
    lines.append(f"{checks['closing']['sessions']} sessions closed with work under way: {passed(checks['closing'])}")
    if "refit" in checks:
        lines.append(f"refit A, B, A: {passed(checks['refit'])} {checks['refit'].get('error', '')}")
    for name, times in report["start"].items():
        lines.append(
            f"{name} start: open {times['open_s']:.2f} s, first request {times['first_s']:.3f} s, "
            f"next {times['next_s']:.3f} s"
        )
    lines += ["", "ms a step, median [quartiles], on the GPU; and host time", "batch   captured            eager"]
    for row in report["steps"]:
        cells = [f"{t['median']:8.3f} [{t['low']:.3f}, {t['high']:.3f}]" for t in (row["captured_ms"], row["eager_ms"])]
        hosts = f"{row['host_captured_ms']['median']:.4f} / {row['host_eager_ms']['median']:.4f}"
        lines.append(f"{row['batch']:>5} {'  '.join(cells)}   host {hosts}")
    lines += ["", "all as it should be" if report["passed"] else "NOT as it should be, see above"]
    return "\n".join(lines)


def passed(entry: dict) -> str:
    return "ok" if entry["passed"] else "FAILED"


if __name__ == "__main__":
    sys.exit(main())
