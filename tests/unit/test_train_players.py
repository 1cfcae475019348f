"""Players: who moves when, with which optimiser, average and random numbers; against the program written out."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamgen.errors import UserError
from streamgen_train import checkpoint
from streamgen_train.config import EmaConfig, OptimConfig, ScheduleConfig, TrainConfig, from_dict
from streamgen_train.logs import read_jsonl
from streamgen_train.loop import NonFiniteError, Trainer, train
from streamgen_train.objective import Turn
from streamgen_train.optim import lr_factor
from streamgen_train.seeds import SHARED, step_seed
from tests.runs import assert_equal_states, curve
from tests.toy_objective import ToyGame, ToyObjective, build_toy, toy_config


def build_game(seed: int = 0) -> ToyGame:
    torch.manual_seed(seed)
    return ToyGame()


def game_config(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "optim": OptimConfig(lr=3e-3, grad_clip=0.5),
        "optim_of": {"critic": {"lr": 1e-2, "grad_clip": 0.05, "betas": [0.0, 0.999]}},
        "ema": EmaConfig(decay=0.8, warmup=2.0),
    }
    return toy_config(**(values | changes))


def test_two_players_against_the_program_written_out() -> None:
    """Own microbatches, gradients, clipping, AdamW and average; and nothing moves on another's turn."""
    config = game_config(accumulate=2)
    trainer, twin = Trainer(build_game(), config, None), build_game()
    groups = {"model": [*twin.net.parameters(), *twin.head.parameters()], "critic": [*twin.critic.parameters()]}
    average = {name: [p.detach().clone() for p in group] for name, group in groups.items()}
    settings: dict[str, tuple[dict[str, Any], float]] = {
        "model": ({"lr": 3e-3, "betas": (0.9, 0.99)}, 0.5),
        "critic": ({"lr": 1e-2, "betas": (0.0, 0.999)}, 0.05),
    }
    optims = {}
    for name, group in groups.items():
        weights = [{"params": [p for p in group if p.ndim > 1], "weight_decay": 0.01}]
        biases = [{"params": [p for p in group if p.ndim < 2], "weight_decay": 0.0}]
        optims[name] = torch.optim.AdamW(weights + biases, eps=1e-8, **settings[name][0])
    updates = dict.fromkeys(groups, 0)

    for step in range(7):
        expected = {}
        for name in twin.turns(step):
            total = 0.0
            for micro in range(2):
                seed = step_seed(0, step, micro, 0 if name == "model" else 2)
                turn = Turn(step, torch.Generator().manual_seed(seed), torch.Generator(), name, micro)
                loss, _ = twin.loss(twin.batch(turn), turn, None)
                (loss / 2).backward()
                total += loss.item() / 2
            kwargs, clip = settings[name]
            norm = torch.nn.utils.clip_grad_norm_(groups[name], clip)
            prefix = "" if name == "model" else "critic/"
            expected |= {f"{prefix}loss": total, f"{prefix}grad_norm": norm.item()}
            for group in optims[name].param_groups:
                group["lr"] = kwargs["lr"] * lr_factor(step, 30, config.schedule)
            optims[name].step()
            for p in twin.modules().values():
                p.zero_grad()
            decay = min(0.8, (1 + updates[name]) / (2 + updates[name]))
            average[name] = [
                decay * a + (1 - decay) * p.detach() for a, p in zip(average[name], groups[name], strict=True)
            ]
            updates[name] += 1
        numbers = trainer.train_step()
        assert {key: numbers[key] for key in expected} == pytest.approx(expected, rel=1e-4)
        assert ("loss" in numbers) == (step % 3 == 0) and "critic/told" in numbers

    assert trainer.ema.updates == {"model": 3, "critic": 7}
    for key, module in twin.modules().items():
        player = "critic" if key == "critic" else "model"
        averages = dict(zip((id(p) for p in groups[player]), average[player], strict=True))
        for name, parameter in module.named_parameters():
            full_name = f"{key}.{name}"
            torch.testing.assert_close(
                trainer.masters.tensors[full_name].detach(), parameter.detach(), rtol=1e-4, atol=1e-6
            )
            torch.testing.assert_close(trainer.ema.shadow[full_name], averages[id(parameter)], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_the_player_whose_turn_it_is_moves(precision: str) -> None:
    class Watched(ToyGame):
        def loss(
            self, batch: Tensor, turn: Turn, ema: Mapping[str, nn.Module] | None
        ) -> tuple[Tensor, dict[str, Tensor]]:
            for name, module in self.modules().items():
                for parameter in module.parameters():
                    learns = name in self.players()[turn.player] and name != "net"
                    assert parameter.requires_grad is learns
            return super().loss(batch, turn, ema)

    torch.manual_seed(0)
    objective = Watched()
    objective.net.requires_grad_(False)  # frozen for good
    if precision == "bf16":
        objective.net.bfloat16()
    trainer = Trainer(objective, game_config(precision=precision), None)
    trainer.train_step()  # both play
    before = copy.deepcopy({key: module.state_dict() for key, module in objective.modules().items()})
    averaged = copy.deepcopy(trainer.ema.shadow)
    trainer.train_step()  # the critic alone
    assert not torch.equal(objective.critic.weight, before["critic"]["weight"])
    assert not torch.equal(trainer.ema.shadow["critic.weight"], averaged["critic.weight"])
    assert torch.equal(objective.head.weight, before["head"]["weight"])
    assert torch.equal(trainer.ema.shadow["head.weight"], averaged["head.weight"])
    assert objective.head.weight.requires_grad and objective.critic.weight.requires_grad
    assert not any(p.requires_grad for p in objective.net.parameters())


def test_the_model_plays_the_same_whoever_else_plays(tmp_path: Path) -> None:
    """Its seeds do not depend on the number of players."""

    class Alone(ToyGame):
        def players(self) -> dict[str, tuple[str, ...]]:
            return {"model": ("net", "head", "critic")}

        def turns(self, step: int) -> tuple[str, ...]:
            return ("model",)

    class With(ToyGame):
        def players(self) -> dict[str, tuple[str, ...]]:
            return {"critic": ("critic",), "model": ("net", "head")}

        def turns(self, step: int) -> tuple[str, ...]:
            return ("model", "critic")

    firsts = [Trainer(kind(), game_config(optim_of={}), None) for kind in (Alone, With)]
    for trainer in firsts:
        torch.manual_seed(0)
        for module in trainer.modules.values():
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.1)
    first, second = (trainer.train_step() for trainer in firsts)
    assert first["loss"] == second["loss"] and first["told"] == second["told"]


def test_seeds_of_players() -> None:
    """The model's are those of runs from before there were players."""
    assert step_seed(0, 0, 0) == step_seed(0, 0, 0, 0) == 6375474604893067239
    seeds = {step_seed(0, step, micro, player) for step in range(9) for micro in (0, 1, SHARED) for player in range(4)}
    assert len(seeds) == 9 * 3 * 4


def test_shared_numbers_are_those_of_the_turn() -> None:
    """Equal in all microbatches, other for another player or step; `rng` is other in each."""
    drawn: dict[tuple[int, str], list[tuple[float, float]]] = {}

    class Drawing(ToyGame):
        def batch(self, turn: Turn) -> Tensor:
            pair = (float(torch.rand((), generator=turn.shared)), float(torch.rand((), generator=turn.rng)))
            drawn.setdefault((turn.step, turn.player), []).append(pair)
            assert turn.micro == len(drawn[turn.step, turn.player]) - 1
            return super().batch(turn)

    torch.manual_seed(0)
    trainer = Trainer(Drawing(), game_config(accumulate=3), None)
    for _ in range(4):
        trainer.train_step()
    assert list(drawn) == [(0, "model"), (0, "critic"), (1, "critic"), (2, "critic"), (3, "model"), (3, "critic")]
    assert all(len({shared for shared, _ in pairs}) == 1 for pairs in drawn.values())
    assert len({pairs[0][0] for pairs in drawn.values()}) == 6
    assert len({own for pairs in drawn.values() for _, own in pairs}) == 18


def test_resume_of_a_game_is_exact(tmp_path: Path) -> None:
    """With state of the objective, in the middle of the critic's turns."""

    class Remembers(ToyGame):
        def __init__(self) -> None:
            super().__init__()
            self.stream: dict[int, Tensor] = {0: torch.zeros(12)}

        def batch(self, turn: Turn) -> Tensor:
            self.stream[0] = 0.5 * self.stream[0] + torch.randn(12, generator=turn.rng)
            return super().batch(turn) + 0.1 * self.stream[0]

        def state_dict(self) -> dict[Any, Any]:
            return {**self.stream, "count": 3}

        def load_state_dict(self, state: Mapping[Any, Any]) -> None:
            if state:
                assert state["count"] == 3
                self.stream = {0: state[0]}

    def run(folder: str, steps: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        config = game_config(max_steps=steps, schedule=ScheduleConfig(warmup_steps=2), validate_every=0)
        train(Remembers(), config, tmp_path / folder)

    run("whole", 12)
    run("cut", 7)
    run("cut", 12, seed=9)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    states = [checkpoint.load(checkpoint.find(tmp_path / run)) for run in ("cut", "whole")]
    assert_equal_states(*states)
    assert states[0]["ema"]["updates"] == {"model": 4, "critic": 12}
    with pytest.raises(UserError, match=r"holds a state .* that this objective has not"):
        train(build_game(), game_config(max_steps=13), tmp_path / "cut")


def test_log_rows_have_the_numbers_of_their_turns(tmp_path: Path) -> None:
    config = game_config(max_steps=4, validate_every=0)
    config.checkpoint.best = None
    train(build_game(), config, tmp_path)
    rows = read_jsonl(tmp_path / "log.jsonl")
    assert ["loss" in row for row in rows] == [True, False, False, True]
    assert all({"critic/loss", "critic/told", "critic/grad_norm", "lr_factor"} <= row.keys() for row in rows)
    clips = [row["clips_per_s"] * row["step_s"] for row in rows]
    assert clips == pytest.approx([16, 8, 8, 16])


def test_the_average_copies_the_weights_until_its_start() -> None:
    config = toy_config(ema=EmaConfig(decay=0.9, warmup=1.0, start_step=3), validate_every=0)
    trainer = Trainer(build_toy(), config, None)
    name = "head.weight"
    for step in range(5):
        before = trainer.ema.shadow[name].clone()
        trainer.train_step()
        master = trainer.masters.tensors[name].detach()
        expected = master if step < 3 else 0.9 * before + 0.1 * master
        torch.testing.assert_close(trainer.ema.shadow[name], expected, rtol=0, atol=1e-7 if step >= 3 else 0)


def test_a_non_finite_number_names_the_player(tmp_path: Path) -> None:
    class Broken(ToyGame):
        def loss(
            self, batch: Tensor, turn: Turn, ema: Mapping[str, nn.Module] | None
        ) -> tuple[Tensor, dict[str, Tensor]]:
            loss, metrics = super().loss(batch, turn, ema)
            return loss * (math.inf if turn.player == "critic" and turn.step == 2 else 1), metrics

    with pytest.raises(NonFiniteError, match=r"step 2, player critic: loss = inf.*gradients of critic\.weight, critic"):
        train(Broken(), game_config(), tmp_path)


@pytest.mark.parametrize(
    ("optim_of", "message"),
    [
        (
            {"critik": {"lr": 1e-3}},
            r"player 'critik'; did you mean 'critic'\? Players of this objective: model, critic",
        ),
        ({"critic": {"lrr": 1e-3}}, r"unknown key 'train.optim_of.critic.lrr'; did you mean 'lr'"),
        ({"critic": {"lr": "fast"}}, r"train.optim_of.critic.lr='fast' is a str"),
    ],
)
def test_mistakes_in_optim_of_are_named(optim_of: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(build_game(), from_dict(TrainConfig, {"optim_of": optim_of}, "train"), None)


@pytest.mark.parametrize(
    ("players", "message"),
    [
        ({"model": ("net", "head")}, r"of none \['critic'\]"),
        ({"model": ("net", "head", "critic"), "critic": ("critic",)}, r"of two players \['critic'\]"),
        ({"model": ("net", "head", "critic", "x")}, r"not in modules\(\) \['x'\]"),
        ({"model": ("net", "head", "critic"), "idle": ()}, r"players \['idle'\] of ToyGame have no parameter"),
    ],
)
def test_players_that_do_not_fit_the_modules_are_refused(
    monkeypatch: pytest.MonkeyPatch, players: dict[str, tuple[str, ...]], message: str
) -> None:
    monkeypatch.setattr(ToyGame, "players", lambda self: players)
    with pytest.raises(ValueError, match=message):
        Trainer(build_game(), toy_config(), None)


def test_unknown_turns_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for turns in ((), ("teacher",)):
        monkeypatch.setattr(ToyObjective, "turns", lambda self, step, turns=turns: turns)
        with pytest.raises(ValueError, match=r"turns\(0\) is .* players are \('model',\)"):
            Trainer(build_toy(), toy_config(), None).train_step()
