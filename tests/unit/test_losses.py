"""The policy losses against plain loops, and what their gradients must be."""

from __future__ import annotations

import math

import pytest
import torch

from hba.errors import InputError
from hba.rl.losses import importance_weights, kl_divergence, surrogate, token_weights

LENGTHS = [3, 1, 5, 2]
GROUPS = [0, 0, 1, 1]


@pytest.fixture
def batch():
    torch.manual_seed(0)
    mask = torch.tensor([[1.0] * n + [0.0] * (5 - n) for n in LENGTHS])
    old = -torch.rand(4, 5) * 2
    new = (old + torch.randn(4, 5) * 0.4).requires_grad_()
    return new, old, torch.tensor([1.0, -0.5, 0.0, 2.0]), mask


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_the_surrogate_is_the_formula(batch, ratio):
    new, old, advantages, mask = batch
    new = new.detach()
    found = surrogate(new, old, advantages, mask, clip_low=0.1, clip_high=0.3, ratio=ratio)
    for n, length in enumerate(LENGTHS):
        mean = sum(float(new[n, t] - old[n, t]) for t in range(length)) / length
        for t in range(length):
            w = math.exp(mean if ratio == "sequence" else float(new[n, t] - old[n, t]))
            a = float(advantages[n])
            free, bounded = w * a, min(max(w, 0.9), 1.3) * a
            assert float(found.loss_NL[n, t]) == pytest.approx(-min(free, bounded), abs=1e-6)
            assert bool(found.clipped_NL[n, t]) == (bounded < free)


def test_clipped_tokens_and_padding_have_no_gradient(batch):
    new, old, advantages, mask = batch
    found = surrogate(new, old, advantages, mask)
    (found.loss_NL * mask).sum().backward()
    assert found.clipped_NL.any()
    assert not new.grad[found.clipped_NL].any() and not new.grad[mask == 0].any()
    assert new.grad[(mask == 1) & ~found.clipped_NL & (advantages != 0).unsqueeze(1)].all()


def test_padding_may_hold_anything(batch):
    new, old, advantages, mask = batch
    spoilt = torch.where(mask == 0, torch.tensor(float("-inf")), new.detach()).requires_grad_()
    (surrogate(spoilt, old, advantages, mask).loss_NL * mask).sum().backward()
    assert torch.isfinite(spoilt.grad).all()


def test_on_policy_the_gradient_is_that_of_reinforce(batch):
    new, _, advantages, mask = batch
    (surrogate(new, new.detach(), advantages, mask).loss_NL * mask).sum().backward()
    torch.testing.assert_close(new.grad, -advantages.unsqueeze(1) * mask)


def test_gspo_gives_every_token_of_a_response_the_same_gradient(batch):
    new, old, advantages, mask = batch
    (
        surrogate(new, old, advantages, mask, ratio="sequence", clip_low=0.9, clip_high=9.0).loss_NL * mask
    ).sum().backward()
    for n, length in enumerate(LENGTHS):
        torch.testing.assert_close(new.grad[n, :length], new.grad[n, :1].expand(length))


def weights(average):
    return token_weights(torch.tensor(LENGTHS), torch.tensor(GROUPS), average=average, max_tokens=10)


def test_averages_over_tokens_sequences_and_groups():
    lengths = torch.tensor(LENGTHS, dtype=torch.float32)
    torch.testing.assert_close(weights("token"), torch.full((4,), 1 / 11))
    torch.testing.assert_close(weights("sequence"), 1 / (4 * lengths))
    torch.testing.assert_close(weights("group"), 1 / (2 * torch.tensor([4.0, 4.0, 7.0, 7.0])))
    torch.testing.assert_close(weights("constant"), torch.full((4,), 1 / 40))
    for average in ("token", "sequence", "group"):
        assert float((weights(average) * lengths).sum()) == pytest.approx(1.0)
    with pytest.raises(InputError, match="without response tokens"):
        token_weights(torch.zeros(2), torch.tensor([0, 1]), average="token", max_tokens=4)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimators_are_zero_at_the_reference_and_near_the_exact_value(kind):
    torch.manual_seed(1)
    logits = torch.randn(40)
    policy, reference = torch.log_softmax(logits, 0), torch.log_softmax(logits + torch.randn(40) * 0.3, 0)
    exact = float((policy.exp() * (policy - reference)).sum())
    expected = float((policy.exp() * kl_divergence(policy, reference, kind)).sum())
    assert not kl_divergence(policy, policy, kind).any()
    assert expected == pytest.approx(exact, rel=1e-4 if kind != "k2" else 0.3)
    assert kind == "k1" or (kl_divergence(policy, reference, kind) >= 0).all()


def test_k3_pulls_towards_the_reference():
    new = torch.tensor([-1.0, -3.0], requires_grad=True)
    kl_divergence(new, torch.tensor([-2.0, -2.0])).sum().backward()
    assert new.grad[0] > 0 > new.grad[1]


def test_importance_weights_are_ratios_up_to_the_cap():
    """pi / mu = exp(-1 + 1.5), exp(-2 + 1), exp(0); then padding, which may hold anything."""
    policy = torch.tensor([[-1.0, -2.0, -0.5, math.nan]], requires_grad=True)
    sampler = torch.tensor([[-1.5, -1.0, -0.5, 0.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    free = importance_weights(policy, sampler, mask, 2.0)
    assert free.tolist()[0] == pytest.approx([1.6487213, 0.3678794, 1.0, 1.0])
    assert importance_weights(policy, sampler, mask, 1.25).tolist()[0] == pytest.approx([1.25, 0.3678794, 1.0, 1.0])
    assert not free.requires_grad
    far = importance_weights(torch.tensor([[0.0]]), torch.tensor([[-1e9]]), torch.ones(1, 1), 3.0)
    assert far.item() == 3.0
