"""A frozen backbone in 4 and in 8 bits: training, resuming, merging and predicting with it, and what is refused."""

import re

import pytest
import torch

from hba import open_atlas
from hba.batch.config import EncodeConfig
from hba.batch.encode import Encoder, collate
from hba.config import load_config
from hba.errors import ConfigError
from hba.evaluate.config import PredictConfig
from hba.evaluate.predict import Selection, predict_run
from hba.evaluate.score import score_run
from hba.model import OmniSapiens, checkpoint
from hba.model.config import ModelConfig
from hba.model.merge import merge_checkpoint
from hba.model.omni import apply_strategy
from hba.model.weights import linear_names
from hba.run import RunFolder
from hba.storage import read_json, read_jsonl
from hba.train.bam import train_bam
from hba.train.config import BamConfig, LmConfig, QaConfig, SftConfig
from hba.train.lm import save_checkpoint, train_lm
from hba.train.qa import train_qa
from hba.train.sft import train_sft

TRAIN = [
    "encode.num_frames=2", "encode.max_pixels=3136", "loader.workers=0", "validation_split=validation",
    "train.learning_rate=1e-2", "train.batch_size=8", "train.log_every=1", "model.dtype=float32", "answer_weight=1",
    "datasets=[tess]",
]  # fmt: skip
BITS = {"nf4": torch.uint8, "int8": torch.int8}


def trained(run, kind, work, config):
    settings = load_config(kind, None, config)
    with RunFolder.open(run, config=settings, command="train", seed=0) as opened:
        work(settings, opened)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory, mini_atlas, backbone):
    """A run of stage 1 in each of the two."""
    folder = tmp_path_factory.mktemp("quantised")
    base = [f"atlas={mini_atlas}", f"model.name={backbone}", *TRAIN, "train.max_steps=8", "train.validate_every=8"]
    return {k: trained(folder / k, SftConfig, train_sft, [*base, f"model.quantization={k}"]) for k in BITS}


def batch_of(model, atlas):
    config = EncodeConfig(num_frames=2, min_pixels=3136, max_pixels=3136)
    rows = open_atlas(atlas, split="test[:12]")
    encoder = Encoder(model.processor, config, rows.taxonomy, answers=True)
    encoded = [encoder.encode(sample) for sample in rows]
    return collate(encoded, pad_token_id=encoder.pad_token_id, taxonomy=rows.taxonomy)


def losses(run):
    return [line.record["loss"] for line in read_jsonl(run / "log.jsonl") if line.record["kind"] == "train"]


@pytest.mark.parametrize("kind", BITS)
def test_the_loss_falls_and_only_linear_layers_of_the_language_model_are_quantised(runs, kind):
    said = losses(runs[kind])
    assert sum(said[-2:]) < 0.8 * sum(said[:2])
    assert read_json(checkpoint.resolve(runs[kind]) / "hba.json")["quantization"] == kind
    model = OmniSapiens.from_pretrained(runs[kind], dtype="bfloat16")
    dtypes = {name: p.dtype for name, p in model.transformer.named_parameters() if "lora_" not in name}
    small = {name for name, dtype in dtypes.items() if dtype is BITS[kind]}
    assert {re.sub(r"\.base_layer", "", name) for name in small if name.endswith("weight")} == small_names(runs, kind)
    assert {dtypes[name] for name in dtypes.keys() - small} == {torch.bfloat16}
    assert {p.dtype for name, p in model.transformer.named_parameters() if "lora_" in name} == {torch.float32}


def small_names(runs, kind):
    base = checkpoint.base_of(checkpoint.resolve(runs[kind]))
    plain = checkpoint.load_backbone(base, dtype="float32", attention="sdpa")
    return {f"{name}.weight" for name in linear_names(plain)}


@pytest.mark.parametrize("kind", BITS)
def test_merged_it_computes_what_the_quantised_run_does(runs, mini_atlas, tmp_path, kind):
    merge_checkpoint(runs[kind], tmp_path / "merged", dtype="float32")
    ours = OmniSapiens.from_pretrained(runs[kind], dtype="float32").eval()
    whole = OmniSapiens.from_pretrained(tmp_path / "merged", dtype="float32").eval()
    assert whole.quantization == "none"
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    batch = batch_of(ours, mini_atlas)
    with torch.no_grad():
        found, expected = ours(batch).answer_logits_NV, whole(batch).answer_logits_NV
    # int8 rounds inputs of layers, too, which merged weights do not.
    tolerance = 1e-3 if kind == "nf4" else 0.1
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    plain = OmniSapiens.from_pretrained(runs[kind], dtype="float32", quantization="none").eval()
    with torch.no_grad():
        unrounded = plain(batch).answer_logits_NV
    assert not torch.allclose(unrounded, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", BITS)
def test_predicting_loads_it_quantised_again_and_scores_as_the_validation_did(runs, mini_atlas, tmp_path, kind):
    settings = load_config(PredictConfig, None, ["dtype=float32", "loader.workers=0", "batch_size=32"])
    only = Selection(datasets=("tess",))
    how = {"atlas": str(mini_atlas), "split": "validation", "config": settings, "progress": lambda _: None}
    predict_run(str(runs[kind]), tmp_path, selection=only, **how)
    assert read_json(tmp_path / "predict.json")["identity"]["quantization"] == kind
    (last,) = [line.record for line in read_jsonl(runs[kind] / "log.jsonl") if line.record["kind"] == "validation"]
    scored = {task: found.score for task, found in score_run(tmp_path).tasks.items()}
    assert scored and scored == {task: last["metrics"][task] for task in scored}


def test_later_stages_stand_on_it_quantised(runs, mini_atlas, tmp_path):
    common = [f"atlas={mini_atlas}", f"base={runs['nf4']}", "dtype=float32", "features.loader.workers=0"]
    common += ["train.max_steps=2", "train.batch_size=4", "train_split=train[:90]", "validation_split=validation[:40]"]
    qa = trained(tmp_path / "qa", QaConfig, train_qa, [*common, "datasets=[siq2]"])
    bam = trained(tmp_path / "bam", BamConfig, train_bam, [*common, "datasets=[siq2]"])
    for run in (qa, bam):
        assert read_json(checkpoint.resolve(run) / "hba.json")["quantization"] == "nf4"
    cards = [read_json(file) for file in (runs["nf4"] / "features").rglob("card.json")]
    assert cards and {card["quantization"] for card in cards} == {"nf4"}
    asked = [*common, "datasets=[siq2]", "quantization=none"]  # the card says what it was validated with
    for kind, work in ((QaConfig, train_qa), (BamConfig, train_bam)):
        run = trained(tmp_path / f"plain {kind.__name__}", kind, work, asked)
        assert OmniSapiens.from_pretrained(run, dtype="float32").quantization == "none"


def test_a_run_of_another_precision_is_refused_before_anything_is_loaded(runs, mini_atlas, backbone, tmp_path):
    def refused(words, config, kind=SftConfig, work=train_sft):
        with pytest.raises(ConfigError, match=words):
            trained(tmp_path / str(len(list(tmp_path.iterdir()))), kind, work, [f"atlas={mini_atlas}", *config])

    started = f"model.name={runs['nf4']}"
    refused(r"trained on nf4, model\.quantization is none", [started])
    refused(r"trained on nf4, model\.quantization is int8", [started, "model.quantization=int8"])
    plain = f"model.name={backbone}"
    refused("strategy full trains them", [plain, "model.strategy=full", "model.quantization=nf4"])
    refused("strategy full trains them", [plain, "model.strategy=full", "model.quantization=int8"], LmConfig, train_lm)
    refused("cannot be split over the processes", [plain, "model.quantization=nf4", "train.sharding=full"])
    if not torch.cuda.is_available():
        refused("there is no GPU", [plain, "train.optimizer=paged_adamw8bit"])
    refused("cannot be split over the processes", [plain, "train.optimizer=adamw8bit", "train.sharding=full"])
    refused("nf4", [plain, "model.quantization=nf3"])
    stage = [f"base={runs['nf4']}", "dtype=float32", "datasets=[daicwoz]", "stage=full", "train.sharding=full"]
    refused("cannot be split over the processes", stage, BamConfig, train_bam)
    refused(r"trained on nf4, quantization is none", [*stage[:-1], "quantization=none"], BamConfig, train_bam)


def test_without_bitsandbytes_it_is_refused_in_one_sentence(runs, mini_atlas, backbone, hba, tmp_path, monkeypatch):
    monkeypatch.setattr("hba.model.config.find_spec", lambda name: None)
    new = tmp_path / "new"
    asked = [f"atlas={mini_atlas}", f"model.name={backbone}", "model.quantization=nf4"]
    code, _, said = hba("train", "sft", "--run", new, *asked[:2], "train.optimizer=adamw8bit")
    assert code == 2 and "adamw8bit needs bitsandbytes, which is not installed" in " ".join(said.split())
    for command in (
        ["train", "sft", "--run", new, *asked],
        ["merge", runs["nf4"], new],
        ["predict", runs["nf4"], "--atlas", mini_atlas, "--run", new],
    ):
        code, _, said = hba(*command)
        assert code == 2 and "nf4 needs bitsandbytes, which is not installed" in " ".join(said.split()), said
        assert not new.exists()


def test_dora_on_some_layers_of_a_quantised_model_begins_as_the_model_and_is_merged(
    mini_atlas, backbone, tmp_path, monkeypatch
):
    """Ranks by layer, targets by name, and lengths of rows that are those of the rounded weights."""
    how = {"lora_targets": ("q_proj", "1.mlp.*"), "lora_rank_pattern": {"q_proj": 3}, "lora_dora": True}
    for kind, dtype in (("nf4", "float32"), ("none", "bfloat16"), ("int8", "bfloat16"), ("nf4", "bfloat16")):
        config = ModelConfig(name=str(backbone), dtype=dtype, lora_r=4, lora_dropout=0.0, quantization=kind, **how)
        plain = OmniSapiens.from_pretrained(backbone, dtype=dtype, quantization=kind, heads=False).eval()
        model = OmniSapiens.from_pretrained(backbone, dtype=dtype, quantization=kind, heads=False)
        apply_strategy(model, config).eval()
        layers = {n: m for n, m in model.transformer.named_modules() if hasattr(m, "lora_magnitude_vector")}
        assert {n.rpartition(".")[2] for n in layers} == {"q_proj", "gate_proj", "up_proj", "down_proj"}
        assert {m.r["default"] for n, m in layers.items() if n.endswith("q_proj")} == {3}
        assert all(".1.mlp" in n and m.r["default"] == 4 for n, m in layers.items() if not n.endswith("q_proj"))
        batch = batch_of(plain, mini_atlas)
        with torch.no_grad():
            before, after = plain(batch).answer_logits_NV, model(batch).answer_logits_NV
        close = 1e-4 if dtype == "float32" else 0.05
        torch.testing.assert_close(after, before, atol=close, rtol=close)
        if dtype == "bfloat16":  # as it trains: lengths that are rounded would be others than those of the start
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), monkeypatch.context() as patch:
                if kind != "none":
                    patch.setattr("torch.is_autocast_enabled", lambda *_: True)  # PEFT asks for the GPU's
                found, expected = model.train()(batch), plain.train()(batch)
                assert torch.equal(found.answer_logits_NV, expected.answer_logits_NV)
        if kind == "int8":  # one batch after the other
            folder = tmp_path / "int8"
            folder.mkdir()
            save_checkpoint(model, LmConfig(atlas=str(mini_atlas), model=config), folder)
            loaded = OmniSapiens.from_pretrained(folder, dtype=dtype, heads=False).eval()
            with torch.no_grad():
                for _ in range(2):
                    torch.testing.assert_close(loaded(batch).answer_logits_NV, after, atol=close, rtol=close)
    asked = [f"atlas={mini_atlas}", f"model.name={backbone}", *TRAIN, "train.max_steps=2", "model.quantization=nf4"]
    asked += ["model.lora_targets=[q_proj,1.mlp.*]", "model.lora_rank_pattern={q_proj: 3}", "model.lora_dora=true"]
    for dtype in ("bfloat16", "float32"):
        run = trained(tmp_path / dtype / "run", SftConfig, train_sft, [*asked, f"model.dtype={dtype}"])
        merge_checkpoint(run, tmp_path / dtype / "merged", dtype="float32")
        ours = OmniSapiens.from_pretrained(run, dtype="float32").eval()
        whole = OmniSapiens.from_pretrained(tmp_path / dtype / "merged", dtype="float32").eval()
        with torch.no_grad():
            found, expected = ours(batch).answer_logits_NV, whole(batch).answer_logits_NV
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    later = [f"atlas={mini_atlas}", f"base={run}", "datasets=[daicwoz]", "stage=full"]
    with pytest.raises(ConfigError, match="weights of nf4 cannot be split over the processes"):
        trained(tmp_path / "split", BamConfig, train_bam, [*later, "dtype=float32", "train.sharding=full"])
    for other, words in ((["q_proj"], "LoRA on other layers"), (["v_proj", "q_proj"], "LoRA on other layers")):
        config = load_config(SftConfig, None, [*asked, f"model.name={run}", f"model.lora_targets=[{','.join(other)}]"])
        with pytest.raises(ConfigError, match=words):
            apply_strategy(ours, config.model)
    with pytest.raises(ConfigError, match=r"lora_dora=True and lora_rank_pattern=.*, the config asks for False"):
        apply_strategy(ours, ModelConfig(name=str(run), quantization="nf4"))


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("model.lora_targets=[q_prj]", r"model\.lora_targets: no linear .* called 'q_prj'.*Did you mean 'q_proj'"),
        ("model.lora_targets=['q_(']", r"model\.lora_targets: 'q_\(' is no regular expression"),
        ("model.lora_rank_pattern={visual: 3}", r"model\.lora_rank_pattern: no linear layer .* called 'visual'"),
        (
            "model.lora_targets=[q_proj] & model.lora_rank_pattern={q_proj: 2,v_proj: 3}",
            r"model\.lora_rank_pattern: no layer called 'v_proj' has LoRA by model\.lora_targets",
        ),
    ],
)
def test_layers_that_are_not_there_are_refused_before_anything_is_loaded(mini_atlas, backbone, tmp_path, key, words):
    with pytest.raises(ConfigError, match=words):
        asked = [f"atlas={mini_atlas}", f"model.name={backbone}", *key.split(" & ")]
        trained(tmp_path / "new", SftConfig, train_sft, asked)
