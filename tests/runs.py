"""What training runs wrote, read back for comparison."""

import json
from pathlib import Path

import pytest
import torch

from streamgen_train.logs import read_jsonl
from streamgen_train.objective import Turn

GOLDEN = Path(__file__).parent / "golden"
TIMES = ("step_s", "clips_per_s", "steps_per_s", "elapsed_s", "tokens_per_s", "tflop_per_s", "mfu")


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_jsonl(run_dir / "log.jsonl") if row["kind"] == "train"]


def curve(run_dir: Path) -> list[dict[str, float]]:
    """Everything logged but the times."""
    rows = read_jsonl(run_dir / "log.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMES and not k.startswith("share_")} for row in rows]


def assert_equal_states(a: object, b: object, path: str = "") -> None:
    """Two checkpoints are equal to the bit, but for the times."""
    assert type(a) is type(b), path
    if isinstance(a, dict) and isinstance(b, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key not in TIMES:
                assert_equal_states(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        assert len(a) == len(b), path
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_equal_states(*pair, f"{path}[{index}]")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def environment() -> dict[str, str]:
    """What the last bits of a run depend on."""
    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}


def assert_golden(name: str, run_dir: Path) -> None:
    """To the last bit where the file was made (same torch and vector instructions), to 1e-5 elsewhere."""
    golden = json.loads((GOLDEN / f"{name}_losses.json").read_text())
    tolerance = 0.0 if environment() == golden["environment"] else 1e-5
    assert losses(run_dir) == pytest.approx(golden["losses"], rel=tolerance, abs=0.0)


def turn(step: int = 0, seed: int = 0, player: str = "model") -> Turn:
    """A turn as the loop would make it, with generators of this seed."""
    return Turn(step, torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1), player)
