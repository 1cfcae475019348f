"""What every student of an autoregressive teacher has in common: the frozen teacher, its guidance, its visibilities.

Letters: B clips, G blocks, F latent frames, L text rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamgen import flow
from streamgen.costs import Work, parameters
from streamgen.errors import UserError
from streamgen.transformer import CausalWanModel
from streamgen.transformer_config import TransformerConfig
from streamgen_train.checkpoint import load_into, run_folder
from streamgen_train.objectives.ar import ArObjective
from streamgen_train.objectives.ar import Config as ArConfig
from streamgen_train.objectives.video import Batch, build_text
from streamgen_train.objectives.views import card_visibility


@dataclass(kw_only=True)
class Config(ArConfig):
    teacher_from: str
    """Run folder or checkpoint of the autoregressive teacher; the student starts from its weights."""
    guidance: float = 1.0
    """uncond + guidance (cond - uncond) of the teacher; 1 is off and saves its second pass."""
    text_drop: float = 0.0
    sample_steps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_from is None:
            self.init_from = self.teacher_from


class TaughtObjective(ArObjective):
    """Trains a student beside a frozen teacher of the same shape."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.teacher: dict[str, nn.Module] | None = None

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        if self.teacher is None:
            self.teacher = self.load_teacher()
        super().prepare(device, dtype)
        for module in self.teacher.values():
            module.to(device, dtype).eval().requires_grad_(False)

    def transformers(self) -> dict[str, CausalWanModel]:
        found = super().transformers()
        if self.teacher is not None:
            model = self.teacher["transformer"]
            assert isinstance(model, CausalWanModel)
            found["teacher"] = model
        return found

    def load_teacher(self) -> dict[str, nn.Module]:
        """The averaged weights of the teacher's run, in fp32."""
        check_teacher(self.config)
        teacher: dict[str, nn.Module] = {
            "transformer": CausalWanModel(self.config.model, attention_backend=self.config.attention_backend),
            "text": build_text(self.config.text),
        }
        load_into(Path(self.config.teacher_from), teacher)
        return teacher

    def teacher_x0(self, batch: Batch, x_t: Tensor, sigma_BF: Tensor) -> Tensor:
        """The teacher's (guided) x0 of every noisy block."""
        assert self.teacher is not None
        x0 = self.predict_x0(self.teacher, batch, x_t, sigma_BF)
        if self.config.guidance == 1.0:
            return x0
        empty = torch.full_like(batch.ids_BGL, -1)
        return flow.guided(self.predict_x0(self.teacher, batch, x_t, sigma_BF, empty), x0, self.config.guidance)

    def frozen_parameters(self) -> dict[str, int]:
        return {"teacher": parameters(self.config.model)}

    def work(self) -> list[tuple[TransformerConfig, Work]]:
        """The student's passes, the teacher's (two under guidance) and, with an average as target, the average's."""
        teacher = 1 if self.config.guidance == 1.0 else 2
        judged = [(teacher, "teacher"), *([(1, "average")] if self.needs_ema else [])]
        student = super().work()
        others = [
            (model, replace(work, what=f"{who}: {work.what.split(',')[0]}", passes=work.passes * passes, factor=1.0))
            for passes, who in judged
            for model, work in student
        ]
        return [*student, *others]


def check_teacher(config: Config) -> None:
    """UserError when the teacher's run says that it was not trained for what its student is to see.

    A checkpoint away from its run folder says nothing, and is taken as it is.
    """
    found = run_objective(Path(config.teacher_from))
    if found is None:
        return
    if found.get("name") == "bidirectional":
        raise UserError(
            f"{config.teacher_from} is a bidirectional run; this student needs an autoregressive teacher "
            "(objective ar or df), whose blocks see the past alone"
        )
    have = card_visibility(found.get("visibility") or {"clean": 1.0})
    want = card_visibility(config.visibility)
    lacking = [name for name in want if name not in have]
    if lacking:
        raise UserError(
            f"the teacher {config.teacher_from} was trained for the visibility {', '.join(have)}, and not for "
            f"{', '.join(lacking)}; leave it out of objective.visibility, or train the teacher with it"
        )
    for name, key in (("joint", "joint_blocks"), ("lagged", "lag_blocks")):
        if name in want and found.get(key) != getattr(config, key):
            raise UserError(
                f"the teacher {config.teacher_from} has {key} {found.get(key)}, its student {getattr(config, key)}; "
                f"set objective.{key}={found.get(key)}"
            )


def run_objective(path: Path) -> Mapping[str, Any] | None:
    """The objective's part of the resolved config of a run folder, or of a checkpoint in one; None without a config."""
    from omegaconf import OmegaConf

    config_file = run_folder(path) / "config.yaml"
    if not config_file.is_file():
        return None
    settings = OmegaConf.to_container(OmegaConf.load(config_file), resolve=True)
    found = settings.get("objective") if isinstance(settings, dict) else None
    return found if isinstance(found, dict) else None
