"""Streaming long tuning (LongLive, arXiv 2509.22622): self-forcing on streams that live on over many turns.

Every microbatch owns a batch of streams. A turn of either player continues them by a chunk: the student's turn with a
gradient, the critic's without. The scored window is the chunk with as many earlier blocks before it as the teacher's
horizon holds; the loss counts the chunk's frames alone. Somewhere on its way each stream is given another prompt, with
a re-cache of the window. At its greatest length a stream ends and a new one begins. Memory is that of a short rollout,
whatever the length, and the streams are part of every checkpoint.

Letters: B clips, G blocks, F latent frames, C H W latent, L text rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamgen.rollout import StreamState
from streamgen_distill import self_forcing
from streamgen_distill.rollouts import Plan, Streams, self_rollout
from streamgen_distill.self_forcing import STUDENT, SelfForcing
from streamgen_train.objective import Turn


@dataclass(kw_only=True)
class Config(self_forcing.Config):
    chunk_blocks: int = 2
    """Blocks that a turn adds to its streams."""
    stream_blocks: int = 80
    """Length at which streams end, in blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.chunk_blocks <= self.score_blocks:
            raise ValueError(
                f"chunk_blocks is {self.chunk_blocks}; it must be 1 to score_blocks ({self.score_blocks}), "
                "for a chunk is scored as a whole"
            )
        if self.stream_blocks < self.score_blocks:
            raise ValueError(f"stream_blocks is {self.stream_blocks}, less than score_blocks ({self.score_blocks})")
        if self.rolling_share > 0 or self.objective_loss == "gan" or self.student_input == "data":
            raise ValueError(
                "long tuning continues streams block by block: rolling_share=0, student_input=self, loss dmd or sid"
            )


@dataclass(slots=True)
class Living:
    """A batch of streams on its way."""

    state: StreamState
    before: list[str]
    after: list[str]
    switch_block: int
    """The block from which the second prompts hold; beyond the end: never."""
    tail: list[Tensor]
    """x0 of the last blocks, oldest first: what a window is filled up with."""

    def prompts(self, block: int) -> list[str]:
        return self.before if block < self.switch_block else self.after


class LongTuning(SelfForcing):
    """Self-forcing whose streams go on."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.streams: dict[int, Living] = {}
        self._saved: dict[int, Mapping[str, Any]] = {}

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        super().prepare(device, dtype)
        self.streams.clear()  # of a precision probe

    def batch(self, turn: Turn) -> Streams:  # type: ignore[override] # streams are made, not read
        c, living = self.config, self.living(turn)
        sampling = self.plans[int(torch.randint(len(self.plans), (), generator=turn.shared))]
        exit_step = int(torch.randint(len(sampling.sigmas), (), generator=turn.shared))
        start = living.state.position
        # The first turn of a stream makes a whole window; the lengths of all microbatches stay equal.
        new = c.score_blocks if start == 0 else c.chunk_blocks
        plan = Plan(sampling=sampling, exit_step=exit_step, blocks=new, first=0)
        shown = range(start - min(len(living.tail), c.score_blocks - new), start + new)
        ids = torch.stack([self.text.ids(living.prompts(block)) for block in shown], 1).to(self.device)
        at = living.switch_block - start
        transitions = {at: "recache"} if 0 <= at < new and start + at > 0 else {}
        return Streams(plan, ids, living.state.seeds, transitions, living.prompts(start + new - 1))

    def living(self, turn: Turn) -> Living:
        """The streams of this microbatch; new ones where there are none, or where they have come to their end."""
        c = self.config
        if turn.micro in self._saved:
            self.streams[turn.micro] = self._restored(self._saved.pop(turn.micro))
        found = self.streams.get(turn.micro)
        if found is not None and found.state.position + c.chunk_blocks <= c.stream_blocks:
            return found
        before, after = self.draw_prompts(turn), self.draw_prompts(turn)
        switched = bool(torch.rand((), generator=turn.shared) < c.switch_share)
        at = int(torch.randint(1, c.stream_blocks, (), generator=turn.shared)) if switched else c.stream_blocks
        seeds = tuple(torch.randint(2**62, (c.rollout_clips,), generator=turn.rng).tolist())
        self.streams[turn.micro] = Living(self.new_state(seeds), before, after, at, [])
        return self.streams[turn.micro]

    def loss(  # type: ignore[override] # of streams
        self, batch: Streams, turn: Turn, ema: Mapping[str, nn.Module] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        living, grad = self.streams[turn.micro], turn.player == STUDENT
        older = batch.ids_BGL.shape[1] - batch.plan.blocks
        past = living.tail[len(living.tail) - older :] if older else []
        texts = self.contexts(batch.ids_BGL, grad)
        with torch.set_grad_enabled(grad):
            rollout = self_rollout(
                self.model,
                living.state,
                lambda block: texts[older + block],
                batch.plan,
                grad=grad,
                checkpointed=self.config.checkpoint_activations,
                transitions=batch.transitions,
            )
        made = [latents.float() for latents in rollout.blocks]
        living.tail = [*living.tail, *(latents.detach() for latents in made)][-self.config.score_blocks :]
        clip = torch.cat([*past, *made], 1)
        if not grad:
            return self.critic_loss(batch, clip, batch.ids_BGL)
        scored_BF = torch.ones(clip.shape[:2], device=clip.device)
        scored_BF[:, : sum(latents.shape[1] for latents in past)] = 0
        return self.student_loss(batch, clip, batch.ids_BGL, scored_BF)

    # -- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[Any, Any]:
        """By microbatch: the streams, to the bit."""
        living = {
            micro: {
                "cache": item.state.cache.state_dict(),
                "recent": dict(item.state.recent),
                "position": item.state.position,
                "seeds": list(item.state.seeds),
                "before": item.before,
                "after": item.after,
                "switch_block": item.switch_block,
                "tail": item.tail,
            }
            for micro, item in self.streams.items()
        }
        return {**self._saved, **living}

    def load_state_dict(self, state: Mapping[Any, Any]) -> None:
        """Taken up again when their microbatch has its next turn."""
        self.streams, self._saved = {}, dict(state)

    def _restored(self, saved: Mapping[str, Any]) -> Living:
        state = self.new_state(tuple(saved["seeds"]))
        state.cache.load_state_dict(saved["cache"])
        state.recent = {frame: latents.to(self.device) for frame, latents in saved["recent"].items()}
        state.position = saved["position"]
        tail = [latents.to(self.device) for latents in saved["tail"]]
        return Living(state, saved["before"], saved["after"], saved["switch_block"], tail)


def build(config: Config) -> LongTuning:
    return LongTuning(config)
