"""Any transformers chat model as a config value: found by its own config, loaded with its processor, trained or asked.

`ChatModel.forward` gives the logits that predict the answers of a batch and no others: the head of the model is handed
only the states in front of answer tokens, whatever the model's forward would compute, so that its scaling and capping
of logits stay and the logits of a long prompt are never made. A `Reader` gets the states and the head instead, and
never needs the logits of all answer tokens at once. Models that also talk are loaded without their talker.

It loads what `checkpoint` writes (whole weights or an adapter), and runs no code that comes with a model.

Shapes: B samples, T tokens, N answer tokens of a batch, V vocabulary, H hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hba.batch.config import EncodeConfig
from hba.batch.encode import IGNORED, Batch, TextProcessor, answer_ids, end_token_id
from hba.errors import ConfigError, InputError
from hba.model import checkpoint
from hba.model.bam import FOLDER
from hba.model.config import ModelConfig, Strategy
from hba.model.generate import Said, choice_logps, generate
from hba.model.omni import OmniSapiens, choose_trained, has_lora
from hba.storage import write_json

Head: TypeAlias = Callable[[Tensor], Tensor]  # states [C, H] to logits [C, V]
Reader: TypeAlias = Callable[[Tensor, Head], Tensor]

# Of these the class in transformers' own list is the model with its talker.
THINKERS = {
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}


class ChatModel(nn.Module):
    """`transformer` is a transformers model with a language head, with LoRA layers or without."""

    def __init__(self, transformer: nn.Module, processor: Any) -> None:
        super().__init__()
        self.transformer: Any = transformer
        self.processor = processor
        self._head_is_known = False  # whether `_behind_head` has been seen to do what the model does

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return torch.device(self.transformer.device)

    def forward(self, batch: Batch, read: Reader | None = None) -> Tensor:
        """Logits [N, V] that predict the answer tokens of the batch, in row order: those of `labels_BT`.

        With `read`, what it gives for the states [N, H] in front of these tokens and the head, which makes logits of as
        many of them as it is given. It runs within the forward pass, where a sharded model has its parameters.

        Raises InputError for a batch without answers, and for a model whose forward bypasses its own language head or,
        with `read`, changes logits behind it in an unknown way.
        """
        if batch.labels_BT is None:
            raise InputError("the batch has no answers to predict", fix="Encode the samples with answers.")
        # The state at a position predicts the token behind it.
        predicts_BT = batch.labels_BT[:, 1:] != IGNORED

        states: list[Tensor] = []

        def answers_alone(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden_BTH, *rest = args
            states.append(hidden_BTH[:, :-1][predicts_BT])
            return (states[0] if read is None else states[0][:1], *rest)  # a reader asks for the others

        head = self.transformer.get_output_embeddings()
        handle = head.register_forward_pre_hook(answers_alone)
        try:
            logits_NV: Tensor = self.transformer(**batch.inputs, use_cache=False).logits
        finally:
            handle.remove()
        if logits_NV.ndim != 2:
            raise InputError(f"{type(self.transformer).__name__} does not use its language head", fix="Use another.")
        if read is None:
            return logits_NV
        if not self._head_is_known:
            self._require_known_head(states[0][:1], logits_NV)
            self._head_is_known = True
        return read(states[0], lambda states_CH: self._behind_head(head(states_CH)))

    @torch.no_grad()
    def _require_known_head(self, states_1H: Tensor, logits_1V: Tensor) -> None:
        head = self.transformer.get_output_embeddings()
        ours_1V = self._behind_head(head(states_1H))
        if not torch.allclose(ours_1V.float(), logits_1V.float(), rtol=1e-2, atol=1e-2):
            found = f"{type(self.transformer).__name__} changes logits behind its language head in an unknown way"
            raise InputError(found, fix="Use another model for reinforcement learning.")

    def _behind_head(self, logits: Tensor) -> Tensor:
        """What the forward of some models does to logits: Gemma caps, Cohere and Granite scale them."""
        config = self.transformer.config.get_text_config()
        cap, scale = getattr(config, "final_logit_softcapping", None), getattr(config, "logit_scale", None)
        divisor = getattr(config, "logits_scaling", None)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        if scale is not None:
            logits = logits * scale
        return logits if divisor is None else logits / divisor

    def generate(
        self,
        batch: Batch,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        choices: Sequence[Sequence[str]] = (),
        uniforms_BL: Tensor | None = None,
    ) -> list[Said]:
        """One answer a sample, greedy at temperature 0; one of its `choices` where it has some.

        `uniforms_BL` decide as they do in `generate_tokens`.
        """
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        options |= {"choices": [self._answer_ids(texts) for texts in choices], "uniforms_BL": uniforms_BL}
        return generate(self.transformer, self.processor, batch.inputs, **options)

    def logps(self, batch: Batch, choices: Sequence[Sequence[str]]) -> list[list[float]]:
        """The log-probability of each choice of each sample as its answer, the end of the turn included, in nats."""
        return choice_logps(self.transformer, batch.inputs, [self._answer_ids(texts) for texts in choices])

    def _answer_ids(self, texts: Sequence[str]) -> list[list[int]]:
        end = end_token_id(self.processor)
        return [answer_ids(self.processor.tokenizer, text, end).tolist() for text in texts]


def load(path: str | Path, *, dtype: str = "auto", attention: str = "sdpa", mapped: bool = False) -> ChatModel:
    """A chat model from a hub id, a folder, a checkpoint or a run folder (its best checkpoint), adapter included.

    `dtype` is auto (bfloat16 on GPUs that have it, else float32), float32 or bfloat16; `mapped` is as in
    `OmniSapiens.from_pretrained`. Raises InputError when there is no such model, or none that transformers knows, and
    for BAM adapters, which a chat model has no place for.
    """
    how: dict[str, Any] = {"dtype": dtype, "attention": attention, "mapped": mapped}
    folder = checkpoint.resolve(path)
    if folder is not None and (folder / FOLDER).is_dir():
        fix = "Use --backend heads, or the run of the stage before."
        raise InputError("the checkpoint has BAM adapters, which a chat model ignores", where=str(folder), fix=fix)
    if folder is not None and (folder / checkpoint.LM_HEAD).is_file():
        model = OmniSapiens.from_pretrained(folder, **how)  # stage 2 is of OmniSapiens alone
        return ChatModel(model.thinker, model.processor)
    if folder is None:
        name, adapter = str(path), None
    else:
        name = checkpoint.base_of(folder)
        checkpoint.require_config(folder, name)
        adapter = folder if checkpoint.read_card(folder)["strategy"] == "lora" else None
    transformer = checkpoint.pretrained(model_class(name), name, **how, adapter=adapter, what="the model")
    return ChatModel(transformer, load_processor(str(folder or path)))


def save(
    model: ChatModel,
    folder: Path,
    *,
    backbone: str,
    strategy: Strategy,
    encode: EncodeConfig,
    formats: Sequence[str] = (),
) -> None:
    """Write a checkpoint that `load` reads, and OmniSapiens, too, where the model is a thinker of Qwen2.5-Omni.

    `formats` are the answer formats that it was trained in, by which it will be asked.

    It has no classification heads: those of a model that it was made from do not fit any more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.transformer.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    card = checkpoint.new_card(backbone, strategy, encode, formats=formats)
    write_json(folder / checkpoint.CARD, card)


def prepare(model: ChatModel, config: ModelConfig) -> ChatModel:
    """Choose what is trained, LoRA layers in the language model or everything.

    Raises ConfigError for the strategy `heads`, and where a model with LoRA layers is to be trained in another way.
    """
    if config.strategy == "heads":
        raise ConfigError("a chat model has no heads to train", where="model.strategy", fix="Use lora or full.")
    if config.strategy == "full" and has_lora(model.transformer):
        rank = next(iter(model.transformer.peft_config.values())).r
        fix = f"Merge it first (hba merge), or use model.strategy=lora and model.lora_r={rank}."
        found = f"the model has LoRA layers of rank {rank}, which strategy full cannot train"
        raise ConfigError(found, where="model", fix=fix)
    adapts = config.strategy == "lora" and not has_lora(model.transformer)
    choose_trained(model.transformer, config, lora_targets(model.transformer) if adapts else "")
    return model


def lora_targets(transformer: Any) -> str:
    """A pattern for the linear layers of the language model alone; towers have layers of the same names.

    Raises InputError for a model whose language model has no layers of that kind.
    """
    words = transformer.get_input_embeddings()
    prefix = next(name for name, module in transformer.named_modules() if module is words).rpartition(".")[0]
    start = f"{prefix}.layers." if prefix else "layers."
    linear = [n for n, m in transformer.named_modules() if n.startswith(start) and isinstance(m, nn.Linear)]
    kinds = sorted({name.removeprefix(start).partition(".")[2] for name in linear})
    if not kinds:
        found = f"no linear layers below {start}"
        raise InputError(found, where=type(transformer).__name__, fix="Use model.strategy=full.")
    return rf"{re.escape(start)}\d+\.({'|'.join(map(re.escape, kinds))})"


def model_class(name: str | Path) -> Any:
    """The class of transformers for the chat model in a folder or on the hub. Raises InputError when there is none."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    config = checkpoint.read_config(name, what="the model")
    kind = config.model_type
    written = (getattr(config, "architectures", None) or [""])[0]
    known = THINKERS.get(kind) or MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(kind) or written
    if not isinstance(known, str) or not hasattr(transformers, known):
        found = f"no chat model of type {kind!r} in transformers {transformers.__version__}"
        raise InputError(found, where=str(name), fix="Use a model that transformers knows; code of models is not run.")
    return getattr(transformers, known)


def load_processor(name: str) -> Any:
    """The processor of a chat model, that of a model of text alone its tokenizer.

    Raises InputError when it cannot be loaded or has no chat template.
    """
    from transformers import AutoProcessor, PreTrainedTokenizerBase

    try:
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        what = f"cannot load the processor ({str(error).splitlines()[0]})"
        raise InputError(what, where=name, fix="Use a model that comes with its processor.") from error
    if isinstance(processor, PreTrainedTokenizerBase):
        processor = TextProcessor(processor)
    if getattr(processor, "tokenizer", None) is None or processor.chat_template is None:
        fix = "Use a chat model; a base model has no template."
        raise InputError(f"{type(processor).__name__} has no chat template", where=name, fix=fix)
    return processor
