"""OmniSapiens: any chat model of transformers with one classification head a domain, adapters, and its own words.

`forward` hands the inputs to the model's own forward, whatever its towers and positions are, and looks at what passes
by two hooks: the states in front of the last layer of the language model, whose masked mean the heads read, and those
in front of the language head, which gets the states that predict answer tokens and no others. Whatever a model does
behind its head (Gemma caps its logits) stays, and logits of a long prompt are never made. Where no answer is asked for
neither the last layer nor anything behind it runs. A model without heads answers in words alone.

It loads what `checkpoint` writes, runs no code that comes with a model, and owns no training logic: see train/.

Shapes: B samples, T tokens, N answer tokens of a batch, H hidden size, C global classes, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from copy import copy, deepcopy
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from hba.batch.config import EncodeConfig
from hba.batch.encode import FAMILIES, IGNORED, Batch, Family, Window, answer_ids, end_token_id
from hba.errors import ConfigError, InputError, nearest
from hba.model import checkpoint
from hba.model.bam import FOLDER, Bam, load_bam, save_bam
from hba.model.config import AsTrained, ModelConfig, Quantization, Strategy, require_bitsandbytes
from hba.model.generate import Said, choice_logps, generate
from hba.model.heads import DomainHeads, masked_mean
from hba.model.weights import language_layers, linear_names
from hba.storage import write_json
from hba.taxonomy import BUILTIN, Taxonomy

Head: TypeAlias = Callable[[Tensor], Tensor]  # states [C, H] to logits [C, V]
Reader: TypeAlias = Callable[[Tensor, Head], Tensor]


class OmniOutput(NamedTuple):
    """What one forward pass gives: the first two of a model with heads, the others of a batch with answers."""

    pooled_BH: Tensor | None  # masked mean of the states in front of the last layer, float32
    logits_BC: Tensor | None  # -inf outside each row's domain
    answer_states_NH: Tensor | None  # normed states in front of the answers' tokens, in row order
    answer_logits_NV: Tensor | None  # what the language head makes of them, or what a reader does


class _Enough(Exception):  # noqa: N818 - not an error: it ends a forward pass of which no more is needed
    """Raised in front of the first layer that need not run."""


class OmniSapiens(nn.Module):
    """`transformer` is a transformers model with a language head, with LoRA layers or without."""

    def __init__(
        self, transformer: nn.Module, processor: Any, heads: DomainHeads | None = None, bam: Bam | None = None
    ) -> None:
        super().__init__()
        self.transformer: Any = transformer
        _precise_lengths(transformer)
        interleaving_by_row(transformer)
        if FAMILIES.get(type(processor).__name__, Family()).written:
            telling_clips_from_pictures(transformer)
        self.heads = heads
        self.processor = processor
        self.bam = bam
        self.own_lm_head = False  # whether stage 2 has trained a language head of its own
        self.quantization: Quantization = "none"  # of the linear layers of the language model
        self.speaks = False  # whether training has taught it to answer free-form rows
        self._head_is_known = False  # whether `_behind_head` has been seen to do what the model does

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: str = "auto",
        attention: str = "sdpa",
        quantization: AsTrained = "auto",
        taxonomy: Taxonomy = BUILTIN,
        mapped: bool = False,
        heads: bool = True,
    ) -> OmniSapiens:
        """A model from a hub id, a folder, a checkpoint or a run folder (its best checkpoint), adapter included.

        A backbone gets fresh heads; with `heads` False the model has none and answers in words alone. `dtype` is auto
        (bfloat16 on GPUs that have it, else float32), float32 or bfloat16; `quantization` none, int8, nf4 or auto: as
        the checkpoint was trained, none for a backbone. With `mapped` the backbone's weights stay in their files,
        whatever their precision, until `ranks.prepare_model` has dealt them out. Raises InputError when
        there is no such model, when transformers does not know it, when its processor has no chat template, and for
        BAM adapters in a model without heads.
        """
        folder = checkpoint.resolve(path)
        card = None if folder is None else checkpoint.read_card(folder)
        kind = checkpoint.quantization_of(card) if quantization == "auto" else quantization
        require_bitsandbytes(kind, of_it=kind != "none", where=str(path))
        checkpoint.require_attention(attention)
        if folder is not None and not heads and (folder / FOLDER).is_dir():
            fix = "Use --backend heads, or the run of the stage before."
            raise InputError("the checkpoint has BAM adapters, which a chat model ignores", where=str(folder), fix=fix)
        base = str(path) if folder is None else checkpoint.base_of(folder)
        if folder is not None:
            checkpoint.require_config(folder, base)
        adapter = folder if card is not None and card["strategy"] == "lora" else None
        checkpoint.backbone_class(base)  # an unknown model is told of before a processor that it does not come with
        processor = checkpoint.load_processor(base if folder is None else folder)
        how: dict[str, Any] = {"dtype": dtype, "attention": attention, "mapped": mapped, "adapter": adapter}
        transformer = checkpoint.load_backbone(base, quantization=kind, heads=heads, **how)
        model = cls(transformer, processor)
        model.quantization = kind
        if heads and (card is None or card["columns"] is None):  # generative training leaves no heads that would fit
            model.heads = DomainHeads.for_taxonomy(model.hidden_size, taxonomy)
        elif heads and folder is not None:
            model.heads = checkpoint.load_heads(folder)
            if model.heads.hidden_size != model.hidden_size:
                read, given = model.heads.hidden_size, model.hidden_size
                what = f"the heads read states of {read} numbers, the backbone {base} gives {given}"
                raise InputError(what, where=str(folder / checkpoint.HEADS), fix=checkpoint.OTHER_BACKBONE)
            model.bam = load_bam(folder, model.hidden_size)
            model.speaks = bool(card and card.get("speaks", False))
        if folder is not None and (folder / checkpoint.LM_HEAD).is_file():
            model.own_lm_head = True
            weight_VH = checkpoint.load_lm_head(folder, transformer.get_output_embeddings().weight.shape)
            model.untie_lm_head(weight_VH.to(checkpoint.resolve_dtype(dtype)))
        return model

    def save_pretrained(
        self,
        folder: Path,
        *,
        backbone: str,
        strategy: Strategy,
        encode: EncodeConfig,
        speaks: bool = False,
        domains: list[str] | None = None,
        formats: Sequence[str] = (),
    ) -> None:
        """Write a checkpoint into `folder` (which the caller makes atomic).

        `speaks` says that training has taught the model to answer free-form rows in words; `domains` are those whose
        heads have seen rows, None all of them; `formats` the answer formats that it was trained in, by which it will be
        asked.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if strategy in ("lora", "full"):
            self.transformer.save_pretrained(folder)
        if self.heads is not None:
            checkpoint.save_heads(self.heads, folder)
        if self.own_lm_head:
            checkpoint.save_lm_head(self.transformer.get_output_embeddings().weight, folder)
        if self.bam is not None:
            save_bam(self.bam, folder)
        self.processor.save_pretrained(folder)
        columns = None if self.heads is None else self.heads.columns
        known: dict[str, Any] = {"columns": columns, "speaks": speaks, "domains": domains, "formats": formats}
        card = checkpoint.new_card(backbone, strategy, encode, quantization=self.quantization, **known)
        write_json(folder / checkpoint.CARD, card)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return torch.device(self.transformer.device)

    @property
    def hidden_size(self) -> int:
        """H of the language model."""
        return int(self.transformer.config.get_text_config().hidden_size)

    def forward(self, batch: Batch, read: Reader | None = None) -> OmniOutput:
        """One pass over a batch; pooling covers the prompt alone. There are token logits where the batch has answers.

        With `read`, in place of them what it gives for the states [N, H] in front of the answers' tokens and the head,
        which makes logits of as many of them as it is given: a reader never needs the logits of all at once. It runs
        within the forward pass, where a sharded model has its parameters.

        Raises InputError for a batch without answers and a model without heads, for a model whose forward bypasses its
        own language head and, with `read`, for one that changes logits behind it in an unknown way.
        """
        inputs = batch.inputs
        if inputs["input_ids"].device != self.device:
            found = f"batch is on {inputs['input_ids'].device}, model on {self.device}"
            raise InputError(found, fix="Use batch.to(...).")
        if batch.labels_BT is None:
            if self.heads is None:
                raise InputError("the batch has no answers to predict", fix="Encode the samples with answers.")
            return OmniOutput(*self._classified(self._penultimate(inputs), batch), None, None)
        # The state at a position predicts the token behind it.
        predicts_BT = batch.labels_BT[:, 1:] != IGNORED
        delta_BH = self._answer_delta(batch)
        between: list[Tensor] = []
        states: list[Tensor] = []

        def answers_alone(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            last_BTH, *rest = args
            if delta_BH is not None:
                last_BTH = last_BTH + delta_BH.unsqueeze(1).to(last_BTH)
            states.append(last_BTH[:, :-1][predicts_BT])
            return (states[0] if read is None else states[0][:1], *rest)  # a reader asks for the others

        head = self.transformer.get_output_embeddings()
        with ExitStack() as hooks:
            hooks.enter_context(_hooked(head, answers_alone))
            if self.heads is not None:
                last_layer, noted = language_layers(self.transformer).layers[-1], between.append
                hooks.enter_context(_hooked(last_layer, lambda _, a, k: noted(self._state(a, k)), with_kwargs=True))
            hooks.enter_context(as_they_come(self.transformer))
            answer_NV: Tensor = self.transformer(**inputs, use_cache=False).logits
        if answer_NV.ndim != 2:
            raise InputError(f"{type(self.transformer).__name__} does not use its language head", fix="Use another.")
        if read is not None:
            if not self._head_is_known:
                self._require_known_head(states[0][:1], answer_NV)
                self._head_is_known = True
            answer_NV = read(states[0], lambda states_CH: self._behind_head(head(states_CH)))
        if self.heads is None:
            return OmniOutput(None, None, None if read else states[0], answer_NV)
        return OmniOutput(*self._classified(between[0], batch), None if read else states[0], answer_NV)

    def _penultimate(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The states in front of the last layer [B, T, H]; neither it nor anything behind it runs."""
        found: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            found.append(self._state(args, given))
            raise _Enough

        last_layer: Any = language_layers(self.transformer).layers[-1]
        recomputed = getattr(last_layer, "gradient_checkpointing", None)
        try:
            if recomputed:  # what is never computed is not computed again: the hook would end a checkpoint half-way
                last_layer.gradient_checkpointing = False
            hooked, uncast = _hooked(last_layer, stop, with_kwargs=True), as_they_come(self.transformer)
            with hooked, uncast, suppress(_Enough):
                self.transformer(**inputs, use_cache=False)
        finally:
            if recomputed:
                last_layer.gradient_checkpointing = True
        return found[0]

    def _state(self, args: tuple[Any, ...], given: Mapping[str, Any]) -> Tensor:
        """The hidden states [B, T, H] that a layer of the language model is given.

        Of several states a token (Gemma 3n, whose layers hand on four) the one that the model makes of them behind its
        last layer: the heads read what a model of one layer less would hand to its norm.
        """
        states: Tensor = args[0] if args else given["hidden_states"]
        if states.ndim == 3:
            return states
        name = language_layers(self.transformer).prefix.rstrip(".")
        others = getattr(self.transformer.get_submodule(name), "altup_unembed_projections", None)
        if others is None or states.ndim != 4 or len(states) != 1 + len(others):
            what = f"{type(self.transformer).__name__} keeps several states a token, which heads cannot read"
            raise InputError(what, fix="Use another model, or `hba train lm`.")
        first_BTH, *rest = states
        size_BT1 = first_BTH.square().mean(-1, keepdim=True).clamp_min(1e-30).sqrt()
        whole_BTH: Tensor = first_BTH
        for state_BTH, project in zip(rest, others, strict=True):
            other_BTH = project(state_BTH).to(first_BTH.dtype)
            own_BT1 = other_BTH.square().mean(-1, keepdim=True).clamp_min(1e-5).sqrt()
            whole_BTH = whole_BTH + other_BTH * size_BT1 / own_BT1
        return whole_BTH / len(states)

    def _classified(self, between_BTH: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The pooled states and the heads' logits of a batch whose states in front of the last layer are given."""
        assert self.heads is not None
        pooled_BH = masked_mean(between_BTH, batch.prompt_mask)
        if batch.windows:
            pooled_BH = self._averaged(pooled_BH, batch.windows)
        return pooled_BH, self.heads(self._adapted(pooled_BH, batch), batch.domain_names)

    def _averaged(self, pooled_BH: Tensor, windows: Sequence[Window]) -> Tensor:
        """The mean over the windows of each sample, one after the other. Heads are linear, so that it gives the mean of
        their logits."""
        counts_B = torch.ones(len(pooled_BH), device=pooled_BH.device)
        for rows_R, inputs in windows:
            pooled_RH = masked_mean(self._penultimate(inputs), inputs["attention_mask"])
            pooled_BH = pooled_BH.index_add(0, rows_R, pooled_RH)
            counts_B = counts_B.index_add(0, rows_R, torch.ones(len(rows_R), device=counts_B.device))
        return pooled_BH / counts_B.unsqueeze(1)

    def _adapted(self, pooled_BH: Tensor, batch: Batch) -> Tensor:
        if self.bam is None:
            return pooled_BH
        adapted_BH: Tensor = self.bam(pooled_BH, [s.dataset for s in batch.samples], batch.descriptors)
        return adapted_BH

    def _answer_delta(self, batch: Batch) -> Tensor | None:
        """What adapters add to every last hidden state of the free-form rows, [B, H]; zeros in all other rows."""
        if self.bam is None or all(name is not None for name in batch.domain_names):
            return None
        free_B1 = torch.tensor([[name is None] for name in batch.domain_names], device=self.device)
        return self._adapted(torch.zeros(len(batch), self.hidden_size, device=self.device), batch) * free_B1

    @torch.no_grad()
    def _require_known_head(self, states_1H: Tensor, logits_1V: Tensor) -> None:
        ours_1V = self._behind_head(self.transformer.get_output_embeddings()(states_1H))
        if not torch.allclose(ours_1V.float(), logits_1V.float(), rtol=1e-2, atol=1e-2):
            found = f"{type(self.transformer).__name__} changes logits behind its language head in an unknown way"
            raise InputError(found, fix="Use another model for reinforcement learning.")

    def _behind_head(self, logits: Tensor) -> Tensor:
        return behind_head(logits, self.transformer.config)

    def untie_lm_head(self, weight_VH: Tensor | None = None) -> None:
        """Give the language head weights of its own, so that training it leaves the embeddings as they are.

        They are `weight_VH`, or else those that it has.
        """
        transformer = self.transformer
        head, embeddings = transformer.get_output_embeddings(), transformer.get_input_embeddings()
        if weight_VH is None and head.weight is embeddings.weight:
            weight_VH = embeddings.weight.detach().clone()
        if weight_VH is not None:
            head.weight = nn.Parameter(weight_VH)
        transformer.config.tie_word_embeddings = transformer.config.get_text_config().tie_word_embeddings = False

    @torch.inference_mode()
    def classify(self, batch: Batch) -> Tensor:
        """Logits [B, C] in the global class space, -inf outside each row's domain.

        Raises InputError naming the free-form rows, which have no domain, and for a model without heads.
        """
        free_form = [s.id for s, name in zip(batch.samples, batch.domain_names, strict=True) if name is None]
        if free_form:
            raise InputError(f"rows without a domain cannot be classified: {', '.join(free_form)}", fix="Use generate.")
        logits_BC: Tensor | None = self(batch).logits_BC
        if logits_BC is None:
            raise InputError("the model has no heads", fix="Use generate.")
        return logits_BC

    @torch.inference_mode()
    def pooled(self, batch: Batch) -> Tensor:
        """Masked mean of the penultimate hidden states, [B, H], float32. Raises InputError without heads."""
        pooled_BH: Tensor | None = self(batch).pooled_BH
        if pooled_BH is None:
            raise InputError("the model has no heads", fix="Use generate.")
        return pooled_BH

    def generate(self, batch: Batch, *, max_new_tokens: int, temperature: float = 0.0) -> list[str]:
        """Answers as text, greedy at temperature 0. Media tokens are never sampled: they would stand for no medium."""
        return [one.text for one in self.say(batch, max_new_tokens=max_new_tokens, temperature=temperature)]

    def say(
        self,
        batch: Batch,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        choices: Sequence[Sequence[str]] = (),
        uniforms_BL: Tensor | None = None,
        **more: Any,
    ) -> list[Said]:
        """`generate`, with the tokens of each answer; one of its `choices` for a sample that has some.

        `uniforms_BL` decide as they do in `generate_tokens`, whose `alternatives` and `over` are taken, too.
        """
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        options |= {"choices": [self._answer_ids(texts) for texts in choices], "uniforms_BL": uniforms_BL}
        with self._adapted_lm_head(batch):
            return generate(self.transformer, self.processor, batch.inputs, **options, **more)

    def logps(self, batch: Batch, choices: Sequence[Sequence[str]]) -> list[list[float]]:
        """The log-probability of each choice of each sample as its answer, the end of the turn included, in nats."""
        return choice_logps(self.transformer, batch.inputs, [self._answer_ids(texts) for texts in choices])

    def _answer_ids(self, texts: Sequence[str]) -> list[list[int]]:
        end = end_token_id(self.processor)
        return [answer_ids(self.processor.tokenizer, text, end).tolist() for text in texts]

    @contextmanager
    def _adapted_lm_head(self, batch: Batch) -> Iterator[None]:
        """Within, the adapters' deltas reach every state that the language head reads."""
        with torch.no_grad():
            delta_BH = self._answer_delta(batch)
        if delta_BH is None:
            yield
            return
        delta_B1H, head = delta_BH.unsqueeze(1), self.transformer.get_output_embeddings()
        with _hooked(head, lambda _, args: (args[0] + delta_B1H.to(args[0]),)):
            yield


def interleaving_by_row(transformer: Any) -> None:
    """Let a model that hears clips among their frames take `use_audio_in_video` [B], a value for each row.

    transformers knows one for the whole batch, and then takes rows of clips without a sound for text. Each row's
    positions are those that it has alone.
    """
    of_batch = getattr(transformer, "get_rope_index", None)
    if of_batch is None or "use_audio_in_video" not in signature(of_batch).parameters:
        return

    def of_rows(
        input_ids: Tensor,
        image_grid_thw: Tensor | None,
        video_grid_thw: Tensor | None,
        attention_mask: Tensor,
        use_audio_in_video: Tensor | bool | None,
        audio_seqlens: Tensor | None,
        second_per_grids: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(use_audio_in_video, Tensor):
            grids = (image_grid_thw, video_grid_thw)
            return of_batch(input_ids, *grids, attention_mask, use_audio_in_video, audio_seqlens, second_per_grids)  # type: ignore[no-any-return]
        config, found = transformer.config, []
        images = videos = audios = 0  # of the rows before
        for row, interleaved in enumerate(use_audio_in_video.tolist()):
            ids_1T, mask_1T = input_ids[row : row + 1], attention_mask[row : row + 1]
            ids_T = ids_1T[mask_1T.bool()]
            begun_T = ids_T[1:][ids_T[:-1] == config.vision_start_token_id]  # what stands first in each picture or clip
            pictures = int((begun_T == config.image_token_id).sum())
            clips, sounds = len(begun_T) - pictures, int((ids_T == config.audio_start_token_id).sum())
            found.append(
                of_batch(
                    ids_1T,
                    image_grid_thw[images : images + pictures] if image_grid_thw is not None and pictures else None,
                    video_grid_thw[videos : videos + clips] if video_grid_thw is not None and clips else None,
                    mask_1T,
                    interleaved,
                    None if audio_seqlens is None else audio_seqlens[audios : audios + sounds],
                    None if second_per_grids is None else second_per_grids[videos : videos + clips],
                )
            )
            images, videos, audios = images + pictures, videos + clips, audios + sounds
        positions, deltas = zip(*found, strict=True)
        return torch.cat(positions, 1), torch.cat(deltas)

    transformer.get_rope_index = of_rows


def telling_clips_from_pictures(transformer: Any) -> None:
    """Let a model whose frames stand in a prompt as pictures do, between tokens of their own (GLM-4V), find both.

    transformers takes all places for those of pictures, and all for those of clips: a batch could have one kind alone.
    """
    whole = next((m for m in transformer.modules() if hasattr(m, "get_placeholder_mask")), None)
    ids = transformer.config
    if whole is None or getattr(ids, "video_start_token_id", None) is None:
        return

    def places(input_ids: Tensor, inputs_embeds: Tensor, **features: Tensor) -> tuple[Tensor, Tensor]:
        begun_BT, ended_BT = ((input_ids == i).cumsum(1) for i in (ids.video_start_token_id, ids.video_end_token_id))
        place_BT, inside_BT = input_ids == ids.image_token_id, begun_BT > ended_BT
        kinds = (place_BT & ~inside_BT, place_BT & inside_BT)
        for name, kind_BT in zip(("image_features", "video_features"), kinds, strict=True):
            if name in features and len(features[name]) != int(kind_BT.sum()):
                raise ValueError(f"{len(features[name])} {name} for {int(kind_BT.sum())} places in the prompts")
        image_BTH, video_BTH = (kind_BT.unsqueeze(-1).expand_as(inputs_embeds) for kind_BT in kinds)
        return image_BTH, video_BTH

    whole.get_placeholder_mask = places


@contextmanager
def _hooked(module: nn.Module, before: Callable[..., Any], *, with_kwargs: bool = False) -> Iterator[None]:
    """Within, `before` is called in front of the module, before anything else that waits there."""
    handle = module.register_forward_pre_hook(before, prepend=True, with_kwargs=with_kwargs)
    try:
        yield
    finally:
        handle.remove()


def recompute_layers(transformer: Any) -> None:
    """Let the layers of a transformers model be computed again in the backward pass in place of being kept.

    Those alone that hold trained parameters or lie above some: the others have no backward pass.
    """
    language, head = language_layers(transformer).layers, transformer.get_output_embeddings()
    words = transformer.get_input_embeddings()
    behind = {id(p) for p in head.parameters()} - {id(p) for p in words.parameters()}
    for name, stack in transformer.named_modules():
        if not isinstance(stack, nn.ModuleList) or not stack or not isinstance(stack[0], GradientCheckpointingLayer):
            continue
        inner = {id(p) for p in stack.parameters()} | (behind if stack is language else set())
        owner = transformer if stack is language else transformer.get_submodule(name.rpartition(".")[0])
        reached = any(p.requires_grad and id(p) not in inner for p in owner.parameters())
        each: Any
        for each in stack:
            reached = reached or any(p.requires_grad for p in each.parameters())
            each.gradient_checkpointing = reached
            again = partial(_as_in_the_first_pass, each)
            each._gradient_checkpointing_func = partial(torch_checkpoint, use_reentrant=False, context_fn=again)


def _as_in_the_first_pass(layer: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What a layer is computed in, in the forward pass (whose own context it has already) and again in the backward."""
    return nullcontext(), as_they_come(layer)


def compile_layers(transformer: Any) -> None:
    """Let torch.compile make kernels of the layers of the language model, for passes of training.

    Each layer by itself: they are alike, and what is compiled for one serves all. What waits in front of a layer
    (hooks, the gathering of a split model, recomputation) stays outside. Sizes are not compiled in: steps of other
    lengths find what is there. Generation, whose cache grows, and evaluation run as they are.
    """
    from torch import _dynamo as dynamo

    # Layers share their code and its limit: they differ in what trains below them, kind of attention, mask, batch of 1.
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, 64)
    for layer in language_layers(transformer).layers:
        plain: Callable[..., Any] = layer.forward
        layer.forward = partial(_compiled_in_training, layer, plain, torch.compile(plain, dynamic=True))


def liger_layers(transformer: Any) -> None:
    """Let Liger's kernels compute norms and gated products in the layers of the language model, and its last norm.

    They keep less for the backward pass. Norms and products that compute anything else, asked of small copies of them,
    stay as they are. Raises InputError for a family of which nothing is left.
    """
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # where every version has them
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def normed(norm: Any, states: Tensor) -> Tensor:
        how = (norm.variance_epsilon, 0.0, "llama", False)  # in place it would change gradients of what goes past it
        found: Tensor = LigerRMSNormFunction.apply(states, norm.weight, *how)
        return found

    def gated(product: Any, states: Tensor) -> Tensor:
        inner = LigerSiLUMulFunction.apply(product.gate_proj(states), product.up_proj(states))
        found: Tensor = product.down_proj(inner)
        return found

    prefix, layers = language_layers(transformer)
    last = [module for name, module in transformer.named_modules() if name == f"{prefix}norm"]
    modules: list[Any] = [*layers.modules(), *last]
    with torch.random.fork_rng(devices=[]):  # a run that resumes draws what it would have drawn
        torch.default_generator.manual_seed(0)  # all processes find the same
        norms = [each for each in modules if hasattr(each, "variance_epsilon") and _is_rms_norm(each)]
        products = [each for each in modules if hasattr(each, "gate_proj") and _is_gated_silu(each)]
    for each in norms:
        each.forward = partial(normed, each)
    for each in products:
        each.forward = partial(gated, each)
    if not norms and not products:
        what = "Liger has no kernels for the layers of this family"
        raise InputError(what, where=type(transformer).__name__, fix="Use train.kernels=none.")


def _is_rms_norm(norm: Any) -> bool:
    """Whether a norm is weight * x / sqrt(mean(x^2) + variance_epsilon), as Llama's."""
    if [*norm._parameters] != ["weight"] or norm.weight is None or norm.weight.ndim != 1:
        return False

    def formula(small: Any, states: Tensor) -> Tensor:
        found: Tensor = small.weight * states * torch.rsqrt(states.pow(2).mean(-1, True) + small.variance_epsilon)
        return found

    size = len(norm.weight)
    return _computes(norm, formula, size, _parameters={"weight": nn.Parameter(torch.rand(size, device="cpu") + 0.5)})


def _is_gated_silu(product: Any) -> bool:
    """Whether a feed-forward layer is down(silu(gate(x)) * up(x)), as Llama's."""
    names = ("gate_proj", "up_proj", "down_proj")
    if product._parameters or not {*names} <= {*product._modules}:
        return False

    def formula(small: Any, states: Tensor) -> Tensor:
        found: Tensor = small.down_proj(nn.functional.silu(small.gate_proj(states)) * small.up_proj(states))
        return found

    size = 32
    small = {name: nn.Linear(size, size, device="cpu") for name in names}
    return _computes(product, formula, size, _modules={**product._modules, **small})


def _computes(module: Any, formula: Callable[[Any, Tensor], Tensor], size: int, **small: Any) -> bool:
    """Whether a module's forward takes one tensor and makes of it, in training, what `formula` does.

    Asked of a copy with `small` in place of what it holds: its own weights may be quantised, or on another device.
    """
    if len(signature(module.forward).parameters) != 1:
        return False
    shell = copy(module)
    vars(shell).update(small)
    shell = deepcopy(shell).train()
    states = torch.rand(4, 3, size, device="cpu") * 3 - 1  # a mean, signs, and below scales at which limits show
    states = torch.cat([states * scale for scale in (1e-3, 1.0, 1e3)])
    with torch.no_grad(), suppress(RuntimeError, TypeError, ValueError):
        return torch.allclose(shell(states), formula(shell, states), rtol=1e-4, atol=1e-6)
    return False  # it wants more than its copy has


def _compiled_in_training(
    layer: nn.Module, plain: Callable[..., Any], compiled: Callable[..., Any], *args: Any, **given: Any
) -> Any:
    alone = layer.training and given.get("past_key_values") is None
    return (compiled if alone else plain)(*args, **given)


@contextmanager
def as_they_come(transformer: Any) -> Iterator[None]:
    """Within, LoRA layers take their inputs in the precision of autocast, where there is one: PEFT would keep a copy
    of each in float32, from which autocast makes the same numbers again. Not those of DoRA, which takes the lengths of
    its rows in the precision of its input."""
    device = next(transformer.parameters()).device.type
    layers: list[Any] = []
    if torch.is_autocast_enabled(device) and has_lora(transformer):
        layers = [m for m in transformer.modules() if hasattr(m, "lora_A") and not any(m.use_dora.values())]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.cast_input_dtype_enabled = True


def behind_head(logits: Tensor, config: Any) -> Tensor:
    """What the forward of some models does to logits: Gemma caps, Cohere and Granite scale them."""
    text = config.get_text_config()
    cap, scale = getattr(text, "final_logit_softcapping", None), getattr(text, "logit_scale", None)
    divisor = getattr(text, "logits_scaling", None)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    if scale is not None:
        logits = logits * scale
    return logits if divisor is None else logits / divisor


def lora_targets(transformer: Any, wanted: Sequence[str] | None = None) -> str | list[str]:
    """A pattern for the linear layers of the language model alone; towers have layers of the same names.

    Those of `wanted`, names or regular expressions of how the layers are called there, or all. A list of whole names
    where a pattern would not do: of a part of the layers, and of a model with experts, of which PEFT makes last names.

    Raises InputError for a model whose language model has no layers of that kind, ConfigError for one that is wanted
    and not there.
    """
    linear, start = _linear_below_lora(transformer), f"{language_layers(transformer).prefix}layers."
    chosen = linear
    if wanted is not None:
        chosen = sorted({name for each in wanted for name in _called(linear, start, each, "model.lora_targets")})
    kinds = sorted({name.removeprefix(start).partition(".")[2] for name in chosen})
    pattern = rf"{re.escape(start)}\d+\.({'|'.join(map(re.escape, kinds))})"
    experts = any(parameter.ndim > 2 for name, parameter in transformer.named_parameters() if name.startswith(start))
    whole = not experts and len(chosen) == sum(re.fullmatch(pattern, name) is not None for name in linear)
    return pattern if whole else chosen


def require_lora_layers(transformer: Any, config: ModelConfig) -> None:
    """Raise ConfigError for layers that `config` names and the language model, which may be a `skeleton`, has not, and
    for ranks of layers without LoRA."""
    linear, start = _linear_below_lora(transformer), f"{language_layers(transformer).prefix}layers."
    targets = set(linear)
    if config.lora_targets is not None:
        targets = {n for each in config.lora_targets for n in _called(linear, start, each, "model.lora_targets")}
    for name in config.lora_rank_pattern or ():
        if targets.isdisjoint(_called(linear, start, name, "model.lora_rank_pattern")):
            what = f"no layer called {name!r} has LoRA by model.lora_targets"
            raise ConfigError(what, where="model.lora_rank_pattern", fix="Leave it out, or name it in both.")


def _linear_below_lora(transformer: Any) -> list[str]:
    return [name.removesuffix(".base_layer") for name in linear_names(transformer) if ".lora_" not in name]


def _called(linear: Sequence[str], start: str, wanted: str, where: str) -> list[str]:
    """Those of the layers `linear` whose name ends as `wanted` says, as PEFT matches ranks."""
    try:
        found = [name for name in linear if re.match(rf"(.*\.)?({wanted})$", name.removeprefix(start))]
    except re.error as error:
        what = f"{wanted!r} is no regular expression ({error})"
        raise ConfigError(what, where=where, fix="Give a name such as q_proj.") from error
    if not found:
        known = sorted({name.rpartition(".")[2] for name in linear})
        what = f"no linear layer of the language model is called {wanted!r}"
        raise ConfigError(what, where=where, fix=f"{nearest(wanted, known)} There are: {', '.join(known)}.")
    return found


def apply_strategy(model: OmniSapiens, config: ModelConfig) -> OmniSapiens:
    """Choose what is trained: add LoRA layers if asked, set requires_grad of every parameter. Heads always train.

    LoRA layers that are there keep their weights and take the dropout of `config`. Raises ConfigError for the strategy
    `heads` without heads, where a model with LoRA layers is to be trained in another way, and for another rank or alpha
    than theirs.
    """
    transformer = model.transformer
    if config.strategy == "heads" and model.heads is None:
        raise ConfigError("a model without heads has none to train", where="model.strategy", fix="Use lora or full.")
    if config.strategy != "lora" and has_lora(transformer):
        rank = next(iter(transformer.peft_config.values())).r
        fix = f"Use model.strategy=lora and model.lora_r={rank}, or fold the layers in with `hba merge` first."
        what = f"the model has LoRA layers of rank {rank}, which strategy {config.strategy} would lose"
        raise ConfigError(what, where=config.name, fix=fix)
    transformer.requires_grad_(config.strategy == "full")
    if model.heads is not None:
        model.heads.requires_grad_(True)
    if config.strategy != "lora":
        return model
    if has_lora(transformer):
        _continue_lora(transformer, config)
    else:
        from peft import LoraConfig

        require_lora_layers(transformer, config)
        how: dict[str, Any] = {"r": config.lora_r, "lora_alpha": config.lora_alpha, "use_dora": config.lora_dora}
        how |= {"lora_dropout": config.lora_dropout, "rank_pattern": dict(config.lora_rank_pattern or {})}
        with _precise_layers(transformer):
            transformer.add_adapter(LoraConfig(**how, target_modules=lora_targets(transformer, config.lora_targets)))
        if config.lora_dora:
            _measure_rows(transformer)
            _precise_lengths(transformer)
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad = "lora_" in name
        if parameter.requires_grad:
            # Adapters keep float32 master weights; autocast casts them in the forward pass.
            parameter.data = parameter.data.float()
    return model


def _measure_rows(transformer: Any) -> None:
    """Begin DoRA at the lengths that the rows of the weights have: PEFT has seen placeholders in their place.

    Of weights that are still as their files have them, the lengths in the precision that they will have.
    """
    dtype = vars(transformer).get("precision_to_come")
    for layer in transformer.modules():
        for name, rows in getattr(layer, "lora_magnitude_vector", {}).items():
            lora_A, lora_B = layer.lora_A[name].weight.float(), layer.lora_B[name].weight.float()
            how: dict[str, Any] = {"lora_A": lora_A, "lora_B": lora_B, "scaling": layer.scaling[name]}
            base = layer.get_base_layer()
            if dtype is not None and base.weight.dtype != dtype:
                stored, base = base.weight, nn.Linear(1, 1, bias=False, device="meta")
                base.weight = nn.Parameter(stored.detach().to(dtype), requires_grad=False)
            with torch.no_grad():
                rows.update_layer(base_layer=base, **how)


def _precise_lengths(transformer: Any) -> None:
    """Let DoRA take its inputs in float32 on quantised weights, too, as PEFT has it on others.

    It computes lengths of rows in the precision of its inputs, which bfloat16 has up to .5 % off.
    """
    for layer in transformer.modules():
        for rows in getattr(layer, "lora_magnitude_vector", {}).values():
            rows.forward = partial(_in_float32, rows.forward)


def _in_float32(forward: Callable[..., Tensor], states: Tensor, *, base_layer: Any, **given: Any) -> Tensor:
    weight = base_layer.weight
    found = forward(states.float(), base_layer=base_layer, **given).to(states.dtype)
    base_layer.weight = weight  # on a CPU, PEFT leaves a copy of 8-bit weights there that has lost its scales
    return found


@contextmanager
def _precise_layers(model: nn.Module) -> Iterator[None]:
    """Within, linear layers have placeholders of float32 for weights: PEFT rounds fresh LoRA to what it finds there."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.is_floating_point()]
    weights = [layer.weight for layer in layers]
    for layer, weight in zip(layers, weights, strict=True):
        empty = torch.zeros(1, device=weight.device).expand(weight.shape)  # one number, whatever the shape
        layer.weight = nn.Parameter(empty, requires_grad=False)
    try:
        yield
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight = weight


def _continue_lora(model: Any, config: ModelConfig) -> None:
    from peft.tuners.lora import LoraLayer

    (name, adapter), *_ = model.peft_config.items()
    differing = [
        f"model.{key}={has}"
        for key, has, wanted in (
            ("lora_r", adapter.r, config.lora_r),
            ("lora_alpha", adapter.lora_alpha, config.lora_alpha),
        )
        if has != wanted
    ]
    if differing:
        found = f"the model has LoRA layers of rank {adapter.r} and alpha {adapter.lora_alpha}"
        what = f"{found}, the config asks for {config.lora_r} and {config.lora_alpha}"
        fix = f"Use {' '.join(differing)} to train them further, or fold them in first (hba merge) and begin new ones."
        raise ConfigError(what, where=config.name, fix=fix)
    has = (adapter.use_dora, dict(adapter.rank_pattern))
    asked = (config.lora_dora, dict(config.lora_rank_pattern or {}))
    if has != asked:
        what = "the model has LoRA layers with lora_dora={} and lora_rank_pattern={}".format(*has)
        what += ", the config asks for {} and {}".format(*asked)
        fix = "Use those of the model, or fold them in first (hba merge) and begin new ones."
        raise ConfigError(what, where=config.name, fix=fix)
    if config.lora_targets is not None:
        linear, start = _linear_below_lora(model), f"{language_layers(model).prefix}layers."
        wanted = {n for each in config.lora_targets for n in _called(linear, start, each, "model.lora_targets")}
        if wanted != {n for n, module in model.named_modules() if isinstance(module, LoraLayer)}:
            fix = "Leave it out to train them further, or fold them in first (hba merge) and begin new ones."
            raise ConfigError("the model has LoRA on other layers", where="model.lora_targets", fix=fix)
    adapter.lora_dropout = config.lora_dropout
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout[name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()


def config_of(model: OmniSapiens, name: str, strategy: Strategy) -> ModelConfig:
    """The config with which `model`, LoRA layers included, is trained further as it is."""
    if strategy != "lora":
        return ModelConfig(name=name, strategy=strategy)
    adapter, *_ = model.transformer.peft_config.values()
    how: dict[str, Any] = {"lora_r": adapter.r, "lora_alpha": adapter.lora_alpha, "lora_dropout": adapter.lora_dropout}
    how |= {"lora_dora": adapter.use_dora, "lora_rank_pattern": dict(adapter.rank_pattern) or None}
    return ModelConfig(name=name, strategy=strategy, **how)


def has_lora(model: nn.Module) -> bool:
    """Whether a model has LoRA layers already."""
    return any("lora_" in name for name, _ in model.named_parameters())
