"""Many processes of one `hba` command, as a launcher starts them, without an import of torch for each.

A process that has imported everything waits for orders and forks the ranks of each: their environment is a launcher's
(RANK, WORLD_SIZE, MASTER_ADDR, ...), they call `hba.cli.main`, and they speak to each other over gloo. What a launcher
would do when a rank dies is left out on purpose: the others have to notice by themselves. A rank can be made to signal
itself, with SIGKILL or another, in a chosen phase: before or after a call of a function. A command of one process can
be killed with all that it has started, some time after a file is there.

    launch = RankLauncher()
    ended = launch(["train", "sft", "--run", run, ...], ranks=8, dies=Dies(3, "hba.train.loop:_step", "before", call=2))
    assert ended.codes == [1, 1, 1, -9, 1, 1, 1, 1]
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

PRELOADED = (
    "torch", "torchvision", "transformers", "peft", "accelerate", "torch.utils.tensorboard", "sklearn.metrics",
    "transformers.models.qwen2_5_omni.modeling_qwen2_5_omni",
    "transformers.models.qwen2_5_omni.processing_qwen2_5_omni",
    "torch.distributed.fsdp", "torch._dynamo", "hba.cli", "hba.train.sft", "hba.train.lm", "hba.train.qa",
    "hba.train.bam", "hba.train.transfer", "hba.rl.local", "hba.evaluate.predict", "hba.evaluate.score",
)  # fmt: skip
GRACE_SECONDS = 300.0  # for the others, once a rank has failed


class Dies(NamedTuple):
    """Where a rank signals itself: before or after its call number `call` of the function 'module:name'.

    `rank` None: the one that gets there first, where it is not known beforehand which rank does the work.
    """

    rank: int | None
    function: str
    when: str = "before"
    call: int = 1
    signal: str = "SIGKILL"


class Killed(NamedTuple):
    """The process group of a command of one rank is killed so many seconds after `folder` has a path like `pattern`."""

    folder: str
    pattern: str
    seconds: float


class Ended(NamedTuple):
    """How the ranks ended: exit codes (negative: the signal), standard outputs and errors; `cpu_seconds` of all."""

    codes: list[int]
    out: list[str]
    err: list[str]
    seconds: float
    cpu_seconds: float

    @property
    def code(self) -> int:
        """The one code with which all ranks ended."""
        assert len(set(self.codes)) == 1, (self.codes, self.err)
        return self.codes[0]


class RankLauncher:
    """The waiting process, started with the first order. Close it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def __call__(
        self, arguments, *, ranks=8, dies=None, killed=None, timeout=900.0, grace=GRACE_SECONDS, environment=None
    ) -> Ended:
        """Run `hba ARGUMENTS` on so many ranks. AssertionError when they have not ended by themselves in time: all
        within `timeout` seconds, the others within `grace` once one has failed."""
        with tempfile.TemporaryDirectory() as folder:
            order = {
                "arguments": [str(argument) for argument in arguments],
                "ranks": ranks,
                "dies": None if dies is None else dies._asdict(),
                "killed": None if killed is None else killed._asdict(),
                "folder": folder,
                "environment": environment or {},
                "timeout": timeout,
                "grace": grace,
            }
            answer = self._ask(order)
            texts = [[Path(folder, f"{rank}.{name}").read_text() for rank in range(ranks)] for name in ("out", "err")]
        assert not answer["hung"], (f"ranks {answer['hung']} hung", answer["codes"], texts[1])
        return Ended(answer["codes"], *texts, answer["seconds"], answer["cpu_seconds"])

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _ask(self, order):
        if self._process is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._process = subprocess.Popen([sys.executable, __file__], **pipes)
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the process that forks the ranks has ended"
        return json.loads(line)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve() -> None:
    """The life of the waiting process: orders in, how the ranks ended out."""
    import importlib

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for module in PRELOADED:
        importlib.import_module(module)
    sys.modules["torch"].set_num_threads(1)  # as the tests' own process
    for line in sys.stdin:
        answers.write(json.dumps(_run(json.loads(line))) + "\n")
        answers.flush()


def _run(order):
    started, port = time.monotonic(), free_port()
    pids = [_fork(order, rank, port) for rank in range(order["ranks"])]
    codes: dict[int, int] = {}
    cpu, deadline, hung = 0.0, started + order["timeout"], []
    killed, due = order["killed"], None
    while len(codes) < len(pids):
        for rank, pid in enumerate(pids):
            if rank in codes:
                continue
            ended, status, used = os.wait4(pid, os.WNOHANG)
            if ended:
                codes[rank] = os.waitstatus_to_exitcode(status)
                cpu += used.ru_utime + used.ru_stime
                if codes[rank]:
                    deadline = min(deadline, time.monotonic() + order["grace"])
        if time.monotonic() > deadline and not hung:
            hung = [rank for rank in range(len(pids)) if rank not in codes]
            for rank in hung:
                os.kill(pids[rank], signal.SIGKILL)
        if killed is not None and due is None and is_there(**killed):
            due = time.monotonic() + killed["seconds"]
        if due is not None and time.monotonic() >= due and not codes:
            with suppress(ProcessLookupError):  # it has no group of its own yet
                os.killpg(pids[0], signal.SIGKILL)
        select.select([], [], [], 0.02 if killed is None else 0.005)
    ordered = [codes[rank] for rank in range(len(pids))]
    return {"codes": ordered, "hung": hung, "seconds": time.monotonic() - started, "cpu_seconds": cpu}


def is_there(folder, pattern, **_) -> bool:
    try:
        return any(Path(folder).glob(pattern))
    except FileNotFoundError:  # a folder that vanished while it was searched
        return False


def _fork(order, rank, port) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        if order["killed"] is not None:
            os.setsid()
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{order['folder']}/{rank}.{name}", os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order["ranks"], "LOCAL_WORLD_SIZE": order["ranks"]}
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
        own = places | shared if order["ranks"] > 1 else {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
        os.environ.update({name: str(value) for name, value in (own | order["environment"]).items()})
        dies = order["dies"]
        if dies is not None and dies["rank"] in (rank, None):
            token = f"{order['folder']}/first"
            _signal_in(token=token, **{key: value for key, value in dies.items() if key != "rank"})
        code = _main(order["arguments"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _main(arguments) -> int:
    """The entry point in this process; an error that it does not handle is a traceback and 1, as Python has it."""
    import traceback

    from hba.cli import main

    sys.argv = ["hba", *arguments]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
        return 1
    return 0


def _signal_in(function, when, call, token, **what) -> None:
    """Have this process signal itself before or after call number `call` of 'module:name' or 'module:class.name'.

    Of several processes with one `token`, a file to make, the first does.
    """
    import importlib

    module, _, name = function.partition(":")
    owner = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    whole, calls = getattr(owner, last), 0

    def fatal(*args, **options):
        nonlocal calls
        calls += 1
        if calls != call:
            return whole(*args, **options)
        result = whole(*args, **options) if when == "after" else None
        try:
            os.close(os.open(token, os.O_CREAT | os.O_EXCL))
            os.kill(os.getpid(), getattr(signal, what["signal"]))
        except FileExistsError:
            pass  # another was first
        return whole(*args, **options) if when == "before" else result

    setattr(owner, last, fatal)


if __name__ == "__main__":
    serve()
