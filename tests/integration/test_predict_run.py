"""Runs of predictions: baselines, selections, ablations, shards, dry runs. Small, through the command line."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from hba import open_atlas
from hba.atlas.jsonl import JsonlStore
from hba.errors import ConfigError
from hba.evaluate import predict as predict_module
from hba.evaluate.judge.run import items_of
from hba.evaluate.predict import Selection, launched_shard, parse_shard, take_gpus
from hba.evaluate.predictions import READING_VERSION, read_predictions, write_predictions
from hba.run import LOCK_GRACE_SECONDS, locked_folder
from hba.storage import read_json

ASKED = ("remote.first_backoff_seconds=0.01", "encode.modalities=[]")


def predictions(run):
    return {p.id: p for p in read_predictions(Path(run) / "predictions.jsonl")}


# --- baselines -------------------------------------------------------------------------------------------------------


def test_majority_gives_the_most_frequent_answer_of_the_training_rows(hba, mini_atlas, tmp_path):
    code, out, _ = hba("predict", "majority", "--atlas", mini_atlas, "--run", tmp_path, "--json")
    assert code == 0 and json.loads(out)["skipped"] == 0
    counts = {}
    for sample in open_atlas(mini_atlas, split="train"):
        counts.setdefault(sample.dataset, Counter())[sample.target] += 1
    for prediction in predictions(tmp_path).values():
        assert counts[prediction.dataset][prediction.answer] == max(counts[prediction.dataset].values())
        if prediction.probs:
            assert sum(prediction.probs.values()) == pytest.approx(1)
            assert max(prediction.probs, key=prediction.probs.get) == prediction.label


def test_a_random_answer_depends_on_seed_and_sample_alone(hba, mini_atlas, tmp_path):
    for name, rest in {"a": [], "b": ["--split", "test[10:30]"], "c": ["generation.seed=1"]}.items():
        assert hba("predict", "random", "--atlas", mini_atlas, "--run", tmp_path / name, *rest)[0] == 0
    a, b, c = (predictions(tmp_path / name) for name in "abc")
    assert len(b) == 20 and all(a[key].answer == b[key].answer for key in b)
    assert any(a[key].answer != c[key].answer for key in c)


def test_a_baseline_refuses_what_it_has_not_seen(hba, mini_atlas, tmp_path):
    rows = ["predict", "majority", "--atlas", mini_atlas, "--run", tmp_path, "fit_split='train[:2]'"]
    code, _, err = hba(*rows)
    assert code == 2 and "to learn from" in err and "fit_split" in err


# --- which rows ------------------------------------------------------------------------------------------------------


def test_rows_per_dataset_keep_the_shares_of_labels(mini_atlas):
    atlas = open_atlas(mini_atlas, split="train")
    few = Selection(per_dataset=4).rows(atlas)
    codes = Counter(few.columns.dataset_codes.tolist())
    assert set(codes.values()) == {4}
    assert [s.id for s in few] == [s.id for s in Selection(per_dataset=4).rows(atlas)]
    assert len(Selection(per_dataset=4, limit=7).rows(atlas)) == 7
    assert few.fingerprint != atlas.fingerprint


def test_datasets_alone_are_predicted_and_a_mistyped_one_is_named(hba, mini_atlas, tmp_path):
    command = ["predict", "random", "--atlas", mini_atlas, "--run", tmp_path]
    assert hba(*command, "--datasets", "tess, mmsd")[0] == 0
    assert {prediction.dataset for prediction in predictions(tmp_path).values()} == {"tess", "mmsd"}
    code, _, err = hba(*command, "--datasets", "mmds")
    assert code == 2 and "Did you mean 'mmsd'?" in err


def test_a_pilot_is_not_taken_for_the_whole(hba, mini_atlas, tmp_path):
    command = ["predict", "random", "--atlas", mini_atlas, "--run", tmp_path]
    assert hba(*command, "--limit", 5)[0] == 0 and len(predictions(tmp_path)) == 5
    code, _, err = hba(*command)
    assert code == 2 and "another data" in err


def test_a_finished_run_that_is_run_again_builds_no_sample(hba, mini_atlas, tmp_path, monkeypatch):
    command = ["predict", "majority", "--atlas", mini_atlas, "--run", tmp_path]
    assert hba(*command)[0] == 0
    built, sample = [], JsonlStore.sample
    monkeypatch.setattr(JsonlStore, "sample", lambda store, *row: built.append(store.split) or sample(store, *row))
    before = (tmp_path / "predictions.jsonl").read_bytes()
    code, out, _ = hba(*command, "--json")
    assert code == 0 and json.loads(out)["predicted"] == len(open_atlas(mini_atlas, split="test"))
    assert set(built) == {"train"}  # of which the baseline is made
    assert (tmp_path / "predictions.jsonl").read_bytes() == before


@pytest.mark.parametrize("remote", [False, True])
def test_torch_is_for_models_that_run_here(hba, mini_atlas, chat_server, tmp_path, remote):
    asked = ["m", "--backend", "openai", "--base-url", chat_server().url] if remote else ["majority"]
    command = ["hba", "predict", *asked, "--atlas", str(mini_atlas), "--run", str(tmp_path)]
    if remote:  # samples need it for their media, a finished run does not
        command += ["--limit", "2"]
        assert hba(*command[1:])[0] == 0
    code = f"import sys; sys.argv = {command}; from hba.cli import main\ntry: main()\n"
    code += "finally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert done.stdout.endswith("False\n"), done


@pytest.mark.parametrize(
    "chosen",
    [
        ["--datasets", "siq2", "--limit", 2],
        ["--datasets", "siq2,cremad"],
        ["--per-dataset", 2],
        ["--split", "test[:60]"],
    ],
)
def test_chosen_rows_are_found_again_by_whoever_reads_the_atlas_later(hba, mini_atlas, tmp_path, chosen):
    assert hba("predict", "majority", "--atlas", mini_atlas, "--run", tmp_path, *chosen)[0] == 0
    code, _, err = hba("score", tmp_path, "--by", "modality_signature")
    assert code == 0, err
    free_form = {p.id for p in predictions(tmp_path).values() if p.dataset in ("siq2", "intentqa", "mimeqa")}
    assert {item.id for item in items_of(tmp_path)} == free_form and free_form
    code, _, err = hba("score", tmp_path, "--by", "modality_signature", "--atlas", tmp_path / "none")
    assert code == 2 and "none" in err


def test_a_run_of_an_older_version_goes_on_while_new_keys_of_encode_have_their_defaults(hba, mini_atlas, tmp_path):
    command = ("predict", "majority", "--atlas", mini_atlas, "--run", tmp_path, "--limit", 6)
    assert hba(*command)[0] == 0
    settings = read_json(tmp_path / "predict.json")
    del settings["encode"]["frames"], settings["encode"]["max_tokens"]
    (tmp_path / "predict.json").write_text(json.dumps(settings), encoding="utf-8")
    code, _, err = hba(*command)
    assert code == 0, err
    code, _, err = hba(*command, "encode.max_tokens=99")
    assert code == 2 and "another encode.max_tokens." in err


# --- what reaches the model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "kinds"),
    [
        *(("text", set()), ("audio", {"input_audio"}), ("video", {"image_url"})),
        ("audio,video", {"input_audio", "image_url"}),
    ],
)
def test_an_ablation_leaves_media_out_and_keeps_the_text(hba, mini_atlas, chat_server, tmp_path, channels, kinds):
    server = chat_server(brain="kinds")
    small = ["encode.num_frames=2", "encode.max_pixels=3136", f"remote.base_url={server.url}"]
    options = ["--backend", "openai", "--run", tmp_path, "--modalities", channels, "--limit", 30]
    assert hba("predict", "m", "--atlas", mini_atlas, *options, *small)[0] == 0
    seen = {kind for p in predictions(tmp_path).values() for kind in p.output.split()}
    assert seen == kinds | {"text"}


def test_an_ablated_prompt_has_no_tag(hba, mini_atlas, chat_server, tmp_path):
    server = chat_server(brain="echo")
    options = ["--backend", "openai", "--run", tmp_path, "--modalities", "text", f"remote.base_url={server.url}"]
    assert hba("predict", "m", "--atlas", mini_atlas, *options)[0] == 0
    assert not any("<audio>" in p.output or "<video>" in p.output for p in predictions(tmp_path).values())
    assert hba("predict", "m", "--atlas", mini_atlas, *options[:3], tmp_path, "--modalities", "smell")[0] == 2


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_remote_model_without_its_backend_is_told_of_it(hba, mini_atlas, tmp_path):
    code, _, err = hba("predict", "gpt-4o", "--atlas", mini_atlas, "--run", tmp_path / "run")
    assert code == 2 and "gpt-4o: no such folder" in err and "with --backend also the name of a remote model" in err


def test_failures_are_counted_and_asked_again_on_request(hba, mini_atlas, chat_server, tmp_path):
    common = ["predict", "m", "--atlas", mini_atlas, "--backend", "openai", "--run", tmp_path, *ASKED]
    broken = chat_server(brain="choose", refuse="anxiety")
    code, out, err = hba(*common, f"remote.base_url={broken.url}", "--json")
    said = json.loads(out)
    assert code == 1 and said["failed"] > 0 and "--retry-failed" in err
    assert hba(*common, f"remote.base_url={broken.url}", "--allow-failed", said["failed"])[0] == 0
    whole = chat_server(brain="choose")
    code, out, _ = hba(*common, f"remote.base_url={whole.url}", "--retry-failed", "--json")
    assert code == 0 and json.loads(out)["failed"] == 0
    assert whole.stats()["requests"] == said["failed"]
    assert len(predictions(tmp_path)) == said["predicted"]


def test_the_same_command_reads_answers_of_an_older_version_anew_and_asks_nothing(
    hba, mini_atlas, chat_server, tmp_path
):
    server = chat_server(brain="choose")
    command = ["predict", "m", "--atlas", mini_atlas, "--backend", "openai", "--run", tmp_path, *ASKED]
    command.append(f"remote.base_url={server.url}")
    assert hba(*command)[0] == 0
    right, asked = predictions(tmp_path), server.stats()["requests"]
    assert {"box", "whole"} <= {p.rule for p in right.values()}
    path, old = tmp_path / "predict.json", [dataclasses.replace(p, label=None, rule=None) for p in right.values()]
    write_predictions(tmp_path / "predictions.jsonl", old)
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "reading"}))
    code, _, err = hba(*command, "--shard", "1/2")
    assert code == 2 and "read by an older version" in err
    assert hba(*command)[0] == 0
    assert predictions(tmp_path) == right and server.stats()["requests"] == asked
    assert json.loads(path.read_text())["reading"] == READING_VERSION


def test_what_failed_in_a_merged_run_is_asked_again_by_shards_too(hba, mini_atlas, chat_server, tmp_path):
    common = ["predict", "m", "--atlas", mini_atlas, "--backend", "openai", "--run", tmp_path, *ASKED]
    broken = chat_server(brain="choose", refuse="anxiety")
    failed = json.loads(hba(*common, f"remote.base_url={broken.url}", "--json")[1])["failed"]
    whole = chat_server(brain="choose")
    again = [*common, f"remote.base_url={whole.url}", "--retry-failed", "--json"]
    said = [json.loads(hba(*again, "--shard", f"{number}/2")[1]) for number in (1, 2)]
    assert whole.stats()["requests"] == failed > 0 and said[1]["merged"] is True
    assert not any(p.failed for p in predictions(tmp_path).values())


# --- dry run ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_counts_and_asks_nothing(hba, mini_atlas, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    options = ["--backend", "openai", "--run", tmp_path, "--dry-run", "--json"]
    command = ["predict", "gpt-4o", "--atlas", mini_atlas, *options]
    code, out, _ = hba(*command)
    said = json.loads(out)
    rows = len(open_atlas(mini_atlas, split="test"))
    assert code == 0 and said["rows"] == said["left"] == rows == sum(said["datasets"].values())
    assert said["tokens_out_at_most"] == 1024 * rows
    expected = (said["tokens_in"] * 2.5 + said["tokens_out_at_most"] * 10) / 1e6
    assert said["cost_usd_at_most"] == pytest.approx(expected)
    less = json.loads(hba(*command, "--modalities", "text")[1])
    assert less["tokens_in"] < said["tokens_in"]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_what_the_run_would(hba, mini_atlas, tmp_path):
    for backend, message in {"gemini": "no backend 'gemini'", "anthropic": "takes no audio"}.items():
        command = ["predict", "m", "--atlas", mini_atlas, "--backend", backend, "--run", tmp_path, "--dry-run"]
        code, out, err = hba(*command)
        assert (code, out) == (2, "") and message in err


def test_an_unknown_price_is_said_and_not_guessed(hba, mini_atlas, chat_server, tmp_path):
    url = f"remote.base_url={chat_server(brain='choose').url}"
    command = ["predict", "my-model", "--atlas", mini_atlas, "--backend", "openai", "--run", tmp_path, url, *ASKED]
    said = json.loads(hba(*command, "--dry-run", "--json")[1])
    assert said["cost_usd_at_most"] is None and "my-model is not known" in said["note"]
    assert "unknown" in hba(*command, "--dry-run")[1]
    assert hba(*command, "--limit", 9)[0] == 0  # a pilot: its tokens are what is then expected
    prices = tmp_path / "prices.yaml"
    prices.write_text("openai:\n  my-model: {input: 1.0, output: 2.0}\n")
    said = json.loads(hba(*command, "--dry-run", f"remote.prices={prices}", "--json")[1])
    assert said["measured"] and said["tokens_out_at_most"] == 5 * said["left"] and said["left"] == said["rows"]
    assert said["cost_usd_at_most"] == pytest.approx((said["tokens_in"] + 2 * said["tokens_out_at_most"]) / 1e6)


# --- shards ----------------------------------------------------------------------------------------------------------


def test_shards_make_one_file_in_any_order_with_any_number(hba, mini_atlas, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = ["predict", "random", "--atlas", mini_atlas, "--run"]
    assert hba(*command, whole)[0] == 0
    code, out, _ = hba(*command, parts, "--shard", "3/3", "--json")
    assert code == 0 and json.loads(out)["merged"] is False
    assert not (parts / "predictions.jsonl").exists()
    assert hba(*command, parts, "--shard", "1/2")[0] == 0  # the job goes on with two processes
    done = json.loads(hba(*command, parts, "--shard", "2/2", "--json")[1])
    assert done["merged"] is True and not (parts / "shards").exists()
    assert predictions(parts) == predictions(whole)
    assert len((parts / "predictions.jsonl").read_text().splitlines()) == len(predictions(whole))


def test_a_run_says_what_it_was_predicted_on_and_where_it_went_on(hba, mini_atlas, tmp_path):
    command = ["predict", "random", "--atlas", mini_atlas, "--run", tmp_path]
    assert hba(*command, "--shard", "1/2")[0] == 0
    file = tmp_path / "environment.json"
    first = read_json(file)
    asked = read_json(tmp_path / "predict.json")
    assert (first["command"], first["seed"], first["data"]) == ("predict", 0, asked["data"])
    assert first["packages"]["msgspec"] and first["started_at"] and "resumed" not in first
    file.write_text(json.dumps(first | {"cpu": "another one"}))  # the second process is on another machine
    assert hba(*command, "--shard", "2/2")[0] == 0
    (again,) = read_json(file)["resumed"]
    assert again["changed"] == {"cpu": first["cpu"]} and "command" not in again
    before = file.read_bytes()
    assert hba(*command)[0] == 0  # nothing is left to ask
    assert file.read_bytes() == before
    # The record of a training stays in its folder, and the predictions are noted beside it.
    trained = first | {"command": "train sft", "data": {"fingerprint": "of training"}}
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "environment.json").write_text(json.dumps(trained))
    assert hba("predict", "majority", "--atlas", mini_atlas, "--limit", "3", "--run", tmp_path / "trained")[0] == 0
    found = read_json(tmp_path / "trained" / "environment.json")
    assert trained.items() <= found.items() and [each["command"] for each in found["resumed"]] == ["predict"]
    assert found["resumed"][0]["data"] == read_json(tmp_path / "trained" / "predict.json")["data"]


def test_a_run_without_shards_goes_on_from_shards(hba, mini_atlas, tmp_path):
    command = ["predict", "random", "--atlas", mini_atlas, "--run", tmp_path]
    assert hba(*command, "--shard", "1/2")[0] == 0
    path = tmp_path / "shards" / "1-of-2" / "predictions.jsonl"
    path.write_bytes(path.read_bytes()[:-20])  # a kill
    assert hba(*command)[0] == 0
    assert len(predictions(tmp_path)) == len(open_atlas(mini_atlas, split="test"))
    assert not (tmp_path / "shards").exists()


def test_a_merge_that_was_killed_is_done_again(hba, mini_atlas, tmp_path):
    """At the worst moment: the run has everything, the shards are not removed yet."""
    command = ["predict", "random", "--atlas", mini_atlas, "--run", tmp_path]
    assert hba(*command, "--shard", "1/2")[0] == 0
    shutil.copytree(tmp_path / "shards", tmp_path / "kept")
    assert hba(*command, "--shard", "2/2")[0] == 0
    merged = (tmp_path / "predictions.jsonl").read_bytes()
    shutil.move(tmp_path / "kept", tmp_path / "shards")
    assert hba(*command)[0] == 0
    assert (tmp_path / "predictions.jsonl").read_bytes() == merged and not (tmp_path / "shards").exists()


def test_a_shard_at_work_keeps_others_out(hba, mini_atlas, tmp_path):
    command = ["predict", "random", "--atlas", mini_atlas, "--run", tmp_path]
    with locked_folder(tmp_path / "shards" / "1-of-2"):
        assert hba(*command, "--shard", "1/2")[0] == 1
        code, _, err = hba(*command)
        assert code == 1 and "another process" in err
        assert hba(*command, "--shard", "2/2")[0] == 0


def broken_atlas(mini_atlas, tmp_path):
    """A copy, its first row with a sound that cannot be read, and how many rows have that sound."""
    atlas = tmp_path / "atlas"
    shutil.copytree(mini_atlas, atlas)
    broken = next(sample for sample in open_atlas(atlas, split="test") if sample.audios)
    row = json.loads((atlas / "test.jsonl").read_text().splitlines()[broken.number])
    (atlas / row["audios"][0]).write_bytes(b"RIFFnothing")
    return atlas, broken, sum(row["audios"][0] in line for line in (atlas / "test.jsonl").read_text().splitlines())


def test_a_process_that_comes_when_the_others_have_merged_leaves_it_to_them(
    hba, mini_atlas, chat_server, tmp_path, monkeypatch
):
    atlas, broken, _ = broken_atlas(mini_atlas, tmp_path)
    server = chat_server(brain="choose")
    small = [f"remote.base_url={server.url}", "encode.num_frames=2", "encode.max_pixels=3136", "--json"]
    command = ["predict", "m", "--atlas", atlas, "--backend", "openai", "--run", tmp_path / "run", *small]
    command += ["--modalities", "audio", "--limit", "30"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    first = str(broken.number % 2)  # its share has the sample that cannot be read
    second = str(1 - broken.number % 2)
    monkeypatch.setenv("RANK", first)
    assert hba(*command)[:2] == (0, "")
    opened, said = predict_module.open_backend, []

    def slowly(name, opening):
        """While the model of one loads, the other does its share and finds that all is done."""
        monkeypatch.setattr(predict_module, "open_backend", opened)
        monkeypatch.setenv("RANK", second)
        said.append(hba(*command))
        return opened(name, opening)

    monkeypatch.setattr(predict_module, "open_backend", slowly)
    assert hba(*command)[:2] == (0, "")
    ((code, out, _),) = said
    assert code == 2 and json.loads(out)["merged"] is True and json.loads(out)["quarantined"] >= 1
    assert not (tmp_path / "run" / "shards").exists()


def test_quarantines_of_shards_are_merged(hba, mini_atlas, chat_server, tmp_path):
    atlas, broken, sharing = broken_atlas(mini_atlas, tmp_path)
    url = f"remote.base_url={chat_server(brain='choose').url}"
    small = [url, "encode.num_frames=2", "encode.max_pixels=3136", "--modalities", "audio"]
    command = ["predict", "m", "--atlas", atlas, "--backend", "openai", "--run", tmp_path / "run", *small]
    codes = [hba(*command, "--shard", f"{i}/2")[0] for i in (1, 2)]
    assert 2 in codes
    records = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert len(records) == sharing and broken.id in {record["id"] for record in records}
    assert len(predictions(tmp_path / "run")) == len(open_atlas(atlas, split="test")) - sharing


def test_what_is_asked_in_vain_is_no_predicting(hba, mini_atlas, chat_server, tmp_path):
    """A row that nobody can read is tried by every command, and what the run ran on stays as it was said."""
    atlas, _, _ = broken_atlas(mini_atlas, tmp_path)
    small = [f"remote.base_url={chat_server(brain='choose').url}", "encode.num_frames=2", "--modalities", "audio"]
    common = ["predict", "m", "--atlas", atlas, "--backend", "openai", "--run", tmp_path / "run", *small]
    assert 2 in [hba(*common, "--shard", f"{number}/2")[0] for number in (1, 2)]
    file = tmp_path / "run" / "environment.json"
    said = file.read_bytes()
    assert "resumed" not in json.loads(said)
    assert hba(*common)[0] == 2 and file.read_bytes() == said
    file.unlink()
    assert hba(*common)[0] == 2 and not file.exists()


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "/"])
def test_a_shard_that_is_none(hba, mini_atlas, tmp_path, text):
    code, _, err = hba("predict", "random", "--atlas", mini_atlas, "--run", tmp_path, f"--shard={text}")
    assert code == 2 and "i/N" in err


def test_launchers_give_each_rank_its_share():
    assert launched_shard({}) is None and launched_shard({"RANK": "0", "WORLD_SIZE": "1"}) is None
    shard = launched_shard({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert (shard.number, shard.count, shard.device) == (6, 8, 1)
    step = launched_shard({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"})
    assert step.name == parse_shard("1/2").name
    assert launched_shard({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}) is None  # a batch script is no task of its own


def gpus(launched, visible, each=1, shared=True):
    """What CUDA_VISIBLE_DEVICES says once a launched process has taken its GPUs."""
    environment = {**launched, "CUDA_VISIBLE_DEVICES": visible}
    take_gpus(launched_shard(launched), each, shared=shared, environment=environment)
    return environment["CUDA_VISIBLE_DEVICES"]


def test_each_process_sees_its_own_gpus_alone():
    torchrun = [{"RANK": str(8 + n), "WORLD_SIZE": "16", "LOCAL_RANK": str(n)} for n in range(4)]
    assert [gpus(rank, "4,5,6,7") for rank in torchrun] == ["4", "5", "6", "7"]
    assert [gpus(rank, "GPU-a,MIG-b,GPU-c,GPU-d,-1,GPU-e") for rank in torchrun] == ["GPU-a", "MIG-b", "GPU-c", "GPU-d"]
    assert [gpus(rank, "0,1,2,3", each=2, shared=False) for rank in torchrun[:2]] == ["0,1", "2,3"]
    assert [gpus(rank, "0,1") for rank in torchrun] == ["0", "1", "0", "1"]  # a small model: two on each
    assert gpus(torchrun[3], "") == ""  # none
    srun = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
    assert gpus(srun, "0,1,2,3") == "1"
    assert gpus(srun, "3") == "3" and gpus({**srun, "SLURM_GPUS_PER_TASK": "2"}, "0,1") == "0,1"  # dealt out already


def test_too_few_gpus_for_the_engines_of_a_machine():
    third = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2"}
    with pytest.raises(ConfigError, match=r"4 GPUs are enough for 2 processes of 2.*--nproc-per-node 2"):
        gpus(third, "0,1,2,3", each=2, shared=False)
    with pytest.raises(ConfigError, match=r"8 GPUs are wanted.*vllm\.tensor_parallel_size=4"):
        gpus(third, "0,1,2,3", each=8, shared=False)


def test_a_shard_waits_for_a_run_that_another_process_starts_or_merges(hba, mini_atlas, tmp_path):
    command = ["predict", "random", "--atlas", mini_atlas, "--run", tmp_path]
    held, free = threading.Event(), threading.Event()

    def starts():
        with locked_folder(tmp_path):
            held.set()
            free.wait(600)

    other = threading.Thread(target=starts)
    other.start()
    held.wait(600)
    threading.Timer(2 * LOCK_GRACE_SECONDS, free.set).start()
    assert hba(*command, "--shard", "1/1")[0] == 0
    other.join()
    assert len(predictions(tmp_path)) == len(open_atlas(mini_atlas, split="test"))


def test_a_finished_run_asks_nothing_of_many_processes(hba, mini_atlas, chat_server, tmp_path, monkeypatch):
    server = chat_server(brain="choose")
    command = ["predict", "m", "--atlas", mini_atlas, "--backend", "openai", "--run", tmp_path, *ASKED]
    command += [f"remote.base_url={server.url}", "--json"]
    whole = json.loads(hba(*command)[1])
    before, asked = (tmp_path / "predictions.jsonl").read_bytes(), server.stats()["requests"]
    monkeypatch.setenv("WORLD_SIZE", "3")
    said = []
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        code, out, _ = hba(*command)
        assert code == 0
        said += [json.loads(out)] if out else []
    assert [(one["predicted"], one["merged"]) for one in said] == [(whole["predicted"], True)]  # the first speaks
    assert server.stats()["requests"] == asked and (tmp_path / "predictions.jsonl").read_bytes() == before
    assert not (tmp_path / "shards").exists()


def test_two_processes_of_a_launcher_make_one_run(mini_atlas, tmp_path):
    """As torchrun starts them: at once, told apart by the environment alone."""
    command = [sys.executable, "-m", "hba", "predict", "random", "--atlas", str(mini_atlas), "--run", str(tmp_path)]
    ranks = [
        subprocess.Popen(command, env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    assert [rank.wait(timeout=900) for rank in ranks] == [0, 0]
    assert len(predictions(tmp_path)) == len(open_atlas(mini_atlas, split="test"))
    assert not (tmp_path / "shards").exists()
