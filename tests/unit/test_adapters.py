"""LoRA files that come and go: merged as they are loaded, taken out to the bit, switched at a block."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from streamgen.batch import generate
from streamgen.checkpoints.lora import merged, open_lora
from streamgen.checkpoints.tensors import LazyTensors, in_memory
from streamgen.errors import UserError
from streamgen.parallel.job import Job, check_job
from streamgen.pipeline import StreamPipeline
from streamgen.rollout import rollout_block
from streamgen.stream import Block, Stream
from tests.tiny_model import save_tiny_model

STAR = "a red star spinning over a snow background"
LAYERS = ("blocks.0.self_attn.k", "blocks.1.cross_attn.v", "blocks.1.ffn.0", "text_embedding.0")


def save_lora(path: Path, tensors: dict[str, Tensor], seed: int, layers: tuple[str, ...] = LAYERS) -> Path:
    generator, tree = torch.Generator().manual_seed(seed), {}
    for layer in layers:
        rows, columns = tensors[f"{layer}.weight"].shape
        tree[f"{layer}.lora_down.weight"] = torch.randn(2, columns, generator=generator) * 0.2
        tree[f"{layer}.lora_up.weight"] = torch.randn(rows, 2, generator=generator) * 0.2
        tree[f"{layer}.diff_b"] = torch.randn(rows, generator=generator) * 0.1
    save_file(tree, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("adapters") / "m")


@pytest.fixture
def pipe(folder: Path) -> StreamPipeline:
    return StreamPipeline.from_pretrained(folder, dtype="fp32")


@pytest.fixture
def files(pipe: StreamPipeline, tmp_path: Path) -> tuple[Path, Path]:
    tensors = dict(pipe.transformer.named_parameters())
    one = save_lora(tmp_path / "ink.safetensors", tensors, 1)
    return one, save_lora(tmp_path / "oil.safetensors", tensors, 2, LAYERS[1:3] + ("head.head",))


def weights(pipe: StreamPipeline) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def frames(blocks: list[Block]) -> Tensor:
    return torch.cat([torch.from_numpy(block.frames) for block in blocks])


def test_merged_is_what_the_loader_merges_and_taken_out_is_the_base(
    pipe: StreamPipeline, files: tuple[Path, Path]
) -> None:
    ink, oil = files
    base = weights(pipe)
    assert pipe.load_lora(ink, 0.7) == "ink"
    assert pipe.load_lora(oil, -0.4, name="paint") == "paint"
    loaded: LazyTensors = in_memory(base)
    for file, strength in ((ink, 0.7), (oil, -0.4)):
        loaded = merged(loaded, open_lora(file, loaded.shapes), strength)
    assert equal(weights(pipe), dict(loaded))
    assert not equal(weights(pipe), base)
    pipe.use_loras({"paint": 1.0})
    changed = {name for name, tensor in weights(pipe).items() if not torch.equal(tensor, base[name])}
    assert changed == {f"{layer}.{leaf}" for layer in (*LAYERS[1:3], "head.head") for leaf in ("weight", "bias")}
    for _ in range(3):
        pipe.use_loras({"ink": 0.3, "paint": 0.9})
        pipe.use_loras({})
    assert equal(weights(pipe), base)


def test_bf16_weights_come_back_to_the_bit(folder: Path, files: tuple[Path, Path]) -> None:
    pipe = StreamPipeline.from_pretrained(folder, dtype="bf16")
    base = weights(pipe)
    pipe.load_lora(files[0], 1.3)
    assert not equal(weights(pipe), base)
    pipe.use_loras({})
    assert equal(weights(pipe), base)


@pytest.mark.parametrize("transition", ["recache", "cut", "scene"])
def test_a_stream_that_switches_is_two_models_on_one_cache(
    pipe: StreamPipeline, files: tuple[Path, Path], folder: Path, transition: str
) -> None:
    pipe.load_lora(files[0], 0)
    stream = pipe.stream(STAR, seed=3)
    assert stream.use_loras({"ink": 1.0}, transition, at_block=2) == 2
    assert stream.use_loras({}, transition, at_block=4) == 4
    made = frames([next(stream) for _ in range(5)])

    models = [StreamPipeline.from_pretrained(folder, dtype="fp32") for _ in range(2)]
    models[1].load_lora(files[0], 1.0)
    slow, expected = models[0].stream(STAR, seed=3), []
    for block, number in enumerate((0, 0, 1, 1, 0)):
        model = models[number]
        text = model.encode_text(model.text.encode([STAR]))
        change = transition if block in (2, 4) else None
        latents = rollout_block(model.transformer, slow.state, text, model.sampling(2), transition=change)
        shown, slow.state.codec = slow.decode(latents)
        expected.append(torch.from_numpy(shown))
    assert torch.equal(made, torch.cat(expected))


def test_streams_with_different_adapters_take_turns(pipe: StreamPipeline, files: tuple[Path, Path]) -> None:
    pipe.load_lora(files[0], 0)
    pipe.load_lora(files[1], 0.5)

    def begun(own: dict[str, float] | None) -> Stream:
        stream = pipe.stream(STAR, seed=3)
        if own is not None:
            stream.use_loras(own)
        return stream

    plans = ({"ink": 1.0}, {}, None)
    alone = [frames([next(stream) for _ in range(3)]) for stream in map(begun, plans)]
    assert len({tuple(video.flatten().tolist()) for video in alone}) == 3
    together = [begun(plan) for plan in plans]
    turns = [[next(stream) for stream in together] for _ in range(3)]
    for one, other in zip(alone, zip(*turns, strict=True), strict=True):
        assert torch.equal(one, frames(list(other)))


def test_a_saved_stream_wants_its_files_and_goes_on(
    pipe: StreamPipeline, files: tuple[Path, Path], folder: Path, tmp_path: Path
) -> None:
    pipe.load_lora(files[0], 0.8)
    pipe.load_lora(files[1], 0)
    stream = pipe.stream(STAR, seed=3)
    stream.use_loras({"oil": 1.0}, at_block=3)
    plain = pipe.stream(STAR, seed=3)
    for _ in range(2):
        next(stream), next(plain)
    stream.save_state(tmp_path / "own.state")
    plain.save_state(tmp_path / "pipe.state")
    rest = [frames([next(one) for _ in range(3)]) for one in (stream, plain)]
    other = StreamPipeline.from_pretrained(folder, dtype="fp32")
    with pytest.raises(UserError, match=r"made with the adapter '(ink|oil)'; load that file first"):
        other.resume(tmp_path / "own.state")
    with pytest.raises(UserError, match="made with the adapter 'ink'"):
        other.resume(tmp_path / "pipe.state")
    for file in files:
        other.load_lora(file, 0)
    again = other.resume(tmp_path / "pipe.state")
    assert torch.equal(frames([next(again) for _ in range(3)]), rest[1])
    with pytest.raises(UserError, match="another adapter called 'oil'"):
        other.load_lora(files[0], 0, name="oil")
    other.use_loras({"ink": 0.8})
    again = other.resume(tmp_path / "own.state")
    assert torch.equal(frames([next(again) for _ in range(3)]), rest[0])


def test_a_saved_stream_takes_along_what_holds_from_its_block_on(
    pipe: StreamPipeline, files: tuple[Path, Path], folder: Path
) -> None:
    """Also the pipeline's adapters below a plan that begins later; not what it has left behind."""
    for file in files:
        pipe.load_lora(file, 0)
    pipe.use_loras({"ink": 0.8})
    stream = pipe.stream(STAR, seed=3)
    stream.use_loras({"oil": 1.0}, at_block=2)
    stream.use_loras({}, "recache", at_block=3)
    stream.use_loras({"oil": -0.5}, "cut", at_block=4)
    next(stream)
    early = stream.state_dict()
    rest = [next(stream) for _ in range(2)]
    late = stream.state_dict()
    rest += [next(stream) for _ in range(2)]
    bare = StreamPipeline.from_pretrained(folder, dtype="fp32")
    for file in files:
        bare.load_lora(file, 0)
    again = bare.resume(early)
    assert again.loras == {"ink": 0.8}
    assert torch.equal(frames([next(again) for _ in range(4)]), frames(rest))
    assert set(late["adapters"]["files"]) == {"oil"}
    with pytest.raises(UserError, match=r"adapter 'oil'; load that file first.*--lora"):
        StreamPipeline.from_pretrained(folder, dtype="fp32").resume(late)
    again = bare.resume(late)
    assert torch.equal(frames([next(again) for _ in range(2)]), frames(rest[2:]))


def test_a_stream_without_adapters_goes_on_without(
    pipe: StreamPipeline, files: tuple[Path, Path], folder: Path
) -> None:
    stream = pipe.stream(STAR, seed=3)
    next(stream)
    saved, expected = stream.state_dict(), next(stream).frames
    other = StreamPipeline.from_pretrained(folder, dtype="fp32")
    other.load_lora(files[0], 1.0)
    assert (next(other.resume(saved)).frames == expected).all()
    other.use_loras({})
    again = other.resume(saved)
    assert again.begin()[1].passes_left == 2  # with the pipeline's own weights it may share launches
    other.use_loras({"ink": 1.0})
    with_them = other.stream(STAR, seed=3)
    next(with_them)
    assert other.resume(with_them.state_dict()).begin()[1].passes_left == 2


@pytest.mark.parametrize("visibility", ["same_level", "joint"])
@pytest.mark.filterwarnings("ignore:the model was trained for")
def test_blocks_made_together_have_the_adapters_they_began_with(
    pipe: StreamPipeline, files: tuple[Path, Path], folder: Path, visibility: str
) -> None:
    pipe.load_lora(files[0], 1.0)
    stream = pipe.stream(STAR, seed=3, visibility=visibility)
    next(stream)
    saved = stream.state_dict()
    plain = pipe.stream(STAR, seed=3)
    plain.use_loras({})
    rest = []
    for _ in range(3):
        next(plain)  # another stream on the same weights, without
        rest.append(next(stream))
    alone = pipe.stream(STAR, seed=3, visibility=visibility)
    assert torch.equal(frames([next(alone) for _ in range(4)])[-len(frames(rest)) :], frames(rest))
    other = StreamPipeline.from_pretrained(folder, dtype="fp32")
    other.load_lora(files[0], 0)
    again = other.resume(saved)
    assert torch.equal(frames([next(again) for _ in range(3)]), frames(rest))


def test_of_two_transitions_to_a_block_the_stronger_one_holds(pipe: StreamPipeline, files: tuple[Path, Path]) -> None:
    pipe.load_lora(files[0], 0)
    rising = "a blue ring rising over a navy background"

    def made(adapters: str, prompt: str) -> Tensor:
        stream = pipe.stream(STAR, seed=3)
        stream.use_loras({"ink": 1.0}, adapters, at_block=2)
        stream.prompt(rising, prompt, at_block=2)
        return frames([next(stream) for _ in range(4)])

    scene, recache, cut = (made(same, same) for same in ("scene", "recache", "cut"))
    assert not torch.equal(scene, recache) and not torch.equal(recache, cut)
    assert torch.equal(made("cut", "scene"), scene) and torch.equal(made("scene", "recache"), scene)
    assert torch.equal(made("cut", "recache"), recache) and torch.equal(made("recache", "cut"), recache)


def test_ranks_that_load_the_model_anew_want_it_merged(
    pipe: StreamPipeline, files: tuple[Path, Path], folder: Path
) -> None:
    job = Job(model=str(folder), split="step_chain", ranks=2, steps=2, force=True)
    check_job(job, pipe)
    pipe.load_lora(files[0], 0.5)
    with pytest.raises(UserError, match=r"without its adapters \(ink\)"):
        check_job(job, pipe)


def test_many_streams_at_once_have_the_pipelines_adapters(pipe: StreamPipeline, files: tuple[Path, Path]) -> None:
    pipe.load_lora(files[0], 1.0)
    wanted = generate(pipe, [STAR], [3], 1)
    stream = pipe.stream(STAR)
    stream.use_loras({})
    next(stream)
    assert torch.equal(generate(pipe, [STAR], [3], 1), wanted)


def test_mistakes_are_said_and_change_nothing(pipe: StreamPipeline, files: tuple[Path, Path], tmp_path: Path) -> None:
    base = weights(pipe)
    stream = pipe.stream(STAR)
    pipe.load_lora(files[0], 0)
    for wrong, said in (
        (lambda: stream.use_loras({"inc": 1.0}), "no adapter 'inc' is loaded .*ink"),
        (lambda: stream.use_loras({"ink": float("nan")}), "strength is nan"),
        (lambda: stream.use_loras({"ink": 1.0}, "blend"), "one of cut, recache, scene"),
        (lambda: pipe.use_loras({"ink": 1e9}), "it must be -100 to 100"),
        (lambda: pipe.stream(STAR, visibility="same_level").use_loras({"ink": 1.0}), "have the same weights"),
        (lambda: pipe.load_lora(tmp_path / "absent.safetensors"), "absent"),
    ):
        with warnings.catch_warnings(action="ignore"), pytest.raises(UserError, match=said):
            wrong()
    next(stream)
    with pytest.raises(UserError, match="too late: the earliest is 1"):
        stream.use_loras({"ink": 1.0}, at_block=0)
    short = pipe.stream(STAR, max_blocks=2)
    with pytest.raises(UserError, match="past the end: the stream has 2 blocks"):
        short.use_loras({"ink": 1.0}, at_block=2)
    stream.use_loras({"ink": 1.0})
    with pytest.raises(UserError, match="shares no launches"):
        stream.begin()
    assert equal(weights(pipe), base)


def test_a_merge_that_fails_leaves_the_loaded_weights(pipe: StreamPipeline, files: tuple[Path, Path]) -> None:
    base = weights(pipe)
    pipe.load_lora(files[0], 1.0)
    pipe.load_lora(files[1], 0)
    read = pipe.adapters._known["oil"].lora.pairs["head.head"].parts

    def broken() -> Tensor:
        raise OSError("the disk is gone")

    read["down"] = type(read["down"])(read["down"].shape, read["down"].dtype, broken)
    with pytest.raises(OSError, match="disk"):
        pipe.use_loras({"oil": 1.0})
    assert equal(weights(pipe), base)
    assert pipe.adapters.active == {}
