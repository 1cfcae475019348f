"""`streamgen COMMAND`: from here on every ending has its exit code and at most one line on stderr.

0 done, 1 failed, 2 the user's mistake, 130 interrupted. Signals are caught before anything slow is imported: typer
and the commands are in app.py, torch is imported by the commands that need it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence

from streamgen.errors import UserError
from streamgen_infer.errors import Failure
from streamgen_infer.interrupts import INTERRUPTED, Interrupts

DEBUG = "STREAMGEN_DEBUG"
FAILED, MISTAKE = 1, 2
MAX_MESSAGE = 2000


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    # Read by OpenMP when torch is loaded. Its threads otherwise spin while they wait, and on a machine that is shared
    # the one that works waits for the ones that spin: 1 frame per second where this gives 31 (2 threads, busy machine).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with Interrupts().installed() as interrupts:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv), interrupts)
        except UserError as error:
            return _end(MISTAKE, str(error))
        except KeyboardInterrupt:
            return _end(INTERRUPTED, "interrupted")
        except Failure as error:
            return _end(FAILED, str(error))
        except OSError as error:
            name = f"{error.filename}: " if error.filename else ""
            return _end(FAILED, f"{name}{error.strerror or error} (errno {error.errno})")
        except Exception as error:  # noqa: BLE001 (the program's last door: whatever failed becomes one line)
            hint = "" if os.environ.get(DEBUG) else f" ({DEBUG}=1 shows where)"
            return _end(FAILED, f"{type(error).__name__}: {error}{hint}")


def _run(arguments: list[str], interrupts: Interrupts) -> int:
    from streamgen_infer.app import run

    return run(arguments, interrupts, {"train": _train, "distill": _distill, "convert": _convert, "latents": _latents})


def _train(arguments: list[str]) -> int:
    _need_hydra("train")
    from streamgen_train.main import run

    return run(arguments, "train")


def _distill(arguments: list[str]) -> int:
    _need_hydra("distill")
    from streamgen_distill.main import run

    return run(arguments)


def _convert(arguments: list[str]) -> int:
    from streamgen_distill.main import OBJECTIVES as DISTILL
    from streamgen_train.export import run
    from streamgen_train.main import OBJECTIVES as TRAIN

    return run(arguments, {**TRAIN, **DISTILL})


def _latents(arguments: list[str]) -> int:
    from streamgen_train.videos.command import run

    return run(arguments)


def _need_hydra(command: str) -> None:
    if importlib.util.find_spec("hydra") is None:
        raise UserError(f"{command} needs hydra-core, which is not installed: pip install 'streamgen[train]'")


def _end(code: int, message: str) -> int:
    """One line on stderr, whatever the message holds; the traceback only for those who ask."""
    if os.environ.get(DEBUG) and code != INTERRUPTED:
        traceback.print_exc()
    line = " ".join(message.split())
    print(f"streamgen: {line[:MAX_MESSAGE]}", file=sys.stderr)
    return code
