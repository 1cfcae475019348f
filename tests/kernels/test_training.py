"""Training on the kernels: the same loss and gradients as in plain torch, and who gets which table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamgen import kernel_choice
from streamgen.errors import UserError
from streamgen.ops import select
from streamgen_distill import cd, self_forcing
from streamgen_distill.self_forcing import CRITIC, STUDENT
from streamgen_train.config import from_dict
from streamgen_train.loop import Trainer, train
from streamgen_train.objectives import ar, bidirectional, video
from streamgen_train.objectives.video import VideoObjective
from tests.runs import turn
from tests.tiny_sprites import ar_values, build_ar, save_codec, spread, train_config

Gradients = tuple[torch.Tensor, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A codec, an autoregressive run and a bidirectional one."""
    root = tmp_path_factory.mktemp("runs")
    codec = save_codec(root / "codec")
    train(build_ar(codec), train_config(max_steps=1), root / "ar")
    teacher = bidirectional.build(bidirectional.Config(**ar_values(codec)))
    spread(*teacher.modules().values())
    train(teacher, train_config(max_steps=1), root / "bidirectional")
    return {"codec": codec, "ar": root / "ar", "bidirectional": root / "bidirectional"}


def loss_and_gradients(objective: VideoObjective, device: torch.device, player: str = "model") -> Gradients:
    objective.prepare(device, torch.float32)
    now = turn(0, player=player)
    torch.manual_seed(3)
    batch = objective.batch(now)
    loss, _ = objective.loss(batch, now, None)
    loss.backward()
    grads = {
        f"{name}.{key}": parameter.grad
        for name, module in objective.modules().items()
        for key, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    return loss.detach(), grads


def assert_same(build: Callable[[str], VideoObjective], device: torch.device, player: str = "model") -> int:
    """-> number of gradients compared."""
    (loss, grads), (wanted_loss, wanted) = (
        loss_and_gradients(build(name), device, player) for name in ("triton", "reference")
    )
    torch.testing.assert_close(loss, wanted_loss, atol=1e-6, rtol=1e-5)
    assert grads.keys() == wanted.keys()
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for name, grad in grads.items():  # a bias of keys moves the scores of a query alike: its gradient is rounding
        limit = 3e-5 * float(wanted[name].abs().max()) + 1e-7 * largest
        torch.testing.assert_close(grad, wanted[name], atol=limit, rtol=1e-4, msg=lambda t, name=name: f"{name}: {t}")
    return len(grads)


@pytest.mark.parametrize(("backend", "recompute"), [("sdpa", 0), ("spans", 1)])
def test_teacher_forcing_has_the_same_gradients(
    runs: dict[str, Path], device: torch.device, backend: str, recompute: int
) -> None:
    """Of every parameter, with and without a recomputed layer."""
    values: dict[str, Any] = {"attention_backend": backend, "recompute": recompute, "single_share": 0.0}

    def build(ops: str) -> VideoObjective:
        return build_ar(runs["codec"], ops=ops, **values)

    objective = build("triton")
    count = sum(len(list(module.parameters())) for module in objective.modules().values())
    assert assert_same(build, device) == count > 40
    objective.prepare(device, torch.float32)
    assert objective.model.ops.backend == "triton"


def forcing_values(runs: dict[str, Path], **changes: Any) -> dict[str, Any]:
    own = {
        "init_from": str(runs["ar"]),
        "teacher_from": str(runs["bidirectional"]),
        "rollout_clips": 2,
        "rollout_blocks": (5, 5),
        "score_blocks": 2,
        "train_steps": (2,),
        "critic_ratio": 1,
        "guidance": 1.0,
        "attention_backend": "math",
    }
    return ar_values(runs["codec"], **(own | changes))


@pytest.mark.parametrize(("player", "checkpointed"), [(STUDENT, False), (STUDENT, True), (CRITIC, False)])
def test_self_forcing_has_the_same_gradients(
    runs: dict[str, Path], device: torch.device, player: str, checkpointed: bool
) -> None:
    """Past a full window: what the rollout writes into the ring by kernels is what the graded step then reads."""

    def build(ops: str) -> VideoObjective:
        torch.manual_seed(0)
        own = {"ops": ops, "checkpoint_activations": checkpointed, "recompute": 1}
        return self_forcing.build(self_forcing.Config(**forcing_values(runs, **own)))

    assert assert_same(build, device, player) > 40


def test_every_transformer_gets_the_table(runs: dict[str, Path], device: torch.device) -> None:
    taught = cd.build(cd.Config(**ar_values(runs["codec"], teacher_from=str(runs["ar"]), ops="triton")))
    forced = self_forcing.build(self_forcing.Config(**forcing_values(runs, ops="triton")))
    for objective, names in ((taught, ["transformer", "teacher"]), (forced, ["transformer", "critic", "teacher"])):
        trainer = Trainer(objective, train_config(device=device.type))
        assert list(objective.transformers()) == names
        shown = trainer.ema.modules["transformer"]
        tables = [model.ops.backend for model in (*objective.transformers().values(), shown)]  # type: ignore[list-item]
        assert set(tables) == {"triton"}
        assert f"operations: triton ({', '.join(names)})" in trainer.notes
    assert forced.new_state((1, 2)).ops is forced.model.ops


def test_auto_follows_the_rule_of_streaming(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves what is compiled to the compiler."""
    asked: list[tuple[str, str]] = []

    def chosen(name: str, device: torch.device) -> Any:
        asked.append((name, device.type))
        return select("triton")

    monkeypatch.setattr(video, "ops_for", chosen)
    monkeypatch.setattr(nn.Module, "compile", lambda module, dynamic: None)
    backends = {}
    for ops in ("auto", "triton"):
        for compiled in (False, True):
            objective = build_ar(runs["codec"], ops=ops)
            Trainer(objective, train_config(compile=compiled))
            backends[ops, compiled] = objective.model.ops.backend
    assert asked == [("auto", "cpu")] * 2 + [("triton", "cpu")] * 2
    assert backends == {
        ("auto", False): "triton",
        ("auto", True): "reference",
        ("triton", False): "triton",
        ("triton", True): "triton",
    }


def test_what_cannot_run_is_one_line(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"objective\.ops='fast' is not allowed.* Allowed: auto, reference, triton"):
        from_dict(ar.Config, ar_values(runs["codec"], ops="fast"), "objective")
    plain = build_ar(runs["codec"])
    trainer = Trainer(plain, train_config())
    assert plain.model.ops.backend == "reference" and not any("operations" in note for note in trainer.notes)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    objective = build_ar(runs["codec"], ops="triton")
    with pytest.raises(UserError, match="ops 'triton' needs a CUDA device, this model is on cpu"):
        objective.prepare(torch.device("cpu"), torch.float32)
    assert kernel_choice.OPS == ("auto", "reference", "triton")
