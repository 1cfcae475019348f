"""Passes of a transformer as CUDA graphs: a launch shape is recorded once and replayed, without Python between kernels.

A graph runs the same kernels on the same addresses for ever. So whatever changes from pass to pass is copied into
buffers of the launch first: latents, timestep, text, the block's cosines and sines, and the ring slots of its tokens,
which the kernels read on the device. The rings are those of the cache itself; nothing of them is copied.
Eligible is a pass over one cache whose ring is full (then every shape is constant), without gradients, mask or rope of
its own, under a table of operations that places keys by `slots`. Every other pass runs as it would without this file,
and so does every pass after a recording that failed.
Letters: B batch, F frames, C channels, H W latent grid, T tokens of the block, K head width.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from streamgen.cache.kv import BlockCache, KVCache
from streamgen.cache.slots import Codes, Slots, Turn, turn

if TYPE_CHECKING:
    from streamgen.transformer import CausalWanModel, TextContext

SEEN_BEFORE = 1
"""Passes of a launch shape that run as they are before it is recorded: one that comes once is not worth a graph."""
WARM_UPS = 2
"""Runs before recording: kernels are compiled, libraries allocate their workspaces."""
log = logging.getLogger("streamgen")

Run = Callable[[], Tensor]
Recorder = Callable[[Run], Run]
"""A function -> one that does the same again on the same tensors, and returns its output."""


class CudaRecorder:
    """Records into CUDA graphs, which share their memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Run) -> Run:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads may allocate meanwhile (a codec, another model): that is no error of this recording.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                out = run()
        finally:
            torch.cuda.set_stream(here)  # a recording that fails leaves its own stream behind

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class Captures:
    """The recorded passes of one model: of each cache and launch shape one. They go when their cache goes."""

    def __init__(self, recorder: Recorder | None = None) -> None:
        """`recorder` is CUDA's by default; tests give one that runs anywhere."""
        self._record = CudaRecorder() if recorder is None else recorder
        self._launches: WeakKeyDictionary[KVCache, dict[Any, _Launch]] = WeakKeyDictionary()
        self._seen: WeakKeyDictionary[KVCache, dict[Any, int]] = WeakKeyDictionary()
        self.problem = ""
        """Why nothing is recorded any more, "" while all is well."""
        self.replays = 0

    def run(
        self, model: CausalWanModel, latents_BFCHW: Tensor, timestep_BF: Tensor, text: TextContext, handle: Any
    ) -> Tensor | None:
        """The model's output, by a recorded pass; None where this pass must be run as it is."""
        if self.problem or torch.is_grad_enabled() or not isinstance(handle, BlockCache) or handle.peek:
            return None
        if not handle.is_full or not model.ops.places_keys:
            return None
        inputs = _Inputs.of(latents_BFCHW, timestep_BF, text, handle, model.ops.turn_keys)
        if inputs is None:
            return None
        cache = handle.cache
        key = (inputs.shapes(), model.attention_backend, id(model.ops), _addresses(model))
        launches, seen = self._launches.setdefault(cache, {}), self._seen.setdefault(cache, {})
        launch = launches.get(key)
        if launch is None:
            seen[key] = seen.get(key, 0) + 1
            if seen[key] <= SEEN_BEFORE:
                return None
            launch = self._prepare(model, inputs, cache)
            if launch is None:
                return None
            launches[key] = launch
        launch.load(inputs)
        self.replays += 1
        return launch.replay().clone()  # the next pass writes over it

    def _prepare(self, model: CausalWanModel, inputs: _Inputs, cache: KVCache) -> _Launch | None:
        shape = "x".join(map(str, inputs.latents_BFCHW.shape))
        log.info("recording a pass over latents of %s ...", shape)
        began = time.perf_counter()
        with torch.inference_mode(False), torch.no_grad():  # buffers that later passes may write in any mode
            static = inputs.copied()
        block = _StaticBlock(static, _rings(cache))
        try:
            replay = self._record(lambda: model(static.latents_BFCHW, static.timestep_BF, static.text, cache=block))
        except (RuntimeError, AssertionError) as error:
            self.problem = " ".join(str(error).split())[:300]
            log.warning("passes are run one kernel at a time: recording one failed: %s", self.problem)
            return None
        log.info("recorded in %.1f s", time.perf_counter() - began)
        return _Launch(static, replay, inputs.text)


@dataclass(slots=True)
class _Inputs:
    """What differs from pass to pass."""

    latents_BFCHW: Tensor
    timestep_BF: Tensor
    text: TextContext
    rope: tuple[Tensor, Tensor]
    places_BT: Tensor
    seen_tokens: int
    past: tuple[Tensor, Tensor] | None
    """Of a ring of codes: lengths and pages of what is before the block."""

    @classmethod
    def of(
        cls, latents_BFCHW: Tensor, timestep_BF: Tensor, text: TextContext, handle: BlockCache, turn_keys: Turn
    ) -> _Inputs | None:
        """None where the block's keys have no slots. Rotates the past, where that is due, outside of the graph."""
        slots: Slots | None = None
        for layer in range(handle.cache.spec.num_layers):
            slots = handle.slots(layer, turn_keys)
            if slots is None:
                return None
        assert slots is not None, "a cache has layers"
        past = None if slots.codes is None else (slots.codes.lengths_B, slots.codes.pages_BP)
        return cls(latents_BFCHW, timestep_BF, text, handle.rope(), slots.places_BT, slots.seen_tokens, past)

    def tensors(self) -> list[Tensor]:
        """Those that every pass brings anew; the text is another matter."""
        return [self.latents_BFCHW, self.timestep_BF, *self.rope, self.places_BT, *(self.past or ())]

    def text_tensors(self) -> list[Tensor]:
        pooled = self.text.pooled_BGD
        return [tensor for pair in self.text.kv for tensor in pair] + ([] if pooled is None else [pooled])

    def shapes(self) -> Any:
        """All that a recorded pass depends on besides the values in its buffers."""
        return self.seen_tokens, tuple((tuple(t.shape), t.dtype) for t in (*self.tensors(), *self.text_tensors()))

    def copied(self) -> _Inputs:
        """The same values in tensors of its own."""
        text, pooled = self.text, self.text.pooled_BGD
        return _Inputs(
            self.latents_BFCHW.clone(),
            self.timestep_BF.clone(),
            text._replace(
                kv=[(k.clone(), v.clone()) for k, v in text.kv], pooled_BGD=None if pooled is None else pooled.clone()
            ),
            (self.rope[0].clone(), self.rope[1].clone()),
            self.places_BT.clone(),
            self.seen_tokens,
            None if self.past is None else (self.past[0].clone(), self.past[1].clone()),
        )


@dataclass(slots=True)
class _Launch:
    """A recorded pass and its buffers."""

    static: _Inputs
    replay: Run
    text: TextContext
    """The one whose values the buffers hold."""

    def load(self, inputs: _Inputs) -> None:
        for buffer, value in zip(self.static.tensors(), inputs.tensors(), strict=True):
            buffer.copy_(value)
        if inputs.text is not self.text:
            for buffer, value in zip(self.static.text_tensors(), inputs.text_tensors(), strict=True):
                buffer.copy_(value)
            self.text = inputs.text


@dataclass(frozen=True, slots=True)
class _Rings:
    """Of all layers; the cache itself is not held, so that it can go."""

    k: Tensor
    v: Tensor
    raw_k: Tensor | None
    scales: tuple[Tensor, Tensor] | None
    page_tokens: int


def _rings(cache: KVCache) -> _Rings:
    stored, page_tokens = cache.stored, cache.spec.tokens_per_frame
    if "k_scale" in stored:
        return _Rings(cache.k, cache.v, None, (stored["k_scale"], stored["v_scale"]), page_tokens)
    raw = None if cache.policy.stores_rotated else cache.k
    return _Rings(cache.read_k, cache.v, raw, None, page_tokens)


class _StaticBlock:
    """The handle that a recorded pass gets: slots and tables in its buffers, the rings of the cache."""

    def __init__(self, static: _Inputs, rings: _Rings) -> None:
        self._static, self._rings = static, rings

    def rope(self) -> tuple[Tensor, Tensor]:
        """(cos, sin) [T, K/2] of the block's frames."""
        return self._static.rope

    def slots(self, layer: int, turn: Turn = turn) -> Slots:
        """As BlockCache.slots; the past was rotated before."""
        static, rings = self._static, self._rings
        codes = None
        if rings.scales is not None and static.past is not None:
            k_scale, v_scale = (scale[layer].squeeze(-1) for scale in rings.scales)
            codes = Codes(k_scale, v_scale, *static.past, rings.page_tokens)
        raw = None if rings.raw_k is None else rings.raw_k[layer]
        return Slots(rings.k[layer], rings.v[layer], raw, static.places_BT, static.seen_tokens, codes)


def _addresses(model: CausalWanModel) -> int:
    """Of all weights: a graph reads those that it was recorded with."""
    return hash(tuple(tensor.data_ptr() for tensors in (model.parameters(), model.buffers()) for tensor in tensors))
