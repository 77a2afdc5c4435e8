"""The benchmark's smoke test, and what the reference numbers must be before a trainer is compared with them."""

import json
import sys

import numpy as np
import pytest
import torch

from support.places import DATA, ROOT
from support.processes import run_python

ABOUT = json.loads((DATA / "trl_1_12_ppo.json").read_text(encoding="utf-8"))


@pytest.fixture
def runner(monkeypatch):
    """`benchmarks/ppo_vs_trl.py` as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import ppo_vs_trl

    yield ppo_vs_trl
    for name in ("ppo_vs_trl", "trl_venv"):
        sys.modules.pop(name)


@pytest.fixture
def scaling(monkeypatch):
    """`benchmarks/scaling.py` as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import scaling

    yield scaling
    sys.modules.pop("scaling")


@pytest.fixture(scope="module")
def arrays():
    with np.load(DATA / "trl_1_12_ppo.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.mark.slow
def test_benchmark_runs_and_ends_in_json(tmp_path):
    done = run_python(
        str(ROOT / "benchmarks/ppo_vs_trl.py"),
        *("--quick", "--threads", "1", "--contenders", "ours_ppo_shared", "ours_ppo_separate", "ours_rloo"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    smallest, largest = result["ppo_over_rloo_time_spread"]
    assert 0.1 < smallest <= result["ppo_over_rloo_time"] <= largest < 10
    assert result["episodes_ratio_separate"] is None  # TRL's side was left out


@pytest.mark.slow
def test_gpu_benchmark_runs_without_one(tmp_path):
    arguments = ("--sizes", "tiny", "--stages", "rloo", "--modes", "lora", "--parts", "identities", "resume", "memory")
    done = run_python(str(ROOT / "benchmarks/gpu.py"), *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["identities rloo tiny float32"]["within"]
    assert found["resume rloo tiny"]["resumed_equal"]
    memory = found["memory rloo tiny lora"]
    assert memory["planned_gb"] > 0 and memory["peak_gb"] is None  # without a GPU


def test_gpu_benchmark_skips_what_has_no_time_left(tmp_path):
    done = run_python(str(ROOT / "benchmarks/gpu.py"), "--sizes", "tiny", "--minutes", "0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 15 and all("skipped" in of_part for of_part in found.values())


@pytest.mark.slow
def test_more_processes_change_no_weights_and_send_what_they_must(tmp_path):
    done = run_python(
        *(str(ROOT / "benchmarks/scaling.py"), "--quick", "--kinds", "ddp", "zero2", "--accumulation", "2"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    one, *several = json.loads(done.stdout.splitlines()[-1])["launches"]
    assert one["losses"][1] != one["losses"][0] and sum(one["bytes"].values()) == 0
    assert [(row["kind"], row["processes"]) for row in several] == [("ddp", 2), ("zero2", 2)]
    for row, sent in zip(several, (1.0, 2.5), strict=True):
        assert row["weights_differ_by"] < 1e-5 and row["losses_differ_by"] < 1e-5
        assert sum(row["bytes"].values()) == pytest.approx(sent, rel=0.02) and row["expected_bytes"] == sent


def test_waiting_for_the_longest_by_hand(scaling):
    # Two ranks of two completions: the longest are 4 and 8, the sums 6 and 9.
    lengths = np.array([[[2, 4], [1, 8]]])
    assert scaling.steps_and_tokens(lengths) == (8 / 6, 9 / 7.5)
    # One of two rows leaves after the shorter one: 2 x 2 + 2 of 2 x 4, and 2 x 1 + 7 of 2 x 8.
    assert scaling.rows_left(lengths) == (6 + 9) / (8 + 16)
    # One of ten rows ends: not worth copying the cache for, until a second one does.
    assert scaling.rows_left(np.array([[[1, 2] + [4] * 8]])) == (10 * 2 + 8 * 2) / 40
    drawn = scaling.draw_lengths(
        "medium: lognormal, median 200, sigma 0.6, at most 1024", (1000, 1, 32), np.random.default_rng(0)
    )
    assert np.median(drawn) == pytest.approx(200, rel=0.02) and drawn.min() >= 1 and drawn.max() == 1024


def test_ratios_pair_the_runs_of_one_round(runner):
    runs = {
        "ours_ppo_separate": [{"episodes": 3.0, "memory": 10}, {"episodes": 8.0, "memory": 20}],
        "trl_ppo": [{"episodes": 2.0, "memory": 40}, {"episodes": 4.0, "memory": 50}],
    }
    found = runner.ratios(runs)
    assert found["episodes_ratio_separate"] == 1.75
    assert found["episodes_ratio_separate_spread"] == [1.5, 2.0]
    assert found["memory_ratio_separate_spread"] == [0.25, 0.4]
    assert found["rloo_over_trl"] is None


def test_operations_by_hand(runner, monkeypatch):
    monkeypatch.setitem(runner.MODELS, "small", {"hidden_size": 2, "num_hidden_layers": 1, "vocab_size": 5})
    monkeypatch.setattr(runner, "PROMPT_TOKENS", 2)
    options = runner.parse(["--prompts", "1", "--epochs", "1"])
    # Two new tokens: 3 positions of 24 * 4 + 2 * 2 * 4 = 112 operations, and 2 of 2 * 2 * 5 in the head.
    backbone, head = 3 * 112, 2 * 20
    assert runner.operations_per_update(options, "ours_rloo", 2) == 5 * (backbone + head)
    assert runner.operations_per_update(options, "trl_ppo", 2) == 5 * (backbone + head) + 4 * backbone


@pytest.mark.parametrize("case", ABOUT["cases"])
def test_reference_is_at_ratio_1_and_then_clips_in_both_losses(arrays, case):
    scalars = ABOUT["cases"][case]["scalars"]
    assert (arrays[f"case/{case}/pass0/ratio"] - 1).abs().max() < 1e-5
    assert scalars["pg_clipfrac"][0] == scalars["vf_clipfrac"][0] == 0
    assert 0.1 < scalars["pg_clipfrac"][1] < 0.9
    assert 0.1 < scalars["vf_clipfrac"][1] < 0.9


def test_reference_has_ragged_completions_with_and_without_eos(arrays):
    mask, ids = arrays["batch/ragged/completion_mask"], arrays["batch/ragged/completion_ids"]
    last = ids.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)
    finished = last == ABOUT["model"]["eos_token_id"]
    assert sorted(mask.sum(1).tolist()) == [1, 2, 4, 7, 9, 10, 10, 10]
    assert finished.tolist() == [False, True, True, True, True, True, True, False]
    assert arrays["batch/ragged/prompt_mask"].sum(1).unique().numel() > 3


def test_reference_is_of_the_pinned_versions():
    assert ABOUT["versions"]["trl"] == "1.12.0"
