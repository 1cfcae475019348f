"""Training rollouts: streams made the way they are served, with a gradient through one step of some blocks.

Everything here calls `streamgen.rollout.rollout_block` (or `streamgen.rolling.roll`), the functions that serve. One
exit step is drawn for a whole turn and is the same in all blocks, microbatches and processes; autograd sees that step
of the graded blocks and nothing else: earlier steps and the keys and values of other blocks are constants
(Self-Forcing, arXiv 2506.08009, algorithm 1). Only the blocks asked for are kept, so the memory of a rollout does not
grow with its length.

Letters: B clips, G blocks, F latent frames, C H W latent, L text rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from streamgen import flow
from streamgen.cache import CacheSpec, KVCache
from streamgen.geometry import VideoGeometry
from streamgen.rolling import RollingWindow, roll
from streamgen.rollout import Sampling, StreamState, rollout_block
from streamgen.transformer import CausalWanModel, TextContext
from streamgen_train.objectives.video import Batch
from streamgen_train.timing import timed

TextOfBlock = Callable[[int], TextContext]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What all microbatches and processes of a turn do alike; blocks are counted from where the rollout starts."""

    sampling: Sampling
    exit_step: int
    blocks: int
    """Length of the rollout: made up to the last graded block."""
    first: int
    """The window that is kept and scored: [first, blocks)."""
    rolling: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.exit_step < len(self.sampling.sigmas):
            raise ValueError(
                f"exit_step is {self.exit_step}; it must be one of the {len(self.sampling.sigmas)} steps, from 0"
            )
        if not 0 <= self.first < self.blocks:
            raise ValueError(f"the window [{self.first}, {self.blocks}) of a rollout must hold a block")


@dataclass(slots=True)
class Streams:
    """What a rollout is made of: prompts of each block and seeds; everything else is in the plan."""

    plan: Plan
    ids_BGL: Tensor
    seeds: tuple[int, ...]
    transitions: dict[int, str]
    captions: list[str]
    """Of the last block, for the reward."""
    given: Batch | None = None
    """Clips to denoise instead of a rollout (student_input data)."""
    real: tuple[Tensor, Tensor] | None = None
    """Clips of the world as long as the window and their prompts [B, G, L], for a GAN."""


def draw_plan(
    shared: torch.Generator,
    *,
    plans: Sequence[Sampling],
    rollout_blocks: tuple[int, int],
    window_blocks: int,
    window_at: str,
    rolling_share: float = 0.0,
    rolling_plan: Sampling | None = None,
) -> Plan:
    """A turn's plan from its shared generator.

    rollout_blocks: least and greatest length, drawn evenly. window_at: 'end' scores the last blocks (Self-Forcing);
    'anywhere' a window drawn evenly over the whole length (Self-Forcing++, arXiv 2510.02283), where the rollout ends.
    """
    draws = torch.rand(4, generator=shared).tolist()
    low, high = rollout_blocks
    blocks = low + int(draws[0] * (high - low + 1))
    window = min(window_blocks, blocks)
    first = blocks - window if window_at == "end" else int(draws[1] * (blocks - window + 1))
    rolling = rolling_plan is not None and draws[2] < rolling_share
    sampling = rolling_plan if rolling and rolling_plan is not None else plans[int(draws[3] * len(plans))]
    exit_step = int(torch.randint(len(sampling.sigmas), (), generator=shared))
    return Plan(sampling=sampling, exit_step=exit_step, blocks=first + window, first=first, rolling=rolling)


def new_state(
    model: CausalWanModel,
    geometry: VideoGeometry,
    seeds: Sequence[int],
    *,
    window_frames: int,
    sink_frames: int,
    policy: str,
    dtype: torch.dtype,
    device: torch.device,
) -> StreamState:
    """Fresh streams, one for each seed."""
    spec = CacheSpec.of(
        model.config,
        geometry,
        window_frames=window_frames,
        sink_frames=sink_frames,
        policy=policy,
    )
    spec.check_block(geometry.block_frames)
    return StreamState(
        geometry=geometry,
        cache=KVCache(spec, batch=len(seeds), dtype=dtype, device=device),
        seeds=tuple(seeds),
        ops=model.ops,
    )


@dataclass(slots=True)
class Rollout:
    """The kept window of a rollout."""

    blocks: list[Tensor] = field(default_factory=list)
    """x0 of each block, [B, F, C, H, W]; with a graph if it was graded."""

    @property
    def latents_BFCHW(self) -> Tensor:
        return torch.cat(self.blocks, 1)


@timed("rollout")
def self_rollout(
    model: CausalWanModel,
    state: StreamState,
    text: TextOfBlock,
    plan: Plan,
    *,
    grad: bool,
    checkpointed: bool = False,
    transitions: Mapping[int, str] | None = None,
) -> Rollout:
    """Advance `state` by plan.blocks blocks and keep those of the window.

    text: block (counted from the start of this rollout) -> its prompt. transitions: block -> how its prompt takes over.
    All blocks leave the loop at the exit step, as in training by Self-Forcing: what later blocks see is what the
    scored ones are.
    """
    if plan.rolling:
        return rolling_rollout(model, state, text, plan, grad=grad)
    out = Rollout()
    for block in range(plan.blocks):
        kept = block >= plan.first
        with torch.no_grad() if not (grad and kept) else torch.enable_grad():
            x0 = rollout_block(
                model,
                state,
                text(block),
                plan.sampling,
                transition=(transitions or {}).get(block),
                exit_step=plan.exit_step,
                grad=grad and kept,
                checkpointed=checkpointed,
            )
        if kept:
            out.blocks.append(x0)
    return out


def rolling_rollout(model: CausalWanModel, state: StreamState, text: TextOfBlock, plan: Plan, *, grad: bool) -> Rollout:
    """The same by a rolling window (Rolling Forcing, arXiv 2509.25161).

    Launches that are a multiple of T apart, from the exit step on, tile the video: each block is in exactly one of
    them. Those give the kept x0 and carry the gradient; the others advance the stream.
    """
    if state.position:
        raise ValueError(f"a rolling rollout starts with a stream, not at its block {state.position}")
    steps = len(plan.sampling.sigmas)
    window, kept = RollingWindow(), dict[int, Tensor]()
    for launch in range(plan.blocks + steps - 1):
        tile = launch % steps == plan.exit_step
        x0 = roll(
            model, state, window, text, plan.sampling, stop=plan.blocks, grad=grad and tile and launch >= plan.first
        )
        if tile:
            kept |= {block: latents for block, latents in x0.items() if block >= plan.first}
    return Rollout([kept[block] for block in range(plan.first, plan.blocks)])


def step_plans(
    counts: Sequence[int], shift: float, prediction: flow.Prediction, context_noise: float
) -> list[Sampling]:
    """The samplers of several step counts, with re-noising."""
    return [
        Sampling(sigmas=flow.step_sigmas(count, shift), prediction=prediction, context_noise=context_noise)
        for count in counts
    ]
