"""The published recipes: each one is counted at its own size, and runs two steps when it is shrunk to a toy's."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from streamgen.embedded_text import EmbeddedTextConfig
from streamgen.resources import configs_dir
from streamgen_distill.main import OBJECTIVES as DISTILL
from streamgen_train.config import RunConfig, from_dict
from streamgen_train.dry_run import costs_table
from streamgen_train.loop import train
from streamgen_train.main import OBJECTIVES as TRAIN
from streamgen_train.main import compose
from streamgen_train.objectives import ar, bidirectional
from streamgen_train.videos.config import LatentConfig, SourceConfig
from tests.tiny_latents import PROMPTS, save_latents, save_text
from tests.tiny_sprites import GEOMETRY, TRANSFORMER, ar_values, save_codec, spread, train_config

RECIPES = sorted(path.stem for path in (configs_dir() / "experiment").glob("wan_*.yaml"))
WORLD = ("wan_self_forcing_gan", "wan_reward_forcing")  # these have the sprites world for data


def composed(name: str) -> tuple[str, dict[str, Any]]:
    """(its command, its config)."""
    config = compose([f"experiment={name}"], "train")
    return ("train" if config["objective"]["name"] in TRAIN else "distill"), config


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_counted_at_its_own_size(name: str) -> None:
    command, values = composed(name)
    config = from_dict(RunConfig, values)
    settings = dict(config.objective)
    module = importlib.import_module({**TRAIN, **DISTILL}[settings.pop("name")])
    with torch.device("meta"):
        objective = module.build(from_dict(module.Config, settings, "objective"))
    table = costs_table(config, objective)
    if not config.train.lora:
        assert "1418.997 M parameters, 1418.997 M trained" in table
    assert "TFLOP over all devices" in table and "s a step" in table
    assert command == ("train" if name == "wan_causal_forcing_ar" else "distill")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the recipes ask a person to bring, as small as it goes."""
    root = tmp_path_factory.mktemp("recipes")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    found = {
        "latents": str(save_latents(root / "latents", GEOMETRY, 16)),
        "prompts": str(root / "prompts.txt"),
        "text": str(save_text(root / "text.safetensors", 8, 8)),
        "codec": str(save_codec(root / "codec")),
    }
    own = {
        "codec_from": None,
        "text": EmbeddedTextConfig(file=found["text"], text_len=8, text_dim=8),
        "data": SourceConfig(latents=LatentConfig(path=found["latents"])),
        "gap_share": 0.0,
    }
    for kind, changes in (("own", own), ("world", {})):
        for name, module in (("ar", ar), ("bidirectional", bidirectional)):
            torch.manual_seed(0)
            objective = module.build(module.Config(**ar_values(root / "codec", **changes)))
            spread(objective.model)
            folder = root / kind / name
            train(objective, train_config(max_steps=1), folder)
            (folder / "config.yaml").write_text(f"objective:\n  name: {name}\n")
            found[f"{kind}/{name}"] = str(folder)
    return found


def shrink(name: str, values: dict[str, Any], world: dict[str, str]) -> dict[str, Any]:
    """The recipe with a toy's sizes and its data; everything that makes it this recipe stays."""
    o, t = values["objective"], values["train"]
    o["model"] = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(TRANSFORMER).items()}
    o["geometry"] = dataclasses.asdict(GEOMETRY) | {"patch": [1, 2, 2]}
    o["attention_backend"] = "sdpa"
    frames = GEOMETRY.block_frames  # two instead of three
    for key in ("window_frames", "sink_frames"):
        o[key] = o[key] * frames // 3
    if o.get("teacher_model"):
        o["teacher_model"] = o["model"]
    if "gan_layers" in o:
        o["gan_layers"] = [0, 1]
    kind = "world" if name in WORLD else "own"
    for key, run in (("init_from", "ar"), ("critic_from", "bidirectional")):
        if o.get(key):
            o[key] = world[f"{kind}/{run}"]
    if o.get("teacher_from"):
        o["teacher_from"] = world[f"{kind}/{'ar' if o['name'] in ('cd', 'ode') else 'bidirectional'}"]
    if o["name"] == "ode":
        o |= {"pairs": "online", "pairs_from": None, "ode_steps": 4}
    if "stream_blocks" in o:
        o["stream_blocks"] = 14
    o["text"] = {"file": world["text"], "text_len": 8, "text_dim": 8}
    if name in WORLD:
        o |= {"codec_from": world["codec"], "text": {"text_dim": 8}, "rollout_clips": 2}
    elif o["data"].get("latents"):
        o["data"] = {"latents": {"path": world["latents"]}}
    else:
        o["data"] = {"prompts": {"path": world["prompts"]}}
    for lora in t.get("lora", {}).values():
        lora |= {"rank": 2, "alpha": 2}
    t |= {"device": "cpu", "precision": "fp32", "sharding": "none", "accumulate": 1, "max_steps": 2}
    t["log"] = {"every": 1}
    return values


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_when_it_is_shrunk(name: str, world: dict[str, str], tmp_path: Path) -> None:
    config = from_dict(RunConfig, shrink(name, composed(name)[1], world))
    settings = dict(config.objective)
    module = importlib.import_module({**TRAIN, **DISTILL}[settings.pop("name")])
    torch.manual_seed(0)
    objective = module.build(from_dict(module.Config, settings, "objective"))
    result = train(objective, config.train, tmp_path)
    assert result.step == 2 and result.status == "done"
