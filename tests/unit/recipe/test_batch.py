"""Sizes of an optimizer step and of a rollout: cases computed by hand, and properties of all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_recipes.recipe.batch import batch_settings, rows_of_rollout, rows_of_step, steps_of_rollout
from rlhf_recipes.recipe.schema import Recipe, RecipeError

COUNT = st.integers(1, 8)


def recipe(**stages):
    values = {"name": "r", "description": "d", "data": {"path": "p"}, "reward_funcs": [{"name": "length"}]}
    return Recipe.model_validate(values | stages)


def settings(rows, accumulation=1, rollout=None, micro_batches=None, generations=1, iterations=1):
    return {
        "per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation, "generation_batch_size": rollout,
        "steps_per_generation": micro_batches, "num_generations": generations, "num_iterations": iterations,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "processes", "step", "rollout", "steps"),
    [
        (settings(8), 1, 8, 8, 1),
        (settings(2, accumulation=4), 1, 8, 8, 1),  # a rollout is one step where nothing else is set
        (settings(2, accumulation=4), 2, 16, 16, 1),
        (settings(2, accumulation=2, micro_batches=4), 1, 4, 8, 2),
        (settings(2, accumulation=2, micro_batches=4), 3, 12, 24, 2),
        (settings(4, micro_batches=2, iterations=3, generations=4), 1, 4, 8, 6),
        (settings(8, accumulation=8, rollout=128), 1, 64, 128, 2),
        (settings(8, accumulation=2, rollout=128), 4, 64, 128, 2),  # the same batch on four processes
    ],
)
def test_steps_and_rollouts_by_hand(given, processes, step, rollout, steps):
    assert rows_of_step(given, processes) == step
    assert rows_of_rollout(given, processes) == rollout
    assert steps_of_rollout(given, rollout, processes) == steps


@given(COUNT, COUNT, COUNT, COUNT, COUNT, COUNT)
def test_steps_use_each_completion_once_per_iteration(rows, accumulation, steps, processes, iterations, generations):
    """Whether the rollout is set in micro-batches or in completions, its steps go through all of its rows."""
    in_parts = settings(rows * generations, accumulation, None, accumulation * steps, generations, iterations)
    rollout = rows_of_rollout(in_parts, processes)
    in_completions = in_parts | {"generation_batch_size": rollout, "steps_per_generation": None}
    assert rows_of_rollout(in_completions, processes) == rollout
    total = steps_of_rollout(in_parts, rollout, processes) * rows_of_step(in_parts, processes)
    assert total == rollout * iterations


@given(*[st.integers(1, 16)] * 5)
def test_a_rollout_is_whole_or_refused(rows, accumulation, micro_batches, processes, generations):
    given = settings(rows, accumulation, None, micro_batches, generations)
    rollout = rows * micro_batches * processes
    if micro_batches % accumulation or rollout % generations:
        with pytest.raises(RecipeError, match="divisible|multiple"):
            rows_of_rollout(given, processes)
    else:
        assert rows_of_rollout(given, processes) == rollout


@pytest.mark.parametrize(
    ("given", "processes", "expected"),
    [
        (settings(4, rollout=12, micro_batches=3), 1, "generation_batch_size and steps_per_generation are both set"),
        (settings(8, rollout=12), 1, r"generation_batch_size \(12\) must be divisible by .* \(8\) x processes \(1\)"),
        (settings(8, rollout=24), 2, r"generation_batch_size \(24\) must be divisible by .* \(8\) x processes \(2\)"),
        (settings(4, micro_batches=2, generations=3), 1, r"num_generations \(3\): the 8 completions"),
        (settings(2, accumulation=2, micro_batches=3), 1, r"steps_per_generation \(3\) must be a multiple of .* \(2\)"),
        (settings(2, accumulation=4, rollout=4), 1, r"steps_per_generation \(2\) must be a multiple of .* \(4\)"),
    ],
)
def test_an_uneven_division_is_refused_with_key_and_numbers(given, processes, expected):
    with pytest.raises(RecipeError, match=rf"^rloo\.trainer\.{expected}"):
        rows_of_rollout(given, processes, "rloo.trainer.")


@pytest.mark.parametrize(
    ("asked", "processes", "size", "accumulation"),
    [(512, 8, 16, 4), (512, 1, 16, 32), (512, 2, 16, 16), (48, 2, 12, 2), (8, 4, 2, 1), (14, 2, 7, 1)],
)
def test_the_global_batch_is_divided_among_the_processes(asked, processes, size, accumulation):
    rloo = recipe(rloo={"global_batch_size": asked, "trainer": {"per_device_train_batch_size": 16}})
    made = batch_settings(rloo, "rloo", processes)
    assert made == {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}


@given(st.integers(1, 64), COUNT, st.integers(1, 16))
def test_the_step_has_the_global_batch_size(share, processes, most):
    given = recipe(sft={"model": "m", "global_batch_size": share * processes, "trainer": {"per_device_train_batch_size": most}})  # fmt: skip
    made = batch_settings(given, "sft", processes)
    assert rows_of_step(made, processes) == share * processes
    assert made["per_device_train_batch_size"] <= most


def test_a_global_batch_that_the_processes_cannot_share_is_refused():
    with pytest.raises(RecipeError, match="^sft.global_batch_size: 64 cannot be divided by 3 processes"):
        batch_settings(recipe(sft={"model": "m", "global_batch_size": 64}), "sft", 3)
    for key in ("gradient_accumulation_steps", "steps_per_generation"):
        with pytest.raises(ValueError, match=f"take trainer.{key} out"):
            recipe(rloo={"global_batch_size": 64, "trainer": {key: 4}})
    assert batch_settings(recipe(sft={"model": "m"}), "sft", 3) == {}
