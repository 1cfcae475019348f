"""Keys and values in one byte each: half of bf16's memory, at the price of bringing a layer back in every pass.

A row of K values (one token, one head) has a scale of its own, its largest magnitude over the largest code (KIVI,
arXiv 2402.02750, quantises values so; keys per channel there, per row here, so that a frame can leave by itself).
The past is read back into one layer's worth of scratch, and keys that are stored un-rotated are rotated there. The
block in progress is seen as it is: what is rounded is the past alone, and it is rounded once.
Letters as in kv.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from streamgen.cache.kv import BlockCache, CacheSpec, KVCache
from streamgen.cache.slots import Codes, Slots, Turn, turn
from streamgen.rope import apply_rope
from streamgen.transfers import to_device

SCALE_DTYPE = torch.float16
TINY = 2.0**-14
"""The smallest scale: float16's smallest number of full precision."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A one-byte number format."""

    dtype: torch.dtype
    largest: float
    """Largest magnitude of a code."""


STORAGES = {"int8": Storage(torch.int8, 127.0)}
if hasattr(torch, "float8_e4m3fn"):
    STORAGES["fp8"] = Storage(torch.float8_e4m3fn, 448.0)


def quantise(x: Tensor, storage: Storage) -> tuple[Tensor, Tensor]:
    """[..., K] -> codes [..., K] and float16 scales [..., 1]: x = codes * scale, to half a code."""
    scale = (x.float().abs().amax(-1, keepdim=True) / storage.largest).clamp(TINY).to(SCALE_DTYPE)
    # float16 rounds a scale down as often as up: the largest value may then lie beyond the largest code.
    codes = (x.float() / scale.float()).clamp(-storage.largest, storage.largest)
    return (codes.round() if storage.dtype == torch.int8 else codes).to(storage.dtype), scale


def dequantise(codes: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """codes * scale into `out`, rounded once to its dtype."""
    whole = codes if codes.dtype == torch.int8 else codes.float()  # 8-bit floats take part in no arithmetic
    return torch.mul(whole, scale.float(), out=out)


class QuantisedKVCache(KVCache):
    """A KVCache that stores codes and scales; `storage` is a name of STORAGES, `dtype` that of what attention reads."""

    def __init__(
        self,
        spec: CacheSpec,
        *,
        storage: str,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if storage not in STORAGES:
            raise ValueError(f"cache dtype {storage!r} does not exist; there are: {', '.join(STORAGES)}")
        self.storage, self.stored_as, self.read_dtype = STORAGES[storage], storage, dtype
        super().__init__(spec, batch=batch, dtype=dtype, device=device)
        if self.policy.committed is not None:  # it computes on what is stored
            raise ValueError(f"cache policy {spec.policy!r} changes stored keys and cannot be kept as {storage}")

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.k, self.v = (torch.zeros(shape, dtype=self.storage.dtype, device=device) for _ in range(2))
        scales = (*shape[:-1], 1)
        self.k_scale, self.v_scale = (torch.zeros(scales, dtype=SCALE_DTYPE, device=device) for _ in range(2))
        # What one layer's attention reads, keys rotated: the next layer writes over it.
        self.read_k, self.read_v = (torch.zeros(shape[1:], dtype=dtype, device=device) for _ in range(2))

    @property
    def stored(self) -> dict[str, Tensor]:
        """Codes and scales: a saved state is exact."""
        return {"k": self.k, "v": self.v, "k_scale": self.k_scale, "v_scale": self.v_scale}

    def nbytes(self) -> int:
        """Bytes of all buffers, the scratch included."""
        return sum(buffer.nbytes for buffer in (*self.stored.values(), self.read_k, self.read_v))

    def _block(self, origin: int, end: int, frames: int, *, peek: bool = False) -> BlockCache:
        return QuantisedBlockCache(self, origin, end, frames, peek=peek)

    def _identity(self) -> dict[str, Any]:
        read = str(self.read_dtype).removeprefix("torch.")
        return {**super()._identity(), "dtype": read, "storage": self.stored_as}


class QuantisedBlockCache(BlockCache):
    """One block's view of a QuantisedKVCache."""

    cache: QuantisedKVCache

    def append(self, layer: int, k_BNTK: Tensor, v_BNTK: Tensor) -> tuple[Tensor, Tensor]:
        """As BlockCache.append. What it returns without gradients is scratch: good until the next call."""
        cache = self.cache
        rotated = apply_rope(k_BNTK, *self._rope)
        past_k, past_v = self._past(layer)
        if self.peek or (torch.is_grad_enabled() and (k_BNTK.requires_grad or v_BNTK.requires_grad)):
            return torch.cat([*past_k, rotated], dim=2), torch.cat([*past_v, v_BNTK], dim=2)
        kept_k = rotated if cache.policy.stores_rotated else k_BNTK
        for buffer, scales, kept in ((cache.k, cache.k_scale, kept_k), (cache.v, cache.v_scale, v_BNTK)):
            codes, scale = quantise(kept, cache.storage)
            for slots, tokens in self._block:
                buffer[layer][:, :, slots], scales[layer][:, :, slots] = codes[:, :, tokens], scale[:, :, tokens]
        for slots, tokens in self._block:
            cache.read_k[:, :, slots] = rotated[:, :, tokens]
            cache.read_v[:, :, slots] = v_BNTK[:, :, tokens]
        self.written.add(layer)
        return cache.read_k[:, :, : self._stop], cache.read_v[:, :, : self._stop]

    def slots(self, layer: int, turn: Turn = turn) -> Slots | None:
        """As BlockCache.slots. None too where keys are stored un-rotated: those pass through the scratch."""
        cache = self.cache
        if self.peek or not cache.policy.stores_rotated:
            return None
        self.written.add(layer)
        scales = cache.k_scale[layer].squeeze(-1), cache.v_scale[layer].squeeze(-1)
        codes = Codes(*scales, *self.pages, cache.spec.tokens_per_frame)
        return Slots(cache.k[layer], cache.v[layer], None, self.places, self._stop, codes)

    @cached_property
    def pages(self) -> tuple[Tensor, Tensor]:
        """Tokens of the past, int32 [B], and the slots of its frames, int32 [B, window]; beyond them zeros."""
        spec, (batch, device) = self.cache.spec, (self.cache.k.shape[1], self.cache.k.device)
        context = self._slots[0]
        pages_P = to_device([*context, *[0] * (spec.window_frames - len(context))], torch.int32, device)
        lengths_B = torch.full((batch,), len(context) * spec.tokens_per_frame, dtype=torch.int32, device=device)
        return lengths_B, pages_P.expand(batch, -1).contiguous()

    def _past(self, layer: int) -> tuple[list[Tensor], list[Tensor]]:
        """Views of the scratch, into which the context is brought back."""
        cache = self.cache
        for slots, tokens in self._context:
            for codes, scales, read in (
                (cache.k, cache.k_scale, cache.read_k),
                (cache.v, cache.v_scale, cache.read_v),
            ):
                dequantise(codes[layer][:, :, slots], scales[layer][:, :, slots], read[:, :, slots])
            if not cache.policy.stores_rotated:
                cos, sin = self._context_rope
                cache.read_k[:, :, slots] = apply_rope(cache.read_k[:, :, slots], cos[tokens], sin[tokens])
        runs = [slots for slots, _ in self._context]
        return [cache.read_k[:, :, slots] for slots in runs], [cache.read_v[:, :, slots] for slots in runs]
