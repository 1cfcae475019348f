"""Typed configs: the dataclasses of a run, and `from_dict`, which builds any dataclass from plain
data or says what is wrong.

Hydra composes YAML into one plain dictionary; this file turns it into objects. OmegaConf's own
structured configs are not used for that: they have no Literal, return tuples as lists, and refuse
to fill frozen dataclasses such as TransformerConfig.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, Union

from streamgen.errors import UserError

T = TypeVar("T")


@dataclass(kw_only=True)
class OptimConfig:
    kind: Literal["adamw", "muon"] = "adamw"
    """muon: Muon on 2-D parameters whose name contains `muon_match`, AdamW on the rest."""
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.01
    """AdamW, on parameters of two or more dimensions only."""
    muon_lr: float = 8e-3
    muon_momentum: float = 0.95
    muon_weight_decay: float = 0.0
    muon_match: str = "blocks."
    newton_schulz: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the Newton-Schulz iterations; auto measures which is faster, once per run.
    """
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""


@dataclass(kw_only=True)
class ScheduleConfig:
    kind: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = 100
    decay_steps: int = 0
    """constant only: the last `decay_steps` before max_steps fall linearly to `final`."""
    final: float = 0.0
    """Fraction of the learning rate at max_steps."""


@dataclass(kw_only=True)
class EmaConfig:
    decay: float = 0.999
    warmup: float = 10.0
    """The n-th average uses min(decay, (1 + n) / (warmup + n)); 1 or less: always `decay`."""
    start_step: int = 0
    """Before this step the average is a copy of the weights. Published: decay 0.99 from step 200, warmup 1."""


@dataclass(kw_only=True)
class LoraConfig:
    """Needs the package peft."""

    rank: int = 8
    alpha: float = 8.0
    """W + alpha / rank B A."""
    targets: tuple[str, ...] | None = None
    """Linear layers by their name within a block (ffn.0), or its beginning (self_attn) or end (q); null: all."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}, but must be at least 1")
        if self.targets is not None and not self.targets:
            raise ValueError("targets is empty; name layers of a block, or null for all")


@dataclass(kw_only=True)
class LogConfig:
    every: int = 20
    """Steps between rows of the JSONL and CSV logs; a row holds means over these steps."""
    wandb: Literal["disabled", "online", "offline"] = "disabled"
    """Needs the package wandb; its key comes from `wandb login`, never from a config."""
    wandb_project: str = "streamgen"
    wandb_timeout_s: float = 30.0
    """How long to wait for wandb's server at the start, before going on offline."""
    curves: bool = True
    """Draw curves.png at every validation and at the end."""
    video_fps: float = 16.0
    """Of sample videos."""


@dataclass(kw_only=True)
class CheckpointConfig:
    every: int = 500
    keep: int = 2
    """Newest checkpoints to keep; the best one is kept besides."""
    best: str | None = None
    """Validation number that picks the best checkpoint; None: no best is kept."""
    best_mode: Literal["min", "max"] = "min"


@dataclass(kw_only=True)
class TrainConfig:
    seed: int = 0
    max_steps: int = 1000
    """May be changed on resume; the decay of the learning rate follows."""
    max_minutes: float | None = None
    """Wall-clock limit of this start; the run stops with a checkpoint and can be resumed."""
    accumulate: int = 1
    """Microbatches per step, over all processes: a multiple of their number."""
    sharding: Literal["auto", "none", "ddp", "fsdp2"] = "auto"
    """Over the processes that torchrun starts. ddp: all have all weights. fsdp2: modules with blocks in shards. auto:
    ddp for several. May be changed on resume, as may the number of processes."""
    process_timeout_s: float = 600.0
    """How long a process waits for another before the run ends (a killed one is noticed at once)."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """bf16: bf16 weights with fp32 masters; auto measures which is faster, once per run."""
    compile: bool = False
    device: str = "cpu"
    threads: int = 1
    validate_every: int = 500
    """0: never."""
    sample_every: int = 500
    """0: never."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    optim_of: dict[str, dict[str, Any]] = field(default_factory=dict)
    """player -> keys of `optim` that are different for it, such as {critic: {lr: 4e-7}}."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    lora: dict[str, LoraConfig] = field(default_factory=dict)
    """module -> LoRA on it: its own weights stay, and only low-rank updates of its blocks learn. The run must go on
    with the same ones."""
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        for name, value, least in (
            ("max_steps", self.max_steps, 1),
            ("accumulate", self.accumulate, 1),
            ("threads", self.threads, 1),
            ("log.every", self.log.every, 1),
            ("checkpoint.every", self.checkpoint.every, 1),
            ("checkpoint.keep", self.checkpoint.keep, 1),
            ("validate_every", self.validate_every, 0),
            ("sample_every", self.sample_every, 0),
            ("schedule.warmup_steps", self.schedule.warmup_steps, 0),
            ("ema.start_step", self.ema.start_step, 0),
        ):
            if value < least:
                raise UserError(f"train.{name} is {value}, but must be at least {least}")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise UserError(f"train.max_minutes is {self.max_minutes}, but must be positive or null")
        for name, number in (
            ("process_timeout_s", self.process_timeout_s),
            ("log.wandb_timeout_s", self.log.wandb_timeout_s),
            ("log.video_fps", self.log.video_fps),
        ):
            if number <= 0:
                raise UserError(f"train.{name} is {number}, but must be positive")
        if not 0.0 <= self.ema.decay < 1.0:
            raise UserError(f"train.ema.decay is {self.ema.decay}, but must be in [0, 1)")
        for player in self.optim_of:
            self.optim_for(player)

    def optim_for(self, player: str) -> OptimConfig:
        """`optim` with what `optim_of` changes for this player."""
        changes = self.optim_of.get(player, {})
        return from_dict(OptimConfig, {**dataclasses.asdict(self.optim), **changes}, f"train.optim_of.{player}")


@dataclass(kw_only=True)
class RunConfig:
    """The whole of a composed experiment; `objective` is checked against the Config of the
    objective that it names.
    """

    experiment: str
    run_dir: str
    resume: str = "auto"
    """auto: continue when the folder has checkpoints; never: refuse such a folder; else a
    checkpoint or run folder to continue.
    """
    dry_run: bool = False
    train: TrainConfig
    objective: dict[str, Any]


def nearest(word: str, allowed: Iterable[str]) -> str:
    """End of a sentence: '; did you mean X?', or '.' when nothing is near."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "."


def from_dict(cls: type[T], data: Mapping[str, Any], path: str = "") -> T:
    """An object of dataclass `cls` from plain data; unknown keys, missing keys and wrong types are
    UserErrors that name the key.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{path or 'config'}: expected a group of keys, got {data!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            where = f" in {path}" if path else ""
            raise UserError(
                f"unknown key {_join(path, str(key))!r}{nearest(str(key), fields)} Allowed{where}: {', '.join(fields)}"
            )
    values = {}
    for name, spec in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], _join(path, name))
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise UserError(f"missing key {_join(path, name)!r}: set it as {_join(path, name)}=VALUE")
    try:
        return cls(**values)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path or 'config'}: {error}") from error


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as the type `hint`; int passes for float, a list for a tuple, nothing else is bent."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, path)
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        raise UserError(
            f"{path}={value!r} is not allowed{nearest(str(value), map(str, args))} Allowed: {', '.join(map(str, args))}"
        )
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, path)
    if origin in (tuple, list):
        return _convert_sequence(origin, args, value, path)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{path}: expected a group of keys, got {value!r}")
        return {_convert(args[0], k, path): _convert(args[1], v, _join(path, str(k))) for k, v in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is hint:
        return value
    raise UserError(f"{path}={value!r} is a {type(value).__name__}, but must be {_name(hint)}")


def _convert_union(args: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in args:
        return None
    choices = [a for a in args if a is not type(None)]
    for choice in choices[:-1]:
        try:
            return _convert(choice, value, path)
        except UserError:  # the last choice gives the message
            continue
    return _convert(choices[-1], value, path)


def _convert_sequence(origin: type, args: tuple[Any, ...], value: Any, path: str) -> Any:
    if not isinstance(value, list | tuple):
        raise UserError(f"{path}={value!r} is a {type(value).__name__}, but must be a list")
    if origin is list or args[-1] is Ellipsis:
        return origin(_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if len(value) != len(args):
        raise UserError(f"{path}={list(value)} has {len(value)} values, but must have {len(args)}")
    return tuple(_convert(a, v, f"{path}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))


def _name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint))
