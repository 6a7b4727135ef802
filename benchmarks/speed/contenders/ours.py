"""dnp-engine on a backend, with the time inside the inference library told apart; and the network alone in a loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from job import Job, Point

from contenders.base import Contender, Mark, Pixels

CPU_PACKAGES = ("dnp-engine", "onnxruntime", "numpy")
OPENVINO_PACKAGES = ("dnp-engine", "openvino", "numpy")


class Ours(Contender):
    """``dnp.Pipeline``, one request for the whole of DNP."""

    def __init__(self, backend: str) -> None:
        self._backend, self._inside = backend, 0.0
        self.packages = CPU_PACKAGES if backend == "cpu" else OPENVINO_PACKAGES

    def load(self) -> None:
        from dnp import Pipeline

        self._kind = Pipeline
        if self._backend == "cpu":  # the pipeline imports its library when it opens; here that is import, as for others
            import onnxruntime  # noqa: F401
        else:
            import openvino  # noqa: F401

    def open(self, job: Job) -> None:
        self._seed, self._tokens = job.seed, job.caption_tokens
        self._pipeline = self._kind.open(job.bundle, self._backend, threads=job.threads, plans=Path(job.plans))
        self._pipeline.warm_up()  # opens every graph
        for session in self._pipeline.sessions.values():
            session.run = self._timed(session.run)

    def image(self, prompt: str, negative: str, guidance: float, point: Point, mark: Mark) -> Pixels:
        against: dict[str, Any] = {"negative": negative} if negative else {"dnp": False}
        settings = {**against, "guidance": guidance, "images": point.batch}
        return self._run(prompt, point, mark, settings).arrays

    def caption(self, image: Pixels) -> str:
        from PIL import Image

        text: str = self._pipeline.caption([Image.fromarray(image)], max_length=self._tokens)[0]
        return text

    def dnp(self, job: Job, mark: Mark) -> tuple[Pixels, str]:
        settings = {"guidance": job.guidance, "dns_guidance": job.dns_guidance, "max_length": job.caption_tokens}
        result = self._run(job.prompt, job.point, mark, settings)
        return result.arrays[0], result.negatives[0]

    def inside(self) -> float:
        return self._inside

    def _run(self, prompt: str, point: Point, mark: Mark, settings: dict[str, Any]) -> Any:
        def progress(step: Any) -> None:
            if step.phase != "caption":
                mark()

        size = {"width": point.pixels, "height": point.pixels, "steps": point.steps, "dns_steps": point.steps}
        samplers = {"sampler": "ddim", "dns_sampler": "ddim"}
        return self._pipeline(prompt, seed=self._seed, progress=progress, **size, **samplers, **settings)

    def _timed(self, run: Callable[[], None]) -> Callable[[], None]:
        """A session's run, which hands over to the inference library, its time added up."""

        def timed() -> None:
            started = time.perf_counter()
            run()
            self._inside += time.perf_counter() - started

        return timed


class Network(Contender):
    """The bundle's ``denoise`` graph alone, called in a loop by the library itself with its defaults: no engine.

    Its "images" are that loop and a black picture; only the steps mean anything.
    """

    def __init__(self, library: str) -> None:
        self._library = library
        self.packages = ("onnxruntime",) if library == "onnxruntime" else ("openvino",)
        self._prepared: tuple[int, int] | None = None

    def load(self) -> None:
        import importlib

        self._module = importlib.import_module(self._library)

    def open(self, job: Job) -> None:
        from dnp.engine import Bundle

        self._bundle = Bundle.open(job.bundle)
        self._graph = self._bundle.graph("denoise")
        self._guidance = job.guidance
        library: Any = self._module
        if self._library == "onnxruntime":
            options = library.SessionOptions()
            options.intra_op_num_threads = job.threads
            self._session = library.InferenceSession(str(self._graph.path), options, providers=["CPUExecutionProvider"])
        else:
            settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": job.threads}
            self._request = library.compile_model(str(self._graph.path), "CPU", settings).create_infer_request()

    def image(self, prompt: str, negative: str, guidance: float, point: Point, mark: Mark) -> Pixels:
        if self._prepared != (point.batch, point.pixels):
            self._run = self._bound(point)
            self._prepared = (point.batch, point.pixels)
        for _ in range(point.steps):
            self._run()
            mark()
        return np.zeros((point.batch, point.pixels, point.pixels, 3), np.uint8)

    def caption(self, image: Pixels) -> str:
        raise NotImplementedError("the network alone has no captioner")

    def _bound(self, point: Point) -> Callable[[], None]:
        """One run of the graph on inputs that are bound once, as a request would have them."""
        arrays = self._inputs(point)
        if self._library == "onnxruntime":
            binding = self._session.io_binding()
            for name, array in arrays.items():
                binding.bind_ortvalue_input(name, self._module.OrtValue.ortvalue_from_numpy(array))
            for name in self._graph.outputs:
                binding.bind_output(name)
            return lambda: self._session.run_with_iobinding(binding)
        for name, array in arrays.items():
            self._request.set_tensor(name, self._module.Tensor(array, shared_memory=True))
        self._arrays = arrays  # the request reads them in place

        def run() -> None:
            self._request.start_async()
            self._request.wait()

        return run

    def _inputs(self, point: Point) -> dict[str, Any]:
        from dnp.runtime.sampling.samplers import sampler_table
        from dnp.runtime.sampling.schedule import NoiseSchedule

        side = point.pixels // self._bundle.latents.vae_scale_factor
        table = sampler_table(NoiseSchedule.from_config(self._bundle.schedule), "ddim", point.steps, self._guidance)
        rows = np.arange(2 * point.batch)  # of guidance: two for each image
        dims = {
            "places": point.batch,
            "rows": len(rows),
            "steps": len(table.rows),
            "noise_steps": 1,
            "height": side,
            "width": side,
            "tokens": self._bundle.text.length,
        }
        rng = np.random.default_rng(0)
        arrays: dict[str, Any] = {}
        for name, spec in self._graph.inputs.items():
            shape = spec.resolve(dims)
            arrays[name] = (
                rng.standard_normal(shape).astype(spec.dtype)
                if spec.dtype.startswith("float")
                else np.zeros(shape, spec.dtype)
            )
        arrays["table"] = np.broadcast_to(np.asarray(table.rows, np.float32), arrays["table"].shape).copy()
        arrays |= {"row_place": rows // 2, "row_role": rows % 2, "place_rows": rows.reshape(point.batch, 2)}
        return arrays
