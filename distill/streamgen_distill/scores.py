"""Score networks: what the teacher and the critic think that a noised clip was.

bidirectional   all blocks at one noise level see each other: the published choice, a teacher of objective
                `bidirectional`; it judges a window as a whole
causal          each block given the clip's own clean blocks before it (LongLive 2): an autoregressive
                teacher, in its training's layout

Letters: B clips, G blocks, F latent frames, C H W latent, L text rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from streamgen import flow
from streamgen.errors import UserError
from streamgen.transformer import CausalWanModel
from streamgen.transformer_config import TransformerConfig
from streamgen_distill.teacher import run_objective
from streamgen_train.checkpoint import check_fits, load_modules

ScoreLayout = Literal["bidirectional", "causal"]
TEACHERS: dict[str, tuple[str, ...]] = {
    "bidirectional": ("bidirectional", "moving_buffer"),
    "causal": ("ar", "df", "cd", "ode", "self_forcing", "long"),
}
"""ScoreLayout -> objectives whose runs can be scores of that layout."""

Predict = Callable[[Mapping[str, nn.Module], Tensor, Tensor, Tensor], Tensor]
"""(modules, x_t, sigma_BF, ids_BGL) -> x0."""


def load_score(path: str, layout: ScoreLayout, config: TransformerConfig, attention_backend: str) -> CausalWanModel:
    """The averaged transformer of a run as a score network; UserError for a run of another kind or shape."""
    found = run_objective(Path(path))
    if found is not None and found.get("name") not in TEACHERS[layout]:
        raise UserError(
            f"{path} is a run of objective {found.get('name')!r}; a {layout} score needs one of "
            f"{', '.join(TEACHERS[layout])} (objective.score_layout says which kind is meant)"
        )
    tensors = load_modules(Path(path))
    if "transformer" not in tensors:
        raise UserError(f"{path} holds {', '.join(tensors)} and no transformer: it is a checkpoint of another stage")
    model = CausalWanModel(config, attention_backend=attention_backend)
    check_fits({"transformer": model.state_dict()}, {"transformer": tensors["transformer"]}, Path(path))
    model.load_state_dict(tensors["transformer"])
    return model


def guided_x0(
    predict: Predict, modules: Mapping[str, nn.Module], x_t: Tensor, sigma_BF: Tensor, ids_BGL: Tensor, scale: float
) -> Tensor:
    """uncond + scale (cond - uncond); 1 is off. DMD's papers write cond + g (cond - uncond): g = scale - 1."""
    cond = predict(modules, x_t, sigma_BF, ids_BGL)
    if scale == 1.0:
        return cond
    return flow.guided(predict(modules, x_t, sigma_BF, torch.full_like(ids_BGL, -1)), cond, scale)


def draw_score_sigma(
    count: int, shift: float, low: float, high: float, exit_sigmas: tuple[float, float] | None, device: torch.device
) -> Tensor:
    """A noise level for each clip, [B, 1]: uniform u warped by `shift`, then clamped to [low, high].

    exit_sigmas: (level after the exit step, level of the exit step): levels are drawn between these instead
    (`ts_schedule` of the published code).
    """
    if exit_sigmas is None:
        u = torch.rand(count, 1, device=device)
    else:
        after, at = (flow.unshift_sigma(sigma, shift) for sigma in exit_sigmas)
        u = after + (at - after) * torch.rand(count, 1, device=device)
    return flow.shift_sigma(u, shift).clamp(low, high)
