"""What `/metrics` shows. One object per server, with a registry of its own."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from streamgen_infer.machine import rss_mb
from streamgen_infer.requests import FEWER_STEPS, LATE, PREVIEW_CODEC, REPEATED, MadeBlock, RuntimeStats

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
SLACK_S = (-2.5, -1.0, -0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 2.5)
FLAGS = {"fewer_steps": FEWER_STEPS, "preview_codec": PREVIEW_CODEC, "repeated": REPEATED}


class ServeMetrics:
    """Counters and histograms by the names that operators see (prefix `streamgen_`)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Any:
            return Counter(f"streamgen_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Any:
            return Gauge(f"streamgen_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Any:
            return Histogram(f"streamgen_{name}", text, registry=self.registry, buckets=buckets)

        self.sessions = gauge("sessions", "Sessions by state.", "state")
        self.streams = gauge("streams", "Streams that the runtime holds.")
        self._admitted = counter("admissions", "Streams admitted.")
        self._refused = counter("refusals", "Streams refused, by the resource that was short.", "reason")
        self._errors = counter("errors", "Messages refused and failures, by code.", "code")
        self.prompts = counter("prompts", "Prompt changes accepted.")
        self.ttff = histogram("ttff_seconds", "Acceptance to the first block.", SECONDS)
        waits = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
        self.waited = histogram("queue_wait_seconds", "Of those who waited for a place and had it.", waits)
        self.block_time = histogram("block_seconds", "Between two blocks of a stream.", SECONDS)
        self.jitter = histogram("block_jitter_seconds", "How far that is from the block's media time.", SECONDS)
        self.slack = histogram("slack_seconds", "Time left when a block was ready; negative: late.", SLACK_S)
        self.blocks = counter("blocks", "Blocks made.")
        self.misses = counter("deadline_misses", "Blocks ready after their deadline.")
        self.frames = counter("frames_sent", "Frames sent.")
        self._dropped = counter("frames_dropped", "Frames left out because a viewer was slow.")
        self._degraded = counter("degradations", "Blocks made more cheaply, by means.", "means")
        self.encode = histogram("encode_seconds", "Encoding one frame.", (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1))
        self.sent_bytes = counter("bytes_sent", "Bytes of frames handed to sockets.")
        self.queued = gauge("queued_media_seconds", "Media that waits for viewers: the longest queue.")
        self.lead = gauge("playhead_lead_seconds", "Media made ahead of the playhead: the smallest lead.")
        self.resumes = counter("resumes", "Sessions taken up by another connection.")
        self.busy = gauge("busy_seconds", "Time that the runtime spent in launches.")
        self.held = gauge("held_bytes", "Bytes that streams and queues hold.", "where")
        self.memory = gauge("resident_memory_bytes", "Of the process.")

    def admitted(self) -> None:
        self._admitted.inc()

    def refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def error(self, code: str) -> None:
        self._errors.labels(code).inc()

    def dropped(self, frames: int) -> None:
        self._dropped.inc(frames)

    def degraded(self, means: str) -> None:
        self._degraded.labels(means).inc()

    def block(self, block: MadeBlock, *, first: bool, since_s: float, media_s: float) -> None:
        """since_s: after the one before it, or after the acceptance; media_s: how long it plays."""
        self.blocks.inc()
        self.slack.observe(block.slack_s)
        if first:
            self.ttff.observe(max(0.0, since_s))
        else:
            self.block_time.observe(max(0.0, since_s))
            self.jitter.observe(abs(since_s - media_s))
        if block.flags & LATE:
            self.misses.inc()
        for name, bit in FLAGS.items():
            if block.flags & bit:
                self.degraded(name)

    def text(self, stats: RuntimeStats | None) -> bytes:
        """The page, with what the runtime counts itself, once there is one."""
        if stats is not None:
            self.streams.set(stats.streams)
            self.busy.set(stats.busy_s)
            self.held.labels("streams").set(stats.bytes_held)
        self.memory.set((rss_mb() or 0) * 1e6)
        return bytes(generate_latest(self.registry))
