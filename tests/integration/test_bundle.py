"""`hba bundle` and `hba verify`: the numbers of a bundle follow from it, whoever asks; hostile files are refused."""

import json
import shutil
import stat
import warnings
import zipfile

import pytest

from hba.evaluate import bundle as module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Where the run lies that all tests of this file share."""
    return tmp_path_factory.mktemp("bundled")


@pytest.fixture
def scored(hba, mini_atlas, run, chat_server, monkeypatch):
    """The run folder, its verdicts included, made once."""
    if not (run / "words" / "metrics.json").is_file():
        monkeypatch.setenv("HBA_CACHE", str(run / "cache"))
        asked = ["m", "--backend", "openai", "--base-url", chat_server().url, "--atlas", mini_atlas]
        judge = ["--judge", "j", "--judge-url", chat_server("judge").url, "--per-dataset", "2", "encode.num_frames=2"]
        assert hba("eval", *asked, *judge, "--run", run / "words")[0] == 0
    return run / "words"


def changed(bundle, out, **files):
    """The bundle with other contents, whose manifest says their hashes."""
    with zipfile.ZipFile(bundle) as packed:
        contents = {name: packed.read(name) for name in packed.namelist()}
    for name, change in files.items():
        name = name.replace("_", ".")
        contents[name] = change(contents[name].decode()).encode()
    manifest = json.loads(contents["bundle.json"])
    for name, data in contents.items():
        if name != "bundle.json":
            manifest["files"][name] = {"bytes": len(data), "sha256": module._sha256(data)}
    contents["bundle.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in contents.items():
            packed.writestr(name, data)
    return out


def first_line(change):
    def applied(text):
        first, _, rest = text.partition("\n")
        return json.dumps(change(json.loads(first))) + "\n" + rest

    return applied


def test_the_numbers_of_a_bundle_follow_from_it_alone(hba, mini_atlas, scored, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "very-secret-word")
    asked = json.loads((scored / "predict.json").read_text())
    asked["note"] = f"very-secret-word {scored}/x sk-abcdefghij"
    (scored / "predict.json").write_text(json.dumps(asked))
    code, _, err = hba("bundle", scored, tmp_path / "a.zip")
    assert code == 0, err
    assert hba("bundle", scored, tmp_path / "b.zip")[0] == 0
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as packed:
        packed_names, whole = set(packed.namelist()), b"".join(map(packed.read, packed.namelist()))
    needed = {"metrics.json", "predictions.jsonl", "judgements.jsonl", "prompts.jsonl", "environment.json"}
    assert needed <= packed_names
    assert packed_names <= module.NAMES and b"RIFF" not in whole
    for hidden in (b"very-secret-word", b"sk-abcdefghij", str(scored.parent).encode(), str(mini_atlas.parent).encode()):
        assert hidden not in whole, hidden
    monkeypatch.chdir(tmp_path)
    code, out, err = hba("verify", "a.zip", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["differs"] is None and found["checked"] == ["hashes", "environment", "labels", "scores"]
    code, out, err = hba("verify", "a.zip", "--atlas", mini_atlas)
    assert code == 0 and "rows of the atlas" in out, err


def another_score(text):
    return text.replace('"score": 0.', '"score": 0.9', 1)


SCORED = "when it is scored again"
WRONG = {
    "a score": ({"metrics_json": another_score}, SCORED),
    "a label": ({"predictions_jsonl": first_line(lambda p: p | {"label": None, "answer": "no"})}, "its words say"),
    "a verdict": ({"judgements_jsonl": first_line(lambda j: j | {"correct": not j["correct"]})}, SCORED),
    "a row": ({"predictions_jsonl": lambda text: text.partition("\n")[2]}, SCORED),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_number_that_does_not_follow_is_named(hba, scored, tmp_path, name):
    files, said = WRONG[name]
    assert hba("bundle", scored, tmp_path / "a.zip")[0] == 0
    code, out, err = hba("verify", changed(tmp_path / "a.zip", tmp_path / "b.zip", **files))
    assert (code, out) == (1, "") and "do not follow" in err and said in err, (name, err)


def test_a_file_that_is_not_the_one_packed_is_named(hba, scored, tmp_path):
    assert hba("bundle", scored, tmp_path / "a.zip")[0] == 0
    with zipfile.ZipFile(tmp_path / "a.zip") as packed, zipfile.ZipFile(tmp_path / "b.zip", "w") as other:
        for name in packed.namelist():
            other.writestr(name, packed.read(name) + (b" " if name == "metrics.json" else b""))
    code, _, err = hba("verify", tmp_path / "b.zip")
    assert code == 1 and "metrics.json is not the file that was packed" in err


def entry(name="metrics.json", mode=stat.S_IFREG | 0o644):
    found = zipfile.ZipInfo(name)
    found.external_attr = mode << 16
    return found


def names(folder):
    return sorted(path.name for path in folder.iterdir())


HOSTILE = {
    "path": ([(entry("../metrics.json"), b"{}")], "no file of a bundle"),
    "absolute path": ([(entry("/tmp/metrics.json"), b"{}")], "no file of a bundle"),
    "folder": ([(entry("metrics.json/"), b"")], "no file of a bundle"),
    "link": ([(entry(mode=stat.S_IFLNK | 0o777), b"/etc/passwd")], "is a link"),
    "twice": ([(entry(), b"{}"), (entry(), b"{}")], "twice"),
    "bomb": ([(entry(), b"0" * (64 << 20))], "unpacks to"),
    "nothing": ([], "lacks bundle.json"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_zip_is_refused(hba, tmp_path, name):
    entries, said = HOSTILE[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as packed:
            for info, data in entries:
                packed.writestr(info, data, zipfile.ZIP_DEFLATED)
    before = names(tmp_path)
    code, out, err = hba("verify", tmp_path / "a.zip")
    assert (code, out) == (2, "") and said in err and "Traceback" not in err, err
    assert names(tmp_path) == before


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_unpacks_without_a_bound_is_refused(hba, tmp_path, method):
    """A read of n bytes of bzip2 or LZMA may give gigabytes."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr(entry(), b"{}", method)
    code, out, err = hba("verify", tmp_path / "a.zip")
    assert (code, out) == (2, "") and "than by DEFLATE" in err, err


def edited(path, value):
    """A change of a JSON file: `value` stands at `path`, a list of keys."""

    def applied(text):
        whole = {"": json.loads(text)}
        place, key = whole, ""
        for name in path:
            place, key = place[key], name
        place[key] = value
        return json.dumps(whole[""])

    return applied


RESAMPLES = ["provenance", "scoring", "resamples"]
MALFORMED = {
    "metrics": {"metrics_json": edited([], [])},
    "aggregate": {"metrics_json": edited(["aggregate"], [])},
    "scoring": {"metrics_json": edited(["provenance", "scoring"], [1])},
    "nested": {"metrics_json": lambda _: "[" * 200_000},
    "resamples in words": {"metrics_json": edited(RESAMPLES, "5")},
    "resamples without end": {"metrics_json": edited(RESAMPLES, 10**9)},
    "asked a list": {"predict_json": edited([], [])},
    "asked a number": {"predict_json": edited(["asked"], 5)},
    "asked in words": {"predict_json": edited(["asked"], {"a": "x"})},
}


@pytest.mark.parametrize("name", MALFORMED)
def test_records_of_another_shape_are_refused_and_the_other_bundles_shown(hba, scored, tmp_path, name):
    assert hba("bundle", scored, tmp_path / "a.zip")[0] == 0
    changed(tmp_path / "a.zip", tmp_path / "b.zip", **MALFORMED[name])
    code, out, err = hba("verify", tmp_path / "b.zip")
    assert (code, out) == (2, "") and "b.zip" in err and "Traceback" not in err, err
    if name == "aggregate":
        code, _, err = hba("leaderboard", tmp_path, "--site", tmp_path / "site")
        assert code == 1 and "b.zip" in err
        assert names(tmp_path / "site") == ["a.html", "a.zip", "index.html"]


def test_a_field_of_the_rows_is_read_from_no_place_that_a_bundle_names(hba, mini_atlas, scored, tmp_path):
    shutil.copytree(scored, tmp_path / "run")
    assert hba("score", tmp_path / "run", "--cluster", "answer")[0] == 0
    assert hba("bundle", tmp_path / "run", tmp_path / "a.zip", "--atlas", mini_atlas)[0] == 0
    place = edited(["data", "path"], str(mini_atlas))
    changed(tmp_path / "a.zip", tmp_path / "b.zip", predict_json=place)
    code, out, err = hba("verify", tmp_path / "b.zip")
    assert (code, out) == (2, "") and "groups by 'answer', which the rows say" in err and "--atlas" in err, err
    code, _, err = hba("verify", tmp_path / "b.zip", "--atlas", mini_atlas)
    assert code == 0, err


def test_a_page_of_a_site_shows_nothing_of_an_atlas_of_this_machine(hba, mini_atlas, scored, tmp_path):
    assert hba("bundle", scored, tmp_path / "a.zip", "--no-prompts")[0] == 0
    (tmp_path / "in").mkdir()
    changed(tmp_path / "a.zip", tmp_path / "in" / "a.zip", predict_json=edited(["data", "path"], str(mini_atlas)))
    assert hba("leaderboard", tmp_path / "in", "--site", tmp_path / "site")[0] == 0
    page = (tmp_path / "site" / "a.html").read_text(encoding="utf-8")
    assert "<audio" not in page and "<video" not in page and 'class="prompt"' not in page
    assert "A bundle has no media" in page


def forged(hba, scored, tmp_path, mini_atlas, change, asked=lambda record: record, *how):
    """A bundle of the run with other predictions and another predict.json, scored as if they were its own."""
    shutil.copytree(scored, tmp_path / "run")
    lines = map(json.loads, (tmp_path / "run" / "predictions.jsonl").read_text().splitlines())
    (tmp_path / "run" / "predictions.jsonl").write_text("".join(json.dumps(p) + "\n" for p in change(list(lines))))
    (tmp_path / "run" / "predict.json").write_text(
        json.dumps(asked(json.loads((tmp_path / "run" / "predict.json").read_text())))
    )
    assert hba("score", tmp_path / "run", *how)[0] == 0
    (tmp_path / "in").mkdir()
    assert hba("bundle", tmp_path / "run", tmp_path / "in" / "a.zip", "--atlas", mini_atlas)[0] == 0
    return tmp_path / "in" / "a.zip"


def test_labels_that_no_rule_has_read_are_said_to_be_taken_as_they_are_wherever_they_stand(
    hba, mini_atlas, scored, tmp_path
):
    def right(lines):
        return [p | {"rule": None, "label": p["target"] if p.get("rule") and p["label"] else p["label"]} for p in lines]

    bundle = forged(hba, scored, tmp_path, mini_atlas, right, lambda record: record, "--by", "answer")
    code, _, err = hba("verify", bundle)
    assert code == 0 and "say no rule by which they were read" in err, err
    assert hba("leaderboard", bundle, "--site", tmp_path / "site")[0] == 0
    for name in ("a.html", "index.html"):
        assert "say no rule by which they were read" in (tmp_path / "site" / name).read_text(encoding="utf-8"), name
    page = (tmp_path / "site" / "a.html").read_text(encoding="utf-8")
    assert "scores by answer need the rows" in page and "by answer</" not in page.replace("scores by answer", "")


@pytest.mark.parametrize("rows_too", [False, True])
def test_a_row_that_is_left_out_unsaid_is_missed(hba, mini_atlas, scored, tmp_path, rows_too):
    gone = []

    def without_the_first(lines):
        gone.append(lines[0])
        return lines[1:]

    def fewer(record):
        del record["asked_ids"]
        record["asked"][gone[0]["dataset"]] -= 1
        record["data"]["rows"] -= rows_too
        return record

    bundle = forged(hba, scored, tmp_path, mini_atlas, without_the_first, fewer)
    code, _, err = hba("verify", bundle, *(["--atlas", mini_atlas] if rows_too else []))
    assert code == 1 and ("and the atlas has" if rows_too else "were asked for, skipped") in err, err


def test_a_label_that_has_no_probability_is_not_the_most_probable(tmp_path):
    line = {"id": "a", "dataset": "meld_emotion", "task": "x", "split": "test", "target": "joy", "output": None}
    forged = module.Prediction(**line, answer=None, label="joy", error=None, probs={"anger": 1.0})
    (tmp_path / "predict.json").write_text("{}")
    assert "not its most probable" in module._label_differs(tmp_path, [forged], [], [])


def test_a_bundle_says_what_the_run_ran_on_and_never_what_packed_it(hba, mini_atlas, scored, tmp_path):
    assert hba("bundle", scored, tmp_path / "a.zip")[0] == 0
    with zipfile.ZipFile(tmp_path / "a.zip") as packed:
        said = json.loads(packed.read("environment.json"))
    assert said["command"] == "predict" and said["started_at"] and said["data"]["rows"] > 0
    other = edited(["data", "fingerprint"], "of other rows")
    code, _, err = hba("verify", changed(tmp_path / "a.zip", tmp_path / "b.zip", environment_json=other))
    assert code == 1 and "environment.json: is of a run over other rows" in err, err
    shutil.copytree(scored, tmp_path / "run")
    (tmp_path / "run" / "environment.json").unlink()
    code, _, err = hba("bundle", tmp_path / "run", tmp_path / "c.zip")
    assert code == 0 and "does not say what it ran on" in err
    with zipfile.ZipFile(tmp_path / "c.zip") as packed:
        assert "environment.json" not in packed.namelist()
    code, _, err = hba("verify", tmp_path / "c.zip")
    assert code == 0 and "does not say what the rows were predicted on" in err, err


def test_a_baseline_is_verified_without_a_warning(hba, mini_atlas, tmp_path):
    """Its words are the answer, of rows with labels and of free-form ones."""
    assert hba("predict", "majority", "--atlas", mini_atlas, "--per-dataset", "2", "--run", tmp_path / "run")[0] == 0
    assert hba("score", tmp_path / "run")[0] == 0 and hba("bundle", tmp_path / "run", tmp_path / "a.zip")[0] == 0
    code, _, err = hba("verify", tmp_path / "a.zip")
    assert (code, err) == (0, "")
    forged = first_line(lambda p: p | {"output": "who knows", "probs": None})
    code, _, err = hba("verify", changed(tmp_path / "a.zip", tmp_path / "b.zip", predictions_jsonl=forged))
    assert "1 answer in words says no rule by which it was read: " in err and "labels are taken as they are" in err, err


def test_a_size_that_lies_and_what_is_no_zip_are_refused(hba, scored, tmp_path):
    assert hba("bundle", scored, tmp_path / "a.zip")[0] == 0
    data = (tmp_path / "a.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as packed:
        size = packed.getinfo("metrics.json").file_size
    (tmp_path / "b.zip").write_bytes(data.replace(size.to_bytes(4, "little"), (size - 9).to_bytes(4, "little")))
    (tmp_path / "c.zip").write_bytes(data[: len(data) // 2])
    (tmp_path / "d.zip").write_bytes(b"")
    for name in ("b.zip", "c.zip", "d.zip", "none.zip"):
        code, out, err = hba("verify", tmp_path / name)
        assert (code, out) == (2, "") and name in err, err


def test_a_folder_of_bundles_becomes_a_site(hba, mini_atlas, scored, tmp_path):
    (tmp_path / "in").mkdir()
    assert hba("bundle", scored, tmp_path / "in" / "words.zip")[0] == 0
    majority = tmp_path / "majority"
    assert hba("predict", "majority", "--atlas", mini_atlas, "--per-dataset", "2", "--run", majority)[0] == 0
    assert hba("score", majority)[0] == 0 and hba("bundle", majority, tmp_path / "in" / "index.zip")[0] == 0
    code, out, err = hba("leaderboard", tmp_path / "in", "--site", tmp_path / "site", "--json")
    assert code == 0, err
    assert {row["name"] for row in json.loads(out)["entries"] if not row["published"]} == {"words", "index-1"}
    files = names(tmp_path / "site")
    assert files == ["index-1.html", "index-1.zip", "index.html", "words.html", "words.zip"]
    page = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert 'href="words.html"' in page and 'href="words.zip"' in page and "https://" not in page.partition("<body")[2]
    shutil.rmtree(tmp_path / "site")
    changed(tmp_path / "in" / "words.zip", tmp_path / "in" / "words.zip", metrics_json=another_score)
    code, _, err = hba("leaderboard", tmp_path / "in", "--site", tmp_path / "site")
    assert code == 1 and "words.zip: the numbers do not follow" in err
    assert not (tmp_path / "site" / "words.html").exists()


def test_what_is_not_scored_makes_no_bundle(hba, scored, tmp_path):
    shutil.copytree(scored, tmp_path / "run")
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    (tmp_path / "run" / "predictions.jsonl").write_text("\n".join(lines[1:]) + "\n")
    code, _, err = hba("bundle", tmp_path / "run", tmp_path / "a.zip")
    assert code == 2 and "changed since it was scored" in err
    for arguments, said in (
        (["verify", tmp_path / "run"], "is a folder, not a bundle. Fix: Pack it first, if it is a run: hba bundle "),
        (["bundle", tmp_path], "is no run: it holds no predictions"),
    ):
        code, out, err = hba(*arguments)
        assert (code, out) == (2, "") and said in err, err
    (tmp_path / "run" / "metrics.json").unlink()
    code, _, err = hba("bundle", tmp_path / "run", tmp_path / "a.zip")
    assert code == 2 and "is not scored" in err and not (tmp_path / "a.zip").exists()


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("/Users/Jane Doe/data/x.mp4", "x.mp4"),
        (r"C:\Users\Jane Doe\x.mp4", "x.mp4"),
        ("file:///home/jane/x/y", "y"),
        ("not read: file:///home/jane/x/y", "not read: y"),
        ("see:/home/jane/secret/x", "see:x"),
        ("../../jane/data/x", "x"),
        ({"api_key": "plainsecret123", "max_tokens": 5}, {"api_key": "[key]", "max_tokens": 5}),
        ({"api-key": "plainsecret123", "of": [{"TOKEN": "abc"}]}, {"api-key": "[key]", "of": [{"TOKEN": "[key]"}]}),
        ("https://h:80/v1/models and/or models/speak, 3/4/5", "https://h:80/v1/models and/or models/speak, 3/4/5"),
        ("cannot read /a/b.mp4, /a/c.mp4", "cannot read b.mp4, c.mp4"),
    ],
)
def test_places_and_keys_are_taken_out_of_what_is_said(said, left):
    assert module.cleaned(said) == left and module.cleaned(left) == left
