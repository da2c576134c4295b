"""The rows of an RL run, the same for every engine: prompts to train on, and a sample of held-out ones to watch."""

from __future__ import annotations

from hba.atlas import Atlas, open_atlas
from hba.atlas.mixing import subsample
from hba.rl.config import RlConfig


def training_rows(config: RlConfig) -> Atlas:
    """The rows whose prompts are trained on."""
    return _rows(config, config.train_split)


def validation_rows(config: RlConfig) -> Atlas:
    """The rows of the evaluations, a stratified sample where the config limits their number."""
    atlas = _rows(config, config.validation_split)
    if config.validation_rows is None or config.validation_rows >= len(atlas):
        return atlas
    return atlas.select(subsample(atlas.columns, config.validation_rows, seed=config.train.seed))


def _rows(config: RlConfig, split: str) -> Atlas:
    atlas = open_atlas(config.atlas, split=split)
    return atlas if config.datasets is None else atlas.filter(datasets=config.datasets)
