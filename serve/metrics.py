"""What operators watch, in Prometheus' format: latency by stage, batch sizes, waiting requests, confidence,
abstentions, drift. The replicas of a machine write into one folder, so that /metrics of any of them speaks for all.

(`prometheus_client` calls it multiprocess mode. On several machines Ray's own metrics have each node's; /metrics
answers for the machine that was reached.)
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


class Metrics:
    """
    Args:
        folder: that the replicas of this machine share; none: this process speaks for itself.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            os.environ[_VARIABLE] = str(folder)
            values.ValueClass = values.MultiProcessValue()  # chosen when it is imported, which Ray does first
            _bury(folder)
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "mmagent_requests", "Requests by route and status", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "mmagent_request_seconds", "From the first byte to the last", ["route"], buckets=_SECONDS, registry=registry
        )
        self.stage = Histogram(
            "mmagent_stage_seconds", "Stages of an answer: decode, queue, forward, tool, retrieve, total", ["stage"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.batch = Histogram(
            "mmagent_batch_size", "Requests of one forward pass", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.waiting = Gauge(
            "mmagent_waiting", "Requests in the replicas now", multiprocess_mode="livesum", registry=registry
        )
        self.confidence = Histogram(
            "mmagent_confidence", "How sure answers are", ["task", "bundle"], buckets=_SHARES, registry=registry
        )
        self.abstained = Counter(
            "mmagent_abstained", "Answers that are less sure than the threshold", ["task", "bundle"], registry=registry
        )
        self.outcomes = Counter(
            "mmagent_outcomes", "What became of requests: answer, reply, tool, retrieved, ask, handover", ["kind"],
            registry=registry,
        )  # fmt: skip
        self.feedback = Counter("mmagent_feedback", "Feedback by verdict", ["verdict", "bundle"], registry=registry)
        self.novelty = Histogram(
            "mmagent_novelty", "How unlike the validation data a request is, as a share of it", ["task", "bundle"],
            buckets=_SHARES, registry=registry,
        )  # fmt: skip
        self.drift = Gauge(
            "mmagent_drift", "How far inputs, labels and confidence lie from what the bundle was made for",
            ["bundle", "of", "modalities"],
            multiprocess_mode="mostrecent" if folder is not None else "all", registry=registry,
        )  # fmt: skip
        self.webhook = Counter(
            "mmagent_webhook", "Attempts to tell the webhook of a handover: told, again, given up", ["ended"],
            registry=registry,
        )  # fmt: skip
        self.taken_back = Counter(
            "mmagent_taken_back", "Bundles taken back because they did worse in life", ["bundle"], registry=registry
        )

    def text(self) -> bytes:
        if self._folder is None:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry, str(self._folder))
        return generate_latest(registry)


def _bury(folder: Path) -> None:
    """Gauges of processes that are gone count no more."""
    pids = {file.stem.rpartition("_")[2] for file in folder.glob("gauge_*.db")}
    for pid in pids:
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            with contextlib.suppress(OSError):
                mark_process_dead(int(pid), str(folder))
