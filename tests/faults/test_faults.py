"""A sample of `benchmarks/faults.py`, and a proof that it sees faults."""

import random
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from support.faults import WRONG, Bench, damage, differences, is_finite, kill, odd_reward
from support.odd_settings import try_settings


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_killed_at_a_random_write_it_ends_as_if_never_killed(number, bench):
    outcome, case = kill(bench, random.Random(number))
    assert outcome == "equal", case


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3])
def test_damaged_files_cost_no_more_than_a_message_says(number, bench):
    outcome, case = damage(bench, random.Random(number))
    assert outcome not in WRONG, case


@pytest.mark.slow
def test_odd_settings_are_refused_or_train_to_finite_weights(bench):
    outcomes = try_settings(bench, first=1, most=8)
    assert [found for found in outcomes if found[0] in WRONG] == []
    assert {"refused", "finished"} <= {outcome for outcome, _ in outcomes}


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3])
def test_odd_rewards_end_in_a_sentence_or_change_nothing(number, bench):
    outcome, case = odd_reward(bench, random.Random(number))
    assert outcome not in WRONG, case


@pytest.mark.slow
def test_faults_are_seen(bench, tmp_path):
    """The harness finds a changed weight, a lost line, NaN, a traceback, a missing message and a stage that hangs."""
    whole = bench.whole("rloo", "rloo.trainer.max_steps=6", "rloo.trainer.num_iterations=1")
    other = tmp_path / "rloo"
    shutil.copytree(whole, other)
    assert differences(whole, other) == [] and is_finite(other)
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join(lines[:2] + lines[3:]))
    weights = load_file(other / "model.safetensors")
    weights[min(weights)] = weights[min(weights)] * float("nan")
    save_file(weights, other / "model.safetensors")
    assert differences(whole, other) == ["model.safetensors", "metrics.jsonl"] and not is_finite(other)
    (bench.folder / "said").mkdir()
    for said, code, outcome in (
        ("Traceback (most recent call last)\nerror: x", 2, "traceback"),
        ("error: x", 1, "traceback"),
        ("", 2, "traceback"),
        ("error: x", 2, "failed with a sentence"),
        ("", None, "hangs"),
    ):
        (bench.folder / "said" / "output.txt").write_text(said)
        assert bench.ended("said", code) == outcome
