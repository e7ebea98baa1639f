"""What a server tells Prometheus of its requests, at /metrics."""

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/score", "/health", "/metrics")


class ServerMetrics:
    """Of one replica."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry
        self.running = Gauge("raytrl_serve_running", "Requests that are worked on.", registry=registry)
        self.waiting = Gauge("raytrl_serve_waiting", "Requests that wait for their turn.", registry=registry)
        self._seconds = Histogram(
            "raytrl_serve_request_seconds",
            "From a request to the end of its answer, the wait included.",
            ["path"],
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
            registry=registry,
        )
        self._answers = Counter(
            "raytrl_serve_answers", "Answers by status; 499: the client left.", ["path", "status"], registry=registry
        )

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Counts one; paths that nobody serves are counted together, or anyone could fill the memory with names."""
        known = path if path in _PATHS else "other"
        self._answers.labels(known, str(status)).inc()
        self._seconds.labels(known).observe(seconds)

    def text(self) -> bytes:
        """All of this process, in Prometheus' form."""
        return generate_latest(self._registry)
