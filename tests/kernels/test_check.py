"""`streamgen doctor --kernels` finds a wrong kernel; `measure_kernels` gives no number of one."""

import dataclasses
import json

import pytest
import torch

from streamgen import ops
from streamgen.errors import UserError
from streamgen_infer import kernels_check
from streamgen_infer.cli import main
from streamgen_infer.kernels_check import Row, Speed, check_kernels, measure_kernels, usable_device
from streamgen_kernels.cases import Case


def case(name: str, wrong: float = 0.0) -> Case:
    right = torch.ones(4)
    return Case(
        name=name, kernel=lambda: (right + wrong,), reference=lambda: (right,), tolerance=0.1, roof="bytes", work=16
    )


def broken() -> Case:
    def kernel() -> tuple[torch.Tensor, ...]:
        raise RuntimeError("out of resource:\nshared memory") from ValueError("the cause")

    return dataclasses.replace(case("broken"), kernel=kernel)


def test_doctor_checks_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--kernels", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    found = {check["name"]: check for check in values["checks"]}
    assert values["ok"] and {check["level"] for check in found.values()} == {"ok"}
    assert {"norm_rope_store, int8", "ring_attention", "cell_noise", "attention triton", "attention sdpa"} <= set(found)
    assert "float32 differs by" in found["renoise"]["found"]
    assert "operations: streamgen.ops; attention: auto" in found["runs"]["found"]
    assert found["attention flash3"]["found"] == "not here: it needs a CUDA device"


def test_doctor_fails_with_a_wrong_kernel(monkeypatch, capsys):
    monkeypatch.setattr(kernels_check, "kernel_cases", lambda *_: [case("right"), case("wrong", 0.2), broken()])
    assert main(["doctor", "--kernels", "--json"]) == 1
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert found["right"]["level"] == "ok"
    assert found["wrong"]["level"] == "fail" and "differs by 2.0e-01, above 1.0e-01" in found["wrong"]["found"]
    assert "ValueError: the cause" in found["broken"]["found"] and found["broken"]["advice"]


def test_no_number_of_a_wrong_kernel(monkeypatch):
    monkeypatch.setattr(kernels_check, "kernel_cases", lambda *_, **__: [case("wrong", 0.2), case("right"), broken()])
    monkeypatch.setattr(kernels_check, "device_ms", lambda run, device: 0.5)
    monkeypatch.setattr(kernels_check, "_roof", lambda *_: 64000.0)
    wrong, right, failed = measure_kernels(torch.device("cuda"))
    assert isinstance(wrong, Row) and not wrong.ok and wrong.found.endswith("not timed")
    assert isinstance(failed, Row) and "the cause" in failed.found
    assert isinstance(right, Speed)
    assert (right.rate, right.unit, right.share) == (32000.0, "bytes/s", 0.5)


def test_where_kernels_are_not_measured_or_checked(monkeypatch):
    with pytest.raises(UserError, match="timed on a CUDA device, not on cpu"):
        list(measure_kernels(torch.device("cpu")))
    with pytest.raises(UserError, match="'nowhere' is no device"):
        usable_device("nowhere")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:3", "mps"):
        with pytest.raises(UserError, match=f"--device '{name}': "):
            usable_device(name)
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="cannot be checked: triton is not installed"):
        usable_device("cpu")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="triton is imported already"):
        usable_device("cpu")


def test_a_wrong_attention_backend_is_found(monkeypatch, device):
    from streamgen import attention

    monkeypatch.setattr(kernels_check, "kernel_cases", lambda *_: [])
    shifted = attention.Backend(lambda q, k, v, mask: attention.attend(q, k, v.roll(1, 2)), "wrong")
    monkeypatch.setitem(attention.BACKENDS, "shifted", shifted)
    rows = list(check_kernels(device))
    assert {row.name for row in rows if not row.ok} == {"attention shifted"}
