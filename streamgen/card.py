"""What a model's card says about streaming it: step counts, window, visibility, sampler.

One dataclass, the content of a model folder's scheduler/scheduler_config.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from streamgen.cache import POLICIES
from streamgen.flow import Prediction, step_sigmas
from streamgen.samplers import MULTISTEP, SAMPLERS
from streamgen.unipc import unipc_sigmas
from streamgen.visibility import VISIBILITIES

IMAGE_PLACES = ("block", "frame")
LEVEL_TOLERANCE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """scheduler/scheduler_config.json: how the model was trained to be streamed."""

    trained_steps: tuple[int, ...]
    """Step counts the model was trained for; the first is the default."""
    window_frames: int
    sink_frames: int = 0
    shift: float = 5.0
    prediction: Prediction = "flow"
    visibility: tuple[str, ...] = ("clean",)
    """What the model was trained to see of earlier blocks: names of `streamgen.visibility.VISIBILITIES`."""
    joint_blocks: int = 0
    """With `joint`: blocks in the window, which is as many steps."""
    lag_blocks: int = 0
    """With `lagged`: blocks by which the finished past is behind."""
    sampler: str = "renoise"
    """A name of `streamgen.samplers.SAMPLERS` or MULTISTEP."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 is off, else every pass costs twice."""
    negative_prompt: str = ""
    """With guidance: what the video is led away from."""
    image: str = "block"
    """Where the latent of a given image stands: as a block of its own before the others ("block"), or as the first
    latent frame inside block 0 ("frame")."""
    context_noise: float = 0.0
    commits: bool = True
    """False: no pass follows a block's last step, whose keys and values stay; context_noise is that step's level."""
    protect_sink: bool = True
    timesteps: tuple[tuple[float, ...], ...] = ()
    """Lists of timesteps (1000 sigma, descending) for step counts that do not follow `shift`."""
    first_steps: int | None = None
    """Steps of block 0 where it takes more than the others."""
    positions: str = "relative"
    """The cache policy that the model was trained with, a name of `streamgen.cache.POLICIES`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "trained_steps", tuple(self.trained_steps))  # JSON has lists only
        object.__setattr__(self, "visibility", tuple(self.visibility))
        if not self.trained_steps or min(self.trained_steps) < 1:
            raise ValueError(f"trained_steps={self.trained_steps}: must be one or more counts of at least 1")
        unknown = [name for name in self.visibility if name not in VISIBILITIES]
        if unknown or not self.visibility:
            raise ValueError(f"visibility={self.visibility}: must be one or more of {', '.join(VISIBILITIES)}")
        for name, blocks in (("joint", self.joint_blocks), ("lagged", self.lag_blocks)):
            if name in self.visibility and blocks < 2:
                raise ValueError(f"visibility lists {name} with {blocks} blocks: must be at least 2")
        object.__setattr__(self, "timesteps", tuple(tuple(row) for row in self.timesteps))
        for row in self.timesteps:
            if not row or list(row) != sorted(set(row), reverse=True) or row[0] > 1000 or row[-1] <= 0:
                raise ValueError(f"timesteps {row}: must descend from at most 1000 and stay above 0")
        if self.positions not in POLICIES:
            raise ValueError(f"positions={self.positions!r}: must be one of {', '.join(POLICIES)}")
        if self.first_steps is not None and self.first_steps < 1:
            raise ValueError(f"first_steps={self.first_steps}: must be at least 1")
        known = (*SAMPLERS, *MULTISTEP)
        if self.sampler not in known:
            raise ValueError(f"sampler={self.sampler!r}: must be one of {', '.join(known)}")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ValueError(f"guidance={self.guidance}: must be finite and at least 0 (1 is off)")
        if self.image not in IMAGE_PLACES:
            raise ValueError(f"image={self.image!r}: must be one of {', '.join(IMAGE_PLACES)}")
        for name in self.visibility:
            self.check_visibility(name)
        if not 0 <= self.context_noise < 1:
            raise ValueError(f"context_noise={self.context_noise}: must be in [0, 1)")
        if not self.commits:
            counts = {*self.trained_steps, self.first_steps or self.trained_steps[0]}
            check_last_levels({count: self.sigmas(count)[-1] for count in counts}, self.context_noise)

    def sigmas(self, steps: int) -> tuple[float, ...]:
        """The noise levels of so many steps, descending."""
        listed = next((row for row in self.timesteps if len(row) == steps), None)
        if listed is not None:
            return tuple(t / 1000 for t in listed)
        return (unipc_sigmas if self.sampler in MULTISTEP else step_sigmas)(steps, self.shift)

    def check_visibility(self, visibility: str) -> None:
        """ValueError where the sampler needs each block finished before the next one begins."""
        if visibility != "clean" and not self.commits:
            raise ValueError(f"visibility {visibility}: without commits blocks are made one after another (clean)")
        if visibility != "clean" and (self.sampler in MULTISTEP or self.guidance != 1):
            what = f"sampler {self.sampler}" if self.sampler in MULTISTEP else f"guidance {self.guidance:g}"
            raise ValueError(f"visibility {visibility}: {what} runs block after block only (visibility clean)")


def check_last_levels(levels: Mapping[int, float], context_noise: float) -> None:
    """ValueError where streams without commit passes would keep other keys and values than the model was trained on.

    levels: step count -> noise level of its last step.
    """
    for steps, level in sorted(levels.items()):
        if abs(level - context_noise) > LEVEL_TOLERANCE:
            raise ValueError(
                f"commits=False: the last of {steps} steps is at level {level:.4g} and context_noise is "
                f"{context_noise:g}; they must be equal"
            )
