"""Self-forcing: the student learns on streams of its own making (arXiv 2506.08009).

A turn of the student rolls out streams as they are served, and a loss on their last blocks pulls them towards the
teacher's distribution: DMD, SiD or an adversarial one. A turn of the critic, on other streams, keeps a score network
(and a discriminator) up to date with what the student makes; it has several turns for each of the student's. One
objective covers several published methods:

    Self-Forcing            window_at end, short rollouts            (arXiv 2506.08009)
    Self-Forcing++          window_at anywhere, rollouts far beyond the teacher's horizon  (arXiv 2510.02283)
    Rolling Forcing         rolling_share above 0                    (arXiv 2509.25161)
    Reward Forcing          reward                                   (arXiv 2512.04678)
    CausVid                 student_input data: one pass over noised clips instead of a rollout (arXiv 2412.07772)

long.py adds LongLive's streaming long tuning. Letters: B clips, G blocks, F latent frames, C H W latent, L text rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from streamgen import flow
from streamgen.card import SchedulerConfig
from streamgen.costs import Work, parameters, trained_factor
from streamgen.embedded_text import EmbeddedText
from streamgen.metrics.quick import quick_adherence
from streamgen.pixels import to_uint8
from streamgen.rollout import StreamState
from streamgen.transformer import CausalWanModel, TextContext
from streamgen.transformer_config import TransformerConfig
from streamgen.visibility import VISIBILITIES, Layout
from streamgen.worlds.grammar import captions
from streamgen_distill.dmd import dmd_gradient, dmd_loss
from streamgen_distill.gan import (
    Discriminator,
    discriminator_loss,
    features_of,
    finite_difference_penalty,
    generator_loss,
)
from streamgen_distill.rewards import CheckerReward, reward_weight
from streamgen_distill.rollouts import Plan, Streams, draw_plan, new_state, self_rollout, step_plans
from streamgen_distill.scores import draw_score_sigma, guided_x0, load_score
from streamgen_distill.self_forcing_config import Config
from streamgen_distill.self_forcing_costs import rollout_work, scored_blocks, working_bytes
from streamgen_distill.sid import sid_loss
from streamgen_train.checkpoint import load_into
from streamgen_train.data import pick_captions
from streamgen_train.objective import Turn
from streamgen_train.objectives.ar import ArObjective
from streamgen_train.objectives.bidirectional import whole_clip_x0
from streamgen_train.objectives.video import Batch
from streamgen_train.objectives.views import ALONE
from streamgen_train.pictures import pipeline_of
from streamgen_train.timing import timed
from streamgen_train.videos.prompts import PromptSource

__all__ = ["CRITIC", "STUDENT", "Config", "SelfForcing", "build"]

STUDENT, CRITIC = "student", "critic"
JUDGES = ("critic", "discriminator")


class SelfForcing(ArObjective):
    """Student and critic over one rollout interface."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.clips_per_batch = config.rollout_clips
        self.text.requires_grad_(False)
        self.critic = CausalWanModel(config.model, attention_backend=config.attention_backend)
        self.teacher: CausalWanModel | None = None
        c, prediction = config, config.model.prediction
        self.plans = step_plans(c.train_steps, c.sample_shift, prediction, c.context_noise)
        self.rolling_plan = step_plans((c.rolling_steps,), c.sample_shift, prediction, c.context_noise)[0]
        self.discriminator: Discriminator | None = None
        if c.objective_loss == "gan":
            layers = c.gan_layers or (c.model.num_layers // 2, c.model.num_layers - 1)
            self.discriminator = Discriminator(c.model.dim, c.model.num_heads, layers)

    # -- who learns -----------------------------------------------------------------------------

    def modules(self) -> dict[str, nn.Module]:
        own: dict[str, nn.Module] = {"transformer": self.model, "text": self.text, "critic": self.critic}
        return own if self.discriminator is None else {**own, "discriminator": self.discriminator}

    def transformers(self) -> dict[str, CausalWanModel]:
        found = super().transformers()
        return found if self.teacher is None else {**found, "teacher": self.teacher}

    def players(self) -> dict[str, tuple[str, ...]]:
        return {STUDENT: ("transformer",), CRITIC: tuple(name for name in self.modules() if name in JUDGES)}

    def turns(self, step: int) -> tuple[str, ...]:
        return (STUDENT, CRITIC) if step % self.config.critic_ratio == 0 else (CRITIC,)

    def _open(self) -> None:
        c = self.config
        self.open_data()
        assert c.init_from is not None
        load_into(Path(c.init_from), {"transformer": self.model, "text": self.text})
        sizes = c.teacher_model or c.model
        self.teacher = load_score(c.teacher_from, c.score_layout, sizes, c.attention_backend)
        self.teacher.eval().requires_grad_(False)
        critic = load_score(c.critic_from or c.teacher_from, c.score_layout, c.model, c.attention_backend)
        self.critic.load_state_dict(critic.state_dict())

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        super().prepare(device, dtype)
        assert self.teacher is not None
        for module in (self.teacher, self.text):
            module.to(device, dtype)

    def compile(self, modules: Mapping[str, nn.Module]) -> None:
        """The scores run at few shapes and gain from it; a rollout's shapes change until its window is full.

        A critic whose layers a discriminator reads stays as it is: compiled code passes the hooks by.
        """
        if self.discriminator is None:
            self.compile_transformer(modules["critic"])
        if self.teacher is not None and modules["critic"] is self.critic:
            self.compile_transformer(self.teacher)

    # -- streams --------------------------------------------------------------------------------

    def batch(self, turn: Turn) -> Streams:  # type: ignore[override] # streams are made, not read
        c = self.config
        plan = draw_plan(
            turn.shared,
            plans=self.plans,
            rollout_blocks=c.rollout_blocks,
            window_blocks=c.score_blocks,
            window_at=c.window_at,
            rolling_share=c.rolling_share,
            rolling_plan=self.rolling_plan,
        )
        if c.student_input == "data":
            given = super().batch(turn)
            blocks = given.ids_BGL.shape[1]
            whole = Plan(sampling=plan.sampling, exit_step=plan.exit_step, blocks=blocks, first=0)
            return Streams(whole, given.ids_BGL, (), {}, [], given=given)
        before, after = self.draw_prompts(turn), self.draw_prompts(turn)
        switched = bool(torch.rand((), generator=turn.shared) < c.switch_share) and plan.blocks > 1 and not plan.rolling
        at = int(torch.randint(1, plan.blocks, (), generator=turn.shared)) if switched else plan.blocks
        ids = torch.stack([self.text.ids(before if block < at else after) for block in range(plan.blocks)], 1)
        seeds = tuple(torch.randint(2**62, (c.rollout_clips,), generator=turn.rng).tolist())
        real = None
        if self.discriminator is not None:
            clips, blocks = self.make_batch("story", c.rollout_clips, turn.rng), plan.blocks - plan.first
            real = clips.x0_BFCHW[:, : c.geometry.block_start(blocks)], clips.ids_BGL[:, :blocks]
        transitions = {at: "recache"} if switched else {}
        return Streams(plan, ids.to(self.device), seeds, transitions, after if switched else before, real=real)

    def draw_prompts(self, turn: Turn) -> list[str]:
        """One prompt per stream; of the world, its training captions."""
        if isinstance(self.source, PromptSource):
            return self.source.batch(turn.step, turn.micro, self.config.rollout_clips)
        if isinstance(self.text, EmbeddedText):
            picks = torch.randint(len(self.text.prompts), (self.config.rollout_clips,), generator=turn.rng)
            return [self.text.prompts[i] for i in picks.tolist()]
        return [c.text for c in pick_captions(self.config.rollout_clips, turn.rng, part=self.config.world)]

    def new_state(self, seeds: tuple[int, ...]) -> StreamState:
        c = self.config
        return new_state(
            self.model,
            c.geometry,
            seeds,
            window_frames=c.window_frames,
            sink_frames=c.sink_frames,
            policy=c.cache,
            dtype=self.dtype,
            device=self.device,
        )

    def contexts(self, ids_BGL: Tensor, grad: bool) -> list[TextContext]:
        """The student's text keys and values of each block, from one call (FSDP: all processes must make as many)."""
        with torch.set_grad_enabled(grad):
            text = self.model.encode_text(self.text.encode_ids(ids_BGL))
        pooled = text.pooled_BGD
        return [
            TextContext(
                [(k[:, block : block + 1], v[:, block : block + 1]) for k, v in text.kv],
                None if pooled is None else pooled[:, block : block + 1],
            )
            for block in range(ids_BGL.shape[1])
        ]

    def make(self, streams: Streams, grad: bool) -> tuple[Tensor, Tensor]:
        """A rollout -> (its window's x0 [B, F, C, H, W] float32, prompts of the window's blocks)."""
        if streams.given is not None:
            return self.denoised(streams.given, streams.plan), streams.ids_BGL
        texts = self.contexts(streams.ids_BGL, grad)
        rollout = self_rollout(
            self.model,
            self.new_state(streams.seeds),
            texts.__getitem__,
            streams.plan,
            grad=grad,
            checkpointed=self.config.checkpoint_activations,
            transitions=streams.transitions,
        )
        return rollout.latents_BFCHW.float(), streams.ids_BGL[:, streams.plan.first :]

    def denoised(self, given: Batch, plan: Plan) -> Tensor:
        """One pass over noised clips: each block at one of the student's levels, after the noisy blocks before it."""
        levels = torch.tensor(plan.sampling.sigmas, device=given.x0_BFCHW.device)
        sigma_BF = self.per_frame(levels[torch.randint(len(levels), given.scored_BG.shape, device=levels.device)])
        x_t = flow.add_noise(given.x0_BFCHW, torch.randn_like(given.x0_BFCHW), sigma_BF)
        student = {"transformer": self.model, "text": self.text}
        return self.predict_x0(student, replace(given, view=ALONE), x_t, sigma_BF)

    # -- scores ---------------------------------------------------------------------------------

    @timed("score")
    def score(
        self, model: nn.Module, clip: Tensor, x_t: Tensor, sigma_B1: Tensor, ids_BGL: Tensor, scale: float
    ) -> Tensor:
        """A score network's x0 of a noised window, [B, F, C, H, W] float32."""
        modules = {"transformer": model, "text": self.text}
        sigma_BF = sigma_B1.expand(-1, x_t.shape[1])
        if self.config.score_layout == "bidirectional":
            return guided_x0(whole_clip_x0, modules, x_t, sigma_BF, ids_BGL, scale)

        def after_own_past(modules: Mapping[str, nn.Module], x_t: Tensor, sigma_BF: Tensor, ids: Tensor) -> Tensor:
            ones = torch.ones(ids.shape[:2], device=ids.device)
            batch = Batch(clip.detach(), ids, ids_BGL, ones, "story")
            return self.predict_x0(modules, batch, x_t, sigma_BF)

        return guided_x0(after_own_past, modules, x_t, sigma_BF, ids_BGL, scale)

    def noised(self, clip: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """(x_t, sigma [B, 1]) of a window at the scores' noise levels."""
        c, levels = self.config, (*plan.sampling.sigmas, 0.0)
        between = (levels[plan.exit_step + 1], levels[plan.exit_step]) if c.follow_exit else None
        sigma_B1 = draw_score_sigma(len(clip), c.score_shift, *c.score_sigmas, between, clip.device)
        return flow.add_noise(clip, torch.randn_like(clip), sigma_B1.expand(-1, clip.shape[1])), sigma_B1

    # -- losses ---------------------------------------------------------------------------------

    def loss(  # type: ignore[override] # of streams
        self, batch: Streams, turn: Turn, ema: Mapping[str, nn.Module] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if turn.player == STUDENT:
            clip, ids_BGL = self.make(batch, grad=True)
            return self.student_loss(batch, clip, ids_BGL, torch.ones(clip.shape[:2], device=clip.device))
        with torch.no_grad():
            clip, ids_BGL = self.make(batch, grad=False)
        return self.critic_loss(batch, clip, ids_BGL)

    def student_loss(
        self, streams: Streams, clip: Tensor, ids_BGL: Tensor, scored_BF: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Pull a window (with its graph) towards the teacher."""
        c = self.config
        assert self.teacher is not None
        with torch.set_grad_enabled(c.objective_loss != "dmd"):
            x_t, sigma_B1 = self.noised(clip, streams.plan)
        if c.objective_loss == "gan":
            return self.adversarial(streams, x_t, sigma_B1, ids_BGL)
        with torch.set_grad_enabled(c.objective_loss == "sid"):
            real = self.score(self.teacher, clip, x_t, sigma_B1, ids_BGL, c.guidance)
            fake = self.score(self.critic, clip, x_t, sigma_B1, ids_BGL, 1.0)
        metrics = {"score_gap": dmd_gradient(clip, real, fake).abs().mean().float()}
        if c.objective_loss == "sid":
            return sid_loss(clip, real, fake, alpha=c.sid_alpha, scored_BF=scored_BF).float(), metrics
        weight_B = None
        if c.reward is not None:
            reward_B = self.reward(clip, streams.captions)
            metrics["reward"] = reward_B.mean()
            weight_B = reward_weight(reward_B, c.reward_beta).to(clip.device)
        return dmd_loss(clip, real, fake, weight_B=weight_B, scored_BF=scored_BF).float(), metrics

    @torch.no_grad()
    def reward(self, clip: Tensor, texts: list[str]) -> Tensor:
        """The reward of each decoded window [B]."""
        assert self.codec is not None
        frames = to_uint8(self.codec.decode(clip.to(self.dtype)).float()).cpu()
        return CheckerReward(fps=self.config.geometry.fps)(frames, texts)

    def critic_loss(self, streams: Streams, clip: Tensor, ids_BGL: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow matching on the student's own clips; with a GAN the discriminator's loss besides."""
        c = self.config
        x_t, sigma_B1 = self.noised(clip, streams.plan)
        error_B = (self.score(self.critic, clip, x_t, sigma_B1, ids_BGL, 1.0) - clip).square().mean((1, 2, 3, 4))
        loss = (flow.bounded_flow_weight(sigma_B1[:, 0], c.sigma_floor) * error_B).mean()
        metrics = {"mse": error_B.detach().mean()}
        if self.discriminator is None:
            return loss, metrics
        fake_B, real_B, real_t = self.logits(streams, x_t, sigma_B1, ids_BGL)
        penalty = torch.zeros((), device=loss.device)
        assert streams.real is not None
        if c.gan_penalty > 0:
            for noisy, ids, logits_B in ((real_t, streams.real[1], real_B), (x_t, ids_BGL, fake_B)):
                judge = partial(self.discriminate, sigma_B1=sigma_B1, ids_BGL=ids)
                penalty = penalty + finite_difference_penalty(judge, noisy, logits_B, c.gan_sigma)
        adversarial = discriminator_loss(real_B, fake_B)
        metrics |= {"gan": adversarial.detach(), "penalty": penalty.detach()}
        return loss + c.gan_weight * (adversarial + c.gan_penalty * penalty), metrics

    def adversarial(
        self, streams: Streams, x_t: Tensor, sigma_B1: Tensor, ids_BGL: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        fake_B, real_B, _ = self.logits(streams, x_t, sigma_B1, ids_BGL)
        loss = generator_loss(real_B, fake_B)
        return loss, {"logit_gap": (real_B - fake_B).detach().mean()}

    def logits(self, streams: Streams, x_t: Tensor, sigma_B1: Tensor, ids_BGL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(of the student's window, of real clips at the same levels, the noised real clips)."""
        assert streams.real is not None
        real, ids = streams.real
        real_t = flow.add_noise(real, torch.randn_like(real), sigma_B1.expand(-1, real.shape[1]))
        return self.discriminate(x_t, sigma_B1, ids_BGL), self.discriminate(real_t, sigma_B1, ids), real_t

    def discriminate(self, x_t: Tensor, sigma_B1: Tensor, ids_BGL: Tensor) -> Tensor:
        """Logits [B] of noised windows, each looked at as a whole, whatever the score's layout."""
        assert self.discriminator is not None
        with features_of(self.critic, self.discriminator.layers) as features:
            whole_clip_x0(
                {"transformer": self.critic, "text": self.text}, x_t, sigma_B1.expand(-1, x_t.shape[1]), ids_BGL
            )
        return self.discriminator(features)

    # -- what a step costs ----------------------------------------------------------------------

    def frozen_parameters(self) -> dict[str, int]:
        return {"teacher": parameters(self.config.teacher_model or self.config.model)}

    def work(self) -> list[tuple[TransformerConfig, Work]]:
        """Means over exit steps, step counts and rollout lengths; the student has one step in critic_ratio."""
        c, clips, student = self.config, self.config.rollout_clips, 1 / self.config.critic_ratio
        window, score = round(scored_blocks(c)), 1 if c.guidance == 1.0 else 2

        def scored(what: str, count: float, factor: float) -> Work:
            return self.clip_work(what, count, window, self.score_work_layout(window), factor)

        return [
            *rollout_work(c),
            (c.teacher_model or c.model, scored("teacher's score", clips * score * student, 1.0)),
            (c.model, scored("critic's score", clips * student, 1.0)),
            (c.model, scored("critic, forward and backward", clips, trained_factor(c.model, self.recomputed))),
        ]

    def score_work_layout(self, blocks: int) -> Layout | None:
        return None if self.config.score_layout == "bidirectional" else self.layout(blocks)

    def working_bytes(self, bytes_per_value: int) -> float:
        return working_bytes(self.config, bytes_per_value)

    # -- what a person looks at -----------------------------------------------------------------

    def validate(self, step: int, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        """Adherence of streams of held-out captions, in their first and in their last 5 seconds."""
        c = self.config
        if self.codec is None or isinstance(self.text, EmbeddedText):
            return {}
        held_out = captions("heldout", c.world)
        rng = torch.Generator().manual_seed(3)
        items = [held_out[i] for i in torch.randint(len(held_out), (c.validation_clips,), generator=rng).tolist()]
        pipe = pipeline_of(modules, self.codec, c.geometry, self.scheduler())
        found = quick_adherence(pipe, items, range(len(items)), seconds=c.validation_seconds, segments=False)
        return {
            f"{name}_{where}": found[where][name]
            for where in ("first", "last")
            for name in ("obeys", "color", "shape", "motion", "presence")
        }

    def scheduler(self) -> SchedulerConfig:
        """Streams are to have the cache, the noise and the window of the rollouts."""
        c, card = self.config, self.card_scheduler(self.config.train_steps, "renoise")
        card = replace(card, positions=c.cache, context_noise=c.context_noise, commits=c.commits)
        if c.rolling_share == 0:
            return card
        seen = {*card.visibility, "joint"} - ({"clean"} if c.rolling_share == 1 else set())
        return replace(
            card,
            trained_steps=tuple(dict.fromkeys((*c.train_steps, c.rolling_steps))),
            visibility=tuple(name for name in VISIBILITIES if name in seen),
            joint_blocks=c.rolling_steps,
        )


def build(config: Config) -> SelfForcing:
    return SelfForcing(config)
