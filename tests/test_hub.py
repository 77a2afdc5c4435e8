"""Without network and without a copy: a clear word within seconds, naming every key to set."""

import time

import pytest
from conftest import cli

from rlhf_recipes.config import RecipeError
from rlhf_recipes.hub import check_references, hub_references
from rlhf_recipes.recipe import load_recipe


def test_references_of_each_stage():
    recipe = load_recipe("imdb_positive")
    assert set(hub_references(recipe, "ppo")) == {"data.path", "ppo.policy", "reward_funcs.0.args.model"}
    assert "eval.models.sft" in hub_references(recipe, "eval")
    assert hub_references(load_recipe("imdb_tiny"), "ppo") == {}


def test_the_reward_stages_own_pairs_take_the_place_of_the_data():
    own = ["reward.data={path: my/pairs}"]
    assert set(hub_references(load_recipe("imdb_positive", own), "reward")) == {"reward.data.path", "reward.model"}
    assert "data.path" in hub_references(load_recipe("imdb_positive", [*own, "reward.center=reference"]), "reward")
    assert "reward.data.path" not in hub_references(load_recipe("imdb_positive", own), "ppo")


def test_local_references_need_no_hub(tmp_path):
    recipe = load_recipe(
        "imdb_positive", [f"ppo.policy={tmp_path}", "data.path=./r.jsonl", f"reward_funcs.0.args.model={tmp_path}"]
    )
    assert hub_references(recipe, "ppo") == {}


def test_everything_that_is_missing_is_said_at_once(tmp_path):
    by_reward_model = "reward_funcs=[{name: reward_model, args: {model: stage:reward}}]"
    recipe = load_recipe("imdb_tiny", [f"runs_dir={tmp_path}", "data.path=./nowhere.jsonl", by_reward_model])
    with pytest.raises(RecipeError) as caught:
        check_references(recipe, "ppo")
    for part in (
        "data.path: ./nowhere.jsonl does not exist",
        "rlhf-recipes sft imdb_tiny",
        "rlhf-recipes reward imdb_tiny",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}]
)
def test_nothing_to_be_had(environment, monkeypatch, tmp_path):
    for name, value in (environment | {"HF_HOME": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    started = time.monotonic()
    with pytest.raises(RecipeError) as caught:
        check_references(load_recipe("imdb_positive"), "ppo")
    assert time.monotonic() - started < 10
    for part in (
        "data.path: stanfordnlp/imdb",
        "ppo.policy: lvwerra/gpt2-imdb",
        "reward_funcs.0.args.model: lvwerra/distilbert-imdb",
        "=./my-copy",
    ):
        assert part in str(caught.value)


def test_what_is_in_the_cache_can_be_used(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("datasets--stanfordnlp--imdb", "models--lvwerra--gpt2-imdb", "models--lvwerra--distilbert-imdb"):
        (tmp_path / "hub" / name / "snapshots").mkdir(parents=True)
    check_references(load_recipe("imdb_positive"), "ppo")


def test_the_command_fails_within_seconds_without_traceback(tmp_path):
    started = time.monotonic()
    done = cli(
        "ppo",
        "imdb_positive",
        cwd=tmp_path,
        HF_HOME=str(tmp_path),
        HF_HUB_OFFLINE="0",
        HF_ENDPOINT="http://127.0.0.1:9",
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "Hub cannot be reached" in done.stderr and "ppo.policy" in done.stderr
    assert time.monotonic() - started < 30
    assert not (tmp_path / "runs").exists()
