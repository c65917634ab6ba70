"""What ``/metrics`` counts, in a registry of the server's own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Metrics"]

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Requests by path and status, tokens, and times."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mopeq_requests", "Requests answered, by path and status", ["path", "status"], registry=self.registry
        )
        self.prompt_tokens = Counter("mopeq_prompt_tokens", "Tokens of prompts", registry=self.registry)
        self.new_tokens = Counter("mopeq_generated_tokens", "Tokens generated", registry=self.registry)
        self.present = Gauge("mopeq_requests_present", "Requests in progress and waiting", registry=self.registry)
        self.first = Histogram(
            "mopeq_first_text_seconds", "From a request to its first text", buckets=SECONDS, registry=self.registry
        )
        self.whole = Histogram(
            "mopeq_answer_seconds", "From a request to its last token", buckets=SECONDS, registry=self.registry
        )

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
