"""`streamgen train experiment=NAME key=value ...`: compose the config, build the objective, run the
loop.

Hydra composes the groups; running, exit codes and messages are ours, so @hydra.main (which owns
sys.argv, logging and the working directory) is not used. Exit codes: 0 done, 1 failed, 2 the user's
mistake, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamgen.errors import UserError
from streamgen.resources import configs_dir
from streamgen_train.config import RunConfig, from_dict, nearest
from streamgen_train.loop import NonFiniteError, train
from streamgen_train.objective import Objective

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
    try:
        return _run(compose(argv, kind), kind, objectives)
    except UserError as error:
        print(f"streamgen {kind}: {error}", file=sys.stderr)
        return 2
    except NonFiniteError as error:
        print(f"streamgen {kind}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # outside the loop, or the second one inside it
        print(f"streamgen {kind}: interrupted; the last checkpoint stands", file=sys.stderr)
        return 130


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
    print(f"run folder: {config.run_dir}", flush=True)
    result = train(objective, config.train, config.run_dir, resume=config.resume, resolved=resolved)
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
        "  train.KEY=VALUE     see configs/train and train/streamgen_train/config.py"
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


def costs_table(config: RunConfig, objective: Objective) -> str:
    """Parameters and bytes of a run, counted on meta tensors."""
    modules = objective.modules()
    lines = [f"experiment {config.experiment}: nothing was allocated or trained"]
    trainable = total = 0
    for name, module in modules.items():
        count, train_count = _count(module)
        total, trainable = total + count, trainable + train_count
        lines.append(f"  {name:<24} {count / 1e6:10.3f} M parameters, {train_count / 1e6:.3f} M trained")
    weight_bytes = 2 if config.train.precision == "bf16" else 4
    moments = 8 if config.train.optim.kind == "adamw" else 4  # Muon keeps one moment; its AdamW share is small
    masters = 4 if config.train.precision == "bf16" else 0
    state = total * weight_bytes + trainable * (weight_bytes + masters + moments + 4)
    checkpoint = 4 * total + trainable * (4 + moments)
    rows = {
        "total (M parameters)": total / 1e6,
        "trained (M parameters)": trainable / 1e6,
        "weights, gradients, moments, EMA (MB)": state / 1e6,
        "one checkpoint (MB)": checkpoint / 1e6,
        "released in fp16 (MB)": total * 2 / 1e6,
        "clips in all": config.train.max_steps * config.train.accumulate * objective.clips_per_batch,
        **objective.costs(),
    }
    lines += [f"  {name:<42} {value:,.3f}" for name, value in rows.items()]
    return "\n".join(lines)


def _count(module: nn.Module) -> tuple[int, int]:
    """Parameters in all and those that are trained."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)
