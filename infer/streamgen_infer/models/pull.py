"""`streamgen pull NAME`: published models by huggingface_hub, the one command that touches the network.

What is there already is kept and checked, what was begun is continued. Sizes and sha256 sums are those that the hub
states; a file that differs is named.
"""

from __future__ import annotations

import fnmatch
import hashlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamgen.checkpoints.places import cache_dir
from streamgen.errors import UserError
from streamgen.weights import nearest
from streamgen_infer.errors import Failure

HUB = "https://huggingface.co"
CHUNK_BYTES = 2**22


@dataclass(frozen=True, slots=True)
class Source:
    """Files of one repository."""

    repo: str
    files: tuple[str, ...]
    """Paths or patterns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A model that can be fetched."""

    about: str
    own: Source
    preset: str | None = None
    base: str | None = None
    """The name here of the model that has its VAE and text encoder."""


BASE_FILES = ("*_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/*")
WHOLE_FILES = (*BASE_FILES, "config.json", "diffusion_pytorch_model*")
DIFFUSERS_FILES = ("model_index.json", "transformer/*", "vae/*", "text_encoder/*", "tokenizer/*", "scheduler/*")
SMALL = "wan2.1-1.3b"
LARGE = "wan2.1-14b"
CAUSAL_FORCING = "zhuhz22/Causal-Forcing"

MODELS = {
    SMALL: Published(about="Wan 2.1 T2V 1.3B", own=Source("Wan-AI/Wan2.1-T2V-1.3B", WHOLE_FILES), preset="wan"),
    LARGE: Published(about="Wan 2.1 T2V 14B", own=Source("Wan-AI/Wan2.1-T2V-14B", WHOLE_FILES), preset="wan"),
    "wan2.2-5b": Published(
        about="Wan 2.2 TI2V 5B", own=Source("Wan-AI/Wan2.2-TI2V-5B", WHOLE_FILES), preset="wan2_2_5b"
    ),
    "wan2.1-1.3b-diffusers": Published(
        about="Wan 2.1 T2V 1.3B as diffusers has it",
        own=Source("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", DIFFUSERS_FILES),
        preset="wan",
    ),
    "wan2.2-5b-diffusers": Published(
        about="Wan 2.2 TI2V 5B as diffusers has it",
        own=Source("Wan-AI/Wan2.2-TI2V-5B-Diffusers", DIFFUSERS_FILES),
        preset="wan2_2_5b",
    ),
    "causvid": Published(
        about="CausVid, 3 steps",
        own=Source("tianweiy/CausVid", ("autoregressive_checkpoint/model.pt",)),
        preset="causvid",
        base=SMALL,
    ),
    "self-forcing": Published(
        about="Self-Forcing (DMD)",
        own=Source("gdhe17/Self-Forcing", ("checkpoints/self_forcing_dmd.pt",)),
        preset="self_forcing_dmd",
        base=SMALL,
    ),
    "self-forcing-sid": Published(
        about="Self-Forcing (SiD)",
        own=Source("gdhe17/Self-Forcing", ("checkpoints/self_forcing_sid.pt",)),
        preset="self_forcing_sid",
        base=SMALL,
    ),
    "causal-forcing": Published(
        about="Causal Forcing, blocks of 3",
        own=Source(CAUSAL_FORCING, ("chunkwise/causal_forcing.pt",)),
        preset="causal_forcing_chunk",
        base=SMALL,
    ),
    "causal-forcing-frame": Published(
        about="Causal Forcing, frame by frame, 4 steps",
        own=Source(CAUSAL_FORCING, ("framewise/causal_forcing.pt",)),
        preset="causal_forcing_frame",
        base=SMALL,
    ),
    "causal-forcing-frame-2step": Published(
        about="Causal Forcing++, frame by frame, 2 steps",
        own=Source(CAUSAL_FORCING, ("causal-forcing++/framewise-2step.pt",)),
        preset="causal_forcing_frame_2step",
        base=SMALL,
    ),
    "causal-forcing-frame-1step": Published(
        about="Causal Forcing++, frame by frame, 1 step",
        own=Source(CAUSAL_FORCING, ("causal-forcing++/framewise-1step.pt",)),
        preset="causal_forcing_frame_1step",
        base=SMALL,
    ),
    "causal-forcing-long": Published(
        about="Causal Forcing for long videos",
        own=Source(CAUSAL_FORCING, ("chunkwise/longvideo.pt",)),
        preset="causal_forcing_long",
        base=SMALL,
    ),
    "longlive": Published(
        about="LongLive 1 with its LoRA",
        own=Source("Efficient-Large-Model/LongLive-1.3B", ("models/longlive_base.pt", "models/lora.pt")),
        preset="longlive",
        base=SMALL,
    ),
    "rolling-forcing": Published(
        about="Rolling Forcing",
        own=Source("TencentARC/RollingForcing", ("checkpoints/rolling_forcing_dmd.pt",)),
        preset="rolling_forcing",
        base=SMALL,
    ),
    "reward-forcing": Published(
        about="Reward Forcing",
        own=Source("JaydenLu666/Reward-Forcing-T2V-1.3B", ("rewardforcing.pt",)),
        preset="reward_forcing",
        base=SMALL,
    ),
    "krea-14b": Published(
        about="Krea Realtime 14B",
        own=Source("krea/krea-realtime-video", ("krea-realtime-video-14b.safetensors",)),
        preset="krea_14b",
        base=LARGE,
    ),
    "stream-diffusion-v2": Published(
        about="StreamDiffusionV2, 1.3B",
        own=Source("jerryfeng/StreamDiffusionV2", ("wan_causal_dmd_v2v/model.pt",)),
        preset="stream_diffusion_v2",
        base=SMALL,
    ),
}


def run(name: str | None, to: Path | None, *, only: bool) -> int:
    """The command; returns the exit code."""
    if name is None:
        for key, model in MODELS.items():
            print(f"{key:28} {model.about} ({model.own.repo})")
        return 0
    hub = _hub()
    for source, folder in resolve(name, to, only=only):
        fetch(hub, source, folder)
    print(next_step(name, to, only=only))
    return 0


def resolve(name: str, to: Path | None = None, *, only: bool = False) -> list[tuple[Source, Path]]:
    """What to fetch for a name, and where to put it. UserError names the nearest name."""
    if name not in MODELS:
        raise UserError(f"no published model {name!r}{nearest(name, MODELS)}; there are: {', '.join(MODELS)}")
    model = MODELS[name]
    found = [(model.own, _folder(name, to))]
    if model.base is not None and not only:
        found.append((Source(MODELS[model.base].own.repo, BASE_FILES), _folder(model.base, to)))
    return found


def _folder(name: str, to: Path | None) -> Path:
    return (cache_dir("models") if to is None else to) / name


def next_step(name: str, to: Path | None, *, only: bool) -> str:
    """The command that makes a model folder of what was fetched."""
    model = MODELS[name]
    source = _folder(name, to)
    if model.base is not None:
        source /= model.own.files[0]
    words = ["streamgen", "convert", str(source), name, "--preset", str(model.preset)]
    if model.base is not None and not only:
        words += ["--base", str(_folder(model.base, to))]
    return f"next: {shlex.join(words)}"


def fetch(hub: Any, source: Source, folder: Path) -> None:
    """Bring a source's files into `folder` and check them against what the hub says of them."""
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{source.repo} -> {folder}")
    try:
        files = hub.HfApi().model_info(source.repo, files_metadata=True).siblings
        wanted = [file for file in files if any(fnmatch.fnmatch(file.rfilename, p) for p in source.files)]
        _check_listed(source, [file.rfilename for file in wanted])
        for file in wanted:
            if not matches(folder / file.rfilename, file):
                hub.hf_hub_download(source.repo, file.rfilename, local_dir=folder)
                if not matches(folder / file.rfilename, file):
                    raise Failure(
                        f"{folder / file.rfilename} differs from {source.repo}'s checksum after download; "
                        "remove it and pull again"
                    )
    except _network_errors() as error:
        raise Failure(_unreachable(source, folder, error)) from error


def _network_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when it does not get through; the library below it has changed with its versions."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    below = [sys.modules[name].HTTPError for name in ("httpx2", "httpx") if name in sys.modules]
    return (OSError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, *below)


def _check_listed(source: Source, found: Sequence[str]) -> None:
    missing = [p for p in source.files if not any(fnmatch.fnmatch(name, p) for name in found)]
    optional = [p for p in missing if p in WHOLE_FILES and "*" in p]
    if set(missing) - set(optional):
        raise Failure(f"{source.repo} no longer has {', '.join(missing)}; look at {HUB}/{source.repo}/tree/main")


def matches(path: Path, file: Any) -> bool:
    """The file is there with the size and, where the hub states one, the sha256 of its entry."""
    if not path.is_file() or (file.size is not None and path.stat().st_size != file.size):
        return False
    stated = getattr(file.lfs, "sha256", None) if file.lfs is not None else None
    return stated is None or sha256_of(path) == stated


def sha256_of(path: Path) -> str:
    """Of a file of any size."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _unreachable(source: Source, folder: Path, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else ""
    by_hand = shlex.join(["hf", "download", source.repo, *_includes(source), "--local-dir", str(folder)])
    return (
        f"cannot fetch {source.repo} from {HUB} ({type(error).__name__}: {reason}); what has come so far is kept. "
        f"On a machine with a network: {by_hand}, then bring the folder here; `streamgen convert` needs no network"
    )


def _includes(source: Source) -> list[str]:
    if any("*" in name for name in source.files):
        return [word for name in source.files for word in ("--include", name)]
    return list(source.files)


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"pull needs huggingface_hub ({error}): pip install 'streamgen[wan]'") from error
    return huggingface_hub
