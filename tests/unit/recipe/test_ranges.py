"""Numbers of a recipe: each setting has a range, and the message names the key."""

import math

import pytest

from rlhf_recipes.recipe.checks import check_recipe
from rlhf_recipes.recipe.ranges import RANGES, out_of_range
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.recipe.trainer_keys import CONFIG_CLASSES, trainer_defaults, trainer_fields

RECIPE = {"name": "x", "description": "x", "data": {"path": "x.jsonl"}, "reward_funcs": [{"name": "length"}]}
NAMES = [(name, interval) for interval, names in RANGES.items() for name in names.split()]
KNOWN = set().union(*map(trainer_fields, CONFIG_CLASSES))


@pytest.mark.parametrize(("name", "interval"), NAMES)
def test_every_setting_with_a_range_exists_and_its_ends_are_checked(name, interval):
    low, high = (float(end) for end in interval[1:-1].split(","))
    assert name in KNOWN and out_of_range({name: low - 1})
    assert bool(out_of_range({name: low})) == (interval[0] == "(")
    assert not out_of_range({name: (low + min(high, 10.0)) / 2 + 0.25 * (low == 1)})
    if high < math.inf:
        assert bool(out_of_range({name: high})) == (interval[-1] == ")") and out_of_range({name: high + 1})
    for value in (math.nan, math.inf, -math.inf):
        assert out_of_range({name: value})
    assert not out_of_range({name: None})


def test_defaults_are_in_range():
    assert not any(out_of_range(trainer_defaults(stage)) for stage in CONFIG_CLASSES)


@pytest.mark.parametrize(
    ("stage", "key", "value", "said"),
    [
        ("ppo", "beta", -1.0, "must be in [0, inf), not -1.0"),
        ("ppo", "lam", 5.0, "must be in [0, 1], not 5.0"),
        ("rloo", "epsilon", -0.2, "must be in (0, inf), not -0.2"),
        ("rloo", "max_steps", 0, "must be in [1, inf), not 0"),
        ("sft", "num_train_epochs", 0.0, "must be in (0, inf), not 0.0"),
        ("sft", "learning_rate", math.inf, "must be finite, not inf"),
        ("ppo", "reward_clip_range", [1.0, -1.0], "lowest < highest"),
        ("ppo", "generation_kwargs", {"x": [math.nan]}, "must be finite, not nan"),
        ("ppo", "resume_from_checkpoint", "/nowhere", "not set here; set nothing: the same command goes on"),
    ],
)
def test_a_value_out_of_range_is_named_by_its_key(stage, key, value, said):
    section = {"model": "x"} if stage == "sft" else {}
    with pytest.raises(RecipeError) as error:
        check_recipe(RECIPE | {stage: section | {"trainer": {key: value}}}, "x.yaml")
    assert f"x.yaml: {stage}.trainer.{key}: " in str(error.value) and said in str(error.value)


@pytest.mark.parametrize("trainer", [{"learning_rate": 0.0}, {"max_steps": -1}, {"epsilon_high": None}])
def test_values_at_the_ends_that_mean_something_are_allowed(trainer):
    check_recipe(RECIPE | {"rloo": {"trainer": trainer}}, "x.yaml")


def test_numbers_of_our_own_keys_are_finite_and_held_out_rows_are_others():
    for change, key in (
        ({"missing_eos": {"mode": "replace", "value": math.inf}}, "missing_eos.value"),
        ({"reward_funcs": [{"name": "length", "weight": math.nan}]}, "reward_funcs.0.weight"),
        ({"data": {"path": "x.jsonl", "eval_split": "train"}}, "eval_split is train, the training rows"),
    ):
        with pytest.raises(RecipeError, match=key):
            check_recipe(RECIPE | change, "x.yaml")
