"""Write the golden losses anew: `python tests/golden/make.py`, only for a change that is meant to change numbers."""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "train")]

from streamgen_train.loop import train  # noqa: E402
from tests.runs import GOLDEN, environment, losses  # noqa: E402
from tests.tiny_sprites import build_ar, save_codec, train_config  # noqa: E402
from tests.toy_objective import build_toy, toy_config  # noqa: E402


def toy(folder: Path) -> None:
    train(build_toy(), toy_config(), folder)


def ar(folder: Path) -> None:
    train(build_ar(save_codec(folder / "codec")), train_config(), folder)


RUNS: dict[str, Callable[[Path], None]] = {"toy": toy, "ar": ar}


def main() -> None:
    torch.use_deterministic_algorithms(True)
    for name, run in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            run(Path(folder))
            golden = {"environment": environment(), "losses": losses(Path(folder))}
        (GOLDEN / f"{name}_losses.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
