"""Names of a Wan transformer's tensors: original <-> diffusers' `WanTransformer3DModel`, what training wraps around.

`norm2` and `norm3` change places between the two: the affine one, before the cross-attention, is original `norm3` and
diffusers' `norm2`; the others have no parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from streamgen.errors import UserError

WHOLE = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}
IN_BLOCK = {"norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"} | {
    f"{theirs}.{ours_part}": f"{other}.{other_part}"
    for theirs, other in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for ours_part, other_part in (
        ("q", "to_q"),
        ("k", "to_k"),
        ("v", "to_v"),
        ("o", "to_out.0"),
        ("norm_q", "norm_q"),
        ("norm_k", "norm_k"),
    )
}
TABLES = {"head.modulation": "scale_shift_table"}
BLOCK_TABLES = {"modulation": "scale_shift_table"}

RESIDUES = frozenset(("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"))
"""Words that FSDP, activation checkpointing and torch.compile put between the parts of a name."""
SETS = ("generator_ema", "generator", "critic", "real_score", "fake_score", "ema", "generator_lora", "critic_lora")
"""Several networks in one file: the first part of a name says which."""
WRAPPERS = frozenset(("model", "module", "state_dict", "diffusion_model", "transformer", "base_model", "net"))
BARE = ""
"""The set of a file that holds one network."""


def to_diffusers(name: str) -> str | None:
    """Original -> diffusers; None for a name that no Wan transformer has."""
    return _mapped(name, _TO_DIFFUSERS)


def to_original(name: str) -> str | None:
    """diffusers -> original; None for a name that no Wan transformer has."""
    return _mapped(name, _TO_ORIGINAL)


def module_to_original(name: str) -> str | None:
    """The same for the name of a layer, without `.weight`."""
    found = to_original(f"{name}.weight")
    return None if found is None else found.removesuffix(".weight")


Table = tuple[Mapping[str, str], Mapping[str, str]]
_TO_DIFFUSERS: Table = (WHOLE | TABLES, IN_BLOCK | BLOCK_TABLES)
_TO_ORIGINAL: Table = tuple({v: k for k, v in table.items()} for table in _TO_DIFFUSERS)  # type: ignore[assignment]


def _mapped(name: str, table: Table) -> str | None:
    whole, in_block = table
    if name in whole:
        return whole[name]
    stem, _, leaf = name.rpartition(".")
    if stem in whole and leaf in ("weight", "bias"):
        return f"{whole[stem]}.{leaf}"
    found = re.fullmatch(r"(blocks\.\d+)\.(.+)", name)
    if not found:
        return None
    block, inner = found.groups()
    if inner in in_block:
        return f"{block}.{in_block[inner]}"
    stem, _, leaf = inner.rpartition(".")
    return f"{block}.{in_block[stem]}.{leaf}" if stem in in_block and leaf in ("weight", "bias") else None


def unwrapped(name: str) -> tuple[str, str]:
    """(the network it belongs to, its name there): residues go, and so do wrappers in front."""
    parts = [part for part in name.split(".") if part not in RESIDUES]
    network = BARE
    while len(parts) > 1:
        if network == BARE and parts[0] in SETS:
            network = parts[0]
        elif parts[0] not in WRAPPERS:
            break
        parts = parts[1:]
    return network, ".".join(parts)


def networks(names: Iterable[str], where: str) -> dict[str, dict[str, str]]:
    """Network -> {name in it: name in the file}. UserError when two tensors get one name."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        network, inner = unwrapped(name)
        members = found.setdefault(network, {})
        if inner in members:
            raise UserError(f"{where}: {members[inner]} and {name} are both {inner} once wrappers are taken off")
        members[inner] = name
    return found
