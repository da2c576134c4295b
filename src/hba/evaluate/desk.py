"""A model that stays open: what is asked comes in at any time and is answered together with what is like it.

`hba serve` and the explorer's Try page have desks. What is asked becomes a row by the code of `hba ask`, and is encoded
and answered by the backends of `hba predict`, so that the numbers are theirs; only who is asked together differs.

An inquiry's way: the files that it names lie in a folder below the desk's; a worker process of the loader looks at
them, makes the row and encodes it, once for however many answers (a decoder that crashes or hangs costs that question
alone); the folder goes; the one thread that has the model takes the oldest inquiry that is ready, and those like it,
waits `window_seconds` for more where the batch is not full, and answers them. What was asked together is answered once
all of it is ready: whoever asked waits for the last of it anyway.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import threading
import time
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import torch
from torch import Tensor

from hba.atlas.build import Medium, bring, look_at, row_of
from hba.atlas.jsonl import JsonlStore
from hba.atlas.rows import Quarantined, Sample
from hba.batch.config import sound_of_clips
from hba.batch.encode import Batch, Encoded, Encoder, collate
from hba.batch.loader import Failure, Outcome, WorkerPool, encode_row
from hba.batch.prompt import PlainText
from hba.descriptors.describe import Extract, link_rows
from hba.descriptors.items import FOLDER as DESCRIBED
from hba.descriptors.items import Failed, Settings, make_plan
from hba.descriptors.landmarks import python_of_environment
from hba.environment import kernel_ends_children
from hba.errors import HbaError, InputError, MachineError, MediaError
from hba.evaluate.ask import FREE, atlas_of, datasets_of, descriptors_of, taxonomy_of
from hba.evaluate.backends.heads import HeadsBackend
from hba.evaluate.backends.hf import ChatBackend, begun_turn
from hba.evaluate.backends.interface import Answered, Output, open_backend, prediction_of, spoken
from hba.evaluate.config import PredictConfig
from hba.evaluate.predict import EVERYTHING, open_rows
from hba.evaluate.predictions import Prediction
from hba.model.generate import Ranked, Said, end_token_ids
from hba.model.process import prepare_process
from hba.storage import begun, halved, plural, remove_abandoned, room
from hba.taxonomy import save_beside

_log = logging.getLogger(__name__)
HERE = ("heads", "hf")  # backends over a model in this process
BATCHES_REMEMBERED = 4096


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
    """What is asked of a model: about a file, as `hba ask` does, or, with `turns`, how a talk goes on. Names of files
    are paths below the desk's folder."""

    dataset: str = FREE
    name: str = ""
    question: str | None = None
    transcript: str | None = None
    turns: tuple[Turn, ...] = ()


class Saying(NamedTuple):
    """How an answer to a talk is drawn. The same seed draws the same answer, whatever is answered beside it.

    It ends before the first of the texts `stop`. With `alternatives` the log-probabilities of its tokens are kept, and
    those of so many others at each place.
    """

    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    alternatives: int | None = None


class FullError(MachineError):
    """As much waits for the model as may."""


@dataclass(eq=False, repr=False)
class Inquiry:
    """A question and one answer to it. An answer to a talk needs a `saying`.

    `answer` raises MediaError for a file that cannot be read, InputError for one that the model does not take,
    MachineError for what the machine lacks. `tell` is called with each piece of an answer to a talk, in the thread that
    has the model; where nobody listens any more (`gone`) the model does not go on. `ranked` is known with the answer.
    """

    question: Question
    saying: Saying | None = None
    tell: Callable[[str], None] | None = None
    told: str = ""
    gone: bool = False
    ranked: tuple[Ranked, ...] = ()
    answer: Future[Prediction] = field(default_factory=Future)
    row: _Row = field(init=False)
    _claiming: threading.Lock = field(default_factory=threading.Lock)

    def hear(self, text: str) -> None:
        """What has been said so far."""
        if self.tell is not None and len(text) > len(self.told) and text.startswith(self.told):
            self.tell(text[len(self.told) :])
            self.told = text

    def claim(self) -> bool:
        """Whether whoever calls is to answer: the first who does, and nobody once nobody waits any more."""
        with self._claiming:
            taken = self.answer.running() or self.answer.done()
            return not taken and self.answer.set_running_or_notify_cancel()

    def fail(self, error: Exception) -> None:
        """Tell whoever waits, unless somebody else does."""
        if self.claim():
            self.answer.set_exception(error)


@dataclass(eq=False, repr=False)
class _Row:
    """A question that is encoded once, for all who ask it in one request."""

    number: int
    inquiries: list[Inquiry]
    coming: set[_Row]  # those that were asked together, until they are ready
    folder: Path | None  # theirs: it goes with the last of them
    encoded: Encoded = field(init=False)
    ready_at: float = 0.0


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
        window_seconds: float = 0.05,
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
        self._descriptors = {key: _measuring(key, of, model) for key, of in answering.encoder.dims.items()}
        self.counts: Counter[str] = Counter()
        self.batch_sizes: deque[int] = deque(maxlen=BATCHES_REMEMBERED)
        remove_abandoned(folder)
        self.folder = begun(folder / f"desk-{id(self):x}")
        self.folder.mkdir(parents=True, mode=0o700)
        measured = {key: how for key, how in self._descriptors.items() if isinstance(how, Settings)}
        self._reader = _Reader(self.folder, answering.encoder, measured)
        loader = self.config.loader
        # What strangers send is decoded beside the model, and by two at least: what hangs one leaves the others theirs.
        spare = loader.resolved_workers()
        self._workers = max(2, spare) if loader.workers < 0 and kernel_ends_children() else spare
        self._decode_seconds = decode_seconds or loader.decode_timeout_seconds
        self._most_bytes = loader.prefetch_megabytes << 20
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()
        self._waiting: set[Inquiry] = set()
        self._asked: deque[_Row] = deque()  # not yet given to a decoder
        self._decoding: dict[int, _Row] = {}  # given to a decoder
        self._ready: list[Inquiry] = []  # in the order in which they became ready
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
        """Inquiries without an answer yet."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether inquiries are taken and answered."""
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
        for key in keys:
            lacking = self._descriptors.get(key)
            if isinstance(lacking, HbaError):
                what = f"the adapters of {key} read descriptors, and {lacking.what}"
                raise InputError(what, fix=f"{lacking.fix} Or ask another dataset.")
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

    def place(self) -> Path:
        """A name below the desk's folder that nobody has, for a folder of files."""
        return self.folder / f"files-{next(self._numbers)}"

    def ask_together(self, inquiries: Sequence[Inquiry], folder: Path | None = None) -> list[Future[Prediction]]:
        """The answers to what one person asks, who waits for all of them: the model is given those that are alike in
        one batch, as far as it goes, and equal questions are encoded once. `folder`, a `place`, has the files that they
        name; it is the desk's from now on, which removes it.

        Raises FullError when too many wait, or the desk is closing: then none is asked.
        """
        coming: set[_Row] = set()
        by_question: dict[Question, _Row] = {}
        for inquiry in inquiries:
            row = by_question.get(inquiry.question)
            if row is None:
                row = by_question[inquiry.question] = _Row(next(self._numbers), [], coming, folder)
            row.inquiries.append(inquiry)
            inquiry.row = row
        coming.update(by_question.values())
        try:
            for question, row in by_question.items():
                _asked_at(self.folder, row.number).write_bytes(msgspec.json.encode(question))
            with self._changed:
                if self._closing or (self._waiting and len(self._waiting) + len(inquiries) > self.most_waiting):
                    what = "the server is stopping" if self._closing else f"{len(self._waiting)} requests wait already"
                    raise FullError(what, where=self.model, fix="Ask again later.")
                self._waiting.update(inquiries)
                self._asked += by_question.values()
                self._hand_over()
        except BaseException:
            for row in by_question.values():
                self._forget(row)
            raise
        return [inquiry.answer for inquiry in inquiries]

    def asks(
        self, path: Path, *, task: str | None = None, question: str | None = None
    ) -> list[tuple[str, Future[Prediction]]]:
        """What the model answers of a file to a task or a question, by dataset; the file may go once this returns.
        Raises what `ask_together` and `datasets` do."""
        keys = self.datasets([task] if task else None, None, question)
        folder = self.place()
        bring(path, folder / f"medium{path.suffix}")
        name = f"{folder.name}/medium{path.suffix}"
        asked = [Inquiry(Question(dataset=key, name=name, question=question)) for key in keys]
        return list(zip(keys, self.ask_together(asked, folder), strict=True))

    def close(self, patience_seconds: float = 0.0) -> None:
        """Take nothing more, answer what waits for so long and what the model is at, end the threads, remove files."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting, patience_seconds)
            left, self._waiting = self._waiting, set()
            self._asked.clear()
            self._changed.notify_all()
        for inquiry in left:
            inquiry.fail(FullError("the server has stopped", where=self.model, fix="Ask again later."))
        with self._changed:
            self._changed.notify_all()  # what was ready, and has been told, is waited for by nobody
        for thread in self._threads:
            thread.join(self._decode_seconds)
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- decoding, in processes ---------------------------------------------------------------------------------------

    def _hand_over(self) -> None:
        """Give decoders what waits, as long as little is ready. The lock is held."""
        most = 4 * max(1, self._workers)
        while self._asked and self._pool is not None and len(self._decoding) < most and not self._holds_much():
            row = self._asked.popleft()
            if all(inquiry.answer.done() for inquiry in row.inquiries):
                self._waiting.difference_update(row.inquiries)
                self._forget(row)
                continue
            self._decoding[row.number] = row
            self._pool.request(row.number)
        self._changed.notify_all()

    def _holds_much(self) -> bool:
        """Whether so much is ready that nothing more is decoded before the model has answered some."""
        return sum(row.encoded.num_bytes for row in {each.row for each in self._ready}) >= self._most_bytes

    def _forget(self, row: _Row) -> None:
        """It is decoded, or given up: its files go, and those that were asked with it wait for it no more."""
        for path in (_asked_at(self.folder, row.number), _row_at(self.folder, row.number)):
            path.unlink(missing_ok=True)
        row.coming.discard(row)
        if not row.coming and row.folder is not None:
            shutil.rmtree(row.folder, ignore_errors=True)

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
        return self._closing and not self._waiting

    def _open_pool(self, stack: ExitStack) -> _Pool:
        rows = _Rows()
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
            lost, self._decoding = list(self._decoding.values()), {}
        for row in lost:
            self._give_up(row, error)
        time.sleep(0.1)

    def _decoded(self, number: int, outcome: Outcome) -> None:
        with self._changed:
            row = self._decoding.pop(number)
            if isinstance(outcome, Encoded):
                self._forget(row)
                row.encoded, row.ready_at = outcome, time.monotonic()
                self._ready += row.inquiries
            self._hand_over()
        if isinstance(outcome, Quarantined):
            self.counts["refused"] += 1
            self._give_up(row, MediaError(outcome.reason))
        elif isinstance(outcome, Failure):
            if not isinstance(outcome.error, HbaError):  # its words may be the client's
                _log.error("a row could not be encoded (%s)", type(outcome.error).__name__)
            self._give_up(row, outcome.error)

    def _give_up(self, row: _Row, error: Exception) -> None:
        with self._changed:
            self._waiting.difference_update(row.inquiries)
            self._forget(row)
            self._changed.notify_all()
        for inquiry in row.inquiries:
            inquiry.fail(error)

    # --- answering, in the thread that has the model ------------------------------------------------------------------

    def _answer(self) -> None:
        """The life of the thread that asks the model."""
        prepare_process(seed=0)  # how the processor treats denormal numbers is a matter of each thread
        while (batch := self._next()) is not None:
            started = time.monotonic()
            settled = self._settled([each for each in batch if each.claim()])
            self.counts["model_microseconds"] += int(1e6 * (time.monotonic() - started))
            self._let_go(batch)
            for inquiry, outcome in settled:
                if inquiry.answer.done():  # while its neighbours still spoke
                    continue
                if isinstance(outcome, Prediction):
                    inquiry.answer.set_result(outcome)
                else:
                    inquiry.answer.set_exception(outcome)

    def _let_go(self, inquiries: Sequence[Inquiry]) -> None:
        """These wait no more. It is called before they are told: who has an answer waits no more."""
        with self._changed:
            self._waiting.difference_update(inquiries)
            self._hand_over()

    def _next(self) -> list[Inquiry] | None:
        """The oldest inquiry that is ready, with all that was asked together with it, and those like it; None when all
        is done and the desk closes. Each look takes a time that grows with what is ready, not with its square."""
        most = self.config.batch_size
        with self._changed:
            while True:
                self._waiting.difference_update(each for each in self._ready if each.answer.done())
                self._ready = [each for each in self._ready if not each.answer.done()]
                if not self._ready and self._over():
                    return None
                like: defaultdict[object, list[Inquiry]] = defaultdict(list)
                for each in self._ready:
                    like[self._kind(each)].append(each)
                much = self._holds_much()
                first = next((each for each in self._ready
                              if much or not each.row.coming or len(like[self._kind(each)]) >= most), None)  # fmt: skip
                if first is None:
                    self._changed.wait(1)
                    continue
                batch = like[self._kind(first)][:most]
                wait = first.row.ready_at + self.window_seconds - time.monotonic()
                if len(batch) < most and wait > 0 and (self._asked or self._decoding):
                    self._changed.wait(wait)
                    continue
                taken = set(batch)
                self._ready = [each for each in self._ready if each not in taken]
                return batch

    def _kind(self, inquiry: Inquiry) -> tuple[object, ...]:
        """What inquiries of one batch have in common."""
        sample, saying = inquiry.row.encoded.sample, inquiry.saying
        drawn = None if saying is None else (saying.temperature, saying.top_p)
        return sample.modality_signature, self._has_classes(sample), drawn

    def _has_classes(self, sample: Sample) -> bool:
        return self.taxonomy.dataset(sample.dataset).domain is not None

    def _settled(self, inquiries: Sequence[Inquiry]) -> Iterable[tuple[Inquiry, Prediction | Exception]]:
        """What becomes of inquiries that are answered together; where that fails each is answered alone, so that none
        fails for its neighbour."""
        if not inquiries:
            return ()
        try:
            return list(zip(inquiries, self._predictions(inquiries), strict=True))
        except Exception as error:  # noqa: BLE001 - the boundary of a batch: whoever asked is told, the server goes on
            if isinstance(error, MachineError):
                _log.warning("%s", error)
            elif not isinstance(error, HbaError):
                _log.exception("the model failed on a batch of %s", plural(len(inquiries), "row"))
            # The frames of a traceback, and of that of what it came of, would keep the batch's tensors: some frames of
            # torch hold themselves, so that it is not enough to let go of the traceback.
            raised: BaseException | None = error
            seen: set[int] = set()  # two may have come of each other; not themselves, which would hold the tensors
            while raised is not None and id(raised) not in seen:
                traceback.clear_frames(raised.__traceback__)
                seen.add(id(raised))
                raised = raised.__cause__ or raised.__context__
            raised = None
            error.__traceback__ = error.__context__ = error.__cause__ = None
            if len(inquiries) == 1:
                return [(inquiries[0], error)]
        # Out of `except`, where what has failed is still held.
        return [pair for each in inquiries if not each.answer.done() for pair in self._settled([each])]

    def _predictions(self, inquiries: Sequence[Inquiry]) -> list[Prediction]:
        encoded = [each.row.encoded for each in inquiries]
        batch = collate(encoded, pad_token_id=self.backend.encoder.pad_token_id, taxonomy=self.taxonomy)
        outputs: Sequence[Output]
        with room(batch, halved("batch_size", batch)):
            if inquiries[0].saying is not None:
                outputs = _Speech(self.backend, batch.to(self.backend.model.device), inquiries, self._let_go).outputs()
            elif isinstance(self.backend, ChatBackend):
                outputs = self.backend.generate(batch)
            elif self._has_classes(batch.samples[0]):
                outputs = self.backend.classify(batch)
            else:
                outputs = self.backend.speak(batch)
        self.batch_sizes.append(len(batch))
        tokens = batch.num_tokens.tolist()
        self.counts.update(batches=1, rows=len(batch), tokens_in=sum(tokens))
        self.counts["tokens_out"] += sum(output.tokens_out or 0 for output in outputs)
        return [_predicted(batch, row, output) for row, output in enumerate(outputs)]


def _predicted(batch: Batch, row: int, output: Output) -> Prediction:
    return prediction_of(Answered(batch.samples[row], replace(output, tokens_in=int(batch.num_tokens[row]))))


class _Speech:
    """What the model says next in each talk of a batch, followed token by token: whoever listens is told, an answer
    ends where its own limits say, and whose answer is over while others go on is told at once, but for those who asked
    for log-probabilities, which are known at the end."""

    def __init__(
        self,
        backend: HeadsBackend | ChatBackend,
        batch: Batch,
        inquiries: Sequence[Inquiry],
        let_go: Callable[[Sequence[Inquiry]], None],
    ) -> None:
        """`let_go` is called with those who are told before the end."""
        self._model, self._taxonomy, self._let_go = backend.model, backend.encoder.taxonomy, let_go
        self._batch, self._inquiries = batch, inquiries
        self._sayings = [each.saying for each in inquiries if each.saying is not None]
        self._tokenizer = self._model.processor.tokenizer
        self._ends = end_token_ids(self._model.transformer, self._model.processor)
        self._opened = begun_turn(self._model.processor, batch)  # what of each answer the prompt has begun
        self._over = [False] * len(inquiries)

    def outputs(self) -> list[Output]:
        """The answers, once all are over."""
        sayings, first = self._sayings, self._sayings[0]
        longest = max(saying.max_tokens for saying in sayings)
        uniforms_BL = torch.zeros(len(sayings), longest, dtype=torch.float64)
        for row, saying in enumerate(sayings):
            drawn = torch.Generator().manual_seed(saying.seed)
            uniforms_BL[row, : saying.max_tokens] = torch.rand(saying.max_tokens, generator=drawn, dtype=torch.float64)
        wanted = [saying.alternatives for saying in sayings if saying.alternatives is not None]
        said = self._model.say(
            self._batch,
            max_new_tokens=longest,
            temperature=first.temperature,
            top_p=first.top_p,
            alternatives=max(wanted, default=None),
            uniforms_BL=uniforms_BL if first.temperature > 0 else None,
            over=self._ended,
        )
        return [self._output(row, one) for row, one in enumerate(said)]

    def _output(self, row: int, one: Said) -> Output:
        inquiry, saying = self._inquiries[row], self._sayings[row]
        text, stopped = _until(one.text, saying.stop)
        shown = one.ranked[:-1] if one.finish(self._ends) == "stop" else one.ranked
        if stopped and shown:
            shown = shown[: _tokens_of(text, one.ids, self._tokenizer)]
        inquiry.ranked = tuple(each[: 1 + (saying.alternatives or 0)] for each in shown)
        inquiry.hear(self._opened + text)
        known: dict[str, Any] = {"tokens_out": one.tokens, "finish": "stop" if stopped else one.finish(self._ends)}
        return spoken(self._batch.samples[row], self._opened + text, self._taxonomy, **known)

    def _ended(self, ids_BL: Tensor) -> Tensor:
        """Which rows [B] end after these tokens, or have ended."""
        rows = ids_BL.tolist()
        now = [row for row, ids in enumerate(rows) if not self._over[row] and self._is_over(row, ids)]
        for row in now:
            self._over[row] = True
        for row in now if not all(self._over) else ():
            if self._sayings[row].alternatives is None:
                one = Said(self._tokenizer.decode(rows[row], skip_special_tokens=True), tuple(rows[row]))
                prediction = _predicted(self._batch, row, self._output(row, one))
                self._let_go([self._inquiries[row]])
                self._inquiries[row].answer.set_result(prediction)
        return torch.tensor(self._over)

    def _is_over(self, row: int, ids: Sequence[int]) -> bool:
        inquiry, saying = self._inquiries[row], self._sayings[row]
        if ids[-1] in self._ends or len(ids) >= saying.max_tokens or inquiry.gone:
            return True
        if inquiry.tell is None and not saying.stop:
            return False
        text, stopped = _until(self._tokenizer.decode(ids, skip_special_tokens=True), saying.stop)
        if not stopped:
            text = text.rstrip("\ufffd")  # half a character
            # What may be the beginning of a text that ends the answer is not told yet.
            most = len(text) + 1
            begun = (n for stop in saying.stop for n in range(1, min(len(stop), most)) if text.endswith(stop[:n]))
            text = text[: len(text) - max(begun, default=0)]
        inquiry.hear(self._opened + text)
        return stopped


def _until(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """A text up to the first of `stops`, and whether there is one."""
    places = [place for place in map(text.find, stops) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


def _tokens_of(text: str, ids: Sequence[int], tokenizer: Any) -> int:
    """How many of the tokens `ids` a text has that is the beginning of theirs; one that it has in part counts."""
    heads = (tokenizer.decode(ids[:count], skip_special_tokens=True) for count in range(len(ids)))
    return next((count for count, head in enumerate(heads) if head.startswith(text)), len(ids))


# --- what worker processes do -----------------------------------------------------------------------------------------


def _asked_at(folder: Path, number: int | str) -> Path:
    return folder / f"{number}.json"


def _row_at(folder: Path, number: int | str) -> Path:
    return folder / f"{number}.jsonl"


def _measuring(dataset: str, dims: Mapping[str, int], model: str) -> Settings | HbaError:
    """What measures the descriptors that adapters read, or why nothing does."""
    try:
        settings = descriptors_of(dataset, dims, model)
        settings.extractors()
        if settings.video:
            python_of_environment()
    except HbaError as error:
        return error
    return settings


class _Rows:
    """In the place of an atlas, and of its media: a row of any number, of which nothing is known before a worker looks,
    and nothing is left once it has been encoded."""

    def __getitem__(self, number: int) -> Sample:
        known: dict[str, Any] = dict.fromkeys(("problem", "answer", "dataset", "task", "modality_signature"), "")
        known |= dict.fromkeys(("images", "videos", "audios", "ext_video_feats", "ext_audio_feats"), 0)
        about: dict[str, Any] = {"id": str(number), "split": "asked", "where": f"request {number}", "number": number}
        return Sample(**about, **known, label=None, texts=(), source=_NOWHERE)

    def medium(self, number: int, name: str, index: int, *, where: str) -> Any:
        raise MediaError("its media were removed once they were decoded", where=where)


_NOWHERE = _Rows()


class _InTurn:
    """Where there are no worker processes: rows are decoded in the desk's own thread."""

    def __init__(self, rows: _Rows, reader: _Reader) -> None:
        self._encoded = partial(encode_row, rows, reader)  # type: ignore[arg-type]

    def request(self, row: int) -> None:
        """Nothing is done before it is waited for."""

    def first(self, rows: Collection[int]) -> tuple[int, Outcome]:
        number = next(iter(tuple(rows)))
        try:
            return number, self._encoded(number)
        except Exception as error:  # noqa: BLE001 - the boundary of one request, as in a worker
            return number, Failure(error, "")


class _Reader:
    """In the place of an encoder: makes the row that is asked, and encodes it."""

    def __init__(self, folder: Path, encoder: Encoder, measured: Mapping[str, Settings]) -> None:
        """`measured` says what measures the descriptors of a dataset that has adapters."""
        self._folder, self._encoder = folder, encoder
        self._extract = {key: Extract(settings) for key, settings in measured.items()}
        how: dict[str, Any] = {"descriptors": encoder.descriptors, "dims": encoder.dims}
        self._talk = _Talk(encoder.processor, encoder.config, encoder.taxonomy, **how)

    def encode(self, asked: Sample) -> Encoded:
        """What the model is given. Raises MediaError for a file that is none, or cannot be read."""
        folder, encoder = self._folder, self._encoder
        question = msgspec.json.decode(_asked_at(folder, asked.id).read_bytes(), type=Question)
        if question.turns:
            encoder, row, extract = self._talk, self._row_of_talk(question), None
        else:
            medium, extract = self._looked_at(question.name), self._extract.get(question.dataset)
            how: dict[str, Any] = {"question": question.question, "transcript": question.transcript}
            row = row_of(medium, question.name, question.dataset, encoder.taxonomy, **how)
        if extract is not None:  # descriptors are made beside the rows of an atlas
            folder = (folder / question.name).parent / asked.id
            bring(self._folder / question.name, folder / question.name)
        # Not atomic_write: it waits for the disk, and this is read at once and removed.
        _row_at(folder, asked.id).write_bytes(msgspec.json.encode(row | {"id": asked.id}))
        if extract is not None:
            self._describe(folder, asked.id, extract)
        sample = JsonlStore(_row_at(folder, asked.id), split="asked", taxonomy=encoder.taxonomy).sample(0, {})
        encoded = encoder.encode(sample)
        own = replace(sample, source=asked.source, refused={})
        windows = tuple(replace(window, sample=own) for window in encoded.windows)
        return replace(encoded, sample=own, windows=windows)

    def _describe(self, folder: Path, split: str, extract: Extract) -> None:
        """Measure what the adapters read, and name it in the row, as `hba ask` does."""
        save_beside(self._encoder.taxonomy, folder)
        plan, kept = make_plan(folder, [split], extract.settings, ()), folder / DESCRIBED
        kept.mkdir()
        for item in plan.items.values():
            made = extract(item)
            if isinstance(made, HbaError):
                raise made
            if isinstance(made, Failed):
                raise MediaError(f"no descriptors: {made.reason}")
        for rows in plan.files:
            link_rows(rows, set(plan.items), kept)

    def _looked_at(self, name: str) -> Medium:
        """What a file holds; where the encoding says how the sound of clips is heard, clips are clips alone."""
        medium = look_at(self._folder / name)
        alone = self._encoder.config.sound_of_clips != "off" and "video" in medium.kinds
        return medium._replace(kinds=("video",)) if alone else medium

    def _row_of_talk(self, question: Question) -> dict[str, Any]:
        """The row of a talk; what of each medium is taken is known once it has been looked at."""
        media: dict[str, list[str]] = {"image": [], "video": [], "audio": []}
        turns = []
        for turn in question.turns:
            parts: list[tuple[str, str]] = []
            for part in turn.parts:
                if not part.kind:
                    parts.append(("text", part.text))
                    continue
                clip = part.kind == "video"
                found = self._looked_at(part.name).kinds if clip else look_at(self._folder / part.name).kinds
                if part.kind not in found:
                    what = f"is no {part.kind}" if not found else f"holds {' and '.join(found)}, and no {part.kind}"
                    raise MediaError(what, where=part.name, fix="Give it as what it is.")
                # As `hba ask` does, the sound of a clip is heard, too.
                for kind in found if clip else (part.kind,):
                    parts.append((kind, ""))
                    media[kind].append(part.name)
            turns.append((turn.role, parts))
        signature = "_".join(["text", *(kind for kind, names in media.items() if names)])
        about = {"dataset": question.dataset, "task": "talk_qa", "modality_signature": signature, "turns": turns}
        return {"problem": "A talk.", "answer": None, **about} | {f"{kind}s": names for kind, names in media.items()}


class _Talk(Encoder):
    """Encodes a talk of several turns, whose media stand where they were given."""

    def messages(self, sample: Sample, sounds: int | None = None) -> list[dict[str, Any]]:
        """The turns, with the config's system prompt where the talk has none. Sounds of clips stand in front, as in a
        row's prompt."""
        config, how = self.config, sound_of_clips(sample, self.config)
        plain, messages = PlainText(self.processor), []
        kinds = [kind for kind in config.modalities if kind != "audio" or how != "interleaved"]
        for role, parts in sample.extra["turns"]:
            content = [{"type": "text", "text": plain(text)} if kind == "text" else {"type": kind}
                       for kind, text in parts if kind == "text" or kind in kinds]  # fmt: skip
            messages.append({"role": role, "content": content})
        if how == "separate":
            first = next(turn for turn in messages if turn["role"] == "user")
            first["content"] = [{"type": "audio"}] * (sample.videos if sounds is None else sounds) + first["content"]
        if config.system_prompt is not None and messages[0]["role"] != "system":
            system = [{"type": "text", "text": config.system_prompt}]
            messages.insert(0, {"role": "system", "content": system})
        return messages
