"""Classification heads: one linear layer a domain, all writing into the one global class space.

Domain d fills the columns of its global indices; for a row of domain d every other column is -inf, so that softmax and
cross-entropy run over the domain's own classes only. A row without a domain (free-form) is an error here, never the
last head. Global indices come from the taxonomy and are saved with the weights.

Behind them stand the losses of answers in words, which a language head says.

Shapes: B samples, N answer tokens, H hidden size, C global classes (25 as published), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hba.errors import InputError
from hba.taxonomy import Taxonomy

CHUNK_VALUES = 1 << 25  # logits that are made at once: 128 MiB of float32; some five of these are alive at once


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


def head_loss(
    states_NH: Tensor, weight_VH: Tensor, tokens_N: Tensor, lengths_B: Tensor, behind: Callable[[Tensor], Tensor]
) -> Tensor:
    """`token_loss` of what a language head without bias makes of its states, `CHUNK_VALUES` logits at a time; `behind`
    is what its model does to logits behind it.

    The gradients are computed along with the loss, of states and weights alike: logits are needed once, and under
    autocast a float32 head has neither a rounded copy of itself nor a rounded gradient beside the true one.
    """
    shares_N = (1.0 / lengths_B.clamp_min(1)).repeat_interleave(lengths_B)
    loss: Tensor = _HeadLoss.apply(states_NH, weight_VH, tokens_N, shares_N, behind)  # type: ignore[no-untyped-call]
    return loss


class _HeadLoss(torch.autograd.Function):
    """Sum of the cross-entropies of tokens, each times its share."""

    @staticmethod
    def forward(
        ctx: Any,
        states_NH: Tensor,
        weight_VH: Tensor,
        tokens_N: Tensor,
        shares_N: Tensor,
        behind: Callable[[Tensor], Tensor],
    ) -> Tensor:
        device, (vocabulary, width) = states_NH.device.type, weight_VH.shape
        mixed = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if mixed else weight_VH.dtype
        moves_states, moves_weight = ctx.needs_input_grad[:2]
        d_states_NH = torch.zeros_like(states_NH, dtype=torch.float32) if moves_states else None
        d_weight_VH = torch.zeros_like(weight_VH) if moves_weight else None
        rows, size = max(1, CHUNK_VALUES // width), max(1, CHUNK_VALUES // vocabulary)
        spans = [slice(v, v + rows) for v in range(0, vocabulary, rows)]
        loss = torch.zeros((), device=states_NH.device)
        with torch.autocast(device, enabled=False):
            for chunk in (slice(n, n + size) for n in range(0, len(states_NH), size)):
                states_CH = states_NH[chunk].to(dtype)
                logits_CV = torch.cat([states_CH @ weight_VH[span].to(dtype).T for span in spans], 1)
                with torch.set_grad_enabled(moves_states or moves_weight):
                    logits_CV.requires_grad_(moves_states or moves_weight)
                    losses_C = functional.cross_entropy(behind(logits_CV).float(), tokens_N[chunk], reduction="none")
                    part = (losses_C * shares_N[chunk]).sum()
                loss += part.detach()
                if not part.requires_grad:
                    continue
                (d_logits_CV,) = torch.autograd.grad(part, logits_CV)
                for span in spans:
                    if d_states_NH is not None:
                        d_states_NH[chunk] += d_logits_CV[:, span] @ weight_VH[span].to(dtype)
                    if d_weight_VH is not None:
                        d_weight_VH[span] += d_logits_CV[:, span].T @ states_CH
        ctx.found = (None if d_states_NH is None else d_states_NH.to(states_NH.dtype)), d_weight_VH
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        found, ctx.found = ctx.found, None  # the gradient of a parameter is then taken as it is, not copied
        return (*(None if each is None else each.mul_(d_loss) for each in found), None, None, None)


def masked_mean(hidden_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean of the hidden states where the mask is 1, [B, H] in float32: sum(h * mask) / sum(mask)."""
    weights_BT1 = mask_BT.unsqueeze(-1).to(torch.float32)
    return (hidden_BTH.float() * weights_BT1).sum(1) / weights_BT1.sum(1)
