"""OmniSapiens' classification heads: the most probable label of the row's domain, with all probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch

from hba.atlas import Atlas
from hba.atlas.batch import Batch, Encoder
from hba.atlas.loader import LoaderConfig
from hba.atlas.sampler import Indices
from hba.errors import InputError
from hba.evaluate.backends.batches import batched_answers
from hba.evaluate.backends.interface import Output, Result
from hba.evaluate.config import Opening
from hba.model import checkpoint
from hba.model.omni import OmniSapiens
from hba.remote.cost import Meter
from hba.storage import file_sha256
from hba.taxonomy import Taxonomy


class HeadsBackend:
    """A `Backend` over a loaded model. `origin` is the identity of its checkpoint, empty while it is being trained."""

    name = "heads"
    free_form = False
    meter: Meter | None = None

    def __init__(
        self,
        model: OmniSapiens,
        encoder: Encoder,
        *,
        batch_size: int,
        loader: LoaderConfig,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.encoder, self.batch_size, self.loader = model, encoder, batch_size, loader
        self.origin = origin or {}

    def identity(self) -> Mapping[str, Any]:
        """Hash of the heads and name of the checkpoint."""
        return self.origin

    def answers(self, atlas: Atlas, rows: Indices, done: Set[str]) -> Iterator[Result]:
        """In batches of similar length."""
        options: dict[str, Any] = {"encoder": self.encoder, "batch_size": self.batch_size, "loader": self.loader}
        return batched_answers(atlas, rows, done, answer=self.classify, **options)

    def classify(self, batch: Batch) -> Sequence[Output]:
        """Softmax over the domain's classes."""
        taxonomy: Taxonomy = self.encoder.taxonomy
        probabilities_BC = torch.softmax(self.model.classify(batch.to(self.model.device)), dim=-1).cpu().numpy()
        outputs = []
        for row_C, name in zip(probabilities_BC, batch.domain_names, strict=True):
            domain = taxonomy.domains[str(name)]
            probs = {label: float(row_C[i]) for label, i in zip(domain.labels, domain.indices, strict=True)}
            best = max(probs, key=lambda label: probs[label])
            outputs.append(Output(text=best, answer=best, label=best, probs=probs, tokens_out=0))
        return outputs


def open_backend(_name: str, opening: Opening) -> HeadsBackend:
    """The heads of a checkpoint or run folder. Raises InputError for a backbone, whose heads are not trained."""
    model_name, config, taxonomy = opening.model, opening.config, opening.atlas.taxonomy
    trained = checkpoint.resolve(model_name)
    if trained is None or checkpoint.read_card(trained)["columns"] is None:
        fix = "Give a checkpoint, or the run folder of `hba train sft`; --backend hf answers in words."
        raise InputError("a backbone without trained heads: its answers would be random", where=model_name, fix=fix)
    model = checkpoint.load(model_name, dtype=config.dtype, attention=config.attention, taxonomy=taxonomy).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    origin = {"model": file_sha256(trained / "heads.safetensors"), "checkpoint": checkpoint.describe(model_name)}
    encoder = Encoder(model.processor, opening.encode, taxonomy)
    return HeadsBackend(model, encoder, batch_size=config.batch_size, loader=config.loader, origin=origin)
