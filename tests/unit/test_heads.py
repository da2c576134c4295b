"""Domain heads and masked mean pooling."""

import pytest
import torch

from hba.errors import InputError
from hba.model.heads import DomainHeads, masked_mean
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
