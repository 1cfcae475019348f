"""`streamgen convert RUN DST`: the averaged weights of a run as a model folder (or, of a codec run, a codec folder)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

import torch

from streamgen.errors import UserError
from streamgen_train.checkpoint import load_into
from streamgen_train.config import from_dict
from streamgen_train.objective import Objective


def run(argv: list[str], objectives: Mapping[str, str]) -> int:
    """The command `streamgen convert RUN DST`; returns the exit code."""
    source, target = map(Path, argv)
    print(f"{export(source, target, objectives)}: converted from {source}")
    return 0


def export(run_dir: Path, folder: Path, objectives: Mapping[str, str]) -> Path:
    """Write what the newest checkpoint of `run_dir` made to `folder`; refuses a folder that holds something else."""
    config_file = run_dir / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no config.yaml")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; name a new folder, or remove it first")
    objective = build_objective(config_file, objectives)
    modules = objective.modules()
    load_into(run_dir, modules)
    for module in modules.values():
        module.eval().requires_grad_(False)
    with torch.no_grad():
        objective.export(modules, folder)
    return folder


def build_objective(config_file: Path, objectives: Mapping[str, str]) -> Objective:
    """The objective of a run, from its resolved config."""
    from omegaconf import OmegaConf

    settings = OmegaConf.to_container(OmegaConf.load(config_file), resolve=True)
    if not isinstance(settings, dict) or not isinstance(settings.get("objective"), dict):
        raise UserError(f"{config_file} is not the config of a run")
    values = dict(settings["objective"])
    name = values.pop("name", None)
    if name not in objectives:
        raise UserError(f"{config_file} names the objective {name!r}; known: {', '.join(objectives)}")
    module = importlib.import_module(objectives[name])
    objective = module.build(from_dict(module.Config, values, "objective"))
    assert isinstance(objective, Objective)
    return objective
