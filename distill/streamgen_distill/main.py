"""`streamgen distill experiment=NAME key=value ...`: the run machinery of streamgen_train with the
objectives of distillation.

Self-forcing (DMD, SiD, GAN), long tuning and rewards register here as they come: one file with
`Config` and `build` each.
"""

from __future__ import annotations

from streamgen_train import main as train_main

OBJECTIVES = {
    "cd": "streamgen_distill.cd",
    "ode": "streamgen_distill.ode",
    "self_forcing": "streamgen_distill.self_forcing",
    "long": "streamgen_distill.long",
}
"""objective.name -> module with a dataclass `Config` and `build(config: Config) -> Objective`."""


def run(argv: list[str]) -> int:
    """The command `streamgen distill`; returns the exit code."""
    return train_main.run(argv, kind="distill", objectives=OBJECTIVES)
