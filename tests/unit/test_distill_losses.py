"""Distillation losses against closed forms: Gaussians whose scores are known, and functions that can be written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from streamgen.transformer import CausalWanModel
from streamgen.worlds import grammar, sprites
from streamgen_distill.dmd import dmd_gradient, dmd_loss, normaliser
from streamgen_distill.gan import (
    Discriminator,
    discriminator_loss,
    features_of,
    finite_difference_penalty,
    generator_loss,
)
from streamgen_distill.rewards import CheckerReward, reward_weight
from streamgen_distill.scores import draw_score_sigma
from streamgen_distill.sid import sid_loss
from tests.tiny_sprites import TRANSFORMER, spread

SHAPE = (5, 2, 3, 2, 2)


def posterior_mean(x_t: Tensor, sigma: float, mean: float, deviation: float) -> Tensor:
    """E[x0 | x_t] for x0 ~ N(mean, deviation^2), x_t = (1 - sigma) x0 + sigma eps."""
    signal = (1 - sigma) ** 2 * deviation**2
    return mean + (1 - sigma) * deviation**2 / (signal + sigma**2) * (x_t - (1 - sigma) * mean)


def score(x_t: Tensor, sigma: float, mean: float, deviation: float) -> Tensor:
    """d log p(x_t) / d x_t of the same."""
    return -(x_t - (1 - sigma) * mean) / ((1 - sigma) ** 2 * deviation**2 + sigma**2)


def clips(seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=rng, dtype=torch.float64), torch.randn(
        SHAPE, generator=rng, dtype=torch.float64
    )


ALL = torch.ones(SHAPE[:2], dtype=torch.float64)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_dmd_gradient_is_that_of_the_kl_divergence_of_two_gaussians(sigma: float) -> None:
    """grad KL(q_t || p_t) at x_t = score_q - score_p, and x0 = (x_t + sigma^2 score) / (1 - sigma) (Tweedie)."""
    student, teacher = (0.3, 0.8), (-0.5, 1.4)
    x0, eps = clips()
    x_t = (1 - sigma) * x0 + sigma * eps
    fake, real = (posterior_mean(x_t, sigma, *law) for law in (student, teacher))
    kl = score(x_t, sigma, *student) - score(x_t, sigma, *teacher)
    want = sigma**2 / (1 - sigma) * kl / (x0 - real).abs().mean((1, 2, 3, 4), keepdim=True)
    assert torch.allclose(dmd_gradient(x0, real, fake), want, rtol=1e-9)

    leaf = x0.clone().requires_grad_()
    dmd_loss(leaf, real, fake, scored_BF=ALL).backward()
    assert leaf.grad is not None
    assert torch.allclose(leaf.grad, want / want.numel(), rtol=1e-9)


def test_dmd_moves_the_student_s_law_to_the_teacher_s() -> None:
    """Descent on the loss with exact scores of the student's current law ends at the teacher's mean and deviation."""
    rng = torch.Generator().manual_seed(1)
    mean, log_deviation = torch.tensor(2.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    optimizer = torch.optim.Adam([mean, log_deviation], lr=0.03)
    ones = torch.ones(64, 1)
    for _ in range(400):
        x0 = mean + log_deviation.exp() * torch.randn(64, 1, 1, 4, 4, generator=rng)
        sigma = float(torch.rand((), generator=rng) * 0.8 + 0.1)
        x_t = (1 - sigma) * x0.detach() + sigma * torch.randn(x0.shape, generator=rng)
        fake = posterior_mean(x_t, sigma, float(mean.detach()), float(log_deviation.detach().exp()))
        loss = dmd_loss(x0, posterior_mean(x_t, sigma, -0.5, 1.5), fake, scored_BF=ones)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(mean.detach()) == pytest.approx(-0.5, abs=0.1)
    assert float(log_deviation.detach().exp()) == pytest.approx(1.5, abs=0.15)


def test_dmd_counts_scored_frames_and_weights_clips() -> None:
    x0, real = clips()
    fake = clips(1)[0]
    scored = torch.zeros(SHAPE[:2], dtype=torch.float64)
    scored[:, 1] = 1
    weight = torch.linspace(0.5, 2, SHAPE[0], dtype=torch.float64)
    leaf = x0.clone().requires_grad_()
    dmd_loss(leaf, real, fake, weight_B=weight, scored_BF=scored).backward()
    want = dmd_gradient(x0, real, fake) * weight[:, None, None, None, None] / (SHAPE[0] * 12)
    assert leaf.grad is not None
    assert not leaf.grad[:, 0].any()
    assert torch.allclose(leaf.grad[:, 1], want[:, 1])


def test_dmd_is_zero_where_the_teacher_agrees() -> None:
    x0 = clips()[0]
    assert not dmd_gradient(x0, x0, x0).any()
    assert torch.isfinite(dmd_gradient(x0, x0, x0 + 1)).all()


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_sid_is_its_formula_and_its_gradient_passes_the_scores(alpha: float) -> None:
    x0, eps = clips()
    leaf = x0.clone().requires_grad_()
    x_t = 0.5 * leaf + 0.5 * eps
    real, fake = posterior_mean(x_t, 0.5, -0.5, 1.4), posterior_mean(x_t, 0.5, 0.3, 0.8)
    loss = sid_loss(leaf, real, fake, alpha=alpha, scored_BF=ALL)
    omega = (x0 - real.detach()).abs().mean((1, 2, 3, 4), keepdim=True)
    want = ((real - fake) * (real - leaf - alpha * (real - fake)) / omega).mean()
    assert torch.allclose(loss, want)
    (got,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (expected,) = torch.autograd.grad(want, leaf)
    assert torch.allclose(got, expected)
    (without,) = torch.autograd.grad(sid_loss(leaf, real.detach(), fake.detach(), alpha=alpha, scored_BF=ALL), leaf)
    assert not torch.allclose(got, without)


def test_sid_vanishes_at_the_teacher_s_law() -> None:
    x0, eps = clips()
    real = posterior_mean(0.5 * x0 + 0.5 * eps, 0.5, 0.3, 0.8)
    assert float(sid_loss(x0, real, real, alpha=1.0, scored_BF=ALL)) == 0.0


def test_normaliser_is_one_number_a_clip() -> None:
    x0, real = clips()
    assert torch.allclose(normaliser(x0, real)[:, 0, 0, 0, 0], (x0 - real).abs().flatten(1).mean(1))


def test_relativistic_losses_pull_against_each_other() -> None:
    real, fake = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
    assert float(generator_loss(real, fake)) == pytest.approx(float(F.softplus(torch.tensor([0.5, -3.0])).mean()))
    assert float(discriminator_loss(real, fake)) == pytest.approx(float(F.softplus(torch.tensor([-0.5, 3.0])).mean()))


def test_penalty_is_sigma_squared_times_the_squared_gradient() -> None:
    """On D(x) = a.x + x.x / 2 the gradient is a + x; many draws of the noise agree with autograd to a few percent."""
    torch.manual_seed(0)
    slope, x = torch.randn(12), torch.randn(1, 12)

    def judge(rows: Tensor) -> Tensor:
        return rows @ slope + 0.5 * rows.square().sum(1)

    many = x.expand(20_000, -1)
    got = finite_difference_penalty(judge, many, judge(many), 0.01)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(judge(leaf).sum(), leaf)
    assert float(got) == pytest.approx(1e-4 * float(gradient.square().sum()), rel=0.05)


def test_discriminator_reads_the_layers_it_names_and_hooks_go_away() -> None:
    torch.manual_seed(0)
    model = CausalWanModel(TRANSFORMER, attention_backend="math")
    spread(model)
    text = model.encode_text(torch.randn(2, 1, 8, 8))
    from streamgen.rope import rope_table

    rope = rope_table(range(2), 2, 2, TRANSFORMER.head_dim)
    x = torch.randn(2, 2, 4, 4, 4, requires_grad=True)
    with features_of(model, (0, 1)) as features:
        model(x, torch.full((2, 1), 500.0), text, rope=rope)
    assert [f.shape for f in features] == [(2, 2, 4, TRANSFORMER.dim)] * 2
    judge = Discriminator(TRANSFORMER.dim, TRANSFORMER.num_heads, (0, 1))
    logits = judge(features)
    assert logits.shape == (2,)
    logits.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    model(x, torch.full((2, 1), 500.0), text, rope=rope)
    assert len(features) == 2


def test_score_levels_are_warped_clamped_and_follow_the_exit_step() -> None:
    torch.manual_seed(0)
    sigma = draw_score_sigma(20_000, 5.0, 0.02, 0.98, None, torch.device("cpu"))
    assert sigma.shape == (20_000, 1) and float(sigma.min()) > 0.0199 and float(sigma.max()) < 0.9801
    assert float(sigma.median()) == pytest.approx(5 / 6, abs=0.01)  # u = 1/2 under shift 5
    between = draw_score_sigma(1000, 5.0, 0.02, 0.98, (0.625, 0.8333), torch.device("cpu"))
    assert float(between.min()) >= 0.624 and float(between.max()) <= 0.834


def test_the_checker_s_reward_is_high_for_the_right_caption() -> None:
    items = [c for c in grammar.captions("train") if c.motion in ("rising", "orbiting") and c.count == "a"][:6]
    video = sprites.render(sprites.sample_scenes(items, torch.Generator().manual_seed(0)), 36)
    frames = sprites.to_uint8(video)
    right = CheckerReward()(frames, [c.text for c in items])
    assert torch.allclose(right, torch.ones(len(items)))
    other = {"rising": "falling", "orbiting": "bouncing"}
    wrong = [c.text.replace(c.motion, other[c.motion]) for c in items]
    assert torch.allclose(CheckerReward(motion_weight=0.7)(frames, wrong), torch.full((len(items),), 0.3))
    assert CheckerReward()(torch.full_like(frames, 8), [c.text for c in items]).max() <= 0.125 + 1e-6
    with pytest.raises(ValueError, match="one caption per clip"):
        CheckerReward()(frames, ["a"])
    assert torch.allclose(reward_weight(torch.tensor([0.0, 1.0]), 2.0), torch.tensor([1.0, 7.3890561]))
