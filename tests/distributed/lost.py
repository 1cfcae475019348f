"""Two processes, the second of which is lost at step 6: RUN_DIR, and a signal that it sends itself, or error."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from streamgen_train.loop import train
from streamgen_train.main import exit_code
from tests.toy_objective import build_toy, toy_config


def lose(step: int, numbers: Mapping[str, float]) -> None:
    if step == 6 and os.environ["RANK"] == "1":
        if sys.argv[2] == "error":
            raise ValueError("out of words")
        os.kill(os.getpid(), int(sys.argv[2]))


def run() -> int:
    config = toy_config(accumulate=2, process_timeout_s=2.0, validate_every=0, sample_every=0)
    train(build_toy(), config, Path(sys.argv[1]), on_progress=lose)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(run, "train"))
