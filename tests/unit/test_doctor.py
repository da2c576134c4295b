"""`hba doctor`: what it finds here, and that what is broken is reported instead of raised."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hba.doctor import (
    Check,
    check_disk,
    checks_table,
    declared,
    diagnose,
    extras,
    fits_7b,
    formats,
    healthy,
    probe,
    to_json,
    unmet,
)

SECRET = "hf_a-very-secret-value"
PRINT = "import json; from hba.doctor import *; print(json.dumps(to_json({checks})))"
HUB_ONLY = "[check_token(), check_hub()]"


def findings(checks: str, **environment: str) -> dict[str, dict[str, object]]:
    """The checks by name, of a fresh process with these environment variables."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    code = PRINT.format(checks=checks)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert SECRET not in done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["healthy"] is not any(c["required"] and c["status"] == "missing" for c in found["checks"])
    return {check["name"]: check for check in found["checks"]}


@pytest.fixture(scope="module")
def here() -> list[Check]:
    return diagnose()


def test_this_environment_can_run_hba(here: list[Check]) -> None:
    assert [check for check in here if check.required and check.status == "missing"] == []
    assert healthy(here)


def test_every_check_is_there_and_the_hub_is_not_asked(here: list[Check]) -> None:
    names = [check.name for check in here]
    expected = [
        "python",
        "packages",
        "torch",
        "torchvision",
        "transformers",
        "video",
        "audio",
        "gpu",
        "cores",
        "memory",
    ]
    assert names[: len(expected)] == expected
    assert {"disk", "landmarks", "hub token", *(f"extra [{extra}]" for extra in extras())} <= set(names)
    assert "hub" not in names


def test_details_are_facts(here: list[Check]) -> None:
    details = {check.name: check.detail for check in here}
    assert details["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert "libx264" in details["video"]
    assert "FLAC" in details["audio"]
    assert "Qwen2.5-Omni" in details["transformers"]


def test_json_and_table_say_the_same(here: list[Check]) -> None:
    from rich.console import Console

    shape = json.loads(json.dumps(to_json(here)))
    assert set(shape) == {"healthy", "checks"}
    assert set(shape["checks"][0]) == {"name", "status", "detail", "fix", "required"}
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    console.print(checks_table(here))
    text = console.export_text()
    for check in here:
        assert check.name in text


def test_a_broken_torchvision_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    found = findings("diagnose()", PYTHONPATH=str(tmp_path))
    assert found["torchvision"]["status"] == "missing"
    assert "operator torchvision::nms does not exist" in str(found["torchvision"]["detail"])
    assert found["torchvision"]["fix"]
    assert found["torch"]["status"] == "ok"


def test_a_token_is_found_and_never_shown_and_a_hub_answers() -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        found = findings(HUB_ONLY, HF_TOKEN=SECRET, HF_ENDPOINT=address, no_proxy="*")
    finally:
        server.shutdown()
        server.server_close()
    assert found["hub token"]["status"] == "ok"
    assert found["hub"]["detail"] == f"{address} answers (200)"


def test_an_unreachable_hub_and_no_token_are_not_needed(tmp_path: Path) -> None:
    found = findings(HUB_ONLY, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path), HF_TOKEN="", no_proxy="*")
    assert found["hub"]["status"] == "missing"
    assert found["hub"]["required"] is False
    assert found["hub token"]["status"] == "warn"


def test_unmet_requirements_say_what_is_there() -> None:
    lacking = unmet([Requirement("torch>=99"), Requirement("no-such-package>=1"), Requirement("numpy>=1")])
    assert len(lacking) == 2
    assert lacking[0].startswith("torch is ")
    assert lacking[0].endswith("needed >=99")
    assert lacking[1] == "no-such-package>=1 is not installed"


def test_requirements_are_those_of_the_package() -> None:
    assert {"av", "pyarrow"} <= {r.name for r in declared()}
    assert {"torch", "transformers"} <= {r.name for r in declared("train")} - {r.name for r in declared()}
    assert {"torch", "opensmile", "wandb"} <= {r.name for r in declared("all")}
    assert {r.name for r in declared("wandb")} == {"wandb"}
    assert "pytest" in {r.name for r in declared("dev")}
    assert "pytest" not in {r.name for r in declared()}


def test_a_package_that_is_not_there() -> None:
    check = probe("thing", "no_such_module", lambda module: Check(name="thing", status="ok", detail=""))
    assert check.status == "missing"
    assert "no_such_module" in check.detail
    assert not healthy([check])


def test_a_missing_format_is_named() -> None:
    check = formats("video", "PyAV 1", ["h264", "libx264"], {"h264"}, "av")
    assert (check.status, check.detail) == ("missing", "PyAV 1 lacks libx264")


@pytest.mark.parametrize(("gib", "words"), [(8, "does not fit"), (24, "LoRA does not"), (80, "inference and LoRA fit")])
def test_what_fits_is_an_estimate(gib: float, words: str) -> None:
    assert words in fits_7b(gib)
    assert "estimate" in fits_7b(gib)


def test_disk_is_that_of_the_folder(tmp_path: Path) -> None:
    assert str(tmp_path) in check_disk(tmp_path).detail


def test_only_what_is_required_makes_it_unhealthy() -> None:
    assert healthy([Check(name="extra", status="missing", detail="", required=False)])
    assert healthy([Check(name="gpu", status="warn", detail="")])
    assert not healthy([Check(name="torch", status="missing", detail="")])
