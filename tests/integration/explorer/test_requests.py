"""What the explorer's server answers, and what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest
from holding import PATIENCE, begins_and_ends, until
from hypothesis import given, settings
from hypothesis import strategies as st

from hba import open_atlas
from hba.atlas.convert import convert_atlas
from hba.errors import InputError
from hba.evaluate.score import score_run
from hba.explorer import media
from hba.explorer.media import MAX_RANGE_BYTES, Decoder, parse_range
from hba.explorer.server import bind, create_app


def sound_row(served):
    return next(s for s in open_atlas(served.atlas, split="test") if s.audios)


def test_ranges_of_a_medium_are_its_bytes(served):
    row = sound_row(served)
    whole = (served.atlas / open_atlas(served.atlas, split="test").row(row.number).audios[0]).read_bytes()
    address = f"/media/test/{row.number}/audios/0"
    assert served.get(address).content == whole
    part = served.get(address, headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, whole[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(whole)}"
    assert served.get(address, headers={"range": "bytes=-4"}).content == whole[-4:]
    beyond = (f"bytes={len(whole)}-", "bytes=" + "9" * 40 + "-")
    for asked in (*beyond, "bytes=5-2", "bytes=-0", "bytes=0-1,3-4", "lines=1-2"):
        assert served.get(address, headers={"range": asked}).status_code == 416, asked


def test_media_come_out_of_shards_as_out_of_files(served, serve, tmp_path):
    convert_atlas(served.atlas, tmp_path / "shards", to="parquet", workers=1, splits=["test"])
    row = sound_row(served)
    app = create_app(atlas=tmp_path / "shards", runs=None, cache_folder=tmp_path / "cache")
    with serve(app) as url:
        address = f"/media/test/{row.number}/audios/0"
        assert httpx.get(url + address, timeout=600).content == served.get(address).content
        part = httpx.get(url + address, headers={"range": "bytes=3-8"}, timeout=600)
        assert part.content == served.get(address).content[3:9]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_dataset_on_the_hub_is_shown_as_it_was_at_the_start(served, serve, hub, mini_atlas, tmp_path, form):
    release, row = mini_atlas, sound_row(served)
    if form == "parquet":
        release = tmp_path / "release"
        convert_atlas(mini_atlas, release / "data", to="parquet", workers=1, splits=["test"])
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "test.jsonl").write_text("no row")
    address = f"/media/test/{row.number}/audios/0"
    for asks in (True, False):
        hub.add("org/mini", release)
        app = create_app(atlas="org/mini", runs=None, cache_folder=tmp_path / "cache")
        with serve(app) as url:
            hub.add("org/mini", tmp_path / "later")
            asked = len(hub.requests)
            assert row.id in httpx.get(url + f"/atlas?split=test&dataset={row.dataset}", timeout=600).text
            assert hub.fetched(asked) == []
            assert httpx.get(url + address, timeout=600).content == served.get(address).content
            assert bool(hub.fetched(asked)) == asks
            assert row.id in httpx.get(url + f"/sample/test/{row.number}", timeout=600).text
    assert len(list((tmp_path / "cache" / "explorer").glob("*.sqlite"))) == 1


def test_a_hub_that_is_away_is_told_at_the_start(hub, tmp_path):
    with pytest.raises(InputError, match="org/nothing"):
        create_app(atlas="org/nothing", runs=None, cache_folder=tmp_path / "cache")


@pytest.mark.parametrize(
    "address",
    [
        "/media/test/0/audios/99", "/media/test/99999/audios/0", "/media/../0/audios/0", "/media/nosplit/0/audios/0",
        "/media/test/0/problem/0", "/media/test/0/..%2f..%2fetc/0", "/media/test/0/%2e%2e/0", "/static/..%2fapp.py",
        "/static/../app.py", "/run?run=../atlas", "/run?run=/etc", "/scores?run=%2e%2e%2fatlas",
        "/predictions?a=nobody",
        "/prediction?split=test&id=forged", "/picture/source/test/0/audios/0", "/sample/test/-1", "/atlas?page=0",
        "/atlas?page=x", "/atlas?least=x", "/predictions?a=a&verdict=1%3D1", "/snapshot?of=http://elsewhere/atlas",
        "/snapshot?of=/static/explorer.js", "/snapshot?of=/media/test/0/audios/0",
    ],
)  # fmt: skip
def test_forged_names_are_refused(served, address):
    request = httpx.Request("GET", served.url)
    # Not through httpx's own URL, which would tidy '..' away before it is sent.
    target = address.encode()
    url = request.url.copy_with(raw_path=target)
    with httpx.Client(timeout=600) as client:
        answer = client.send(httpx.Request("GET", url, extensions={"target": target}))
    assert answer.status_code == 404
    assert "root:" not in answer.text and "def create_app" not in answer.text


def test_a_medium_that_leads_outside_is_not_served(serve, tmp_path):
    atlas = tmp_path / "atlas"
    atlas.mkdir()
    (tmp_path / "secret.wav").write_bytes(b"RIFF" + bytes(60))
    row = {"problem": "x", "answer": "sarcasm", "dataset": "mmsd", "task": "sarcasm_cls",
           "modality_signature": "text_audio", "audios": ["link.wav"]}  # fmt: skip
    (atlas / "link.wav").symlink_to(tmp_path / "secret.wav")
    (atlas / "test.jsonl").write_text(json.dumps(row) + "\n")
    app = create_app(atlas=atlas, runs=None, cache_folder=tmp_path / "cache")
    with serve(app) as url:
        answer = httpx.get(url + "/media/test/0/audios/0", timeout=600)
    assert answer.status_code != 200 and b"RIFF" not in answer.content


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"}, 403),
        ({"host": "evil.example"}, 421),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}, 200),
        ({"sec-fetch-site": "same-origin"}, 200),
    ],
)
def test_other_sites_are_refused(served, headers, status):
    assert served.get("/atlas", headers=headers).status_code == status


def test_another_site_cannot_save_a_verdict(served):
    before = (served.runs / "a" / "human_verdicts.jsonl").exists()
    form = {"run": "a", "id": "test/0", "decision": "right"}
    for headers in ({"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}):
        assert httpx.post(served.url + "/judge", data=form, headers=headers, timeout=600).status_code == 403
    assert (served.runs / "a" / "human_verdicts.jsonl").exists() == before


@pytest.mark.parametrize(
    "form, status",
    [({"run": "../x", "id": "1", "decision": "right"}, 404), ({"run": "a", "id": "forged", "decision": "right"}, 404),
     ({"run": "a", "id": "test/0", "decision": "maybe"}, 404), ({"run": "a", "id": "x" * 20_000}, 413)],
)  # fmt: skip
def test_forged_verdicts_are_refused(served, form, status):
    assert httpx.post(served.url + "/judge", data=form, timeout=600).status_code == status


@pytest.fixture(scope="module")
def guarded(served, serve, tmp_path_factory):
    """An explorer with a token over the atlas and the runs."""
    cache = tmp_path_factory.mktemp("guarded")
    app = create_app(atlas=served.atlas, runs=served.runs, cache_folder=cache, token="secret")
    with serve(app) as url:
        yield url, app


def test_without_the_token_nothing_is_given_by_any_route(served, guarded):
    url, app = guarded
    words = {"split": "test", "kind": "sound", "field": "audios"}
    addresses = [re.sub(r"{(\w+)(:int)?}", lambda m: words.get(m[1], "0"), route.path) for route in app.routes]
    assert {"/atlas", "/media/test/0/audios/0", "/judge", "/static"} <= set(addresses)
    for address in (*addresses, "/static/explorer.js", "/nowhere"):
        for more in ({}, {"params": {"token": "wrong"}}, {"headers": {"cookie": "hba_token_0=secret; token=secret"}}):
            answer = httpx.get(url + address, **more, timeout=600)
            assert answer.status_code == 403 and "hba explore</code> printed" in answer.text, address
            assert "secret" not in answer.text and "set-cookie" not in answer.headers
    form = {"run": "a", "id": "test/0", "decision": "right"}
    assert httpx.post(url + "/judge", data=form, timeout=600).status_code == 403
    upgrade = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13", "sec-websocket-key": "a"}
    assert httpx.get(url + "/atlas", headers=upgrade, timeout=600).status_code == 403


def test_the_token_comes_once_and_stays_in_a_cookie_of_its_port(guarded):
    url, _ = guarded
    port = url.rpartition(":")[2]
    with httpx.Client(base_url=url, timeout=600) as client:
        first = client.get("/runs?run=a&token=secret")
        assert first.status_code == 200 and 'url=/runs?run=a"' in first.text and "secret" not in first.text
        assert first.headers["referrer-policy"] == "no-referrer"
        cookie = first.headers["set-cookie"]
        assert cookie.startswith(f"hba_token_{port}=secret") and "HttpOnly" in cookie and "SameSite=strict" in cookie
        assert client.get("/runs").status_code == 200
        assert client.get("/static/explorer.js").status_code == 200
        for path, place in (("//evil.example/x", "/evil.example/x"), ("/%5Cevil.example", "/evil.example"),
                            ("/%22%3E%3Cb", "/%22%3E%3Cb")):  # fmt: skip
            assert f'url={place}"' in client.get(f"{url}{path}?token=secret").text


def test_names_other_than_this_machines_are_for_servers_beyond_loopback(served, serve, tmp_path):
    headers = {"host": "machine.example:8377", "cookie": "hba_token_8377=secret"}
    for only_loopback, status in ((True, 421), (False, 200)):
        about = {"token": "secret", "only_loopback": only_loopback}
        with serve(create_app(atlas=None, runs=served.runs, cache_folder=tmp_path, **about)) as url:
            assert httpx.get(url + "/runs", headers=headers, timeout=600).status_code == status


@contextmanager
def explore(atlas, cache, *more, env=None):
    """`hba explore` as a user starts it: (process, printed address, file of what it says)."""
    command = [sys.executable, "-m", "hba", "explore", "--atlas", atlas, "--runs", atlas, "--port", 0, "--cache", cache]
    said = Path(tempfile.mkdtemp(dir=cache.parent)) / "said"
    with said.open("w") as out:
        process = subprocess.Popen([*map(str, command), *more], stdout=out, stderr=out, env=env)
    try:
        deadline = time.monotonic() + 900
        while not (found := re.search(r"http://\S+", said.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, said.read_text()
            time.sleep(0.05)
        yield process, found[0], said
    finally:
        process.kill()
        process.wait()


def test_the_command_prints_a_token_opens_it_unseen_and_logs_it_nowhere(served, tmp_path):
    """BROWSER names what opens pages: a program that keeps its arguments and what it was to open."""
    seen = tmp_path / "seen"
    (tmp_path / "browser").write_text(f'#!/bin/sh\necho "$1" > {seen}.url\ncp "${{1#file://}}" {seen}.html\n')
    (tmp_path / "browser").chmod(0o755)
    env = {**os.environ, "BROWSER": f"{tmp_path}/browser %s"}
    with explore(served.atlas, tmp_path / "cache", "--browser", env=env) as (process, address, said):
        url, _, token = address.partition("/?token=")
        assert len(token) >= 32
        with httpx.Client(base_url=url, timeout=600) as client:
            assert client.get("/atlas").status_code == 403
            assert client.get(f"/?token={token}").status_code == 200
            assert client.get("/atlas").status_code == 200
            assert client.get("/run?run=none").status_code == 404
        assert said.read_text().count(token) == 1
        deadline = time.monotonic() + 600
        while not Path(f"{seen}.html").is_file() or token not in Path(f"{seen}.html").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert token not in Path(f"{seen}.url").read_text()
        page = Path(Path(f"{seen}.url").read_text().strip().removeprefix("file://"))
        assert page.stat().st_mode & 0o077 == 0 and page.parent.stat().st_mode & 0o077 == 0
        process.send_signal(signal.SIGINT)
        process.wait(600)
    assert not page.exists() and not list((tmp_path / "cache" / "explorer").glob(".open-*"))
    assert said.read_text().count(token) == 1


def test_what_a_killed_explorer_leaves_goes_with_the_next_and_a_signal_leaves_nothing(served, tmp_path):
    (tmp_path / "tmp").mkdir()
    env, cache = os.environ | {"TMPDIR": str(tmp_path / "tmp")}, tmp_path / "cache"

    def folders():
        return list((cache / "explorer").glob(".open-*"))

    with explore(served.atlas, cache, env=env):
        (left,) = folders()  # it is killed
    with explore(served.atlas, cache, env=env) as (process, *_):
        assert left not in folders() and len(folders()) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(600) == 128 + signal.SIGTERM
    assert folders() == [] and list((tmp_path / "tmp").iterdir()) == []


def test_no_token_is_for_loopback_alone(served, tmp_path):
    with explore(served.atlas, tmp_path / "cache", "--no-token") as (_, address, _):
        assert "token" not in address and httpx.get(address + "atlas", timeout=600).status_code == 200
    with pytest.raises(InputError, match="SSH tunnel"):
        bind("0.0.0.0", 0, with_token=False)


def test_two_explorers_share_an_index_and_one_that_is_killed_leaves_it_to_the_other(tmp_path):
    rows, atlas, cache = 60_000, tmp_path / "atlas", tmp_path / "cache"
    atlas.mkdir()
    row = {"problem": "x", "answer": "sarcasm", "dataset": "mmsd", "task": "sarcasm_cls", "modality_signature": "text"}
    (atlas / "test.jsonl").write_text((json.dumps(row) + "\n") * rows)

    def counts(url):
        return int(re.search(r"([\d,]+) samples", httpx.get(url + "atlas", timeout=600).text)[1].replace(",", ""))

    with explore(atlas, cache, "--no-token") as first, explore(atlas, cache, "--no-token") as second:
        deadline = time.monotonic() + 900
        while not counts(second[1]) > 0:  # both see it grow
            assert time.monotonic() < deadline
        assert counts(first[1]) > 0
        first[0].kill()
        while counts(second[1]) < rows or "Reading the atlas" in httpx.get(second[1] + "atlas", timeout=600).text:
            assert time.monotonic() < deadline, second[2].read_text()
            time.sleep(0.1)
        with explore(atlas, cache, "--no-token") as third:
            assert counts(third[1]) == rows
        assert counts(second[1]) == rows
        assert "Traceback" not in first[2].read_text() + second[2].read_text() + third[2].read_text()
    assert len(list((cache / "explorer").glob("*.sqlite"))) == 1


def test_every_answer_binds_the_browser(served):
    for address in ("/atlas", "/static/explorer.js", f"/media/test/{sound_row(served).number}/audios/0"):
        headers = served.get(address).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]


def test_a_snapshot_stands_alone(served):
    answer = served.get("/snapshot?of=/scores?run=a")
    assert "attachment" in answer.headers["content-disposition"]
    for loaded in ("<script", 'src="/', "href=", "<form", "hx-get", "<link"):
        assert loaded not in answer.text
    assert "<style>" in answer.text and "Confusion" in answer.text


def test_media_that_cannot_be_read_are_named_not_played(served):
    broken = next(s for s in open_atlas(served.atlas, split="test") if s.audios)
    path = served.atlas / open_atlas(served.atlas, split="test").row(broken.number).audios[0]
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:20])
        answer = served.get(f"/picture/sound/test/{broken.number}/audios/0")
        assert answer.status_code == 200 and "alert" in answer.text and "test.jsonl" in answer.text
        path.write_bytes(b"")
        assert served.get(f"/media/test/{broken.number}/audios/0").status_code == 404
    finally:
        path.write_bytes(whole)


def test_a_crashing_decoder_costs_one_picture(monkeypatch):
    monkeypatch.setattr(media, "PATIENCE_SECONDS", PATIENCE)  # its process may start slowly beside others
    decoder = Decoder()
    try:
        from hba.errors import MediaError

        with pytest.raises(MediaError, match="crashes its decoder"):
            decoder.call(end_the_process, b"x", "here")
        assert decoder.call(size_of, b"xyz", "here") == 3
    finally:
        decoder.close()


def test_a_decoder_that_ends_while_it_is_idle_costs_nothing(monkeypatch):
    """As where the memory of the machine is short."""
    monkeypatch.setattr(media, "PATIENCE_SECONDS", PATIENCE)
    with closing(Decoder()) as decoder:
        assert decoder.call(size_of, b"x", "here") == 1
        (process,) = decoder._idle._processes.values()
        process.kill()
        until(lambda: decoder._idle._broken)
        assert decoder.call(size_of, b"xy", "there") == 2


def test_what_waits_for_its_turn_outlives_a_crash_before_it(tmp_path, monkeypatch):
    """It was blamed itself, as one that crashes its decoder."""
    monkeypatch.setattr(media, "PATIENCE_SECONDS", PATIENCE)
    decoder, begun, free = Decoder(), tmp_path / "clip.begun", tmp_path / "clip.free"
    with closing(decoder), ThreadPoolExecutor(3) as pool:
        try:
            crashing = pool.submit(decoder.call, begins_and_ends, tmp_path / "clip", "here")
            until(begun.exists)
            waiting = [pool.submit(decoder.call, size_of, b"x" * size, "there") for size in (1, 2)]
            until(lambda: all(each.running() for each in waiting))
        finally:
            free.touch()
        assert [each.result() for each in waiting] == [1, 2]
        assert "crashes its decoder" in str(crashing.exception())


def test_media_that_hang_hold_up_nobody(tmp_path, monkeypatch):
    """Each goes on aside once its turn is over, and the next is decoded."""
    monkeypatch.setattr(media, "PATIENCE_SECONDS", PATIENCE)
    monkeypatch.setattr(media, "TURN_SECONDS", 0.1)
    decoder, clips = Decoder(), [tmp_path / name for name in "ab"]
    with closing(decoder), ThreadPoolExecutor(2) as pool:
        try:
            hanging = [pool.submit(decoder.call, begins_and_ends, clip, "here") for clip in clips]
            until(lambda: all(Path(f"{clip}.begun").exists() for clip in clips))
            assert decoder.call(size_of, b"xyz", "there") == 3 and not any(each.done() for each in hanging)
        finally:
            for clip in clips:
                Path(f"{clip}.free").touch()
        assert all("crashes its decoder" in str(each.exception()) for each in hanging)
        assert decoder.call(size_of, b"xy", "there") == 2


def end_the_process(source, where):
    import os

    os._exit(9)


def size_of(source, where):
    return len(source)


def test_an_index_is_used_again_and_follows_the_rows(serve, tmp_path):
    atlas = tmp_path / "atlas"
    atlas.mkdir()
    line = json.dumps({"problem": "x", "answer": "sarcasm", "dataset": "mmsd", "task": "sarcasm_cls",
                       "modality_signature": "text"}) + "\n"  # fmt: skip
    (atlas / "test.jsonl").write_text(line * 3)
    for rows in (3, 3, 4):
        (atlas / "test.jsonl").write_text(line * rows) if rows == 4 else None
        app = create_app(atlas=atlas, runs=None, cache_folder=tmp_path / "cache")
        with serve(app) as url:
            assert f"{rows} samples" in httpx.get(url + "/atlas", timeout=600).text
    assert len(list((tmp_path / "cache" / "explorer").glob("*.sqlite"))) == 2
    assert all(Path(p).stat().st_mode & 0o077 == 0 for p in (tmp_path / "cache" / "explorer").glob("*.sqlite"))


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="bytes=-0123456789, ", max_size=24), st.integers(1, 10**12))
def test_a_range_is_within_the_medium_or_refused(asked, size):
    span = parse_range(asked, size)
    assert span is None or (0 <= span.start < span.stop <= size and span.stop - span.start <= MAX_RANGE_BYTES)


def test_a_part_of_the_rows_is_named_wherever_its_scores_stand(served, serve, tmp_path):
    run = tmp_path / "runs" / "half"
    shutil.copytree(served.atlas.parent / "runs" / "a", run)
    lines = (run / "predictions.jsonl").read_text().splitlines(keepends=True)
    (run / "predictions.jsonl").write_text("".join(lines[:19]))
    (run / "judgements.jsonl").unlink()
    (run / "quarantine.jsonl").unlink()
    score_run(run, resamples=100)
    broken = tmp_path / "runs" / "broken"
    broken.mkdir()
    (broken / "metrics.json").write_text('{"tasks": []}')
    said = f"19 of {len(lines)} rows"
    with serve(create_app(atlas=served.atlas, runs=tmp_path / "runs", cache_folder=tmp_path / "cache")) as url:
        listed = httpx.get(f"{url}/runs", timeout=600).text
        assert said in listed and "is missing" in listed  # of one run alone, and the others are shown
        assert f"Only {said} were answered" in httpx.get(f"{url}/scores?run=half", timeout=600).text
