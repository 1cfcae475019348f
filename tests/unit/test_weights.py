"""Component folders and trees: round trips, identity, and every way a checkpoint can be wrong."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from streamgen import weights
from streamgen.errors import UserError
from streamgen.weights import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Unfilled,
    build_config,
    fingerprint,
    load_component,
    load_tree,
    load_weights,
    save_component,
    save_tree,
)


def small() -> nn.Module:
    return nn.ModuleDict(
        {
            "blocks": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(3, 3), "norm": nn.LayerNorm(3)}) for _ in range(4)),
            "head": nn.Linear(3, 2),
        }
    )


def test_round_trip_is_exact(tmp_path: Path) -> None:
    source = small()
    save_component(tmp_path / "part", {"dim": 3}, source.state_dict())
    config, tensors = load_component(tmp_path / "part")
    assert config == {"dim": 3}
    with Unfilled():
        target = small()
    load_weights(target, tensors, where="part")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    assert sorted(p.name for p in (tmp_path / "part").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_floating_tensors_take_the_dtype_and_others_keep_theirs() -> None:
    module = nn.BatchNorm1d(3)
    load_weights(module, module.state_dict(), where="part", dtype=torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16 and module.num_batches_tracked.dtype == torch.int64


def test_unfilled_modules_have_the_same_tensors_and_leave_others_alone() -> None:
    with Unfilled():
        inside = small()
    assert {n: t.shape for n, t in inside.state_dict().items()} == {n: t.shape for n, t in small().state_dict().items()}
    assert torch.equal(torch.zeros(4).normal_(0, 0), torch.zeros(4))  # outside, filling works


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_missing_and_truncated_files_are_named(tmp_path: Path, file: str) -> None:
    save_component(tmp_path, {"dim": 3}, small().state_dict())
    whole = (tmp_path / file).read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 3):
        (tmp_path / file).write_bytes(whole[:size])
        with pytest.raises(UserError, match=file):
            load_component(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        load_component(tmp_path)


def test_config_that_is_no_object(tmp_path: Path) -> None:
    save_component(tmp_path, {"dim": 3}, {})
    (tmp_path / CONFIG_FILE).write_text("[1]")
    with pytest.raises(UserError, match="JSON list"):
        load_component(tmp_path)


def test_missing_tensors_are_grouped_by_layer() -> None:
    tensors = {n: t for n, t in small().state_dict().items() if ".q." not in n}
    with pytest.raises(UserError, match=r"part: 8 of 18 tensors are missing: blocks\.\*\.q\.weight x4, .*bias x4$"):
        load_weights(small(), tensors, where="part")


def test_foreign_tensors_are_listed_with_the_nearest_known() -> None:
    tensors = {**small().state_dict(), "blocks.0.queries.weight": torch.zeros(1), "vae.conv": torch.zeros(1)}
    with pytest.raises(
        UserError, match=r"2 tensors belong to another model: .*vae\.conv.*nearest.*blocks\.0\.q\.weight"
    ):
        load_weights(small(), tensors, where="part")


def test_wrong_shapes_name_both() -> None:
    tensors = {**small().state_dict(), "head.weight": torch.zeros(2, 5)}
    with pytest.raises(UserError, match=r"head\.weight is \[2, 5\], its config says \[2, 3\]"):
        load_weights(small(), tensors, where="part")


def test_long_lists_are_cut() -> None:
    foreign = {f"part{name}": torch.zeros(1) for name in "abcdefghij"}
    with pytest.raises(UserError, match="and 4 more"):
        load_weights(small(), {**small().state_dict(), **foreign}, where="part")


@dataclass(frozen=True, kw_only=True)
class Config:
    dim: int
    heads: int = 2

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"dim={self.dim}: must be at least 1")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dim": 3, "head": 4}, "here: unknown key 'head' .nearest known to 'head': heads"),
        ({"heads": 3}, "here: missing dim"),
        ({"dim": 0}, "here: dim=0: must be at least 1"),
        ({"dim": "x"}, "here: "),
    ],
)
def test_config_mistakes_are_named(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_config(Config, values, "here")


def test_config_keeps_notes_out() -> None:
    assert build_config(Config, {"dim": 1, "_class_name": "X"}, "here") == Config(dim=1)


def test_unwritable_place_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_component(blocked / "part", {}, {})
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "full").touch()
    with pytest.raises(UserError, match="cannot write"):
        save_tree({"a": 1}, tmp_path / "taken", "mark")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken"]


def test_tree_round_trip(tmp_path: Path) -> None:
    tree = {
        "a": [1, 2.5, None, "x"],
        "b": {"k": torch.randn(2, 3).to(torch.bfloat16), "deep": {"v": torch.arange(3)}},
        "t": torch.randn(4)[::2],
        "empty": torch.zeros(0, 3),
    }
    save_tree(tree, tmp_path / "tree", "mark")
    back = load_tree(tmp_path / "tree", "mark")
    assert back["a"] == tree["a"] and back.keys() == tree.keys()
    for one, other in ((back["b"]["k"], tree["b"]["k"]), (back["b"]["deep"]["v"], tree["b"]["deep"]["v"])):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert torch.equal(back["t"], tree["t"]) and back["empty"].shape == (0, 3)


def test_other_files_are_no_trees(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(UserError, match="missing, truncated or not"):
        load_tree(path, "mark")
    path.write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="missing, truncated or not"):
        load_tree(path, "mark")
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="without 'mark'"):
        load_tree(path, "mark")


@pytest.mark.parametrize("sampled", [False, True])
def test_fingerprint_sees_weights_and_configs_only(
    tmp_path: Path, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sampled:
        monkeypatch.setattr(weights, "WHOLE_FILE_BYTES", 100)
        monkeypatch.setattr(weights, "SAMPLE_BYTES", 64)
    save_component(tmp_path / "part", {"dim": 3}, {"w": torch.zeros(500)})
    first = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("card")
    assert fingerprint(tmp_path) == first
    save_component(tmp_path / "part", {"dim": 4}, {"w": torch.zeros(500)})
    assert fingerprint(tmp_path) != first
    save_component(tmp_path / "part", {"dim": 3}, {"w": torch.cat([torch.zeros(499), torch.ones(1)])})
    assert fingerprint(tmp_path) != first
    save_component(tmp_path / "part", {"dim": 3}, {"w": torch.zeros(500)})
    assert fingerprint(tmp_path) == first
