"""What a file holds, from the names of its tensors; file names play no part."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from streamgen.checkpoints.names import BARE, networks, to_original
from streamgen.checkpoints.pickles import open_pickle
from streamgen.checkpoints.tensors import INDEX_SUFFIX, LazyTensors, open_safetensors
from streamgen.errors import UserError

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)

# Names that tell a kind and its layout apart, after wrappers are taken off; the first that is there decides.
SIGNS = (
    ("lora", "peft or kohya", re.compile(r".*\.lora_(A|B|down|up)(\..+)?\.weight|.*\.lora_(down|up)\.weight")),
    ("transformer", "original", re.compile(r"blocks\.0\.self_attn\.q\.weight")),
    ("transformer", "diffusers", re.compile(r"blocks\.0\.attn1\.to_q\.weight")),
    ("text encoder", "original", re.compile(r"blocks\.0\.pos_embedding\.embedding\.weight")),
    ("text encoder", "transformers", re.compile(r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight")),
    ("VAE", "original", re.compile(r"decoder\.upsamples\.0\..*|decoder\.middle\.0\.residual\..*")),
    ("VAE", "diffusers", re.compile(r"decoder\.up_blocks\.0\..*")),
    ("small decoder", "TAEHV", re.compile(r"decoder\.\d+\.(conv\.)?(0\.)?(weight|bias)")),
    ("image encoder", "CLIP", re.compile(r"(visual|vision_model)\..*")),
)
TRANSFORMER, TEXT, VAE, SMALL, LORA, IMAGE = (
    "transformer",
    "text encoder",
    "VAE",
    "small decoder",
    "lora",
    "image encoder",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """One network of a checkpoint."""

    kind: str
    layout: str
    tensors: LazyTensors
    """Without wrappers and residues; names otherwise as the file has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A file (or an index of files) and what is in it."""

    path: Path
    networks: dict[str, Network]
    """By the name of their set: "" for a file with one network, "generator_ema", ..."""

    @property
    def kind(self) -> str:
        return next(iter(self.networks.values())).kind

    def choose(self, wanted: str | None = None) -> tuple[str, Network]:
        """(set, network): the wanted set, or the weights that are meant to be used: averaged before last."""
        if wanted is not None:
            if wanted not in self.networks:
                raise UserError(f"{self.path} has no {wanted!r}; it holds {_listed(self.networks)}")
            return wanted, self.networks[wanted]
        for name in (BARE, "generator_ema", "ema", "generator", "generator_lora"):
            if name in self.networks:
                return name, self.networks[name]
        raise UserError(f"{self.path} holds {_listed(self.networks)} and no generator; choose one of them (--weights)")


def _listed(found: Mapping[str, Network]) -> str:
    return ", ".join(repr(name) if name else "one network" for name in found)


def open_checkpoint(path: Path, *, trust_pickle: bool = False) -> Checkpoint:
    """The networks in a file; UserError for one that holds no part of a Wan model."""
    checkpoint = read_checkpoint(path, trust_pickle=trust_pickle)
    if checkpoint is None:
        names = list(_open(path, trust_pickle))
        some = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        raise UserError(
            f"{path}: its tensors ({some}) belong to no model that is known here: a Wan transformer, VAE or text "
            "encoder, a TAEHV decoder or a LoRA"
        )
    return checkpoint


def read_checkpoint(path: Path, *, trust_pickle: bool = False) -> Checkpoint | None:
    """The same; None for tensors of something else."""
    tensors = _open(path, trust_pickle)
    found: dict[str, Network] = {}
    for name, members in networks(tensors, str(path)).items():
        _check_plain(members, str(path))
        kind = kind_of(members)
        if kind is not None:
            entries = {inner: tensors.entries[outer] for inner, outer in members.items()}
            found[name] = Network(kind=kind[0], layout=kind[1], tensors=LazyTensors(entries))
    kinds = {network.kind for network in found.values()} - {LORA}
    if len(kinds) > 1:
        raise UserError(f"{path} holds a {' and a '.join(sorted(kinds))}; give each a file of its own")
    return Checkpoint(path=path, networks=found) if found else None


def kind_of(names: Collection[str]) -> tuple[str, str] | None:
    """(kind, layout) of a network's names, without wrappers."""
    for kind, layout, sign in SIGNS:
        if any(sign.fullmatch(name) for name in names):
            return kind, layout
    return None


def _open(path: Path, trust_pickle: bool) -> LazyTensors:
    if path.suffix == ".safetensors" or path.name.endswith(INDEX_SUFFIX):
        return open_safetensors(path)
    if path.suffix in PICKLE_SUFFIXES:
        return open_pickle(path, trust=trust_pickle)
    raise UserError(f"{path} is no checkpoint file: known are {', '.join(SUFFIXES)} and *{INDEX_SUFFIX}")


def _check_plain(names: Collection[str], where: str) -> None:
    """UserError for weights in a number format of their own."""
    for name in names:
        if name.endswith((".scale_weight", ".weight_scale", ".qweight")) or "quantized_weight" in name:
            raise UserError(f"{where} holds quantised weights ({name}); take the bf16 or fp32 file")


def original_names(network: Network, where: str) -> LazyTensors:
    """A transformer's tensors by their original names. UserError for inputs that are not served (CLIP, control)."""
    names = list(network.tensors)
    _refuse_image_inputs(names, where)
    if network.layout == "original":
        return network.tensors
    entries = {}
    for name, entry in network.tensors.entries.items():
        entries[to_original(name) or name] = entry  # an unknown name stays, and is reported with the others
    return LazyTensors(entries)


CLIP_SIGNS = ("img_emb.", "image_embedder.", ".k_img.", ".v_img.", ".add_k_proj.", ".add_v_proj.")
CONTROL_SIGNS = ("vace_blocks.", "vace_patch_embedding", "control_", "face_adapter.", "casual_audio_encoder.")


def _refuse_image_inputs(names: Collection[str], where: str) -> None:
    for name in names:
        if any(sign in f".{name}" for sign in CLIP_SIGNS):
            raise UserError(
                f"{where} is an image-to-video model with a CLIP image encoder ({name}), which is not served here; "
                "take text-to-video weights: a causal model starts from an image by having it as its first block"
            )
        if name.startswith(CONTROL_SIGNS):
            raise UserError(f"{where} has a control branch ({name}), which is not served here; take the plain weights")
