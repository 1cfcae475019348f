"""Settings of self-forcing, for every method that `self_forcing.py` covers, and what of them cannot be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from streamgen.cache import POLICIES
from streamgen.card import check_last_levels
from streamgen.flow import step_sigmas
from streamgen.transformer_config import TransformerConfig
from streamgen_distill.scores import ScoreLayout
from streamgen_train.objectives import ar


@dataclass(kw_only=True)
class Config(ar.Config):
    teacher_from: str
    """Run folder or checkpoint of the score teacher."""
    critic_from: str | None = None
    """Where the critic starts; the teacher by default, never the student."""
    teacher_model: TransformerConfig | None = None
    """Sizes of the teacher if they are not the student's; the critic, which starts from critic_from, has the student's.
    """
    score_layout: ScoreLayout = "bidirectional"
    student_input: Literal["self", "data"] = "self"
    """data: the student denoises noised clips in one pass, each block at a level of its steps and in the context of the
    noisy ones before it, and no stream is made."""
    objective_loss: Literal["dmd", "sid", "gan"] = "dmd"
    train_steps: tuple[int, ...] = (4,)
    """Step counts of the student, one drawn for each turn; the first is its default."""
    guidance: float = 4.0
    """Of the teacher: uncond + guidance (cond - uncond). The papers' g = 3 in cond + g (cond - uncond) is 4."""
    rollout_clips: int = 8
    """Streams in a microbatch."""
    rollout_blocks: tuple[int, int] = (4, 4)
    """Least and greatest number of blocks of a rollout."""
    score_blocks: int = 4
    """Blocks that are scored; what the teacher was trained on."""
    window_at: Literal["end", "anywhere"] = "end"
    rolling_share: float = 0.0
    """Share of turns whose rollout is by a rolling window ..."""
    rolling_steps: int = 4
    """... of so many blocks and steps."""
    critic_ratio: int = 5
    """The student has every n-th step."""
    score_shift: float = 5.0
    """Noise levels of both scores are uniform u warped by this ..."""
    score_sigmas: tuple[float, float] = (0.02, 0.98)
    """... and clamped to these."""
    follow_exit: bool = False
    """Draw them between the exit step's level and the next one's instead (`ts_schedule`)."""
    context_noise: float = 0.0
    """Noise level of the latents whose keys and values later blocks see."""
    commits: bool = True
    """False: the model is to be streamed without commit passes; context_noise is then the level of the last step."""
    cache: str = "relative"
    checkpoint_activations: bool = False
    """The student's graded passes, which have a cache, run again in the backward as a whole."""
    recompute: int | Literal["auto", "all"] = 0
    """Layers of the passes without a cache: the critic's, and those of `student_input: data`. Not auto: what a rollout
    leaves free is not measured."""
    sid_alpha: float = 1.0
    gan_weight: float = 1.0
    gan_layers: tuple[int, ...] = ()
    """Layers of the critic that the discriminator reads; () takes the middle one and the last."""
    gan_penalty: float = 30.0
    gan_sigma: float = 0.05
    reward: Literal["checker"] | None = None
    reward_beta: float = 2.0
    text_drop: float = 0.0
    word_drop: float = 0.0
    validation_seconds: float = 15.0
    sample_steps: int = 0
    """For pictures; 0: the first of train_steps."""

    def __post_init__(self) -> None:
        self.sample_steps = self.sample_steps or next(iter(self.train_steps), 1)
        super().__post_init__()
        low, high = self.rollout_blocks
        checks = (
            (self.recompute == "auto", "recompute is auto; a stage that makes streams needs a number, or all"),
            (self.init_from is None, "init_from is null; name the run that the student starts from"),
            (not self.train_steps or min(self.train_steps) < 1, "train_steps must hold counts of at least 1"),
            (not 1 <= low <= high, f"rollout_blocks is {[low, high]}; least and greatest, at least 1"),
            (self.score_blocks < 1, f"score_blocks is {self.score_blocks}; it must be at least 1"),
            (self.critic_ratio < 1, f"critic_ratio is {self.critic_ratio}; it must be at least 1"),
            (self.cache not in POLICIES, f"cache is {self.cache!r}; allowed: {', '.join(POLICIES)}"),
            (not 0 <= self.rolling_share <= 1, f"rolling_share is {self.rolling_share}; it must be in [0, 1]"),
            (
                self.student_input == "self" and self.data is not None and self.data.prompts is None,
                "data must be prompts (or null: the sprites world); streams are made, not read",
            ),
            (
                self.teacher_model is not None and self.teacher_model != self.model and self.critic_from is None,
                "critic_from is null, but the teacher has other sizes than the critic: name the critic's start",
            ),
            (
                self.data is not None and (self.objective_loss == "gan" or self.reward is not None),
                "a GAN loss and a reward need the sprites world: leave data null",
            ),
            (
                self.objective_loss == "gan" and self.clip_blocks < min(self.score_blocks, high),
                f"clip_blocks is {self.clip_blocks}; real clips for a GAN must be as long as the scored window",
            ),
            (
                max(self.gan_layers, default=0) >= self.model.num_layers or min(self.gan_layers, default=0) < 0,
                f"gan_layers is {list(self.gan_layers)}; the model has layers 0 to {self.model.num_layers - 1}",
            ),
        )
        for wrong, message in checks:
            if wrong:
                raise ValueError(message)
        if not self.commits:
            levels = {count: step_sigmas(count, self.sample_shift)[-1] for count in self.train_steps}
            check_last_levels(levels, self.context_noise)
        if self.rolling_share > 0:
            held = self.sink_frames + self.rolling_steps * self.geometry.block_frames
            if held > self.window_frames:
                raise ValueError(
                    f"a rolling window of {self.rolling_steps} blocks and the sink are {held} latent frames; "
                    f"window_frames is {self.window_frames}: raise it, or lower rolling_steps"
                )
