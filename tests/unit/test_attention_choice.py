"""Attention on a GPU: of the backends that can run and are right, the fastest, found once. Packages that are not here
are pretended: their calls have the layouts of the real ones.
"""

import json
import sys
import types

import pytest
import torch

from streamgen import attention, attention_choice
from streamgen.attention import BACKENDS, Backend, attend, check_trainable
from streamgen.attention_choice import NAMES, STREAMED, Shape, attention_for, check, check_attention, fastest, measure
from streamgen.errors import UserError
from streamgen_infer import stream_options
from streamgen_infer.cli import main

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPE = Shape(num_heads=2, head_dim=16, query_tokens=6, key_tokens=24, dtype=torch.float32)


def of_tokens_first(q_BTNK, k_BSNK, v_BSNK):
    """What both packages compute."""
    return attend(*(x.transpose(1, 2) for x in (q_BTNK, k_BSNK, v_BSNK)), backend="math").transpose(1, 2)


@pytest.fixture
def packages(monkeypatch):
    """As if both were installed, and ran on a CPU."""
    flash3, xformers, ops = (types.ModuleType(name) for name in ("flash_attn_interface", "xformers", "xformers.ops"))
    flash3.flash_attn_func = lambda q, k, v: (of_tokens_first(q, k, v), None)
    ops.memory_efficient_attention = of_tokens_first
    for module in (flash3, xformers, ops):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(attention, "find_spec", lambda name: object())
    for name in ("flash3", "xformers"):
        monkeypatch.setitem(BACKENDS, name, BACKENDS[name]._replace(cuda=False))


def test_packages_get_their_own_layout(packages):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 8), *torch.randn(2, 2, 3, 9, 8)
    for name in ("flash3", "xformers"):
        torch.testing.assert_close(attend(q, k, v, None, name), attend(q, k, v, None, "math"))
        assert check(name, CPU, torch.bfloat16)[0]
        with pytest.raises(ValueError, match=f"backend='{name}' got a mask"):
            attend(q, k, v, torch.ones(5, 9, dtype=torch.bool), name)


def test_what_cannot_run_is_said():
    problem = BACKENDS["flash3"].problem
    assert problem(CPU, torch.bfloat16) == "it needs a CUDA device"
    assert problem(GPU, torch.bfloat16) == "flash_attn_interface is not installed"
    assert BACKENDS["xformers"].problem(GPU, torch.float32) == "xformers is not installed"
    for name in NAMES[:3]:
        assert BACKENDS[name].problem(CPU, torch.float32) == ""
    with pytest.raises(UserError, match=r"attention 'flash3' cannot run here: it needs a CUDA device; use 'auto'"):
        check_attention("flash3", CPU, torch.bfloat16)
    with pytest.raises(UserError, match="unknown attention 'spans'; there are: auto, math, sdpa"):
        check_attention("spans", CPU, torch.bfloat16)
    for name, why in (("triton", "has no backward"), ("flash3", "takes no mask"), ("xformers", "takes no mask")):
        with pytest.raises(UserError, match=f"attention_backend={name} {why}; train with"):
            check_trainable(name, GPU)


def test_the_kernel_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UserError, match="attention 'triton' cannot run here: it needs a CUDA device"):
        check_attention("triton", CPU, torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert BACKENDS["triton"].problem(CPU, torch.float32) in ("", "triton is not installed")


def test_flash3_has_no_float32(packages):
    assert BACKENDS["flash3"].problem(CPU, torch.float32) == "it is made for bfloat16 and float16"
    assert BACKENDS["flash3"].problem(CPU, torch.bfloat16) == ""


@pytest.fixture
def three(monkeypatch, tmp_path):
    """Backends that are right, wrong and broken; how often the right one ran."""
    monkeypatch.setenv("STREAMGEN_CACHE", str(tmp_path))
    ran: list[int] = []

    def right(q, k, v, mask):
        ran.append(q.shape[2])
        return attend(q, k, v, backend="math")

    def broken(q, k, v, mask):
        raise RuntimeError("no kernel image")

    wrong = lambda q, k, v, mask: right(q, k, v.roll(1, 2), mask)  # noqa: E731
    for name, run in (("right", right), ("wrong", wrong), ("broken", broken)):
        monkeypatch.setitem(BACKENDS, name, Backend(run, ""))
    return ran


def test_only_what_is_right_is_timed(three, caplog):
    found = measure(CPU, SHAPE, ["right", "wrong", "broken"])
    assert isinstance(found["right"], float) and found["right"] > 0
    assert found["wrong"].startswith("differs by ") and found["broken"] == "RuntimeError: no kernel image"
    assert "attention wrong is not used on cpu: differs by" in caplog.text
    assert three.count(SHAPE.query_tokens) == 3 + attention_choice.REPEATS


def test_the_fastest_is_found_once(three, monkeypatch):
    names = ("wrong", "right", "broken")
    assert fastest(CPU, SHAPE, names) == "right"
    ran = len(three)
    assert fastest(CPU, SHAPE, names) == "right" and len(three) == ran  # read
    timed = {"right": 3.0, "math": 2.0, "wrong": "differs"}
    monkeypatch.setattr(attention_choice, "measure", lambda device, shape, names: {name: timed[name] for name in names})
    assert fastest(CPU, SHAPE, ("right", "math")) == "math"  # others to choose from: another question
    assert fastest(CPU, SHAPE, ("wrong",)) == "auto"


def test_one_that_fails_at_the_models_own_shape_is_left_out(three, monkeypatch, caplog):
    """Small heads and few tokens may be all that it can do."""
    narrow = lambda q, k, v, mask: BACKENDS["right"].attend(q, k, v, mask) if q.shape[-1] == 16 else 1 / 0  # noqa: E731
    short = lambda q, k, v, mask: BACKENDS["right"].attend(q, k, v, mask) if k.shape[2] < 99 else 1 / 0  # noqa: E731
    for name, run in (("narrow", narrow), ("short", short)):
        monkeypatch.setitem(BACKENDS, name, Backend(run, ""))
    wide = Shape(num_heads=2, head_dim=64, query_tokens=6, key_tokens=100, dtype=torch.float32)
    assert fastest(CPU, wide, ("narrow", "short", "right")) == "right"
    for name in ("narrow", "short"):
        assert f"attention {name} is not used on cpu: ZeroDivisionError" in caplog.text


def test_another_version_or_a_broken_file_is_measured_again(three, monkeypatch, tmp_path):
    found = attention_choice._version
    monkeypatch.setattr(attention_choice, "_version", lambda name: "1.0" if name == "right" else found(name))
    fastest(CPU, SHAPE, ("right",))
    (file,) = (tmp_path / "attention").iterdir()
    ran = len(three)
    file.write_text(json.dumps({**json.loads(file.read_text()), "found": {"right": None}}))
    assert fastest(CPU, SHAPE, ("right",)) == "right" and len(three) > ran
    ran = len(three)
    monkeypatch.setattr(attention_choice, "_version", lambda name: "1.1")
    assert fastest(CPU, SHAPE, ("right",)) == "right" and len(three) > ran


def test_auto_is_a_rule_on_a_cpu_and_a_measurement_on_a_gpu(monkeypatch):
    monkeypatch.setattr(attention_choice, "fastest", lambda device, shape, among: among[-1])
    assert attention_for("auto", CPU, SHAPE) == "auto"
    assert attention_for("auto", GPU, SHAPE) == "triton"
    assert attention_for("auto", GPU, SHAPE, kernels=False) == "xformers"
    assert attention_for("sdpa", GPU, SHAPE) == "sdpa"


def test_the_command_knows_the_same_names(capsys):
    assert set(stream_options.ATTENTIONS) == set(NAMES) and set(STREAMED) <= set(BACKENDS)
    assert main(["stream", "a red star", "--attention", "flash"]) == 2
    assert "--attention" in capsys.readouterr().err
    assert main(["stream", "a red star", "--attention", "xformers", "--seconds", "1"]) == 2
    assert "attention 'xformers' cannot run here: it needs a CUDA device" in capsys.readouterr().err
