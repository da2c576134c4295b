"""Eight processes of which one dies, or gets a signal, in each phase; `benchmarks/rank_campaign.py` has the cases."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from rank_campaign import CASES, STAGES, Campaign, found, lines


@pytest.fixture(scope="module")
def campaign(tmp_path_factory, launch, mini_atlas, backbone):
    made = Campaign(tmp_path_factory.mktemp("campaign"), launch)
    made.prepare(mini_atlas, backbone)
    return made


# RL dies in all of its phases in one run of test_rl_ranks.py.
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("rl", "predict"))])
def test_a_run_that_loses_a_rank_ends_as_that_of_one_process(campaign, tmp_path, name):
    """The others end by themselves with the documented code; no step and no sample is lost or done twice."""
    case, run = CASES[name], tmp_path / "run"
    alone = campaign.uninterrupted(case)
    died = campaign.killed(case, run)
    campaign.again(case, run, case.resumed_on)
    campaign.compare(run, alone)
    others = [err for err, code in zip(died.err, died.codes, strict=True) if code != -9]
    told = "its checkpoint is written" if case.codes else "another process of this run has ended"
    silent = [err for err in others if told not in err or "Traceback" in err]
    assert not silent, silent[0]


def test_every_sample_of_an_epoch_is_trained_on_once_or_named(campaign, tmp_path):
    case = CASES["sft, whole epoch"]
    alone = found(campaign.uninterrupted(case))
    of_tess = [row for row in lines(campaign.atlas / "train.jsonl") if row["dataset"] == "tess"]
    named = [name for name in alone.quarantined if name.startswith("train/")]
    assert (len(of_tess), len(named), len(alone.skipped)) == (7, 1, 1)
    assert max(alone.samples.values()) == 6


def test_the_features_of_a_rank_that_dies_are_computed_by_the_others(campaign, tmp_path):
    case, run = CASES["qa, features"], tmp_path / "run"
    died = campaign.launch(campaign.arguments(case, run), ranks=8, dies=case.dies)
    assert -9 in died.codes
    # Seven rows of each of three datasets in batches of five, of which one was in the hands of the rank that died.
    shards = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("run-features/train/*/shard_*"))
    assert len(shards) == 6, shards


PREDICTIONS = {name: case for name, case in (STAGES | CASES).items() if case.command == "predict"}


@pytest.mark.parametrize("name", PREDICTIONS)
def test_predictions_that_lose_a_rank_are_those_of_one_process(campaign, tmp_path, name):
    """Every row once, merged and scored, to the last bit; one process speaks for all."""
    case, run = PREDICTIONS[name], tmp_path / "run"
    died = campaign.killed(case, run)
    campaign.again(case, run, case.resumed_on if isinstance(case.resumed_on, int) else 8)
    campaign.compare_predictions(run, campaign.uninterrupted(case))
    assert len({record["dataset"] for record in lines(run / "quarantine.jsonl")}) > 5
    assert not [err for err in died.err if "Traceback" in err]
    campaign.again(case, run, 8)  # a finished run, run again
    campaign.compare_predictions(run, campaign.uninterrupted(case))
