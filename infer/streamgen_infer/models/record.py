"""`streamgen record`: run a few blocks and write weights, inputs and outputs to neutral files (`recording.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from streamgen.errors import UserError
from streamgen.flow import step_sigmas, timestep_of
from streamgen.pipeline import DTYPES, StreamPipeline
from streamgen.transformer import CausalWanModel
from streamgen.transformer_config import TransformerConfig
from streamgen.weights import replacing, user_errors
from streamgen_infer.models.fit import guard
from streamgen_infer.models.recording import (
    CACHE_OF,
    RecordedConfig,
    Recording,
    fill,
    new_state,
    read_config,
    write_recording,
)

MAX_BLOCKS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """As given on the command line."""

    out: Path
    weights: Path | None
    model: str
    random: Path | None
    """JSON of a recording's config: random weights of these sizes in place of a model."""
    prompt: str
    blocks: int
    steps: int | None
    seed: int
    cache: str | None
    flows: bool
    device: str
    dtype: str
    threads: int | None
    overwrite: bool


def run(options: Options) -> int:
    """The command; returns the exit code."""
    weights = options.weights or options.out.with_suffix(".weights.safetensors")
    _check(options, weights)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model, inputs = _random(options) if options.random else _shipped(options)
    recording = fill(model, inputs, flows=options.flows)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(weights) as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    write_recording(options.out, recording)
    print(f"{options.out}: {recording.blocks} blocks of {options.random or options.model}")
    print(f"{weights}: {len(tensors)} tensors under Wan's names")
    print(f"check: streamgen replay --weights {weights} --recording {options.out}")
    return 0


def _check(options: Options, weights: Path) -> None:
    for name, value, low, high in (
        ("--blocks", options.blocks, 1, MAX_BLOCKS),
        ("--steps", options.steps, 1, 1000),
        ("--threads", options.threads, 1, 1024),
        ("--seed", options.seed, 0, 2**64 - 1),
    ):
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} is {value}; it must be {low} to {high}")
    if options.cache not in (None, *CACHE_OF.values()):
        raise UserError(f"--cache {options.cache!r} does not exist; there are: {', '.join(CACHE_OF.values())}")
    if options.random is not None and options.dtype not in DTYPES:
        raise UserError(f"--dtype {options.dtype!r} does not exist; with --random there are: {', '.join(DTYPES)}")
    for path in (options.out, weights):
        if path.is_dir():
            raise UserError(f"{path} is a folder; give a file")
        if path.exists() and not options.overwrite:
            raise UserError(f"{path} exists; choose another name or add --overwrite")
    if options.out.absolute() == weights.absolute():
        raise UserError(f"--out and --weights are both {weights}; they are two files")


def _shipped(options: Options) -> tuple[CausalWanModel, Recording]:
    """A model folder's transformer and the inputs of a rollout of its prompt."""
    guard(options.model, options.device, options.dtype)
    pipe = StreamPipeline.from_pretrained(options.model, device=options.device, dtype=options.dtype)
    config = config_of(pipe, options.cache or pipe.scheduler.positions)
    text_1LD = pipe.text.encode([options.prompt]).float().cpu()
    sigmas = pipe.sampling(options.steps or pipe.scheduler.trained_steps[0]).sigmas
    return pipe.transformer, _inputs(options, pipe.transformer, config, text_1LD, sigmas)


def _random(options: Options) -> tuple[CausalWanModel, Recording]:
    """A transformer of random weights of the sizes in a JSON file, and random text."""
    assert options.random is not None
    try:
        config, ignored = read_config(options.random.read_text(), str(options.random))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--random {options.random} cannot be read: {error}") from error
    if ignored:
        raise UserError(f"{options.random}: unknown keys: {', '.join(ignored)}")
    torch.manual_seed(options.seed)
    model = CausalWanModel(config.transformer())
    for name, parameter in model.named_parameters():
        spread(name, parameter)
    text_1LD = torch.randn(1, config.text_len, config.text_dim)
    with user_errors(f"--device {options.device}"):
        model = model.to(options.device, DTYPES[options.dtype]).eval().requires_grad_(False)
    return model, _inputs(options, model, config, text_1LD, step_sigmas(options.steps or 4, config.shift))


@torch.no_grad()
def spread(name: str, parameter: Tensor) -> None:
    """Random values under which every part of the network shows in its output: Wan's own first ones answer zero."""
    if "norm" in name and name.endswith("weight"):
        parameter.normal_(1.0, 0.1)
    elif parameter.ndim == 1 or "modulation" in name:
        parameter.normal_(0.0, 0.1)
    else:
        parameter.normal_(0.0, parameter[0].numel() ** -0.5)


def _inputs(
    options: Options, model: CausalWanModel, config: RecordedConfig, text_1LD: Tensor, sigmas: Sequence[float]
) -> Recording:
    state = new_state(config, model, seeds=(options.seed,))
    cells = [[state.noise(step, block) for step in range(len(sigmas))] for block in range(options.blocks)]
    levels = torch.tensor(sigmas, dtype=torch.float64)
    return Recording(
        config=config,
        noise=torch.stack([torch.stack(block) for block in cells]).cpu(),
        text_1LD=text_1LD,
        timesteps=timestep_of(levels).float(),  # as the network gets them
        sigmas=levels,
    )


def config_of(pipe: StreamPipeline, cache: str) -> RecordedConfig:
    """What a recording says of a model; UserError for one that it has no words for."""
    t, g, s = pipe.transformer.config, pipe.geometry, pipe.scheduler
    plain = TransformerConfig(
        dim=2, ffn_dim=1, num_heads=1, num_layers=1, in_channels=1, out_channels=1, text_dim=1, text_len=1
    )
    odd = [
        name for name in ("eps", "qk_norm", "cross_attn_norm", "rope_theta") if getattr(t, name) != getattr(plain, name)
    ]
    if t.in_channels != t.out_channels:
        odd.append("in_channels")
    if g.block_size(0) != g.block_frames:
        odd.append("first_block_frames")
    if s.context_noise:
        odd.append("context_noise")
    if s.guidance != 1:
        odd.append("guidance")
    if cache not in CACHE_OF.values():
        odd.append(f"cache {cache} (--cache {' or '.join(CACHE_OF.values())} records it with another)")
    if odd:
        raise UserError(f"this model cannot be recorded: a recording has no place for its {', '.join(odd)}")
    with user_errors("this model cannot be recorded"):
        return RecordedConfig(
            dim=t.dim,
            heads=t.num_heads,
            layers=t.num_layers,
            ffn=t.ffn_dim,
            text_dim=t.text_dim,
            text_len=t.text_len,
            freq_dim=t.freq_dim,
            channels=g.latent_channels,
            height=g.latent_height,
            width=g.latent_width,
            frames=g.block_frames,
            window=s.window_frames,
            sink=s.sink_frames,
            shift=s.shift,
            rope="absolute" if cache == CACHE_OF["absolute"] else "relative",
            patch=t.patch,
            prediction=t.prediction,
            sampler=s.sampler,
            pooled_text=t.pooled_text,
            place_grid=t.place_grid,
        )
