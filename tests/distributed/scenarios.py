"""What two processes do together, all in one pair: RANK, WORLD_SIZE and so on as torchrun sets them, and
FOLDER NAME... as arguments. What a scenario returns is kept as FOLDER/NAME.RANK.pt, an error as its text."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from streamgen.errors import UserError
from streamgen.parallel.processes import joined, leave
from streamgen_train.config import EmaConfig, LoraConfig, OptimConfig, TrainConfig
from streamgen_train.loop import NonFiniteError, train
from streamgen_train.objective import Turn
from tests.tiny_sprites import build_ar, train_config
from tests.toy_objective import ToyTowers, build_towers, build_toy, toy_config

STEPS = 6
LORA: dict[str, Any] = {"lora": {"tower": LoraConfig(rank=2), "critic": LoraConfig(rank=3)}}


def towers_config(sharding: str = "auto", **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "max_steps": STEPS,
        "accumulate": 4,
        "sharding": sharding,
        "optim": OptimConfig(kind="muon", newton_schulz="fp32", grad_clip=0.5),
        "optim_of": {"critic": {"kind": "adamw", "lr": 3e-3}},
        "ema": EmaConfig(decay=0.8, warmup=2.0),
        "process_timeout_s": 60.0,
        "validate_every": 4,
    }
    return toy_config(**(values | changes))


def towers(folder: Path, sharding: str, resume: str = "auto", seed: int = 0, **changes: Any) -> list[int]:
    """-> the exit steps that this process drew."""
    objective = build_towers(seed)
    train(objective, towers_config(sharding, **changes), folder, resume=resume)
    return objective.exits


def ar(folder: Path, sharding: str, recompute: int | str = "auto", **changes: Any) -> None:
    """The real transformer, whose text is encoded outside its forward; "auto" measures and recomputes nothing here."""
    values = {
        "max_steps": 3,
        "accumulate": 2,
        "sharding": sharding,
        "optim": OptimConfig(kind="muon", newton_schulz="fp32"),
    }
    train(build_ar(folder.parent / "codec", recompute=recompute), train_config(**(values | changes)), folder)


def asked_to_stop(folder: Path, rank: int) -> tuple[str, int]:
    """Only the second process gets the signal."""

    def send(step: int, numbers: Mapping[str, float]) -> None:
        if step == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    result = train(build_towers(), towers_config(), folder / "stopped", on_progress=send)
    return result.status, result.step


def out_of_time(folder: Path, rank: int) -> tuple[str, int]:
    """Only the first one's clock counts."""
    result = train(build_towers(), towers_config(max_minutes=1e-6 if rank == 0 else None), folder / "late")
    return result.status, result.step


def not_finite(folder: Path, rank: int) -> str:
    """In one microbatch, which is the second process's."""

    class Broken(ToyTowers):
        def loss(self, batch: Any, turn: Turn, ema: Any) -> Any:
            loss, metrics = super().loss(batch, turn, ema)
            return loss * (float("nan") if (turn.step, turn.micro, turn.player) == (1, 3, "critic") else 1), metrics

    torch.manual_seed(0)
    try:
        train(Broken(), towers_config(), folder / "broken")
    except NonFiniteError as error:
        return str(error)
    return ""


def refused(folder: Path, rank: int) -> list[str]:
    """Mistakes are found before anything waits for anything."""
    found = []
    held = folder / "held"
    for config in (
        towers_config(accumulate=3),
        towers_config(sharding="none"),
        toy_config(sharding="fsdp2", accumulate=2),
    ):
        try:
            train(build_toy() if config.sharding == "fsdp2" else build_towers(), config, held)
        except ValueError as error:
            found.append(str(error))
    return found


def unlike_initial_weights(folder: Path, rank: int) -> None:
    towers(folder / "unlike", "ddp", seed=10 * rank)


def first_fails(folder: Path, rank: int) -> list[str]:
    """What only the first process does, and its error, are the same in all."""
    found = []
    with joined(False, 60.0) as processes:

        def does(error: Exception | None) -> int:
            assert processes.is_first
            if error is not None:
                raise error
            return 7

        for error in (None, UserError("a mistake"), RuntimeError("a failure"), OSError(28, "No space left")):
            try:
                found.append(str(processes.first_does(lambda error=error: does(error))))
            except Exception as caught:  # noqa: BLE001 (to be compared)
                found.append(str(caught))
    return found


SCENARIOS: dict[str, Callable[[Path, int], Any]] = {
    "ddp": lambda folder, rank: towers(folder / "ddp", "ddp"),
    "fsdp2": lambda folder, rank: towers(folder / "fsdp2", "fsdp2"),
    "fsdp2_bf16": lambda folder, rank: towers(folder / "fsdp2_bf16", "fsdp2", precision="bf16"),
    "ddp_bf16": lambda folder, rank: towers(folder / "ddp_bf16", "ddp", precision="bf16"),
    "ar_ddp": lambda folder, rank: ar(folder / "ar_ddp", "ddp"),
    "ar_fsdp2": lambda folder, rank: ar(folder / "ar_fsdp2", "fsdp2"),
    "ar_recomputed": lambda folder, rank: ar(folder / "ar_recomputed", "fsdp2", recompute=1),
    "one_to_ddp": lambda folder, rank: towers(folder / "one_to_ddp", "ddp", str(folder / "half"), seed=5),
    "one_to_fsdp2": lambda folder, rank: towers(folder / "one_to_fsdp2", "fsdp2", str(folder / "half"), seed=5),
    "half_ddp": lambda folder, rank: towers(folder / "half_ddp", "ddp", max_steps=3),
    "half_fsdp2": lambda folder, rank: towers(folder / "half_fsdp2", "fsdp2", max_steps=3),
    "ddp_to_fsdp2": lambda folder, rank: towers(folder / "ddp_to_fsdp2", "fsdp2", str(folder / "half_ddp"), seed=5),
    "lora_ddp": lambda folder, rank: towers(folder / "lora_ddp", "ddp", **LORA),
    "lora_fsdp2": lambda folder, rank: towers(folder / "lora_fsdp2", "fsdp2", **LORA),
    "lora_across": lambda folder, rank: towers(folder / "lora_across", "fsdp2", str(folder / "lora_half"), 5, **LORA),
    "asked_to_stop": asked_to_stop,
    "out_of_time": out_of_time,
    "not_finite": not_finite,
    "refused": refused,
    "unlike": unlike_initial_weights,
    "first_fails": first_fails,
}


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    with joined(False, 60.0):
        for name in names:
            try:
                result = {"result": SCENARIOS[name](folder, rank)}
            except Exception:  # noqa: BLE001 (the test shows it)
                result = {"error": traceback.format_exc()}
            torch.save(result, folder / f"{name}.{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave(0)
