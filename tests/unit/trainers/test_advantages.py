"""Advantages against brute force, by property and by hand."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_recipes.trainers.advantages import (
    BASELINES,
    RunningMoments,
    gae,
    group_mean,
    leave_one_out,
    masked_whiten,
    token_rewards,
)

EOS_PLACES = {
    "middle": [1, 1, 1, 0, 0],
    "last slot": [1, 1, 1, 1, 1],
    "first": [1, 0, 0, 0, 0],
    "masked out": [0, 0, 0, 0, 0],
}


@pytest.mark.parametrize("place", EOS_PLACES)
def test_token_rewards_sum_to_score_minus_kl(place):
    mask = torch.tensor([EOS_PLACES[place]])
    kl = torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
    rewards = token_rewards(torch.tensor([2.5]), kl, mask, beta=0.3)
    expected = 2.5 - 0.3 * (kl * mask).sum() if mask.any() else torch.tensor(0.0)
    assert rewards.sum().item() == pytest.approx(expected.item(), abs=1e-6)
    assert (rewards * (1 - mask)).abs().sum() == 0


def test_score_lands_on_the_last_counted_token():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    rewards = token_rewards(torch.tensor([1.0, 2.0]), torch.zeros(2, 4), mask, beta=0.1)
    assert rewards.tolist() == [[0, 0, 1, 0], [0, 0, 0, 2]]


def brute_force(rewards, values, gamma, lam):
    """Sum the discounted one-step errors of one row, term by term, as in equation 16."""
    T = len(rewards)
    following = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(T)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, T)) for t in range(T)]


rows = st.lists(st.lists(st.tuples(*[st.floats(-3, 3, width=32)] * 2), min_size=1, max_size=6), min_size=1, max_size=4)


@settings(deadline=None)
@given(rows=rows, gamma=st.sampled_from([1.0, 0.9, 0.0]), lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_gae_equals_brute_force_on_ragged_rows(rows, gamma, lam):
    T = max(map(len, rows))
    rewards, values, mask = torch.full((len(rows), T), 7.0), torch.full((len(rows), T), -9.0), torch.zeros(len(rows), T)
    for i, row in enumerate(rows):
        rewards[i, : len(row)], values[i, : len(row)] = torch.tensor(row).T
        mask[i, : len(row)] = 1
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for i, row in enumerate(rows):
        expected = brute_force([r for r, _ in row], [v for _, v in row], gamma, lam)
        assert advantages[i, : len(row)].tolist() == pytest.approx(expected, abs=1e-4)
        assert returns[i, : len(row)].tolist() == pytest.approx(
            [a + v for a, (_, v) in zip(expected, row, strict=True)], abs=1e-4
        )
    assert (advantages * (1 - mask)).abs().sum() == 0 and (returns * (1 - mask)).abs().sum() == 0


def test_gae_lam_1_is_the_return_minus_the_value_and_lam_0_the_one_step_error():
    rewards, values, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.5, 0.25, 3.0]]), torch.ones(1, 3)
    assert gae(rewards, values, mask, gamma=1.0, lam=1.0)[0].tolist() == [[6.5, 5.75, 1.0]]
    assert gae(rewards, values, mask, gamma=1.0, lam=0.0)[0].tolist() == [[0.75, 4.75, 1.0]]


def test_nothing_behind_eos_has_any_influence():
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    rewards, values = torch.tensor([[0.0, 1.0, 5.0, 5.0]]), torch.tensor([[0.1, 0.2, 9.0, 9.0]])
    short = gae(rewards[:, :2], values[:, :2], mask[:, :2], 1.0, 0.95)
    long = gae(rewards, values, mask, 1.0, 0.95)
    for cut, whole in zip(short, long, strict=True):
        assert torch.equal(cut, whole[:, :2]) and whole[:, 2:].abs().sum() == 0


def test_masked_whiten_has_mean_0_and_biased_variance_1_also_far_from_0():
    generator = torch.Generator().manual_seed(0)
    x, mask = 1e3 + torch.randn(8, 16, generator=generator), (torch.rand(8, 16, generator=generator) > 0.3).float()
    kept = masked_whiten(x, mask)[mask.bool()]
    assert kept.mean().abs() < 1e-3 and abs(kept.var(unbiased=False) - 1) < 1e-3
    shifted = masked_whiten(x, mask, center=False)[mask.bool()]
    assert abs(shifted.mean() - x[mask.bool()].mean()) < 1e-2


def test_masked_whiten_of_a_constant_stays_constant():
    assert masked_whiten(torch.full((2, 2), 3.0), torch.ones(2, 2)).abs().max() == 0


def test_masked_whiten_over_two_ranks_equals_one():
    generator = torch.Generator().manual_seed(0)
    x, mask = torch.randn(8, 5, generator=generator), (torch.rand(8, 5, generator=generator) > 0.2).float()
    halves = [(x[:4], mask[:4]), (x[4:], mask[4:])]
    kept = [h.sum() for _, h in halves], [(a * h).sum() for a, h in halves]
    count, total_x = sum(kept[0]), sum(kept[1])
    variance_sum = sum((((a - total_x / count) ** 2) * h).sum() for a, h in halves)
    answers = iter([torch.stack([count, total_x]), variance_sum])
    assert torch.allclose(
        masked_whiten(*halves[0], total=lambda sums: next(answers)), masked_whiten(x, mask)[:4], atol=1e-6
    )


def with_gaps(P=3, G=4):
    rewards = torch.randn(P, G, generator=torch.Generator().manual_seed(4))
    rewards[0, 1] = rewards[2, 0] = rewards[2, 2] = rewards[2, 3] = math.nan
    return rewards


def test_baselines_against_brute_force_with_missing_rewards():
    rewards = with_gaps()
    rows = rewards.tolist()
    for name, baseline in BASELINES.items():
        found = baseline(rewards)
        assert found.shape == rewards.shape
        for i, j in itertools.product(range(3), range(4)):
            group = [r for k, r in enumerate(rows[i]) if r == r and not (name == "leave_one_out" and k == j)]
            used = [r for row in rows for r in row if r == r] if name == "batch_mean" else group
            if rows[i][j] == rows[i][j] and used:
                assert found[i, j].item() == pytest.approx(sum(used) / len(used), abs=1e-6), (name, i, j)
    assert leave_one_out(rewards)[2, 1].isnan()  # its siblings have no reward: there is no baseline


def test_leave_one_out_is_the_mean_of_the_others_and_sums_to_zero_advantage():
    rewards = torch.randn(5, 4, generator=torch.Generator().manual_seed(5))
    assert torch.allclose((rewards - leave_one_out(rewards)).sum(1), torch.zeros(5), atol=1e-5)
    assert torch.allclose((rewards - leave_one_out(rewards)) * 3 / 4, rewards - group_mean(rewards), atol=1e-6)


def test_running_moments_are_those_of_everything_seen():
    moments, seen = RunningMoments(), []
    assert (moments.mean, moments.std) == (0.0, 1.0)
    for i, n in enumerate((1, 3, 8, 2)):
        values = 1e3 + torch.randn(n, generator=torch.Generator().manual_seed(i))
        seen.append(values)
        moments.add(torch.cat([values, torch.tensor([math.nan])]))
        everything = torch.cat(seen).double()
        assert moments.mean == pytest.approx(everything.mean().item())
        if i:
            assert moments.std == pytest.approx(everything.std(correction=0).item(), rel=1e-6)
