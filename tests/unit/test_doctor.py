"""`streamgen doctor`: it fails exactly when nothing can be streamed, and says what to do."""

import json
import os
import sys
from pathlib import Path

import pytest

from streamgen import resources
from streamgen_infer import doctor, machine
from streamgen_infer.cli import main
from tests.tiny_model import save_tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "sprites")
    return folder


@pytest.fixture(autouse=True)
def shipped(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "models_dir", lambda: models)


def checks(capsys: pytest.CaptureFixture[str], code: int) -> dict[str, dict[str, str]]:
    assert main(["doctor", "--json"]) == code
    values = json.loads(capsys.readouterr().out)
    assert values["ok"] is (code == 0) and values["command"] == "doctor"
    return {one["name"]: one for one in values["checks"]}


def test_a_machine_that_works(capsys: pytest.CaptureFixture[str]) -> None:
    found = checks(capsys, 0)
    wanted = {
        "streamgen",
        "cores",
        "instructions",
        "memory",
        "disk",
        "packages",
        "torch",
        "GPU",
        "ffmpeg",
        "dtype",
        "model",
    }
    assert wanted | {"streaming", "hydra-core", "torchvision"} <= found.keys()
    assert "fingerprint" in found["model"]["found"] and "bf16" in found["dtype"]["found"]
    assert all(one["advice"] for one in found.values() if one["level"] != "ok")


def test_lines_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok    torch") for line in lines)
    assert all(line.startswith(("ok  ", "warn", "    ")) for line in lines)


def test_no_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(resources, "models_dir", lambda: tmp_path)
    found = checks(capsys, 1)
    assert found["model"]["level"] == "fail" and "install streamgen again" in found["model"]["advice"]


def test_a_damaged_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = save_tiny_model(tmp_path / "sprites") / "codec" / "diffusion_pytorch_model.safetensors"
    os.truncate(weights, 100)
    monkeypatch.setattr(resources, "models_dir", lambda: tmp_path)
    assert "truncated" in checks(capsys, 1)["model"]["found"]


def test_no_ffmpeg_is_a_warning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    found = checks(capsys, 0)["ffmpeg"]
    assert found["level"] == "warn" and "write .gif, .y4m" in found["advice"]


@pytest.mark.parametrize(("module", "name"), [("einops", "packages"), ("torch", "torch")])
def test_a_missing_package_fails(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert checks(capsys, 1)[name]["level"] == "fail"


def test_torchvision_beside_a_cpu_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    last = list(doctor.extras())[-1]
    assert (last.name, last.level) == ("torchvision", "warn") and "pip uninstall torchvision" in last.advice
    monkeypatch.setattr(doctor, "_version", {**versions, "torch": "2.13.0+cu130"}.get)
    assert {check.level for check in doctor.extras()} == {"ok"}


def test_little_memory_and_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_mb", lambda: (8000.0, 300.0))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5e6})())
    levels = {check.name: check.level for check in doctor.system()}
    assert levels["memory"] == levels["disk"] == "warn"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
def test_the_machine() -> None:
    total, free = machine.memory_mb() or (0, 0)
    age, now, peak = machine.process_age_s(), machine.rss_mb(), machine.peak_rss_mb()
    assert 0 < free <= total and machine.usable_cores() >= 1 and machine.cpu_name()
    assert age is not None and age > 0 and now is not None and peak is not None and 10 < now <= peak * 1.01
