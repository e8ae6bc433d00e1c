"""What the server tells those who run it: Prometheus metrics, and a log line a request, without text unless asked."""

import json
import logging
import os
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from arkasr import audio
from arkasr.engines import Clip, Generation
from arkasr.engines.shared import Observe

log = logging.getLogger("arkasr.server")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MULTIPROCESS_DIR = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client's own variable
_SECONDS = (0.005, 0.02, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)


class Metrics:
    """Counts of one process; those of all are added up where several work."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "arkasr_requests", "Requests by route and status.", ["route", "status"], registry=registry
        )
        self.rejected = Counter("arkasr_rejected", "Requests refused, by reason.", ["reason"], registry=registry)
        self.request_s = Histogram(
            "arkasr_request_seconds", "Whole requests.", ["route"], buckets=_SECONDS, registry=registry
        )
        self.stage_s = Histogram(
            "arkasr_stage_seconds", "Stages of a clip.", ["stage"], buckets=_SECONDS, registry=registry
        )
        self.audio_s = Counter("arkasr_audio_seconds", "Audio transcribed.", ["model"], registry=registry)
        self.tokens = Counter("arkasr_tokens", "Tokens generated.", ["model"], registry=registry)
        self.clips = Counter("arkasr_clips", "Clips decoded.", ["model"], registry=registry)
        self.failed = Counter(
            "arkasr_clips_failed", "Clips to which the back end gave no answer.", ["model"], registry=registry
        )
        self.in_work = Gauge(
            "arkasr_requests_in_work", "Requests admitted.", registry=registry, multiprocess_mode="livesum"
        )
        self.live = Gauge("arkasr_realtime_sockets", "WebSockets open.", registry=registry, multiprocess_mode="livesum")
        self.waiting = Gauge(
            "arkasr_clips_waiting", "Clips that wait for the engine.", registry=registry, multiprocess_mode="livesum"
        )

    def observer(self, model: str) -> Observe:
        """What an engine's `observe` shall be."""
        tokens, clips, failed = (one.labels(model) for one in (self.tokens, self.clips, self.failed))

        def observe(_clip: Clip, generation: Generation) -> None:
            tokens.inc(len(generation.ids))
            (clips if generation.failure is None else failed).inc()
            for stage, seconds in generation.timings_s.items():
                self.stage_s.labels(stage).observe(seconds)

        return observe

    def heard(self, model: str, num_samples: int) -> None:
        """Count a recording that was transcribed."""
        self.audio_s.labels(model).inc(num_samples / audio.SAMPLE_RATE)

    def text(self) -> bytes:
        """All of it in Prometheus' format, of all processes."""
        if MULTIPROCESS_DIR not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def log_request(**facts: Any) -> None:
    """One JSON line."""
    log.info(json.dumps({name: value for name, value in facts.items() if value is not None}, ensure_ascii=True))
