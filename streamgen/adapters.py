"""LoRA files that come and go while a model is loaded.

They are merged into the weights, so a block costs what it did before. The weights that a file changes are copied to the
host first, and every merge starts from the copies: without adapters the model is the loaded one, to the bit. The files
are read again at each merge; no factors are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from streamgen.checkpoints.lora import Lora, added, changes, open_lora
from streamgen.errors import UserError
from streamgen.quantised_linear import QuantisedLinear
from streamgen.transformer import CausalWanModel
from streamgen.weights import fingerprint_files, nearest

if TYPE_CHECKING:
    from streamgen.pipeline import StreamPipeline

MAX_STRENGTH = 100.0
TRANSITIONS = ("cut", "recache", "scene")
"""The later ones change more of what a stream holds."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    lora: Lora
    digest: str


class Adapters:
    """The LoRA files known to one transformer, and which of them are in its weights now."""

    def __init__(self, model: CausalWanModel) -> None:
        self.model = model
        self.active: dict[str, float] = {}
        """Name -> strength of what is merged, in the order of merging."""
        self.version = 0
        """Grows with every change of a weight: what was computed before it is of other weights."""
        self._known: dict[str, _Loaded] = {}
        self._base: dict[str, Tensor] = {}  # parameter -> the loaded values, on the host

    @property
    def names(self) -> list[str]:
        return list(self._known)

    def load(self, path: Path, name: str | None = None, *, trust_pickle: bool = False) -> str:
        """Read a LoRA file and check that it fits -> its name (by default the file's). Changes no weight yet."""
        if any(isinstance(module, QuantisedLinear) for module in self.model.modules()):
            raise UserError(f"{path}: adapters are merged into whole weights; load the model without weights_dtype")
        name = path.stem if name is None else name
        parameters = dict(self.model.named_parameters())
        shapes = {key: tuple(tensor.shape) for key, tensor in parameters.items()}
        loaded = _Loaded(open_lora(path, shapes, trust_pickle=trust_pickle), fingerprint_files({path.name: path})[:24])
        if name in self._known and self._known[name].digest != loaded.digest:
            raise UserError(f"there is another adapter called {name!r}; give this one a name of its own")
        self._known[name] = loaded
        return name

    def check(self, strengths: Mapping[str, float]) -> None:
        """UserError for adapters that are not loaded, and for strange strengths."""
        for name, strength in strengths.items():
            if name not in self._known:
                raise UserError(f"no adapter {name!r} is loaded{nearest(name, self.names)}; load_lora(FILE) loads one")
            if not (math.isfinite(strength) and abs(strength) <= MAX_STRENGTH):
                raise UserError(
                    f"adapter {name!r}: strength is {strength}; it must be {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}"
                )

    @torch.no_grad()
    def use(self, strengths: Mapping[str, float]) -> bool:
        """Merge these and no others -> whether a weight has changed. A merge that fails leaves the loaded weights."""
        self.check(strengths)
        wanted = {name: float(strength) for name, strength in strengths.items() if strength != 0}
        if wanted == self.active and list(wanted) == list(self.active):
            return False
        parameters = dict(self.model.named_parameters())
        touched = {key for name in (*self.active, *wanted) for key in self._changed(name)}
        for key in touched - self._base.keys():
            self._base[key] = parameters[key].detach().to("cpu", copy=True)
        self.version += 1
        try:
            for key in touched:
                parameters[key].copy_(self._merged(key, wanted, parameters[key].device))
        except BaseException:
            for key in touched:
                parameters[key].copy_(self._base[key])
            self.active = {}
            raise
        self.active = wanted
        return True

    def digest(self, name: str) -> str | None:
        """Identity of a loaded file; None for a name that is not loaded."""
        return self._known[name].digest if name in self._known else None

    def _changed(self, name: str) -> list[str]:
        pairs = self._known[name].lora.pairs
        parameters = dict(self.model.named_parameters())
        both = ((layer, leaf) for layer in pairs for leaf in ("weight", "bias"))
        return [
            f"{layer}.{leaf}" for layer, leaf in both if changes(pairs[layer], leaf) and f"{layer}.{leaf}" in parameters
        ]

    def _merged(self, key: str, wanted: Mapping[str, float], device: torch.device) -> Tensor:
        base = self._base[key]
        layer, _, leaf = key.rpartition(".")
        weight = base.to(device, torch.float32)
        for name, strength in wanted.items():
            lora = self._known[name].lora
            if layer in lora.pairs and changes(lora.pairs[layer], leaf):
                weight = added(weight, lora.pairs[layer], leaf, lora.alpha, strength)
        return weight.to(base.dtype)


class AdapterPlan:
    """Which adapters one stream has from which block on. While it has no plan of its own it has the pipeline's."""

    def __init__(self, pipe: StreamPipeline) -> None:
        self._pipe = pipe
        self._changes: dict[int, tuple[dict[str, float], str | None]] = {}  # block -> (name -> strength, transition)

    def __bool__(self) -> bool:
        return bool(self._changes)

    def change(self, strengths: Mapping[str, float], transition: str, block: int) -> None:
        """From `block` on these; UserError for what is not loaded and for unknown transitions."""
        if transition not in TRANSITIONS:
            raise UserError(f"transition {transition!r}: to adapters it is one of {', '.join(TRANSITIONS)}")
        self._pipe.adapters.check(strengths)
        self._changes = {**self._changes, block: (dict(strengths), transition)}

    def at(self, block: int) -> dict[str, float]:
        """Name -> strength of a block's adapters."""
        began = self._began(block)
        return dict(self._pipe.loras if began is None else self._changes[began][0])

    def enter(self, block: int) -> str | None:
        """Give the model the weights of a block -> the transition, where they change with it."""
        if self._pipe.adapters.names:
            self._pipe.adapters.use(self.at(block))
        began = self._began(block)
        return self._changes[block][1] if began == block else None

    def _began(self, block: int) -> int | None:
        """The block from which on the change holds that holds at `block`."""
        return max((start for start in self._changes if start <= block), default=None)

    def state_dict(self, block: int) -> dict[str, Any]:
        """JSON values of what holds from `block` on, with the identity of each file; the pipeline's adapters count as
        the stream's. Empty if none.
        """
        pipe, began = self._pipe, self._began(block)
        changes = {start: change for start, change in self._changes.items() if began is None or start >= began}
        if began is None:
            changes = {0: (dict(pipe.loras), None), **changes}
        if changes == {0: ({}, None)}:
            return {}
        used = sorted({name for strengths, _ in changes.values() for name in strengths})
        files = {name: pipe.adapters.digest(name) for name in used}
        return {"files": files, "changes": [[start, *change] for start, change in changes.items()]}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """UserError where the pipeline has not the files. A stream without adapters goes on without."""
        for name, digest in saved.get("files", {}).items():
            if self._pipe.adapters.digest(name) != digest:
                raise UserError(
                    f"the stream was made with the adapter {name!r}; load that file first, by that name "
                    "(load_lora, or --lora FILE=STRENGTH)"
                )
        changes = saved.get("changes", [[0, {}, None]])
        self._changes = {block: (dict(strengths), transition) for block, strengths, transition in changes}
        if list(self._changes) == [0] and list(self._changes[0][0].items()) == list(self._pipe.loras.items()):
            self._changes = {}  # as the pipeline: it may share launches with others


def stronger(one: str | None, other: str | None) -> str | None:
    """Of two transitions to one block the one that changes more; a prompt's "blend" changes as little as "cut"."""
    return max(one, other, key=lambda name: TRANSITIONS.index(name) if name in TRANSITIONS else -1)
