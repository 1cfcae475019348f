"""Write the golden losses anew: `python tests/golden/make.py`, only for a change that is meant to change numbers."""

import json
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "train")]

from streamgen_train.logs import read_jsonl  # noqa: E402
from streamgen_train.loop import train  # noqa: E402
from tests.toy_objective import build_toy, toy_config  # noqa: E402


def main() -> None:
    torch.use_deterministic_algorithms(True)
    with tempfile.TemporaryDirectory() as folder:
        train(build_toy(), toy_config(), folder)
        rows = read_jsonl(Path(folder) / "log.jsonl")
    golden = {
        "environment": {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()},
        "losses": [row["loss"] for row in rows if row["kind"] == "train"],
    }
    (Path(__file__).parent / "toy_losses.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
