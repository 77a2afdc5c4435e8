"""Without network and without a copy: a clear word within seconds, naming every key to set."""

import hashlib
import json
import os
import shutil
import time

import pytest

from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.runs import inputs as hub
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.runs.inputs import check_packages, check_references, hub_references, sources
from support.processes import cli, run_python
from support.texts import REVIEWS, write_jsonl
from support.tiny_models import causal_lm, put_into_cache, save_pair, word_tokenizer


def test_references_of_each_stage():
    recipe = load_recipe("imdb_positive")
    assert set(hub_references(recipe, "ppo")) == {"data.path", "ppo.policy", "reward_funcs.0.args.model"}
    assert "eval.models.sft" in hub_references(recipe, "eval")
    assert hub_references(load_recipe("imdb_tiny"), "ppo") == {}


def test_the_reward_stages_own_pairs_take_the_place_of_the_data():
    own = ["reward.data={path: my/pairs}"]
    assert set(hub_references(load_recipe("imdb_positive", own), "reward")) == {"reward.data.path", "reward.model"}
    assert "data.path" in hub_references(load_recipe("imdb_positive", [*own, "reward.center=gold"]), "reward")
    assert "reward.data.path" not in hub_references(load_recipe("imdb_positive", own), "ppo")


def test_local_references_need_no_hub(tmp_path):
    recipe = load_recipe(
        "imdb_positive", [f"ppo.policy={tmp_path}", "data.path=./r.jsonl", f"reward_funcs.0.args.model={tmp_path}"]
    )
    assert hub_references(recipe, "ppo") == {}


def test_revisions_and_the_reward_models_own_data():
    recipe = load_recipe("imdb_positive", ["ppo.policy=org/name@refs/pr/1", "eval.models={a: org/name@v1}"])
    assert hub_references(recipe, "ppo")["ppo.policy"] == ("org/name@refs/pr/1", "model")
    assert hub_references(recipe, "eval")["eval.models.a"] == ("org/name@v1", "model")
    own = load_recipe("imdb_tiny", ["reward.data={path: org/pairs}"])
    assert hub_references(own, "reward") == {"reward.data.path": ("org/pairs", "dataset")}
    assert "data.path" not in hub.references(own, "reward") and "data.path" in hub.references(own, "sft")
    reference = load_recipe("imdb_tiny", ["reward.data={path: org/pairs}", "reward.center=gold"])
    assert "data.path" in hub.references(reference, "reward")


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


def test_what_is_in_the_cache_can_be_used(hub_cache, policy_folder):
    for name in ("gpt2-imdb", "distilbert-imdb"):
        put_into_cache(hub_cache, f"lvwerra/{name}", policy_folder, "main")
    (hub_cache / "datasets--stanfordnlp--imdb" / "snapshots").mkdir(parents=True)
    check_references(load_recipe("imdb_positive"), "ppo")
    with pytest.raises(RecipeError, match="  ppo.policy: lvwerra/gpt2-imdb@v2"):
        check_references(load_recipe("imdb_positive", ["ppo.policy=lvwerra/gpt2-imdb@v2"]), "ppo")


def test_a_model_without_safetensors_is_found_before_anything_is_loaded(hub_cache, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    put_into_cache(hub_cache, "org/old", tmp_path / "old", "main")
    recipe = load_recipe("imdb_tiny", ["sft.model=org/old", "data.path=./nowhere.jsonl"])
    with pytest.raises(
        RecipeError, match=r"(?s)nowhere.jsonl does not exist.*sft.model: org/old has no weights in safet"
    ):
        check_references(recipe, "sft")


def test_the_cache_is_where_huggingface_hub_has_it(tmp_path):
    """huggingface_hub reads the environment when it is imported: in a process of its own, once for each variable."""
    program = """
import importlib, os
from huggingface_hub import constants
from rlhf_recipes.runs.references import hub_cache

variables = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")
for name in (None, *variables):
    for variable in variables:
        os.environ.pop(variable, None)
    if name:
        os.environ[name] = f"$HOME/{name}"
    importlib.reload(constants)
    print(name, str(hub_cache()) == constants.HF_HUB_CACHE, constants.HF_HUB_CACHE)
"""
    done = run_python("-c", program, cwd=tmp_path)
    found = [line.split() for line in done.stdout.splitlines()]
    assert len({folder for _, _, folder in found}) == 5, done.stderr
    assert all(same == "True" for _, same, _ in found), found


def test_sources_say_which_commit_run_and_file(hub_cache, policy_folder, tmp_path):
    tokenizer = word_tokenizer()
    put_into_cache(hub_cache, "org/name", policy_folder, "main")
    pinned = put_into_cache(
        hub_cache, "org/name", save_pair(tmp_path / "other", causal_lm(tokenizer, seed=1), tokenizer), "v1"
    )
    data = write_jsonl(tmp_path / "reviews.jsonl", REVIEWS)
    settings = [
        f"runs_dir={tmp_path / 'runs'}",
        f"data.path={data}",
        "data.transform=null",
        "ppo.policy=org/name@v1",
        "ppo.value_model=stage:sft",
    ]
    settings += [f"reward_funcs=[{{name: reward_model, args: {{model: {policy_folder}}}}}]"]
    recipe = load_recipe("imdb_tiny", settings)
    run = Run(recipe, "sft")
    run.start()
    run.finish()
    snapshot = hub_cache / "models--org--name" / "snapshots" / pinned
    assert sources(recipe, "ppo") == {
        "data.path": {
            "reference": str(data),
            "revision": None,
            "path": str(data),
            "sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
        },
        "ppo.policy": {"reference": "org/name@v1", "revision": pinned, "path": str(snapshot)},
        "ppo.value_model": {"reference": "stage:sft", "revision": run.manifest["id"], "path": str(run.path)},
        "reward_funcs.0.args.model": {
            "reference": str(policy_folder),
            "revision": None,
            "path": str(policy_folder),
        },
    }
    assert sources(recipe, "compare") == {}


def test_large_files_are_not_read_whole(tmp_path, monkeypatch):
    data = write_jsonl(tmp_path / "reviews.jsonl", REVIEWS)
    monkeypatch.setattr(hub, "HASHED_BYTES", data.stat().st_size - 1)
    found = sources(load_recipe("imdb_tiny", [f"data.path={data}"]), "sft")["data.path"]
    assert found["bytes"] == data.stat().st_size and found["modified"] == data.stat().st_mtime
    assert "sha256" not in found


def test_packages_that_settings_ask_for_are_named_where_they_are_not(monkeypatch):
    monkeypatch.setattr(hub, "find_spec", lambda module: None)

    def refused(key, value):
        with pytest.raises(RecipeError) as caught:
            check_packages(load_recipe("imdb_tiny", [f"rloo.trainer.{key}={value}"]), "rloo")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "rloo.trainer.use_vllm: vllm is not installed: pip install 'trl[vllm]'" in refused("use_vllm", "true")
    assert "rloo.trainer.use_liger_kernel: liger_kernel is not installed" in refused("use_liger_kernel", "true")
    check_packages(load_recipe("imdb_tiny", ["rloo.trainer.use_vllm=false"]), "rloo")


@pytest.fixture
def cached_data(hub_cache, tmp_path, monkeypatch):
    """A data set of the Hub as `datasets` and huggingface_hub leave it behind; returns its commit."""
    import datasets

    root = tmp_path / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", root)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    rows = write_jsonl(tmp_path / "reviews.jsonl", REVIEWS)
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "README.md").write_text("reviews")
    commit = put_into_cache(hub_cache, "org/reviews", tmp_path / "card", "main", "v1", kind="dataset")
    made = datasets.load_dataset("json", data_files=str(rows), cache_dir=str(tmp_path / "made"), split="train")
    folder = root / "org___reviews" / "default" / "0.0.0" / commit
    shutil.copytree(os.path.dirname(made.cache_files[0]["filename"]), folder)
    (folder / "json-train.arrow").rename(folder / "reviews-train.arrow")
    info = json.loads((folder / "dataset_info.json").read_text())
    info |= {"builder_name": "json", "dataset_name": "reviews", "config_name": "default"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return commit


def test_sources_say_the_commit_of_a_data_set(cached_data, hub_cache, tmp_path):
    from rlhf_recipes.data.rows import load_rows

    recipe = load_recipe("imdb_tiny", ["data={path: org/reviews, revision: v1, transform: null}"])
    check_references(recipe, "sft")
    assert len(load_rows(recipe.data, recipe.seed)[0]) > 20
    found = sources(recipe, "sft")["data.path"]
    assert (found["reference"], found["revision"]) == ("org/reviews", cached_data)
    (tmp_path / "card" / "README.md").write_text("other reviews")
    put_into_cache(hub_cache, "org/reviews", tmp_path / "card", "v2", kind="dataset")
    with pytest.raises(RecipeError, match=f"data.path: .* at {cached_data}, not at the pinned revision v2"):
        sources(load_recipe("imdb_tiny", ["data={path: org/reviews, revision: v2, transform: null}"]), "sft")
    with pytest.raises(RecipeError, match="data.path: org/nowhere is not available"):
        sources(load_recipe("imdb_tiny", ["data.path=org/nowhere"]), "sft")


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
    assert not list(tmp_path.glob("runs/*/ppo"))


@pytest.mark.slow
def test_a_pinned_model_without_a_pad_token_goes_through_every_stage(hub_cache, tmp_path):
    """Its tokenizer gets the recipe's [PAD], stage sft makes room for it, and all manifests say what was loaded."""
    tokenizer = word_tokenizer(pad_token=None)
    for ref, seed in (("main", 0), ("v1", 1)):
        model = causal_lm(tokenizer, seed=seed, pad_token_id=None)
        commit = put_into_cache(hub_cache, "org/name", save_pair(tmp_path / ref, model, tokenizer), ref)
    data = write_jsonl(tmp_path / "reviews.jsonl", REVIEWS)
    settings = [
        "runs_dir=runs",
        f"data={{path: {data}, transform: null, eval_fraction: 0.4}}",
        'special_tokens={pad_token: "[PAD]"}',
    ]
    settings += ["sft.model=org/name@v1", "reward_funcs=[{name: reward_model, args: {model: stage:reward}}]"]
    settings += [f"{stage}.trainer={{max_steps: 2}}" for stage in ("sft", "reward")]
    batch = "{max_completion_length: 4, per_device_train_batch_size: 8, num_generations: 4}"
    settings += ["episodes=16", f"ppo.trainer={batch}", "ppo.value_model=stage:reward", f"rloo.trainer={batch}"]
    settings += ["eval={num_prompts: 2, held_out_funcs: [{name: length}], models: {base: org/name@v1, ppo: stage:ppo}}"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub_cache)}
    root = tmp_path / "runs" / "imdb_tiny"
    for stage in ("sft", "reward", "ppo", "eval"):
        done = cli(stage, "imdb_tiny", *settings, cwd=tmp_path, **offline)
        assert done.returncode == 0, done.stderr
        found = json.loads((root / stage / "manifest.json").read_text())["sources"]
        assert found["data.path"]["sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
        key = {"sft": "sft.model", "eval": "eval.models.base"}.get(stage)
        if key is not None:
            assert found[key]["reference"] == "org/name@v1" and found[key]["revision"] == commit
            continue
        assert found[f"{stage}.{'policy' if stage == 'ppo' else 'model'}"]["reference"] == "stage:sft"
    for stage in ("sft", "reward", "ppo"):
        config = json.loads((root / stage / "config.json").read_text())
        saved = json.loads((root / stage / "tokenizer_config.json").read_text())
        assert saved["pad_token"] == "[PAD]" and saved["eos_token"] == "<eos>"
        assert config["pad_token_id"] == len(tokenizer) == config["vocab_size"] - 1
        assert config["eos_token_id"] == tokenizer.eos_token_id
