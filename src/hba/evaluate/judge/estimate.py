"""What judging would cost, without asking the judge: `hba judge --dry-run`.

Every answer without a verdict is one request; a reply that is no verdict is asked for again, so that the bound is
`attempts` requests an answer, each as long as a reply may be. Judgements that the folder has, of a command that was
stopped, give the mean tokens of an answer, all its attempts included, in the place of the rough ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hba.evaluate.estimate import CHARACTERS_A_TOKEN, FORMAT_TOKENS, Estimate, Payee, expected
from hba.evaluate.judge.items import Item
from hba.evaluate.judge.judgements import known_judgements
from hba.evaluate.judge.run import JudgeConfig, asked, open_items, settings_of


def estimate_judging(
    items: Sequence[Item], folder: Path, *, model: str, config: JudgeConfig, retry_unjudged: bool = False
) -> Estimate:
    """The estimate for the items that `folder` has no verdict on. Writes nothing, needs no key.

    Raises InputError for a folder of another judge, as judging does.
    """
    known = known_judgements(folder, settings_of(model, config))
    todo = open_items(items, known, folder, retry_unjudged=retry_unjudged)
    requests = len(todo) * config.attempts
    tokens_in = sum(_rough_tokens(item, config) for item in todo) * config.attempts
    return expected(
        Payee(config.remote.provider, model, config.remote),
        (item.dataset for item in items),
        left=len(todo),
        requests=requests,
        tokens=(tokens_in, requests * config.max_tokens),
        before=[known[item.id] for item in items if item.id in known],
    )


def _rough_tokens(item: Item, config: JudgeConfig) -> int:
    messages = asked(item, 0, config).messages
    return sum(len(str(message["content"])) for message in messages) // CHARACTERS_A_TOKEN + FORMAT_TOKENS
