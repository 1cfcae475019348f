"""The training loop: one step, and everything around it that a long run needs.

After every step the order is: log row, validation, pictures, checkpoint. So a checkpoint of step N
says that all rows up to N are on disk; a run killed at any moment continues from the newest
checkpoint and makes the same numbers and weights, bit for bit, as one that was never stopped. (On
one device, with unchanged threads and code.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from streamgen.errors import UserError
from streamgen_train import checkpoint
from streamgen_train.config import TrainConfig
from streamgen_train.ema import Ema
from streamgen_train.logs import Display, RunLog, write_provenance
from streamgen_train.objective import Objective, Turn
from streamgen_train.optim import Optimizer, lr_factor, muon_names, probe_newton_schulz
from streamgen_train.precision import DTYPES, Masters, probe_precision
from streamgen_train.signals import StopSignals

OnProgress = Callable[[int, Mapping[str, float]], None]
Status = Literal["done", "interrupted", "time"]
EVALUATION = 2**31  # microbatch number that seeds validation and pictures
SHARED = EVALUATION + 1  # and the one that seeds what all microbatches of a step have in common


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    status: Status
    step: int
    """Steps done in all."""
    checkpoint: Path


def step_seed(seed: int, step: int, microbatch: int) -> int:
    """63-bit seed of all random numbers of one microbatch."""
    words = np.random.SeedSequence([seed, step, microbatch]).generate_state(2, np.uint32)
    return (int(words[0]) << 31) ^ int(words[1])


def train(
    objective: Objective,
    config: TrainConfig,
    run_dir: str | Path,
    *,
    on_progress: OnProgress | None = None,
    resume: str = "auto",
    resolved: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train until max_steps, max_minutes or a signal; always ends with a checkpoint.

    Build the objective under torch.manual_seed: its initial weights are its own affair.
    `on_progress(steps done, numbers)` is called after each step. `resolved` is the whole config,
    kept in the run folder.
    """
    run_dir = Path(run_dir)
    with checkpoint.run_lock(run_dir):
        torch.set_num_threads(config.threads)
        source = _resume_from(run_dir, resume)
        trainer = Trainer(objective, config, checkpoint.load(source) if source else None, source)
        if resolved is not None:
            write_provenance(run_dir, resolved, trainer.step)
        log = RunLog(run_dir, config.log, trainer.step, resolved or {})
        try:
            with (
                Display(config.max_steps, trainer.step, run_dir.name) as display,
                StopSignals() as stop,
            ):
                for line in trainer.notes:
                    display.say(line)
                return _run(trainer, run_dir, log, display, stop, on_progress)
        finally:
            log.close()


def _resume_from(run_dir: Path, resume: str) -> Path | None:
    own = checkpoint.list_checkpoints(run_dir)
    if resume == "auto":
        return own[-1] if own else None
    if own:
        raise UserError(
            f"{run_dir} already has checkpoints; set resume=auto to continue it, or run_dir=OTHER to start anew"
        )
    return None if resume == "never" else checkpoint.find(Path(resume))


def _run(
    trainer: Trainer,
    run_dir: Path,
    log: RunLog,
    display: Display,
    stop: StopSignals,
    on_progress: OnProgress | None,
) -> TrainResult:
    config, started, before = trainer.config, time.monotonic(), trainer.elapsed_s
    limit_s = math.inf if config.max_minutes is None else config.max_minutes * 60
    newest = checkpoint.list_checkpoints(run_dir)
    path = newest[-1] if newest else None
    while trainer.step < config.max_steps or path is None:
        numbers = trainer.train_step()
        trainer.elapsed_s = before + time.monotonic() - started
        ended = trainer.step >= config.max_steps
        status: Status = "done"
        if not ended and (stop.received or trainer.elapsed_s - before >= limit_s):
            status = "interrupted" if stop.received else "time"
        halting = ended or status != "done"
        if trainer.step % config.log.every == 0 or ended:
            row = trainer.window_means()
            log.write("train", trainer.step, row)
            display.row(trainer.step, config.max_steps, row)
        display.advance(trainer.step)
        is_best = _evaluate(trainer, log, display, ended)
        if is_best or halting or trainer.step % config.checkpoint.every == 0:
            path = checkpoint.save(run_dir, trainer.state_dict(), keep=config.checkpoint.keep, is_best=is_best)
        if on_progress is not None:
            on_progress(trainer.step, numbers)
        if status != "done":
            return TrainResult(status, trainer.step, path)  # type: ignore[arg-type]
    return TrainResult("done", trainer.step, path)


def _evaluate(trainer: Trainer, log: RunLog, display: Display, ended: bool) -> bool:
    """Validation and pictures where they are due; -> this is the best checkpoint so far."""
    config, is_best = trainer.config, False
    if config.validate_every and (ended or trainer.step % config.validate_every == 0):
        scores = trainer.evaluate(trainer.objective.validate)
        if scores:
            log.write("val", trainer.step, scores)
            display.say(f"validation at {trainer.step}: " + "  ".join(f"{k} {v:.4g}" for k, v in scores.items()))
        is_best = trainer.is_best(scores)
    if config.sample_every and (ended or trainer.step % config.sample_every == 0):
        log.pictures(trainer.step, trainer.evaluate(trainer.objective.sample))
    return is_best


class Trainer:
    """The state of a run and the one step that changes it."""

    def __init__(
        self,
        objective: Objective,
        config: TrainConfig,
        state: Mapping[str, Any] | None,
        source: Path | None,
    ) -> None:
        self.objective, self.config = objective, config
        self.device = _device(config.device)
        self.step, self.elapsed_s = 0, 0.0
        self.best: float | None = None
        self.notes: list[str] = []
        self._window: dict[str, list[float]] = {}  # since the last row: name -> [sum, count]
        self.precision = self._choose_precision(state)
        dtype = DTYPES[self.precision]
        objective.prepare(self.device, dtype)
        self.modules = objective.modules()
        if state is not None and source is not None:
            checkpoint.check_fits({k: m.state_dict() for k, m in self.modules.items()}, state["modules"], source)
        self.masters = Masters(self.modules, dtype)
        self.ema = Ema(self.modules, self.masters, config.ema.decay, config.ema.warmup)
        self.optimizer = Optimizer(self.masters.tensors, config.optim, self._choose_newton_schulz(state))
        if state is not None:
            self._load(state)
            self.notes.append(f"continuing from {source}, step {self.step}")
        if config.compile:
            objective.compile(self.modules)
            if objective.needs_ema:
                objective.compile(self.ema.modules)

    def _choose_precision(self, state: Mapping[str, Any] | None) -> str:
        if self.config.precision != "auto":
            return self.config.precision
        if state is not None:
            return str(state["precision"])
        choice, seconds = probe_precision(self.objective, self.device)
        times = ", ".join(f"{name} {1000 * s:.1f} ms" for name, s in seconds.items())
        self.notes.append(f"precision probe: loss and backward take {times}; using {choice}")
        return choice

    def _choose_newton_schulz(self, state: Mapping[str, Any] | None) -> str:
        if self.config.optim.newton_schulz != "auto":
            return self.config.optim.newton_schulz
        if state is not None:
            return str(state["newton_schulz"])
        names = muon_names(self.masters.tensors, self.config.optim)
        if not names:
            return "fp32"
        shapes = [tuple(self.masters.tensors[name].shape) for name in names]
        choice = probe_newton_schulz(shapes, self.device)  # type: ignore[arg-type]
        self.notes.append(f"Muon on {len(names)} matrices; Newton-Schulz is faster in {choice}")
        return choice

    def train_step(self) -> dict[str, float]:
        """One optimiser step; -> its loss, metrics, gradient norm and learning rate."""
        start, config = time.monotonic(), self.config
        ema = self.ema.refresh() if self.objective.needs_ema else None
        for module in self.modules.values():
            module.train()
        collected: dict[str, list[Tensor]] = {}
        for micro in range(config.accumulate):
            seed = step_seed(config.seed, self.step, micro)
            torch.manual_seed(seed)
            turn = Turn(
                self.step,
                torch.Generator().manual_seed(seed),
                torch.Generator().manual_seed(step_seed(config.seed, self.step, SHARED)),
                micro=micro,
            )
            loss, metrics = self.objective.loss(self.objective.batch(turn), turn, ema)
            (loss / config.accumulate).backward()
            self.masters.collect_grads()
            for name, value in {"loss": loss, **metrics}.items():
                collected.setdefault(name, []).append(value.detach().float())
        grads = self.masters.grads()
        norm = torch.nn.utils.get_total_norm(list(grads.values()))
        means = {name: torch.stack(values).mean() for name, values in collected.items()} | {"grad_norm": norm}
        numbers = dict(
            zip(means, torch.stack(list(means.values())).tolist(), strict=True)
        )  # the only wait for the device
        self._refuse_non_finite(numbers, grads)
        if config.optim.grad_clip > 0 and numbers["grad_norm"] > config.optim.grad_clip:
            torch._foreach_mul_(list(grads.values()), config.optim.grad_clip / numbers["grad_norm"])
        factor = lr_factor(self.step, config.max_steps, config.schedule)
        self.optimizer.step(factor)
        self.masters.zero_grad()
        self.masters.publish()
        self.ema.update(self.masters)
        self.objective.after_step(self.step)
        self.step += 1
        numbers["lr_factor"] = factor
        self._add_to_window(numbers, time.monotonic() - start)
        return numbers

    def _refuse_non_finite(self, numbers: Mapping[str, float], grads: Mapping[str, Tensor]) -> None:
        bad = [name for name, value in numbers.items() if not math.isfinite(value)]
        if not bad:
            return
        tensors = [name for name, grad in grads.items() if not bool(torch.isfinite(grad).all())]
        named = f"; gradients of {', '.join(tensors[:5])}{', ...' if len(tensors) > 5 else ''}" if tensors else ""
        raise NonFiniteError(
            f"step {self.step}: {', '.join(f'{n} = {numbers[n]}' for n in bad)}{named}. "
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
        means["clips_per_s"] = self.objective.clips_per_batch * self.config.accumulate / means["step_s"]
        means["elapsed_s"] = self.elapsed_s
        self._window = {}
        return means

    def evaluate(self, call: Callable[[int, Mapping[str, torch.nn.Module]], Any]) -> Any:
        """`call(step, EMA modules)` without gradients, with the same random numbers every time."""
        torch.manual_seed(step_seed(self.config.seed, 0, EVALUATION))
        with torch.no_grad():
            return call(self.step, self.ema.refresh())

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

    def state_dict(self) -> dict[str, Any]:
        modules = {key: dict(module.state_dict()) for key, module in self.modules.items()}
        for full_name, tensor in self.masters.tensors.items():
            key, name = full_name.split(".", 1)
            modules[key][name] = tensor.detach()
        return {
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "best": self.best,
            "row": self._window,
            "precision": self.precision,
            "newton_schulz": self.optimizer.newton_schulz,
            "modules": modules,
            "ema": self.ema.state_dict(),
            "optim": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def _load(self, state: Mapping[str, Any]) -> None:
        self.step, self.elapsed_s, self.best = state["step"], state["elapsed_s"], state["best"]
        self._window = dict(state.get("row", {}))
        for key, module in self.modules.items():
            for name, tensor in module.state_dict().items():
                tensor.copy_(state["modules"][key][name])
        for full_name, master in self.masters.tensors.items():
            key, name = full_name.split(".", 1)
            master.copy_(state["modules"][key][name])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optim"])


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"train.device={name!r} is not a device; use cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda, but torch sees no CUDA device here; use train.device=cpu")
    return device
