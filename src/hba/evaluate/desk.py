"""A model that stays open: what is asked comes in at any time, is decoded beside the model, and answered in batches.

`hba ask` opens a model for one question; `hba serve` and the explorer's Try page put a `Desk` in front of it. What is
asked becomes a row by the code of `hba ask`, is encoded and answered by the backends of `hba predict`: the numbers are
theirs. Only who is asked together differs.

A request's way: its files are linked into a folder of its own; a worker process of the loader looks at them, makes the
row and encodes it (a decoder that crashes or hangs costs that request alone); the folder goes; the one thread that has
the model takes the oldest request that is ready, and those like it, waits `window_seconds` for more where the batch is
not full, and answers them.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import torch

from hba.atlas import open_atlas
from hba.atlas.build import Medium, bring, look_at, row_of
from hba.atlas.rows import Field, Quarantined, Sample
from hba.batch.encode import Batch, Encoded, Encoder, collate
from hba.batch.loader import Failure, Outcome, WorkerPool, encode_row
from hba.batch.prompt import Message, PlainText
from hba.environment import kernel_ends_children
from hba.errors import InputError, MachineError, MediaError
from hba.evaluate.ask import FREE, atlas_of, datasets_of, taxonomy_of
from hba.evaluate.backends.heads import HeadsBackend
from hba.evaluate.backends.hf import ChatBackend, begun_turn
from hba.evaluate.backends.interface import Answered, Output, open_backend, prediction_of, spoken
from hba.evaluate.config import PredictConfig
from hba.evaluate.predict import EVERYTHING, open_rows
from hba.evaluate.predictions import Prediction
from hba.model.generate import end_token_ids
from hba.model.process import prepare_process
from hba.storage import atomic_write, begun, remove_abandoned

ASKED = "asked.json"
HERE = ("heads", "hf")  # backends over a model in this process
BATCHES_REMEMBERED = 4096
_log = logging.getLogger(__name__)


class Part(msgspec.Struct, frozen=True):
    """A part of a turn: its `text`, or the `kind` of a medium (image, video, audio) that lies in the file `name`."""

    text: str = ""
    kind: str = ""
    name: str = ""


class Turn(msgspec.Struct, frozen=True):
    """What one side has said: `role` is system, user or assistant."""

    role: str
    parts: tuple[Part, ...]


class Question(msgspec.Struct, frozen=True):
    """What is asked of a model: about the file `name`, as `hba ask` does, or, with `turns`, how a talk goes on."""

    dataset: str = FREE
    name: str = ""
    question: str | None = None
    transcript: str | None = None
    turns: tuple[Turn, ...] = ()


class Saying(NamedTuple):
    """How an answer to a talk is drawn. The same seed draws the same answer, whatever is answered beside it."""

    max_tokens: int
    temperature: float = 0.0
    seed: int = 0


class FullError(MachineError):
    """As much waits for the model as may."""


@dataclass(eq=False)
class _Request:
    question: Question
    saying: Saying | None
    answer: Future[Prediction]
    encoded: Encoded | None = None
    ready_at: float = 0.0

    @property
    def alike(self) -> tuple[object, ...]:
        """What requests of one batch have in common."""
        assert self.encoded is not None
        drawn = None if self.saying is None else (self.saying.max_tokens, self.saying.temperature)
        sample = self.encoded.sample
        return sample.modality_signature, sample.label is None, drawn


class _Pool(Protocol):
    def request(self, row: int) -> None: ...
    def first(self, rows: Collection[int]) -> tuple[int, Outcome]: ...


class Desk:
    """A model and its queue. Raises what opening the model raises. Close it: its threads and files go."""

    def __init__(
        self,
        model: str,
        *,
        folder: Path,
        backend: str | None = None,
        config: PredictConfig | None = None,
        most_waiting: int = 256,
        window_seconds: float = 0.005,
        decode_seconds: float | None = None,
    ) -> None:
        """`folder` is where files lie until they are decoded; what a killed process left there is removed. A batch has
        `config.batch_size` rows at most. A row that twice takes longer than `decode_seconds` to decode is refused."""
        self.model, self.taxonomy = model, taxonomy_of(model)
        self.most_waiting, self.window_seconds = most_waiting, window_seconds
        config = config or PredictConfig()
        prepare_process(seed=0)
        with atlas_of([(Medium(Path("words.txt"), (), "Hello."), FREE)], self.taxonomy, None, None) as atlas:
            how: dict[str, Any] = {"split": "asked", "config": config, "backend": backend, "selection": EVERYTHING}
            opening = open_rows(model, str(atlas), **how)
            if opening.backend not in HERE:
                fix = f"Choose among {', '.join(HERE)}; a server or vLLM is asked where it is."
                raise InputError(f"the backend {opening.backend} has no model in this process", where=model, fix=fix)
            answering = open_backend(opening.backend, opening)
        assert isinstance(answering, HeadsBackend | ChatBackend)
        self.config, self.backend = opening.config, answering
        self.counts: Counter[str] = Counter()
        self.batch_sizes: deque[int] = deque(maxlen=BATCHES_REMEMBERED)
        remove_abandoned(folder)
        self.folder = begun(folder / f"desk-{id(self):x}")
        self.folder.mkdir(parents=True, mode=0o700)
        self._reader = _Reader(self.folder, answering.encoder)
        loader = self.config.loader
        spare = loader.resolved_workers()  # of one core none is; what strangers send is decoded beside the model, still
        self._workers = max(1, spare) if loader.workers < 0 and kernel_ends_children() else spare
        self._decode_seconds = decode_seconds or loader.decode_timeout_seconds
        self._most_bytes = loader.prefetch_megabytes << 20
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()
        self._asked: deque[int] = deque()  # not yet given to a decoder
        self._decoding: dict[int, _Request] = {}  # given to a decoder
        self._requests: dict[int, _Request] = {}  # all that wait for an answer
        self._ready: list[_Request] = []  # in the order in which they became ready
        self._pool: _Pool | None = None
        self._closing = False
        self._threads = [threading.Thread(target=run, name=f"hba-desk-{run.__name__}", daemon=True)
                         for run in (self._decode, self._answer)]  # fmt: skip
        for thread in self._threads:
            thread.start()

    # --- asking -------------------------------------------------------------------------------------------------------

    @property
    def talks(self) -> bool:
        """Whether the model answers in words."""
        return self.backend.free_form

    @property
    def waiting(self) -> int:
        """Requests without an answer yet."""
        return len(self._requests)

    @property
    def alive(self) -> bool:
        """Whether requests are taken and answered."""
        return not self._closing and all(thread.is_alive() for thread in self._threads)

    def datasets(
        self, tasks: Sequence[str] | None, datasets: Sequence[str] | None, question: str | None = None
    ) -> list[str]:
        """Keys of the datasets whose rows ask that, as `hba ask` chooses them; what heads have not learned is left out
        where nothing is named. Raises InputError for what is unknown, or what this model cannot be asked."""
        explicit = tasks is not None or datasets is not None or question is not None
        if not explicit and not isinstance(self.backend, HeadsBackend):
            what = f"{self.model} answers in words: it has to be asked something"
            raise InputError(what, fix="Name a task such as EMO, or a question.")
        keys = datasets_of(self.taxonomy, tasks, datasets, question)
        known = [key for key in keys if self._can(key)]
        if explicit and len(known) < len(keys):
            other = next(key for key in keys if key not in known)
            what = f"{self.model} was not trained to answer rows of {other}"
            raise InputError(what, fix="Ask another task, or a model that answers in words.")
        return known

    def _can(self, key: str) -> bool:
        domain = self.taxonomy.dataset(key).domain
        if domain is None:
            return self.talks
        return self.backend.domains is None or domain in self.backend.domains

    def ask(
        self, question: Question, files: Mapping[str, Path] | None = None, saying: Saying | None = None
    ) -> Future[Prediction]:
        """What the model answers. `files` are those that the question names; they may go once this returns.

        The future raises MediaError for a file that cannot be read, InputError for one that the model does not take,
        MachineError for what the machine lacks. Raises FullError when too many wait, or the desk is closing.
        """
        request = _Request(question, saying, Future())
        with self._changed:
            if self._closing or len(self._requests) >= self.most_waiting:
                what = "the server is stopping" if self._closing else f"{len(self._requests)} requests wait already"
                raise FullError(what, where=self.model, fix="Ask again later.")
            number = next(self._numbers)
            self._requests[number] = request
        place = self.folder / str(number)
        try:
            place.mkdir()
            for name, path in (files or {}).items():
                bring(path, place / name)
            (place / ASKED).write_bytes(msgspec.json.encode(question))
        except OSError:
            self._leave(number)
            raise
        with self._changed:
            self._asked.append(number)
            self._hand_over()
        return request.answer

    def _leave(self, number: int) -> None:
        shutil.rmtree(self.folder / str(number), ignore_errors=True)
        with self._changed:
            self._requests.pop(number, None)
            self._changed.notify_all()

    def close(self, patience_seconds: float = 0.0) -> None:
        """Take nothing more, answer what waits for so long, end the threads, remove the files."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._requests, patience_seconds)
            left, self._requests = list(self._requests.values()), {}
            self._asked.clear()
            self._changed.notify_all()
        for request in left:
            _fail(request, FullError("the server has stopped", where=self.model, fix="Ask again later."))
        for thread in self._threads:
            thread.join(self._decode_seconds)
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- decoding, in processes ---------------------------------------------------------------------------------------

    def _hand_over(self) -> None:
        """Give decoders what waits, as long as little is ready. The lock is held."""
        held = sum(each.encoded.num_bytes for each in self._ready if each.encoded is not None)
        most = 2 * max(1, self._workers)
        while self._asked and self._pool is not None and len(self._decoding) < most and held < self._most_bytes:
            number = self._asked.popleft()
            request = self._requests.get(number)
            if request is None or request.answer.cancelled():
                self._discard(number)
                continue
            self._decoding[number] = request
            self._pool.request(number)
        self._changed.notify_all()

    def _discard(self, number: int) -> None:
        shutil.rmtree(self.folder / str(number), ignore_errors=True)
        self._requests.pop(number, None)

    def _decode(self) -> None:
        """The life of the thread whose worker processes decode."""
        while not self._over():
            with ExitStack() as stack:
                try:
                    pool = self._open_pool(stack)
                    with self._changed:
                        self._pool = pool
                        self._hand_over()
                    while not self._over():
                        with self._changed:
                            if not self._decoding:
                                self._changed.wait(1)
                                continue
                        self._decoded(*pool.first(self._decoding))
                except Exception as error:  # noqa: BLE001 - the boundary of a pool: those it had are told, another is made
                    self._lose_pool(error)

    def _over(self) -> bool:
        return self._closing and not self._requests

    def _open_pool(self, stack: ExitStack) -> _Pool:
        rows = _Rows(self.folder)
        if not self._workers:
            return _InTurn(rows, self._reader)
        made: Any = WorkerPool(
            rows,  # type: ignore[arg-type]  # of an atlas a pool needs the rows alone
            self._reader,  # type: ignore[arg-type]
            workers=self._workers,
            timeout_seconds=self._decode_seconds,
            ahead_bytes=self._most_bytes,
        )
        pool: _Pool = stack.enter_context(made)
        return pool

    def _lose_pool(self, error: Exception) -> None:
        _log.warning("Decoding had to begin anew: %s", error)
        with self._changed:
            self._pool = None
            lost, self._decoding = self._decoding, {}
            for number in lost:
                self._discard(number)
        for request in lost.values():
            _fail(request, error)
        time.sleep(0.1)

    def _decoded(self, number: int, outcome: Outcome) -> None:
        shutil.rmtree(self.folder / str(number), ignore_errors=True)
        with self._changed:
            request = self._decoding.pop(number)
            if isinstance(outcome, Encoded):
                request.encoded, request.ready_at = outcome, time.monotonic()
                self._ready.append(request)
            else:
                self._requests.pop(number, None)
            self._hand_over()
        if isinstance(outcome, Quarantined):
            self.counts["refused"] += 1
            _fail(request, MediaError(outcome.reason))
        elif isinstance(outcome, Failure):
            _fail(request, outcome.error)

    # --- answering, in the thread that has the model ------------------------------------------------------------------

    def _answer(self) -> None:
        """The life of the thread that asks the model."""
        prepare_process(seed=0)  # how the processor treats denormal numbers is a matter of each thread
        while (batch := self._next()) is not None:
            started = time.monotonic()
            self._settle(batch)
            self.counts["model_microseconds"] += int(1e6 * (time.monotonic() - started))
            with self._changed:
                for request in batch:
                    assert request.encoded is not None
                    self._requests.pop(int(request.encoded.sample.id), None)
                self._hand_over()

    def _next(self) -> list[_Request] | None:
        """The oldest request that is ready and those like it; None when all is done and the desk closes."""
        most = self.config.batch_size
        with self._changed:
            while True:
                gone = [each for each in self._ready if each.answer.cancelled()]
                for each in gone:
                    self._ready.remove(each)
                    assert each.encoded is not None
                    self._requests.pop(int(each.encoded.sample.id), None)
                if not self._ready:
                    if self._over():
                        return None
                    self._changed.wait(1)
                    continue
                oldest = self._ready[0]
                like = [each for each in self._ready if each.alike == oldest.alike][:most]
                wait = oldest.ready_at + self.window_seconds - time.monotonic()
                if len(like) < most and wait > 0 and len(self._requests) > len(like):
                    self._changed.wait(wait)
                    continue
                for each in like:
                    self._ready.remove(each)
                return like

    def _settle(self, requests: list[_Request]) -> None:
        """Answer requests together; where that fails each alone, so that none fails for its neighbour."""
        requests = [each for each in requests if each.answer.set_running_or_notify_cancel()]
        if not requests:
            return
        try:
            predictions = self._predictions(requests)
        except Exception as error:  # noqa: BLE001 - the boundary of a batch: whoever asked is told, the server goes on
            self._settle_alone(requests, error)
            return
        for request, prediction in zip(requests, predictions, strict=True):
            request.answer.set_result(prediction)

    def _settle_alone(self, requests: list[_Request], error: Exception) -> None:
        if len(requests) == 1:
            requests[0].answer.set_exception(error)
            return
        for request in requests:
            try:
                (prediction,) = self._predictions([request])
            except Exception as own:  # noqa: BLE001 - see above
                request.answer.set_exception(own)
            else:
                request.answer.set_result(prediction)

    def _predictions(self, requests: Sequence[_Request]) -> list[Prediction]:
        encoded = [request.encoded for request in requests if request.encoded is not None]
        encoder = self.backend.encoder
        batch = collate(encoded, pad_token_id=encoder.pad_token_id, taxonomy=self.taxonomy)
        sayings = [request.saying for request in requests if request.saying is not None]
        outputs: Sequence[Output]
        if sayings:
            outputs = self._said(batch, sayings)
        elif isinstance(self.backend, ChatBackend):
            outputs = self.backend.generate(batch)
        elif requests[0].encoded is not None and requests[0].encoded.sample.label is not None:
            outputs = self.backend.classify(batch)
        else:
            outputs = self.backend.speak(batch)
        self.batch_sizes.append(len(batch))
        tokens = batch.num_tokens.tolist()
        self.counts.update(batches=1, rows=len(batch), tokens_in=sum(tokens))
        self.counts["tokens_out"] += sum(output.tokens_out or 0 for output in outputs)
        answered = zip(batch.samples, outputs, tokens, strict=True)
        return [prediction_of(Answered(each, replace(output, tokens_in=n))) for each, output, n in answered]

    def _said(self, batch: Batch, sayings: Sequence[Saying]) -> list[Output]:
        """What the model says next in each talk."""
        model, temperature, longest = self.backend.model, sayings[0].temperature, sayings[0].max_tokens
        uniforms_BL = None
        if temperature > 0:
            drawn = (torch.Generator().manual_seed(saying.seed) for saying in sayings)
            uniforms_BL = torch.stack([torch.rand(longest, generator=each, dtype=torch.float64) for each in drawn])
        batch = batch.to(model.device)
        said = model.say(batch, max_new_tokens=longest, temperature=temperature, uniforms_BL=uniforms_BL)
        ends, opened = end_token_ids(model.transformer, model.processor), begun_turn(model.processor, batch)
        return [
            spoken(sample, opened + one.text, self.taxonomy, tokens_out=one.tokens, finish=one.finish(ends))
            for sample, one in zip(batch.samples, said, strict=True)
        ]


def _fail(request: _Request, error: Exception) -> None:
    if request.answer.set_running_or_notify_cancel():
        request.answer.set_exception(error)


# --- what worker processes do -----------------------------------------------------------------------------------------


class _Nowhere:
    """The media of a sample that has been encoded: they are gone."""

    def medium(self, number: int, name: Field, index: int, *, where: str) -> Any:
        raise MediaError("its media were removed once they were decoded", where=where)


class _Rows:
    """In the place of an atlas: a row of any number, of which nothing is known before a worker looks."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._source = folder, _Nowhere()

    def __getitem__(self, number: int) -> Sample:
        known: dict[str, Any] = dict.fromkeys(("problem", "answer", "dataset", "task", "modality_signature"), "")
        known |= dict.fromkeys(("images", "videos", "audios", "ext_video_feats", "ext_audio_feats"), 0)
        about: dict[str, Any] = {"id": str(number), "split": "asked", "where": f"request {number}", "number": number}
        return Sample(**about, **known, label=None, texts=(), source=self._source)


class _InTurn:
    """Where there are no worker processes: rows are decoded in the desk's own thread."""

    def __init__(self, rows: _Rows, reader: _Reader) -> None:
        self._rows, self._reader = rows, reader

    def request(self, row: int) -> None:
        """Nothing is done before it is waited for."""

    def first(self, rows: Collection[int]) -> tuple[int, Outcome]:
        number, rows_, reader = next(iter(tuple(rows))), self._rows, self._reader
        try:
            return number, encode_row(rows_, reader, number)  # type: ignore[arg-type]
        except Exception as error:  # noqa: BLE001 - the boundary of one request, as in a worker
            return number, Failure(error, "")


class _Reader:
    """In the place of an encoder: makes the row that is asked, and encodes it."""

    def __init__(self, folder: Path, encoder: Encoder) -> None:
        self._folder, self._encoder = folder, encoder
        how: dict[str, Any] = {"descriptors": encoder.descriptors, "dims": encoder.dims}
        self._talk = _Talk(encoder.processor, encoder.config, encoder.taxonomy, **how)

    def encode(self, asked: Sample) -> Encoded:
        """What the model is given. Raises MediaError for a file that is none, or cannot be read."""
        folder, encoder = self._folder / asked.id, self._encoder
        question = msgspec.json.decode((folder / ASKED).read_bytes(), type=Question)
        if question.turns:
            encoder, row = self._talk, _row_of_talk(question, folder)
        else:
            medium = look_at(folder / question.name)
            how: dict[str, Any] = {"question": question.question, "transcript": question.transcript}
            row = row_of(medium, question.name, question.dataset, encoder.taxonomy, **how)
        with atomic_write(folder / "asked.jsonl") as handle:
            handle.write(json.dumps(row | {"id": asked.id}, ensure_ascii=False))
        sample = open_atlas(folder, split="asked", taxonomy=encoder.taxonomy)[0]
        encoded = encoder.encode(sample)
        own = replace(sample, source=asked.source, refused={})
        windows = tuple(replace(window, sample=own) for window in encoded.windows)
        return replace(encoded, sample=own, windows=windows)


class _Talk(Encoder):
    """Encodes a talk of several turns, whose media stand where they were given."""

    def messages(self, sample: Sample) -> list[Message]:
        """The turns, with the config's system prompt where the talk has none."""
        plain, messages = PlainText(self.processor), []
        for role, parts in sample.extra["turns"]:
            content = [{"type": "text", "text": plain(text)} if kind == "text" else {"type": kind}
                       for kind, text in parts if kind == "text" or kind in self.config.modalities]  # fmt: skip
            messages.append({"role": role, "content": content})
        if self.config.system_prompt is not None and messages[0]["role"] != "system":
            system = [{"type": "text", "text": self.config.system_prompt}]
            messages.insert(0, {"role": "system", "content": system})
        return messages


def _row_of_talk(question: Question, folder: Path) -> dict[str, Any]:
    """The row of a talk; what of each medium is taken is known once it has been looked at."""
    media: dict[str, list[str]] = {"image": [], "video": [], "audio": []}
    turns = []
    for turn in question.turns:
        parts: list[tuple[str, str]] = []
        for part in turn.parts:
            if not part.kind:
                parts.append(("text", part.text))
                continue
            found = look_at(folder / part.name).kinds
            if part.kind not in found:
                what = f"is no {part.kind}" if not found else f"holds {' and '.join(found)}, and no {part.kind}"
                raise MediaError(what, where=part.name, fix="Give it as what it is.")
            # As `hba ask` does, the sound of a clip is heard, too.
            for kind in found if part.kind == "video" else (part.kind,):
                parts.append((kind, ""))
                media[kind].append(part.name)
        turns.append((turn.role, parts))
    return {
        "problem": "A talk.",
        "answer": "-",
        "dataset": question.dataset,
        "task": "talk_qa",
        "modality_signature": "_".join(["text", *(kind for kind, names in media.items() if names)]),
        "turns": turns,
    } | {f"{kind}s": names for kind, names in media.items()}
