"""Padding of unpadded samples to the longest of a batch: text on the left, so that every answer ends at the last token;
sound on the right.

Shapes: B samples, T tokens, A audios, M mel frames, F mel bins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORED = -100


def token_ids(ids: Sequence[Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [B, T]."""
    longest = max(map(len, ids))
    input_ids_BT = torch.full((len(ids), longest), pad_token_id, dtype=torch.long)
    attention_mask_BT = torch.zeros((len(ids), longest), dtype=torch.long)
    for i, row_T in enumerate(ids):
        input_ids_BT[i, longest - len(row_T) :] = row_T
        attention_mask_BT[i, longest - len(row_T) :] = 1
    return {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT}


def per_token(values: Sequence[Tensor], answers: Sequence[Tensor | None], input_ids_BT: Tensor) -> Tensor:
    """Values of the prompts' tokens [B, T]; 0, which stands for text, at padding and answers."""
    padded_BT = torch.zeros_like(input_ids_BT)
    for row_T, value_T, answer_T in zip(padded_BT, values, answers, strict=True):
        end = len(row_T) - (0 if answer_T is None else len(answer_T))
        row_T[end - len(value_T) : end] = value_T
    return padded_BT


def labels(answers: Sequence[Tensor | None], input_ids_BT: Tensor) -> Tensor:
    """The answers' tokens at their own positions [B, T] (no shift), IGNORED everywhere else."""
    labels_BT = torch.full_like(input_ids_BT, IGNORED)
    for row_T, answer_T in zip(labels_BT, answers, strict=True):
        if answer_T is not None:
            row_T[-len(answer_T) :] = answer_T
    return labels_BT


def mel_frames(mels: Sequence[Tensor]) -> dict[str, Tensor]:
    """`input_features` [A, F, M] and `feature_attention_mask` [A, M] of audios [F, M]."""
    longest = max(mel.shape[1] for mel in mels)
    features_AFM = torch.zeros(len(mels), mels[0].shape[0], longest)
    mask_AM = torch.zeros(len(mels), longest, dtype=torch.long)
    for i, mel_FM in enumerate(mels):
        features_AFM[i, :, : mel_FM.shape[1]] = mel_FM
        mask_AM[i, : mel_FM.shape[1]] = 1
    return {"input_features": features_AFM, "feature_attention_mask": mask_AM}


def concatenated(parts: Sequence[Tensor]) -> Tensor:
    """Parts one behind the other; what differs in its other dimensions (frames of sound) is padded with zeros."""
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(list(parts))
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    whole = parts[0].new_zeros(sum(map(len, parts)), *largest)
    start = 0
    for part in parts:
        whole[(slice(start, start + len(part)), *map(slice, part.shape[1:]))] = part
        start += len(part)
    return whole
