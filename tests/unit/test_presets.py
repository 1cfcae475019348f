"""Presets: each reads, streams as its authors' lists say, and pairs that do not fit are said."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from streamgen.checkpoints.presets import guess_preset, load_preset, model_size, pairing_warnings, preset_names
from streamgen.errors import UserError
from streamgen.pipeline import SchedulerConfig
from streamgen.resources import configs_dir
from streamgen.rollout import Sampling
from streamgen.transformer_config import TransformerConfig
from streamgen.weights import read_json
from tests.tiny_wan import config

# Timesteps as the published code warps (or lists) them: facts of each repository's config.
LISTS = {
    "self_forcing_dmd": (1000, 937.5, 833.3333, 625),
    "self_forcing_sid": (1000, 937.5, 833.3333, 625),
    "self_forcing_gan": (1000, 937.5, 833.3333, 625),
    "causal_forcing_chunk": (1000, 937.5, 833.3333, 625),
    "causal_forcing_frame": (1000, 937.5, 833.3333, 625),
    "causal_forcing_frame_2step": (1000, 833.3333),
    "causal_forcing_frame_1step": (1000,),
    "causal_forcing_long": (1000, 937.5, 833.3333, 625),
    "longlive": (1000, 937.5, 833.3333, 625),
    "reward_forcing": (1000, 937.5, 833.3333, 625),
    "rolling_forcing": (1000, 952.381, 882.3529, 769.2308, 555.5556),
    "causvid": (1000, 757, 522),
    "krea_14b": (1000, 937, 833, 625),
    "stream_diffusion_v2": (700, 500, 400, 200),
}
# window, sink, block, positions
CACHES = {
    "self_forcing_dmd": (21, 0, 3, "window"),
    "causvid": (21, 0, 3, "window"),
    "longlive": (12, 3, 3, "window"),
    "rolling_forcing": (21, 3, 3, "relative"),
    "reward_forcing": (9, 3, 3, "ema_sink"),
    "causal_forcing_frame": (21, 0, 1, "window"),
    "stream_diffusion_v2": (6, 3, 1, "window"),
}


def model(name: str) -> TransformerConfig:
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(OmegaConf.load(configs_dir() / "model" / f"{name}.yaml"))
    assert isinstance(values, dict)
    return TransformerConfig(**values)


def sampling(scheduler: SchedulerConfig, steps: int) -> Sampling:
    from streamgen.pipeline import StreamPipeline

    class Card:
        pass

    card = Card()
    card.scheduler = scheduler  # type: ignore[attr-defined]
    return StreamPipeline.sampling(card, steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LISTS)
def test_steps_are_the_published_ones(name: str) -> None:
    scheduler = load_preset(name).scheduler_config()
    plan = sampling(scheduler, scheduler.trained_steps[0])
    assert [1000 * sigma for sigma in plan.sigmas] == pytest.approx(LISTS[name], abs=1e-3)
    assert (plan.sampler, plan.context_noise, plan.prediction) == ("renoise", 0.0, "flow")


@pytest.mark.parametrize("name", CACHES)
def test_windows_are_the_published_ones(name: str) -> None:
    preset = load_preset(name)
    s = preset.scheduler_config()
    assert (s.window_frames, s.sink_frames, preset.block_frames, s.positions) == CACHES[name]


def test_first_blocks_of_few_step_models_take_four() -> None:
    for name in ("causal_forcing_frame_2step", "causal_forcing_frame_1step"):
        assert load_preset(name).scheduler_config().first_steps == 4
    assert load_preset("self_forcing_dmd").scheduler_config().first_steps is None


@pytest.mark.parametrize("name", ["wan", "wan2_2_5b"])
def test_the_negative_prompt_is_wans_to_the_letter(name: str) -> None:
    """Of `sample_neg_prompt` in wan/configs/shared_config.py of Wan 2.1 and 2.2, whose commas are full-width."""
    prompt = load_preset(name).scheduler["negative_prompt"]
    assert (len(prompt), prompt.count("\uff0c"), prompt.count(",")) == (137, 27, 0)
    assert sha256(prompt.encode()).hexdigest() == "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"


def test_rolling_models_say_that_they_are() -> None:
    s = load_preset("rolling_forcing").scheduler_config()
    assert (s.visibility, s.joint_blocks) == (("joint", "clean"), 5)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_reads_and_fits_its_sizes(name: str) -> None:
    preset = load_preset(name)
    scheduler = preset.scheduler_config()
    for size in preset.sizes:
        sizes = model(size)
        assert model_size(sizes) == size
        geometry = preset.geometry(sizes)
        assert geometry.latent_channels == sizes.in_channels
        assert scheduler.sink_frames + preset.block_frames <= scheduler.window_frames
        if sizes.in_channels == 16:
            assert (geometry.tokens_per_frame, geometry.block_pixel_frames(0)) == (1560, 4 * preset.block_frames - 3)
        else:
            assert (geometry.tokens_per_frame, geometry.fps) == (880, 24)


def test_shipped_schedulers_are_as_before(repository: Path) -> None:
    """The optional fields have defaults that change nothing for a model that does not name them."""
    file = repository / "assets" / "models" / "sprites" / "scheduler" / "scheduler_config.json"
    values = read_json(file)
    assert not {"timesteps", "first_steps", "positions"} & set(values)
    s = SchedulerConfig(**values)
    assert (s.timesteps, s.first_steps, s.positions) == ((), None, "relative")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timesteps": [[500, 600]]}, "must descend"),
        ({"timesteps": [[1000, 0]]}, "stay above 0"),
        ({"timesteps": [[]]}, "must descend"),
        ({"positions": "absolute"}, "positions='absolute': must be one of window, relative"),
        ({"first_steps": 0}, "first_steps=0: must be at least 1"),
        ({"commits": False}, "last of 4 steps is at level 0.625 and context_noise is 0; they must be equal"),
        ({"commits": False, "context_noise": 0.625, "first_steps": 8}, "last of 8 steps is at level 0.4167"),
        ({"commits": False, "context_noise": 0.625, "visibility": ["same_level"]}, "blocks are made one after another"),
    ],
)
def test_bad_schedulers_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SchedulerConfig(trained_steps=(4,), window_frames=12, **changes)


def test_unknown_presets_are_named() -> None:
    with pytest.raises(UserError, match=r"no preset 'selfforcing_dmd' .*self_forcing_dmd.; there are: causal"):
        load_preset("selfforcing_dmd")


# Which preset, and what does not fit.


@pytest.mark.parametrize(
    ("path", "network", "size", "name", "why"),
    [
        ("checkpoints/self_forcing_dmd.pt", "generator_ema", "wan_1_3b", "self_forcing_dmd", "published with it"),
        ("x/framewise/causal_forcing.pt", "generator", "wan_1_3b", "causal_forcing_frame", "published with it"),
        ("x/chunkwise/causal_forcing.pt", "generator", "wan_1_3b", "causal_forcing_chunk", "published with it"),
        ("mine.pt", "generator_ema", "wan_1_3b", "self_forcing_dmd", "called generator_ema, and nothing says"),
        ("mine.safetensors", "", "wan_14b", "wan", "nothing says that these weights are a causal model"),
        ("mine.safetensors", "", "wan2_2_5b", "wan2_2_5b", "nothing says"),
        ("mine.pt", "generator", "wan2_2_5b", "wan2_2_5b", "nothing says"),
    ],
)
def test_presets_are_guessed_and_the_guess_is_said(path: str, network: str, size: str, name: str, why: str) -> None:
    preset, reason = guess_preset(Path(path), network, model(size))
    assert preset.name == name and why in reason


@pytest.mark.parametrize(
    ("name", "size", "network", "held", "loras", "message"),
    [
        ("self_forcing_dmd", "wan_14b", "", (), 0, "was published for wan_1_3b, these weights are wan_14b"),
        ("krea_14b", "wan_1_3b", "", (), 0, "was published for wan_14b, these weights are wan_1_3b"),
        ("causal_forcing_chunk", "wan_1_3b", "generator_ema", ("generator", "generator_ema"), 0, "--weights"),
        ("causal_forcing_frame", "wan_1_3b", "generator", ("generator",), 0, "does not hold"),
        ("longlive", "wan_1_3b", "generator", ("generator",), 0, "needs a LoRA"),
        ("wan", "wan_1_3b", "", (), 0, "take a causal model"),
        ("stream_diffusion_v2", "wan_1_3b", "generator", (), 0, "changes a video"),
    ],
)
def test_wrong_pairs_warn(name: str, size: str, network: str, held: tuple[str, ...], loras: int, message: str) -> None:
    notes = list(pairing_warnings(load_preset(name), model(size), network, held, loras))
    assert any(message in note for note in notes)


def test_right_pairs_are_silent() -> None:
    for name, network, loras in (("self_forcing_dmd", "generator_ema", 0), ("longlive", "generator", 1)):
        assert not list(pairing_warnings(load_preset(name), model("wan_1_3b"), network, (network,), loras))
    (note,) = pairing_warnings(load_preset("self_forcing_dmd"), config(16), "", (), 0)
    assert "these weights are width 256, 2 layers" in note
