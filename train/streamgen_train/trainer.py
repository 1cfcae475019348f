"""One step of a run and the state that it changes: weights, averages, optimisers, numbers since the last row."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from streamgen.errors import UserError
from streamgen.parallel.processes import ALONE, Processes
from streamgen.parallel.tensors import by_kind, local, whole
from streamgen_train import activations, checkpoint
from streamgen_train.config import OptimConfig, TrainConfig
from streamgen_train.distributed import (
    average_gradients,
    device_of,
    equalise,
    own_microbatches,
    release,
    shard_modules,
    sharding_of,
)
from streamgen_train.ema import Ema
from streamgen_train.lora import adapt, fingerprint, frozen, settings_of
from streamgen_train.objective import Modules, Objective, Turn
from streamgen_train.optim import lr_factor, muon_names, probe_newton_schulz
from streamgen_train.plain import encode
from streamgen_train.players import Player, make_players, optim_configs, owners
from streamgen_train.precision import DTYPES, Masters, probe_precision
from streamgen_train.saved import Saved
from streamgen_train.seeds import ADAPTERS, EVALUATION, SHARED, step_seed
from streamgen_train.throughput import Throughput
from streamgen_train.timing import BACKWARD, Stopwatch, timed


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite."""


class Trainer:
    """The state of a run and the one step that changes it; the same in every process."""

    def __init__(
        self,
        objective: Objective,
        config: TrainConfig,
        saved: Saved | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.objective, self.config = objective, config
        self.processes = processes = processes or ALONE
        self.device, self.sharding = device_of(config.device, processes), sharding_of(config, processes)
        self.step, self.elapsed_s = 0, 0.0
        self.best: float | None = None
        self.notes: list[str] = []
        self._window: dict[str, list[float]] = {}  # since the last row: name -> [sum, count]
        self._frozen_print: str | None = None
        self._throughput: Throughput | None = None
        self.watch = Stopwatch(self.device)
        self.precision = self._choose_precision(saved)
        dtype = DTYPES[self.precision]
        objective.prepare(self.device, dtype)
        self.modules = objective.modules()
        adapt(self.modules, config.lora, step_seed(config.seed, 0, ADAPTERS))
        if saved is None:
            equalise(self.modules, processes)
        else:
            checkpoint.check_modules(saved, self.modules, settings_of(config.lora))
        in_shards: list[str] = []
        copies: dict[str, nn.Module] | None = None
        if self.sharding == "fsdp2":
            in_shards, copies = shard_modules(self.modules, self.device, dtype, processes)
        self.masters = Masters(self.modules, dtype, in_shards)
        self._frozen = frozen(self.modules, config.lora)
        for name, parameter in self._frozen.items():
            if name.split(".", 1)[0] not in in_shards:  # those are gathered in the compute dtype
                parameter.data = parameter.data.to(dtype)
        self.ema = Ema(self.modules, self.masters, config.ema, copies)
        optims = optim_configs(config, objective.players())
        self.newton_schulz = self._choose_newton_schulz(optims, saved)
        self.players = make_players(objective, self.masters.tensors, optims, self.newton_schulz)
        if saved is not None:
            self._load(saved)
            self.notes.append(f"continuing from {saved.path}, step {self.step}")
        self.notes += activations.fit(objective, self.device, self._bytes_to_come(), processes)
        self._release()
        if config.compile:
            objective.compile(self.modules)
            if objective.needs_ema:
                objective.compile(self.ema.modules)
        self.notes += objective.notes()

    def _choose_precision(self, saved: Saved | None) -> str:
        if self.config.precision != "auto":
            return self.config.precision
        if saved is not None:
            return str(saved.meta["precision"])
        choice, seconds = self.processes.from_first(probe_precision(self.objective, self.device))
        times = ", ".join(f"{name} {1000 * s:.1f} ms" for name, s in seconds.items())
        self.notes.append(f"precision probe: loss and backward take {times}; using {choice}")
        return choice

    def _choose_newton_schulz(self, optims: Mapping[str, OptimConfig], saved: Saved | None) -> str:
        """For those players that leave it open."""
        shapes = [
            (int(tensors[name].shape[0]), int(tensors[name].shape[1]))
            for player, tensors in owners(self.objective, self.masters.tensors).items()
            if optims[player].newton_schulz == "auto"
            for name in muon_names(tensors, optims[player])
        ]
        if not shapes:
            return "fp32"
        if saved is not None:
            return str(saved.meta["newton_schulz"])
        choice = self.processes.from_first(probe_newton_schulz(shapes, self.device))
        self.notes.append(f"Muon on {len(shapes)} matrices; Newton-Schulz is faster in {choice}")
        return choice

    def _bytes_to_come(self) -> int:
        """Gradients, of parameters and of masters apart from them, and moments that are not there yet."""
        masters, params = self.masters.tensors, self.masters.params
        grads = sum(local(t).nbytes for t in masters.values()) + sum(params[n].nbytes for n in self.masters.apart)
        return grads + sum(player.optimizer.bytes_to_come() for player in self.players.values())

    def train_step(self) -> dict[str, float]:
        """The turns of one step, in order; -> loss, metrics and gradient norm of each player that had one, and the
        factor of the learning rate.
        """
        start = time.monotonic()
        with self.watch.step():
            numbers = self._turns()
        self._add_to_window(numbers, time.monotonic() - start)
        return {name: value for name, value in numbers.items() if name != "turns"}

    def _turns(self) -> dict[str, float]:
        turns = self.objective.turns(self.step)
        if not turns or not set(turns) <= set(self.players):
            raise ValueError(f"turns({self.step}) is {turns}; players are {tuple(self.players)}")
        factor = lr_factor(self.step, self.config.max_steps, self.config.schedule)
        for module in self.modules.values():
            module.train()
        numbers: dict[str, float] = {}
        for name in turns:
            player = self.players[name]
            numbers |= {player.prefix + key: value for key, value in self._play(player, factor).items()}
        self.objective.after_step(self.step)
        self.step += 1
        return {**numbers, "lr_factor": factor, "turns": len(turns)}

    def _play(self, player: Player, factor: float) -> dict[str, float]:
        """One optimiser step of one player; -> its numbers."""
        self._release()
        if len(self.players) > 1:
            self.masters.train_only(player.tensors)
        ema = self.ema.refresh() if self.objective.needs_ema else None
        micros = own_microbatches(self.config.accumulate, self.processes)
        measured = [self._microbatch(player, micro, len(micros), ema) for micro in micros]
        with timed("exchange"):
            average_gradients(player.tensors, self.processes)
            grads = self.masters.grads()
            numbers = self._means(micros, measured, _total_norm(grads))
        self._refuse_non_finite(player, numbers, grads)
        with timed("optimiser"):
            if player.grad_clip > 0 and numbers["grad_norm"] > player.grad_clip:
                torch._foreach_mul_([local(grad) for grad in grads.values()], player.grad_clip / numbers["grad_norm"])
            self._release()
            player.optimizer.step(factor)
            self.masters.zero_grad()
            self.masters.publish(player.tensors)
            self.ema.update(player.name, player.tensors, self.step)
        if len(self.players) > 1:
            self.masters.train_only(self.masters.tensors)
        return numbers

    def _microbatch(self, player: Player, micro: int, count: int, ema: Modules | None) -> dict[str, Tensor]:
        """Add the gradients of one of `count` microbatches; -> its loss and metrics, not yet waited for."""
        seed, step = self.config.seed, self.step
        own = step_seed(seed, step, micro, player.seed_index)
        torch.manual_seed(own)
        turn = Turn(
            step,
            torch.Generator().manual_seed(own),
            torch.Generator().manual_seed(step_seed(seed, step, SHARED, player.seed_index)),
            player.name,
            micro,
        )
        with timed("data"):
            batch = self.objective.batch(turn)
        with timed("forward"):
            loss, metrics = self.objective.loss(batch, turn, ema)
        with timed(BACKWARD):
            (loss / count).backward()
            self.masters.collect_grads()
        return {name: value.detach().float() for name, value in {"loss": loss, **metrics}.items()}

    def _means(self, micros: range, measured: list[dict[str, Tensor]], norm: Tensor) -> dict[str, float]:
        """Means over the microbatches of all processes, each over those that gave the number."""
        values = torch.stack([value for found in measured for value in found.values()] + [norm]).tolist()  # waits
        own = {m: {name: values.pop(0) for name in found} for m, found in zip(micros, measured, strict=True)}
        everyone: dict[int, dict[str, float]] = {}
        for part in self.processes.gather(own):
            everyone |= part
        collected: dict[str, list[float]] = {}
        for micro in sorted(everyone):
            for name, value in everyone[micro].items():
                collected.setdefault(name, []).append(value)
        means = {name: float(torch.tensor(found).mean()) for name, found in collected.items()}
        return means | {"grad_norm": values[0]}

    def _refuse_non_finite(self, player: Player, numbers: Mapping[str, float], grads: Mapping[str, Tensor]) -> None:
        bad = [name for name, value in numbers.items() if not math.isfinite(value)]
        if not bad:
            return
        tensors = [name for name, grad in grads.items() if not bool(whole(torch.isfinite(grad).all()))]
        named = f"; gradients of {', '.join(tensors[:5])}{', ...' if len(tensors) > 5 else ''}" if tensors else ""
        whose = f", player {player.name}" if len(self.players) > 1 else ""
        raise NonFiniteError(
            f"step {self.step}{whose}: {', '.join(f'{n} = {numbers[n]}' for n in bad)}{named}. "
            "No checkpoint of it was written; lower the learning rate, "
            "or continue from the last checkpoint with another train.seed"
        )

    def _add_to_window(self, numbers: Mapping[str, float], seconds: float) -> None:
        for name, value in {**numbers, "step_s": seconds}.items():
            total, count = self._window.get(name, (0.0, 0))
            self._window[name] = [total + value, count + 1]

    def window_means(self) -> dict[str, float]:
        """Means since the last row, each over the steps that gave the number, with the throughput; starts a new row."""
        means = {name: total / count for name, (total, count) in self._window.items()}
        clips = self.objective.clips_per_batch * self.config.accumulate * means.pop("turns")
        means["clips_per_s"], means["steps_per_s"] = clips / means["step_s"], 1 / means["step_s"]
        means |= self._speed().of(means["step_s"])
        means |= self.watch.shares()
        means["elapsed_s"] = self.elapsed_s
        self._window = {}
        return means

    def _speed(self) -> Throughput:
        """The first time, it measures the device."""
        if self._throughput is None:
            dtype = DTYPES[self.precision]
            self._throughput = Throughput(self.config, self.objective, dtype, self.device, self.processes.count)
        return self._throughput

    def evaluate(self, call: Callable[[int, Mapping[str, nn.Module]], Any]) -> Any:
        """`call(step, EMA modules)` without gradients, with the same random numbers every time."""
        torch.manual_seed(step_seed(self.config.seed, 0, EVALUATION))
        self._release()
        with torch.no_grad():
            found = call(self.step, self.ema.refresh())
        self._release()
        return found

    def _release(self) -> None:
        """Of modules in shards, what a pass has gathered: weights change, or are written."""
        for module in (*self.modules.values(), *self.ema.modules.values()) if self.sharding == "fsdp2" else ():
            release(module)

    def is_best(self, scores: Mapping[str, float]) -> bool:
        rule = self.config.checkpoint
        if rule.best is None:
            return False
        if rule.best not in scores:
            allowed = ", ".join(scores) or "(nothing)"
            raise UserError(f"train.checkpoint.best={rule.best!r} is no validation number; there are: {allowed}")
        value = scores[rule.best]
        if self.best is not None and not (value < self.best if rule.best_mode == "min" else value > self.best):
            return False
        self.best = value
        return True

    def _tensors(self) -> dict[str, Tensor]:
        """What changes in a run, but for the objective's state, by the flat names of a checkpoint."""
        found = {
            f"modules/{key}.{name}": tensor
            for key, module in self.modules.items()
            for name, tensor in module.state_dict().items()
            if f"{key}.{name}" not in self._frozen
        }
        found |= {f"modules/{name}": tensor for name, tensor in self.masters.tensors.items()}
        found |= {f"ema/{name}": tensor for name, tensor in self.ema.shadow.items()}
        for player in self.players.values():
            found |= {f"optim/{name}": tensor for name, tensor in player.optimizer.tensors().items()}
        return found

    def state(self) -> checkpoint.State:
        """What a checkpoint keeps; every process must ask, and has its part of the tensors."""
        tensors = self._tensors()
        own = encode(self.objective.state_dict(), "objective", tensors)
        parts = self.processes.gather(own["dict"])
        entries = [[k, v] for rank, part in enumerate(parts) for k, v in part if rank == 0 or type(k) is int]
        meta: dict[str, Any] = {
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "best": self.best,
            "row": self._window,
            "precision": self.precision,
            "newton_schulz": self.newton_schulz,
            "ema_updates": self.ema.updates,
            "players": self.objective.players(),
            "sharding": self.sharding,
            "processes": self.processes.count,
            "objective": {"dict": entries},
        }
        if not self._frozen:
            return checkpoint.State(tensors, meta)
        if self._frozen_print is None:
            self._frozen_print = fingerprint(self._frozen)
        meta["lora"] = {"modules": settings_of(self.config.lora), "base": self._frozen_print}
        return checkpoint.State(tensors, meta, {f"base/{name}": tensor for name, tensor in self._frozen.items()})

    def _load(self, saved: Saved) -> None:
        meta = saved.meta
        self.step, self.elapsed_s, self.best = meta["step"], meta["elapsed_s"], meta["best"]
        self._window = {name: list(pair) for name, pair in meta.get("row", {}).items()}
        moments = {name.removeprefix("optim/") for name in saved.names("optim/")}
        for player in self.players.values():
            player.optimizer.prepare_for(moments)
        tensors = self._tensors()
        checkpoint.check_holds(saved, tensors)
        saved.read_into(tensors)
        base = saved.base()
        if base is not None:
            base.read_into({f"base/{name}": tensor for name, tensor in self._frozen.items()})
            self._frozen_print = meta["lora"]["base"]
        self.masters.publish(self.masters.tensors)
        self.ema.take_frozen()
        self.ema.updates = dict(meta["ema_updates"])
        self.objective.load_state_dict(saved.objective_state(self.processes.rank, self.processes.count))


def _total_norm(grads: Mapping[str, Tensor]) -> Tensor:
    """Of all gradients together, in shards or not."""
    norms = by_kind(grads.values(), torch.nn.utils.get_total_norm)
    return torch.nn.utils.get_total_norm(norms) if len(norms) != 1 else norms[0]
