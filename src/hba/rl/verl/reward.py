"""verl's reward manager: the rewards of the local engine, many responses at once.

verl asks for one response at a time, of many at the same time. Those that arrive within a moment are scored together,
so that the sentence encoder sees batches. A reward worker is a Ray actor with one encoder; all agent workers share one,
unless a run asks for more (`verl.reward_workers`). What fails here ends the run: verl would drop the rollouts that it
is about, and learn from the others.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, NamedTuple

from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from hba.atlas.rows import Sample
from hba.errors import HbaError
from hba.rl.advantages import SIGNAL
from hba.rl.rewards import Scorer, raised
from hba.rl.verl.config import SIGNAL_PART, VALIDATION
from hba.rl.verl.dataset import run_config, run_rows, verdict
from hba.rl.verl.launch import note_failure

GATHER_SECONDS = 0.02
MOST_AT_ONCE = 256


class _Asked(NamedTuple):
    response: str
    sample: Sample
    tokens: int
    answer: asyncio.Future[dict[str, Any]]


class ScorerRewardManager(RewardManagerBase):  # type: ignore[misc]
    """`hba.rl.rewards.Scorer` behind verl's interface; every column of a row is at hand."""

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, **_: Any) -> None:
        """verl's constructor. Raises InputError when the reward function or the encoder cannot be had."""
        super().__init__(config, tokenizer, compute_score)
        self._run = str(config.data.hba_run)
        settings = run_config(self._run)
        self._taxonomy = run_rows(self._run, "training").taxonomy
        self._scorer = Scorer(settings.reward, self._taxonomy)
        self._asked: list[_Asked] = []

    async def run_single(self, data: Any) -> dict[str, Any]:
        """Reward of the last of a session's outputs, as verl wants it: `reward_score` and its named parts."""
        row = data[-1:][0]
        ids_L, mask_T = row.batch["responses"], row.batch["attention_mask"]
        tokens = int(mask_T[-len(ids_L) :].sum())
        loop = asyncio.get_running_loop()
        text = self.tokenizer.decode(ids_L[:tokens], skip_special_tokens=True)
        role, number = str(row.non_tensor_batch["role"]), int(row.non_tensor_batch["index"])
        sample = run_rows(self._run, role)[number]
        asked = _Asked(text, sample, tokens, loop.create_future())
        self._asked.append(asked)
        if len(self._asked) >= MOST_AT_ONCE:
            self._score()
        elif len(self._asked) == 1:
            loop.call_later(GATHER_SECONDS, self._score)
        parts: dict[str, Any] = {**await asked.answer, "tokens": float(tokens)}
        parts[SIGNAL_PART] = float(round(parts["score"] / SIGNAL))
        if role == VALIDATION:
            parts |= verdict(sample, text, number, str(row.non_tensor_batch["way"]), self._taxonomy)
        return {"reward_score": parts["score"], "reward_extra_info": parts}

    def _score(self) -> None:
        asked, self._asked = self._asked, []
        if not asked:
            return
        try:
            scored = self._scorer([a.response for a in asked], [a.sample for a in asked], [a.tokens for a in asked])
        except BaseException as error:  # noqa: BLE001  # whoever asked waits for an answer, whatever it is
            failed = error if isinstance(error, HbaError) else HbaError(raised(error), where="verl's reward worker")
            note_failure(Path(self._run), failed)
            for one in asked:
                one.answer.set_exception(failed)
            return
        for one, parts in zip(asked, scored, strict=True):
            one.answer.set_result(parts)
