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


def toy_config(**changes: Any) -> TrainConfig:
    """A row of the log at every step, a checkpoint at every fifth."""
    values: dict[str, Any] = {
        "max_steps": 30,
        "validate_every": 10,
        "sample_every": 15,
        "optim": OptimConfig(kind="muon", newton_schulz="fp32"),
        "schedule": ScheduleConfig(warmup_steps=5, decay_steps=10),
        "ema": EmaConfig(decay=0.9),
        "log": LogConfig(every=1),
        "checkpoint": CheckpointConfig(every=5, best="error"),
    }
    return TrainConfig(**(values | changes))


def build(config: Config) -> ToyObjective:
    """The door of an objective's module."""
    return ToyObjective(config.width)


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
