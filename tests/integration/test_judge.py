"""`hba judge` against servers that judge well, are misled by the answers, or fail."""

import json
from dataclasses import replace

import pytest
from free_form_run import make_run

from hba.errors import HbaError, InputError
from hba.evaluate.judge.agreement import CANARIES
from hba.evaluate.judge.items import read_judgements
from hba.evaluate.judge.run import JudgeConfig, judge_run
from hba.remote import ClientConfig, ServiceError

FAULTS = {"429": 0.04, "500": 0.04, "hang": 0.01, "drop": 0.03, "cut": 0.02, "malformed": 0.03, "slow": 0.02,
          "strange": 0.02, "slow_seconds": 0.1, "hang_seconds": 5.0, "retry_after": "0.05"}  # fmt: skip


def config(server, provider="openai", *, timeout=120.0, **changes):
    client = ClientConfig(base_url=server.url, provider=provider, first_backoff_seconds=0.01, timeout_seconds=timeout)
    return JudgeConfig(remote=client, **changes)


def judge(run, settings, **options):
    return judge_run(run, model="m", config=settings, progress=lambda tally: None, **options)


def expected(run):
    """What a compliant judge says, by id."""
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    return {p["id"]: p["answer"].lower() == p["target"] for p in lines if p["answer"]}


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_every_answer_gets_its_own_verdict_through_every_fault(chat_server, tmp_path, provider):
    make_run(tmp_path, 300)
    server = chat_server("judge", seed=3, **FAULTS)
    judged = judge(tmp_path / "run", config(server, provider, timeout=3.0))
    assert {j.id: j.correct for j in judged.judgements} == expected(tmp_path / "run")
    assert {j.model for j in judged.judgements} == {"m"}
    lines = (tmp_path / "run" / "judgements.jsonl").read_text().splitlines()
    stats = server.stats()
    late = judged.usage["retries"].get("timeout", 0) - stats["faults"]["hang"]  # of a busy machine: asked again
    assert len(lines) == 294 == stats["distinct"] and stats["answered_twice"] <= late


def test_a_misled_judge_gives_no_verdict_and_nothing_is_guessed(chat_server, tmp_path):
    make_run(tmp_path, 19)
    server = chat_server("misled")
    judged = judge(tmp_path / "run", config(server))
    assert len(judged.unjudged) == len(judged.judgements) == 19
    assert all("no verdict in 3 replies" in j.error and j.attempts == 3 for j in judged.judgements)
    assert server.stats()["requests"] == 3 * 19


def test_a_judge_without_a_verdict_on_its_first_answers_stops_and_leaves_the_folder_free(chat_server, tmp_path):
    make_run(tmp_path, 300)
    run, server = tmp_path / "run", chat_server("misled")
    with pytest.raises(HbaError, match=r"no verdict on the first 20 answers: no verdict in 3 replies \(the last: .*'"):
        judge(run, config(server))
    kept = read_judgements(run / "judgements.jsonl").values()
    assert len(kept) == 20 and all(j.correct is None and len(j.replies) == 3 for j in kept)
    assert server.stats()["requests"] < 300
    good = chat_server("judge")
    judged = judge(run, config(good, temperature=None))  # another judge, in the same folder
    assert {j.id: j.correct for j in judged.judgements} == expected(run) and judged.warnings == []


def test_raw_replies_are_kept_and_a_bad_one_is_quoted(chat_server, tmp_path):
    make_run(tmp_path, 10)
    server = chat_server("judge", say=[["clip 7?", 200, prose("I think so,\nsurely.")]])
    judged = judge(tmp_path / "run", config(server))
    (odd,) = judged.unjudged
    assert odd.replies == ("I think so,\nsurely.",) * 3
    said = "not one JSON object: 'I think so, surely.' (it ended by stop)"
    assert odd.error == f"no verdict in 3 replies (the last: {said})"
    assert all(json.loads(j.replies[0])["correct"] is j.correct for j in judged.judgements if j.correct is not None)


def prose(text):
    return {"model": "m", "choices": [{"message": {"content": text}, "finish_reason": "stop"}]}


def test_no_canary_moves_a_verdict(chat_server, tmp_path, hba):
    server = chat_server("judge")
    arguments = ["--model", "m", "--base-url", server.url, "--no-cache", "--json"]
    code, out, err = hba("judge", "--calibrate", "canaries", "--out", tmp_path / "c", *arguments)
    found = json.loads(out)
    assert code == 0 and found["false_positive"] == 0 and "warning" not in err  # they are all incorrect, as they are
    judgements = read_judgements(tmp_path / "c" / "judgements.jsonl")
    assert len(judgements) >= 60 and {j.correct for j in judgements.values()} == {False}
    assert found["accuracy"] == 1.0
    assert json.loads((tmp_path / "c" / "calibration.json").read_text()) == found


def test_a_calibration_without_one_verdict_has_failed(chat_server, tmp_path, hba):
    arguments = ["--model", "m", "--base-url", chat_server("misled").url, "--no-cache", "--json"]
    code, _, err = hba("judge", "--calibrate", "canaries", "--out", tmp_path / "c", *arguments)
    assert code == 1 and "no verdict on the first 20 answers" in err
    judgements = read_judgements(tmp_path / "c" / "judgements.jsonl")
    assert len(judgements) == 20 and {j.correct for j in judgements.values()} == {None}
    few = CANARIES.read_text().splitlines()[:5]
    (tmp_path / "few.jsonl").write_text("\n".join(few))
    code, out, err = hba("judge", "--calibrate", tmp_path / "few.jsonl", "--out", tmp_path / "d", *arguments)
    assert code == 1 and json.loads(out)["n"] == 0 and "not one verdict to compare (no verdict in 3 replies" in err


def test_verdicts_that_are_all_equal_are_warned_of(chat_server, tmp_path, hba):
    make_run(tmp_path, 60)
    path = tmp_path / "run" / "predictions.jsonl"
    wrong = [line for line in path.read_text().splitlines() if "something else" in line]
    path.write_text("\n".join(wrong) + "\n")
    command = ["judge", tmp_path / "run", "--model", "m", "--base-url", chat_server("judge").url, "--no-cache"]
    code, _, err = hba(*command)
    assert code == 0 and f"all {len(wrong)} verdicts are 'incorrect'. Such a judge may judge nothing" in err


def test_a_judge_takes_extra_fields_and_does_without_a_parameter(chat_server, tmp_path, hba):
    make_run(tmp_path, 10)
    server = chat_server("judge", takes_no=["temperature", "response_format"])
    command = ["judge", tmp_path / "run", "--model", "m", "--base-url", server.url, "--no-cache"]
    code, _, err = hba(*command, "extra={reasoning_effort: low}", "remote.max_concurrency=1")
    assert code == 0 and "the service refuses a parameter: temperature left out (Unsupported parameter" in err
    assert server.stats()["requests"] == 10 + 2
    made = json.loads((tmp_path / "run" / "judge.json").read_text())
    assert made["extra"] == {"reasoning_effort": "low"} and made["temperature"] == 0.0
    code, out, _ = hba("score", tmp_path / "run", "--json")
    judge_of = json.loads(out)["provenance"]["judge"]
    assert judge_of["left_out"] == {"temperature left out": 10, "response_format left out": 10}
    assert judge_of["answered_by"] == {"m": 10}
    code, _, err = hba(*command, "extra={api_key: AIzaSyD0123456789}")
    assert code == 2 and "AIza" not in err


def test_an_outage_leaves_answers_open_and_the_same_command_asks_them(chat_server, tmp_path):
    make_run(tmp_path, 60)
    away = chat_server("judge", close_after=30)
    settings = config(away, max_tokens=99)
    with pytest.raises(ServiceError, match=r"in a row had no reply .*we are away.*; 30 of 59 answers are done"):
        judge(tmp_path / "run", with_attempts(settings, 2))
    assert len(read_judgements(tmp_path / "run" / "judgements.jsonl")) == 30
    back = chat_server("judge")
    judged = judge(tmp_path / "run", config(back, max_tokens=99))
    assert judged.unjudged == [] and back.stats()["requests"] == 29


def test_a_short_outage_at_the_end_leaves_answers_open_too(chat_server, tmp_path, hba):
    make_run(tmp_path, 40)
    server = chat_server("judge", close_after=35)
    command = ["judge", tmp_path / "run", "--model", "m", "--no-cache", "remote.max_attempts=2"]
    command += ["remote.first_backoff_seconds=0.01"]
    code, out, err = hba(*command, "--base-url", server.url, "--json")
    said = json.loads(out)
    assert code == 1 and said["n_unanswered"] == said["n_unjudged"] == 5 and "Run the same command again" in err
    code, out, _ = hba(*command, "--base-url", chat_server("judge").url, "--json")
    assert code == 0 and json.loads(out)["usage"]["requests"] == 5


def with_attempts(settings, attempts):
    return replace(settings, remote=replace(settings.remote, max_attempts=attempts))


def test_a_malformed_verdict_is_asked_for_again_and_then_left_open(chat_server, tmp_path):
    make_run(tmp_path, 200)
    server = chat_server("flaky")
    judged = judge(tmp_path / "run", config(server))
    truth = expected(tmp_path / "run")
    assert 0 < len(judged.unjudged) < 10
    assert all(j.correct == truth[j.id] for j in judged.judgements if j.correct is not None)
    assert {j.attempts for j in judged.judgements if j.correct is not None} == {1, 2, 3}
    again = judge(tmp_path / "run", config(server), retry_unjudged=True)
    assert again.unjudged == judged.unjudged and again.usage["requests"] == 3 * len(judged.unjudged)
    before = server.stats()["requests"]
    judge(tmp_path / "run", config(server))
    assert server.stats()["requests"] == before  # what is unjudged is not asked again unless told to


def test_one_refused_row_does_not_lose_the_run(chat_server, tmp_path):
    make_run(tmp_path, 60)
    server = chat_server("judge", refuse="clip 7?")
    judged = judge(tmp_path / "run", config(server))
    (open_,) = judged.unjudged
    assert open_.id == "test/8" and "HTTP 400: this is refused" in open_.error
    truth = expected(tmp_path / "run")
    assert {j.id: j.correct for j in judged.judgements} == truth | {"test/8": None}
    fine = chat_server("judge")
    assert {j.id: j.correct for j in judge(tmp_path / "run", config(fine), retry_unjudged=True).judgements} == truth
    assert fine.stats()["requests"] == 1


def test_a_server_that_refuses_everything_stops_the_command_and_leaves_the_rest_open(chat_server, tmp_path):
    make_run(tmp_path, 100)
    server = chat_server("judge", refuse="clip")
    with pytest.raises(ServiceError, match=r"every one of \d+ requests failed, the last: HTTP 400"):
        judge(tmp_path / "run", config(server))
    assert server.stats()["requests"] < 60


def test_all_requests_share_one_pool_of_connections(chat_server, tmp_path):
    """And not a client for each of them."""
    make_run(tmp_path, 200)
    server = chat_server("judge", latency=0.02)
    judge(tmp_path / "run", JudgeConfig(remote=ClientConfig(base_url=server.url, max_concurrency=8)))
    assert server.stats()["connections"] <= 8 + 1  # one asks for these figures


def test_a_command_that_came_to_nothing_leaves_the_folder_to_another_judge(chat_server, tmp_path):
    make_run(tmp_path, 10)
    run, server = tmp_path / "run", chat_server("judge")
    with pytest.raises(InputError, match="no API key"):
        judge(run, JudgeConfig(remote=ClientConfig(base_url=server.url, api_key_env="NOT_SET")))
    assert len(judge(run, config(server, temperature=None)).judgements) == 10


def test_a_server_without_schemas_is_asked_in_words(chat_server, tmp_path):
    make_run(tmp_path, 20)
    strict = chat_server("judge", refuse="response_format")
    assert judge(tmp_path / "run", config(strict, structured=False)).unjudged == []


def test_verdicts_are_those_of_one_judge_and_of_these_answers(chat_server, tmp_path):
    make_run(tmp_path, 20)
    run, server = tmp_path / "run", chat_server("judge")
    judge(run, config(server))
    with pytest.raises(InputError, match="another temperature"):
        judge(run, config(server, temperature=None))
    assert len(judge(run, config(server, temperature=None), out=tmp_path / "other").judgements) == 20
    path = run / "predictions.jsonl"
    path.write_text(path.read_text().replace("something else 2", "anything else"))
    with pytest.raises(InputError, match="the verdict on 'test/3' is about another answer"):
        judge(run, config(server))


def test_the_command_judges_resumes_and_counts(chat_server, tmp_path, hba, monkeypatch):
    monkeypatch.setenv("HBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-0123456789")
    make_run(tmp_path, 30)
    server = chat_server("judge", refuse="clip 3?")
    arguments = ["judge", tmp_path / "run", "--model", "m", "--base-url", server.url, "remote.api_key_env=JUDGE_KEY"]
    code, out, err = hba(*arguments, "--json")
    found = json.loads(out)
    assert code == 1 and "unjudged test/4: HTTP 400" in err and "1 answer has no verdict" in err
    assert found["n"] == 30 and found["n_unjudged"] == 1 and found["usage"]["cost_usd"] is None
    assert found["datasets"]["siq2"] == {"n": 10, "n_correct": 6, "n_unjudged": 1}
    code, out, _ = hba(*arguments, "--allow-unjudged", "1")
    assert code == 0 and "Judgements" in out and "0 requests" in out
    code, out, _ = hba(*arguments, "--out", tmp_path / "copy", "--allow-unjudged", "1", "--json")
    assert json.loads(out)["usage"]["cached"] == 29  # another folder, the same questions
    code, out, _ = hba("judge", tmp_path / "run", "--calibrate", tmp_path / "copy" / "judgements.jsonl", "--json")
    assert code == 0 and json.loads(out)["kappa"] == 1.0 and json.loads(out)["n_unjudged"] == 1
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"sk-secret" in path.read_bytes() for path in kept)


def test_what_is_missing_is_said(hba, tmp_path):
    assert hba("judge", tmp_path)[0] == 2
    for arguments, named in [
        (["--model", "m"], "RUN: is missing"),
        ([tmp_path, "--base-url", "http://x"], "--model: is missing"),
        (["--calibrate", "canaries", "--model", "m"], "--out: is missing"),
        ([tmp_path, "--model", "m", "--provider", "nobody"], "provider"),
        ([tmp_path, "--model", "m", "client.base_url=http://x/v1"], "Fix: Write remote.base_url=..."),
        ([tmp_path, "--model", "m", "--provider", "anthropic", "remote.api_key_env=NOT_SET"], "predictions.jsonl"),
    ]:
        code, _, err = hba("judge", *arguments)
        assert code == 2 and named in err, err


def test_offline_similarity_is_named_as_what_it_is(tmp_path, hba):
    make_run(tmp_path, 30)
    code, out, _ = hba("judge", tmp_path / "run", "--offline", "--json")
    found = json.loads(out)
    assert code == 0 and "not comparable with judge accuracy" in found["note"]
    assert set(found["datasets"]) == {"siq2", "intentqa", "mimeqa"} and "llm_judge_accuracy" not in out
    assert not (tmp_path / "run" / "judgements.jsonl").exists()
    rows = json.loads((tmp_path / "run" / "embedding_similarity.json").read_text())["rows"]
    assert rows["test/1"] == 1.0 and rows["test/3"] < 0.9 and len(rows) == 30
    code, out, _ = hba("judge", tmp_path / "run", "--offline")
    assert code == 0 and "not comparable" in out


def test_from_an_atlas_to_judged_scores(chat_server, tmp_path, mini_atlas, hba):
    """Predict through one server, judge through another: the questions are those of the rows, whatever the split."""
    speaker, judge_ = chat_server("kinds"), chat_server("judge")
    run = tmp_path / "run"
    atlas = ["--atlas", mini_atlas, "--split", "test[:40]", "--run", run]
    code, _, err = hba("predict", "m", "--backend", "openai", *atlas, f"remote.base_url={speaker.url}", "--json")
    assert code == 0, err
    code, out, err = hba("judge", run, "--model", "j", "--base-url", judge_.url, "--no-cache", "--json")
    found = json.loads(out)
    assert code == 0 and found["n"] > 0 and found["n_unjudged"] == 0, err
    code, out, _ = hba("score", run, "--json")
    scores = json.loads(out)["tasks"]
    assert {key: scores[key]["score"] for key in ("SOC", "INT", "NVC") if key in scores} == {
        key: 0.0 for key in ("SOC", "INT", "NVC") if key in scores
    }
    assert json.loads(out)["provenance"]["judge"]["model"] == "j"


def test_a_dry_run_counts_requests_tokens_and_cost_and_asks_nothing(tmp_path, hba, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    make_run(tmp_path, 60)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    command = ["judge", tmp_path / "run", "--model", "gpt-5-nano", "--dry-run", "temperature=null"]
    code, out, _ = hba(*command, "--json")
    said = json.loads(out)
    assert code == 0 and said["left"] == said["rows"] == 59 == sum(said["datasets"].values())
    assert said["requests_at_most"] == 3 * 59 and said["tokens_out_at_most"] == 3 * 59 * 2048
    cost = (said["tokens_in"] * 0.05 + said["tokens_out_at_most"] * 0.4) / 1e6
    assert said["cost_usd_at_most"] == pytest.approx(cost)
    once = json.loads(hba(*command, "attempts=1", "--json")[1])
    assert once["tokens_in"] * 3 == said["tokens_in"] > 59 * 3 * 200  # the rubric is sent with each
    assert "59; 177 at most" in hba(*command)[1]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_a_dry_run_of_what_is_left_goes_by_the_verdicts_that_are_there(chat_server, tmp_path, hba):
    make_run(tmp_path, 60)
    server = chat_server("judge")
    (tmp_path / "prices.yaml").write_text("openai:\n  m: {input: 1000.0, output: 2000.0}\n")
    judged = ["--model", "m", "--base-url", server.url, "--no-cache", f"remote.prices={tmp_path / 'prices.yaml'}"]
    command = ["judge", tmp_path / "run", *judged, "--json"]
    whole = json.loads(hba(*command)[1])["usage"]
    verdicts = tmp_path / "run" / "judgements.jsonl"
    verdicts.write_text("".join(verdicts.read_text().splitlines(keepends=True)[:9]))
    said = json.loads(hba(*command, "--dry-run")[1])
    assert (said["left"], said["measured"]) == (50, True)
    asked = server.stats()["requests"]
    rest = json.loads(hba(*command)[1])["usage"]
    assert rest["requests"] == 50 == server.stats()["requests"] - asked
    assert said["cost_usd_at_most"] == pytest.approx(rest["cost_usd"], rel=0.05)
    assert said["tokens_in"] == pytest.approx(whole["tokens_in"] * 50 / 59, rel=0.05)
    other = hba("judge", tmp_path / "run", "--model", "other", "--base-url", server.url, "--dry-run")
    assert other[0] == 2 and "another model" in other[2]
    labels = hba("judge", "--calibrate", "canaries", *judged, "--out", tmp_path / "c", "--dry-run", "--json")
    assert json.loads(labels[1])["left"] == 72 and not (tmp_path / "c").exists()
    assert hba("judge", tmp_path / "run", "--offline", "--dry-run")[0] == 2
