"""Recipes: merging, overrides, strictness, and messages that name file, key and the nearest valid key."""

import dataclasses
import inspect
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import trl
from peft import LoraConfig
from ruamel.yaml import YAML
from transformers import BitsAndBytesConfig
from typer.testing import CliRunner

import rlhf_recipes
from rlhf_recipes import PPOConfig, RLOOConfig
from rlhf_recipes.cli import app
from rlhf_recipes.commands.recipes import recipe_table
from rlhf_recipes.recipe import trainer_keys
from rlhf_recipes.recipe.load import load_recipe, recipe_files, recipe_folders, to_yaml
from rlhf_recipes.recipe.schema import TRAINED, Recipe, RecipeError
from rlhf_recipes.recipe.sections import Data
from rlhf_recipes.recipe.trainer_keys import adapter_fields, quantization_fields, trainer_fields

MINIMAL = """
name: mine
description: a test
data: {path: reviews.jsonl}
reward_funcs: [{name: length}]
ppo: {policy: ./model, trainer: {learning_rate: 1e-6, beta: 0.05}}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "mine.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def message(path: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_every_shipped_recipe_is_valid():
    files = [path for path in recipe_folders()[1].rglob("*.yaml") if not path.name.startswith("_")]
    assert {path.stem for path in files} >= {"imdb_tiny", "imdb_positive", "imdb_base"}
    for path in files:
        recipe = load_recipe(str(path))
        assert recipe.name == path.stem and recipe_files()[path.stem].resolve() == path.resolve()


def test_every_shipped_recipe_says_hardware_source_and_commands():
    for name, path in recipe_files().items():
        about = load_recipe(name).about
        assert about.hardware and about.source, name
        head = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert head[0].startswith(f"# {name}: ") and any(line.startswith("#   ") and name in line for line in head)


def test_the_base_model_has_the_recipe_that_makes_it():
    base = Path(rlhf_recipes.__file__).parent / "base" / "recipe.yaml"
    assert base.read_text(encoding="utf-8") == to_yaml(load_recipe("imdb_base"))


ABOUT = """
about:
  hardware: a GPU | or two
  source: a paper; its table 2
  expected: {metric: score_mean, start: 1, end: [2, 2.5], by: theirs}
"""


def test_the_table_of_recipes_shows_about(write, tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    write(MINIMAL + ABOUT, "recipes/mine.yaml")
    write("extends: mine\n", "recipes/child.yaml")
    monkeypatch.chdir(tmp_path)
    lines = recipe_table().splitlines()
    shown = "| a test | a GPU \\| or two | not measured | score_mean 1 -> 2 to 2.5 (theirs) | a paper |"
    assert f"| `mine` {shown}" in lines
    assert "| `child` | a test | not known | not measured | not measured |  |" in lines


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("about.minutes=0", "about.minutes"),
        ("about.expected={metrics: a, end: 1, by: ours}", "about.expected.0.metrics: unknown key; nearest: metric"),
        ("about.hours=1", "about.hours: unknown key"),
        ("about.expected={metric: judge_mean, end: 1, by: ours}", "the metric judge_mean is called held_out_mean"),
        ("about.expected={metric: score_mean, end: [1], by: ours}", "about.expected"),
    ],
)
def test_errors_in_about_name_the_key(write, override, expected):
    assert expected in message(write(MINIMAL), override)


def test_version():
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0 and done.stdout.strip() == metadata.version("rlhf-recipes")


def test_numbers_are_yaml_1_2(write):
    recipe = load_recipe(write(MINIMAL))
    assert recipe.ppo.trainer["learning_rate"] == 1e-6 and isinstance(recipe.ppo.trainer["learning_rate"], float)


def test_show_prints_yaml_that_loads_back_to_the_same_recipe(write):
    for name in [*recipe_files(), write(MINIMAL)]:
        recipe = load_recipe(name)
        assert load_recipe(write(to_yaml(recipe), "again.yaml")) == recipe


def test_extends_merges_mappings_and_replaces_lists(write):
    write(MINIMAL.replace("name: mine", "name: base"), "_base.yaml")
    recipe = load_recipe(
        write(
            "extends: _base\nname: child\nppo: {trainer: {beta: 0.2}}\nreward_funcs: [{name: repetition, weight: -1}]",
            "child.yaml",
        )
    )
    assert recipe.name == "child"
    assert recipe.ppo.trainer == {"learning_rate": 1e-6, "beta": 0.2}
    assert [spec.name for spec in recipe.reward_funcs] == ["repetition"]


def test_a_child_without_a_name_is_named_after_its_file(write):
    write(MINIMAL, "_base.yaml")
    assert load_recipe(write("extends: _base", "other.yaml")).name == "other"


def test_an_override_changes_one_of_the_places_that_share_an_alias(write):
    shared = MINIMAL.replace("trainer: {learning_rate: 1e-6", "trainer: &shared {learning_rate: 1e-6")
    text = shared + "rloo: {policy: ./model, trainer: *shared}\n"
    recipe = load_recipe(write(text), ["ppo.trainer.lam=0.5", "rloo.trainer.beta=0.2"])
    assert recipe.ppo.trainer == {"learning_rate": 1e-6, "beta": 0.05, "lam": 0.5}
    assert recipe.rloo.trainer == {"learning_rate": 1e-6, "beta": 0.2}


def test_overrides_follow_yaml_and_reach_into_lists(write):
    recipe = load_recipe(
        write(MINIMAL), ["ppo.trainer.beta=1e-3", "reward_funcs.0.weight=2", "data.columns={text: review}", "seed=7"]
    )
    assert recipe.ppo.trainer["beta"] == 1e-3 and recipe.reward_funcs[0].weight == 2.0
    assert recipe.data.columns == {"text": "review"} and recipe.seed == 7
    assert load_recipe(write(MINIMAL), ["rloo.trainer.num_generations=4"]).rloo.trainer == {"num_generations": 4}


def test_null_takes_a_key_away_but_is_a_value_of_trl(write):
    write(MINIMAL.replace("reviews.jsonl}", "reviews.jsonl, columns: {text: review}}"), "_base.yaml")
    child = write("extends: _base\ndata: {columns: null}", "child.yaml")
    assert load_recipe(child).data.columns == {}
    assert load_recipe(child, ["ppo=null"]).ppo is None
    assert load_recipe(child, ["sft={model: m, trainer: {max_length: null}}"]).sft.trainer == {"max_length": None}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("ppo.trainer.lerning_rate=1e-5", ["ppo.trainer.lerning_rate", "nearest", "learning_rate"]),
        ("ppo.trainer.learning_rate=fast", ["ppo.trainer.learning_rate", "valid number", "'fast'"]),
        ("ppo.trainer.max_steps=1.5", ["ppo.trainer.max_steps", "integer"]),
        ("ppo.trainer.learning_rate='1e-6'", ["ppo.trainer.learning_rate", "'1e-6'"]),
        ("ppo.trainer.output_dir=x", ["ppo.trainer.output_dir", "runs_dir"]),
        ("data.pth=x", ["data.pth", "nearest: path"]),
        ("pppo.policy=x", ["pppo", "nearest: ppo"]),
        ("seed=abc", ["seed", "integer", "'abc'"]),
        ("data.prompt_tokens=[8, 2]", ["prompt_tokens", "[8, 2]"]),
        ("reward_funcs.0.wieght=1", ["reward_funcs.0.wieght", "weight"]),
        ("reward_funcs.3.weight=1", ["no position in a list of 1"]),
        ("name.x=1", ["is a value, not a section"]),
        ("beta", ["dotted.key=value"]),
        ("seed=[1", ["no valid YAML"]),
        ("data.columns={text:body}", ["blank behind the colon"]),
        ("name=a b", ["name", "pattern"]),
        ("sft={}", ["exactly one of model"]),
        ("ppo.trainer.trust_remote_code=true", ["ppo.trainer.trust_remote_code", "of the recipe"]),
        ("ppo.trainer.kl_coef=0.05", ["ppo.trainer.kl_coef: not set here; set ppo.trainer.beta."]),
        ("rloo.trainer.chat_template_kwargs={a: true}", ["set chat_template_kwargs, beside data"]),
        ("ppo.trainer.num_ppo_epochs=4", ["set ppo.trainer.num_iterations."]),
        ("rloo.trainer.rloo_k=4", ["set rloo.trainer.num_generations."]),
        ("ppo.trainer.adam_betas=[0.9,0.95]", ["set ppo.trainer.adam_beta1 and adam_beta2."]),
        ("ppo.trainer.reward_model_path=x", ["set reward_funcs."]),
        ("ppo.trainer.total_episodes=100", ["set episodes."]),
        ("ppo.trainer.value_model=policy", ["set ppo.value_model."]),
        ("ppo.init_kl_coef=0.2", ["ppo.init_kl_coef: not set here; set ppo.trainer.beta."]),
        ("sft.trainer.lr=1e-5", ["set sft.trainer.learning_rate."]),
        ("sft.trainer.ppo_epochs=4", ["sft.trainer.ppo_epochs: unknown key of SFTConfig"]),
        ("rloo.trainer.vf_clip=0.2", ["rloo.trainer.vf_clip: unknown key of RLOOConfig"]),
        (
            "rloo.trainer.eval_strategy=steps",
            ["rloo.trainer.eval_strategy: leave it out; rloo evaluates while it trains only"],
        ),
        (
            "ppo.trainer.save_strategy=best",
            ["ppo.trainer.save_strategy: leave it out; ppo evaluates while it trains only"],
        ),
        ("ppo.peft.lora_alfa=16", ["ppo.peft.lora_alfa: unknown key of LoraConfig", "nearest: lora_alpha"]),
        ("ppo.peft.r='8'", ["ppo.peft.r", "integer", "'8'"]),
        ("ppo.peft.bias=some", ["ppo.peft.bias", "'none', 'all' or 'lora_only'", "'some'"]),
        ("ppo.peft.target_modules=3", ["ppo.peft.target_modules", "list", "string"]),
        ("ppo.peft.task_type=CAUSAL_LM", ["ppo.peft.task_type: not set here", "follows from the stage"]),
        (
            "ppo={peft: {}, quantization: {load_in_4_bit: true}}",
            ["load_in_4_bit: unknown key", "nearest: load_in_4bit"],
        ),
        ("ppo={peft: {}, quantization: {load_in_4bit: 1}}", ["ppo.quantization.load_in_4bit", "boolean", "1"]),
        ("ppo={peft: {}, quantization: {bnb_4bit_compute_dtype: bf16}}", ["compute_dtype", "'bfloat16'", "'bf16'"]),
        ("ppo={peft: {}, quantization: {bnb_4bit_quant_type: nf4}}", ["exactly one of load_in_4bit and load_in_8bit"]),
        ("ppo.quantization={load_in_4bit: true}", ["quantized weights cannot be trained", "add peft"]),
        ("sft={scratch: {}, peft: {}}", ["sft.peft: a model from scratch has nothing to adapt"]),
        ("description=null", ["description", "missing"]),
    ],
)
def test_errors_name_key_and_correction(write, override, expected):
    found = message(write(MINIMAL), override)
    assert all(part in found for part in expected), found


def test_an_old_name_is_answered_with_the_new_one(write):
    assert "eval.judge_funcs: unknown key; it is called eval.held_out_funcs." in message(
        write(MINIMAL), "eval.judge_funcs=[]"
    )


def test_all_findings_come_at_once(write):
    found = message(write(MINIMAL), "ppo.trainer.bata=1", "sed=3", "data.pth=x")
    assert len(found.splitlines()) == 3 and all("mine.yaml" in line for line in found.splitlines())


def test_duplicate_key(write):
    found = message(write(MINIMAL + "seed: 1\nseed: 2\n"))
    assert "line" in found and "duplicate key" in found and "mine.yaml" in found


def test_broken_yaml_and_no_mapping(write):
    assert "line" in message(write("a: [1"))
    assert "mapping" in message(write("- 1"))


def test_extends_in_a_circle_and_into_nowhere(write):
    write("extends: b", "a.yaml")
    assert "circle" in message(write("extends: a", "b.yaml"))
    assert "no recipe named 'nowhere'" in message(write("extends: nowhere", "c.yaml"))


@pytest.mark.parametrize("value", [".nan", ".inf"])
@pytest.mark.parametrize("key", ["eval.temperature", "eval.positive_threshold", "reward_funcs.weight"])
def test_numbers_are_finite(key, value):
    """With nan, no completion would be positive, and the score would be no number."""
    override = f"reward_funcs=[{{name: length, weight: {value}}}]" if key == "reward_funcs.weight" else f"{key}={value}"
    with pytest.raises(RecipeError, match=rf"{key.replace('.weight', '.0.weight')}.*finite"):
        load_recipe("imdb_tiny", [override])


def test_unknown_recipe_names_the_nearest():
    found = message("imdb_tinny")
    assert "imdb_tiny" in found and "list" in found


@pytest.mark.parametrize(
    ("stage", "config"),
    [("sft", trl.SFTConfig), ("reward", trl.RewardConfig), ("rloo", RLOOConfig), ("ppo", PPOConfig)],
)
def test_fields_read_off_the_source_are_those_of_the_class(stage, config):
    assert set(trainer_fields(stage)) == {f.name for f in dataclasses.fields(config) if f.init}


def test_keys_of_peft_and_quantization_read_off_the_source_are_those_of_the_classes():
    assert set(adapter_fields()) == {f.name for f in dataclasses.fields(LoraConfig) if f.init}
    arguments = inspect.signature(BitsAndBytesConfig).parameters
    assert set(quantization_fields()) == set(arguments) - {"kwargs"}
    assert all(kind is not Any for kind in quantization_fields().values())


def test_adapters_and_quantization_that_are_right_pass(write):
    recipe = load_recipe(
        write(MINIMAL),
        [
            "ppo.peft={r: 8, lora_alpha: 32, target_modules: all-linear, init_lora_weights: gaussian, modules_to_save: null}",
            "ppo.quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_compute_dtype: bfloat16}",
            "rloo={policy: m, peft: {}}",
        ],
    )
    assert recipe.ppo.peft["target_modules"] == "all-linear" and recipe.rloo.peft == {}


def test_shipped_yaml_has_no_duplicate_keys_under_any_reader():
    for folder in recipe_folders()[1:]:
        for path in folder.rglob("*.yaml"):
            assert YAML(typ="safe", pure=True).load(path.read_text())


def test_every_old_name_of_a_setting_leads_to_a_key_that_exists():
    """And none is itself a key today, or it would be refused."""
    for stage in ("sft", "ppo", "rloo"):
        for new, old in trainer_keys._SUCCESSORS.items():
            for name in old.split():
                found = trainer_keys.successor(stage, name)
                assert found is None or found.replace(stage, "STAGE") == new
                if new.startswith("STAGE.trainer") and found is not None:
                    assert name not in trainer_keys.trainer_fields(stage)
    for new in trainer_keys._SUCCESSORS:
        section, _, key = new.replace("STAGE", "ppo").rpartition(".")
        known = {"ppo.trainer": trainer_keys.trainer_fields("ppo"), "ppo": TRAINED["ppo"].model_fields}
        known |= {"data": Data.model_fields, "": Recipe.model_fields}
        assert key.split()[0] in known[section] or key in trainer_keys.trainer_fields("sft"), new
