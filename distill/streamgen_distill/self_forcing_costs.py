"""What a step of self-forcing costs, for `dry_run`: means over exit steps, step counts and rollout lengths."""

from __future__ import annotations

from streamgen.cache import POLICIES
from streamgen.costs import RECOMPUTED, TRAINED, Work, activation_bytes, cache_bytes
from streamgen.transformer_config import TransformerConfig
from streamgen_distill.self_forcing_config import Config


def rollout_work(c: Config) -> list[tuple[TransformerConfig, Work]]:
    """Passes of the student: those of the streams that it makes, and the graded ones once more."""
    g, clips, student = c.geometry, c.rollout_clips, 1 / c.critic_ratio
    window, made = scored_blocks(c), _made_blocks(c)
    passes = sum((count + 1) / 2 + 1 for count in c.train_steps) / len(c.train_steps)  # to the exit, and the commit
    visible = min(c.window_frames, (made * g.block_frames + g.block_frames) / 2)
    tokens = g.block_frames * g.tokens_per_frame
    pairs = int(tokens * visible * g.tokens_per_frame)
    graded = RECOMPUTED if c.checkpoint_activations else TRAINED
    rollout = Work(what="rollouts", passes=clips * made * passes * (1 + student), tokens=tokens, pairs=pairs)
    gradient = Work(
        what="student's graded step", passes=clips * window * student, tokens=tokens, pairs=pairs, factor=graded - 1
    )
    return [(c.model, rollout), (c.model, gradient)]


def scored_blocks(c: Config) -> float:
    """Length of the scored window."""
    return min(c.score_blocks, _mean_blocks(c))


def _mean_blocks(c: Config) -> float:
    return sum(c.rollout_blocks) / 2


def _made_blocks(c: Config) -> float:
    """A rollout ends with its scored window."""
    blocks, window = _mean_blocks(c), scored_blocks(c)
    return blocks if c.window_at == "end" else window + (blocks - window) / 2


def working_bytes(c: Config, bytes_per_value: int) -> float:
    """The larger of the critic's clip and the student's graded blocks, and the cache of the rollout."""
    g = c.geometry
    cache = c.rollout_clips * cache_bytes(c.model, c.window_frames * g.tokens_per_frame, bytes_per_value)
    tokens = c.score_blocks * g.block_frames * g.tokens_per_frame
    again = c.recomputed_layers, c.model.num_layers if c.checkpoint_activations else 0
    kept = max(
        activation_bytes(c.model, tokens, recomputed_layers=layers, bytes_per_value=bytes_per_value) for layers in again
    )
    snapshots = c.score_blocks * cache if c.checkpoint_activations else 0
    copies = 1 if POLICIES[c.cache].stores_rotated else 2  # the keys as they are read
    return cache * copies + c.rollout_clips * kept + snapshots
