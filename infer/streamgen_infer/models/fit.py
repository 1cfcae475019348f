"""Does a model fit a device, with how many streams, and how? Answered with numbers, before anything is loaded.

Weights, cache and keys of the text follow from the config (`streamgen.costs`). What a codec keeps of a stream, and what
its decoding holds, is counted by running it on the meta device. Two moments are looked at, for the text encoder can
leave when a prompt is encoded: encoding a prompt, and streaming. GB are 10^9 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from streamgen.cache import policy as cache_policy
from streamgen.costs import cache_bytes, pass_bytes, text_bytes
from streamgen.errors import UserError
from streamgen.pipeline import DTYPES, probe_dtype
from streamgen_infer import machine
from streamgen_infer.models.fit_sizes import ModelSizes, read_sizes
from streamgen_infer.models.live_bytes import peak_bytes

MARGIN = 0.05
"""Share of a device that is left alone: what allocators and kernels take for themselves."""
LARGE_BYTES = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Bytes that a model asks for in one dtype."""

    transformer: int
    codec: int
    text: int
    """The text encoder's weights."""
    text_offloads: bool
    kv: int
    """Per stream: the window's keys and values."""
    prompt: int
    """Per stream: the text's keys and values."""
    codec_state: int
    """Per stream."""
    model_pass: int
    """While the transformer runs."""
    decode: int
    """While a block is decoded, its new codec state included."""

    @property
    def stream(self) -> int:
        """Of every stream, for as long as it lives."""
        return self.kv + self.prompt + self.codec_state

    def streaming(self, streams: int) -> int:
        """While blocks are made; a text encoder that can leave has left."""
        weights = self.transformer + self.codec + (0 if self.text_offloads else self.text)
        return weights + streams * self.stream + max(self.model_pass, self.decode)

    def encoding(self, streams: int) -> int:
        """While a new prompt is encoded."""
        return self.transformer + self.codec + self.text + streams * self.stream

    def peak(self, streams: int, *, text: bool = True) -> int:
        """The larger of both; without `text`, prompts come encoded."""
        return max(self.streaming(streams), self.encoding(streams) if text else 0)


@dataclass(frozen=True, slots=True)
class Place:
    """A device and its bytes."""

    name: str
    total: int
    free: int

    @property
    def usable(self) -> int:
        return max(0, round(self.free - MARGIN * self.total))


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How a model fits a place."""

    dtype: str
    text: bool
    """The text encoder fits too; without it prompts must come encoded (or be known on disk)."""
    streams: int
    """How many at once."""
    demand: Demand


def demand(sizes: ModelSizes, dtype: str, policy: str | None = None) -> Demand:
    """What a model asks for; `policy` is the cache's, the model's own by default."""
    t, g, item = sizes.transformer, sizes.geometry, DTYPES[dtype].itemsize
    window = sizes.scheduler.window_frames
    relative = not cache_policy(policy or sizes.scheduler.positions).stores_rotated
    kept = cache_bytes(t, g.tokens(window), item)
    codec, state, decode = codec_bytes(sizes, DTYPES[dtype])
    rows = 1 if sizes.scheduler.guidance == 1 else 2
    return Demand(
        transformer=sizes.parameters * item,
        codec=codec,
        text=sizes.text_bytes,
        text_offloads=sizes.text_offloads,
        kv=rows * (kept * 3 // 2 if relative else kept),  # un-rotated keys are rotated into a second buffer
        prompt=rows * text_bytes(t, item),
        codec_state=state,
        model_pass=rows
        * pass_bytes(
            t,
            g.tokens(g.block_frames),
            g.tokens(window - g.block_frames),
            rotates_past=relative,
            bytes_per_value=item,
        ),
        decode=decode,
    )


@cache
def codec_bytes(sizes: ModelSizes, dtype: torch.dtype) -> tuple[int, int, int]:
    """(weights, state of one stream, what decoding a block holds besides them) of the codec, by a run on meta."""
    g = sizes.geometry
    with torch.device("meta"):
        codec = sizes.codec_class(sizes.codec_config).to(dtype)
        latents = torch.zeros(1, g.block_frames, g.latent_channels, g.latent_height, g.latent_width)
    state: list[Any] = [None]

    def block() -> None:
        state[0] = codec.decode_stream(latents, state[0])[1]

    with torch.no_grad():
        block()
    decode = peak_bytes(block)  # of a block in the middle of a stream
    weights = sum(tensor.nbytes for tensor in codec.state_dict().values())
    return weights, sum(tensor.nbytes for tensor in state[0].values()), decode


def places(device: str | None = None) -> list[Place]:
    """This machine's memory and its GPUs, or the one that is named."""
    found = []
    if (memory := machine.memory_mb()) is not None:
        found.append(Place("cpu", round(memory[0] * 1e6), round(memory[1] * 1e6)))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            found.append(Place(f"cuda:{index}", total, free))
    if device is None:
        return found
    wanted = "cuda:0" if device == "cuda" else device
    return [place for place in found if place.name == wanted]


def dtypes_for(place: Place, dtype: str) -> list[str]:
    """What to try, the best first: the one asked for, or with "auto" the faster and then the smaller."""
    if dtype != "auto":
        return [dtype]
    fastest = probe_dtype(place.name.partition(":")[0])
    return list(dict.fromkeys((fastest, "bf16")))


def choose(sizes: ModelSizes, place: Place, dtype: str = "auto", policy: str | None = None) -> Choice | None:
    """How the model fits: in which dtype, whether its text encoder does too, how many streams. None: not at all."""
    tried = [(name, demand(sizes, name, policy)) for name in dtypes_for(place, dtype)]
    for text in (True, False) if sizes.text_offloads else (True,):
        for name, needs in tried:
            if needs.peak(1, text=text) <= place.usable:
                room = place.usable - needs.peak(0, text=text)
                return Choice(dtype=name, text=text, streams=room // needs.stream, demand=needs)
    return None


def shortage(sizes: ModelSizes, place: Place, dtype: str, policy: str | None = None) -> tuple[str, str]:
    """(why a model does not fit, with its numbers; what could be done)."""
    tried = dtypes_for(place, dtype)[-1]
    needs = demand(sizes, tried, policy)
    parts = ", ".join(f"{name} {gigabytes(value)}" for name, value in rows(needs))
    why = f"{sizes.name} does not fit {place.name}: one stream in {tried} takes {gigabytes(needs.peak(1))} ({parts}), "
    why += f"{gigabytes(place.usable)} can be used"
    smaller = "" if tried == "bf16" else "take --dtype bf16, "
    return why, f"{smaller}free memory, or take a smaller model, window or picture"


def guard(model: str, device: str, dtype: str = "auto", policy: str | None = None) -> None:
    """UserError with numbers, before anything is loaded, for a model that does not fit its device.

    Small models are let through without a look, and so are devices whose memory is not known.
    """
    found = places(device)
    if not found or stored_bytes(model) < LARGE_BYTES:
        return
    sizes = read_sizes(model)
    if choose(sizes, found[0], dtype, policy) is None:
        raise UserError("; ".join(shortage(sizes, found[0], dtype, policy)))


def stored_bytes(model: str) -> int:
    """What a model takes on disk; 0 for a name."""
    path = Path(model)
    if path.is_file():
        path = path.parent
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0


def rows(needs: Demand) -> list[tuple[str, int]]:
    """(what, bytes), in words."""
    return [
        ("transformer", needs.transformer),
        ("codec", needs.codec),
        ("text encoder", needs.text),
        ("cache", needs.kv),
        ("keys of the text", needs.prompt),
        ("codec state", needs.codec_state),
        ("a pass", needs.model_pass),
        ("decoding", needs.decode),
    ]


def gigabytes(value: int) -> str:
    """Three digits that count, in GB or MB."""
    return f"{value / 1e9:.3g} GB" if value >= 1e8 else f"{value / 1e6:.3g} MB"
