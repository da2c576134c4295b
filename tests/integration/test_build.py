"""`hba atlas build`: what people have on disk becomes an atlas that opens, trains and predicts."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import unicodedata
import wave

import numpy as np
import pytest
from holding import held

from hba import open_atlas
from hba.atlas.build import LAYOUTS
from hba.evaluate.predictions import read_predictions
from hba.taxonomy import of_folder


def sound(path, number=0, seconds=0.3):
    """A sound of its own for each number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wavy = np.sin(np.arange(int(16000 * seconds)) * (0.05 + 0.001 * number)) * 9000
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(wavy.astype("<i2").tobytes())


def rows(out):
    return {split: list(open_atlas(out, split=split)) for split in ("train", "validation", "test")}


def test_folders_named_by_labels_of_a_known_domain(hba, tmp_path):
    for number in range(30):
        sound(tmp_path / "in" / ("angry", "happy", "sadness")[number % 3] / f"{number}.wav", number)
    code, out, err = hba("atlas", "build", tmp_path / "in", tmp_path / "out", "--dataset", "mine", "--json")
    assert code == 0, err
    built = json.loads(out)
    assert built["domain"] == "emotion" and built["labels"] == {"anger": 10, "happy": 10, "sad": 10}
    assert built["splits"] == {"train": 21, "validation": 3, "test": 6} and built["groups"] is None
    samples = [sample for split in rows(tmp_path / "out").values() for sample in split]
    assert {sample.label for sample in samples} == {"anger", "happy", "sad"}
    assert samples[0].load_audios()[0].seconds == pytest.approx(0.3)
    assert "<audio>" in samples[0].problem and "Choose from: anger, happy, sad." in samples[0].problem
    code, out, err = hba("atlas", "validate", tmp_path / "out", "--out", tmp_path / "checked")
    assert code == 0, out + err


def test_a_table_with_groups_transcripts_and_labels_of_ones_own(hba, tmp_path):
    lines = ["Clip;Mood;Who;Said"]
    for number in range(40):
        sound(tmp_path / "in" / "clips" / f"{number}.wav", number)
        lines.append(f"{number}.wav;{('Bored', 'Keen')[number % 2]};speaker{number // 5};words {number}")
    (tmp_path / "mine.csv").write_text("﻿" + "\n".join(lines), encoding="utf-8")
    named = ["--label-column", "Mood", "--group-column", "Who", "--transcript-column", "Said"]
    arguments = ["atlas", "build", tmp_path / "in", tmp_path / "out", "--labels", tmp_path / "mine.csv", *named]
    code, out, err = hba(*arguments)
    assert code == 0, err
    assert "hba train sft" in out and "8 groups, each in one split" in out
    assert f"hba tiny runs/in-tiny --atlas {tmp_path / 'out'}" in out and "hba eval runs/in --atlas" in out
    found = rows(tmp_path / "out")
    speakers = [{sample.extra["speaker"] for sample in samples} for samples in found.values()]
    assert sum(map(len, speakers)) == len(set().union(*speakers)) == 8
    sample = found["train"][0]
    assert (
        sample.label in ("bored", "keen")
        and f'"words {sample.id.split("/")[-1].removesuffix(".wav")}"' in sample.problem
    )
    taxonomy = of_folder(tmp_path / "out")
    assert taxonomy.dataset("in").labels == ("bored", "keen") and taxonomy.num_classes == 27


def test_the_line_of_a_table_is_told_whatever_the_case_of_its_name(hba, tmp_path):
    for number in range(2):
        sound(tmp_path / "in" / f"{number}.wav", number)
    lines = [json.dumps({"file": f"{number}.wav", "label": label}) for number, label in enumerate(("bored", ""))]
    (tmp_path / "in" / "LABELS.JSONL").write_text("\n".join(lines))
    code, _, err = hba("atlas", "build", tmp_path / "in", tmp_path / "out")
    assert code == 2 and "LABELS.JSONL:2" in "".join(err.split()), err


def test_a_folder_as_windows_leaves_it(hba, tmp_path):
    lines = ["file;label"]
    for number in range(12):
        sound(tmp_path / "in" / "Zoë 😀" / f"Take {number}.WAV", number)
        lines.append(f"Zoë 😀\\Take {number}.WAV;{('Müde', 'Wach')[number % 2]}")
    (tmp_path / "in" / "Labels.CSV").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8", newline="")
    for name in ("Thumbs.db", "Zoë 😀/desktop.ini"):
        (tmp_path / "in" / name).write_bytes(b"\xff")
    code, out, err = hba("atlas", "build", tmp_path / "in", tmp_path / "out", "--json")
    assert code == 0, err
    assert json.loads(out)["labels"] == {"müde": 6, "wach": 6} and json.loads(out)["unreadable"] == {}


def test_a_table_of_excel_for_files_as_macos_names_them(hba, tmp_path):
    lines = ["file;label;note"]
    for number in range(12):
        sound(tmp_path / "in" / unicodedata.normalize("NFD", f"Übung {number}.WAV"), number)  # ü is u and dots
        lines.append(f"Übung {number}.{('WAV', 'wav')[number % 2]};{('Müde', 'Wach')[number % 2]};")
    (tmp_path / "table.csv").write_text("\n".join([*lines, ";;", ";;"]), encoding="utf-8")
    (tmp_path / "in" / "notes.docx").write_bytes(b"PK\3\4")
    arguments = ["atlas", "build", tmp_path / "in", tmp_path / "out", "--labels", tmp_path / "table.csv"]
    code, _, err = hba(*arguments)
    assert code == 2 and "1 file has no label: notes.docx" in err and "out of the folder" in " ".join(err.split()), err
    code, out, err = hba(*arguments, "--allow-unlabelled", "--json")  # the one file without a label is no recording
    assert code == 2 and json.loads(out)["labels"] == {"müde": 6, "wach": 6}, err
    assert json.loads(out)["unlabelled"] == 0 and list(json.loads(out)["unreadable"]) == ["notes.docx"]


def test_a_dataset_is_named_by_a_folder_with_umlauts(hba, tmp_path):
    for number in range(6):
        sound(tmp_path / "Gespräche Müller" / "ab"[number % 2] / f"{number}.wav", number)
    code, out, err = hba("atlas", "build", tmp_path / "Gespräche Müller", tmp_path / "out", "--json")
    assert code == 0 and json.loads(out)["dataset"] == "gesprache_muller", err


def test_the_commands_that_follow_can_be_typed_for_a_folder_with_a_space(hba, tmp_path):
    for number in range(30):
        sound(tmp_path / "in" / ("bored", "keen")[number % 2] / f"{number}.wav", number)
    made = tmp_path / "my atlas"
    code, out, err = hba("atlas", "build", tmp_path / "in", made)
    assert code == 0, err
    typed = [shlex.split(line, comments=True) for line in out.partition("Next:")[2].splitlines() if "hba" in line]
    assert len(typed) == 5 and all({str(made), f"atlas={made}"} & {*words} for words in typed), out


def test_an_atlas_that_was_built_is_trained_on_predicted_and_scored(hba, tmp_path, backbone):
    for number in range(30):
        sound(tmp_path / "in" / ("bored", "keen")[number % 2] / f"{number}.wav", number)
    assert hba("atlas", "build", tmp_path / "in", tmp_path / "out", "--dataset", "mine")[0] == 0
    settings = [f"atlas={tmp_path / 'out'}", f"model.name={backbone}", "train.max_steps=2", "model.strategy=heads"]
    code, _, err = hba(
        "train", "sft", "--run", tmp_path / "run", *settings, "train.validate_every=2", "loader.workers=0"
    )
    assert code == 0, err
    code, _, err = hba("predict", tmp_path / "run", "--atlas", tmp_path / "out", "loader.workers=0")
    assert code == 0, err
    code, out, err = hba("score", tmp_path / "run", "--json")
    assert code == 0 and "MINE" in json.loads(out)["tasks"], err
    code, out, err = hba("ask", tmp_path / "run", tmp_path / "in" / "bored" / "0.wav", "--dataset", "mine", "--json")
    assert code == 0, err
    assert set(json.loads(out)["answers"][0]["probs"]) == {"bored", "keen"}


def test_files_without_labels_are_predicted_among_the_persons_own_labels(hba, tmp_path, backbone):
    """Three emotions of the published eight; more files later are asked alone."""
    kinds = ("angry", "happy", "sadness")
    for number in range(15):
        sound(tmp_path / "in" / kinds[number % 3] / f"{number}.wav", number)
    for number in range(4):
        sound(tmp_path / "in" / f"new{number}.wav", 40 + number)
    arguments = ["atlas", "build", tmp_path / "in", tmp_path / "out", "--dataset", "mine"]
    code, _, err = hba(*arguments)
    assert code == 2 and "new0.wav" in err and "--allow-unlabelled" in err and not (tmp_path / "out").exists()
    code, out, err = hba(*arguments, "--allow-unlabelled", "--json")
    assert code == 0, err
    built = json.loads(out)
    assert built["unlabelled"] == 4 and built["splits"]["unlabelled"] == 4 and sum(built["labels"].values()) == 15
    sample = open_atlas(tmp_path / "out", split="unlabelled")[0]
    assert not sample.answered and "Choose from: anger, happy, sad." in sample.problem
    assert hba("atlas", "validate", tmp_path / "out")[0] == 0
    settings = [f"atlas={tmp_path / 'out'}", f"model.name={backbone}", "train.max_steps=1", "model.strategy=heads"]
    settings += ["train.validate_every=1", "loader.workers=0"]
    code, _, err = hba("train", "sft", "--run", tmp_path / "no", *settings, "train_split=unlabelled")
    assert code == 2 and "none of the 4 rows of split 'unlabelled' has an answer" in err
    code, _, err = hba("train", "sft", "--run", tmp_path / "run", *settings)
    assert code == 0, err

    ask = ["predict", tmp_path / "run", "--atlas", tmp_path / "out", "--split", "unlabelled", "--run", tmp_path / "new"]
    code, out, err = hba(*ask, "loader.workers=0")
    assert code == 0 and "4 rows have no answer" in out and "answers.csv" in out, err
    table = list(csv.DictReader((tmp_path / "new" / "answers.csv").open(encoding="utf-8")))
    assert [row["file"] for row in table] == [f"media/new{number}.wav" for number in range(4)]
    assert all(row["answer"] in ("anger", "happy", "sad") and float(row["probability"]) >= 1 / 3 for row in table)
    first = {p.id: p for p in read_predictions(tmp_path / "new" / "predictions.jsonl", of_folder(tmp_path / "out"))}
    assert all(set(p.probs) == {"anger", "happy", "sad"} for p in first.values())
    assert all(sum(p.probs.values()) == pytest.approx(1) and p.target is None for p in first.values())
    code, _, err = hba("score", tmp_path / "new")
    assert code == 2 and "answer to compare with (4 rows)" in err

    file = tmp_path / "out" / "unlabelled.jsonl"
    added = json.loads(file.read_text(encoding="utf-8").splitlines()[0]) | {"id": "later", "answer": "happy"}
    with file.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(added) + "\n")
    code, out, err = hba(*ask, "loader.workers=0", "--json")
    assert code == 0 and (json.loads(out)["predicted"], json.loads(out)["unlabelled"]) == (5, 4), err
    second = {p.id: p for p in read_predictions(tmp_path / "new" / "predictions.jsonl", of_folder(tmp_path / "out"))}
    assert len(second) == 5 and all(second[key] == p for key, p in first.items())
    code, out, err = hba("score", tmp_path / "new", "--json")
    assert code == 0, err
    scored = json.loads(out)
    assert scored["aggregate"]["unlabelled"] == {"mine": 4}
    assert (scored["aggregate"]["n"], scored["aggregate"]["n_asked"]) == (1, 1)
    assert "Without an answer, and in no score: 4 of mine." in " ".join(hba("score", tmp_path / "new")[1].split())
    added["problem"] = "Another question?"
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([json.dumps(added | {"id": lines[0][:0] + "mine/new0.wav"}), *lines[1:]]) + "\n")
    code, _, err = hba(*ask)
    assert code == 2 and "holds predictions with another data" in err


def test_a_media_tag_in_a_transcript_is_text(hba, tmp_path):
    lines = ["file,label,text"]
    for number in range(6):
        sound(tmp_path / "in" / f"{number}.wav", number)
        lines.append(f'{number}.wav,{("bored", "keen")[number % 2]},"well <audio> {number}"')
    (tmp_path / "in" / "labels.csv").write_text("\n".join(lines), encoding="utf-8")
    assert hba("atlas", "build", tmp_path / "in", tmp_path / "out")[0] == 0
    assert hba("atlas", "validate", tmp_path / "out")[0] == 0
    assert all("well < audio> " in sample.problem for split in rows(tmp_path / "out").values() for sample in split)


def test_rows_without_answers_are_the_same_as_lines_and_as_shards(hba, tmp_path):
    for number in range(6):
        sound(tmp_path / "in" / f"{number}.wav", number)
    arguments = ["atlas", "build", tmp_path / "in", tmp_path / "out", "--allow-unlabelled"]
    code, _, err = hba(*arguments)
    assert code == 2 and "no answers are named" in err
    code, out, err = hba(*arguments, "--choices", "calm,keen")
    assert code == 0 and "--split unlabelled" in out and "train sft" not in out, err
    assert hba("atlas", "convert", tmp_path / "out", tmp_path / "shards", "--to", "parquet")[0] == 0
    lines, shards = (open_atlas(tmp_path / name, split="unlabelled") for name in ("out", "shards"))
    assert lines.fingerprint == shards.fingerprint and not lines.answered.any() and not shards.answered.any()
    assert hba("atlas", "validate", tmp_path / "shards")[0] == 0
    code, _, err = hba(*arguments[:3], tmp_path / "words", "--allow-unlabelled", "--question", "What happens?")
    assert code == 0, err
    assert open_atlas(tmp_path / "words", split="unlabelled")[0].problem == "<audio>What happens?"


def corpus(name, folder):
    """A few files in the layout of a corpus, with the label that each should get."""
    if name == "cremad":
        for actor in range(1001, 1005):
            for code in ("ANG", "SAD"):
                sound(folder / f"{actor}_DFA_{code}_XX.wav", actor + len(code) * ord(code[0]))
        return {"anger": 4, "sad": 4}
    if name == "ravdess":
        for actor in range(1, 5):
            for code in ("02", "08"):
                sound(folder / f"Actor_{actor:02d}" / f"03-01-{code}-01-01-01-{actor:02d}.wav", actor * 10 + int(code))
        return {"calm": 4, "surprise": 4}
    if name == "tess":
        for number in range(6):
            sound(folder / "OAF_Fear" / f"OAF_w{number}_fear.wav", number)
            sound(folder / "YAF_ps" / f"YAF_w{number}_ps.wav", 50 + number)
        return {"fear": 6, "surprise": 6}
    if name == "emodb":
        for speaker in ("03", "08", "09"):
            sound(folder / f"{speaker}a01Wa.wav", int(speaker))
            sound(folder / f"{speaker}b02La.wav", 60 + int(speaker))
        return {"anger": 3, "boredom": 3}
    if name == "meld":
        for number, (split, place) in enumerate((("train", "train_splits"), ("dev", "dev"), ("test", "test_out"))):
            lines = ["Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID"]
            for utterance, emotion in enumerate(("joy", "neutral")):
                sound(folder / place / f"dia0_utt{utterance}.mp4", number * 2 + utterance)
                lines.append(f'1,"Oh, hello.",Joey,{emotion},neutral,0,{utterance}')
            (folder / f"{split}_sent_emo.csv").write_text("\n".join(lines))
        return {"happy": 3, "neutral": 3}
    if name == "mustard":
        about = {}
        for number in range(6):
            sound(folder / "utterances_final" / f"1_{number}.mp4", number)
            about[f"1_{number}"] = {"utterance": "Great.", "speaker": f"S{number % 3}", "sarcasm": number % 2 == 0}
        (folder / "sarcasm_data.json").write_text(json.dumps(about))
        return {"sarcasm": 3, "not sarcasm": 3}
    if name == "mosei":
        lines = ["video_id,clip_id,text,label,label_T,label_A,label_V,annotation,mode"]
        for number, (mode, value) in enumerate((m, v) for m in ("train", "valid", "test") for v in (-2.6667, 0.0, 1.0)):
            sound(folder / "Raw" / f"v{mode}" / f"{number}.mp4", number)
            lines.append(f'v{mode},{number},"Well, fine.",{value},,,,Neutral,{mode}')
        lines.append("gone,1,Not there.,1.0,,,,Positive,train")
        (folder / "label.csv").write_text("\n".join(lines))
        return {"highly negative": 3, "neutral": 3, "weakly positive": 3}
    for session in (1, 2, 3):
        turn, lines = f"Ses0{session}F_impro01", []
        for number, code in enumerate(("exc", "sad", "fru")):
            sound(folder / f"Session{session}/sentences/wav/{turn}/{turn}_F00{number}.wav", session * 9 + number)
            lines.append(f"[6.29 - 8.23]\t{turn}_F00{number}\t{code}\t[2.5, 2.5, 2.5]")
        table = folder / f"Session{session}/dialog/EmoEvaluation/{turn}.txt"
        table.parent.mkdir(parents=True)
        table.write_text("\n".join(lines))
    return {"happy": 3, "sad": 3}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_of_a_corpus(hba, tmp_path, name):
    labels = corpus(name, tmp_path / "in")
    code, out, err = hba("atlas", "build", tmp_path / "in", tmp_path / "out", "--layout", name, "--json")
    assert code == 0, err
    built = json.loads(out)
    assert built["labels"] == labels and sum(built["splits"].values()) == sum(labels.values())
    assert built["dataset"] == name
    if name in ("meld", "mosei"):
        assert len(set(built["splits"].values())) == 1
    assert all(rows(tmp_path / "out").values())


def broken(tmp_path, case):
    """Arguments of a call that must fail, and what it must say."""
    inside = tmp_path / "in"
    inside.mkdir()
    for number in range(6):
        if case != "empty":
            sound(inside / ("a" if case == "one class" or number % 2 else "b") / f"{number}.wav", number)
    table = tmp_path / "labels.csv"
    lines = ["file,label,speaker,split", *(f"{n}.wav,{'ab'[n % 2]},s{n // 2},train" for n in range(6))]
    said = {
        "empty": "no files here",
        "one class": "have the label 'a'",
        "files without labels": "1 file has no label",
        "labels without files": "1 file of the table is not there: 9.wav",
        "two cases": "are the same name on some disks",
        "encoding": "is not UTF-8",
        "torn group": "1 group lies in several splits: s0",
        "no label column": "no column is known as the label",
        "unknown column": "no column 'mood'",
        "loose file": "lies in no folder that is named by a label",
        "there": "is there already",
        "layout": "no layout 'cremat'",
    }[case]
    extra = []
    if case == "files without labels":
        lines.pop()
    elif case == "labels without files":
        lines.append("9.wav,a,s9,train")
    elif case == "two cases":
        sound(inside / "a" / "X.wav", 70)
        sound(inside / "a" / "x.wav", 71)
    elif case == "torn group":
        splits = ("test", "train", "validation", "validation", "test", "test")
        lines[1:] = [line.replace("train", split) for line, split in zip(lines[1:], splits, strict=True)]
    elif case == "no label column":
        lines[0] = "file,x,speaker,split"
    elif case == "unknown column":
        extra = ["--label-column", "mood"]
    elif case == "loose file":
        sound(inside / "loose.wav", 72)
    elif case == "there":
        (tmp_path / "out").mkdir()
    elif case == "layout":
        extra = ["--layout", "cremat"]
    if case in ("files without labels", "labels without files", "torn group", "no label column", "unknown column"):
        extra += ["--labels", table]
        table.write_text("\n".join(lines), encoding="utf-8")
    if case == "encoding":
        extra += ["--labels", table]
        table.write_bytes("file,label\nä.wav,a".encode("latin-1"))
    return ["atlas", "build", inside, tmp_path / "out", *extra], said


@pytest.mark.parametrize(
    "case",
    ["empty", "one class", "files without labels", "labels without files", "two cases", "encoding", "torn group"]
    + ["no label column", "unknown column", "loose file", "there", "layout"],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(hba, tmp_path, case):
    arguments, said = broken(tmp_path, case)
    code, out, err = hba(*arguments)
    assert (code, out) == (2, "") and said in err and err.count("error:") == 1, err
    assert case == "there" or not [path for path in tmp_path.iterdir() if path.name not in ("in", "labels.csv")]


def test_a_file_that_cannot_be_read_is_named_and_the_others_go_on(hba, tmp_path):
    for number in range(12):
        sound(tmp_path / "in" / "ab"[number % 2] / f"{number}.wav", number)
    (tmp_path / "in" / "a" / "bad.wav").write_bytes(b"no sound")
    code, out, err = hba("atlas", "build", tmp_path / "in", tmp_path / "out")
    assert code == 2 and "error: a/bad.wav: " in err and "Made" in out
    assert "1 file is left out of" in err
    assert sum(map(len, rows(tmp_path / "out").values())) == 12


def test_killed_it_leaves_nothing_and_the_same_command_makes_it(hba, tmp_path, tmp_path_factory):
    for number in range(300):
        sound(tmp_path / "in" / "ab"[number % 2] / f"{number}.wav", number, seconds=1)
    command = [sys.executable, "-m", "hba", "atlas", "build", str(tmp_path / "in"), str(tmp_path / "out")]
    before_the_end = held(tmp_path_factory.mktemp("held"), str(tmp_path / "out"))
    process = subprocess.Popen(command, env=before_the_end, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 600
    while not any(path.name not in ("in", "out") for path in tmp_path.iterdir()):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert hba("atlas", "build", tmp_path / "in", tmp_path / "out")[0] == 0
    assert sum(map(len, rows(tmp_path / "out").values())) == 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize(
    ("name", "lines", "number"),
    [
        ("labels.csv", ["", "file,label,note", "", '0.wav,a,"one', '', 'two"', ",,", "1.wav,,"], 8),
        ("labels.tsv", ["file\tlabel", "0.wav\ta", "", "1.wav\t"], 4),
        ("labels.jsonl", ["", '{"file": "0.wav", "label": "a\u2028"}', "  ", '{"file": "1.wav", "label": ""}'], 4),
        ("labels.jsonl", ['{"file": "0.wav", "label": "a"}', "", "{"], 3),
        ("labels.csv", ["file,label", "", "0.wav,a", f'1.wav,"{"x" * 140_000}"'], 4),
    ],
)  # fmt: skip
def test_a_line_of_a_table_has_the_number_that_an_editor_shows(hba, tmp_path, name, lines, number):
    for each in range(2):
        sound(tmp_path / "in" / f"{each}.wav", each)
    (tmp_path / "in" / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    code, out, err = hba("atlas", "build", tmp_path / "in", tmp_path / "out")
    assert (code, out) == (2, "") and f"{name}:{number}: " in err and err.count("error:") == 1, err
