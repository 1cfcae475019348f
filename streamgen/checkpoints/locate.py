"""Which files are which part of a model: a diffusers folder, a folder of Wan's release, or a file beside others.

Files are told apart by what is in them. What is missing is said in one line, with where it comes from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamgen.checkpoints.detect import (
    IMAGE,
    LORA,
    PICKLE_SUFFIXES,
    SMALL,
    SUFFIXES,
    TEXT,
    TRANSFORMER,
    VAE,
    Checkpoint,
    read_checkpoint,
)
from streamgen.checkpoints.tensors import INDEX_SUFFIX
from streamgen.errors import UserError
from streamgen.weights import read_json

MODEL_INDEX = "model_index.json"
OUR_CLASS = "StreamPipeline"
EXPERTS = ("high_noise_model", "low_noise_model")
"""Folders of Wan 2.2's A14B models: each of two transformers makes half of the steps."""
TOKENIZERS = ("tokenizer", "google/umt5-xxl", ".")
TOKENIZER_SIGNS = ("tokenizer.json", "spiece.model")
SIDE_FOLDERS = ("vae", "text_encoder", "codec", "text")
LARGE_BYTES = 64 * 2**20
"""Files below this that cannot be read are passed over while a folder is searched; a large one is reported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Files of a model; None where nothing was found."""

    root: Path
    transformer: Checkpoint | None = None
    vae: Path | None = None
    small_decoder: Path | None = None
    text: Path | None = None
    tokenizer: Path | None = None
    loras: tuple[Path, ...] = ()

    @property
    def folder(self) -> Path:
        return self.root if self.root.is_dir() else self.root.parent

    def missing(self) -> list[str]:
        """What a stream needs and is not here, in words."""
        return [
            words
            for found, words in (
                (self.transformer, "the transformer"),
                (self.vae or self.small_decoder, "the VAE (Wan2.1_VAE.pth, Wan2.2_VAE.pth or diffusers' vae/)"),
                (self.text, "the text encoder (models_t5_umt5-xxl-enc-bf16.pth or text_encoder/)"),
                (self.tokenizer, "the tokenizer (google/umt5-xxl/ or tokenizer/)"),
            )
            if found is None
        ]

    def filled(self, other: Parts) -> Parts:
        """With what is missing taken from `other`."""
        return replace(
            self,
            vae=self.vae or other.vae,
            small_decoder=self.small_decoder or other.small_decoder,
            text=self.text or other.text,
            tokenizer=self.tokenizer or other.tokenizer,
        )


def is_ours(folder: Path) -> bool:
    """A model folder of this project."""
    index = folder / MODEL_INDEX
    return index.is_file() and read_json(index).get("_class_name") == OUR_CLASS


def locate(path: Path, *, trust_pickle: bool = False) -> Parts:
    """The parts at `path`: a file's own folder is searched for what the file does not hold."""
    _refuse_experts((path if path.is_dir() else path.parent).resolve())
    if path.is_file():
        checkpoint = read_checkpoint(path, trust_pickle=trust_pickle)
        if checkpoint is None or checkpoint.kind != TRANSFORMER:
            what = "nothing that is known here" if checkpoint is None else f"a {checkpoint.kind}"
            raise UserError(f"{path} holds {what}; name the transformer's file, or a folder with all parts")
        rest = _search(path.parent, {path}, trust_pickle)
        return replace(rest, root=path, transformer=checkpoint)
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give a checkpoint file, a folder of one, or a model folder")
    if (path / MODEL_INDEX).is_file():
        return _diffusers(path, trust_pickle)
    return _search(path, set(), trust_pickle)


def _refuse_experts(folder: Path) -> None:
    """UserError for a model of two transformers, or one of the two: their tensors look like those of Wan 2.1 14B."""
    for root in (folder, folder.parent):
        pair = [root / name for name in EXPERTS]
        if all(path.is_dir() for path in pair) and folder in (root, *pair):
            raise UserError(_two_transformers(root))
    index = folder.parent / MODEL_INDEX
    if folder.name in ("transformer", "transformer_2") and index.is_file() and _second(read_json(index)):
        raise UserError(_two_transformers(folder.parent))


def _two_transformers(folder: Path) -> str:
    return (
        f"{folder} is a model of two transformers (Wan 2.2 A14B), one for the first steps and one for the last, which "
        "is not served here; take Wan 2.1 14B, Wan 2.2 5B or a causal model made from them"
    )


def _second(index: Mapping[str, Any]) -> bool:
    entry = index.get("transformer_2")
    return bool(entry and entry[0] is not None)


def _diffusers(folder: Path, trust_pickle: bool) -> Parts:
    """A pipeline folder of diffusers."""
    index = read_json(folder / MODEL_INDEX)
    name = str(index.get("_class_name", ""))
    if not name.startswith("Wan"):
        raise UserError(f"{folder} is a {name or 'folder'} of diffusers; served here are WanPipeline folders")
    if _second(index):
        raise UserError(_two_transformers(folder))
    if index.get("image_encoder", [None])[0] is not None:
        raise UserError(
            f"{folder} is an image-to-video model with a CLIP image encoder, which is not served here; take a "
            "text-to-video model: a causal model starts from an image by having it as its first block"
        )
    transformer = _weights_in(folder / "transformer")
    checkpoint = None if transformer is None else read_checkpoint(transformer, trust_pickle=trust_pickle)
    return Parts(
        root=folder,
        transformer=checkpoint,
        vae=_weights_in(folder / "vae"),
        text=_weights_in(folder / "text_encoder"),
        tokenizer=_tokenizer(folder),
    )


def _weights_in(folder: Path) -> Path | None:
    """The one file or index of a component folder, safetensors first."""
    found = list(weight_files(folder)) if folder.is_dir() else []
    safe = [path for path in found if path.suffix not in PICKLE_SUFFIXES]
    plain = [path for path in safe or found if ".fp16." not in path.name and ".bf16." not in path.name]
    return next(iter(plain or safe or found), None)


def weight_files(folder: Path) -> Iterator[Path]:
    """Indexes and files of weights directly in a folder; files that belong to an index are not listed."""
    indexes = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    listed = {str(name) for index in indexes for name in _listed_in(index)}
    yield from indexes
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in SUFFIXES and path.name not in listed:
            yield path


def _listed_in(index: Path) -> Sequence[Any]:
    files = read_json(index).get("weight_map")
    return list(files.values()) if isinstance(files, dict) else []


def _search(folder: Path, known: set[Path], trust_pickle: bool) -> Parts:
    """The parts among the files of a folder and of its component folders."""
    found: dict[str, list[Checkpoint]] = {}
    places = [folder, *(folder / name for name in SIDE_FOLDERS if (folder / name).is_dir())]
    for path in [file for place in places for file in weight_files(place)]:
        if path not in known:
            checkpoint = _look(path, trust_pickle)
            if checkpoint is not None:
                found.setdefault(checkpoint.kind, []).append(checkpoint)
    if IMAGE in found and not known:
        raise UserError(
            f"{folder} has a CLIP image encoder ({found[IMAGE][0].path.name}): an image-to-video model, not served "
            "here; take text-to-video weights"
        )
    transformers = found.get(TRANSFORMER, [])
    if len(transformers) > 1 and not known:
        names = ", ".join(checkpoint.path.name for checkpoint in transformers)
        raise UserError(f"{folder} holds {len(transformers)} transformers; name one of the files: {names}")
    return Parts(
        root=folder,
        transformer=transformers[0] if transformers else None,
        vae=_only(found.get(VAE, []), folder),
        small_decoder=_only(found.get(SMALL, []), folder),
        text=_only(found.get(TEXT, []), folder),
        tokenizer=_tokenizer(folder),
        loras=tuple(checkpoint.path for checkpoint in found.get(LORA, [])),
    )


def _look(path: Path, trust_pickle: bool) -> Checkpoint | None:
    try:
        return read_checkpoint(path, trust_pickle=trust_pickle)
    except UserError:
        if path.stat().st_size >= LARGE_BYTES or re.search(r"vae|t5|diffusion|model", path.name, re.IGNORECASE):
            raise
        return None  # some other small file of the folder


def _only(found: Sequence[Checkpoint], folder: Path) -> Path | None:
    if len(found) > 1:
        names = ", ".join(checkpoint.path.name for checkpoint in found)
        raise UserError(f"{folder} holds {len(found)} of {found[0].kind}: {names}; keep one there")
    return found[0].path if found else None


def _tokenizer(folder: Path) -> Path | None:
    for name in TOKENIZERS:
        place = folder / name
        if any((place / sign).is_file() for sign in TOKENIZER_SIGNS):
            return place
    return None
