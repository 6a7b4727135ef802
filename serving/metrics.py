"""What Prometheus reads at ``/metrics``. Labels are model, phase, endpoint, status and cause: never prompts or ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dnp.runtime.batching import Status
from dnp.runtime.result import Result
from dnp.serving.engines import Engines

F = TypeVar("F", GaugeMetricFamily, CounterMetricFamily)
_INFO: Final = ("bundle", "backend", "precision", "runs_on")
_PHASES: Final = ("dns", "caption", "plain", "final")
_IMAGES: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, engines: Engines) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "dnp_requests", "HTTP requests answered.", ["endpoint", "status"], registry=registry
        )  # Prometheus adds _total to a counter's name
        self.failures = Counter(
            "dnp_requests_failed", "Requests not answered with what was asked for.", ["cause"], registry=registry
        )
        self.images = Counter("dnp_images", "Images made.", ["model"], registry=registry)
        self.http_seconds = Histogram(
            "dnp_http_request_seconds", "From a request's arrival to its answer's end.", ["endpoint"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "dnp_request_latency_seconds", "From admission to the images.", ["model"], buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self._measured = {
            "queue": self._of_engine("dnp_queue_time_seconds", "From admission to the first step.", _SECONDS, registry),
            "step": self._of_engine("dnp_denoise_step_latency_seconds", "Of one step of all.", _SECONDS, registry),
            "decode": self._of_engine("dnp_vae_decode_seconds", "Of one call of the decoder.", _SECONDS, registry),
            "batch": self._of_engine("dnp_generation_batch_size", "Images in one step.", _IMAGES, registry),
        }
        self.phases = Histogram(
            "dnp_stage_latency_seconds", "Time of a request by phase.", ["model", "phase"], buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.in_flight = Gauge("dnp_http_requests_in_flight", "Requests being answered.", registry=registry)
        registry.register(_OfEngines(engines))
        for engine in engines:
            engine.listen(partial(self._observe, engine.name))

    def made(self, model: str, result: Result) -> None:
        """Count what a request gave."""
        self.images.labels(model).inc(len(result.arrays))
        for phase, seconds in result.seconds.items():
            if phase == "total":
                self.seconds.labels(model).observe(seconds)
            else:
                self.phases.labels(model, phase).observe(seconds)

    def _observe(self, model: str, name: str, value: float) -> None:
        """Called in an engine's thread."""
        if name in self._measured:
            self._measured[name].labels(model).observe(value)

    @staticmethod
    def _of_engine(name: str, text: str, buckets: Sequence[float], registry: CollectorRegistry) -> Histogram:
        return Histogram(name, text, ["model"], buckets=buckets, registry=registry)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)


class _OfEngines(Collector):
    """What the engines count themselves, read when it is asked for."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        """The families, with a sample for each engine."""
        rows = [(engine.name, engine.ready, engine.status) for engine in self._engines]
        gauges: dict[str, tuple[str, Callable[[Status], float]]] = {
            "dnp_num_running_reqs": ("Requests that are begun.", lambda status: status.requests),
            "dnp_num_queue_reqs": ("Requests that wait.", lambda status: status.queued),
            "dnp_queue_limit": ("The most that may wait.", lambda status: status.queue),
            "dnp_seconds_since_tick": ("Since the engine moved last.", lambda status: status.idle),
        }
        for name, (text, value) in gauges.items():
            yield _family(GaugeMetricFamily(name, text, labels=["model"]), {(m,): value(s) for m, _, s in rows})
        counters: dict[str, tuple[str, Callable[[Status], float]]] = {
            "dnp_steps": ("Steps taken.", lambda status: status.counts["steps"]),
            "dnp_step_samples": ("Images in them, counted once a step.", lambda status: status.counts["samples"]),
            "dnp_requests_finished": ("Requests that gave images.", lambda status: status.counts["finished"]),
            "dnp_negative_cache_hits": ("n* found by another request.", lambda status: status.hits),
            "dnp_negative_cache_misses": ("n* found anew.", lambda status: status.misses),
        }
        for name, (text, value) in counters.items():
            yield _family(CounterMetricFamily(name, text, labels=["model"]), {(m,): value(s) for m, _, s in rows})
        yield _family(
            GaugeMetricFamily("dnp_running_samples", "Images in the batch, by phase.", labels=["model", "phase"]),
            {(m, phase): s.running.get(phase, 0) for m, _, s in rows for phase in _PHASES},
        )
        yield _family(
            GaugeMetricFamily("dnp_batch_cap", "The most images in one step, by size.", labels=["model", "size"]),
            {(m, f"{width}x{height}"): cap for m, _, s in rows for (height, width), cap in s.cap.items()},
        )
        yield _family(
            CounterMetricFamily("dnp_engine_failures", "Requests ended by an error.", labels=["model", "cause"]),
            {(m, cause): count for m, _, s in rows for cause, count in s.failures.items()},
        )
        info = GaugeMetricFamily("dnp_model_info", "1, with what really runs.", labels=["model", *_INFO])
        yield _family(info, {(m, *(str(getattr(s, name)) for name in _INFO)): 1 for m, _, s in rows})
        yield _family(
            GaugeMetricFamily("dnp_ready", "Whether the model is warm.", labels=["model"]),
            {(m,): ready for m, ready, _ in rows},
        )


def _family(family: F, values: Mapping[tuple[str, ...], float]) -> F:
    for labels, value in values.items():
        family.add_metric(list(labels), float(value))
    return family
