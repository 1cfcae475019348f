"""Tiny models with Wan's real structure, by diffusers and transformers, with weights that leave no term at zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamgen.transformer import CausalWanModel
from streamgen.transformer_config import TransformerConfig

TEXT_LEN, TEXT_DIM = 12, 16
WORDS = ("a", "red", "star", "spinning", "over", "snow", "the", "blue", "ring", "rising")


def spread(module: nn.Module, std: float = 0.15, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def config(channels: int = 4, **changes: Any) -> TransformerConfig:
    sizes: dict[str, Any] = {"dim": 256, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "freq_dim": 16}
    sizes |= {"in_channels": channels, "out_channels": channels, "text_dim": TEXT_DIM, "text_len": TEXT_LEN}
    return TransformerConfig(**{**sizes, **changes})


def transformer(channels: int = 4, seed: int = 0, **changes: Any) -> CausalWanModel:
    model = CausalWanModel(config(channels, **changes))
    spread(model, 0.08, seed)
    return model.eval().requires_grad_(False)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def save_tokenizer(folder: Path) -> Path:
    """Whole words, as transformers saves a fast tokenizer; 0 is padding, 1 the end mark, 2 the unknown word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {word: 3 + i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder


def umt5(seed: int = 0, layers: int = 2) -> Any:
    """transformers' encoder with random weights."""
    from transformers import UMT5Config, UMT5EncoderModel

    settings = UMT5Config(
        vocab_size=20, d_model=TEXT_DIM, d_kv=4, d_ff=24, num_layers=layers, num_heads=3, dropout_rate=0.0
    )
    model = UMT5EncoderModel(settings)
    spread(model, 0.3, seed)
    return model.eval().requires_grad_(False)


def original_umt5(model: Any) -> dict[str, Tensor]:
    """The same weights by the names of Wan's release."""
    inside = {
        "layer.0.layer_norm": "norm1",
        "layer.0.SelfAttention.q": "attn.q",
        "layer.0.SelfAttention.k": "attn.k",
        "layer.0.SelfAttention.v": "attn.v",
        "layer.0.SelfAttention.o": "attn.o",
        "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
        "layer.1.layer_norm": "norm2",
        "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
        "layer.1.DenseReluDense.wi_1": "ffn.fc1",
        "layer.1.DenseReluDense.wo": "ffn.fc2",
    }
    found = {}
    for name, tensor in state(model).items():
        if name == "shared.weight":
            found["token_embedding.weight"] = tensor
        elif name == "encoder.final_layer_norm.weight":
            found["norm.weight"] = tensor
        elif name.startswith("encoder.block."):
            _, _, number, inner = name.split(".", 3)
            found[f"blocks.{number}.{inside[inner.removesuffix('.weight')]}.weight"] = tensor
    return found
