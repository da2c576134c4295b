"""Does a command on eight processes end as on one, whatever happens on the way? Prints a table.

    python benchmarks/rank_campaign.py [NAME ...]

Every case is run once on one process without interruption, and once on eight (gloo, tiny model), where one rank is
killed with -9 in the named phase (or gets a signal), and the others have to end by themselves; then the same command
goes on, from there on eight, three and one. First come the stages, each over a whole epoch, where every row is trained
on once or named in quarantine; then the other phases in which a rank may die, which go on on one of the numbers. Rows
of a dataset are prime in number, and in every dataset a medium cannot be read. Compared with one process: losses
(relative 1e-4) and samples of every step, what is in quarantine, the exit codes. Of RL, whose loss is near 0 by
construction, the norm of the gradient stands for it; of predictions, every row to the last bit, and the scores.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "servers"))
from ranks import Dies, Ended, RankLauncher
from rl_run import write_reward

from hba.taxonomy import BUILTIN

TINY = ("encode.num_frames=2", "encode.min_pixels=3136", "encode.max_pixels=3136", "loader.workers=0")
STEPS = ("train.log_every=1", "train.max_steps=6", "train.epochs=3", "train.learning_rate=1e-3")
TOLERANCE = 1e-4
PATIENCE = 900.0  # seconds for all of a command that nothing holds up, on a busy machine


class Case(NamedTuple):
    """A command, where a rank dies, with which codes the ranks then end, and on how many processes it goes on."""

    command: str
    config: Sequence[str]
    dies: Dies
    resumed_on: int | Sequence[int]  # of several numbers, on each of them from the same death
    codes: Sequence[int] | None = None  # of all ranks; by default -9 of the one that dies, 1 of the others


EVERYWHERE = (8, 3, 1)
EPOCH = ("train.epochs=1", "train.max_steps=null")
SEEN_OR_HEARD = "datasets=[tess,meld_emotion,daicwoz]"
LOADS, EXCHANGE = "hba.batch.encode:Encoder.encode", "hba.train.ranks:Ranks.add_up_gradients"
ANSWER = "hba.evaluate.predictions:PredictionLog.append"
IN_WORDS = ("batch_size=1", "--backend=hf", "generation.max_tokens=4")
STAGES = {
    "sft": Case("sft", ("train.batch_size=5", SEEN_OR_HEARD, *EPOCH), Dies(6, EXCHANGE, call=4), EVERYWHERE),
    "lm": Case("lm", ("train.batch_size=5", SEEN_OR_HEARD, *EPOCH), Dies(3, EXCHANGE, call=4), EVERYWHERE),
    "qa": Case("qa", ("train.batch_size=4", *EPOCH), Dies(5, EXCHANGE, call=4), EVERYWHERE),
    "bam": Case("bam", ("train.batch_size=4", *EPOCH), Dies(2, EXCHANGE, call=4), EVERYWHERE),
    "rl": Case(
        "rl",
        ("train.batch_size=5", SEEN_OR_HEARD, *EPOCH, "validation_split=validation"),
        Dies(5, "hba.rl.local:update", call=4),
        EVERYWHERE,
    ),
    "predict": Case("predict", ("batch_size=5",), Dies(5, LOADS, call=4), EVERYWHERE),
}
CASES = {
    # A batch of 5 on 8 ranks, each with at most one sample at once.
    "sft, load": Case("sft", ("train.batch_size=5", "train.device_batch_size=1"), Dies(3, LOADS, call=4), 8),
    # Pieces of unequal numbers of samples, a sample of more than the budget alone.
    "sft, forward": Case(
        "sft", ("train.batch_size=13", "train.device_tokens=120"), Dies(5, "hba.train.sft:sft_loss", call=3), 3
    ),
    "sft, exchange": Case("sft", ("train.batch_size=7", "train.accumulation=2"), Dies(6, EXCHANGE, call=4), 1),
    "sft, validate": Case("sft", ("train.batch_size=11",), Dies(2, "hba.train.sft:validate_heads", call=2), 3),
    "sft, SIGUSR1": Case(
        "sft",
        ("train.batch_size=5", "train.validate_every=6", "train.save_every=null"),
        Dies(7, EXCHANGE, call=4, signal="SIGUSR1"),
        3,
        codes=[75] * 8,
    ),
    # One epoch of seven rows, one at a time: a step has one sample on one of the ranks, and one step has none on any.
    "sft, whole epoch": Case(
        "sft",
        ("train.batch_size=1", "datasets=[tess]", "train.epochs=1", "train.max_steps=null", "train.validate_every=9"),
        Dies(4, "hba.train.ranks:Ranks.meet", call=6),
        3,
    ),
    "sft sharded, save": Case(
        "sft",
        ("train.batch_size=5", "train.device_batch_size=1", "train.sharding=full", "model.lora_r=4"),
        Dies(4, "hba.train.state:whole_weights", call=2),
        3,
    ),
    "lm, save": Case("lm", ("train.batch_size=5",), Dies(0, "hba.train.lm:save_checkpoint", "after", call=2), 8),
    "qa, features": Case("qa", ("train.batch_size=3",), Dies(None, "hba.train.features:write_shard"), 8),
    "qa, validate": Case("qa", ("train.batch_size=5",), Dies(0, "hba.train.qa:validate_answers", "after"), 1),
    "bam, features": Case("bam", ("train.batch_size=3",), Dies(None, "hba.train.features:extract"), 3),
    "bam full, forward": Case(
        "bam", ("train.batch_size=3", "stage=full", "train.sharding=full"), Dies(3, "hba.train.bam:bam_loss", call=3), 1
    ),
    # Three runs one after the other; rank 5 dies in the forward pass of the second.
    "transfer, forward": Case(
        "transfer", ("train.batch_size=13", "train.max_steps=3"), Dies(5, "hba.train.sft:sft_loss", call=5), 3
    ),
    "rl, rollout": Case("rl", ("train.batch_size=5",), Dies(3, "hba.rl.local:roll_out", call=3), 8),
    "rl, reward": Case("rl", ("train.batch_size=5",), Dies(5, "hba.rl.local:_rewarded", "after", call=3), 3),
    "rl, update": Case("rl", ("train.batch_size=5",), Dies(0, "torch.optim:AdamW.step", "after", call=4), 1),
    "rl, save": Case("rl", ("train.batch_size=5",), Dies(7, "hba.train.state:save_optimizer", call=2), 3),
    "rl sharded, update": Case(
        "rl", ("train.batch_size=5", "train.sharding=full"), Dies(2, "hba.rl.local:surrogate", call=4), 3
    ),
    "rl dapo, SIGTERM": Case(
        "rl",
        ("train.batch_size=3", "algorithm=dapo", "max_extra_batches=1", "train.validate_every=6"),
        Dies(6, "hba.rl.local:update", call=3, signal="SIGTERM"),
        3,
        codes=[75] * 8,
    ),
    "predict, answer": Case("predict", ("batch_size=5",), Dies(3, ANSWER, "after", call=4), 3),
    "predict, merge": Case("predict", ("batch_size=5",), Dies(None, "hba.evaluate.predict:_merge_quarantines"), 1),
    "predict, in words": Case("predict", IN_WORDS, Dies(0, ANSWER, call=2), 8),
}  # fmt: skip
HELD_OUT = "daicwoz"


class Found(NamedTuple):
    """What a finished run left: by step the loss and the samples seen until then; the ids in quarantine."""

    losses: dict[int, float]
    samples: dict[int, int]
    skipped: set[int]
    quarantined: set[str]


def lines(path: Path) -> list[dict]:
    """The records of a log."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def found(run: Path) -> Found:
    """Read it from the run folder. AssertionError for a step that stands in the log twice."""
    log = lines(run / "log.jsonl")
    trained = [record for record in log if record["kind"] in ("train", "rl")]
    kept = lines(run / "quarantine.jsonl")
    assert len({r["step"] for r in trained}) == len(trained) and len({r["id"] for r in kept}) == len(kept)
    return Found(
        {record["step"]: record["loss" if record["kind"] == "train" else "grad_norm"] for record in trained},
        {record["step"]: record["samples_seen"] for record in trained},
        {record["step"] for record in log if record["kind"] == "skipped"},
        {record["id"] for record in kept},
    )


class Campaign:
    """In a folder: data, backbone and stage 1 that the cases stand on, and the runs of one process, one a config."""

    def __init__(self, folder: Path, launch: RankLauncher) -> None:
        self.folder, self.launch = folder, launch
        self.atlas, self.backbone, self.base = folder / "atlas", folder / "tiny", folder / "base"
        self.alone: dict[tuple[str, ...], Path] = {}

    def prepare(self, mini_atlas: Path, backbone: Path) -> None:
        """Make them of a mini-atlas and a tiny backbone."""
        self.backbone = backbone
        prime_atlas(mini_atlas, self.atlas)
        write_reward(self.folder)
        speaks = ("answer_weight=1", "train.max_steps=2", "train.batch_size=32", "model.strategy=full")
        config = [f"atlas={mini_atlas}", f"model.name={backbone}", "validation_split=validation[:9]", *TINY, *speaks]
        done = self.launch(["train", "sft", "--run", self.base, *config], ranks=1)
        assert done.code == 0, done.err

    def arguments(self, case: Case, run: Path) -> list[str]:
        """The command of a case."""
        if case.command == "predict":
            asked = ["--atlas", str(self.atlas), "--split", "train", "--run", str(run)]
            return ["predict", str(self.base), *asked, "loader.workers=0", *case.config]
        shared = [f"atlas={self.atlas}", *STEPS, "train.validate_every=3", "train.save_every=2"]
        if case.command in ("sft", "lm", "transfer"):
            strategy = "full" if case.command == "lm" else "lora"
            shared += [f"model.name={self.backbone}", f"model.strategy={strategy}", "model.lora_dropout=0.0", *TINY]
            rows = "validation" if case.command == "transfer" else "validation[:17]"
            shared += [f"validation_split={rows}"]
        elif case.command == "rl":
            shared += [f"model.name={self.backbone}", "model.strategy=full", *TINY, "validation_split=validation[:7]"]
            shared += [f"reward.function={self.folder / 'own.py'}:letters", "rollout.per_prompt=3"]
            shared += ["rollout.max_new_tokens=5", "loss.updates=2"]
        else:
            shared += [f"base={self.base}", f"features.folder={run}-features", "features.batch_size=5"]
            shared += ["features.loader.workers=0"]
        if case.command == "bam":
            still = ("dropout=0.0", "modality_dropout=0.0", "descriptors.allow_missing=true")
            shared += ["datasets=[daicwoz,siq2,ptsd_in_the_wild]", *still]
        command = ["train", case.command] if case.command != "transfer" else ["transfer", "--heldout", HELD_OUT]
        return [*command, "--run", str(run), *shared, *case.config]

    def uninterrupted(self, case: Case) -> Path:
        """The run of one process, without a kill."""
        key = (case.command, *case.config)
        if key not in self.alone:
            run = self.folder / f"alone-{len(self.alone)}"
            done = self.launch(self.arguments(case, run), ranks=1, timeout=PATIENCE, grace=PATIENCE)
            assert done.code == 2, done.err  # samples are in quarantine
            self.alone[key] = run
        return self.alone[key]

    def killed(self, case: Case, run: Path) -> Ended:
        """Eight ranks of which one dies. AssertionError unless the others end by themselves with the code for it."""
        if case.command == "predict":  # processes that know nothing of each other: the others do their shares
            died = self.launch(self.arguments(case, run), dies=case.dies, timeout=PATIENCE, grace=PATIENCE)
            assert died.codes.count(-9) == 1 and set(died.codes) <= {-9, 0, 2}, (died.codes, died.err)
            return died
        died = self.launch(self.arguments(case, run), dies=case.dies)
        dead = died.codes.index(-9) if case.dies.rank is None and -9 in died.codes else case.dies.rank
        expected = case.codes or [-9 if rank == dead else 1 for rank in range(8)]
        assert died.codes == list(expected), (died.codes, died.err)
        return died

    def again(self, case: Case, run: Path, ranks: int) -> Ended:
        """The same command on so many processes. AssertionError unless it ends as one that has left samples out."""
        resumed = self.launch(self.arguments(case, run), ranks=ranks, timeout=PATIENCE, grace=PATIENCE)
        if case.command == "predict":
            # Who finds that all is done merges, and speaks for all.
            assert sorted(resumed.codes) == [0] * (ranks - 1) + [2], (resumed.codes, resumed.err)
            return resumed
        # Samples are in quarantine. Of a protocol of several runs the first rank alone predicts, and speaks.
        others = 0 if case.command == "transfer" else 2
        assert resumed.codes == [2] + [others] * (ranks - 1), (resumed.codes, resumed.err)
        return resumed

    def rows(self, case: Case) -> int | None:
        """How many rows a case goes through, each once; None for one of other than one whole epoch."""
        if not set(EPOCH) <= set(case.config):
            return None
        named = [word for word in self.arguments(case, Path("run")) if word.startswith("datasets=")]
        keys = {key for word in named for key in word.removeprefix("datasets=[").rstrip("]").split(",")}
        rows = lines(self.atlas / "train.jsonl")
        return sum(row["dataset"] in keys if keys else BUILTIN.dataset(row["dataset"]).domain is None for row in rows)

    def compare(self, run: Path, alone: Path) -> float:
        """The largest relative difference of a loss. AssertionError where anything else differs, or it is too large."""
        parts = sorted(log.parent.relative_to(alone) for log in alone.glob("**/log.jsonl"))
        assert parts == sorted(log.parent.relative_to(run) for log in run.glob("**/log.jsonl"))
        return max(self._compare_run(run / part, alone / part) for part in parts)

    def compare_predictions(self, run: Path, alone: Path) -> float:
        """0: the largest difference of a probability. AssertionError for a row that is missing, twice or other, to the
        last bit, and for other scores."""
        ours, theirs = (
            sorted(({**p, "latency_s": None} for p in lines(each / "predictions.jsonl")), key=lambda p: p["id"])
            for each in (run, alone)
        )
        named, expected = (sorted(record["id"] for record in lines(each / "quarantine.jsonl")) for each in (run, alone))
        assert named == expected and not (run / "shards").exists(), (named, expected)
        assert ours == theirs and len({p["id"] for p in ours}) == len(ours), (ours, theirs)
        for each in (run, alone):
            done = self.launch(["score", each, "--resamples", "100"], ranks=1, timeout=PATIENCE)
            assert done.code == 0, done.err
        scored, whole = (json.loads((each / "metrics.json").read_text())["tasks"] for each in (run, alone))
        assert scored == whole and len(whole) > 1
        return 0.0

    def _compare_run(self, run: Path, alone: Path) -> float:
        ours, theirs = found(run), found(alone)
        assert ours[1:] == theirs[1:], (ours, theirs)
        assert ours.losses.keys() == theirs.losses.keys()
        worst = max(abs(loss / theirs.losses[step] - 1) for step, loss in ours.losses.items())
        assert worst < TOLERANCE, (ours.losses, theirs.losses)
        return worst


def prime_atlas(mini: Path, out: Path) -> None:
    """A copy of a mini-atlas with a prime number of rows of each dataset, of which one cannot be read."""
    shutil.copytree(mini, out)
    for split, size in (("train", 7), ("validation", 3)):
        file = out / f"{split}.jsonl"
        kept = defaultdict(list)
        for row in map(json.loads, file.read_text().splitlines()):
            if len(kept[row["dataset"]]) < size:
                kept[row["dataset"]].append(row)
        file.write_text("".join(json.dumps(row) + "\n" for rows in kept.values() for row in rows))
        for rows in kept.values():
            media = [path for row in rows for path in (*row.get("audios", ()), *row.get("videos", ()))]
            if media:
                (out / media[0]).write_bytes(b"no medium")


def row(campaign: Campaign, case: Case, run: Path, died: Ended, resumed: Ended) -> list[object]:
    """A line of the table. AssertionError where `run` has not ended as that of one process."""
    alone = campaign.uninterrupted(case)
    if case.command == "predict":
        worst, steps = campaign.compare_predictions(run, alone), "-"
        done, named = len(lines(run / "predictions.jsonl")), len(lines(run / "quarantine.jsonl"))
        rows = sum(json.loads((run / "predict.json").read_text())["asked"].values())
    else:
        worst, end = campaign.compare(run, alone), found(next(log.parent for log in run.glob("**/log.jsonl")))
        steps, rows = max(end.samples), campaign.rows(case)
        done, named = end.samples[steps], sum(name.startswith("train/") for name in end.quarantined)
    assert rows in (None, done + named), (rows, done, named)
    once = f"{done} + {named} of {rows}" if rows is not None else f"{done} + {named}"
    lost = "first" if case.dies.rank is None else f"rank {case.dies.rank}"
    how, again = ("/".join(str(code) for code in sorted(set(ended.codes))) for ended in (died, resumed))
    return [lost, how, len(resumed.codes), again, steps, once, f"{worst:.1e}", f"{resumed.cpu_seconds:.0f}"]


HEADS = (("case", 20), ("lost of 8", 10), ("codes", 7), ("again on", 9), ("codes", 6), ("steps", 6))
HEADS += (("done + named", 16), ("worst", 9), ("cpu s", 6))


def main() -> None:
    """Run the cases that are named, or all, and print the table."""
    from hba.atlas import open_atlas
    from hba.mini import build_mini_atlas
    from hba.model.tiny import atlas_texts, build_tiny

    cases = STAGES | CASES
    names = sys.argv[1:] or list(cases)
    launch = RankLauncher()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        build_mini_atlas(folder / "mini", size="tiny", seed=0, workers=1)
        build_tiny(folder / "tiny", atlas_texts(open_atlas(folder / "mini", split="train")), seed=0)
        campaign = Campaign(folder, launch)
        campaign.prepare(folder / "mini", folder / "tiny")
        print("".join(f"{head:>{width}}" if at else f"{head:{width}}" for at, (head, width) in enumerate(HEADS)))
        for name in names:
            case, first = cases[name], folder / "killed"
            campaign.uninterrupted(case)
            died = campaign.killed(case, first)
            for ranks in (case.resumed_on,) if isinstance(case.resumed_on, int) else case.resumed_on:
                run = folder / "again"
                for kept in folder.glob("killed*"):  # the run, and its features
                    shutil.copytree(kept, folder / kept.name.replace("killed", "again", 1), symlinks=True)
                cells = [name, *row(campaign, case, run, died, campaign.again(case, run, ranks))]
                texts = zip(cells, HEADS, strict=True)
                print("".join(f"{t!s:>{w}}" if at else f"{t:{w}}" for at, (t, (_, w)) in enumerate(texts)), flush=True)
                for made in folder.glob("again*"):
                    shutil.rmtree(made)
            for made in folder.glob("killed*"):
                shutil.rmtree(made)
    launch.close()


if __name__ == "__main__":
    main()
