"""A stream between two blocks as JSON values and tensors, and back: `Stream.state_dict`, `StreamPipeline.resume`.

All that the rest of the video depends on is in it, or is compared with the model that goes on with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from streamgen.blocks import Snapshot
from streamgen.errors import UserError
from streamgen.geometry import VideoGeometry
from streamgen.quantised_linear import LAYOUT
from streamgen.rollout import StreamState
from streamgen.timeline import PromptTimeline
from streamgen.weights import user_errors

if TYPE_CHECKING:
    from streamgen.pipeline import StreamPipeline

MAX_BLOCK = 2**32 - 1
"""Noise has numbers for so many."""
STATE_FORMAT = 1
STATE_MARK = "streamgen-stream"


def saved_state(
    pipe: StreamPipeline, state: StreamState, at: Snapshot, *, begun: bool, steps: int, first_steps: int | None
) -> dict[str, Any]:
    """The stream as it stands at a snapshot."""
    if state.given is not None and at.position == 0:
        raise UserError("the stream stands before its image; it can be saved after its first block")
    assert state.timeline is not None  # the pipeline makes every state with one
    saved: dict[str, Any] = {
        "format": STATE_FORMAT,
        "model": pipe.fingerprint,
        "dtype": pipe.dtype_name,
        "weights_dtype": pipe.weights_dtype,
        "weights_layout": None if pipe.weights_dtype is None else LAYOUT,
        "geometry": asdict(state.geometry),
        "steps": steps,
        "first_steps": first_steps,
        "sampling": _sampling(pipe, steps),
        "seeds": list(state.seeds),
        "position": at.position,
        "begun": begun,
        "timeline": state.timeline.state_dict(),
        "cache": at.cache,
    }
    if at.recent:
        saved["recent"] = torch.stack(list(at.recent.values()), dim=1)
    if at.codec is not None:
        saved["codec"] = {name: t.clone() for name, t in at.codec.items()}
    return saved


def read_state(pipe: StreamPipeline, saved: Mapping[str, Any]) -> StreamState:
    """What `saved_state` described; UserError where it does not belong to `pipe`."""
    _check_model(pipe, saved)
    with user_errors("the saved state"):
        spec = saved["cache"]["spec"]
        cache = pipe.new_cache(spec["policy"], stored_as=spec.get("storage"))
        cache.load_state_dict(saved["cache"])
    recent = saved.get("recent")
    timeline = PromptTimeline.from_state(saved["timeline"])
    for entry in timeline.prompts:
        pipe.text.tokenize(entry.prompt)  # said now, not at its block
    first_block = saved["geometry"].get("first_block_frames")
    with user_errors("the saved state"):
        geometry = replace(pipe.geometry, first_block_frames=first_block)
    _check_place(saved, geometry)
    return StreamState(
        geometry=geometry,
        cache=cache,
        seeds=tuple(saved["seeds"]),
        ops=pipe.transformer.ops,
        timeline=timeline,
        codec={name: t.to(pipe.device) for name, t in saved["codec"].items()} if "codec" in saved else None,
        position=saved["position"],
        begun=saved["begun"],
        recent={} if recent is None else dict(zip(cache.frames, recent.to(pipe.device).unbind(1), strict=True)),
    )


def _sampling(pipe: StreamPipeline, steps: int) -> dict[str, Any]:
    """How the model's card says to make blocks: a pipeline may have got another one since."""
    values = {**asdict(pipe.sampling(steps)), "negative_prompt": pipe.scheduler.negative_prompt}
    json_values: dict[str, Any] = json.loads(json.dumps(values))  # as a file gives them back
    return json_values


def _check_model(pipe: StreamPipeline, saved: Mapping[str, Any]) -> None:
    if saved.get("format") != STATE_FORMAT:
        raise UserError(f"the state has format {saved.get('format')!r}; this version reads format {STATE_FORMAT}")
    if saved["model"] != pipe.fingerprint:
        raise UserError(
            f"the state belongs to another model (fingerprint {saved['model'][:12]}, this one is "
            f"{pipe.fingerprint[:12]}); load the model that made it"
        )
    if saved["dtype"] != pipe.dtype_name:
        raise UserError(
            f"the state was made with dtype {saved['dtype']}, this model is loaded as {pipe.dtype_name}; "
            f"load it with dtype {saved['dtype']}"
        )
    kept = saved.get("weights_dtype")
    if kept != pipe.weights_dtype:
        own = "the model's own dtype"
        raise UserError(
            f"the state was made with weights in {kept or own}, this model has them in {pipe.weights_dtype or own}; "
            "load it as it was"
        )
    layout = saved.get("weights_layout", 1)
    if kept is not None and layout != LAYOUT:
        raise UserError(
            f"the state was made with weights in {kept} of layout {layout}, this version keeps them in layout {LAYOUT} "
            "(other layers in bytes): go on with the version that made it, or begin a new stream"
        )
    made_with, now = saved.get("sampling"), _sampling(pipe, saved["steps"])
    if made_with is not None and made_with != now:
        other = ", ".join(name for name in now if made_with.get(name) != now[name])
        raise UserError(f"the state was made by another sampler than this model's card names: {other} differ")


def _check_place(saved: Mapping[str, Any], geometry: VideoGeometry) -> None:
    """UserError unless a saved state stands at a block, and its cache too."""
    position, seeds, held = saved["position"], saved["seeds"], saved["cache"]
    if not (isinstance(position, int) and 0 <= position <= MAX_BLOCK):
        raise UserError(f"the state stands at block {position!r}; it must be 0 to {MAX_BLOCK}")
    if not (seeds and all(isinstance(seed, int) and 0 <= seed < 2**64 for seed in seeds)):
        raise UserError(f"the state has the seeds {seeds!r}; they must be 0 to 2**64 - 1")
    if held["end"] != held["origin"] and held["end"] != geometry.block_start(position):
        raise UserError(
            f"the state's cache ends at latent frame {held['end']}, but its block {position} begins at "
            f"{geometry.block_start(position)}"
        )
