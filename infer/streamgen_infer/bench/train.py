"""`streamgen bench --suite train`: steps of the autoregressive objective (teacher forcing) on the shipped size.

The training command makes them, in a folder that is thrown away, and counts what they did; this reads its log.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamgen import resources
from streamgen_infer.errors import Failure

if TYPE_CHECKING:
    from streamgen_infer.bench.suites import Options

EXPERIMENT = "sprites_fine_ar"
WARM_UP, STEPS = 3, 8
"""Steps that compile and are not counted, and those that are, without --blocks."""
UNITS = {"step_s": "s", "tokens_per_s": "tokens/s", "tflop_per_s": "TFLOP/s", "mfu": "of a large product here"}


def train(options: Options, hand_over: Callable[[list[str]], int]) -> dict[str, Any]:
    """Medians over the steps. hand_over: `streamgen train` as a function."""
    steps = STEPS if options.blocks is None else options.blocks
    dtype = "bf16" if options.dtype == "all" else options.dtype
    with tempfile.TemporaryDirectory(prefix="streamgen-bench-") as folder:
        run_dir = Path(folder) / "run"
        code = hand_over([*overrides(options.threads, steps, dtype), f"run_dir={run_dir}"])
        if code:
            raise Failure(f"the training command ended with exit code {code}; it said why above")
        rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    found = measured([row for row in rows if row["kind"] == "train"], steps)
    for name, unit in UNITS.items():
        print(f"{name}: {found[name]:.4g} {unit}")
    print("share of a step: " + ", ".join(f"{name} {share:.0%}" for name, share in found["shares"].items()))
    return {"dtype": dtype, "weights": "random", "experiment": EXPERIMENT, "steps": steps, **found}


def overrides(threads: int, steps: int, dtype: str) -> list[str]:
    """What the command is asked for: clips of four blocks alone, so that every step is the same work."""
    return [
        f"experiment={EXPERIMENT}",
        f"objective.codec_from={resources.model_path('sprites') / 'codec'}",
        "objective.init_from=null",
        "objective.single_share=0.0",
        "objective.single_until=0",
        f"train.precision={dtype}",
        f"train.threads={threads}",
        f"train.max_steps={WARM_UP + steps}",
        "train.log.every=1",
        "train.log.curves=false",
        "train.validate_every=0",
        "train.sample_every=0",
    ]


def measured(rows: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Medians of the last `steps` rows."""
    last = rows[-steps:]
    shares = [name for name in last[0] if name.startswith("share_")]

    def median(name: str) -> float:
        return float(statistics.median(row[name] for row in last if name in row))

    return {
        **{name: median(name) for name in (*UNITS, "clips_per_s")},
        "shares": {name.removeprefix("share_"): median(name) for name in shares},
    }
