"""Changing a key changes the run: every key of every command's config is tried with another value than its default.

A *look* runs a command's own code on the tiny model and the mini-atlas, and gives what can be seen of it by name: rows,
tokens, requests, optimizer groups, log lines, files, an error. A case changes some keys, each with the sight that has
to differ from that of the unchanged run. A section that several commands share is tried once, in the code that they
share; that a command hands on its own section is looked for in each of them. Nothing is left out: a key without a case
fails here.
"""

import asyncio
import dataclasses
import hashlib
import importlib
import io
import json
import operator
import shutil
import sys
import types
import typing
from collections import Counter
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
import rl_run
import torch
from accelerate import Accelerator
from torch import distributed, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hba import open_atlas
from hba.batch import encode, loader
from hba.batch.config import LoaderConfig, PrepareConfig
from hba.batch.encode import Encoder
from hba.config import load_config
from hba.embedding import Embedder
from hba.errors import HbaError
from hba.evaluate.backends import vllm, wire
from hba.evaluate.backends.interface import open_backend
from hba.evaluate.config import PredictConfig
from hba.evaluate.judge.items import Item
from hba.evaluate.judge.run import JudgeConfig, judge_items
from hba.evaluate.predict import EVERYTHING, open_rows
from hba.model.checkpoint import load_processor, resolve
from hba.model.process import start_accelerator
from hba.model.weights import language_layers
from hba.remote import ChatRequest, RemoteClient, ServiceError
from hba.rl import local, rollout
from hba.rl.config import RlConfig
from hba.rl.rewards import Scorer
from hba.rl.server import ServerSampler, require_small_gap, served_folder
from hba.rl.verl import launch
from hba.rl.verl.config import Place, translate
from hba.run import RunFolder
from hba.storage import read_json, read_jsonl
from hba.train import features, loop
from hba.train.bam import train_bam
from hba.train.config import BamConfig, LmConfig, QaConfig, SftConfig
from hba.train.lm import train_lm
from hba.train.qa import train_qa
from hba.train.ranks import Ranks, is_sharded
from hba.train.sft import train_sft
from hba.train.state import Progress

sys.path.insert(0, str(Path(__file__).parent.parent))
from media_corpus import movie

COMMANDS = {
    "sft": SftConfig, "lm": LmConfig, "qa": QaConfig, "bam": BamConfig, "rl": RlConfig, "predict": PredictConfig,
    "judge": JudgeConfig, "prepare": PrepareConfig,
}  # fmt: skip
STAGES = {"sft": train_sft, "lm": train_lm, "qa": train_qa, "bam": train_bam}
SMALL = ["train_split=train[:24]", "validation_split=validation[:6]", "train.batch_size=4"]
PIXELS = ["encode.num_frames=2", "encode.max_pixels=3136", "loader.workers=0"]


def leaves(config, prefix=""):
    """The dotted keys of a config class."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        section = next(
            (t for t in (hints[field.name], *typing.get_args(hints[field.name])) if dataclasses.is_dataclass(t)), None
        )
        yield from [prefix + field.name] if section is None else leaves(section, f"{prefix}{field.name}.")


def digest(value):
    """What is equal for equal values, tensors by their bytes."""
    if isinstance(value, torch.Tensor):
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        raw = whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(f"{tuple(value.shape)} {value.dtype}".encode() + raw).hexdigest()
    if isinstance(value, typing.Mapping):
        return {str(name): digest(each) for name, each in value.items()}
    return [digest(each) for each in value] if isinstance(value, (list, tuple)) else value


def config_of(command, changes):
    return load_config(COMMANDS[command], None, list(changes))


# --- what can be seen ---


class Words(LlamaForCausalLM):
    """A language model of a few numbers."""

    def say(self):
        """What a policy has, too."""


OF_KEYS = """
def same(responses, **_):
    return [1.0] * len(responses)

def ones(rewards, groups, tasks):
    return [1.0] * len(rewards)
"""


class Lab:
    """A small atlas, a tiny model and a run of stage 1; looks at runs of commands over them, each context once."""

    def __init__(self, folder, mini, backbone, patch):
        self.folder, self.backbone, self.patch, self.count = folder, backbone, patch, 0
        self.atlas, self.known = folder / "atlas", {}
        chosen = {"cremad": 4, "daicwoz": 4, "siq2": 2, "mosei_senti": 4, "mimeqa": 4}
        for split, share in (("train", 1.0), ("validation", 0.5)):
            rows = [json.loads(line) for line in (mini / f"{split}.jsonl").read_text().splitlines()]
            picked = [row for key, number in chosen.items() for row in self.varied(rows, key, int(number * share))]
            for path in {path for row in picked for key in row if isinstance(row[key], list) for path in row[key]}:
                (self.atlas / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(mini / path, self.atlas / path)
            self.write_rows(self.atlas, split, picked)
        # The same with one row that has a medium and no descriptor of it.
        self.lacking = folder / "lacking"
        shutil.copytree(self.atlas, self.lacking)
        rows = [json.loads(line) for line in (self.atlas / "train.jsonl").read_text().splitlines()]
        first = next(row for row in rows if row["dataset"] == "siq2")
        self.write_rows(
            self.lacking, "train", [row if row is not first else row | {"ext_video_feats": []} for row in rows]
        )
        # One row of a clip alone, which has a sound track.
        self.heard = folder / "heard"
        named = next(row for row in rows if row["dataset"] == "cremad") | {"videos": ["clip.mp4"], "audios": []}
        self.write_rows(self.heard, "train", [named | {"modality_signature": "text_video"}])
        (self.heard / "clip.mp4").write_bytes(movie("mp4", "libx264", range(8), rate=8, size=(96, 64), sound="aac"))
        self.reward = rl_run.write_reward(folder)
        self.reward.write_text(self.reward.read_text() + OF_KEYS)
        self.prices = folder / "prices.yaml"
        self.prices.write_text("openai: {m: {input: 1.0, output: 2.0}}\n")
        self.other = folder / "backbone"
        shutil.copytree(backbone, self.other)

    @staticmethod
    def varied(rows, dataset, number):
        """Rows of a dataset, of each answer in turn; texts alone where there are some."""
        own = [row for row in rows if row["dataset"] == dataset]
        own = [row for row in own if row["modality_signature"] == "text"] or own
        answers = [row["answer"] for row in own]
        if dataset == "cremad":  # an answer that is more frequent than the other
            same = [row for row in own if row["answer"] == answers[0]][: number - 1]
            return same + [row for row in own if row["answer"] != answers[0]][:1]
        turns = [answers[:place].count(answer) for place, answer in enumerate(answers)]
        return [own[place] for place in sorted(range(len(own)), key=turns.__getitem__)[:number]]

    @staticmethod
    def write_rows(folder, split, rows):
        folder.mkdir(exist_ok=True)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def new(self):
        self.count += 1
        return self.folder / f"run{self.count}"

    def filled(self, text):
        """A case's words with this lab's places in them."""
        for name in ("atlas", "lacking", "backbone", "other", "reward", "prices", "base"):
            text = text.replace(f"@{name}", str(getattr(self, name, "")))
        return text

    def seen(self, look, context, changes=()):
        """The sights of a look: those of a context alone are looked at once."""
        asked = (look, tuple(context), tuple(changes))
        if asked not in self.known:
            name, *arguments = look.split()
            sights = {"error": ""}
            with self.patch.context() as patch, redirect_stderr(io.StringIO()) as said:
                # The same graphs without kernels, which take minutes to build.
                patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
                try:
                    getattr(self, name)(patch, sights, [*map(self.filled, (*context, *changes))], *arguments)
                except HbaError as error:
                    sights["error"] = str(error)
            self.known[asked] = sights | {"said": said.getvalue()}
        return self.known[asked]

    def noted(self, patch, sights):
        """Which sections reach the code that several commands share, and the samples of every batch."""
        sights["sections"], sights["batches"] = [], []
        handed, plan, media, collate, assemble = (
            sights["sections"], loop.training_plan, encode.load_media, loader.collate, features.assemble,
        )  # fmt: skip

        def planned(columns, lengths, mix, train, *more, **options):
            handed.extend([mix, train])
            return plan(columns, lengths, mix, train, *more, **options)

        def shown(sample, config, *more, **options):
            handed.append(config)
            return media(sample, config, *more, **options)

        def collated(encoded, **options):
            sights["batches"].append([each.sample.id for each in encoded])
            return collate(encoded, **options)

        def assembled(samples, *more):
            sights["batches"].append([sample.id for sample in samples])
            return assemble(samples, *more)

        patch.setattr(loop, "training_plan", planned)
        patch.setattr(encode, "load_media", shown)
        patch.setattr(wire, "load_media", shown)
        patch.setattr(loader, "collate", collated)
        patch.setattr(features, "assemble", assembled)
        patch.setattr(LoaderConfig, "resolved_workers", lambda config: handed.append(config) or 0)

    def stage(self, patch, sights, changes, command):
        """A supervised stage up to its first step: what it gives to the loop, its first batch, loss and validation."""
        self.noted(patch, sights)
        config, run_folder = config_of(command, changes), self.new()
        loaded, load, computed, extract = [], features.OmniSapiens.from_pretrained, [], features.extract

        def ran(model, batch):
            computed.append(len(batch))
            return extract(model, batch)

        def told(*names, **options):
            loaded.append(load(*names, **options))
            return loaded[-1]

        def step(stage, plan, train, ranks, run):
            sights["sections"].append(train)
            model = stage.model
            own = dict(model.named_parameters())
            sights["trained"] = [name for name, parameter in own.items() if parameter.requires_grad]
            sights["weights"] = digest(model.state_dict())
            sights["rates"] = dict(stage.learning_rates)
            built = loop.build_optimizer(model, train, stage.learning_rates)
            sights["peaks"] = sorted({group["peak"] for group in built.param_groups})
            adapters = [part for part in model.modules() if hasattr(part, "spec")]
            sights["modality dropout"] = {part.spec.modality_dropout for part in adapters}
            inside = [part for adapter in adapters for part in adapter.modules()]
            sights["dropout"] = {part.p for part in inside if isinstance(part, nn.Dropout)}
            sights["norms"] = {type(part).__name__ for part in inside}
            sights["hidden"] = {part.mlp[0].out_features for part in inside if hasattr(part, "mlp")}
            sights["scales"] = digest([part.scale for part in inside if hasattr(part, "scale")])
            computed.clear()
            (first,) = [batch for batch in [next(stage.batches(plan.micro_batches, 0))] if len(batch)]
            sights["batch"] = digest(
                {name: value for name, value in vars(first).items() if name not in ("samples", "quarantined")}
            )
            sights["computed"] = list(computed)
            whole = [each for each in [model, *loaded] if hasattr(each, "transformer")]
            if whole:
                self.note_model(sights, whole[0].transformer)
            torch.manual_seed(0)
            sights["loss"] = float(stage.loss(model.train(), first))
            sights["batches"].clear()
            sights["scores"] = stage.validate()
            sights["validated"] = sorted(each for batch in sights["batches"] for each in batch)
            sights["sizes"] = [len(batch) for batch in sights["batches"] if batch]
            return Progress()

        patch.setattr(loop, "run_training", step)
        patch.setattr(features, "extract", ran)
        patch.setattr(features.OmniSapiens, "from_pretrained", told)
        with RunFolder.open(run_folder, config=config, command="train", seed=0) as run:
            STAGES[command](config, run)
        sights["data"] = read_json(run.environment)["data"]
        kept = sorted(Path(config.features.folder).glob("*/*/card.json")) if hasattr(config, "features") else []
        cards = [read_json(path) for path in kept]
        sights["kept"] = {str(path.parents[2]) for path in kept}
        sights["precision"], sights["card sizes"], sights["card bits"] = (
            {card[name] for card in cards} for name in ("precision", "batch_size", "quantization")
        )
        sights["config"] = config

    @staticmethod
    def note_model(sights, model):
        """What a backbone computes in, and what its LoRA layers are."""
        sights["dtypes"] = sorted({str(p.dtype) for p in model.parameters() if not p.requires_grad})
        sights["bits"] = {str(p.dtype) for p in model.parameters() if not p.is_floating_point()}
        sights["attention"] = model.config.get_text_config()._attn_implementation
        layers = [part for part in model.modules() if hasattr(part, "lora_dropout")]
        sights["rank"] = {part.r["default"] for part in layers}
        sights["layers"] = len(layers)
        sights["dora"] = {part.use_dora["default"] for part in layers}
        sights["alpha"] = {part.lora_alpha["default"] for part in layers}
        sights["lora dropout"] = {part.lora_dropout["default"].p for part in layers if part.lora_dropout["default"]}

    def steps(self, patch, sights, changes, processes=""):
        """The loop itself, over a transformer of a few numbers: what supervised stages do with `train` and `mix`."""
        config, folder = config_of("sft", changes), self.new()
        rows = open_atlas(self.atlas, split="train")
        torch.manual_seed(7)
        sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        model = Words(LlamaConfig(**sizes, num_attention_heads=1, num_key_value_heads=1, attention_dropout=0.1))
        sights |= {"parts": [], "saves": []}

        def loss(model, batch):
            sights["parts"].append([sample.id for sample in batch.samples])
            ids_BT = batch.class_index_B.unsqueeze(1).expand(-1, 4) % 32
            return model(input_ids=ids_BT, labels=ids_BT).loss * len(batch)

        def batches(plan, start):
            for part in plan[start:]:
                samples = [rows[int(row)] for row in part]
                made = features.assemble(
                    samples, [features.Feature(torch.zeros(1, 1), None)] * len(part), rows.taxonomy
                )
                yield dataclasses.replace(made, class_index_B=torch.from_numpy(part).clone())

        stage = loop.Stage(
            model=model,
            loss=loss,
            batches=batches,
            validate=lambda: loop.Validation(0.5, {"mean": 0.5}),
            save_model=lambda place: sights["saves"].append(place.name.split(".")[0]),
            learning_rates={},
        )
        if processes:
            distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        try:
            with RunFolder.open(folder, config=config, command="train", seed=0) as run:
                loop.train_stage(stage, config, run, Ranks(start_accelerator("float32")), rows, config.encode)
        finally:
            if processes:
                distributed.destroy_process_group()
        sights["weights"] = digest(model.state_dict())
        sights["log"] = self.log_of(folder)
        sights["recomputed"] = any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
        sights["sharded"], sights["compiled"] = is_sharded(model), self.compiled(model)

    @staticmethod
    def compiled(model):
        return all(hasattr(layer.forward, "func") for layer in language_layers(model).layers)

    @staticmethod
    def log_of(folder):
        timed = ("samples_per_second", "rollout_seconds", "update_seconds")
        log = [line.record for line in read_jsonl(folder / "log.jsonl")]
        return [{key: value for key, value in record.items() if key not in timed} for record in log]

    def encoded(self, patch, sights, changes, place="atlas"):
        """Rows as the model gets them, each with its media."""
        config, rows = config_of("sft", changes), open_atlas(getattr(self, place), split="train")
        rows = rows.filter(datasets=["cremad"])
        encoder = Encoder(self.processor, config.encode, rows.taxonomy, answers=True)
        found = loader.encode_row(rows, encoder, 0)
        sights["error"] = getattr(found, "reason", "")
        if not sights["error"]:
            sights["inputs"] = digest(
                {**vars(loader.collate([found], pad_token_id=0, taxonomy=rows.taxonomy))["inputs"]}
            )
            sights["windows"] = len(found.windows)

    def pooled(self, patch, sights):
        """A folder of caches of this look alone, and a note of what the workers are told."""
        home = self.new()
        patch.setenv("HBA_CACHE", str(home))

        class Pool(loader.WorkerPool):
            def __init__(self, *names, **options):
                sights["pool"] = options
                super().__init__(*names, **options)

        patch.setattr(loader, "WorkerPool", Pool)
        return home

    def prepare(self, patch, sights, changes, place="atlas"):
        """What is kept of decoded media, and where."""
        config, home = config_of("prepare", changes), self.pooled(patch, sights)
        rows = open_atlas(getattr(self, place), split="train").filter(datasets=["cremad"])
        processor = load_processor(str(resolve(config.model) or config.model))
        decoded = loader.prepare(rows, processor, config.encode, config.loader, lambda *_: None)
        sights["left out"] = [record.reason for record in rows.quarantine]
        sights["kept"] = sorted(
            hashlib.sha256(f.read_bytes()).hexdigest() for f in decoded.folder.rglob("*") if f.is_file()
        )
        sights["folder"] = str(decoded.folder).replace(str(home), "")

    def loaded(self, patch, sights, changes):
        """What decodes ahead, and how often a row that a plan repeats is encoded."""
        config, rows = config_of("sft", changes), open_atlas(self.atlas, split="train")
        plan = [torch.tensor([0, 1]).numpy()] * 2
        counted, home = Counter(), self.pooled(patch, sights)

        def encoded(atlas, encoder, row, encode_row=loader.encode_row):
            counted[row] += 1
            return encode_row(atlas, encoder, row)

        patch.setattr(loader, "encode_row", encoded)
        encoder = Encoder(self.processor, config.encode, rows.taxonomy)
        list(loader.load_batches(rows, encoder, plan, config.loader))
        sights["encoded"] = counted
        sights["kept"] = sorted(path.name for path in home.rglob("*") if path.is_file())

    def rl(self, patch, sights, changes, served=""):
        """A run of the local engine; `served`: with the settings of a server, for which the policy itself answers."""
        config, folder = config_of("rl", changes), self.new()
        sights |= {
            "drawn": [],
            "parts": [],
            "saves": [],
            "sections": [],
            "asked": [],
            "clipped": set(),
            "draws": set(),
            "rows": [],
        }
        sights |= {"temperatures": set(), "longest": set(), "sizes": set(), "tokens": {}}
        optimizer, saved, plan, update = local.build_optimizer, local.save_state, loop.training_plan, local.update
        handed = sights["sections"]

        class Sampler(rollout.PolicySampler):
            def draw(self, prompts, draws):
                sights["drawn"].append(draws.name)
                sights["draws"].add(draws.per_row)
                sights["temperatures"].add(draws.temperature)
                sights["longest"].add(draws.max_new_tokens)
                for batch in (each.batch for each in prompts if len(each)):
                    if draws.name.endswith("evaluation"):
                        sights["sizes"].add(len(batch))
                        continue
                    sights["asked"] += [sample.id for sample in batch.samples]
                    shown_BT = batch.inputs["attention_mask"].bool()
                    for sample, ids_T, shown_T in zip(batch.samples, batch.inputs["input_ids"], shown_BT, strict=True):
                        sights["tokens"][sample.id] = ids_T[shown_T].tolist()
                return super().draw(prompts, draws)

        def optimized(model, train, rates):
            made = optimizer(model, train, rates)
            sights["groups"] = [{k: v for k, v in group.items() if k != "params"} for group in made.param_groups]
            sights["trained"] = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
            self.note_model(sights, model.transformer)
            return made

        def shown(sample, config, *more, media=encode.load_media, **options):
            handed.append(config)
            return media(sample, config, *more, **options)

        def clipped(accelerator, parameters, norm, *more, clip=Accelerator.clip_grad_norm_):
            sights["clipped"].add(norm)
            return clip(accelerator, parameters, norm, *more)

        def planned(columns, lengths, mix, train, *more, **options):
            handed.extend([mix, train])
            return plan(columns, lengths, mix, train, *more, **options)

        def updated(setup, pieces, everyone, rate):
            sights["parts"].append([len(piece) for piece in pieces])
            sights["rows"].append([sum(len(part) for part in piece if part is not None) for piece in pieces])
            sights["recomputed"] = any(
                getattr(part, "gradient_checkpointing", False) for part in setup.policy.modules()
            )
            sights["sharded"] = is_sharded(setup.policy)
            sights["compiled"] = self.compiled(setup.policy.transformer)
            return update(setup, pieces, everyone, rate)

        def saves(place, progress, *more):
            sights["saves"].append(progress.step)
            return saved(place, progress, *more)

        patch.setattr(local, "build_optimizer", optimized)
        patch.setattr(local, "save_state", saves)
        patch.setattr(local, "update", updated)
        patch.setattr("hba.rl.prompts.training_plan", planned)
        patch.setattr(encode, "load_media", shown)
        patch.setattr(Accelerator, "clip_grad_norm_", clipped)
        patch.setattr(LoaderConfig, "resolved_workers", lambda config: handed.append(config) or 0)

        def sampler(config, policy, encoder, ranks, place):
            if served == "served":
                ServerSampler(config, policy, encoder, ranks, place).close()
            return Sampler(policy)

        def weighed(*lengths, weights=local.token_weights, **how):
            sights["weighed"] = how
            return weights(*lengths, **how)

        self.remotes(patch, handed)
        patch.setattr(local, "token_weights", weighed)
        patch.setattr(local, "build_sampler", sampler)
        if served == "sharded":
            distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        try:
            with RunFolder.open(folder, config=config, command="train rl", seed=0) as run:
                local.train_rl(config, run)
        finally:
            if served == "sharded":
                distributed.destroy_process_group()
            if (folder / "log.jsonl").is_file():
                sights["log"] = self.log_of(folder)
                sights["lines"] = [(line["step"], line["kind"]) for line in sights["log"]]
        sights["data"], sights["config"] = read_json(folder / "environment.json")["data"], config
        table = Counter((line.record["step"], line.record["group"]) for line in read_jsonl(folder / "rollouts.jsonl"))
        sights["tabled"], sights["responses"] = {step for step, _ in table}, set(table.values())
        sights["prompts"] = {step: sum(step == each for each, _ in table) for step, _ in table}
        sights["evaluated"] = [
            [line.record["id"] for line in read_jsonl(path)] for path in sorted((folder / "evaluations").iterdir())
        ]

    def scored(self, patch, sights, changes):
        """Rewards of a few responses."""
        config, rows = (
            config_of("rl", changes),
            open_atlas(self.atlas, split="train").filter(datasets=["cremad", "siq2"]),
        )
        samples = [rows[0], rows[len(rows) - 1], rows[0]]

        def alike(embedder, texts, others):
            sights["embedder"] = embedder.name
            return np.full(len(texts), 0.25)

        patch.setattr(Embedder, "similarity", alike)
        said = [
            f"<think>x</think> \\boxed{{{samples[0].target}}}",
            f"<think>x</think> \\boxed{{{samples[1].target}}}",
            "<think>x</think> \\boxed{joyful}",
        ]
        sights["rewards"] = Scorer(config.reward)(said, samples, [5, 750, 2000])

    def gap(self, patch, sights, changes):
        require_small_gap([0.5], config_of("rl", changes))

    def handed_over(self, patch, sights, changes):
        config = config_of("rl", changes)
        sights["folder"] = served_folder(self.folder, config.rollout.weights)

    def verl(self, patch, sights, changes):
        """verl's keys and the command that starts it."""
        config, place = config_of("rl", changes), Place(self.folder / "verl-run", "m", 4)
        sights["keys"] = translate(config, place)

        def popen(command, **options):
            sights["command"] = command, options["env"]["VERL_USE_EXTERNAL_MODULES"]
            raise HbaError("started")

        place.folder.mkdir(parents=True, exist_ok=True)
        patch.setattr(launch.subprocess, "Popen", popen)
        launch._run(config, place, lambda *_: None, lambda _: None)

    @staticmethod
    def remotes(patch, handed):
        made = RemoteClient.__init__

        def noted(client, model, remote, *more):
            handed.append(remote)
            made(client, model, remote, *more)

        patch.setattr(RemoteClient, "__init__", noted)

    @staticmethod
    def network(patch, sights, answer):
        """Let `answer(request, number)` take the place of the network."""
        sights |= {"sent": [], "waits": [], "most": 0}
        active = 0

        async def handled(self, request):
            nonlocal active
            if request.method == "GET":
                return httpx.Response(404)
            sights["sent"].append((str(request.url), request.headers.get("authorization"), request.read().decode()))
            sights["timeouts"] = request.extensions["timeout"]
            active += 1
            sights["most"] = max(active, sights["most"])
            for _ in range(100):  # rounds of the loop, in which the others come as far
                await sleep(0)
            active -= 1
            return answer(request, len(sights["sent"]))

        sleep = asyncio.sleep

        async def waited(seconds):
            sights["waits"].append(seconds)
            await sleep(0)

        patch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", handled)
        patch.setattr("hba.remote.client.asyncio.sleep", waited)
        patch.setattr("hba.remote.client.random.uniform", lambda low, high: high)
        patch.setenv("KEY_OF_KEYS", "secret")

    def client(self, patch, sights, changes, faults=""):
        """Eight requests of one client, to a service that fails as `faults` says."""
        config = config_of("judge", changes).remote

        def answer(request, number):
            if faults == "refused":
                return httpx.Response(400, json={"error": {"message": "no"}})
            if faults == "away" or (faults == "paused" and number == 1):
                return httpx.Response(503, headers={"retry-after": "0.05"} if faults == "paused" else {})
            said = {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}
            return httpx.Response(200, json=said | {"usage": {"prompt_tokens": 3, "completion_tokens": 4}})

        async def ask():
            async with RemoteClient("m", config) as client:
                requests = [
                    ChatRequest(messages=[{"role": "user", "content": str(i)}], max_tokens=9)
                    for i in (0, 1, 2, 3, 4, 5, 6, 6)
                ]
                if faults != "refused":
                    await client.complete(requests[0])
                asked = await asyncio.gather(
                    *(client.complete(each) for each in requests[1:-1]), return_exceptions=True
                )
                for failed in [each for each in asked if isinstance(each, ServiceError)] or asked:
                    if isinstance(failed, Exception):
                        raise failed
                await client.complete(requests[-1])
                sights["cost"] = client.meter.record()

        self.network(patch, sights, answer)
        asyncio.run(ask())

    def judge(self, patch, sights, changes):
        """One answer to judge, by a judge that says nothing of use."""
        config = config_of("judge", changes)
        sights["sections"], sights["config"] = [], config
        self.remotes(patch, sights["sections"])
        said = {"choices": [{"message": {"content": "hm"}, "finish_reason": "stop"}]}
        self.network(patch, sights, lambda request, number: httpx.Response(200, json=said))
        item = Item(id="test/1", dataset="siq2", task="SOC", question="What?", reference="x", answer="y")
        judge_items([item], self.new(), model="m", config=config, progress=lambda tally: None)

    def predict(self, patch, sights, changes, backend, model="m"):
        """A backend over a few rows: what it asks, or what it computes with."""
        self.noted(patch, sights)
        config, handed = config_of("predict", changes), sights["sections"]
        sights["config"] = config
        opening = open_rows(
            self.filled(model),
            str(self.atlas),
            split="train[:12]",
            config=config,
            backend=backend,
            selection=EVERYTHING,
        )
        self.remotes(patch, handed)

        class Engine:
            def __init__(self, **options):
                sights["engine"] = options
                raise HbaError("started")

        patch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=Engine, SamplingParams=dict))
        patch.setitem(sys.modules, "vllm.lora", types.SimpleNamespace())
        patch.setitem(sys.modules, "vllm.lora.request", types.SimpleNamespace(LoRARequest=None))
        patch.setattr(vllm, "served", lambda name, **_: vllm.Served(name))
        said = {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}
        self.network(patch, sights, lambda request, number: httpx.Response(200, json=said))
        opened = open_backend(backend, opening)
        batches = opened.batches(opening.atlas, torch.arange(len(opening.atlas)).numpy())
        sights["sizes"] = list(map(len, batches))
        if backend in ("heads", "hf"):
            transformer = opened.model.transformer
            sights["dtypes"] = sorted({str(p.dtype) for p in transformer.parameters() if p.is_floating_point()})
            sights["bits"] = {str(p.dtype) for p in transformer.parameters() if not p.is_floating_point()}
            sights["attention"] = transformer.config.get_text_config()._attn_implementation
            batches = batches[:1]
        elif backend == "openai":
            batches = batches[-6:-4]
        sights["answers"] = [
            result.output.text for result in opened.answers(opening.atlas, batches, set()) if hasattr(result, "output")
        ]


@pytest.fixture(scope="module")
def lab(tmp_path_factory, mini_atlas, backbone):
    with pytest.MonkeyPatch.context() as patch:
        made = Lab(tmp_path_factory.mktemp("lab"), mini_atlas, backbone, patch)
        config = config_of(
            "sft", [f"atlas={made.atlas}", f"model.name={backbone}", "train.max_steps=1", *PIXELS, "train.batch_size=4"]
        )
        made.base = made.folder / "base"
        with RunFolder.open(made.base, config=config, command="train sft", seed=0) as run:
            train_sft(config, run)
        made.processor = features.checkpoint.load_processor(made.base / "checkpoints" / "step_1")
        yield made


# --- the keys ---

STEPS = [
    "atlas=@atlas",
    "model.name=x",
    "train.batch_size=4",
    "train.epochs=1",
    "train.validate_every=4",
    "train.log_every=1",
    "train.learning_rate=0.01",
]
STAGE = ["train.batch_size=4", "train.max_steps=2"]
SFT = ["atlas=@atlas", "model.name=@backbone", *PIXELS, *STAGE]
LATER = ["atlas=@atlas", "base=@base", "features.loader.workers=0", "features.folder=@base/../features", *STAGE]
WHOLE = "{cremad: 1, daicwoz: 2, siq2: 1, mosei_senti: 1, mimeqa: 1}"
MODEL = {
    "model.dtype=bfloat16": "dtypes", "model.attention=eager": "attention", "model.lora_r=2": "rank",
    "model.lora_alpha=3": "alpha", "model.lora_dropout=0.5": "lora dropout", "model.quantization=nf4": "bits",
    "model.lora_targets=[q_proj,0.mlp.*]": "layers", "model.lora_rank_pattern={q_proj: 5}": "rank",
}  # fmt: skip
SHARED = [  # look, context, changes: the sight of each
    *(
        ("steps", STEPS, {change: sight})
        for change, sight in {
            "train.epochs=2": "log", "train.max_steps=3": "log", "train.batch_size=3": "parts",
            "train.accumulation=2": "log", "train.device_batch_size=2": "parts", "train.device_tokens=700": "parts",
            "train.activation_checkpointing=true": "recomputed", "train.compile=true": "compiled",
            "train.learning_rate=0.02": "weights",
            "train.warmup_share=0.9": "weights", "train.final_share=0.9": "weights",
            "train.schedule=constant": "weights", "train.warmup_steps=3": "weights",
            "train.weight_decay=0.5": "weights", "train.optimizer=adamw8bit": "weights",
            "train.beta1=0.5": "weights", "train.beta2=0.5": "weights", "train.max_grad_norm=0.01": "weights",
            "train.validate_every=2": "log", "train.save_every=1": "saves", "train.log_every=2": "log",
            "train.seed=1": "parts", "train.wandb_project=x": "error", "mix.temperature=3": "parts",
            f"mix.weights={WHOLE}": "parts", "mix.class_balanced=true": "parts", "mix.epoch_size=8": "parts",
            "mix.subsample=0.5": "parts",
        }.items()
    ),
    ("stage sft", SFT, {"train.kernels=liger": "error"}),
    ("steps processes", STEPS, {"train.sharding=full": "sharded"}),
    ("steps", [*STEPS, "train.validate_every=1"], {"train.early_stopping=1": "log"}),
    ("steps", [*STEPS, "model.strategy=full", "answer_weight=1"], {"train.lm_head_learning_rate=0.5": "weights"}),
    ("stage sft", SFT, {"train.head_learning_rate=0.5": "peaks", "train.lora_learning_rate=0.25": "peaks"}),
    *(
        ("encoded", SFT, {change: sight})
        for change, sight in {
            "encode.num_frames=4": "inputs", "encode.frames=nearest_keyframe": "inputs",
            "encode.max_audio_seconds=0.3": "error", "encode.max_tokens=3": "error",
            "encode.modalities=[video]": "inputs", "encode.system_prompt=Hello": "inputs",
        }.items()
    ),
    ("encoded", [*SFT, "encode.min_pixels=784"], {"encode.max_pixels=784": "inputs"}),
    ("encoded", [*SFT, "encode.max_pixels=12544"], {"encode.min_pixels=12544": "inputs"}),
    ("encoded", [*SFT, "encode.max_audio_seconds=0.3"], {"encode.long_audio=head": "inputs"}),
    ("encoded", [*SFT, "encode.num_frames=8"], {"encode.fps=1": "inputs"}),
    ("encoded", [*SFT, "encode.min_pixels=784"], {"encode.clip_pixels=1568": "inputs"}),
    ("encoded heard", SFT, {"encode.sound_of_clips=separate": "inputs"}),
    ("encoded heard", [*SFT, "encode.sound_of_clips=separate"], {"encode.sound_of_clips=interleaved": "inputs"}),
    ("loaded", SFT, {"loader.cache_megabytes=0": "encoded"}),
    ("loaded", SFT, {"loader.decode_once=true": "kept"}),
    ("loaded", [*SFT, "loader.decode_once=true"], {"loader.decoded_folder=@base/../decoded": "kept"}),
    ("loaded", [*SFT, "loader.decode_once=true"], {"loader.decoded_gigabytes=1e-6": "kept"}),
    ("loaded", [*SFT, "loader.workers=1"], {"loader.workers=2": "pool"}),
    ("loaded", [*SFT, "loader.workers=1"], {"loader.prefetch_megabytes=7": "pool"}),
    ("loaded", [*SFT, "loader.workers=1"], {"loader.decode_timeout_seconds=7": "pool"}),
]  # fmt: skip
PREPARE = ["model=@backbone", "encode.num_frames=2", "loader.workers=0"]
# What changes nothing in a command, and why it is a key of it.
EXCEPTIONS = {
    "rl": {"model.lora_dropout": "dropout is off: probabilities of the update are those of the sampling"},
    "prepare": {
        "encode.max_tokens": "prompts are not built; the section is that of the runs that it decodes for",
        "encode.system_prompt": "prompts are not built",
        "loader.cache_megabytes": "nothing is read twice",
        "loader.decode_once": "this is what the command does",
    },
}
ASKED = ["remote.base_url=http://here/v1", "encode.num_frames=2"]
JUDGE = ["remote.base_url=http://here/v1", "remote.first_backoff_seconds=0.5"]
SHARED += [
    ("client", JUDGE, {"remote.provider=anthropic": "sent"}),
    ("client", JUDGE, {"remote.base_url=http://there/v1": "sent"}),
    ("client", JUDGE, {"remote.api_key_env=KEY_OF_KEYS": "sent"}),
    ("client", JUDGE, {"remote.max_concurrency=1": "most"}),
    ("client", JUDGE, {"remote.timeout_seconds=7": "timeouts"}),
    ("client", JUDGE, {"remote.cache=@base/../replies": "sent"}),
    ("client", JUDGE, {"remote.prices=@prices": "cost"}),
    ("client away", JUDGE, {"remote.max_attempts=2": "error"}),
    ("client away", JUDGE, {"remote.first_backoff_seconds=0.25": "waits"}),
    ("client away", JUDGE, {"remote.longest_backoff_seconds=0.75": "waits"}),
    ("client paused", JUDGE, {"remote.longest_wait_seconds=0.01": "error"}),
    ("client refused", JUDGE, {"remote.stop_after=2": "error"}),
]
RL = [
    "atlas=@atlas", "model.name=@backbone", "reward.function=@reward:letters", "model.strategy=full", *PIXELS,
    "encode.modalities=[]", "train.epochs=1", "train.batch_size=2", "train.max_steps=2", "train.validate_every=2",
    "train.learning_rate=1e-3", "rollout.per_prompt=2", "rollout.max_new_tokens=4", "validation_rows=2",
    "table_every=9", "datasets=[cremad,siq2]",
]  # fmt: skip
MIXED = [*RL, "train.max_steps=null"]
LORA = [*RL, "model.strategy=lora"]
SERVED = [*RL, "rollout.sampler=server", "remote.base_url=http://here/v1"]
VERL = ["atlas=x", "model.name=m", "model.strategy=full"]
RL_REWARD = ["atlas=@atlas", "model.name=x"]
RL_CASES = [
    ("rl", RL, {"atlas=@lacking": "data"}),
    ("rl", RL, {"model.name=/nowhere/at/all": "error"}),
    (
        "rl",
        RL,
        {
            "train.learning_rate=2e-3": "groups",
            "train.max_grad_norm=0.5": "clipped",
            "train.save_every=1": "saves",
            "train.device_batch_size=1": "parts",
            "train.device_tokens=400": "parts",
            "train.activation_checkpointing=true": "recomputed",
            "validation_draws=2": "draws",
            "table_every=1": "tabled",
        },
    ),
    (
        "rl",
        RL,
        {
            "train.weight_decay=0.5": "groups",
            "rollout.temperature=0.5": "temperatures",
            "validation_rows=3": "evaluated",
            "format=boxed": "tokens",
            "train.log_every=2": "lines",
            "freeze_towers=false": "trained",
        },
    ),
    (
        "rl",
        RL,
        {
            "train.beta1=0.5": "groups",
            "train.accumulation=2": "parts",
            "rollout.per_prompt=3": "responses",
            "validation_split=validation[40%:]": "evaluated",
            "train_split=train[:50%]": "data",
        },
    ),
    (
        "rl",
        RL,
        {
            "train.beta2=0.5": "groups",
            "train.batch_size=3": "rows",
            "rollout.max_new_tokens=3": "longest",
            "model.attention=eager": "attention",
        },
    ),
    ("rl", [*RL, "table_every=1"], {"table_prompts=1": "prompts"}),
    ("rl", RL, {"train.seed=1": "asked"}),
    ("rl", RL, {"train.optimizer=adamw8bit": "groups"}),
    ("rl", RL, {"datasets=[cremad]": "data"}),
    ("rl", RL, {"train.max_steps=3": "saves", "validation_batch_size=1": "sizes"}),
    ("rl", RL, {"train.validate_every=1": "saves"}),
    ("rl", [*RL, "train.max_steps=null", "train_split=train[:4]"], {"train.epochs=2": "saves"}),
    ("rl", RL, {"train.warmup_share=0.9": "log"}),
    ("rl", RL, {"train.head_learning_rate=0.1": "error", "train.lm_head_learning_rate=0.1": "error"}),
    ("rl", RL, {"train.compile=true": "compiled"}),
    ("rl", RL, {"train.kernels=liger": "error"}),
    ("rl", [*RL, "train.warmup_share=0.9"], {"train.warmup_steps=0": "log"}),
    ("rl", [*RL, "train.max_steps=3"], {"train.schedule=constant": "log"}),
    ("rl", [*RL, "train.max_steps=3", "train.validate_every=1"], {"train.early_stopping=1": "saves"}),
    ("rl", LORA, {"train.lora_learning_rate=2e-3": "groups"}),
    ("rl", [*RL, "train.max_steps=3"], {"train.final_share=0.9": "log"}),
    ("rl", RL, {"train.wandb_project=x": "error"}),
    ("rl sharded", RL, {"train.sharding=full": "sharded"}),
    ("rl", LORA, {"model.strategy=full": "trained"}),
    ("rl", LORA, {"model.dtype=bfloat16": "dtypes", "model.lora_r=2": "rank", "model.lora_alpha=3": "alpha"}),
    ("rl", LORA, {"model.quantization=nf4": "bits", "model.lora_targets=[q_proj]": "layers"}),
    ("rl", LORA, {"model.lora_rank_pattern={q_proj: 5}": "rank", "model.lora_dora=true": "dora"}),
    ("rl", MIXED, {"mix.temperature=3": "asked"}),
    ("rl", MIXED, {"mix.weights={cremad: 1, siq2: 2}": "asked"}),
    ("rl", [*MIXED, "mix.epoch_size=10"], {"mix.class_balanced=true": "asked"}),
    ("rl", MIXED, {"mix.epoch_size=3": "asked"}),
    ("rl", MIXED, {"mix.subsample=0.5": "asked"}),
    ("rl", RL, {"algorithm=dr_grpo": "log"}),
    ("rl", [*RL, "algorithm=harpo", "rollout.per_prompt=1"], {"published_harpo=true": "log"}),
    ("rl", [*RL, "algorithm=dapo", "reward.function=@reward:same"], {"max_extra_batches=1": "drawn"}),
    ("rl", RL, {"loss.average=token": "weighed"}),
    ("rl", [*RL, "train.accumulation=2", "loss.updates=2", "train.learning_rate=0.1"], {"loss.clip_low=0": "log"}),
    ("rl", [*RL, "train.accumulation=2", "loss.updates=2", "train.learning_rate=0.1"], {"loss.clip_high=0": "log"}),
    ("rl", [*RL, "train.accumulation=2"], {"loss.updates=2": "log"}),
    ("rl", RL, {"loss.kl_weight=0.5": "log"}),
    ("rl", [*RL, "loss.kl_weight=0.5", "train.max_steps=3", "train.learning_rate=0.1"], {"loss.kl=k1": "log"}),
    ("rl", RL, {"loss.advantage=@reward:ones": "log"}),
    ("rl served", SERVED, {"loss.importance_cap=1.5": "log"}),
    ("rl", RL, {"rollout.sampler=server": "error"}),
    ("gap", RL, {"rollout.max_gap=0.9": "error"}),
    ("handed_over", RL, {"rollout.weights=@base": "folder"}),
]
RL_CASES += [
    ("verl", VERL, {change: "keys"})
    for change in (
        "verl.nodes=2", "verl.gpus_per_node=2", "verl.rollout=x", "verl.tensor_parallel=2",
        "verl.gpu_memory_utilization=0.3", "verl.agent_workers=2", "verl.reward_workers=2", "verl.offload=true",
    )
]  # fmt: skip
RL_CASES += [
    ("scored", RL_REWARD, {change: "rewards"})
    for change in (
        "reward.function=grpo", "reward.published=true", "reward.synonyms=false", "reward.max_response_tokens=790",
        "reward.overlong_buffer_tokens=20", "reward.overlong_weight=0.1",
    )
]  # fmt: skip
RL_CASES += [("scored", RL_REWARD, {"reward.embedder=/nowhere": "error"})]
RL_CASES += [("verl", VERL, {change: "command"}) for change in ("verl.modules=[x]", "verl.overrides=[a=1]")]
OWN = {
    "sft": [
        ("stage sft", SFT, {"atlas=@lacking": "data"}),
        ("stage sft", SFT, {"model.name=/nowhere/at/all": "error"}),
        ("stage sft", SFT, {**MODEL, "validation_split=validation[:50%]": "validated"}),
        ("stage sft", SFT, {"model.strategy=heads": "trained", "datasets=[cremad]": "data"}),
        ("stage sft", SFT, {"train_split=train[:50%]": "data", "model.lora_dora=true": "dora"}),
        ("stage sft", SFT, {"validation_batch_size=2": "sizes"}),
        ("stage sft", SFT, {"answer_weight=1": "loss"}),
    ],
    "lm": [
        ("stage lm", SFT, {"atlas=@lacking": "data"}),
        ("stage lm", SFT, {"model.name=/nowhere/at/all": "error"}),
        (
            "stage lm",
            SFT,
            {
                **MODEL,
                "train_split=train[:50%]": "data",
                "validation_split=validation[:50%]": "validated",
            },
        ),
        ("stage lm", SFT, {"model.strategy=full": "trained", "datasets=[cremad]": "data"}),
        (
            "stage lm",
            SFT,
            {"formats=[boxed]": "batch", "validation_batch_size=2": "sizes", "model.lora_dora=true": "dora"},
        ),
        ("stage lm", [*SFT, "formats=[think]"], {"reasoning=Because.": "error"}),
    ],
    "qa": [
        ("stage qa", LATER, {"atlas=@lacking": "data"}),
        ("stage qa", LATER, {"base=/nowhere/at/all": "error"}),
        (
            "stage qa",
            LATER,
            {
                "train_split=train[:60%]": "data",
                "validation_split=validation[:60%]": "validated",
                "dtype=bfloat16": "precision",
                "features.folder=@base/../features-own": "kept",
            },
        ),
        (
            "stage qa",
            LATER,
            {"datasets=[siq2]": "data", "features.batch_size=2": "card sizes", "quantization=nf4": "card bits"},
        ),
        ("stage qa", [*LATER, "features.cache=false"], {"attention=eager": "attention"}),
        ("stage qa", LATER, {"features.cache=false": "computed"}),
    ],
    "bam": [
        ("stage bam", LATER, {"atlas=@lacking": "error"}),
        ("stage bam", LATER, {"base=/nowhere/at/all": "error"}),
        (
            "stage bam",
            LATER,
            {
                "stage=adapters+heads": "trained",
                "adapter_learning_rate=0.5": "rates",
                "hidden=3": "hidden",
                "dropout=0.7": "dropout",
                "modality_dropout=0.7": "modality dropout",
                "standardise=false": "scales",
                "validation_split=validation[:40%]": "validated",
            },
        ),
        (
            "stage bam",
            LATER,
            {
                "layer_norm=true": "norms",
                "train_split=train[:40%]": "data",
                "dtype=bfloat16": "precision",
                "features.folder=@base/../features-bam": "kept",
            },
        ),
        (
            "stage bam",
            LATER,
            {"datasets=[siq2]": "data", "features.batch_size=2": "card sizes", "quantization=nf4": "card bits"},
        ),
        (
            "stage bam",
            LATER,
            {"descriptors.mode=mean": "batch"},
        ),
        ("stage bam", [*LATER, "features.cache=false"], {"attention=eager": "attention"}),
        ("stage bam", LATER, {"features.cache=false": "computed"}),
        ("stage bam", LATER, {"descriptors.norm=l2": "batch"}),
        ("stage bam", LATER, {"descriptors.confidence=false": "batch"}),
        ("stage bam", [*LATER, "descriptors.mode=meanstdp25p75"], {"descriptors.published=true": "batch"}),
        ("stage bam", [*LATER, "atlas=@lacking"], {"descriptors.allow_missing=true": "error"}),
    ],
    "rl": RL_CASES,
    "predict": [
        *(
            ("predict openai", ASKED, {change: "sent"})
            for change in (
                "generation.format=plain",
                "generation.temperature=0.5",
                "generation.max_tokens=7",
                "generation.read=likelihood",
                "generation.extra={k: 1}",
                "video=file",
            )
        ),
        ("predict openai", [*ASKED, "generation.temperature=0.5"], {"generation.top_p=0.5": "sent"}),
        ("predict openai", [*ASKED, "generation.temperature=0.5"], {"generation.seed=3": "sent"}),
        ("predict openai", ASKED, {"generation.constrain=labels": "sent"}),
        ("predict openai", [*ASKED, "generation.constrain=labels"], {"generation.constrain_by=grammar": "sent"}),
        (
            "predict heads @base",
            ["loader.workers=0"],
            {
                "batch_size=3": "sizes",
                "dtype=bfloat16": "dtypes",
                "attention=eager": "attention",
                "quantization=nf4": "bits",
            },
        ),
        ("predict openai", ASKED, {"remote.provider=anthropic": "error"}),
        ("predict majority", [], {"fit_split=validation": "answers"}),
        *(
            ("predict vllm @backbone", [], {change: "engine"})
            for change in ("vllm.tensor_parallel_size=2", "vllm.gpu_memory_utilization=0.4", "vllm.max_model_len=99")
        ),
    ],
    "prepare": [
        ("prepare", PREPARE, {"model=/nowhere/at/all": "error"}),
        ("prepare", PREPARE, {"loader.decoded_gigabytes=1e-6": "error"}),
        *(
            ("prepare", PREPARE, {change: "kept"})
            for change in (
                "encode.num_frames=4",
                "encode.frames=nearest_keyframe",
                "encode.modalities=[audio]",
                "encode.min_pixels=12544",
                "encode.max_audio_seconds=0.3",
            )
        ),
        ("prepare", [*PREPARE, "encode.num_frames=8"], {"encode.fps=1": "kept"}),
        ("prepare", PREPARE, {"encode.clip_pixels=6272": "kept"}),
        ("prepare heard", PREPARE, {"encode.sound_of_clips=separate": "kept"}),
        ("prepare", [*PREPARE, "encode.min_pixels=784"], {"encode.max_pixels=784": "kept"}),
        ("prepare", [*PREPARE, "encode.max_audio_seconds=0.3"], {"encode.long_audio=head": "kept"}),
        ("prepare", PREPARE, {"loader.decoded_folder=@base/../prepared": "folder"}),
        ("prepare", PREPARE, {"loader.workers=1": "pool"}),
        ("prepare", [*PREPARE, "loader.workers=1"], {"loader.prefetch_megabytes=7": "pool"}),
        ("prepare", [*PREPARE, "loader.workers=1"], {"loader.decode_timeout_seconds=7": "pool"}),
    ],
    "judge": [
        ("judge", JUDGE, {change: "sent"})
        for change in ("max_tokens=77", "temperature=0.5", "attempts=2", "structured=false", "extra={k: 1}")
    ],
}


ON_THE_WAY = {"error", "sent", "engine", "command"}  # what is seen although the run then ends


def named(change):
    return change.partition("=")[0]


@pytest.mark.parametrize(
    ("look", "context", "changes"),
    [*SHARED, *(case for cases in OWN.values() for case in cases)],
    ids=lambda value: "-".join(map(named, value)) if isinstance(value, dict) else "",
)
def test_a_changed_key_changes_what_is_seen(lab, look, context, changes):
    before, after = lab.seen(look, context), lab.seen(look, context, changes)
    assert not after["error"] or before["error"] or ON_THE_WAY & set(changes.values())
    assert [key for key, sight in changes.items() if before.get(sight) == after[sight]] == []


# A command that hands its own section on to the code that `SHARED` looks at, and the look that shows it.
HANDED = {
    "sft": ("stage sft", SFT, ("train", "mix", "encode", "loader")),
    "lm": ("stage lm", SFT, ("train", "mix", "encode", "loader")),
    "qa": ("stage qa", [*LATER, "features.folder=@base/../features-handed"], ("train", "mix", "features.loader")),
    "bam": ("stage bam", [*LATER, "features.folder=@base/../features-handed-bam"], ("train", "mix", "features.loader")),
    "rl": ("rl served", SERVED, ("encode", "loader", "remote")),
    "predict": ("predict openai", ASKED, ("encode", "remote")),
    "judge": ("judge", JUDGE, ("remote",)),
    "prepare": ("prepare", PREPARE, ()),
}
HANDED_BY_HEADS = ("predict heads @base", ["loader.workers=0"], ("loader",))


@pytest.mark.parametrize("case", [*HANDED.values(), HANDED_BY_HEADS], ids=lambda case: case[0])
def test_the_section_of_a_command_reaches_the_code_that_is_shared(lab, case):
    look, context, sections = case
    sights = lab.seen(look, context)
    for section in sections:
        own = operator.attrgetter(section)(sights["config"])
        # A backend that is named by an option writes its name into a copy.
        assert any(each is own or (section == "remote" and each == own) for each in sights["sections"]), section


def test_every_config_is_that_of_a_command():
    todo, reached = list(COMMANDS.values()), set()
    while todo:
        config = todo.pop()
        reached.add(config)
        hints = typing.get_type_hints(config).values()
        todo += [t for hint in hints for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)]
    root = Path(loop.__file__).parents[2]
    files = [path.relative_to(root) for path in root.rglob("*.py") if " = option(" in path.read_text(encoding="utf-8")]
    modules = [importlib.import_module(".".join(path.with_suffix("").parts)) for path in files]
    made = {each for module in modules for each in vars(module).values() if dataclasses.is_dataclass(each)}
    assert {each for each in made if any("doc" in field.metadata for field in dataclasses.fields(each))} <= reached


@pytest.mark.parametrize("command", COMMANDS)
def test_every_key_of_every_command_has_been_changed(command):
    cases, sections = OWN[command], list(HANDED[command][2]) + (["loader"] if command == "predict" else [])
    tried = {named(change) for _, _, changes in cases for change in changes}
    shared = {named(change) for _, _, changes in SHARED for change in changes}
    for section in sections:
        name = section.rpartition(".")[2]
        tried |= {f"{section}.{key.removeprefix(f'{name}.')}" for key in shared if key.startswith(f"{name}.")}
    known = set(leaves(COMMANDS[command]))
    excepted = set(EXCEPTIONS.get(command, ()))
    assert (known - tried - excepted, tried - known, tried & excepted) == (set(), set(), set())
