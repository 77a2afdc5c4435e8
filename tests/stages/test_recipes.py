"""Every recipe that ships: its keys, its numbers, and all of its stages, in a few steps and without network."""

import json
import math

import pytest

from rlhf_recipes.recipe.batch import batch_settings, rows_of_step
from rlhf_recipes.recipe.load import load_recipe, recipe_files
from rlhf_recipes.runs.inputs import hub_references, references
from support.processes import run_python
from support.stand_ins import DATA, MODELS, Shelf, small

RECIPES = [
    "imdb_12gb",
    "imdb_base",
    "imdb_negative",
    "imdb_positive",
    "imdb_positive_lora",
    "imdb_positive_pythia",
    "imdb_positive_qlora",
    "imdb_smol",
    "imdb_tiny",
    "length_short",
    "length_short_lora",
    "length_short_qlora",
    "length_tiny",
    "sentiment_composite",
    "smol_chat",
    "tldr_1b",
    "tldr_1b_lora",
    "tldr_1b_qlora",
    "tldr_2.8b",
    "tldr_6.9b",
    "tldr_llama_1b",
    "tldr_tiny",
]

DIFFERENT = {
    "imdb_positive",
    "imdb_positive_qlora",
    "imdb_smol",
    "sentiment_composite",
    "smol_chat",
    "tldr_1b",
    "tldr_tiny",
}
"""Between them they have every kind of data, model, adapter and reward function; the others run nightly."""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("hub"))


def test_the_list_is_complete():
    assert sorted(recipe_files()) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_only_models_and_data_that_are_known_here(name):
    recipe = load_recipe(name)
    assert recipe.description and recipe.name == name
    for stage in recipe.stages():
        for key, (reference, kind) in hub_references(recipe, stage).items():
            assert reference in (DATA if kind == "dataset" else MODELS), key


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in DIFFERENT else pytest.mark.nightly) for n in RECIPES]
)
def test_every_stage_runs(name, shelf, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_RECIPES_CACHE", str(shelf.fetched()))
    recipe = load_recipe(name)
    stages = [stage for stage in recipe.stages() if stage not in ("eval", "compare") or recipe.ppo or recipe.rloo]
    arguments = [",".join(stages), name, *shelf.overrides(recipe), *small(recipe)]
    done = run_python("-m", "support.all_stages", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in stages:
        path = tmp_path / "runs" / name / stage
        manifest = json.loads((path / "manifest.json").read_text())
        assert manifest["status"] == "finished", stage
        section = getattr(recipe, stage, None)
        if stage in ("sft", "reward", "ppo", "rloo"):
            adapter = path / "adapter_config.json"
            assert adapter.is_file() == (section.peft is not None), stage
            if section.peft:
                trained = json.loads(adapter.read_text())
                assert {key: trained[key] for key in ("r", "lora_alpha")} == {
                    key: section.peft[key] for key in ("r", "lora_alpha")
                }
            lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
            numbers = [value for line in lines for value in line.values() if isinstance(value, float)]
            assert numbers and all(map(math.isfinite, numbers)), stage
        if stage in ("ppo", "rloo"):
            first, written = lines[0], set().union(*lines)
            assert len(lines) >= 2
            assert abs(first["kl"]) < 1e-3, first["kl"]  # the reference is the policy at its start
            names = {f"score/{spec.name.rpartition(':')[2]}" for spec in recipe.reward_funcs}
            assert names <= {key.removesuffix("_2") for key in written}
            if stage == "ppo" and recipe.ppo.value_model == "stage:reward":
                assert (path / "value_model").is_dir()


@pytest.mark.parametrize(
    ("gpus", "name"), [(8, "tldr_1b"), (1, "tldr_1b"), (8, "tldr_2.8b"), (16, "tldr_6.9b"), (1, "tldr_1b_lora")]
)
def test_batches_are_those_of_the_papers(name, gpus):
    """Huang et al. 2024: 128, 64, 512 and 4 epochs of one mini-batch; Ahmadian et al. 2024: rollout 512, steps of 256."""
    recipe = load_recipe(name)

    def batch(stage: str) -> int:
        return rows_of_step(batch_settings(recipe, stage, gpus), gpus)

    assert (batch("sft"), batch("reward"), batch("ppo"), batch("rloo")) == (128, 64, 512, 256)
    assert "generation_batch_size" not in recipe.ppo.trainer and recipe.rloo.trainer["generation_batch_size"] == 512
    assert batch_settings(recipe, "ppo", 8) == {
        "per_device_train_batch_size": recipe.ppo.trainer["per_device_train_batch_size"],
        "gradient_accumulation_steps": 64 // recipe.ppo.trainer["per_device_train_batch_size"],
    }
    assert recipe.ppo.trainer["num_iterations"] == 4 and recipe.episodes // 512 == 1953


def test_variants_train_adapters_in_every_stage():
    for name in RECIPES:
        recipe = load_recipe(name)
        sections = [s for s in (recipe.sft, recipe.reward, recipe.ppo, recipe.rloo) if s is not None]
        if name.endswith("lora"):
            assert all(s.peft for s in sections)
            assert all((s.quantization is not None) == name.endswith("_qlora") for s in sections)


def test_ppo_and_rloo_of_a_recipe_refer_to_the_same_models():
    for name in RECIPES:
        recipe = load_recipe(name)
        if recipe.ppo and recipe.rloo:
            found = [references(recipe, stage) for stage in ("ppo", "rloo")]
            assert found[0]["ppo.policy"] == found[1]["rloo.policy"], name
