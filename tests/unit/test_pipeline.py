"""StreamPipeline on a tiny real model folder: frames, prompts, saved states, and every mistake of the caller."""

import dataclasses
import json
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from streamgen.codec import SpritesCodec
from streamgen.errors import UserError
from streamgen.geometry import VideoGeometry
from streamgen.pipeline import Block, SchedulerConfig, Stream, StreamPipeline, probe_dtype
from streamgen.pixels import to_uint8
from streamgen.text import SpritesTextConfig, SpritesTextEncoder
from streamgen.transformer import CausalWanModel
from tests.tiny_sprites import CODEC, TRANSFORMER

STAR = "a red star spinning over a snow background"
RING = "a blue ring rising over a navy background"
DISC = "two small white circles falling over a grass background"


def build(seed: int = 0, **geometry: object) -> StreamPipeline:
    torch.manual_seed(seed)
    transformer, codec = CausalWanModel(TRANSFORMER), SpritesCodec(CODEC)
    for parameter in (*transformer.parameters(), *codec.parameters()):
        torch.nn.init.normal_(parameter, std=0.15)
    return StreamPipeline(
        transformer=transformer,
        codec=codec,
        text=SpritesTextEncoder(SpritesTextConfig(text_dim=8)),
        geometry=VideoGeometry(height=16, width=32, latent_channels=4, **geometry),  # type: ignore[arg-type]
        scheduler=SchedulerConfig(trained_steps=(2, 4), window_frames=8, sink_frames=2),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    build().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipe(folder: Path) -> StreamPipeline:
    return StreamPipeline.from_pretrained(folder, dtype="fp32")


def take(stream: Stream, blocks: int) -> list[Block]:
    return [next(stream) for _ in range(blocks)]


def same(one: list[Block], other: list[Block]) -> bool:
    return len(one) == len(other) and all(
        a.index == b.index and a.prompt_version == b.prompt_version and np.array_equal(a.frames, b.frames)
        for a, b in zip(one, other, strict=True)
    )


# Frames.


def test_blocks_carry_frames_prompt_and_timing(pipe: StreamPipeline) -> None:
    blocks = list(pipe.stream(STAR, seed=7, max_blocks=3))
    assert [block.index for block in blocks] == [0, 1, 2]
    for block in blocks:
        assert block.frames.dtype == np.uint8 and block.frames.shape == (12, 16, 32, 3)
        assert block.prompt == STAR and block.prompt_version == 0
        assert len(block.timing.denoise_ms) == 2
        parts = (block.timing.text_ms, block.timing.recache_ms, block.timing.decode_ms, block.timing.commit_ms)
        assert sum(block.timing.denoise_ms) + sum(parts) == pytest.approx(block.timing.total_ms, abs=0.5)
    assert len({block.frames.tobytes() for block in blocks}) == 3


def test_same_seed_same_frames_other_seed_other_frames(pipe: StreamPipeline) -> None:
    one = take(pipe.stream(STAR, seed=7), 3)
    assert same(one, take(pipe.stream(STAR, seed=7), 3))
    assert not same(one, take(pipe.stream(STAR, seed=8), 3))


def test_streamed_frames_equal_the_whole_video_decoded_at_once(pipe: StreamPipeline) -> None:
    stream = pipe.stream(STAR, seed=7)
    latents = []
    frames = []
    for _ in range(3):
        frames.append(next(stream).frames)
        latents += list(stream.state.recent.values())[-3:]
    whole = to_uint8(pipe.codec.decode(torch.stack(latents, 1)))[0].numpy()
    assert np.abs(whole.astype(int) - np.concatenate(frames).astype(int)).max() <= 1


def test_loaded_model_equals_the_one_saved(pipe: StreamPipeline) -> None:
    assert same(take(build().stream(STAR, seed=7), 2), take(pipe.stream(STAR, seed=7), 2))


def test_steps_of_the_first_block(pipe: StreamPipeline) -> None:
    blocks = take(pipe.stream(STAR, first_steps=4, steps=2), 2)
    assert [len(block.timing.denoise_ms) for block in blocks] == [4, 2]


def test_bfloat16_streams_and_resumes(folder: Path) -> None:
    pipe = StreamPipeline.from_pretrained(folder, dtype="bf16")
    stream = pipe.stream(STAR, seed=7)
    take(stream, 4)
    state = stream.state_dict()
    assert state["cache"]["k"].dtype == torch.bfloat16
    assert same(take(pipe.resume(state), 2), take(stream, 2))


def test_one_frame_first_block(tmp_path: Path) -> None:
    build(first_block_frames=1).save_pretrained(tmp_path)
    pipe = StreamPipeline.from_pretrained(tmp_path, dtype="fp32")
    assert [len(block.frames) for block in take(pipe.stream(STAR), 4)] == [4, 12, 12, 12]


# Prompts.


def test_a_switch_takes_the_next_block_and_leaves_earlier_frames(pipe: StreamPipeline) -> None:
    stream, plain = pipe.stream(STAR, seed=7), pipe.stream(STAR, seed=7)
    before = take(stream, 3)
    receipt = stream.prompt(RING)
    assert (receipt.version, receipt.block, receipt.seconds) == (1, 3, 36 / 16)
    after = take(stream, 2)
    assert same(before, take(plain, 3))
    assert [block.prompt for block in after] == [RING, RING] and after[0].timing.recache_ms > 0
    assert not any(np.array_equal(a.frames, b.frames) for a, b in zip(after, take(plain, 2), strict=True))


def test_switches_planned_ahead_equal_switches_made_in_time(pipe: StreamPipeline) -> None:
    planned, live = pipe.stream(STAR, seed=7, max_blocks=9), pipe.stream(STAR, seed=7, max_blocks=9)
    planned.prompt(RING, "blend", at_block=2, blend_blocks=3)
    assert planned.prompt(DISC, "scene", at_seconds=4.5).block == 6
    made = []
    for block in live:
        made.append(block)
        if block.index == 1:
            live.prompt(RING, "blend", blend_blocks=3)
        if block.index == 5:
            live.prompt(DISC, "scene")
    assert same(made, list(planned))
    assert [block.prompt_version for block in made] == [0, 0, 1, 1, 1, 1, 2, 2, 2]


def test_every_transition_gives_other_frames(pipe: StreamPipeline) -> None:
    seen = set()
    for transition in ("cut", "recache", "blend", "scene"):
        stream = pipe.stream(STAR, seed=7)
        take(stream, 4)
        stream.prompt(RING, transition)
        seen.add(b"".join(block.frames.tobytes() for block in take(stream, 2)))
    assert len(seen) == 4


def test_text_is_encoded_once_per_version(pipe: StreamPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    contexts = 0
    encode, encode_text = pipe.text.encode, pipe.transformer.encode_text

    def counting_encode(prompts: list[str]) -> torch.Tensor:
        encoded.extend(prompts)
        return encode(prompts)

    def counting_context(text: torch.Tensor) -> object:
        nonlocal contexts
        contexts += 1
        return encode_text(text)

    monkeypatch.setattr(pipe.text, "encode", counting_encode)
    monkeypatch.setattr(pipe.transformer, "encode_text", counting_context)
    stream = pipe.stream(STAR)
    stream.prompt(RING, at_block=2)
    stream.prompt(DISC, "blend", at_block=4, blend_blocks=3)
    take(stream, 10)
    assert encoded == [STAR, RING, DISC]
    assert contexts == 5  # two versions, then the blend's three mixtures, the last of which stays
    assert list(stream._texts._rows) == [2]


def test_a_prompt_given_while_a_block_is_made_waits_for_the_next(pipe: StreamPipeline) -> None:
    """The block has begun: its transition may have been applied."""
    stream = pipe.stream(STAR, seed=7)
    take(stream, 2)
    decode, receipts = pipe.codec.decode_stream, []

    def prompting(*arguments: object) -> object:
        receipts.append(stream.prompt(RING))
        return decode(*arguments)

    pipe.codec.decode_stream = prompting
    try:
        assert next(stream).prompt == STAR
    finally:
        del pipe.codec.decode_stream
    assert receipts[0].block == 3 and next(stream).prompt == RING


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.prompt(""), "empty"),
        (lambda s: s.prompt("zzz qqq"), "no word that this model knows"),
        (lambda s: s.prompt(RING, "fade"), "unknown transition"),
        (lambda s: s.prompt(RING, at_block=1), "too late: the earliest block is 2"),
        (lambda s: s.prompt(RING, at_block=6), "past the end: the stream has 6 blocks"),
        (lambda s: s.prompt(RING, at_seconds=4.0), "past the end"),
        (lambda s: s.prompt(RING, at_seconds=-1.0), "seconds=-1"),
        (lambda s: s.prompt(RING, at_seconds=float("nan")), "seconds=nan"),
        (lambda s: s.prompt(RING, at_block=3, at_seconds=2), "not both"),
        (lambda s: (s.prompt(RING, at_block=5), s.prompt(DISC, at_block=4)), "out of order"),
        (lambda s: s.prompt(RING, "blend", blend_blocks=0), "blend_blocks is 0"),
    ],
)
def test_prompt_mistakes_leave_the_stream_alone(
    pipe: StreamPipeline, call: Callable[[Stream], object], message: str
) -> None:
    stream = pipe.stream(STAR, max_blocks=6)
    take(stream, 2)
    with pytest.raises(UserError, match=message):
        call(stream)
    assert len(list(stream)) == 4


# Saved states.


def played(stream: Stream) -> None:
    """A timeline with every transition, for twelve blocks."""
    stream.prompt(RING, "recache", at_block=3)
    stream.prompt(DISC, "blend", at_block=5, blend_blocks=3)
    stream.prompt(STAR, "scene", at_block=9)
    stream.prompt(RING, "cut", at_block=11)


@pytest.mark.parametrize("cache", ["window", "relative"])
def test_resume_at_any_block_equals_never_having_stopped(pipe: StreamPipeline, cache: str, tmp_path: Path) -> None:
    whole = pipe.stream(STAR, seed=2**64 - 1, cache=cache, max_blocks=12, first_steps=4)
    played(whole)
    expected = []
    for stop in range(12):
        whole.save_state(tmp_path / f"{stop}")
        expected.append(next(whole))
    for stop in range(12):
        resumed = pipe.resume(tmp_path / f"{stop}", max_blocks=12)
        assert same(list(resumed), expected[stop:])


def test_resume_in_a_new_process_of_the_model(pipe: StreamPipeline, folder: Path) -> None:
    stream = pipe.stream(STAR, seed=7)
    take(stream, 5)
    state = stream.state_dict()
    other = StreamPipeline.from_pretrained(folder, dtype="fp32").resume(state)
    other.prompt(RING)
    stream.prompt(RING)
    assert same(take(other, 3), take(stream, 3))


def test_a_state_does_not_change_with_its_stream(pipe: StreamPipeline) -> None:
    stream = pipe.stream(STAR, seed=7)
    take(stream, 3)
    state = stream.state_dict()
    later = take(stream, 4)
    assert same(take(pipe.resume(state), 4), later)


@pytest.mark.parametrize(("transition", "last_pass"), [("recache", 2), ("scene", 1), ("blend", 1)])
def test_cancel_ends_the_iteration_between_passes(pipe: StreamPipeline, transition: str, last_pass: int) -> None:
    """From another thread, in the first denoising pass of a switch; the resumed stream is the same to the bit."""
    whole = pipe.stream(STAR, seed=7)
    whole.prompt(RING, transition, at_block=4)
    expected = take(whole, 7)
    stream = pipe.stream(STAR, seed=7)
    stream.prompt(RING, transition, at_block=4)
    made = take(stream, 4)
    calls = 0

    def cancelling(module: object, arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == last_pass:
            thread = threading.Thread(target=stream.cancel)
            thread.start()
            thread.join()

    hook = pipe.transformer.register_forward_pre_hook(cancelling)
    assert list(stream) == []
    hook.remove()
    assert calls == last_pass and list(stream) == []
    state = stream.state_dict()
    assert state["position"] == 4 and state["begun"]
    resumed = pipe.resume(state)
    with pytest.raises(UserError, match="the earliest block is 5"):
        resumed.prompt(DISC, at_block=4)
    assert same(made + take(resumed, 3), expected)


def test_a_failed_decode_loses_nothing(pipe: StreamPipeline) -> None:
    expected = take(pipe.stream(STAR, seed=7), 4)
    stream = pipe.stream(STAR, seed=7)
    made = take(stream, 2)

    def fail(*arguments: object) -> object:
        raise MemoryError

    pipe.codec.decode_stream = fail
    try:
        with pytest.raises(MemoryError):
            next(stream)
    finally:
        del pipe.codec.decode_stream
    assert same(made + take(stream, 2), expected)


def test_state_of_another_model_is_refused(pipe: StreamPipeline, tmp_path: Path) -> None:
    build(seed=1).save_pretrained(tmp_path / "other")
    other = StreamPipeline.from_pretrained(tmp_path / "other", dtype="fp32")
    with pytest.raises(UserError, match="belongs to another model"):
        other.resume(pipe.stream(STAR).state_dict())


def test_state_of_another_dtype_or_format_is_refused(pipe: StreamPipeline, folder: Path) -> None:
    state = pipe.stream(STAR).state_dict()
    with pytest.raises(UserError, match="made with dtype fp32, this model is loaded as bf16"):
        StreamPipeline.from_pretrained(folder, dtype="bf16").resume(state)
    with pytest.raises(UserError, match="format 99"):
        pipe.resume({**state, "format": 99})


def test_files_that_are_no_states(pipe: StreamPipeline, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "state"
    with pytest.raises(UserError, match="missing, truncated or not"):
        pipe.resume(path)
    stream = pipe.stream(STAR)
    take(stream, 2)
    stream.save_state(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="missing, truncated or not"):
        pipe.resume(path)
    with pytest.raises(UserError, match="something else"):
        pipe.resume(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="cannot write"):
        stream.save_state(path / "below a file")
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_pipeline_in_memory_cannot_save_streams() -> None:
    with pytest.raises(UserError, match="save_pretrained"):
        build().stream(STAR).state_dict()


# Mistakes.


def test_untrained_steps_warn_and_trained_ones_do_not(pipe: StreamPipeline) -> None:
    with pytest.warns(UserWarning, match="trained for 2 or 4 steps, not 3"):
        stream = pipe.stream(STAR, steps=3)
    assert stream.warnings == ["the model was trained for 2 or 4 steps, not 3"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pipe.stream(STAR, steps=4).warnings == []


def test_unknown_words_are_reported(pipe: StreamPipeline) -> None:
    with pytest.warns(UserWarning, match="unknown word 'dragon'"):
        stream = pipe.stream("a red dragon star")
    with pytest.warns(UserWarning, match="unknown word 'castle'"):
        stream.prompt("a blue castle ring")
    assert len(stream.warnings) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "empty"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is"),
        ({"steps": 0}, "steps is 0; it must be 1 to 1000"),
        ({"steps": 1001}, "steps is 1001"),
        ({"first_steps": 0}, "steps is 0"),
        ({"max_blocks": 0}, "max_blocks is 0"),
        ({"cache": "none"}, "unknown cache policy 'none'; there are: ema_sink, relative, window"),
    ],
)
def test_stream_mistakes(pipe: StreamPipeline, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipe.stream(**{"prompt": STAR, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp8"}, "unknown dtype 'fp8'; there are: auto, fp32, bf16"),
        ({"device": "abacus"}, "device 'abacus' is not available"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_loading_mistakes(folder: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        StreamPipeline.from_pretrained(folder, **options)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f / "codec"), r"codec/config\.json is missing"),
        (lambda f: (f / "scheduler/scheduler_config.json").unlink(), r"scheduler_config\.json is missing"),
        (
            lambda f: edit(f / "model_index.json", transformer=["diffusers", "UNet"]),
            "the class 'UNet'; known: CausalWan",
        ),
        (lambda f: edit(f / "model_index.json", codec=None), "the class None; known: SpritesCodec"),
        (lambda f: edit(f / "model_index.json", geometry={"height": 16}), "geometry: missing width, latent_channels"),
        (lambda f: edit(f / "transformer/config.json", dim=48), r"its config says \[48"),
        (lambda f: edit(f / "transformer/config.json", num_layers=3), "tensors are missing: blocks"),
        (lambda f: edit(f / "transformer/config.json", num_layers=1), "belong to another model: blocks"),
        (
            lambda f: edit(f / "model_index.json", geometry={"height": 16, "width": 32, "latent_channels": 5}),
            "transformer in_channels is 4, the rest of the model has 5",
        ),
        (lambda f: edit(f / "transformer/config.json", prediction="x0"), "predicts x0, the scheduler says flow"),
        (lambda f: edit(f / "scheduler/scheduler_config.json", trained_steps=[]), "trained_steps"),
        (lambda f: edit(f / "scheduler/scheduler_config.json", sampler="ddim"), "sampler='ddim'"),
        (lambda f: edit(f / "scheduler/scheduler_config.json", window="9"), "unknown key 'window'"),
    ],
)
def test_spoilt_model_folders(folder: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    spoil(copy)
    with pytest.raises(UserError, match=message):
        StreamPipeline.from_pretrained(copy, dtype="fp32")


def test_parts_that_do_not_fit_each_other() -> None:
    pipe = build()
    with pytest.raises(ValueError, match="codec latent_channels is 4, the rest of the model has 5"):
        StreamPipeline(
            transformer=CausalWanModel(dataclasses.replace(pipe.transformer.config, in_channels=5, out_channels=5)),
            codec=pipe.codec,
            text=pipe.text,
            geometry=dataclasses.replace(pipe.geometry, latent_channels=5),
            scheduler=pipe.scheduler,
        )
    with pytest.raises(ValueError, match=r"place_grid is \(4, 4\), the token grid is \(1, 2\)"):
        StreamPipeline(
            transformer=CausalWanModel(dataclasses.replace(pipe.transformer.config, place_grid=(4, 4))),
            codec=pipe.codec,
            text=pipe.text,
            geometry=pipe.geometry,
            scheduler=pipe.scheduler,
        )


def test_a_window_too_small_for_the_block(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    edit(copy / "scheduler/scheduler_config.json", window_frames=4)
    with pytest.raises(UserError, match="block of 3 latent frames does not fit a window of 4 with a sink of 2"):
        StreamPipeline.from_pretrained(copy, dtype="fp32").stream(STAR)


def test_the_probe_measures_once() -> None:
    probe_dtype.cache_clear()
    first = probe_dtype()
    assert first in ("fp32", "bf16") and probe_dtype() is first and probe_dtype.cache_info().misses == 1
