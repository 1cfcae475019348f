"""Checkpoints become model folders that stream, go round through both layouts to the bit, and say what is missing."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamgen.checkpoints.codecs import open_codec
from streamgen.checkpoints.convert import Plan, convert
from streamgen.checkpoints.names import to_diffusers
from streamgen.checkpoints.presets import load_preset
from streamgen.checkpoints.tensors import open_safetensors
from streamgen.checkpoints.vae_names import vae_to_diffusers
from streamgen.embedded_text import save_embeddings
from streamgen.errors import UserError
from streamgen.pipeline import StreamPipeline
from streamgen.weights import WEIGHTS_FILE
from streamgen_infer.cli import main
from tests.command_line import one_line
from tests.tiny_wan import TEXT_DIM, TEXT_LEN, original_umt5, save_tokenizer, spread, state, transformer
from tests.tiny_wan import umt5 as tiny_umt5

diffusers = pytest.importorskip("diffusers")
PROMPT = "a red star spinning over snow"
SMALL = ("--height", "32", "--width", "32")


def tiny_vae() -> Any:
    vae = diffusers.AutoencoderKLWan(base_dim=8).eval().requires_grad_(False)
    spread(vae, 0.1)
    return vae


def original_vae(vae: Any) -> dict[str, Tensor]:
    """The same weights under every name that Wan's release can have for them, found by trying."""
    wanted = state(vae)
    inside = [f"{part}.{leaf}" for part in ("residual.2", "residual.6", "shortcut") for leaf in ("weight", "bias")]
    inside += ["residual.0.gamma", "residual.3.gamma"]
    inside += [f"{part}.{leaf}" for part in ("resample.1", "time_conv") for leaf in ("weight", "bias")]
    inside += ["norm.gamma", "to_qkv.weight", "to_qkv.bias", "proj.weight", "proj.bias"]
    names = [f"{part}.{leaf}" for part in ("conv1", "conv2") for leaf in ("weight", "bias")]
    for side, move in (("encoder", "downsamples"), ("decoder", "upsamples")):
        names += [f"{side}.conv1.weight", f"{side}.conv1.bias", f"{side}.head.0.gamma"]
        names += [f"{side}.head.2.weight", f"{side}.head.2.bias"]
        names += [f"{side}.middle.{i}.{leaf}" for i in range(3) for leaf in inside]
        names += [f"{side}.{move}.{i}.{leaf}" for i in range(15) for leaf in inside]
    found = {name: wanted[theirs] for name in names if (theirs := vae_to_diffusers(name)) in wanted}
    assert len(found) == len(wanted)
    return found


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Wan releases its models."""
    folder = tmp_path_factory.mktemp("release") / "Wan2.1-T2V-tiny"
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    save_tokenizer(folder / "google" / "umt5-xxl")
    from safetensors.torch import save_file

    save_file(state(transformer(16)), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_heads": 2, "text_len": TEXT_LEN, "dim": 256}))
    torch.save(original_vae(tiny_vae()), folder / "Wan2.1_VAE.pth")
    torch.save(original_umt5(tiny_umt5()), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    return folder


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as diffusers saves a WanPipeline, with the same weights."""
    folder = tmp_path_factory.mktemp("diffusers") / "pipeline"
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=128,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=48,
        num_layers=2,
    )
    tensors = {str(to_diffusers(name)): tensor for name, tensor in state(transformer(16)).items()}
    theirs.load_state_dict(tensors)
    theirs.save_pretrained(folder / "transformer")
    tiny_vae().save_pretrained(folder / "vae")
    tiny_umt5().save_pretrained(folder / "text_encoder")
    save_tokenizer(folder / "tokenizer")
    index = {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMGEN_CACHE", str(tmp_path / "cache"))


def frames(folder: Path) -> Any:
    pipe = StreamPipeline.from_pretrained(folder, dtype="fp32")
    stream = pipe.stream(PROMPT, seed=3, steps=2, max_blocks=2)
    return [block.frames for block in stream]


def same_weights(pipe: StreamPipeline) -> None:
    found = pipe.transformer.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state(transformer(16)).items())
    coded = pipe.codec.state_dict()
    assert all(torch.equal(coded[name], tensor) for name, tensor in tiny_vae().state_dict().items())
    ids = pipe.text.ids([PROMPT])
    wanted = tiny_umt5()(input_ids=ids, attention_mask=(ids > 0).long()).last_hidden_state
    assert (pipe.text.encode([PROMPT]) - wanted * (ids > 0)[..., None]).abs().max() < 1e-5


def test_a_checkpoints_identity_is_that_of_its_own_files(release: Path, tmp_path: Path) -> None:
    """Two students in one folder are two models; a file more in the folder changes neither."""
    folder = tmp_path / "both"
    shutil.copytree(release, folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    for seed, name in enumerate(("one", "other")):
        torch.save({"generator": state(transformer(16, seed=seed))}, folder / f"{name}.pt")

    def identity(name: str) -> str:
        with warnings.catch_warnings(action="ignore"):
            return StreamPipeline.from_pretrained(folder / f"{name}.pt", dtype="fp32").fingerprint

    one = identity("one")
    assert one != identity("other")
    (folder / "notes.json").write_text("{}")
    assert identity("one") == one
    shutil.move(folder / "one.pt", folder / "kept.pt")
    torch.save({"generator": state(transformer(16, seed=5))}, folder / "one.pt")
    assert identity("one") != one


@pytest.mark.filterwarnings("ignore:the model was trained for")
def test_a_release_and_a_diffusers_folder_become_models_that_stream(
    release: Path, pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []
    for source in (release, pipeline_folder):
        target = tmp_path / source.name
        # diffusers' config does not say how many rows of text there are: 512 is Wan's
        if source is pipeline_folder:
            set_text_len(source)
        assert main(["convert", str(source), str(target), "--preset", "self_forcing_dmd", *SMALL]) == 0
        said = capsys.readouterr().out
        assert "was published for wan_1_3b, these weights are width 256, 2 layers" in said
        assert f"{target}: model from {source}" in said
        assert not list(tmp_path.glob(".*"))
        pipe = StreamPipeline.from_pretrained(target, dtype="fp32")
        same_weights(pipe)
        assert (pipe.scheduler.trained_steps, pipe.scheduler.window_frames) == ((4,), 21)
        assert (target / "README.md").read_text().startswith("# Self-Forcing (DMD)")
        made.append(frames(target))
    first, second = made
    assert [block.shape for block in first] == [(9, 32, 32, 3), (12, 32, 32, 3)]
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert first[0].std() > 1


def set_text_len(folder: Path) -> None:
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "text_len": TEXT_LEN}))


def test_checkpoints_load_without_converting(release: Path, pipeline_folder: Path) -> None:
    set_text_len(pipeline_folder)
    for source in (release, pipeline_folder, release / "diffusion_pytorch_model.safetensors"):
        with pytest.warns(UserWarning) as said:
            pipe = StreamPipeline.from_pretrained(source, dtype="fp32")
        same_weights(pipe)
        words = [str(warning.message) for warning in said]
        assert any("preset wan (" in w and "nothing says that these weights are a causal model" in w for w in words)
        assert any("take a causal model" in w for w in words)
        assert (pipe.geometry.height, pipe.geometry.tokens_per_frame) == (480, 1560)
        assert pipe.stream(PROMPT).state.cache.spec.policy == "window"
        assert len(pipe.fingerprint) == 64


def test_a_training_checkpoint_takes_the_rest_from_its_base(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "chunkwise"
    folder.mkdir()
    last = {f"model.{name}": tensor for name, tensor in state(transformer(16)).items()}
    average = {name: tensor + 1 for name, tensor in last.items()}
    path = folder / "causal_forcing.pt"
    torch.save({"generator": last, "generator_ema": average}, path)
    (folder / "config.json").write_text(json.dumps({"num_heads": 2, "text_len": TEXT_LEN}))

    assert main(["stream", PROMPT, "--model", str(path), "--seconds", "1", "--out", str(tmp_path / "x.y4m")]) == 2
    line = one_line(capsys)
    assert "lacks the VAE" in line and "the text encoder" in line and "--base" in line
    assert main(["convert", str(path), str(tmp_path / "dst")]) == 2
    assert "lacks the VAE" in one_line(capsys)

    assert main(["convert", str(path), str(tmp_path / "dst"), "--base", str(release), *SMALL]) == 0
    said = capsys.readouterr().out
    assert "preset causal_forcing_chunk" in said and "a file called causal_forcing.pt is published with it" in said
    pipe = StreamPipeline.from_pretrained(tmp_path / "dst", dtype="fp32")
    same_weights(pipe)  # the preset's authors run it without the average
    assert (
        main(["convert", str(path), str(tmp_path / "ema"), "--base", str(release), "--weights", "generator_ema"]) == 0
    )
    assert "is run with generator (the file has them: --weights); these are generator_ema" in capsys.readouterr().out


def test_round_trips_are_exact(release: Path, tmp_path: Path) -> None:
    source = release / "diffusion_pytorch_model.safetensors"
    assert main(["convert", str(source), str(tmp_path / "theirs"), "--to", "diffusers"]) == 0
    loaded = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "theirs")
    assert {name for name, _ in loaded.named_parameters()} == set(open_safetensors(tmp_path / "theirs" / WEIGHTS_FILE))
    set_text = tmp_path / "theirs" / "config.json"
    set_text.write_text(json.dumps({**json.loads(set_text.read_text()), "text_len": TEXT_LEN}))
    assert main(["convert", str(tmp_path / "theirs" / WEIGHTS_FILE), str(tmp_path / "ours"), "--to", "original"]) == 0
    back, before = open_safetensors(tmp_path / "ours" / WEIGHTS_FILE), open_safetensors(source)
    assert set(back) == set(before)
    assert all(torch.equal(back[name], before[name]) for name in before)
    values = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (values["num_heads"], values["text_len"], values["model_type"]) == (2, TEXT_LEN, "t2v")
    one_file = tmp_path / "half.safetensors"
    assert main(["convert", str(source), str(one_file), "--to", "original", "--dtype", "bf16"]) == 0
    assert torch.equal(open_safetensors(one_file)["head.head.bias"], before["head.head.bias"].bfloat16())


def test_a_model_folder_goes_back_to_a_public_layout(release: Path, tmp_path: Path) -> None:
    assert main(["convert", str(release), str(tmp_path / "model"), "--preset", "wan", *SMALL]) == 0
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "back.safetensors"), "--to", "original"]) == 0
    back = open_safetensors(tmp_path / "back.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in state(transformer(16)).items())


def test_embeddings_take_the_place_of_the_text_encoder(release: Path, tmp_path: Path) -> None:
    rows = torch.randn(2, TEXT_LEN, TEXT_DIM)
    save_embeddings(tmp_path / "prompts.safetensors", [PROMPT, "snow"], rows)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("diffusion_pytorch_model.safetensors", "config.json", "Wan2.1_VAE.pth"):
        shutil.copy(release / name, bare / name)
    arguments = ["--embeddings", str(tmp_path / "prompts.safetensors"), "--preset", "self_forcing_dmd", *SMALL]
    assert main(["convert", str(bare), str(tmp_path / "dst"), *arguments]) == 0
    (tmp_path / "prompts.safetensors").unlink()  # the model folder has its own
    pipe = StreamPipeline.from_pretrained(tmp_path / "dst", dtype="fp32")
    assert torch.equal(pipe.text.encode([PROMPT])[0], rows[0])
    assert len(list(pipe.stream(PROMPT, max_blocks=1))) == 1
    with pytest.raises(UserError, match=r"is not in .*; the nearest prompt is"):
        pipe.stream("a green star")


def test_a_small_decoder_serves_where_there_is_no_vae(release: Path, tmp_path: Path) -> None:
    from streamgen.codecs.taehv import TaehvCodec, TaehvConfig

    small = TaehvCodec(TaehvConfig(encoder_dim=4, decoder_dims=(8, 8, 4, 4)))
    spread(small, 0.2)
    bare = tmp_path / "bare"
    shutil.copytree(release, bare, ignore=shutil.ignore_patterns("Wan2.1_VAE.pth"))
    torch.save(small.state_dict(), bare / "taew2_1.pth")
    assert main(["convert", str(bare), str(tmp_path / "dst"), "--preset", "self_forcing_dmd", *SMALL]) == 0
    pipe = StreamPipeline.from_pretrained(tmp_path / "dst", dtype="fp32")
    assert all(torch.equal(pipe.codec.state_dict()[name], tensor) for name, tensor in small.state_dict().items())
    assert next(pipe.stream(PROMPT)).frames.shape == (9, 32, 32, 3)


def test_loras_are_merged_by_the_command(release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    up, down = torch.randn(64, 2), torch.randn(2, 256)
    save_file({"head.head.lora_down.weight": down, "head.head.lora_up.weight": up}, tmp_path / "l.safetensors")
    source, target = release / "diffusion_pytorch_model.safetensors", tmp_path / "merged.safetensors"
    lora = f"{tmp_path / 'l.safetensors'}=0.5"
    assert main(["convert", str(source), str(target), "--to", "original", "--lora", lora]) == 0
    assert "1 LoRA merged" in capsys.readouterr().out
    before = open_safetensors(source)["head.head.weight"]
    assert torch.allclose(open_safetensors(target)["head.head.weight"], before + 0.5 * (up @ down), atol=1e-6)
    assert main(["convert", str(source), str(tmp_path / "x"), "--to", "original", "--lora", "a=b"]) == 2
    assert "--lora 'a=b': write FILE or FILE=STRENGTH" in one_line(capsys)


def test_longlive_is_its_base_and_the_lora_beside_it(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    tensors = state(transformer(16))
    torch.save(
        {"generator": {f"model.{name}": tensor for name, tensor in tensors.items()}}, folder / "longlive_base.pt"
    )
    name, up, down = "base_model.model.model.head.head", torch.randn(64, 2), torch.randn(2, 256)
    lora = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    torch.save({"generator_lora": lora, "critic_lora": lora}, folder / "lora.pt")
    (folder / "config.json").write_text(json.dumps({"num_heads": 2, "text_len": TEXT_LEN}))
    arguments = ["--base", str(release), *SMALL]
    assert main(["convert", str(folder / "longlive_base.pt"), str(tmp_path / "dst"), *arguments]) == 0
    said = capsys.readouterr().out
    assert "1 LoRA merged" in said and "preset longlive" in said and "needs a LoRA" not in said
    pipe = StreamPipeline.from_pretrained(tmp_path / "dst", dtype="fp32")
    wanted = tensors["head.head.weight"] + up @ down
    assert torch.allclose(pipe.transformer.state_dict()["head.head.weight"], wanted, atol=1e-6)
    assert (pipe.scheduler.window_frames, pipe.scheduler.sink_frames) == (12, 3)


def test_foreign_pipelines_are_refused_with_words(pipeline_folder: Path, tmp_path: Path) -> None:
    index = json.loads((pipeline_folder / "model_index.json").read_text())
    for changes, message in (
        ({"_class_name": "FluxPipeline"}, "is a FluxPipeline of diffusers; served here are WanPipeline"),
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "two transformers"),
        ({"image_encoder": ["transformers", "CLIPVisionModel"]}, "CLIP image encoder"),
    ):
        folder = tmp_path / message[:4]
        folder.mkdir(exist_ok=True)
        (folder / "model_index.json").write_text(json.dumps(index | changes))
        with pytest.raises(UserError, match=message):
            StreamPipeline.from_pretrained(folder)


@pytest.mark.parametrize("named", [".", "low_noise_model", "high_noise_model/diffusion_pytorch_model.safetensors"])
def test_half_of_a_model_of_two_transformers_is_not_taken_for_a_whole(
    named: str, release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wan 2.2 A14B: each of its transformers has the tensors of a Wan 2.1."""
    folder = tmp_path / "Wan2.2-T2V-A14B"
    shutil.copytree(release, folder)
    for name in ("high_noise_model", "low_noise_model"):
        (folder / name).mkdir()
        shutil.copy(folder / "diffusion_pytorch_model.safetensors", folder / name)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    assert main(["convert", str(folder / named), str(tmp_path / "dst")]) == 2
    assert "is a model of two transformers (Wan 2.2 A14B)" in one_line(capsys)
    assert main(["doctor", "--model", str(folder / named)]) != 0
    captured = capsys.readouterr()
    assert "two transformers" in captured.out + captured.err


def test_half_of_a_diffusers_pipeline_is_not_either(pipeline_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "A14B"
    shutil.copytree(pipeline_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer_2"] = ["diffusers", "WanTransformer3DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    for named in ("transformer", "transformer_2/diffusion_pytorch_model.safetensors"):
        with pytest.raises(UserError, match="two transformers"):
            StreamPipeline.from_pretrained(folder / named)


def test_guidance_wants_its_negative_prompt_among_the_embeddings(release: Path, tmp_path: Path) -> None:
    negative = load_preset("wan").scheduler["negative_prompt"]
    rows = torch.randn(2, TEXT_LEN, TEXT_DIM)
    save_embeddings(tmp_path / "few.safetensors", [PROMPT, "another"], rows)
    save_embeddings(tmp_path / "all.safetensors", [PROMPT, negative], rows)
    plan = Plan(source=release, target=tmp_path / "dst", preset="wan", embeddings=tmp_path / "few.safetensors")
    with pytest.raises(UserError, match=r"guidance of 5, .* no row for its negative prompt '色调艳丽"):
        convert(replace(plan, height=32, width=32))
    assert not (tmp_path / "dst").exists()
    convert(replace(plan, height=32, width=32, embeddings=tmp_path / "all.safetensors"))
    pipe = StreamPipeline.from_pretrained(tmp_path / "dst", dtype="fp32")
    assert torch.equal(pipe.text.encode([pipe.scheduler.negative_prompt])[0], rows[1])


def test_what_is_there_is_not_overwritten(release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "mine").touch()
    assert main(["convert", str(release), str(tmp_path / "dst")]) == 2
    assert "exists and is not empty" in one_line(capsys)
    assert main(["convert", str(release), str(tmp_path / "new"), "--to", "gguf"]) == 2
    assert "--to 'gguf': must be one of model, original, diffusers" in one_line(capsys)
    assert main(["convert", str(release), str(tmp_path / "new"), "--height", "33"]) == 2
    assert "height=33: must be a multiple of 16 pixels" in one_line(capsys)
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))


# The VAE's names.


def test_vae_names_equal_diffusers_own_map() -> None:
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    original = original_vae(tiny_vae())
    theirs = utils.convert_wan_vae_to_diffusers(dict(original))
    ours = {vae_to_diffusers(name): tensor for name, tensor in original.items()}
    assert ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in theirs)


def test_nested_vae_names_are_wan_2_2s(tmp_path: Path) -> None:
    """Every tensor of diffusers' 2.2 structure has a release's name, and the config is found from shapes."""
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, decoder_base_dim=12, z_dim=48, is_residual=True, patch_size=2, in_channels=12, out_channels=12,
        scale_factor_spatial=16, latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
    )  # fmt: skip
    wanted = state(vae)
    leaves = ("residual.0.gamma", "residual.2.weight", "residual.2.bias", "residual.3.gamma", "residual.6.weight")
    leaves += ("residual.6.bias", "shortcut.weight", "shortcut.bias", "resample.1.weight", "resample.1.bias")
    leaves += ("time_conv.weight", "time_conv.bias", "norm.gamma", "to_qkv.weight", "to_qkv.bias", "proj.weight")
    leaves += ("proj.bias",)
    names = ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"]
    for side, move in (("encoder", "downsamples"), ("decoder", "upsamples")):
        names += [f"{side}.conv1.weight", f"{side}.conv1.bias", f"{side}.head.0.gamma", f"{side}.head.2.weight"]
        names += [f"{side}.head.2.bias"] + [f"{side}.middle.{i}.{leaf}" for i in range(3) for leaf in leaves]
        names += [f"{side}.{move}.{x}.{move}.{y}.{leaf}" for x in range(4) for y in range(4) for leaf in leaves]
    found = {name: wanted[theirs] for name in names if (theirs := vae_to_diffusers(name)) in wanted}
    assert {vae_to_diffusers(name) for name in found} == set(wanted)
    torch.save(found, tmp_path / "Wan2.2_VAE.pth")
    config, tensors = open_codec(tmp_path / "Wan2.2_VAE.pth")
    assert (config.z_dim, config.base_dim, config.decoder_base_dim, config.scale_factor_spatial) == (48, 8, 12, 16)
    assert config.is_residual and config.patch_size == 2 and len(config.latents_mean) == 48
    assert all(torch.equal(tensors[name], tensor) for name, tensor in wanted.items())
