"""Diffusion forcing (arXiv 2407.01392; for video by blocks: CausVid, arXiv 2412.07772).

One noisy copy of a clip under the block-causal mask; every block has a noise level of its own and sees the blocks
before it at theirs. It is the autoregressive objective with the visibility `latest`; a share of batches may be teacher
forcing (`visibility: {latest: 0.8, clean: 0.2}`), or any other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from streamgen.visibility import Visibility
from streamgen_train.objectives import ar


@dataclass(kw_only=True)
class Config(ar.Config):
    visibility: dict[Visibility, float] = field(default_factory=lambda: {"latest": 1.0})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.visibility.get("latest", 0) <= 0:
            raise ValueError("visibility has no share of latest, which is diffusion forcing; or take objective.name=ar")


def build(config: Config) -> ar.ArObjective:
    return ar.ArObjective(config)
