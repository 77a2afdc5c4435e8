"""The order of prompts, and how a rollout is cut into micro-batches."""

from types import SimpleNamespace

import pytest
import torch
from trl.trainer.utils import RepeatSampler

from rlhf_recipes.runs.order import EpochSampler
from rlhf_recipes.trainers.batches import MicroBatches

ARGS = SimpleNamespace(steps_per_generation=4, gradient_accumulation_steps=2)


def rollout(rows=8):
    lengths = torch.arange(1, rows + 1)
    mask = (torch.arange(rows) < lengths[:, None]).long()
    row = torch.arange(rows)[:, None]
    return {
        "prompt_ids": row.expand(-1, 3),
        "prompt_mask": torch.ones(rows, 3, dtype=torch.long),
        "completion_ids": row * mask,
        "completion_mask": mask,
        "advantages": torch.arange(rows).float(),
    }


@pytest.fixture
def cut():
    torch.manual_seed(0)
    found = MicroBatches(ARGS, lambda sums: sums)
    found.take(rollout())
    return found


def test_every_row_is_in_one_micro_batch_which_knows_the_tokens_of_its_step(cut):
    assert len(cut.parts) == 4 and all(len(part["advantages"]) == 2 for part in cut.parts)
    assert sorted(int(x) for part in cut.parts for x in part["advantages"]) == list(range(8))
    for first, second in (cut.parts[:2], cut.parts[2:]):
        tokens = sum(int(part["completion_mask"].sum()) for part in (first, second))
        assert first["tokens_of_step"] == second["tokens_of_step"] == tokens
        assert first["completion_ids"].size(1) == first["completion_mask"].sum(1).max()


def test_a_shuffle_draws_another_order_of_the_same_rollout(cut):
    before = cut.order
    cut.shuffle()
    assert not torch.equal(before, cut.order) and torch.equal(before.sort().values, cut.order.sort().values)


def test_a_checkpoint_restores_rollout_and_order(cut):
    other = MicroBatches(ARGS, lambda sums: sums)
    other.load(cut.to_dict())
    for mine, restored in zip(cut.parts, other.parts, strict=True):
        assert all(torch.equal(mine[name], restored[name]) for name in mine)
    cut.clear()
    other.load(cut.to_dict())
    assert other.rollout is None and other.parts == []


def test_an_evaluation_is_one_micro_batch(cut):
    assert cut.single(rollout(3))["advantages"].tolist() == [2.0, 1.0, 0.0]  # the longest first


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_only():
    trainer = SimpleNamespace(state=SimpleNamespace(epoch=None))

    def sampler():
        return EpochSampler(RepeatSampler(list(range(20)), mini_repeat_count=1, seed=1), 1, trainer)

    running, orders = sampler(), []
    for epoch in (None, 1.0, 2.0):
        trainer.state.epoch = epoch
        orders.append(list(running))
        assert list(sampler()) == orders[-1] and len(running) == 20
    assert orders[0] != orders[1] != orders[2]
    trainer.state.epoch = None
    assert orders[1] != list(EpochSampler(RepeatSampler(list(range(20)), mini_repeat_count=1, seed=2), 2, trainer))
