"""The metrics of an on-policy run: means, time of phases, logs of a rollout."""

from collections import defaultdict, deque

import pytest
import torch

from rlhf_recipes.trainers import metrics
from rlhf_recipes.trainers.metrics import MetricLog, PhaseTimer, RolloutLogs


def same(sums):
    return sums


def test_a_mean_is_over_all_values_and_copies_count_once():
    log = MetricLog()
    log.add("train", "kl", torch.tensor([1.0, 2.0]))
    log.add("train", "kl", torch.tensor([6.0, 100.0]), torch.tensor([1, 0]))
    log.add("train", "eos_rate", torch.tensor([1.0, 0.0]), copies=2)
    log.add("train", "nothing", torch.tensor([1.0]), torch.tensor([0]))
    log.add("eval", "kl", torch.tensor([8.0]))
    assert log.take_means("train", same) == {"eos_rate": [0.5], "kl": [3.0]}
    assert log.take_means("train", same) == {} and log.take_means("eval", same) == {"kl": [8.0]}


@pytest.mark.parametrize(("returns", "expected"), [([0.0, 2.0], {"explained_variance": [0.75]}), ([1.0, 1.0], {})])
def test_explained_variance_follows_from_the_moments(returns, expected):
    log, errors = MetricLog(), torch.tensor([0.5, -0.5])
    for name, values in (("returns", torch.tensor(returns)), ("errors", errors)):
        log.add("train", f"{name}_1", values)
        log.add("train", f"{name}_2", values.square())
    assert log.take_means("train", same) == expected


def test_explained_variance_keeps_its_digits_where_returns_vary_little():
    """Returns of 100 +- 0.022: in float32, the square of the mean takes all digits of the variance."""
    returns = 100 + 0.022 * torch.randn(4096, generator=torch.Generator().manual_seed(0))
    log = MetricLog()
    for name, values in (("returns", returns), ("errors", 0.5 * (returns - 100))):
        log.add("train", f"{name}_1", values)
        log.add("train", f"{name}_2", metrics.in_float64(values).square())
    assert log.take_means("train", same)["explained_variance"] == pytest.approx([0.75], rel=1e-6)


def test_time_counts_for_the_phase_that_ends_and_a_pause_for_none(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    timer = PhaseTimer("cpu")
    now[0] = 1.0
    timer.book("update")  # before the start
    timer.start()
    wait(2.0)
    timer.book("generate")
    wait(3.0)
    with timer.paused():
        wait(10.0)
        timer.book("forward")
        with timer.paused():
            wait(10.0)
    wait(4.0)
    timer.book("score")
    line = timer.take(18)
    assert [line[f"seconds_{phase}"] for phase in metrics.PHASES] == [2.0, 4.0, 0.0, 3.0]
    assert line["episodes_per_second"] == 2.0
    assert "episodes_per_second" not in timer.take(18)


def logs(rows=4):
    return {
        "prompt": deque(maxlen=rows),
        "completion": deque(maxlen=rows),
        "advantages": deque(maxlen=rows),
        "rewards": defaultdict(lambda: deque(maxlen=rows)),
        "extra": defaultdict(lambda: deque(maxlen=rows)),
    }


def test_logs_of_a_rollout_have_our_advantages_and_survive_a_checkpoint():
    trl = logs()
    trl["prompt"].extend("ab")
    trl["completion"].extend("cd")
    trl["advantages"].extend([5.0, 6.0])
    trl["rewards"]["length"].extend([1.0, float("nan")])
    trl["extra"]["note"].extend([torch.tensor(3), {"a": 1}])
    found = RolloutLogs(trl)
    found.replace_advantages([7.0, 8.0])
    expected = [("a", "c", 7.0, {"length": 1.0}), ("b", "d", 8.0, {"length": None})]
    assert [tuple(row.values())[1:] for row in found.first(9, step=3)] == expected and len(found.first(1, 3)) == 1
    other = RolloutLogs(logs())
    other.load(found.to_dict())
    assert other.first(9, 3) == found.first(9, 3)
    assert found.to_dict()["extra"]["note"] == [3, "{'a': 1}"]
