"""The moving buffer's noise levels, against its rule written out, and its loss end to end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streamgen import flow
from streamgen_train.objectives import moving_buffer
from tests.runs import turn
from tests.tiny_sprites import ar_values, save_codec, spread


def test_levels_rise_by_chunk_and_cover_a_step() -> None:
    u = moving_buffer.buffer_u(torch.tensor([1, 2, 4]), 4, torch.tensor([0.0, 0.5, 0.25]))
    assert torch.allclose(u[0], torch.tensor([0.25, 0.5, 0.75, 1.0]))
    assert torch.allclose(u[1], torch.tensor([0.25, 0.25, 0.75, 0.75]))
    assert torch.allclose(u[2], torch.full((4,), 0.75))


def test_a_buffer_that_has_moved_on_is_the_next_one() -> None:
    """At phase 1 chunk j + 1 has the level that chunk j had at phase 0: the next buffer begins where this one ends."""
    begun, ended = (moving_buffer.buffer_u(torch.tensor([2]), 6, torch.tensor([phase])) for phase in (0.0, 1.0))
    assert torch.allclose(ended[:, 2:], begun[:, :-2])
    assert torch.equal(ended[:, :2], torch.zeros(1, 2))


def build(folder: Path, **changes: object) -> moving_buffer.MovingBufferObjective:
    torch.manual_seed(0)
    values = ar_values(save_codec(folder / "codec"), clips=6, **changes)
    objective = moving_buffer.build(moving_buffer.Config(**values))
    spread(*objective.modules().values())
    objective.prepare(torch.device("cpu"), torch.float32)
    return objective


def test_every_clip_has_the_levels_of_one_partition(tmp_path: Path) -> None:
    objective = build(tmp_path, chunk_blocks=(1, 2, 4), shifts=(3.0,))
    batch = objective.make_batch("story", 24, torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    u = flow.unshift_sigma(objective.levels(batch), 3.0)
    step = u.diff(dim=1)
    kinds = set()
    for row in step:
        size = {0: 4, 1: 2, 3: 1}[int((row > 1e-4).sum())]
        kinds.add(size)
        assert torch.allclose(row[row > 1e-4], torch.tensor(size / 4), atol=1e-4)
    assert kinds == {1, 2, 4} and u.min() > 0 and u.max() <= 1


@pytest.mark.parametrize("kind", ["single", "story", "gap"])
def test_loss_trains_on_every_kind_of_clip(tmp_path: Path, kind: str) -> None:
    objective = build(tmp_path)
    batch = objective.make_batch(kind, 2, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    loss, _ = objective.loss(batch, turn(), None)
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in objective.model.blocks.parameters())


def test_chunks_divide_the_clip(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="divide clip_blocks"):
        moving_buffer.Config(**ar_values(save_codec(tmp_path), chunk_blocks=(3,)))
