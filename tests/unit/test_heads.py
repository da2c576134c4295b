"""Domain heads and masked mean pooling."""

import pytest
import torch

from hba.errors import InputError
from hba.model import heads as module
from hba.model.heads import DomainHeads, head_loss, masked_mean, token_loss
from hba.taxonomy import BUILTIN


@pytest.fixture
def heads():
    torch.manual_seed(0)
    return DomainHeads.for_taxonomy(8, BUILTIN)


def test_each_head_fills_its_published_columns(heads):
    pooled = torch.randn(2, 8)
    logits = heads(pooled, ["emotion", "sarcasm"])
    assert logits.shape == (2, 25)
    torch.testing.assert_close(logits[0, 7:15], heads.linear["emotion"](pooled[0]))
    torch.testing.assert_close(logits[1, 21:23], heads.linear["sarcasm"](pooled[1]))
    assert torch.isinf(logits[0, :7]).all() and torch.isinf(logits[1, 23:]).all()


def test_a_row_without_a_domain_gets_no_logits(heads):
    assert torch.isinf(heads(torch.randn(1, 8), [None])).all()


def test_an_unknown_domain_is_an_error(heads):
    with pytest.raises(InputError, match="no head for domain 'age'"):
        heads(torch.randn(1, 8), ["age"])


def test_loss_of_one_domain_leaves_the_other_heads_without_gradient(heads):
    logits = heads(torch.randn(3, 8), ["emotion"] * 3)
    torch.nn.functional.cross_entropy(logits, torch.tensor([7, 9, 14])).backward()
    assert heads.linear["emotion"].weight.grad.abs().sum() > 0
    assert all(h.weight.grad.abs().sum() == 0 for name, h in heads.linear.items() if name != "emotion")


def test_masked_mean_ignores_padding():
    hidden = torch.tensor([[[9.0, 9.0], [1.0, 2.0], [3.0, 6.0]]])
    assert masked_mean(hidden, torch.tensor([[0, 1, 1]])).tolist() == [[2.0, 4.0]]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("values", [1 << 25, 70], ids=["at once", "in pieces"])
def test_the_loss_of_a_language_head_is_that_of_its_logits(monkeypatch, mixed, values):
    """With its gradients for states and weights, behind a cap on logits, and with float32 weights under autocast."""
    monkeypatch.setattr(module, "CHUNK_VALUES", values)  # two tokens, and two rows of the head
    torch.manual_seed(0)
    tokens, lengths = torch.randint(0, 30, (7,)), torch.tensor([3, 0, 4])

    def capped(logits):
        return torch.tanh(logits / 3) * 3

    found = []
    states, weight = torch.randn(7, 24), torch.randn(30, 24)
    for way in ("pieces", "plain"):
        states_NH, weight_VH = states.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            if way == "pieces":
                loss = head_loss(states_NH, weight_VH, tokens, lengths, capped)
            else:
                loss = token_loss(capped(torch.nn.functional.linear(states_NH, weight_VH)), tokens, lengths)
        (loss * 0.5).backward()
        assert weight_VH.grad.dtype is states_NH.grad.dtype is torch.float32
        found.append((loss.detach(), states_NH.grad, weight_VH.grad))
    limits = {"atol": 2e-2, "rtol": 2e-2} if mixed else {}
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **limits)


def test_a_frozen_language_head_gets_no_gradient():
    states_NH, weight_VH = torch.randn(5, 8, requires_grad=True), torch.randn(12, 8)
    loss = head_loss(states_NH, weight_VH, torch.arange(5), torch.tensor([2, 3]), lambda logits: logits)
    loss.backward()
    assert bool(states_NH.grad.abs().sum() > 0) and weight_VH.grad is None
    with torch.no_grad():
        again = head_loss(states_NH, weight_VH, torch.arange(5), torch.tensor([2, 3]), lambda logits: logits)
    torch.testing.assert_close(again, loss)
