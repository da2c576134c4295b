"""Classification heads: one linear layer a domain, all writing into the one global class space.

Domain d fills the columns of its global indices; for a row of domain d every other column is -inf, so that softmax and
cross-entropy run over the domain's own classes only. A row without a domain (free-form) is an error here, never the
last head. Global indices come from the taxonomy and are saved with the weights.

Shapes: B samples, H hidden size, C global classes (25 as published).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from hba.errors import InputError
from hba.taxonomy import Taxonomy


class DomainHeads(nn.Module):
    """`columns` maps each domain to its global class indices, in the order of the head's outputs."""

    def __init__(self, hidden_size: int, columns: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.columns = {name: tuple(indices) for name, indices in columns.items()}
        self.num_classes = 1 + max(i for indices in self.columns.values() for i in indices)
        self.linear = nn.ModuleDict({name: nn.Linear(hidden_size, len(ids)) for name, ids in self.columns.items()})

    @classmethod
    def for_taxonomy(cls, hidden_size: int, taxonomy: Taxonomy) -> DomainHeads:
        """Fresh heads for every domain of a taxonomy."""
        return cls(hidden_size, {name: domain.indices for name, domain in taxonomy.domains.items()})

    def forward(self, pooled_BH: Tensor, domain_names: Sequence[str | None]) -> Tensor:
        """Logits [B, C] in float32; columns outside a row's domain are -inf. A row with domain None is all -inf.

        Raises InputError for a domain without a head.
        """
        # Heads stay in float32 whatever the backbone's dtype: they are tiny and decide the result.
        logits_BC = pooled_BH.new_full((len(pooled_BH), self.num_classes), -torch.inf, dtype=torch.float32)
        with torch.autocast(pooled_BH.device.type, enabled=False):
            for name, indices in self.columns.items():
                # Every head runs on every row, so that all ranks of a distributed run touch the same parameters.
                logits_BC[:, list(indices)] = self.linear[name](pooled_BH.float())
        return logits_BC.masked_fill(~self.mask(domain_names, logits_BC.device), -torch.inf)

    def mask(self, domain_names: Sequence[str | None], device: torch.device) -> Tensor:
        """Boolean [B, C]: the columns of each row's domain."""
        mask_BC = torch.zeros(len(domain_names), self.num_classes, dtype=torch.bool)
        for row, name in enumerate(domain_names):
            if name is None:
                continue
            if name not in self.columns:
                raise InputError(f"no head for domain {name!r}", fix=f"Heads exist for {', '.join(self.columns)}.")
            mask_BC[row, list(self.columns[name])] = True
        return mask_BC.to(device)


def answer_loss(answer_logits_NV: Tensor, labels_BT: Tensor) -> Tensor:
    """Next-token cross-entropy of the answers: the mean over each row's tokens, summed over the rows.

    `answer_logits_NV` are the logits that predict the labelled tokens, in row order; the end token is one of them.
    """
    labelled_BT = labels_BT != -100
    return token_loss(answer_logits_NV, labels_BT[labelled_BT], labelled_BT.sum(1))


def token_loss(logits_NV: Tensor, tokens_N: Tensor, lengths_B: Tensor) -> Tensor:
    """Cross-entropy of `tokens_N`, of which `lengths_B` belong to each row: the mean of a row, summed over the rows."""
    losses_N = functional.cross_entropy(logits_NV.float(), tokens_N, reduction="none")
    weights_N = (1.0 / lengths_B.clamp_min(1)).repeat_interleave(lengths_B)
    return (losses_N * weights_N).sum()


def masked_mean(hidden_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean of the hidden states where the mask is 1, [B, H] in float32: sum(h * mask) / sum(mask)."""
    weights_BT1 = mask_BT.unsqueeze(-1).to(torch.float32)
    return (hidden_BTH.float() * weights_BT1).sum(1) / weights_BT1.sum(1)
