"""Recomputed layers: the same gradients to the bit, what they save as measured, and the fewest that fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamgen import memory
from streamgen.errors import UserError
from streamgen.memory import free_bytes, host_bytes
from streamgen_distill import self_forcing
from streamgen_train import activations, checkpoint
from streamgen_train.activations import Kept, fewest_layers, fit, measure, needed_bytes
from streamgen_train.config import RunConfig, from_dict
from streamgen_train.dry_run import costs_table
from streamgen_train.loop import Trainer, train
from streamgen_train.objectives import ar
from streamgen_train.objectives.ar import ArObjective
from streamgen_train.precision import probe_precision
from tests.runs import assert_equal_states, curve, turn
from tests.tiny_sprites import TRANSFORMER, ar_values, build_ar, save_codec, train_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_codec(tmp_path_factory.mktemp("codec"))


def prepared(codec: Path, **changes: Any) -> ArObjective:
    objective = build_ar(codec, **changes)
    objective.prepare(CPU, torch.float32)
    return objective


def gradients(objective: ArObjective) -> list[Tensor]:
    batch = objective.make_batch("story", 2, torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    objective.loss(batch, turn(), None)[0].backward()
    return [p.grad for module in objective.modules().values() for p in module.parameters() if p.grad is not None]


# The choice.

KEPT = Kept(layers_bytes=(100, 100, 120, 100), rest_bytes=50, layer_s=0.5)


def test_what_a_backward_needs() -> None:
    """The first layers are the recomputed ones: theirs come when the others have gone."""
    assert [needed_bytes(KEPT, count) for count in range(5)] == [590, 490, 390, 290, 290]


@pytest.mark.parametrize(
    ("free", "layers"),
    [(10_000, 0), (738, 0), (737, 1), (500, 2), (380, 3), (300, 4), (290, 4), (289, None), (0, None)],
)
def test_the_fewest_layers_that_fit(free: int, layers: int | None) -> None:
    """With a fifth of the memory to spare here; without it before a run is refused."""
    assert fewest_layers(KEPT, free, 0.8) == layers


# What is measured.


def saved_bytes(run: Any, model: nn.Module) -> int:
    """Of all that a graph keeps, parameters left out, by the graph itself."""
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(t.untyped_storage().nbytes() for pointer, t in held.items() if pointer not in own)


@pytest.mark.parametrize("backend", ["sdpa", "math", "spans"])
def test_measured_bytes_are_those_that_recomputing_saves(codec: Path, backend: str) -> None:
    objective = prepared(codec, attention_backend=backend)
    heaviest = objective.heaviest_pass()
    state = torch.get_rng_state()
    kept = measure(heaviest, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in objective.model.parameters()) and kept.layer_s > 0
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in objective.model.blocks)
    inputs = 2 * 16 * 4 * TRANSFORMER.dim * 4  # 2 clips of 16 frames (clean, noisy) of 4 tokens, in float32
    whole = saved_bytes(heaviest.run, objective.model)
    assert 0 <= kept.rest_bytes + sum(kept.layers_bytes) - whole < 3 * inputs  # what only a recomputed layer holds
    for count in (1, 2):
        objective.recompute_layers(count)
        less = whole - saved_bytes(heaviest.run, objective.model)
        assert 0 <= less - sum(kept.layers_bytes[:count]) <= 2 * count * inputs  # x and the text: kept elsewhere
    assert min(kept.layers_bytes) > 8 * inputs


def test_the_largest_batch_is_measured(codec: Path) -> None:
    """Of clips, in two copies under teacher forcing, or of single blocks."""
    assert prepared(codec).heaviest_pass().size == "objective.clips=2"
    assert prepared(codec, single_clips=17).heaviest_pass().size == "objective.single_clips=17"
    assert prepared(codec, single_clips=17, single_share=0.0).heaviest_pass().size == "objective.clips=2"
    noisy = {"visibility": {"latest": 1.0, "clean": 0.0}, "single_clips": 9}
    assert prepared(codec, **noisy).heaviest_pass().size == "objective.single_clips=9"
    for objective in (prepared(codec), prepared(codec, single_clips=17), prepared(codec, **noisy)):
        c, kept = objective.config, measure(objective.heaviest_pass(), CPU)
        for kind, clips in (("single", c.single_clips), ("story", c.clips)):
            batch = objective.make_batch(kind, clips, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
            batch.view = objective.heaviest_view(4)
            sigma_BF = torch.ones(batch.x0_BFCHW.shape[:2])
            real = saved_bytes(
                lambda o=objective, b=batch, s=sigma_BF: o.predict_x0(o.modules(), b, b.x0_BFCHW, s), objective.model
            )
            assert real <= kept.rest_bytes + sum(kept.layers_bytes)


# The gradients.


@pytest.mark.parametrize("backend", ["sdpa", "spans"])
def test_gradients_are_the_same_to_the_bit(codec: Path, backend: str) -> None:
    calls: list[int] = []
    found = []
    for count in (0, 1, "all"):
        objective = prepared(codec, attention_backend=backend, recompute=count)
        calls.append(0)

        def called(*_: Any) -> None:
            calls[-1] += 1

        for block in objective.model.blocks:
            block.self_attn.register_forward_hook(called)
        found.append(gradients(objective))
    assert calls == [2, 3, 4]
    for other in found[1:]:
        assert len(other) == len(found[0]) > 40
        assert all(map(torch.equal, other, found[0]))


def test_compiled_it_is_one_graph_with_the_same_gradients(codec: Path) -> None:
    """Without inductor, whose compilation takes a minute."""
    objective = prepared(codec, attention_backend="spans", recompute=1, clip_blocks=2)
    heaviest, parameters = objective.heaviest_pass(), list(objective.model.parameters())
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.1)

    def grads() -> list[Tensor | None]:
        return list(torch.autograd.grad(heaviest.run().square().mean(), parameters, allow_unused=True))

    wanted = grads()
    objective.model.compile(backend="aot_eager", fullgraph=True)
    for got, right in zip(grads(), wanted, strict=True):
        assert (got is None) == (right is None)
        if got is not None:
            torch.testing.assert_close(got, right, atol=1e-6, rtol=1e-4)


def test_a_resumed_run_is_the_same_whatever_is_recomputed(codec: Path, tmp_path: Path) -> None:
    train(build_ar(codec, recompute=0), train_config(max_steps=4), tmp_path / "whole")
    train(build_ar(codec, recompute="auto"), train_config(max_steps=3), tmp_path / "parts")
    train(build_ar(codec, recompute=2, seed=9), train_config(max_steps=4), tmp_path / "parts")
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")
    parts, whole = (checkpoint.load(checkpoint.find(tmp_path / run)) for run in ("parts", "whole"))
    assert_equal_states(parts, whole)


# A run's start.


def test_a_run_takes_the_fewest_layers_and_says_so(codec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = prepared(codec)
    kept = measure(objective.heaviest_pass(), CPU)
    monkeypatch.setattr(activations, "free_bytes", lambda device: 2 * needed_bytes(kept, 1) + 1000)
    (line,) = fit(objective, CPU, to_come_bytes=900)
    assert objective.model.recomputed_layers == objective.recomputed == 1
    assert line.startswith("activations (objective.clips=2): a layer keeps ") and "1 of 2 layers are recomputed" in line
    assert objective.work()[0][1].factor == 3.5
    (line,) = fit(objective, CPU, to_come_bytes=1100)
    assert "2 of 2 layers are recomputed, about" in line and "s more for each such batch" in line
    line = r"the largest batch \(objective\.clips=2\) does not fit: .*; lower objective\.clips$"
    with pytest.raises(UserError, match=line):
        fit(objective, CPU, to_come_bytes=2 * needed_bytes(kept, 1))
    monkeypatch.setattr(activations, "free_bytes", lambda device: None)
    assert "is not known" in fit(objective, CPU, 0)[0]


def test_a_trainer_counts_what_is_to_come(codec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(activations, "free_bytes", lambda device: asked.append(1) or 10**12)
    for precision, of_a_number in (("fp32", 4 + 8), ("bf16", 2 + 4 + 8)):
        objective = build_ar(codec)
        trainer = Trainer(objective, train_config(precision=precision))
        assert any("no layer is recomputed" in note for note in trainer.notes)
        count = sum(p.numel() for module in objective.modules().values() for p in module.parameters())
        assert trainer._bytes_to_come() == of_a_number * count
        trainer.train_step()
        assert trainer._bytes_to_come() == (of_a_number - 8) * count
    assert len(asked) == 2
    Trainer(build_ar(codec, recompute=1), train_config())
    assert len(asked) == 2, "a number is not measured"


def test_free_memory() -> None:
    known = host_bytes()
    assert known is None or 0 < known[1] <= known[0]
    assert (free_bytes(CPU) is None) == (known is None)
    assert free_bytes(torch.device("meta")) is None


def test_a_container_has_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = host_bytes()
    assert machine is not None
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    values = {
        "memory.max": "9000000\n",
        "memory.current": "4000000\n",
        "memory.stat": "anon 5\ninactive_file 1000000\n",
    }
    for name, value in values.items():
        (tmp_path / name).write_text(value)
    assert host_bytes() == (9_000_000, 6_000_000)
    (tmp_path / "memory.max").write_text("max\n")
    unlimited = host_bytes()
    assert unlimited is not None and unlimited[0] == machine[0]


def test_the_probe_of_the_number_format_takes_the_least_memory(codec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = build_ar(codec, recompute="auto")
    seen = []
    loss = objective.loss
    monkeypatch.setattr(
        objective, "loss", lambda *given: seen.append(objective.model.recomputed_layers) or loss(*given)
    )
    probe_precision(objective, CPU)
    assert set(seen) == {TRANSFORMER.num_layers} and objective.model.recomputed_layers == 0


def test_what_cannot_be(codec: Path) -> None:
    for wrong in (-1, 3):
        with pytest.raises(UserError, match=rf"recompute is {wrong}; it must be in \[0, 2\], the model's layers"):
            from_dict(ar.Config, ar_values(codec, recompute=wrong), "objective")
    with pytest.raises(UserError, match=r"objective\.recompute='most' is not allowed"):
        from_dict(ar.Config, ar_values(codec, recompute="most"), "objective")
    values = ar_values(codec, init_from="a", teacher_from="b", recompute="auto")
    with pytest.raises(UserError, match="recompute is auto; a stage that makes streams needs a number, or all"):
        from_dict(self_forcing.Config, values, "objective")


def test_dry_run_tells_both_ends(codec: Path) -> None:
    tables = {}
    for recompute in ("auto", 0, 2):
        values = ar_values(codec, recompute=recompute, model=dataclasses.replace(TRANSFORMER, dim=2048, num_heads=16))
        config = from_dict(
            RunConfig, {"experiment": "x", "run_dir": "y", "train": train_config(), "objective": {}}, "config"
        )
        with torch.device("meta"):
            objective = ar.build(ar.Config(**values))
        tables[recompute] = costs_table(config, objective)
    layer, tokens = (14 * 2048 + 2 * TRANSFORMER.ffn_dim) * 4 / 1e9, 2 * 16 * 4
    ends = f"activations {tokens * 2 * layer:,.2f} GB with no layer recomputed, "
    ends += f"{tokens * (layer + 2 * 2048 * 4 / 1e9):,.2f} GB and a third more time with all"
    assert ends in tables["auto"] and "recompute" not in tables[0] + tables[2]

    def flops(table: str) -> float:
        (line,) = [line for line in table.splitlines() if line.startswith("  arithmetic of a step")]
        return float(line.split()[4].replace(",", ""))

    assert flops(tables["auto"]) == flops(tables[0])
    assert flops(tables[2]) == pytest.approx(flops(tables[0]) * 4 / 3, rel=0.1)
