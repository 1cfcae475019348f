"""`streamgen bench --suite wan_14b`: Wan 14B at its true width, with `LAYERS` of its 40 layers, on 208 x 128 pixels.

All of it is 29 GB in bf16 and the bound beside it as much again. So few layers are timed, and one alone: the difference
is what a layer costs, and 40 of them with the rest of one pass are the extrapolation, labelled as such. It leaves out
that more weights stay in no cache: at these sizes one layer's do not either. Random weights, no codec.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from streamgen.costs import parameters
from streamgen.errors import UserError
from streamgen.flow import step_sigmas
from streamgen.geometry import VideoGeometry
from streamgen.pipeline import DTYPES
from streamgen.rollout import Sampling
from streamgen.transformer import CausalWanModel
from streamgen.transformer_config import TransformerConfig
from streamgen_infer import machine
from streamgen_infer.bench.cases import SHIFT, STEPS, Case, random_transformer, read_config
from streamgen_infer.bench.measure import measure
from streamgen_infer.bench.show import print_results

if TYPE_CHECKING:
    from streamgen_infer.bench.suites import Options
    from streamgen_infer.interrupts import Stop

LAYERS, BLOCKS = 3, 2
TIMES = ("block_ms", "block_cpu_ms", "bound_ms", "bound_cpu_ms")


def wan_14b(options: Options, stop: Stop) -> dict[str, Any] | None:
    """`measure` of the few layers, what one layer costs, and the extrapolation; None if a stop came first."""
    name = "bf16" if options.dtype == "all" else options.dtype
    whole: TransformerConfig = read_config(TransformerConfig, "model/wan_14b.yaml")
    few = dataclasses.replace(whole, num_layers=LAYERS)
    torch.set_num_threads(options.threads)
    dtype = DTYPES[name]
    check_memory(whole, few, dtype)
    model = random_transformer(few, dtype)
    blocks = BLOCKS if options.blocks is None else options.blocks
    deep = measure(case_of(model), blocks, stop)
    one = None if deep is None else measure(case_of(first_layer(model)), blocks, stop)
    if deep is None or one is None:
        return None
    layer, all_layers = extrapolated(deep, one, few.num_layers, whole.num_layers)
    print_results([{"suite": "wan_14b", "dtype": name, "threads": options.threads, **deep}])
    print(f"measured: {few.num_layers} of {whole.num_layers} layers. One layer: " + _shown(layer))
    print(f"extrapolated to all {whole.num_layers} layers, not measured: " + _shown(all_layers))
    return {
        "dtype": name,
        **deep,
        "layers": few.num_layers,
        "per_layer": layer,
        "extrapolated": {"layers": whole.num_layers, **all_layers},
    }


def check_memory(whole: TransformerConfig, few: TransformerConfig, dtype: torch.dtype) -> None:
    """UserError, with the numbers, where not even the few layers fit. The bound has as many weights as the model."""
    wanted, memory = 2 * parameters(few) * dtype.itemsize, machine.memory_mb()
    if memory is not None and wanted > memory[1] * 1e6:
        raise UserError(
            f"{few.num_layers} of {whole.num_layers} layers take {wanted / 1e9:.1f} GB with the bound beside them, all "
            f"of them {2 * parameters(whole) * dtype.itemsize / 1e9:.0f} GB, and {memory[1] / 1e3:.1f} GB are free; "
            "free memory, or take --dtype bf16"
        )


def first_layer(model: CausalWanModel) -> CausalWanModel:
    """The same weights, with one layer."""
    shallow = copy.copy(model)
    shallow._modules = {**model._modules, "blocks": nn.ModuleList([model.blocks[0]])}
    shallow.config = dataclasses.replace(model.config, num_layers=1)
    return shallow


def case_of(model: CausalWanModel) -> Case:
    config = model.config
    text_BGLD = torch.randn(1, 1, config.text_len, config.text_dim).to(model.patch_embedding.weight.dtype)
    return Case(
        transformer=model,
        codec=None,
        encode_text=lambda: model.encode_text(text_BGLD),
        geometry=VideoGeometry(
            height=128, width=208, latent_channels=config.in_channels, first_latent_frames=1, patch=config.patch
        ),
        window_frames=12,
        sink_frames=3,
        sampling=Sampling(sigmas=step_sigmas(STEPS, SHIFT)),
        weights="random",
    )


def extrapolated(
    deep: dict[str, Any], one: dict[str, Any], few: int, whole: int
) -> tuple[dict[str, float], dict[str, float]]:
    """From the times with `few` layers and with one: those of a layer, and those of `whole` layers with the rest."""
    layer = {name: (deep[name] - one[name]) / (few - 1) for name in TIMES}
    all_layers = {name: one[name] + (whole - 1) * layer[name] for name in TIMES}
    for values in (layer, all_layers):
        values["cpu_ratio_to_bound"] = values["block_cpu_ms"] / values["bound_cpu_ms"]
    return layer, all_layers


def _shown(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
