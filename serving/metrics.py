"""What Prometheus reads at ``/metrics``. Labels are model, phase, endpoint, status and cause: never prompts or ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from dnp.runtime.request import Result
from dnp.serving.engines import Engines

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
        self.queue_seconds = Histogram(
            "dnp_queue_time_seconds", "From admission to the first step.", ["model"], buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.phases = Histogram(
            "dnp_stage_latency_seconds", "Time of a request by phase.", ["model", "phase"], buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.in_flight = Gauge("dnp_http_requests_in_flight", "Requests being answered.", registry=registry)
        registry.register(_OfEngines(engines))

    def made(self, model: str, result: Result) -> None:
        """Count what a request gave."""
        self.images.labels(model).inc(len(result.arrays))
        for phase, seconds in result.seconds.items():
            if phase == "total":
                self.seconds.labels(model).observe(seconds)
            elif phase == "queue":
                self.queue_seconds.labels(model).observe(seconds)
            else:
                self.phases.labels(model, phase).observe(seconds)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)


class _OfEngines(Collector):
    """What the engines count themselves, read when it is asked for."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        raise NotImplementedError
