"""What every objective on video has in common: clips of the world, codec, text, geometry, pictures, export.

Letters: B clips, G blocks, F latent frames, C H W latent, L D text rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from streamgen.attention import check_backend, check_trainable
from streamgen.card import SchedulerConfig
from streamgen.codec import SpritesCodec, load_codec
from streamgen.costs import Work
from streamgen.embedded_text import EmbeddedText, EmbeddedTextConfig
from streamgen.errors import UserError
from streamgen.geometry import VideoGeometry
from streamgen.kernel_choice import ops_for
from streamgen.ops import select
from streamgen.text import SpritesTextConfig, SpritesTextEncoder
from streamgen.transformer import CausalWanModel
from streamgen.transformer_config import TransformerConfig
from streamgen.visibility import Layout, check_window, frame_mask
from streamgen.worlds import grammar, sprites
from streamgen_train.checkpoint import fill, load_modules
from streamgen_train.clips import Clips, Kind, make_clips
from streamgen_train.finer import finer_patches
from streamgen_train.objective import Objective, Turn
from streamgen_train.objectives.views import CLEAN, View
from streamgen_train.pictures import pipeline_of, sample_sheet
from streamgen_train.videos.config import SourceConfig
from streamgen_train.videos.latents import LatentSource
from streamgen_train.videos.prompts import PromptSource
from streamgen_train.videos.source import Source, VideoSource, open_source


@dataclass(kw_only=True)
class Config:
    model: TransformerConfig
    codec_from: str | None
    """Codec folder (config.json and weights), or a model folder that has one; null with cached latents, for which
    nothing is encoded (and nothing decoded: there are no pictures then)."""
    text: SpritesTextConfig | EmbeddedTextConfig = field(default_factory=SpritesTextConfig)
    """The word table of the sprites world, or a file of prompts encoded beforehand (`file`)."""
    geometry: VideoGeometry
    data: SourceConfig | None = None
    """Videos or cached latents with captions; null: the sprites world."""
    world: grammar.Part = field(default_factory=grammar.Part)
    """The part of the sprites world that is learned (all of it by default)."""
    window_frames: int = 12
    sink_frames: int = 3
    clip_blocks: int = 4
    clips: int = 12
    """Clips of clip_blocks blocks in a batch."""
    single_clips: int = 48
    """Clips of one block in a batch of the 'single' kind."""
    single_share: float = 0.3
    """Share of 'single' batches ..."""
    single_until: int = 0
    """... and the first steps are all of that kind."""
    gap_share: float = 0.3
    """Share of 'gap' batches among the others."""
    switch_share: float = 0.5
    recache_share: float = 0.5
    """Share of clips whose past is shown under the last prompt, as after a re-cache."""
    text_drop: float = 0.1
    word_drop: float = 0.1
    """Share of clips of which each word is left out with probability 0.3."""
    attention_backend: str = "sdpa"
    """A name of streamgen.attention.BACKENDS: spans under compile on a CPU, flex for long clips on a GPU."""
    ops: Literal["auto", "reference", "triton"] = "auto"
    """The table of operations of every transformer. auto: on a CUDA device our kernels, if each equals its reference
    there, else plain torch; under train.compile always plain torch, which inductor fuses itself."""
    recompute: int | Literal["auto", "all"] = "auto"
    """Layers, from the first, that keep their input alone in a pass without a cache and run again in its backward.
    auto: a pass of the largest batch is measured at the start, and the fewest layers that make it fit are taken."""
    init_from: str | None = None
    """Run folder or checkpoint to take the weights from."""
    validation_clips: int = 32
    sample_steps: int = 16
    sample_shift: float = 5.0

    def __post_init__(self) -> None:
        check_backend(self.attention_backend)
        check_window(self.window_frames, self.sink_frames, self.geometry.block_frames)
        layers = self.model.num_layers
        if isinstance(self.recompute, int) and not 0 <= self.recompute <= layers:
            raise ValueError(f"recompute is {self.recompute}; it must be in [0, {layers}], the model's layers, or auto")
        if self.clip_blocks < 1:
            raise ValueError(f"clip_blocks is {self.clip_blocks}; it must be at least 1")
        if self.codec_from is None and (self.data is None or self.data.videos is not None):
            raise ValueError("codec_from is null, but clips are to be encoded: name a codec folder, or cached latents")
        if self.data is not None and self.gap_share > 0:
            raise ValueError(f"gap_share is {self.gap_share}; only the sprites world has such clips: set it to 0")

    @property
    def recomputed_layers(self) -> int:
        """Where nothing has been measured: none for auto."""
        if isinstance(self.recompute, int):
            return self.recompute
        return self.model.num_layers if self.recompute == "all" else 0


@dataclass(slots=True)
class Batch:
    """What a loss needs, on the device. Clean and noisy halves may be shown different prompts."""

    x0_BFCHW: Tensor
    ids_BGL: Tensor
    clean_ids_BGL: Tensor
    scored_BG: Tensor
    kind: Kind
    view: View = CLEAN
    """What the noisy blocks see of the past."""


class VideoObjective(Objective):
    """Trains transformer and text encoder against a frozen codec; subclasses say how."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.clips_per_batch = config.clips
        self.recomputed = config.recomputed_layers
        self.recompute = "auto" if config.recompute == "auto" else self.recomputed
        self.model = CausalWanModel(config.model, attention_backend=config.attention_backend)
        self.text = build_text(config.text)
        self.codec: SpritesCodec | None = None
        self.source: Source | None = None
        self._paint: sprites.Painter | None = None
        self._prepared = False

    def modules(self) -> dict[str, nn.Module]:
        return {"transformer": self.model, "text": self.text}

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        check_trainable(self.config.attention_backend, device)
        if not self._prepared:
            self._open()
            self._prepared = True
        super().prepare(device, dtype)
        table = ops_for(self.config.ops, device)
        for model in self.transformers().values():
            model.ops = table
        self.recompute_layers(self.recomputed)
        if self.codec is not None:
            self.codec.to(device, dtype)

    def _open(self) -> None:
        """Read what the run needs from disk, once."""
        self.open_data()
        if self.config.init_from is not None:
            self.start_from(Path(self.config.init_from))

    def start_from(self, path: Path) -> None:
        """The averaged weights of a run, also of one with coarser patches (`finer_patches`)."""
        held, c = load_modules(path), self.config.model
        try:
            held["transformer"] = finer_patches(held["transformer"], c.patch, c.place_grid)
        except (KeyError, ValueError) as error:
            raise UserError(f"objective.init_from={path} cannot start this model: {error}") from error
        fill(self.modules(), held, path)

    def open_data(self) -> None:
        """Codec and data."""
        c = self.config
        if c.codec_from is not None:
            self.codec = load_codec(c.codec_from)
            self.codec.requires_grad_(False)
        if c.data is not None:
            self.source = open_source(c.data, self.run_dir)
            if isinstance(self.source, LatentSource) and c.codec_from is not None:
                self.source.check_codec(c.codec_from)

    def compile(self, modules: Mapping[str, nn.Module]) -> None:
        self.compile_transformer(modules["transformer"])
        self._paint = torch.compile(sprites.paint_frames, dynamic=False)

    def compile_transformer(self, model: nn.Module) -> None:
        """In place; see `Config.ops`."""
        if self.config.ops == "auto" and isinstance(model, CausalWanModel):
            model.ops = select("reference")
        model.compile(dynamic=False)

    def recompute_layers(self, count: int) -> None:
        super().recompute_layers(count)
        self.recomputed = count

    def notes(self) -> list[str]:
        """Which table of operations runs, where there was a choice."""
        tables: dict[str, list[str]] = {}
        for name, model in self.transformers().items():
            tables.setdefault(model.ops.backend, []).append(name)
        if self.config.ops == "auto" and self.device.type != "cuda":
            return []
        return ["operations: " + "; ".join(f"{table} ({', '.join(names)})" for table, names in tables.items())]

    # -- data ---------------------------------------------------------------------------------

    def batch(self, turn: Turn) -> Batch:
        c, rng = self.config, turn.rng
        draw = torch.rand(3, generator=rng).tolist()
        single = turn.step < c.single_until or draw[0] < c.single_share
        if self.source is not None:
            return self.source_batch(self.source, "single" if single else "story", turn)
        if single:
            return self.make_batch("single", c.single_clips, rng)
        return self.make_batch("gap" if draw[1] < c.gap_share else "story", c.clips, rng)

    @torch.no_grad()
    def source_batch(self, source: Source, kind: Kind, turn: Turn) -> Batch:
        """Clips of a person's own data, each under one prompt; of a single batch the first block alone is used."""
        c, g = self.config, self.config.geometry
        if isinstance(source, PromptSource):
            raise UserError("objective.data holds prompts alone; this objective learns from videos or cached latents")
        clips, captions = source.batch(turn.step, turn.micro, c.clips)
        if isinstance(source, VideoSource):
            assert self.codec is not None
            clips = self.codec.encode(clips.to(self.device, self.dtype))
        blocks = 1 if kind == "single" else c.clip_blocks
        frames = g.block_start(blocks)
        want = (g.latent_channels, g.latent_height, g.latent_width)
        if clips.shape[1] < frames or tuple(clips.shape[2:]) != want:
            raise UserError(
                f"objective.data gives latents of {list(clips.shape[1:])} (frames, channels, rows, columns); "
                f"objective.geometry and clip_blocks ask for {[frames, *want]}, with at least so many frames"
            )
        ids = self.text.ids(captions)[:, None].expand(-1, blocks, -1)
        ids = drop_words(ids, c.text_drop, c.word_drop, turn.rng).to(self.device)
        return Batch(
            clips[:, :frames].float().to(self.device), ids, ids, torch.ones(ids.shape[:2]).to(self.device), kind
        )

    @torch.no_grad()
    def make_batch(self, kind: Kind, count: int, rng: torch.Generator) -> Batch:
        """Render, encode and tokenise clips of one kind."""
        c = self.config
        clips = make_clips(kind, count, c.clip_blocks, c.geometry, rng, c.switch_share, self._paint, c.world)
        ids = torch.stack([self.text.ids([caption.text for caption in row]) for row in clips.captions])
        ids = drop_words(ids, c.text_drop, c.word_drop, rng)
        scored = torch.ones(ids.shape[:2])
        if kind == "gap":
            scored[:, 1] = 0  # what stands between it and the sink was never seen
        return Batch(
            self.encode(clips).to(self.device),
            ids.to(self.device),
            recached(ids, c.recache_share, rng).to(self.device),
            scored.to(self.device),
            kind,
        )

    def encode(self, clips: Clips) -> Tensor:
        """Latents of clips, float32 [B, F, C, H, W]; every piece starts the codec anew."""
        assert self.codec is not None
        video = clips.video.to(self.device, self.dtype)
        if clips.kind != "gap":
            return self.codec.encode(video).float()
        first = self.config.geometry.block_pixel_frames(0)
        later = self.codec.encode(video[:, first:])[:, clips.lead_frames // self.config.geometry.temporal_stride :]
        return torch.cat([self.codec.encode(video[:, :first]), later], 1).float()

    def per_frame(self, values_BG: Tensor) -> Tensor:
        """[B, G] -> [B, F]."""
        sizes = [self.config.geometry.block_size(b) for b in range(values_BG.shape[1])]
        return values_BG.repeat_interleave(torch.tensor(sizes, device=values_BG.device), 1)

    # -- what a step costs ----------------------------------------------------------------------

    def clip_work(self, what: str, passes: float, blocks: int, layout: Layout | None, factor: float) -> Work:
        """Passes over clips of so many blocks, under a layout's mask (None: everything sees everything)."""
        g = self.config.geometry
        frames = g.block_start(blocks) * (1 if layout is None else len(layout.copies))
        pairs = frames**2 if layout is None else int(frame_mask(layout).sum())
        return Work(
            what=what,
            passes=passes,
            tokens=frames * g.tokens_per_frame,
            pairs=pairs * g.tokens_per_frame**2,
            factor=factor,
        )

    # -- what a person looks at ---------------------------------------------------------------------

    def sample(self, step: int, modules: Mapping[str, nn.Module]) -> dict[str, np.ndarray]:
        if self.codec is None or self.source is not None:
            return {}
        pipe = pipeline_of(modules, self.codec, self.config.geometry, self.scheduler())
        return {"samples": sample_sheet(pipe, steps=self.config.sample_steps, part=self.config.world)}

    def export(self, modules: Mapping[str, nn.Module], folder: Path) -> None:
        if self.config.codec_from is None or isinstance(self.config.text, EmbeddedTextConfig):
            raise UserError(
                "a model folder needs a codec and a text encoder; this run had latents or embeddings instead"
            )
        codec = load_codec(self.config.codec_from)
        half = {name: module.half() for name, module in modules.items()}
        pipeline_of(half, codec.half(), self.config.geometry, self.scheduler()).save_pretrained(folder)

    def scheduler(self) -> SchedulerConfig:
        """How the model in training is to be streamed."""
        return self.card_scheduler((self.config.sample_steps,), "euler")

    def card_scheduler(self, trained_steps: tuple[int, ...], sampler: str) -> SchedulerConfig:
        c = self.config
        return SchedulerConfig(
            trained_steps=trained_steps,
            window_frames=c.window_frames,
            sink_frames=c.sink_frames,
            shift=c.sample_shift,
            prediction=c.model.prediction,
            sampler=sampler,
        )


def build_text(config: SpritesTextConfig | EmbeddedTextConfig) -> SpritesTextEncoder | EmbeddedText:
    """The text encoder of a config."""
    return EmbeddedText(config) if isinstance(config, EmbeddedTextConfig) else SpritesTextEncoder(config)


def drop_words(ids_BGL: Tensor, text_share: float, word_share: float, rng: torch.Generator) -> Tensor:
    """Leave the whole prompt out of some clips (for guidance), and single words out of others (for looser prompts)."""
    clips, words = ids_BGL.shape[0], ids_BGL.shape[2]
    draw = torch.rand(clips, generator=rng)
    gone = torch.rand(clips, 1, words, generator=rng) < 0.3
    gone &= ((draw >= text_share) & (draw < text_share + word_share))[:, None, None]
    gone |= (draw < text_share)[:, None, None]
    return ids_BGL.masked_fill(gone, -1)


def recached(ids_BGL: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Prompts of the clean half: in a share of the clips the past is shown under the last prompt, as after a re-cache.

    The first block is the sink and keeps its own prompt. Blocks before a switch then see the prompt to come in their
    context; they are asked for the old one by their own text, and learn to heed that.
    """
    after = torch.cat([ids_BGL[:, :1], ids_BGL[:, -1:].expand(-1, ids_BGL.shape[1] - 1, -1)], 1)
    chosen = torch.rand(len(ids_BGL), generator=rng) < share
    return torch.where(chosen[:, None, None], after, ids_BGL)
