"""`streamgen train experiment=NAME key=value ...`: compose the config, build the objective, run the
loop.

Hydra composes the groups; running, exit codes and messages are ours, so @hydra.main (which owns
sys.argv, logging and the working directory) is not used. Exit codes: 0 done, 1 failed, 2 the user's
mistake, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from streamgen.errors import UserError
from streamgen.parallel.processes import ProcessError, leave, rank_from_environment, started_by_torchrun
from streamgen.resources import configs_dir
from streamgen_train.checkpoint import CheckpointError
from streamgen_train.config import RunConfig, from_dict, nearest
from streamgen_train.dry_run import costs_table
from streamgen_train.loop import NonFiniteError, train

OBJECTIVES = {
    "codec": "streamgen_train.objectives.codec",
    "bidirectional": "streamgen_train.objectives.bidirectional",
    "ar": "streamgen_train.objectives.ar",
    "df": "streamgen_train.objectives.df",
    "moving_buffer": "streamgen_train.objectives.moving_buffer",
}
"""objective.name -> module with a dataclass `Config` and `build(config: Config) -> Objective`."""
ROOT_CONFIG = "run"


def run(argv: list[str], kind: str = "train", objectives: Mapping[str, str] = OBJECTIVES) -> int:
    """The command `streamgen KIND`; `argv` are Hydra overrides. Returns the exit code."""
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(usage(kind))
        return 0 if argv else 2
    return exit_code(lambda: _run(compose(argv, kind), kind, objectives), kind)


def exit_code(call: Callable[[], int], kind: str) -> int:
    """What a command returns, with one line on stderr for what may go wrong in it. Of several processes the first
    speaks for all; but each may be the only one left to say that another is lost.
    """
    speaks = rank_from_environment() == 0
    code, line = 1, ""
    try:
        code = call()
    except UserError as error:
        code, line = 2, str(error)
    except (NonFiniteError, CheckpointError) as error:
        line = str(error)
    except ProcessError as error:
        line, speaks = str(error), True
    except KeyboardInterrupt:  # outside the loop, or the second one inside it
        code, line = 130, "interrupted; the last checkpoint stands"
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            line = f"{error}: the disk is full; the last checkpoint stands. Make room, and start again to continue"
        elif started_by_torchrun():
            line, speaks = traceback.format_exc(), True
        else:
            raise
    if speaks and line:
        print(f"streamgen {kind}: {line}", file=sys.stderr)
    if started_by_torchrun():
        leave(code)
    return code


def _run(composed: dict[str, Any], kind: str, objectives: Mapping[str, str]) -> int:
    config = from_dict(RunConfig, composed)
    settings = dict(config.objective)
    name = settings.pop("name", None)
    if name not in objectives:
        raise UserError(
            f"experiment {config.experiment!r} has objective {name!r}, "
            f"which is not one of `streamgen {kind}`: {', '.join(objectives)}"
        )
    module = importlib.import_module(objectives[name])
    objective_config = from_dict(module.Config, settings, "objective")
    torch.manual_seed(config.train.seed)
    if config.dry_run:
        with torch.device("meta"):
            objective = module.build(objective_config)
        print(costs_table(config, objective))
        return 0
    objective = module.build(objective_config)
    resolved = {
        **dataclasses.asdict(config),
        "objective": {"name": name, **dataclasses.asdict(objective_config)},
    }
    speaks = rank_from_environment() == 0
    if speaks:
        print(f"run folder: {config.run_dir}", flush=True)
    result = train(objective, config.train, config.run_dir, resume=config.resume, resolved=resolved)
    if speaks:
        ending = {"done": "done", "time": "stopped by train.max_minutes", "interrupted": "interrupted"}[result.status]
        print(f"{ending} at step {result.step}: {result.checkpoint}")
    return 130 if result.status == "interrupted" else 0


def groups(root: Path) -> dict[str, list[str]]:
    """Config group -> names in it."""
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(root.iterdir())
        if folder.is_dir()
    }


def usage(kind: str) -> str:
    experiments = groups(configs_dir()).get("experiment", [])
    return (
        f"streamgen {kind} experiment=NAME [key=value ...]\n"
        f"  experiments: {', '.join(experiments)}\n"
        "  run_dir=DIR         the run's folder (default runs/NAME); continues a run that is there\n"
        "  resume=never|PATH   refuse a folder with checkpoints, or continue the run or the\n"
        "                      checkpoint at PATH in a new folder\n"
        "  dry_run=true        build on the meta device and print parameters and costs\n"
        "  train.KEY=VALUE     see configs/train and train/streamgen_train/config.py\n"
        f"  several processes:  torchrun --nproc-per-node N -m streamgen {kind} experiment=NAME ..."
    )


def compose(argv: list[str], kind: str) -> dict[str, Any]:
    """Groups by Hydra, then values; values may set keys that no YAML mentions (the dataclasses
    refuse unknown ones).
    """
    try:
        import hydra
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.errors import HydraException
    except ImportError:
        raise UserError(f"streamgen {kind} needs hydra-core: pip install 'streamgen[train]'") from None
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    root = configs_dir()
    known = groups(root)
    try:
        overrides = OverridesParser.create().parse_overrides(argv)
        chosen: list[Any] = []
        values: list[Any] = []
        for override in overrides:
            if override.is_sweep_override() or override.is_delete():
                raise UserError(f"{override.input_line!r}: sweeps and deletions are not possible; use key=value")
            (chosen if override.key_or_group in known else values).append(override)
        _check_choices([(o.key_or_group, str(o.value())) for o in chosen], known, kind)
        with hydra.initialize_config_dir(str(root), version_base="1.3"):
            config = hydra.compose(ROOT_CONFIG, [str(o.input_line) for o in chosen])
        OmegaConf.set_struct(config, False)
        config.experiment = next(str(o.value()) for o in chosen if o.key_or_group == "experiment")
        for override in values:
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True, force_add=True)
        composed = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(" ".join(str(error).split())) from error
    if not isinstance(composed, dict):
        raise UserError(f"{root / ROOT_CONFIG}.yaml is not a group of keys")
    return {str(key): value for key, value in composed.items()}


def _check_choices(chosen: list[tuple[str, str]], known: dict[str, list[str]], kind: str) -> None:
    for group, name in chosen:
        if name not in known[group]:
            raise UserError(f"no {group} {name!r}{nearest(name, known[group])} Allowed: {', '.join(known[group])}")
    if "experiment" not in dict(chosen):
        raise UserError(f"name an experiment: streamgen {kind} experiment=NAME ({', '.join(known['experiment'])})")
