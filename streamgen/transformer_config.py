"""The sizes of the transformer: what a checkpoint's config.json and a training config say of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    """Sizes of the network; the defaults are what every Wan model has in common."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_channels: int
    out_channels: int
    text_dim: int
    text_len: int
    patch: tuple[int, int, int] = (1, 2, 2)
    freq_dim: int = 256
    eps: float = 1e-6
    qk_norm: bool = True
    cross_attn_norm: bool = True
    rope_theta: float = 1e4
    prediction: Literal["flow", "x0"] = "flow"
    """What the output stands for (`streamgen.flow.to_x0`)."""
    pooled_text: bool = False
    """Not in Wan: the mean text row also goes through an MLP into the time embedding."""
    place_grid: tuple[int, int] | None = None
    """Not in Wan: a learned embedding of each place of a (rows, columns) token grid, for small models of one size."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch", tuple(self.patch))  # JSON has lists only
        if self.place_grid is not None:
            object.__setattr__(self, "place_grid", tuple(self.place_grid))
        for name in (
            "dim",
            "ffn_dim",
            "num_heads",
            "num_layers",
            "in_channels",
            "out_channels",
            "text_dim",
            "text_len",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.dim % (2 * self.num_heads):
            raise ValueError(f"dim={self.dim}: must be a multiple of 2 * num_heads = {2 * self.num_heads}")
        if self.freq_dim < 2 or self.freq_dim % 2:
            raise ValueError(f"freq_dim={self.freq_dim}: must be even and at least 2")
        if len(self.patch) != 3 or self.patch[0] != 1 or min(self.patch) < 1:
            raise ValueError(f"patch={self.patch}: must be (1, rows, columns), each at least 1")
        if self.prediction not in ("flow", "x0"):
            raise ValueError(f"prediction={self.prediction!r}: must be 'flow' or 'x0'")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads
