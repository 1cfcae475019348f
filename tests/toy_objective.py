"""A regression small enough to train in a test; as a script, one run of it: RUN_DIR MAX_STEPS [KILL_AT_STEP]."""

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from streamgen_train.config import CheckpointConfig, EmaConfig, LogConfig, OptimConfig, ScheduleConfig, TrainConfig
from streamgen_train.loop import train
from streamgen_train.objective import Objective, Turn


@dataclass(kw_only=True)
class Config:
    width: int = 16
    kind: Literal["sine", "other"] = "sine"


class ToyObjective(Objective):
    """Learn sin(x W) with a network whose middle goes to Muon; noise from both generators that the loop seeds."""

    clips_per_batch = 8

    def __init__(self, width: int = 16) -> None:
        self.net = nn.ModuleDict(
            {"blocks": nn.ModuleList([nn.Linear(12, width), nn.Linear(width, 12)]), "norm": nn.LayerNorm(12)}
        )
        self.head = nn.Linear(12, 4)
        self.head.register_buffer("seen", torch.zeros(()))

    def modules(self) -> dict[str, nn.Module]:
        return {"net": self.net, "head": self.head}

    def batch(self, turn: Turn) -> Tensor:
        return torch.randn(8, 12, generator=turn.rng).to(self.device, self.dtype)

    def predict(self, modules: Mapping[str, nn.Module], x: Tensor) -> Tensor:
        net = modules["net"]
        assert isinstance(net, nn.ModuleDict)
        first, second = net["blocks"].children()
        return modules["head"](net["norm"](second(torch.relu(first(x)))))

    def loss(self, batch: Tensor, turn: Turn, ema: Mapping[str, nn.Module] | None) -> tuple[Tensor, dict[str, Tensor]]:
        out = self.predict(self.modules(), batch + 0.1 * torch.randn_like(batch)).float()
        error = out - batch[:, :4].float().sin()
        if ema is not None:
            error = error + 0.1 * (out - self.predict(ema, batch).float())
        return error.square().mean(), {"mae": error.detach().abs().mean()}

    def after_step(self, step: int) -> None:
        self.head.get_buffer("seen").add_(1)

    def validate(self, step: int, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        x = torch.randn(32, 12).to(self.device, self.dtype)
        return {"error": float((self.predict(modules, x).float() - x[:, :4].float().sin()).square().mean())}

    def sample(self, step: int, modules: Mapping[str, nn.Module]) -> dict[str, np.ndarray]:
        torch.rand(3)  # pictures use random numbers; training must not notice
        return {"grey": np.full((4, 6, 3), 128, np.uint8)}


class ToyGame(ToyObjective):
    """Two players: a critic learns what the model's error is, at every step; the model learns at every third."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.critic = nn.Linear(12, 4)

    def modules(self) -> dict[str, nn.Module]:
        return {**super().modules(), "critic": self.critic}

    def players(self) -> dict[str, tuple[str, ...]]:
        return {"model": ("net", "head"), "critic": ("critic",)}

    def turns(self, step: int) -> tuple[str, ...]:
        return ("model", "critic") if step % 3 == 0 else ("critic",)

    def loss(self, batch: Tensor, turn: Turn, ema: Mapping[str, nn.Module] | None) -> tuple[Tensor, dict[str, Tensor]]:
        error = self.predict(self.modules(), batch).float() - batch[:, :4].float().sin()
        told = self.critic(batch).float()
        loss = (
            error.square().mean() + 0.1 * (error * told).mean() if turn.player == "model" else (told - error).square()
        )
        return loss.mean(), {"told": told.detach().mean()}


class Tower(nn.Module):
    """Blocks, and something around them: what FSDP puts in shards. Seven rows do not divide by two."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 7)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(7, 7), nn.ReLU()) for _ in range(2)])
        self.norm = nn.LayerNorm(7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)


class ToyTowers(ToyGame):
    """The game with a tower for the model and one for the critic, through which the model's gradient goes; the head is
    whole in every process. Streams of numbers live on, one for each microbatch.
    """

    needs_ema = True

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.critic_tower, self.top = Tower(), Tower(), nn.Linear(7, 4)
        self.streams: dict[int, Tensor] = {}
        self.exits: list[int] = []

    def modules(self) -> dict[str, nn.Module]:
        return {"tower": self.tower, "head": self.top, "critic": self.critic_tower}

    def players(self) -> dict[str, tuple[str, ...]]:
        return {"model": ("tower", "head"), "critic": ("critic",)}

    def batch(self, turn: Turn) -> Tensor:
        before = self.streams.get(turn.micro, torch.zeros(12))
        self.streams[turn.micro] = 0.5 * before + torch.randn(12, generator=turn.rng)
        self.exits.append(int(torch.randint(1000, (), generator=turn.shared)))
        return super().batch(turn) + 0.1 * self.streams[turn.micro].to(self.device, self.dtype)

    def predict(self, modules: Mapping[str, nn.Module], x: Tensor) -> Tensor:
        return modules["head"](modules["tower"](x))

    def features(self, x: Tensor) -> Tensor:
        """What the critic's last block says; the output of the tower, and its norm, are not used."""
        found: list[Tensor] = []
        hook = self.critic_tower.blocks[-1].register_forward_hook(lambda module, given, output: found.append(output))
        self.critic_tower(x)
        hook.remove()
        return found[0]

    def loss(self, batch: Tensor, turn: Turn, ema: Mapping[str, nn.Module] | None) -> tuple[Tensor, dict[str, Tensor]]:
        assert ema is not None
        out = self.predict(self.modules(), batch + 0.1 * torch.randn_like(batch)).float()
        told = self.features(torch.cat([out.to(batch.dtype)] * 3, 1)).float()[:, :4]
        with torch.no_grad():
            average = self.predict(ema, batch).float()
        error = out - batch[:, :4].float().sin() + 0.1 * (out - average)
        if turn.player == "model":
            return (error.square() + 0.1 * told).mean(), {"told": told.detach().mean()}
        return (told - error.detach()).square().mean(), {f"micro_{turn.micro}": told.detach().mean()}

    def state_dict(self) -> dict[Any, Any]:
        return {**self.streams, "kind": "streams"}

    def load_state_dict(self, state: Mapping[Any, Any]) -> None:
        self.streams = {key: value for key, value in state.items() if isinstance(key, int)}


def toy_config(**changes: Any) -> TrainConfig:
    """A row of the log at every step, a checkpoint at every fifth."""
    values: dict[str, Any] = {
        "max_steps": 30,
        "validate_every": 10,
        "sample_every": 15,
        "optim": OptimConfig(kind="muon", newton_schulz="fp32"),
        "schedule": ScheduleConfig(warmup_steps=5, decay_steps=10),
        "ema": EmaConfig(decay=0.9),
        "log": LogConfig(every=1, curves=False),
        "checkpoint": CheckpointConfig(every=5, best="error"),
    }
    return TrainConfig(**(values | changes))


def build(config: Config) -> ToyObjective:
    """The door of an objective's module."""
    return ToyObjective(config.width)


def build_towers(seed: int = 0) -> ToyTowers:
    torch.manual_seed(seed)
    return ToyTowers()


def build_toy(seed: int = 0) -> ToyObjective:
    torch.manual_seed(seed)
    return ToyObjective()


if __name__ == "__main__":
    kill_at = int(sys.argv[3]) if len(sys.argv) > 3 else None

    def kill(step: int, numbers: Mapping[str, float]) -> None:
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.use_deterministic_algorithms(True)
    print(train(build_toy(), toy_config(max_steps=int(sys.argv[2])), sys.argv[1], on_progress=kill))
