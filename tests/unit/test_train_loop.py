"""The loop, the optimisers, the average and the number formats, each against the rule written out."""

import csv
import math
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from streamgen.errors import UserError
from streamgen.sheets import contact_sheet
from streamgen_train.config import EmaConfig, OptimConfig, ScheduleConfig
from streamgen_train.ema import Ema, ema_decay
from streamgen_train.loop import NonFiniteError, Trainer, step_seed, train
from streamgen_train.objective import Turn
from streamgen_train.optim import Muon, Optimizer, lr_factor, orthogonalise
from streamgen_train.precision import Masters, probe_precision
from tests.runs import assert_golden, losses
from tests.toy_objective import ToyObjective, build_toy, toy_config


def test_golden_losses(tmp_path: Path) -> None:
    train(build_toy(), toy_config(), tmp_path)
    assert_golden("toy", tmp_path)


def test_it_learns_and_writes_what_it_promises(tmp_path: Path) -> None:
    result = train(build_toy(), toy_config(max_steps=200), tmp_path)
    curve = losses(tmp_path)
    assert (result.status, result.step) == ("done", 200)
    assert np.mean(curve[-20:]) < 0.5 * np.mean(curve[:20])
    with open(tmp_path / "train.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == curve
    assert rows[-1].keys() >= {"step", "mae", "grad_norm", "lr_factor", "step_s", "clips_per_s", "elapsed_s"}
    with open(tmp_path / "val.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == [str(n) for n in range(10, 201, 10)]
    with Image.open(tmp_path / "samples" / "step_00000015_grey.png") as picture:
        assert picture.size == (6, 4)


def test_log_rows_are_means_of_their_window(tmp_path: Path) -> None:
    train(build_toy(), toy_config(max_steps=10), tmp_path / "each")
    config = toy_config(max_steps=10)
    config.log.every = 4
    train(build_toy(), config, tmp_path / "fourth")
    each = losses(tmp_path / "each")
    assert losses(tmp_path / "fourth") == pytest.approx([np.mean(each[:4]), np.mean(each[4:8]), np.mean(each[8:])])


def test_metrics_of_some_steps_are_means_of_those_steps(tmp_path: Path) -> None:
    """Batches may be of several kinds; a row has a number only where a step gave it, and CSV columns grow."""

    class Kinds(ToyObjective):
        def loss(
            self, batch: Tensor, turn: Turn, ema: Mapping[str, nn.Module] | None
        ) -> tuple[Tensor, dict[str, Tensor]]:
            loss, _ = super().loss(batch, turn, ema)
            return loss, {"late": torch.tensor(float(turn.step))} if turn.step >= 3 and turn.step % 2 else {}

    config = toy_config(max_steps=6)
    config.log.every = 2
    train(Kinds(), config, tmp_path)
    with open(tmp_path / "train.csv", newline="") as file:
        assert [row["late"] for row in csv.DictReader(file)] == ["", "3.0", "5.0"]


def test_evaluation_does_not_touch_training(tmp_path: Path) -> None:
    train(build_toy(), toy_config(), tmp_path / "with")
    config = toy_config(validate_every=0, sample_every=0)
    config.checkpoint.best = None
    train(build_toy(), config, tmp_path / "without")
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_step_seeds_differ_and_stay() -> None:
    seeds = {step_seed(seed, step, micro) for seed in range(3) for step in range(20) for micro in range(3)}
    assert len(seeds) == 180
    assert step_seed(0, 0, 0) == step_seed(0, 0, 0)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_accumulation_equals_the_mean_over_microbatches() -> None:
    trainer = Trainer(build_toy(), toy_config(accumulate=3), None, None)
    twin = build_toy()
    total = torch.zeros(())
    for micro in range(3):
        seed = step_seed(0, 0, micro)
        torch.manual_seed(seed)
        turn = Turn(0, torch.Generator().manual_seed(seed), torch.Generator(), micro=micro)
        total = total + twin.loss(twin.batch(turn), turn, None)[0] / 3
    total.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for m in twin.modules().values() for p in m.parameters()))
    numbers = trainer.train_step()
    assert numbers["loss"] == pytest.approx(total.item(), rel=1e-6)
    assert numbers["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ema_follows_its_formula(precision: str) -> None:
    config = toy_config(precision=precision, ema=EmaConfig(decay=0.8, warmup=10.0))
    trainer = Trainer(build_toy(), config, None, None)
    expected = {name: t.detach().double() for name, t in trainer.masters.tensors.items()}
    for n in range(12):
        trainer.train_step()
        decay = min(0.8, (1 + n) / (10 + n))
        for name, master in trainer.masters.tensors.items():
            expected[name] = decay * expected[name] + (1 - decay) * master.detach().double()
    for name, tensor in trainer.ema.shadow.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=1e-6)
    shown = trainer.ema.refresh()["head"]
    shadow = trainer.ema.shadow["head.weight"]
    assert torch.equal(shown.get_parameter("weight"), shadow.to(trainer.masters.params["head.weight"].dtype))
    assert float(shown.get_buffer("seen")) == 12
    assert not shown.training and not any(p.requires_grad for p in shown.parameters())


def test_ema_decay_without_warmup() -> None:
    assert ema_decay(0.99, 0, 1.0) == 0.99
    assert ema_decay(0.99, 0, 10.0) == 0.1


def test_objectives_can_ask_for_the_ema(tmp_path: Path) -> None:
    class WithEma(ToyObjective):
        needs_ema = True

    torch.manual_seed(0)
    train(WithEma(), toy_config(max_steps=5), tmp_path / "ema")
    train(build_toy(), toy_config(max_steps=5), tmp_path / "plain")
    with_ema, plain = losses(tmp_path / "ema"), losses(tmp_path / "plain")
    assert with_ema != plain and all(map(math.isfinite, with_ema))


def test_bf16_keeps_fp32_masters() -> None:
    """Updates smaller than a bf16 ulp add up in the masters, and the weights are their rounding."""
    net = nn.Linear(4, 4, bias=False)
    nn.init.ones_(net.weight)
    masters = Masters({"net": net}, torch.bfloat16)
    optimizer = Optimizer(masters.tensors, OptimConfig(lr=1e-4, weight_decay=0.0), "fp32")
    for _ in range(40):
        net(torch.ones(1, 4, dtype=torch.bfloat16)).float().sum().backward()
        masters.collect_grads()
        assert net.weight.grad is None
        optimizer.step(1.0)
        masters.zero_grad()
        masters.publish(masters.tensors)
    master = masters.tensors["net.weight"]
    assert net.weight.dtype == torch.bfloat16 and master.dtype == torch.float32
    torch.testing.assert_close(master, torch.full((4, 4), 1 - 40 * 1e-4), rtol=1e-4, atol=0)
    assert torch.equal(net.weight, master.bfloat16()) and net.weight[0, 0].item() < 1


def test_bf16_training_stays_near_fp32(tmp_path: Path) -> None:
    train(build_toy(), toy_config(max_steps=60), tmp_path / "fp32")
    train(build_toy(), toy_config(max_steps=60, precision="bf16"), tmp_path / "bf16")
    assert losses(tmp_path / "bf16")[-20:] == pytest.approx(losses(tmp_path / "fp32")[-20:], rel=0.2)


def test_precision_probe_leaves_the_weights_alone(tmp_path: Path) -> None:
    objective = build_toy()
    before = {k: v.clone() for m in objective.modules().values() for k, v in m.state_dict().items()}
    choice, seconds = probe_precision(objective, torch.device("cpu"))
    assert choice in ("fp32", "bf16") and seconds.keys() == {"fp32", "bf16"}
    after = {k: v for m in objective.modules().values() for k, v in m.state_dict().items()}
    assert all(torch.equal(before[k], after[k]) and after[k].dtype == torch.float32 for k in before)
    assert train(objective, toy_config(max_steps=2, precision="auto"), tmp_path).status == "done"


def muon_by_hand(weight: Tensor, grads: list[Tensor], lr: float, momentum: float, decay: float) -> Tensor:
    """The reference optimiser on one matrix, as its authors write it."""
    buffer = torch.zeros_like(weight)
    for grad in grads:
        buffer = momentum * buffer + grad
        update = grad + momentum * buffer
        x = update.mT if update.size(-2) > update.size(-1) else update
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        x = x.mT if update.size(-2) > update.size(-1) else x
        weight = weight * (1 - lr * decay) - lr * max(1, weight.size(-2) / weight.size(-1)) ** 0.5 * x
    return weight


def test_muon_against_the_rule_written_out() -> None:
    """Square, wide, tall and a second of one shape, so that batching by shape is exercised."""
    shapes = {"a": (8, 8), "wide": (6, 20), "tall": (20, 6), "b": (8, 8)}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    grads = {name: [torch.randn(shape) for _ in range(3)] for name, shape in shapes.items()}
    tensors = {name: w.clone().requires_grad_() for name, w in weights.items()}
    muon = Muon(tensors, momentum=0.95, weight_decay=0.1, dtype=torch.float32)
    for index in range(3):
        for name, tensor in tensors.items():
            tensor.grad = grads[name][index].clone()
        muon.step(0.02)
    for name, tensor in tensors.items():
        expected = muon_by_hand(weights[name], grads[name], 0.02, 0.95, 0.1)
        torch.testing.assert_close(tensor.detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_pushes_singular_values_to_one(dtype: torch.dtype) -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 24, 40), dtype))
    assert values.min() > 0.6 and values.max() < 1.3


def test_optimizer_splits_by_name_and_shape() -> None:
    masters = Masters(build_toy().modules(), torch.float32)
    optimizer = Optimizer(masters.tensors, OptimConfig(kind="muon", weight_decay=0.1), "fp32")
    assert set(optimizer.muon.tensors) == {"net.blocks.0.weight", "net.blocks.1.weight"}
    assert optimizer.adamw is not None
    decayed, plain = optimizer.adamw.param_groups
    assert [p.shape for p in decayed["params"]] == [(4, 12)] and decayed["weight_decay"] == 0.1
    assert all(p.ndim == 1 for p in plain["params"]) and plain["weight_decay"] == 0.0


def test_learning_rate_schedules() -> None:
    constant = ScheduleConfig(kind="constant", warmup_steps=4, decay_steps=10)
    assert [lr_factor(step, 100, constant) for step in (0, 3, 4, 90, 95, 99)] == [
        0.25,
        1,
        1,
        1,
        0.5,
        pytest.approx(0.1),
    ]
    assert lr_factor(95, 200, constant) == 1  # a longer run decays later
    linear = ScheduleConfig(kind="linear", warmup_steps=0, final=0.1)
    assert lr_factor(50, 100, linear) == pytest.approx(0.55)
    cosine = ScheduleConfig(kind="cosine", warmup_steps=0)
    assert [lr_factor(step, 100, cosine) for step in (0, 50, 100)] == pytest.approx([1, 0.5, 0])
    assert lr_factor(7, 100, ScheduleConfig(warmup_steps=0)) == 1


class Broken(ToyObjective):
    """Non-finite at step 3: in the loss, or in one gradient only."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def loss(self, batch: Tensor, turn: Turn, ema: Mapping[str, nn.Module] | None) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().loss(batch, turn, ema)
        if turn.step == 3 and self.where == "loss":
            loss = loss * float("nan")
        if turn.step == 3 and self.where == "gradient":
            bias = self.head.bias
            loss = loss + (torch.sqrt((bias - bias.detach()).abs())).sum()  # 0 with an infinite slope
        return loss, metrics


@pytest.mark.parametrize(("where", "named"), [("loss", "loss = nan"), ("gradient", "gradients of head.bias")])
def test_non_finite_numbers_stop_the_run(tmp_path: Path, where: str, named: str) -> None:
    config = toy_config()
    config.checkpoint.every = 2
    with pytest.raises(NonFiniteError, match=f"step 3: .*{named}"):
        train(Broken(where), config, tmp_path)
    assert [p.name for p in sorted((tmp_path / "checkpoints").glob("step*"))] == ["step_00000002"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(tmp_path: Path, number: signal.Signals) -> None:
    def send(step: int, numbers: Mapping[str, float]) -> None:
        if step == 7:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    result = train(build_toy(), toy_config(), tmp_path / "cut", on_progress=send)
    assert (result.status, result.step, result.checkpoint.name) == ("interrupted", 8, "step_00000008")
    assert signal.getsignal(number) == before
    assert train(build_toy(), toy_config(), tmp_path / "cut").status == "done"
    train(build_toy(), toy_config(), tmp_path / "whole")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_time_limit_stops_with_a_checkpoint(tmp_path: Path) -> None:
    result = train(build_toy(), toy_config(max_minutes=1e-6), tmp_path)
    assert (result.status, result.step) == ("time", 1) and result.checkpoint.exists()


def test_compiled_training_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`compile` reaches the modules (their compilation itself is torch's affair and takes long)."""
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, dynamic: compiled.append(module))
    objective = build_toy()
    train(objective, toy_config(max_steps=1, compile=True), tmp_path)
    assert compiled == list(objective.modules().values())


def test_wandb_that_is_not_installed_is_a_clear_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = toy_config()
    config.log.wandb = "offline"
    with pytest.raises(UserError, match="pip install wandb"):
        train(build_toy(), config, tmp_path)


def test_contact_sheet() -> None:
    clips = [np.full((9, 8, 10, 3), 40 * i, np.uint8) for i in range(3)]
    sheet = contact_sheet(clips, ["one", "two", "a caption that is far too long for its strip"], frames=4, columns=2)
    assert sheet.dtype == np.uint8 and sheet.shape == (2 * (13 + 8 + 4), 2 * (4 * 12 + 2), 3)
    assert (sheet[13 + 2 : 13 + 2 + 8, 50 + 2 : 50 + 12] == 40).all()
    with pytest.raises(ValueError, match="one caption per clip"):
        contact_sheet(clips, ["one"])
    with pytest.raises(ValueError, match="uint8"):
        contact_sheet([clips[0].astype(np.float32)], ["one"])


def test_ema_of_masters_only(tmp_path: Path) -> None:
    """Frozen parameters are neither optimised nor averaged."""
    objective = build_toy()
    objective.head.requires_grad_(False)
    masters = Masters(objective.modules(), torch.float32)
    assert not any(name.startswith("head") for name in Ema(objective.modules(), masters, EmaConfig()).shadow)
    before = objective.head.weight.clone()
    train(objective, toy_config(max_steps=3), tmp_path)
    assert torch.equal(objective.head.weight, before)
