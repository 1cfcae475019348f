"""What is fetched for a name, checks of what came, and words where there is no network. Nothing here touches one."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from streamgen.checkpoints.presets import load_preset
from streamgen_infer.cli import main
from streamgen_infer.errors import Failure
from streamgen_infer.models import pull
from streamgen_infer.models.pull import BASE_FILES, MODELS, Source, fetch, next_step, resolve
from tests.command_line import one_line

pytest.importorskip("huggingface_hub")


@pytest.mark.parametrize("name", MODELS)
def test_every_name_resolves(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    found = resolve(name, tmp_path)
    assert found[0] == (model.own, tmp_path / name)
    assert model.preset is not None and load_preset(model.preset)
    if model.base is not None:
        base = MODELS[model.base]
        assert base.base is None
        assert found[1:] == [(Source(base.own.repo, BASE_FILES), tmp_path / model.base)]
        assert resolve(name, tmp_path, only=True) == found[:1]
    assert f"--preset {model.preset}" in next_step(name, tmp_path, only=False)


def test_the_presets_know_the_files_that_are_fetched() -> None:
    for name, model in MODELS.items():
        if model.base is not None:
            files = load_preset(str(model.preset)).files
            assert any(f"/{model.own.files[0]}".endswith(f"/{file}") for file in files), name


def test_names_are_listed_and_mistakes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in MODELS) and "gdhe17/Self-Forcing" in said
    assert main(["pull", "self-forcin"]) == 2
    assert "no published model 'self-forcin' (nearest known to 'self-forcin': self-forcing)" in one_line(capsys)


class Hub:
    """The part of huggingface_hub that is used, with a repository in memory that serves in the order it is asked."""

    def __init__(self, files: dict[str, bytes], sent: dict[str, bytes] | None = None) -> None:
        self.files, self.sent, self.fetched = files, sent or files, list[str]()

    def HfApi(self) -> Hub:
        return self

    def model_info(self, repo: str, files_metadata: bool) -> Any:
        assert files_metadata
        entries = []
        for name, content in self.files.items():
            large = name.endswith(".pt")
            lfs = SimpleNamespace(sha256=hashlib.sha256(content).hexdigest()) if large else None
            entries.append(SimpleNamespace(rfilename=name, size=len(content), lfs=lfs))
        return SimpleNamespace(siblings=entries)

    def hf_hub_download(self, repo: str, name: str, local_dir: Path) -> None:
        self.fetched.append(name)
        (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (local_dir / name).write_bytes(self.sent[name])


FILES = {"a/model.pt": b"weights", "a/notes.txt": b"text", "other.pt": b"not wanted"}


def test_what_is_there_is_checked_and_kept(tmp_path: Path) -> None:
    hub = Hub(FILES)
    source = Source("x/y", ("a/*",))
    fetch(hub, source, tmp_path)
    assert hub.fetched == ["a/model.pt", "a/notes.txt"]
    fetch(hub, source, tmp_path)
    assert len(hub.fetched) == 2
    (tmp_path / "a" / "model.pt").write_bytes(b"weightz")  # same size, other bits
    (tmp_path / "a" / "notes.txt").write_bytes(b"te")  # not all of it came
    fetch(hub, source, tmp_path)
    assert hub.fetched[2:] == ["a/model.pt", "a/notes.txt"]
    assert (tmp_path / "a" / "model.pt").read_bytes() == b"weights"


def test_a_wrong_sum_after_download_is_a_failure(tmp_path: Path) -> None:
    hub = Hub(FILES, sent={**FILES, "a/model.pt": b"weightz"})
    with pytest.raises(Failure, match=r"a/model\.pt differs from x/y's checksum"):
        fetch(hub, Source("x/y", ("a/model.pt",)), tmp_path)


def test_files_that_are_gone_are_named(tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"x/y no longer has b\.pt; look at https://huggingface\.co/x/y"):
        fetch(Hub(FILES), Source("x/y", ("a/model.pt", "b.pt")), tmp_path)


def test_without_a_network_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert main(["pull", "self-forcing", "--to", str(tmp_path)]) == 1
    line = one_line(capsys)
    assert "cannot fetch gdhe17/Self-Forcing from https://huggingface.co" in line
    assert "what has come so far is kept" in line
    assert f"hf download gdhe17/Self-Forcing checkpoints/self_forcing_dmd.pt --local-dir {tmp_path}" in line


def test_offline_mode_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["pull", "wan2.1-1.3b", "--to", str(tmp_path)]) == 1
    line = one_line(capsys)
    assert "OfflineModeIsEnabled" in line and "--include '*_VAE.pth'" in line


def test_the_cache_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMGEN_CACHE", str(tmp_path / "here"))
    assert pull.resolve("causvid")[0][1] == tmp_path / "here" / "models" / "causvid"
    monkeypatch.delenv("STREAMGEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pull.resolve("causvid")[0][1] == tmp_path / "streamgen" / "models" / "causvid"
