"""LoRA: what learns, what a checkpoint holds, and that the rest of the project sees ordinary weights."""

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from streamgen.errors import UserError
from streamgen.pipeline import StreamPipeline
from streamgen_train import checkpoint
from streamgen_train.config import LoraConfig, OptimConfig, TrainConfig, from_dict
from streamgen_train.export import export
from streamgen_train.loop import Trainer, train
from streamgen_train.main import OBJECTIVES
from streamgen_train.objective import Objective, Turn
from streamgen_train.objectives import ar
from streamgen_train.optim import lr_factor
from streamgen_train.seeds import step_seed
from tests.runs import assert_equal_states, curve, losses
from tests.tiny_sprites import ar_values, build_ar, save_codec, spread, train_config
from tests.toy_objective import Tower, build_towers, toy_config

LORA = {"tower": LoraConfig(rank=2, alpha=6.0)}


class Regression(Objective):
    """A tower and a head, nothing else."""

    def __init__(self) -> None:
        self.tower, self.head = Tower(), nn.Linear(7, 4)

    def modules(self) -> dict[str, nn.Module]:
        return {"tower": self.tower, "head": self.head}

    def batch(self, turn: Turn) -> Tensor:
        return torch.randn(8, 12, generator=turn.rng).to(self.device, self.dtype)

    def loss(self, batch: Tensor, turn: Turn, ema: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return (self.head(self.tower(batch)).float() - batch[:, :4].float().sin()).square().mean(), {}


def build(seed: int = 0) -> Regression:
    torch.manual_seed(seed)
    return Regression()


def lora_config(**changes: Any) -> TrainConfig:
    values = {"lora": LORA, "validate_every": 0, "sample_every": 0, "max_steps": 8, "optim": OptimConfig(lr=1e-2)}
    return toy_config(**(values | changes))


def test_adapters_learn_as_the_low_rank_update_written_out() -> None:
    """W + alpha / rank B A with W frozen; of a module without LoRA everything learns."""
    config, twin = lora_config(), build()
    trainer = Trainer(build(), config)
    adapters, head = (
        {},
        {f"head.{name}": p.detach().clone().requires_grad_() for name, p in twin.head.named_parameters()},
    )
    for block in (0, 1):
        for side in "AB":
            name = f"tower.blocks.{block}.0.lora_{side}.default.weight"
            adapters[name] = trainer.masters.tensors[name].detach().clone().requires_grad_()
            assert bool(adapters[name].any()) is (side == "A")
    assert set(trainer.masters.tensors) == {*adapters, *head}
    matrices = [*adapters.values(), head["head.weight"]]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": [head["head.bias"]], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-8)
    weights = {name: p.detach() for name, p in twin.tower.named_parameters()}
    for step in range(6):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step_seed(0, step, 0)))
        changed = dict(weights)
        for block in (0, 1):
            down, up = (adapters[f"tower.blocks.{block}.0.lora_{side}.default.weight"] for side in "AB")
            changed[f"blocks.{block}.0.weight"] = weights[f"blocks.{block}.0.weight"] + 3.0 * up @ down
        out = functional_call(twin.tower, changed, (x,))
        loss = (out @ head["head.weight"].T + head["head.bias"] - x[:, :4].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*matrices, head["head.bias"]], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * lr_factor(step, 8, config.schedule)
        optimizer.step()
        assert trainer.train_step()["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, tensor in {**adapters, **head}.items():
        torch.testing.assert_close(trainer.masters.tensors[name].detach(), tensor.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_adapters_learn_are_averaged_and_kept(tmp_path: Path, precision: str) -> None:
    objective = build()
    before = {name: tensor.clone() for name, tensor in objective.tower.state_dict().items()}
    train(objective, lora_config(precision=precision), tmp_path)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    for name, tensor in objective.tower.state_dict().items():
        if "lora" not in name:
            assert torch.equal(tensor, before[name.replace(".base_layer", "")].to(dtype)), name
    state = checkpoint.load(checkpoint.find(tmp_path))
    assert all(".lora_" in name for name in state["modules"]["tower"]) and len(state["modules"]["tower"]) == 4
    assert {name.split(".")[0] for name in state["ema"]["shadow"]} == {"tower", "head"}
    assert not any("base_layer" in name for name in [*state["ema"]["shadow"], *state["optim"]["adamw"]])
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["base", "step_00000005", "step_00000008"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_merged_weights_are_the_adapted_model(tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The averaged ones and the last ones, in a model that knows nothing of LoRA, without peft."""
    objective = build()
    train(objective, lora_config(precision=precision), tmp_path)
    trainer = Trainer(build(seed=3), lora_config(precision=precision), checkpoint.open_saved(checkpoint.find(tmp_path)))
    x = torch.randn(5, 12)
    monkeypatch.setitem(sys.modules, "peft", None)
    tolerance = 1e-6 if precision == "fp32" else 5e-2
    for ema, adapted in ((True, trainer.ema.refresh()["tower"]), (False, objective.tower)):
        plain = Tower()
        plain.load_state_dict(checkpoint.load_modules(tmp_path, ema=ema)["tower"])
        assert not torch.allclose(plain(x), build().tower(x), rtol=0, atol=1e-3)
        out = adapted(x.to(adapted.norm.weight.dtype)).float()
        torch.testing.assert_close(out, plain(x), rtol=0, atol=tolerance)
    fresh = build(seed=8)
    checkpoint.load_into(tmp_path, fresh.modules())
    assert_equal_states(dict(fresh.tower.state_dict()), checkpoint.load_modules(tmp_path)["tower"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_exact(tmp_path: Path, precision: str) -> None:
    """From other initial weights: those under the adapters come from the run folder too."""
    train(build(), lora_config(precision=precision), tmp_path / "whole")
    train(build(), lora_config(precision=precision, max_steps=5), tmp_path / "cut")
    objective = build(seed=9)
    train(objective, lora_config(precision=precision), tmp_path / "cut")
    train(build(seed=9), lora_config(precision=precision), tmp_path / "other", resume=str(tmp_path / "cut"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    folders = [checkpoint.find(tmp_path / run) for run in ("cut", "whole")]
    assert_equal_states(*map(checkpoint.load, folders))
    for ema in (True, False):
        assert_equal_states(*(checkpoint.load_modules(folder, ema=ema) for folder in folders))
    kept = build().tower.blocks[0][0].weight
    assert torch.equal(objective.tower.blocks[0][0].base_layer.weight, kept.to(objective.dtype))


def test_two_players_each_with_adapters(tmp_path: Path) -> None:
    """Student and critic, as in streaming long tuning."""
    lora = {"tower": LoraConfig(rank=1), "critic": LoraConfig(rank=2, targets=("0",))}
    train(build_towers(), lora_config(lora=lora, max_steps=4), tmp_path)
    state = checkpoint.load(checkpoint.find(tmp_path))
    assert list(state["modules"]["critic"]) == [
        f"blocks.{i}.0.lora_{side}.default.weight" for i in (0, 1) for side in "AB"
    ]
    assert state["ema"]["updates"] == {"model": 2, "critic": 4}
    assert checkpoint.load_modules(tmp_path)["critic"].keys() == build_towers().critic_tower.state_dict().keys()


def test_a_folder_moved_without_its_base_is_refused(tmp_path: Path) -> None:
    train(build(), lora_config(max_steps=5), tmp_path)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step_00000005", tmp_path / "alone" / "step_00000005")
    with pytest.raises(UserError, match=r"holds LoRA adapters, and the weights that they belong to are not in .*/base"):
        checkpoint.load_modules(tmp_path / "alone" / "step_00000005")
    meta = json.loads((folder / "base" / "meta.json").read_text())
    (folder / "base" / "meta.json").write_text(json.dumps(meta | {"fingerprint": "another"}))
    with pytest.raises(UserError, match=r"base holds other weights than those that the LoRA adapters of .* belong to"):
        train(build(), lora_config(), tmp_path)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            LORA,
            {},
            r"was made with train\.lora=\{'tower'.*, and not with nothing: set it as it was, or start a new run",
        ),
        ({}, LORA, r"was made with train\.lora=nothing, and not with \{'tower'"),
        (LORA, {"tower": LoraConfig(rank=3)}, r"'rank': 2, .*, and not with .*'rank': 3"),
    ],
)
def test_another_lora_cannot_go_on(tmp_path: Path, first: Any, second: Any, message: str) -> None:
    train(build(), lora_config(lora=first, max_steps=1), tmp_path)
    with pytest.raises(UserError, match=message):
        train(build(), lora_config(lora=second), tmp_path)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"towr": {}}, r"train\.lora names the module 'towr'; did you mean 'tower'\? Modules that train: tower, head"),
        ({"head": {}}, r"train\.lora\.head: this module has no Linear layers in blocks"),
        ({"tower": {"rank": 0}}, r"train\.lora\.tower: rank is 0, but must be at least 1"),
        ({"tower": {"targets": []}}, r"train\.lora\.tower: targets is empty"),
        ({"tower": {"rnk": 4}}, r"unknown key 'train\.lora\.tower\.rnk'; did you mean 'rank'"),
    ],
)
def test_mistakes_are_named(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(build(), from_dict(TrainConfig, {"lora": lora}, "train"))


def test_lora_without_peft_is_a_clear_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"train\.lora needs the package peft"):
        Trainer(build(), lora_config())


# The transformer.


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_codec(tmp_path_factory.mktemp("codec"))


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (None, 10),
        (("self_attn",), 4),
        (("q", "ffn.0"), 3),
        (("cross_attn.v", "v"), 2),
        (("ffn",), 2),
    ],
)
def test_targets_in_the_transformer(codec: Path, targets: tuple[str, ...] | None, found: int) -> None:
    trainer = Trainer(build_ar(codec), train_config(lora={"transformer": LoraConfig(rank=2, targets=targets)}))
    names = [name for name in trainer.masters.tensors if name.startswith("transformer.")]
    assert len(names) == 2 * 2 * found  # two blocks, A and B
    assert all(name.startswith("transformer.blocks.") and ".lora_" in name for name in names)


@pytest.mark.parametrize("target", ["self_atn.q", "attn", "blocks.0", ""])
def test_unknown_targets_are_listed_with_the_allowed(codec: Path, target: str) -> None:
    with pytest.raises(
        UserError, match=rf"targets has '{target}'.* Layers in a block: self_attn\.q, self_attn\.k, .*ffn"
    ):
        Trainer(build_ar(codec), train_config(lora={"transformer": LoraConfig(targets=("q", target))}))


def test_a_lora_run_becomes_a_model_and_the_start_of_another(codec: Path, tmp_path: Path) -> None:
    """convert and init_from see ordinary weights; those that were not adapted are what they were."""
    config = ar.Config(**ar_values(codec))
    torch.manual_seed(0)
    objective = ar.build(config)
    spread(*objective.modules().values(), std=0.1)
    before = {name: tensor.clone() for name, tensor in objective.model.state_dict().items()}
    settings = {"objective": {"name": "ar", **asdict(config)}}
    lora = {"transformer": LoraConfig(rank=2, targets=("self_attn", "ffn"))}
    train(objective, train_config(max_steps=3, lora=lora), tmp_path / "run", resolved=settings)

    merged = checkpoint.load_modules(tmp_path / "run")["transformer"]
    assert merged.keys() == before.keys()
    moved = {name for name, tensor in merged.items() if not torch.equal(tensor, before[name])}
    assert moved == {
        n for n in before if "blocks" in n and n.endswith("weight") and ("self_attn" in n or "ffn" in n)
    } - {n for n in before if "norm" in n}
    pipe = StreamPipeline.from_pretrained(export(tmp_path / "run", tmp_path / "model", OBJECTIVES), dtype="fp32")
    for name, tensor in pipe.transformer.state_dict().items():
        assert torch.equal(tensor, merged[name].half().float()), name
    student = ar.build(ar.Config(**ar_values(codec, init_from=str(tmp_path / "run"))))
    student.prepare(torch.device("cpu"), torch.float32)
    assert_equal_states(dict(student.model.state_dict()), merged)
    rows = curve(tmp_path / "run")
    assert all(row["grad_norm"] > 0 for row in rows)
