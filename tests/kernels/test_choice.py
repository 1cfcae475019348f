""" "auto" takes the kernels where each has proven right, remembers that, and says why not where it does not."""

import json
import logging

import pytest
import torch

from streamgen import kernel_choice, ops
from streamgen.errors import UserError
from streamgen.pipeline import StreamPipeline
from streamgen_infer import stream_options
from streamgen_infer.cli import main
from streamgen_kernels.cases import Case
from tests.tiny_model import save_tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def case(name: str, wrong: float = 0.0) -> Case:
    right = torch.ones(4)
    return Case(name=name, kernel=lambda: (right + wrong,), reference=lambda: (right,), tolerance=0.1, roof="bytes")


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """As if there was a GPU, with these kernels; how often each was checked."""
    checked: list[str] = []

    def install(*cases: Case) -> list[str]:
        def found(device: torch.device, dtype: torch.dtype):
            for one in cases:
                checked.append(one.name)
                yield one

        monkeypatch.setattr(kernel_choice, "kernel_cases", found)
        return checked

    monkeypatch.setenv("STREAMGEN_CACHE", str(tmp_path))
    monkeypatch.setattr(kernel_choice, "device_name", lambda device: "Some GPU 90 GB")
    kernel_choice._say_once.cache_clear()
    return install


def is_triton(table: ops.Ops) -> bool:
    return table.gelu_tanh.__module__ == "streamgen_kernels.gelu"


def test_checked_once_and_then_read(pretended, tmp_path, monkeypatch):
    checked = pretended(case("gelu_tanh"), case("norm_rope"))
    assert is_triton(kernel_choice.ops_for("auto", GPU))
    assert checked == ["gelu_tanh", "norm_rope"] * 2  # two dtypes
    assert is_triton(kernel_choice.ops_for("auto", GPU)) and len(checked) == 4
    (file,) = (tmp_path / "kernels").iterdir()
    assert "Some-GPU-90-GB" in file.name and json.loads(file.read_text())["torch"] == torch.__version__
    file.write_text("{")  # broken: found again
    kernel_choice.ops_for("auto", GPU)
    assert len(checked) == 8
    monkeypatch.setattr(kernel_choice, "kernel_versions", lambda: {"triton": "4.0"})
    kernel_choice.ops_for("auto", GPU)
    assert len(checked) == 12


def test_a_wrong_kernel_means_plain_torch_and_a_line(pretended, caplog):
    checked = pretended(case("gelu_tanh"), case("norm_rope", wrong=0.5), case("scaled_product, int8", wrong=1))
    for _ in range(3):
        assert not is_triton(kernel_choice.ops_for("auto", GPU))
    assert len(checked) == 6
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "plain torch operations on cuda: the kernel norm_rope in bfloat16 is not right here" in record.message
    assert "scaled_product" not in record.message


def test_products_of_float8_are_proven_by_themselves(pretended, tmp_path, caplog):
    names = ("gelu_tanh", "quantise_rows, float8_e4m3fn", "scaled_product, float8_e4m3fn")
    pretended(*map(case, names), case("scaled_product, int8", wrong=1))
    table = kernel_choice.ops_for("auto", GPU)
    assert kernel_choice.float8_product(table, GPU) is ops.kernel_linear()[1]
    pretended(case("gelu_tanh", wrong=1), *map(case, names[1:]))
    assert kernel_choice.float8_product(table, GPU) is ops.kernel_linear()[1]  # read from disk
    assert len(list((tmp_path / "float8").iterdir())) == 1 and not caplog.records


def test_a_wrong_product_of_float8_means_float32_and_a_line(pretended, caplog):
    pretended(case("gelu_tanh"), case("scaled_product, float8_e4m3fn", wrong=1))
    table = kernel_choice.ops_for("auto", GPU)
    assert is_triton(table) and kernel_choice.float8_product(table, GPU) is None
    assert kernel_choice.float8_product(ops.select("reference"), CPU) is None
    kernel, reference = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert "in float32 on cuda (the kernel scaled_product, float8_e4m3fn in bfloat16 is not right" in kernel
    assert reference.endswith("in float32 on cpu (plain torch operations): that saves memory, not time")
    with pytest.raises(UserError, match="mps has no float8; take int8"):
        kernel_choice.float8_product(table, torch.device("mps"))


def test_a_folder_that_cannot_be_written(pretended, tmp_path, monkeypatch, caplog):
    pretended(case("gelu_tanh"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STREAMGEN_CACHE", str(tmp_path / "file"))
    assert is_triton(kernel_choice.ops_for("auto", GPU))
    assert "checked at every start" in caplog.text


def test_what_is_asked_for(monkeypatch, tmp_path):
    assert kernel_choice.ops_for("auto", CPU) is not None and not is_triton(kernel_choice.ops_for("auto", CPU))
    assert is_triton(kernel_choice.ops_for("triton", CPU))  # by the interpreter
    with pytest.raises(UserError, match="unknown ops 'cuda9'; there are: auto, reference, triton"):
        kernel_choice.ops_for("cuda9", CPU)
    assert stream_options.OPS == kernel_choice.OPS
    folder = save_tiny_model(tmp_path / "tiny")
    assert is_triton(StreamPipeline.from_pretrained(folder, ops="triton").transformer.ops)
    assert not is_triton(StreamPipeline.from_pretrained(folder).transformer.ops)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UserError, match="ops 'triton' needs a CUDA device, this model is on cpu"):
        StreamPipeline.from_pretrained(folder, ops="triton")


def test_stream_command(tmp_path, capsys):
    """By the interpreter; frames are bytes, so a rounding may show in one of them."""
    folder = save_tiny_model(tmp_path / "tiny")
    made = {}
    for name in ("triton", "reference"):
        report, out = tmp_path / f"{name}.json", tmp_path / name
        arguments = ["--model", str(folder), "--seconds", "0.5", "--steps", "2", "--dtype", "fp32", "--quiet"]
        arguments += ["--ops", name, "--report", str(report), "--out", f"{out}.y4m"]
        assert main(["stream", "a red star spinning over a snow background", *arguments]) == 0
        assert json.loads(report.read_text())["ops"] == name
        made[name] = (tmp_path / f"{name}.y4m").read_bytes()
    assert len(made["triton"]) == len(made["reference"])
    assert sum(abs(a - b) > 1 for a, b in zip(made["triton"], made["reference"], strict=True)) == 0
    assert main(["stream", "a red star", "--ops", "fast"]) == 2
    assert "--ops 'fast' does not exist; there are: auto, reference, triton" in capsys.readouterr().err
