"""Costs against the published sizes of Wan, and against what torch counts while a real model runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from streamgen.costs import Work, cache_bytes, parameters, work_flops
from streamgen.resources import configs_dir
from streamgen.rope import rope_table
from streamgen.transformer import CausalWanModel
from streamgen.transformer_config import TransformerConfig
from tests.tiny_sprites import TRANSFORMER


def wan(name: str) -> TransformerConfig:
    from omegaconf import OmegaConf

    return TransformerConfig(**OmegaConf.to_container(OmegaConf.load(configs_dir() / "model" / f"{name}.yaml")))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "billions"), [("wan_1_3b", 1.42), ("wan_14b", 14.29), ("wan2_2_5b", 5.0)])
def test_parameters_of_the_wan_family(name: str, billions: float) -> None:
    assert parameters(wan(name)) / 1e9 == pytest.approx(billions, rel=2e-3)


def test_wan_1_3b_pass_and_cache() -> None:
    """A block of 3 frames at 480 x 832 is 4680 tokens; a frame in the cache is 287.5 MB in bf16."""
    config = wan("wan_1_3b")
    linear = work_flops(config, Work(what="block", passes=1, tokens=4680, pairs=0))
    whole = work_flops(config, Work(what="block", passes=1, tokens=4680, pairs=4680 * 32760))
    assert linear / 1e12 == pytest.approx(12.3, abs=0.1)
    assert (whole - linear) / 1e12 == pytest.approx(28.3, abs=0.1)
    assert cache_bytes(config, 1560) / 1e6 == pytest.approx(287.5, abs=0.1)


def test_flops_equal_what_torch_counts() -> None:
    frames, tokens = 3, 3 * 4
    model = CausalWanModel(TRANSFORMER, attention_backend="math")
    text = torch.zeros(2, 1, TRANSFORMER.text_len, TRANSFORMER.text_dim)
    with FlopCounterMode(display=False) as counter:
        rope = rope_table(range(frames), 2, 2, TRANSFORMER.head_dim)
        model(torch.zeros(2, frames, 4, 4, 4), torch.zeros(2, 1), model.encode_text(text), rope=rope)
    counted = work_flops(TRANSFORMER, Work(what="clip", passes=2, tokens=tokens, pairs=tokens**2))
    embeddings = 2 * TRANSFORMER.text_len * 2 * 2 * TRANSFORMER.dim**2  # text and pooled rows: not counted
    assert counter.get_total_flops() == pytest.approx(counted, abs=1.2 * embeddings)
