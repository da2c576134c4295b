"""OmniSapiens: its heads classify, and once lm_head is trained it answers free-form rows in words, greedily.

Rows with classes get the most probable label of their domain with all probabilities; adapters of a row's dataset, if
the checkpoint holds any, take part in both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import torch

from hba.atlas import Atlas
from hba.batch.config import LoaderConfig
from hba.batch.encode import Batch, Encoder
from hba.batch.sampler import Indices
from hba.errors import InputError
from hba.evaluate.backends.interface import Output, Result, batched_answers, evaluation_plan, has_classes, spoken
from hba.model import checkpoint
from hba.model.generate import end_token_ids
from hba.model.omni import OmniSapiens
from hba.taxonomy import Taxonomy

if TYPE_CHECKING:
    from hba.evaluate.config import Opening
    from hba.remote.cost import Meter


class HeadsBackend:
    """A `Backend` over a loaded model. `origin` is the identity of its checkpoint, empty while it is being trained."""

    name = "heads"
    meter: Meter | None = None

    def __init__(
        self,
        model: OmniSapiens,
        encoder: Encoder,
        *,
        batch_size: int,
        loader: LoaderConfig,
        origin: Mapping[str, Any] | None = None,
        max_tokens: int = 0,
        domains: Collection[str] | None = None,
        size_key: str = "batch_size",
    ) -> None:
        """Free-form rows are answered if the model has learned to and `max_tokens` is above 0.

        `domains` are those whose heads were trained, None all: what another head says is noise.
        `size_key` is the key that has set `batch_size`, for messages.
        """
        self.model, self.encoder, self.batch_size, self.loader = model, encoder, batch_size, loader
        self.origin, self.max_tokens, self.size_key = origin or {}, max_tokens, size_key
        self.free_form = model.speaks and max_tokens > 0
        self.domains = None if domains is None else frozenset(domains)

    def identity(self) -> Mapping[str, Any]:
        """Hashes of the heads and of what they stand on, and what it computes in."""
        return self.origin

    def batches(self, atlas: Atlas, rows: Indices) -> Sequence[Indices]:
        """Of similar length, rows with classes before those without."""
        labelled_N = has_classes(atlas)[rows]
        kinds = (rows[labelled_N], rows[~labelled_N])
        return [batch for kind in kinds if len(kind) for batch in evaluation_plan(atlas, kind, self.batch_size)]

    def answers(self, atlas: Atlas, batches: Sequence[Indices], done: Set[str]) -> Iterator[Result]:
        """Rows with classes by the heads, those without in words."""
        options: dict[str, Any] = {"encoder": self.encoder, "loader": self.loader, "size_key": self.size_key}
        classes_N = has_classes(atlas)
        labelled = [classes_N[batch[0]] for batch in batches]
        for wanted, answer in ((True, self.classify), (False, self.speak)):
            chosen = [batch for batch, has in zip(batches, labelled, strict=True) if has == wanted]
            if chosen:
                yield from batched_answers(atlas, chosen, done, answer=answer, **options)

    def classify(self, batch: Batch) -> Sequence[Output]:
        """Softmax over the domain's classes; of a user's own dataset over the labels that it lists."""
        taxonomy: Taxonomy = self.encoder.taxonomy
        logits_BC = self.model.classify(batch.to(self.model.device))
        probabilities_BC = torch.softmax(logits_BC, dim=-1).cpu().numpy()
        outputs = []
        for row, (row_C, name) in enumerate(zip(probabilities_BC, batch.domain_names, strict=True)):
            domain, offered = taxonomy.domains[str(name)], taxonomy.offered(batch.samples[row].dataset)
            probs = {label: float(row_C[i]) for label, i in zip(domain.labels, domain.indices, strict=True)}
            if len(offered) < len(probs):
                columns = [domain.indices[domain.labels.index(label)] for label in offered]
                probs = dict(zip(offered, torch.softmax(logits_BC[row, columns], dim=-1).tolist(), strict=True))
            best = max(probs, key=lambda label: probs[label])
            outputs.append(Output(text=best, answer=best, label=best, probs=probs, tokens_out=0))
        return outputs

    def speak(self, batch: Batch) -> Sequence[Output]:
        """Greedy answers in words."""
        said = self.model.say(batch.to(self.model.device), max_new_tokens=self.max_tokens)
        ends = end_token_ids(self.model.transformer, self.model.processor)
        return [
            spoken(sample, one.text, self.encoder.taxonomy, tokens_out=one.tokens, finish=one.finish(ends))
            for sample, one in zip(batch.samples, said, strict=True)
        ]


def open_backend(_name: str, opening: Opening) -> HeadsBackend:
    """The heads of a checkpoint or run folder. Raises InputError for a backbone, whose heads are not trained."""
    model_name, config, taxonomy = opening.model, opening.config, opening.atlas.taxonomy
    trained = checkpoint.resolve(model_name)
    if trained is None or checkpoint.read_card(trained)["columns"] is None:
        fix = "Give the run folder of `hba train sft`, or add --backend hf for answers in words."
        raise InputError("a backbone without trained heads: its answers would be random", where=model_name, fix=fix)
    checkpoint.require_attention(config.attention, config.dtype)
    checkpoint.require_perceived(model_name, opening.encode, opening.atlas)
    how: dict[str, Any] = {"dtype": config.dtype, "attention": config.attention, "quantization": config.quantization}
    model = OmniSapiens.from_pretrained(model_name, taxonomy=taxonomy, **how).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    max_tokens = config.generation.max_tokens if model.speaks else 0
    origin: dict[str, Any] = dict(checkpoint.identity(trained, **how))
    origin |= {"backbone": origin["model"], "model": checkpoint.trained_hash(trained)}
    if max_tokens:
        origin["max_tokens"] = max_tokens
    adapters, dims = ({}, {}) if model.bam is None else (model.bam.descriptors, model.bam.dims)
    encoder = Encoder(model.processor, opening.encode, taxonomy, descriptors=adapters, dims=dims)
    options: dict[str, Any] = {"batch_size": config.batch_size, "loader": config.loader, "max_tokens": max_tokens}
    domains = checkpoint.read_card(trained).get("domains")
    return HeadsBackend(model, encoder, origin=origin, domains=domains, **options)
