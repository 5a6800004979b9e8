"""Prometheus metrics: vLLM's names where it has one, so that its dashboards work; ours beside them."""

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from hadal.backends.backend import Backend, Chunk, Ended, Event, Generation
from hadal.backends.engine_backend import EngineBackend

__all__ = ["MeteredBackend"]

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1800)


class MeteredBackend:
    """A backend that counts what passes through it.

    Args:
        backend: The one that works.
        model: Label of every metric.
    """

    def __init__(self, backend: Backend, model: str) -> None:
        self.inner = backend
        self.follows_grammars = backend.follows_grammars
        self.open = 0
        """Completions that are being made."""
        self._registry = CollectorRegistry()
        self._model = model
        self._prompt = self._counter("vllm:prompt_tokens", "Prompt tokens processed.")
        self._generated = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._queries = self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up.")
        self._hits = self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the cache.")
        self._replayed = self._counter("hadal:replayed_tokens", "Run again for their window.")
        self._gone = self._counter("hadal:requests_abandoned", "Clients that went away.")
        self._success = Counter(
            "vllm:request_success",
            "Requests by how they ended.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._first = self._histogram("vllm:time_to_first_token_seconds", "Until the first token.")
        self._between = self._histogram("vllm:inter_token_latency_seconds", "Between tokens.")
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "Whole requests.")
        self._gauges = {
            name: Gauge(name, text, ["model_name"], registry=self._registry).labels(model)
            for name, text in (
                ("vllm:num_requests_running", "Requests that are worked on."),
                ("vllm:num_requests_waiting", "Requests that wait."),
                ("vllm:kv_cache_usage_perc", "Blocks in use, 0 to 1."),
                ("hadal:cached_blocks", "Blocks that nobody uses and that can be used again."),
                ("hadal:evicted_blocks", "Blocks evicted since the start."),
                ("hadal:checkpoints", "Checkpoints of windows in memory."),
                ("hadal:checkpoint_bytes", "Bytes of those."),
                ("hadal:disk_bytes", "Bytes of the cache on disk."),
                ("hadal:disk_damaged_records", "Records on disk that were not right."),
                ("hadal:disk_failed_writes", "Records that could not be written."),
            )
        }

    @property
    def max_model_len(self) -> int:
        """Return the longest prompt and completion together."""
        return self.inner.max_model_len

    async def ready(self) -> None:
        """Make `max_model_len` known; see `Backend.ready`."""
        await self.inner.ready()

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["model_name"], registry=self._registry).labels(self._model)

    def _histogram(self, name: str, text: str) -> Histogram:
        histogram = Histogram(name, text, ["model_name"], buckets=_SECONDS, registry=self._registry)
        return histogram.labels(self._model)

    @asynccontextmanager
    async def generate(self, generation: Generation) -> AsyncGenerator[AsyncGenerator[Event]]:
        """Start a completion; see `Backend.generate`."""
        ended = False

        async def counted(events: AsyncGenerator[Event]) -> AsyncGenerator[Event]:
            nonlocal ended
            start = last = time.monotonic()
            any_token = False
            async for event in events:
                now = time.monotonic()
                if isinstance(event, Chunk):
                    self._generated.inc(len(event.token_ids))
                    (self._between if any_token else self._first).observe(now - last)
                    last, any_token = now, True
                elif isinstance(event, Ended):
                    ended = True
                    self._count_end(event, len(generation.prompt_ids), now - start)
                yield event

        self.open += 1
        started = False
        try:
            async with self.inner.generate(generation) as events:
                started = True
                yield counted(events)
        finally:
            self.open -= 1
            if started and not ended:
                self._gone.inc()

    def _count_end(self, ended: Ended, prompt_tokens: int, seconds: float) -> None:
        self._whole.observe(seconds)
        self._success.labels(self._model, ended.reason).inc()
        self._prompt.inc(prompt_tokens)
        if ended.cached_tokens is not None:
            self._queries.inc(prompt_tokens)
            self._hits.inc(ended.cached_tokens)
        if ended.prefix is not None:
            self._replayed.inc(ended.prefix.get("replayed", 0))

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        running, waiting = self.inner.load()
        values = {"vllm:num_requests_running": running, "vllm:num_requests_waiting": waiting}
        if isinstance(self.inner, EngineBackend):
            values |= _engine_values(self.inner)
        for name, value in values.items():
            self._gauges[name].set(value)
        return generate_latest(self._registry)

    def load(self) -> tuple[int, int]:
        """Return how many requests are running and waiting."""
        return self.inner.load()

    def healthy(self) -> bool:
        """Return whether requests can be served now."""
        return self.inner.healthy()

    async def close(self) -> None:
        """End everything."""
        await self.inner.close()


def _engine_values(backend: EngineBackend) -> dict[str, float]:
    cache = backend.engine.cache
    use, disk = cache.pool.use(), cache.disk_use()
    values: dict[str, float] = {
        "vllm:kv_cache_usage_perc": use.held / max(use.total, 1),
        "hadal:cached_blocks": use.cached,
        "hadal:evicted_blocks": cache.pool.num_evictions,
        "hadal:checkpoints": cache.num_checkpoints,
        "hadal:checkpoint_bytes": cache.checkpoint_bytes,
    }
    if disk is not None:
        values |= {
            "hadal:disk_bytes": disk.num_bytes,
            "hadal:disk_damaged_records": disk.damaged,
            "hadal:disk_failed_writes": disk.failed_writes,
        }
    return values
