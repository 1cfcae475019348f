"""ODE-pair regression from the autoregressive teacher (causal ODE of Causal Forcing; CausVid, arXiv 2412.07772).

The teacher solves its own path from noise to a clean block by N Euler steps with guidance, given the clean blocks of
the data before it. The student sees the same clean blocks and the path at one of its own noise levels, and learns where
the path ends:

    loss = | x0_student(x_sigma, sigma) - x_0 |^2          (x_sigma, x_0) one path of the teacher

A path of a causal teacher is a function of the past and the noise alone; with a bidirectional one it depends on the
future, and students turn out blurred. Pairs are made as they are needed (`pairs: online`), or once, into a folder of
shards (`pairs: cached`): shard k is a function of the settings and k, so a folder that was left half made goes on
where it was, and one made with other settings is refused.

Letters: B clips, G blocks, K stored levels, F latent frames, C H W latent, L text rows.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from streamgen import flow
from streamgen.cache import BlockCache, CacheSpec, KVCache
from streamgen.card import SchedulerConfig
from streamgen.codec import load_codec
from streamgen.embedded_text import EmbeddedText
from streamgen.errors import UserError
from streamgen.text import SpritesTextEncoder
from streamgen.transformer import CausalWanModel, TextContext
from streamgen.weights import load_tree, read_json, save_tree, write_json
from streamgen_distill import teacher
from streamgen_distill.teacher import TaughtObjective
from streamgen_train.loop import step_seed
from streamgen_train.objective import Turn
from streamgen_train.objectives.video import Batch

SETTINGS_FILE = "pairs.json"
MARK = "streamgen_ode_pairs"
DEPENDS_ON = (
    *("ode_steps", "trained_steps", "sample_shift", "guidance", "pairs_seed", "window_frames", "sink_frames"),
    *("clips", "single_clips", "clip_blocks", "single_share", "gap_share", "switch_share", "recache_share"),
    *("text_drop", "word_drop", "world", "geometry", "text", "data"),
)
"""Keys of the config that change the pairs."""
TENSORS = ("x0_BFCHW", "ids_BGL", "clean_ids_BGL", "scored_BG", "states_BKFCHW", "final_BFCHW")
"""What a shard holds of a batch, besides its kind."""


@dataclass(kw_only=True)
class Config(teacher.Config):
    trained_steps: tuple[int, ...] = (4, 2, 1)
    """Step counts of the student, the default one first; paths are stored at the levels of all of them."""
    ode_steps: int = 48
    """Euler steps of the teacher."""
    pairs: Literal["online", "cached"] = "online"
    pairs_from: str | None = None
    """cached: folder of the pairs; those that are missing are made before the first step."""
    pairs_count: int = 256
    """cached: batches of pairs in the folder."""
    pairs_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.trained_steps or min(self.trained_steps) < 1:
            raise ValueError(f"trained_steps is {self.trained_steps}; it must hold one or more counts of at least 1")
        off = [count for count in self.trained_steps if self.ode_steps % count]
        if self.ode_steps < 1 or off:
            raise ValueError(
                f"ode_steps is {self.ode_steps}; every count of trained_steps ({self.trained_steps}) must divide it, "
                "for the student's levels are levels of the teacher's path"
            )
        if [name for name, share in self.visibility.items() if share > 0] != ["clean"]:
            raise ValueError("visibility must be clean alone: the teacher's paths are solved on clean context")
        if (self.pairs == "cached") != (self.pairs_from is not None):
            raise ValueError("pairs=cached needs pairs_from=FOLDER, and pairs=online takes none")
        if self.pairs_count < 1:
            raise ValueError(f"pairs_count is {self.pairs_count}; it must be at least 1")

    @property
    def stored_indices(self) -> tuple[int, ...]:
        """Steps of the teacher's path at which a student stands, noisiest first."""
        return tuple(sorted({i * self.ode_steps // n for n in self.trained_steps for i in range(n)}))


@dataclass(slots=True, kw_only=True)
class PairBatch(Batch):
    """Clips of the data, and on each the teacher's paths from noise."""

    states_BKFCHW: Tensor
    final_BFCHW: Tensor


class OdeObjective(TaughtObjective):
    """The student's x0 at its own levels against the end of the teacher's path."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.sigmas = flow.step_sigmas(config.ode_steps, config.sample_shift)
        self.levels_K = torch.tensor([self.sigmas[i] for i in config.stored_indices])
        self._teacher_digest = ""

    def load_teacher(self) -> dict[str, nn.Module]:
        loaded = super().load_teacher()
        self._teacher_digest = digest(loaded)  # before it is cast
        return loaded

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        fresh = self.teacher is None
        super().prepare(device, dtype)
        self.levels_K = self.levels_K.to(device)
        if fresh and self.config.pairs_from is not None:
            make_pairs(self, Path(self.config.pairs_from), self.config.pairs_count)

    def batch(self, turn: Turn) -> PairBatch:
        if self.config.pairs_from is None:
            return self.pairs(turn)
        shard = int(torch.randint(self.config.pairs_count, (), generator=turn.rng))
        return self.read(Path(self.config.pairs_from) / shard_name(shard))

    def pairs(self, turn: Turn) -> PairBatch:
        """Clips of the turn with the teacher's paths on them."""
        batch = super().batch(turn)
        noise = torch.randn(batch.x0_BFCHW.shape, generator=turn.rng).to(self.device)
        states, final = self.solve(batch, noise)
        values = {name: getattr(batch, name) for name in Batch.__dataclass_fields__}
        return PairBatch(**values, states_BKFCHW=states, final_BFCHW=final)

    @torch.no_grad()
    def solve(self, batch: Batch, noise_BFCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's paths: states at the stored levels [B, K, F, C, H, W], and their ends [B, F, C, H, W].

        Block by block against a cache of the clean blocks, as a stream runs: half the tokens of teacher forcing.
        """
        assert self.teacher is not None
        model, text, g = self.teacher["transformer"], self.teacher["text"], self.config.geometry
        assert isinstance(model, CausalWanModel) and isinstance(text, SpritesTextEncoder | EmbeddedText)
        cache, states, ends = self._cache(len(noise_BFCHW)), [], []
        for b in range(batch.ids_BGL.shape[1]):
            frames = slice(g.block_start(b), g.block_start(b) + g.block_size(b))
            block = cache.begin(frames.start, g.block_size(b))
            ids = batch.ids_BGL[:, b : b + 1]
            prompts = [ids] if self.config.guidance == 1.0 else [ids, torch.full_like(ids, -1)]
            contexts = [model.encode_text(text.encode_ids(p)) for p in prompts]
            path, end = self._path(model, noise_BFCHW[:, frames], contexts, block)
            states.append(path)
            ends.append(end)
            clean = model.encode_text(text.encode_ids(batch.clean_ids_BGL[:, b : b + 1]))
            x0 = batch.x0_BFCHW[:, frames]
            model(x0, torch.zeros(x0.shape[:2], device=x0.device), clean, cache=block)
            cache.commit(block)
        return torch.cat(states, 2), torch.cat(ends, 1)

    def _path(
        self, model: CausalWanModel, x: Tensor, contexts: list[TextContext], block: BlockCache
    ) -> tuple[Tensor, Tensor]:
        """One block's path from noise: (stored states [B, K, F, C, H, W], its end)."""
        stored, states = set(self.config.stored_indices), []
        for step, (sigma, following) in enumerate(zip(self.sigmas, (*self.sigmas[1:], 0.0), strict=True)):
            if step in stored:
                states.append(x)
            timestep = torch.full(x.shape[:2], flow.timestep_of(sigma), device=x.device)
            outputs = [
                flow.to_x0(model(x, timestep, context, cache=block).float(), x, sigma, self.config.model.prediction)
                for context in contexts
            ]
            x0 = outputs[0] if len(outputs) == 1 else flow.guided(outputs[1], outputs[0], self.config.guidance)
            x = flow.euler_step(x, flow.flow_from_x0(x, x0, sigma), sigma, following)
        return torch.stack(states, 1), x

    def _cache(self, clips: int) -> KVCache:
        c = self.config
        spec = CacheSpec.of(
            c.model,
            c.geometry,
            window_frames=c.window_frames,
            sink_frames=c.sink_frames,
            policy="window",
        )
        return KVCache(spec, batch=clips, dtype=self.dtype, device=self.device)

    def loss(self, batch: Batch, turn: Turn, ema: Mapping[str, nn.Module] | None) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(batch, PairBatch)
        index_BG = torch.randint(len(self.levels_K), batch.scored_BG.shape, device=self.levels_K.device)
        index_BF = self.per_frame(index_BG)
        clips, frames = index_BF.shape
        rows, columns = (torch.arange(n, device=index_BF.device) for n in (clips, frames))
        x_t = batch.states_BKFCHW[rows[:, None], index_BF, columns]
        x0 = self.predict_x0(self.modules(), batch, x_t, self.levels_K[index_BF])
        error_BF = (x0 - batch.final_BFCHW).square().mean((2, 3, 4))
        loss = (error_BF * self.per_frame(batch.scored_BG)).mean()
        return loss, {f"ode_{batch.kind}": error_BF.detach().mean()}

    def scheduler(self) -> SchedulerConfig:
        return self.card_scheduler(self.config.trained_steps, "renoise")

    def costs(self) -> dict[str, float]:
        if self.config.pairs_from is None:
            return {}
        c, g = self.config, self.config.geometry
        frames = max(c.clips * g.block_start(c.clip_blocks), c.single_clips * g.block_start(1))
        latents = frames * g.latent_channels * g.latent_height * g.latent_width
        tensors = len(c.stored_indices) + 2  # states, end and the clip itself, in half precision
        return {"latents of the pairs on disk, at most (MB)": c.pairs_count * tensors * latents * 2 / 1e6}

    # -- pairs on disk ------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """What the pairs depend on, as JSON has it: the same settings, the same pairs."""
        values = asdict(self.config)
        kept = {name: values[name] for name in DEPENDS_ON}
        codec = self.config.codec_from
        made_by = {
            "teacher": self._teacher_digest,
            "codec": None if codec is None else digest({"codec": load_codec(codec)}),
        }
        plain: dict[str, Any] = json.loads(json.dumps(kept | made_by))
        return plain

    def read(self, path: Path) -> PairBatch:
        """A shard on the device."""
        tree = load_tree(path, MARK)
        tensors: dict[str, Any] = {
            name: tree[name].to(self.device, torch.float32 if tree[name].is_floating_point() else None)
            for name in TENSORS
        }
        return PairBatch(kind=tree["kind"], **tensors)


def shard_name(shard: int) -> str:
    return f"pairs_{shard:06d}.safetensors"


def make_pairs(objective: OdeObjective, folder: Path, count: int) -> int:
    """Write the shards of `folder` that are missing -> how many; latents are kept in half precision.

    Each appears whole or not at all. UserError for a folder of other settings.
    """
    check_settings(folder / SETTINGS_FILE, objective.settings())
    missing = [shard for shard in range(count) if not (folder / shard_name(shard)).is_file()]
    start = said = time.monotonic()
    for done, shard in enumerate(missing):
        rng = torch.Generator().manual_seed(step_seed(objective.config.pairs_seed, shard, 0))
        pairs = objective.pairs(Turn(objective.config.single_until, rng, rng))
        tensors = {name: getattr(pairs, name) for name in TENSORS}
        halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        save_tree({"kind": pairs.kind, **halves}, folder / shard_name(shard), MARK)
        if done == 0 or time.monotonic() - said > 20:
            said = time.monotonic()
            left_s = (said - start) / (done + 1) * (len(missing) - done - 1)
            print(f"pairs: {done + 1} of {len(missing)} missing batches in {folder}, {left_s:.0f} s to go", flush=True)
    return len(missing)


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a new folder of pairs; UserError when those of an old one are others."""
    if not path.is_file():
        if any(path.parent.glob("pairs_*.safetensors")):
            raise UserError(f"{path.parent} holds pairs but no {path.name}: remove the folder, or name another one")
        write_json(path, settings)
        return
    found = read_json(path)
    changed = [
        f"{name} {found.get(name)} (now {settings.get(name)})"
        for name in dict.fromkeys((*settings, *found))
        if found.get(name) != settings.get(name)
    ]
    if changed:
        raise UserError(
            f"the pairs in {path.parent} were made with {', '.join(changed)}: set objective.pairs_from to another "
            "folder, or these keys back"
        )


def digest(modules: Mapping[str, nn.Module]) -> str:
    """The first half of the sha256 of names and weights."""
    found = hashlib.sha256()
    for key, module in sorted(modules.items()):
        for name, tensor in sorted(module.state_dict().items()):
            found.update(f"{key}.{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


def build(config: Config) -> OdeObjective:
    return OdeObjective(config)
