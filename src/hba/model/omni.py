"""OmniSapiens: a Qwen2.5-Omni thinker with one classification head a domain.

`forward` merges text, audio, image and video into the thinker's embeddings, runs its language model once and returns
the pooled penultimate hidden state, the heads' logits and the last hidden state; lm_head is applied only where someone
needs its logits, since over a 152,000-token vocabulary it costs more than a layer. The class owns no training
logic: see train/. What lies in a checkpoint's files says checkpoint.py.

Shapes: B samples, T tokens, H hidden size, C global classes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hba.batch.config import EncodeConfig
from hba.batch.encode import IGNORED, Batch, Window
from hba.errors import ConfigError, InputError
from hba.model import checkpoint
from hba.model.bam import Bam, load_bam, save_bam
from hba.model.config import ModelConfig, Strategy
from hba.model.generate import Said, generate
from hba.model.heads import DomainHeads, masked_mean
from hba.storage import write_json
from hba.taxonomy import BUILTIN, Taxonomy

# Scoped to the language model: the audio and vision towers have layers of the same names.
LORA_TARGETS = r"model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"


class OmniOutput(NamedTuple):
    """What one forward pass gives."""

    pooled_BH: Tensor  # masked mean of hidden_states[-2], float32
    logits_BC: Tensor  # -inf outside each row's domain
    last_hidden_BTH: Tensor  # normed; lm_head turns it into token logits
    answer_logits_NV: Tensor | None  # predict the N answer tokens of the batch, in row order


class OmniSapiens(nn.Module):
    """`thinker` is transformers' Qwen2_5OmniThinkerForConditionalGeneration, with LoRA layers or without."""

    def __init__(self, thinker: nn.Module, heads: DomainHeads, processor: Any, bam: Bam | None = None) -> None:
        super().__init__()
        self.thinker: Any = thinker
        self.heads = heads
        self.processor = processor
        self.bam = bam
        self.own_lm_head = False  # whether stage 2 has trained an lm_head of its own
        self.speaks = False  # whether training has taught lm_head (or all) to answer free-form rows

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: str = "auto",
        attention: str = "sdpa",
        taxonomy: Taxonomy = BUILTIN,
        mapped: bool = False,
    ) -> OmniSapiens:
        """An OmniSapiens from a checkpoint folder, a run folder (its best checkpoint), or a backbone with fresh heads.

        `dtype` is auto (bfloat16 on GPUs that have it, else float32), float32 or bfloat16. With `mapped` the backbone's
        weights stay in their files, whatever their precision, until `ranks.prepare_model` has dealt them out. Raises
        InputError when the folder is none of these or of a newer format.
        """
        how: dict[str, Any] = {"dtype": dtype, "attention": attention, "mapped": mapped}
        folder = checkpoint.resolve(path)
        if folder is None:
            thinker, processor = checkpoint.load_thinker(str(path), **how), checkpoint.load_processor(path)
            hidden = int(thinker.config.get_text_config().hidden_size)
            return cls(thinker, DomainHeads.for_taxonomy(hidden, taxonomy), processor)
        card, base = checkpoint.read_card(folder), checkpoint.base_of(folder)
        checkpoint.require_config(folder, base)
        adapter = folder if card["strategy"] == "lora" else None
        thinker = checkpoint.load_thinker(base, **how, adapter=adapter)
        hidden = int(thinker.config.get_text_config().hidden_size)
        if card["columns"] is None:  # generative training leaves no heads that would fit
            return cls(thinker, DomainHeads.for_taxonomy(hidden, taxonomy), checkpoint.load_processor(folder))
        heads = checkpoint.load_heads(folder)
        if heads.hidden_size != hidden:
            what = f"the heads read states of {heads.hidden_size} numbers, the backbone {base} gives {hidden}"
            raise InputError(what, where=str(folder / checkpoint.HEADS), fix=checkpoint.OTHER_BACKBONE)
        model = cls(thinker, heads, checkpoint.load_processor(folder), load_bam(folder, hidden))
        model.speaks = bool(card.get("speaks", False))
        if (folder / checkpoint.LM_HEAD).is_file():
            model.own_lm_head = True
            weight_VH = checkpoint.load_lm_head(folder, model.thinker.lm_head.weight.shape)
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
    ) -> None:
        """Write a checkpoint into `folder` (which the caller makes atomic).

        `speaks` says that training has taught the model to answer free-form rows in words; `domains` are those whose
        heads have seen rows, None all of them.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if strategy in ("lora", "full"):
            self.thinker.save_pretrained(folder)
        checkpoint.save_heads(self.heads, folder)
        if self.own_lm_head:
            checkpoint.save_lm_head(self.thinker.lm_head.weight, folder)
        if self.bam is not None:
            save_bam(self.bam, folder)
        self.processor.save_pretrained(folder)
        known: dict[str, Any] = {"columns": self.heads.columns, "speaks": speaks, "domains": domains}
        card = checkpoint.new_card(backbone, strategy, encode, **known)
        write_json(folder / checkpoint.CARD, card)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return torch.device(self.thinker.device)

    @property
    def hidden_size(self) -> int:
        """H of the language model."""
        return int(self.thinker.config.get_text_config().hidden_size)

    def forward(self, batch: Batch) -> OmniOutput:
        """One pass over a batch; pooling covers the prompt alone. Token logits exist where the batch has answers."""
        inputs = batch.inputs
        if inputs["input_ids"].device != self.device:
            found = f"batch is on {inputs['input_ids'].device}, model on {self.device}"
            raise InputError(found, fix="Use batch.to(...).")
        outputs = self._run(inputs)
        pooled_BH = masked_mean(outputs.hidden_states[-2], batch.prompt_mask)
        if batch.windows:
            pooled_BH = self._averaged(pooled_BH, batch.windows)
        logits_BC = self.heads(self._adapted(pooled_BH, batch), batch.domain_names)
        last_BTH = outputs.last_hidden_state
        delta_BH = self._answer_delta(batch)
        if delta_BH is not None:
            last_BTH = last_BTH + delta_BH.unsqueeze(1).to(last_BTH)
        if batch.labels_BT is None:
            return OmniOutput(pooled_BH, logits_BC, last_BTH, None)
        # The state at a position predicts the token behind it.
        answer_NH = last_BTH[:, :-1][batch.labels_BT[:, 1:] != IGNORED]
        return OmniOutput(pooled_BH, logits_BC, last_BTH, self.thinker.lm_head(answer_NH))

    def _run(self, inputs: Mapping[str, Tensor]) -> Any:
        return self.thinker.model(
            inputs_embeds=self._embed(inputs),
            attention_mask=inputs["attention_mask"],
            position_ids=self._positions(inputs),
            use_cache=False,
            output_hidden_states=True,
        )

    def _averaged(self, pooled_BH: Tensor, windows: Sequence[Window]) -> Tensor:
        """The mean over the windows of each sample, one after the other. Heads are linear, so that it gives the mean of
        their logits."""
        counts_B = torch.ones(len(pooled_BH), device=pooled_BH.device)
        for rows_R, inputs in windows:
            pooled_RH = masked_mean(self._run(inputs).hidden_states[-2], inputs["attention_mask"])
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

    def untie_lm_head(self, weight_VH: Tensor | None = None) -> None:
        """Give lm_head weights of its own, so that training it leaves the embeddings as they are.

        They are `weight_VH`, or else those that it has.
        """
        thinker = self.thinker
        embeddings = thinker.get_input_embeddings()
        if weight_VH is None and thinker.lm_head.weight is embeddings.weight:
            weight_VH = embeddings.weight.detach().clone()
        if weight_VH is not None:
            thinker.lm_head.weight = nn.Parameter(weight_VH)
        thinker.config.tie_word_embeddings = thinker.config.get_text_config().tie_word_embeddings = False

    def _embed(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Token embeddings [B, T, H] with every medium's features in the place of its tokens.

        Raises InputError when a medium's tokens and features differ in number.
        """
        embeddings_BTH: Tensor = self.thinker.get_input_embeddings()(inputs["input_ids"])
        if "input_features" in inputs:
            audio = self.thinker.get_audio_features(inputs["input_features"], inputs["feature_attention_mask"])
            embeddings_BTH = self._place(embeddings_BTH, inputs, "audio", audio.last_hidden_state)
        if "pixel_values" in inputs:
            image = self.thinker.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
            embeddings_BTH = self._place(embeddings_BTH, inputs, "image", image.pooler_output)
        if "pixel_values_videos" in inputs:
            video = self.thinker.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
            embeddings_BTH = self._place(embeddings_BTH, inputs, "video", video.pooler_output)
        return embeddings_BTH

    def _place(self, embeddings_BTH: Tensor, inputs: Mapping[str, Tensor], kind: str, features: Tensor) -> Tensor:
        token = getattr(self.thinker.config, f"{kind}_token_id")
        mask_BT1 = (inputs["input_ids"] == token).unsqueeze(-1)
        if int(mask_BT1.sum()) != len(features):
            raise InputError(f"{int(mask_BT1.sum())} {kind} tokens for {len(features)} {kind} features")
        placed: Tensor = embeddings_BTH.masked_scatter(mask_BT1, features.to(embeddings_BTH))
        return placed

    def _positions(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Multimodal rotary positions [3, B, T]."""
        mask_AM = inputs.get("feature_attention_mask")
        positions: Tensor
        positions, _ = self.thinker.get_rope_index(
            inputs["input_ids"],
            inputs.get("image_grid_thw"),
            inputs.get("video_grid_thw"),
            inputs["attention_mask"],
            False,
            None if mask_AM is None else mask_AM.sum(1),
            inputs.get("video_second_per_grid"),
        )
        return positions

    @torch.inference_mode()
    def classify(self, batch: Batch) -> Tensor:
        """Logits [B, C] in the global class space, -inf outside each row's domain.

        Raises InputError naming the free-form rows: they have no domain.
        """
        free_form = [s.id for s, name in zip(batch.samples, batch.domain_names, strict=True) if name is None]
        if free_form:
            raise InputError(f"rows without a domain cannot be classified: {', '.join(free_form)}", fix="Use generate.")
        output: OmniOutput = self(batch)
        return output.logits_BC

    @torch.inference_mode()
    def pooled(self, batch: Batch) -> Tensor:
        """Masked mean of the penultimate hidden states, [B, H], float32."""
        output: OmniOutput = self(batch)
        return output.pooled_BH

    def generate(self, batch: Batch, *, max_new_tokens: int, temperature: float = 0.0) -> list[str]:
        """Answers as text, greedy at temperature 0. Media tokens are never sampled: they would stand for no medium."""
        return [one.text for one in self.say(batch, max_new_tokens=max_new_tokens, temperature=temperature)]

    def say(self, batch: Batch, *, max_new_tokens: int, temperature: float = 0.0) -> list[Said]:
        """`generate`, with the tokens of each answer."""
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        with self._adapted_lm_head(batch):
            return generate(self.thinker, self.processor, batch.inputs, **options)

    @contextmanager
    def _adapted_lm_head(self, batch: Batch) -> Iterator[None]:
        """Within, the adapters' deltas reach every state that lm_head reads."""
        with torch.no_grad():
            delta_BH = self._answer_delta(batch)
        if delta_BH is None:
            yield
            return
        delta_B1H = delta_BH.unsqueeze(1)
        hook = self.thinker.lm_head.register_forward_pre_hook(lambda _, args: (args[0] + delta_B1H.to(args[0]),))
        try:
            yield
        finally:
            hook.remove()


def apply_strategy(model: OmniSapiens, config: ModelConfig) -> OmniSapiens:
    """Choose what is trained: add LoRA layers if asked, set requires_grad of every parameter. Heads always train.

    Raises ConfigError where a model with LoRA layers is to be trained in another way.
    """
    if config.strategy != "lora" and has_lora(model.thinker):
        fix = "Use model.strategy=lora, or fold the layers in with `hba merge` first."
        what = f"the model has LoRA layers, which strategy {config.strategy} would lose"
        raise ConfigError(what, where=config.name, fix=fix)
    choose_trained(model.thinker, config)
    model.heads.requires_grad_(True)
    return model


def choose_trained(model: Any, config: ModelConfig, targets: str = LORA_TARGETS) -> None:
    """Set requires_grad of a transformers model's parameters; LoRA layers go on the modules that `targets` matches.

    A model that has them already keeps their weights and takes the dropout of `config`. Raises ConfigError for another
    rank or alpha than theirs.
    """
    model.requires_grad_(config.strategy == "full")
    if config.strategy != "lora":
        return
    if has_lora(model):
        _continue_lora(model, config)
    else:
        from peft import LoraConfig

        lora = LoraConfig(
            r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=targets
        )
        with _precise_layers(model):
            model.add_adapter(lora)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name
        if parameter.requires_grad:
            # Adapters keep float32 master weights; autocast casts them in the forward pass.
            parameter.data = parameter.data.float()


@contextmanager
def _precise_layers(model: nn.Module) -> Iterator[None]:
    """Within, linear layers have placeholders of float32 for weights: PEFT rounds fresh LoRA to what it finds there."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
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
    adapter.lora_dropout = config.lora_dropout
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout[name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()


def config_of(model: OmniSapiens, name: str, strategy: Strategy) -> ModelConfig:
    """The config with which `model`, LoRA layers included, is trained further as it is."""
    if strategy != "lora":
        return ModelConfig(name=name, strategy=strategy)
    adapter, *_ = model.thinker.peft_config.values()
    sizes = {"lora_r": adapter.r, "lora_alpha": adapter.lora_alpha, "lora_dropout": adapter.lora_dropout}
    return ModelConfig(name=name, strategy=strategy, **sizes)


def has_lora(model: nn.Module) -> bool:
    """Whether a model has LoRA layers already."""
    return any("lora_" in name for name, _ in model.named_parameters())
