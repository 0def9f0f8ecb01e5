"""What a policy server counts, for Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LATENCY = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # [s]


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry}
        self.requests = Counter("brachium_requests", "Requests answered", **own)
        self.refused = Counter("brachium_refused", "Requests and connections refused", ["why"], **own)
        self.clients = Gauge("brachium_clients", "Clients connected", **own)
        self.waiting = Gauge("brachium_waiting", "Requests that wait for the model", **own)
        self.model = Histogram("brachium_model_seconds", "Time of a batch in the model", buckets=LATENCY, **own)
        self.total = Histogram("brachium_request_seconds", "From message to reply", buckets=LATENCY, **own)
        self.shared = Histogram("brachium_batch_size", "Requests in a batch", buckets=(1, 2, 4, 8, 16, 32), **own)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
