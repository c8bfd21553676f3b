"""What Prometheus may know of one gateway."""

from __future__ import annotations

from functools import partial

import prometheus_client as prometheus

from ottava.engine.session import Engine
from ottava.gateway.child import Child
from ottava.gateway.pool import Pool


class Metrics:
    """Prometheus' view of one gateway, in a registry of its own."""

    def __init__(self, engine: Engine | Pool) -> None:
        registry = self.registry = prometheus.CollectorRegistry()
        self.requests = prometheus.Counter("ottava_requests", "requests by status", ["status"], registry=registry)
        self.tokens = prometheus.Counter("ottava_tokens", "ids by kind", ["kind"], registry=registry)
        self.cancelled = prometheus.Counter("ottava_cancelled", "answers given up half-way", registry=registry)
        self.first = prometheus.Histogram("ottava_first_token_seconds", "request to first id", registry=registry)
        load = prometheus.Gauge("ottava_load", "requests generating or waiting", registry=registry)
        load.set_function(lambda: engine.load_now)
        if isinstance(engine, Pool):
            ready = prometheus.Gauge("ottava_backend_ready", "1: takes work", ["backend"], registry=registry)
            starts = prometheus.Gauge("ottava_backend_starts", "starts so far", ["backend"], registry=registry)
            lost = prometheus.Gauge("ottava_failovers", "answers taken over from a lost backend", registry=registry)
            lost.set_function(lambda: engine.failovers)
            refused = prometheus.Gauge("ottava_backend_refused", "1: not the reference", ["backend"], registry=registry)
            scored = prometheus.Gauge("ottava_canary_tokens", "ids scored again", ["backend"], registry=registry)
            for child in engine.children:
                refused.labels(child.place.name).set_function(partial(_refused, child))
                if engine.canary is not None:
                    scored.labels(child.place.name).set_function(partial(engine.canary.tokens, child.place.name))
                ready.labels(child.place.name).set_function(partial(_ready, child))
                starts.labels(child.place.name).set_function(partial(_starts, child))


def _ready(child: Child) -> float:
    return float(child.state == "ready")


def _refused(child: Child) -> float:
    return float(child.state == "refused")


def _starts(child: Child) -> float:
    return float(child.starts)
