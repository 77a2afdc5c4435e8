"""Duels: what is trained once and what for every seed, what is refused before, and what is left when something fails."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from rlhf_recipes.experiments.duel import plan_duel, run_duel
from rlhf_recipes.recipe.graph import eval_models
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.runs.files import read_manifest
from rlhf_recipes.runs.folder import Run
from support.finished_runs import stand_in
from support.processes import cli
from support.texts import write_jsonl


def plan(tmp_path, *overrides, seeds="3", **more):
    return plan_duel("imdb_tiny", [f"runs_dir={tmp_path}", *overrides], seeds, **more)


def test_sft_and_reward_are_trained_once_and_all_seeds_build_on_them(tmp_path):
    duel = plan(tmp_path)
    stages = [job.stage for job in duel.planner.jobs]
    assert sorted(stages) == ["ppo"] * 3 + ["reward", "rloo", "rloo", "rloo", "sft"] and stages[0] == "sft"
    assert duel.folder == tmp_path / "imdb_tiny" / "duel"
    sft, reward = (next(job for job in duel.planner.jobs if job.stage == stage) for stage in ("sft", "reward"))
    assert sft.path.parent.parent == reward.path.parent.parent == tmp_path / "imdb_tiny" / "sweep-shared"
    assert sft.recipe.seed == reward.recipe.seed == 42
    seen = []
    for job in duel.trained.values():
        recipe = job.recipe
        assert getattr(recipe, job.stage).policy == str(sft.path) and job.needs == [sft]
        assert job.path == duel.folder / f"{job.stage}-seed_{recipe.seed}" / job.stage
        seen.append((job.stage, recipe.seed))
    assert seen == [(stage, seed) for seed in (42, 43, 44) for stage in ("ppo", "rloo")]


def test_both_algorithms_of_a_seed_differ_in_nothing_but_the_algorithm(tmp_path):
    ppo, rloo = (Run(job.recipe, job.stage).settings for job in plan(tmp_path, seeds="1").trained.values())
    assert {key for key in ppo if ppo[key] != rloo.get(key)} == {"ppo"}


def test_one_eval_measures_all_on_the_recipes_own_seed(tmp_path):
    duel = plan(tmp_path, seeds="2")
    evaluation = duel.evaluation({})
    models = eval_models(evaluation.recipe)
    wanted = {name: str(duel.folder / name / name.split("-")[0]) for name in duel.trained}
    assert wanted.items() <= models.items() and "stage:ppo" not in models.values()
    assert models["sft"] == str(duel.planner.jobs[0].path) and evaluation.recipe.seed == 42
    assert evaluation.path == duel.folder / "eval"
    of_runs_only = eval_models(plan(tmp_path, "eval.models={p: stage:ppo}", seeds="1").evaluation({}).recipe)
    assert next(iter(of_runs_only.items())) == ("sft", str(duel.planner.jobs[0].path))  # what KL refers to
    failed = {duel.trained["ppo-seed_43"]: "x"}
    assert set(models) - set(eval_models(duel.evaluation(failed).recipe)) == {"ppo-seed_43"}
    assert "stage:" not in json.dumps(Run(evaluation.recipe, "eval").settings)


def test_other_settings_have_another_folder_and_the_same_ones_the_same(tmp_path):
    plain, other, again = (plan(tmp_path, **more).folder.name for more in ({}, {"episodes": 64}, {"episodes": 64}))
    assert plain == "duel" and other == again and other.startswith("duel-")
    assert plan(tmp_path, episodes=4096).folder.name == plan(tmp_path, "episodes=4096").folder.name == "duel"
    assert plan(tmp_path, seeds="5").folder.name == "duel"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["rloo.trainer.beta=0.1"],
            ["trainer.beta (objective): ppo 0.05, rloo 0.1", "ppo.trainer.beta=0.05 rloo.trainer.beta=0.05"],
        ),
        (
            ["ppo.trainer.max_completion_length=20", "rloo.trainer.temperature=0.7"],
            ["max_completion_length", "temperature (budget)"],
        ),
        (["rloo.policy=package:rlhf_recipes/base"], ["policy (model)"]),
        (["rloo.trainer.max_steps=5"], ["rloo.trainer.max_steps: it would replace", "rloo.trainer.max_steps=null"]),
        (["episodes=null"], ["add --episodes N"]),
        (["rloo=null"], ["no stage rloo"]),
        (["rloo.trainer.bata=0.1"], ["bata"]),
        (
            ["rloo.trainer.gradient_accumulation_steps=2", "rloo.trainer.steps_per_generation=3"],
            ["rloo.trainer.steps_per_generation (3) must be a multiple of gradient_accumulation_steps (2)"],
        ),
        (["rloo.peft={}"], ["peft (model)", "ppo.peft=null rloo.peft=null"]),
        (
            ["episodes=100", "rloo.trainer.per_device_train_batch_size=96"],
            ["128 for ppo (rollouts of 64)", "192 for rloo (of 96)", "--episodes 192"],
        ),
    ],
)
def test_what_would_not_be_comparable_is_refused_before_anything_runs(tmp_path, overrides, expected):
    with pytest.raises(RecipeError) as caught:
        plan(tmp_path, *overrides)
    assert all(part in str(caught.value) for part in expected), str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_budget_on_the_command_line_takes_the_place_of_the_recipes(tmp_path):
    duel = plan(tmp_path, "episodes=null", episodes=640)
    assert {job.recipe.episodes for job in duel.trained.values()} == {640}
    with pytest.raises(RecipeError, match="--seeds"):
        plan(tmp_path, seeds="0")


@pytest.fixture
def launched(monkeypatch):
    """Stages that only write what a stage leaves; of (stage, seed) an exit code may be given, or a score."""
    outcomes = {}

    def leave(run, recipe, score):
        run.record_sources({})
        if run.stage == "sft":
            run.results = {"eval_perplexity": 20.0}
        if run.stage == "reward":
            run.results = {"eval_accuracy": 0.75, "eval_pairs": 40, "train_pairs": 400}
        if run.stage in ("ppo", "rloo"):
            rows = [{"step": i, "episodes": 32 * i, "score_mean": score * i / 2, "kl": 1.0 * i} for i in (1, 2)]
            write_jsonl(run.path / "metrics.jsonl", rows)
            run.results = {"episodes": 64}
        if run.stage == "eval":
            models = eval_models(recipe)
            scores = {name: read_metrics_end(models[name]) for name in models if "-seed_" in name}
            content = {"models": {name: {"score_mean": score} for name, score in scores.items()}, "num_prompts": 1}
            (run.path / "eval.json").write_text(json.dumps(content))
            write_jsonl(run.path / "completions.jsonl", [{"prompt": "a", "models": {}}])

    ran = stand_in(
        monkeypatch,
        lambda stage, recipe: (stage, recipe.seed),
        lambda ran: outcomes.get(ran, 0.25 + ran[1] / 1000),
        leave,
    )
    return ran, outcomes


def read_metrics_end(folder):
    with open(f"{folder}/metrics.jsonl") as file:
        return json.loads(file.readlines()[-1])["score_mean"]


def comparison_of(duel):
    return json.loads((duel.folder / "comparison.json").read_text())


def test_a_duel_ends_with_a_verdict_and_goes_on_where_it_was(tmp_path, launched, capsys):
    ran, outcomes = launched
    outcomes |= {("ppo", 42): 0.9, ("ppo", 43): 0.91, ("ppo", 44): 0.93}
    assert run_duel(plan(tmp_path)) == 0
    *_, verdict, report = capsys.readouterr().out.splitlines()
    duel = plan(tmp_path)
    assert verdict.startswith("PPO better: On held-out prompts") and report == f"report: {duel.folder / 'report.html'}"
    found = comparison_of(duel)
    assert found["verdict"]["winner"] == "ppo" and found["views"][0]["paired"]
    assert [run["name"] for run in found["runs"]] == [f"{s} seed {n}" for n in (42, 43, 44) for s in ("ppo", "rloo")]
    assert found["notes"][0].startswith("SFT model: perplexity 20.0") and "75.0%" in found["notes"][1]
    before = len(ran)
    assert run_duel(duel) == 0 and len(ran) == before  # all of it was there
    assert run_duel(plan(tmp_path, seeds="4")) == 0
    assert ran[before:] == [("ppo", 45), ("rloo", 45), ("eval", 42)]  # one more seed, and an eval of all anew
    assert comparison_of(duel)["views"][0]["seeds"] == {"ppo": 4, "rloo": 4}
    assert any(path.name.startswith("eval.") for path in duel.folder.iterdir())


def test_seeds_with_another_batch_are_refused_before_they_train(tmp_path, launched):
    ran, _ = launched
    duel = plan(tmp_path)
    assert run_duel(duel) == 0
    for job in duel.trained.values():
        manifest = json.loads((job.path / "manifest.json").read_text())
        (job.path / "manifest.json").write_text(json.dumps(manifest | {"setup": {"num_processes": 1}}))
    before = len(ran)
    assert plan(tmp_path, seeds="4", processes=1)
    with pytest.raises(
        RecipeError, match="ppo-seed_42/ppo: 1 process trained it, but this duel has 2, .* name=imdb_tiny-2"
    ):
        plan(tmp_path, seeds="4", processes=2)
    assert len(ran) == before


def test_a_failed_seed_is_named_and_the_others_are_compared(tmp_path, launched, capsys):
    ran, outcomes = launched
    outcomes |= {("rloo", 43): 1}
    duel = plan(tmp_path)
    assert run_duel(duel) == 1
    shown = capsys.readouterr()
    assert "rloo seed=43: RuntimeError: no luck" in shown.err and "report: " in shown.out
    found = comparison_of(duel)
    assert (
        len(found["runs"]) == 5 and found["views"][0]["seeds"] == {"ppo": 2, "rloo": 2} and found["views"][0]["paired"]
    )
    assert found["verdict"]["winner"] is None and found["verdict"]["label"] == "1 of 6 runs failed"
    assert any("rloo seed=43 failed: " in note for note in found["notes"])
    del outcomes["rloo", 43]
    before = len(ran)
    assert run_duel(plan(tmp_path)) == 0 and ran[before:] == [("rloo", 43), ("eval", 42)]
    assert comparison_of(duel)["views"][0]["seeds"] == {"ppo": 3, "rloo": 3}


@pytest.mark.parametrize("broken", [("eval", 42), ("reward", 42)])
def test_without_an_eval_the_training_scores_are_compared(tmp_path, launched, broken, capsys):
    ran, outcomes = launched
    outcomes[broken] = 1
    duel = plan(tmp_path)
    assert run_duel(duel) == 1 and (("eval", 42) in ran) == (broken[0] == "eval")
    found = comparison_of(duel)
    assert found["held_out"] is None and found["views"][0]["view"] == "episodes" and len(found["runs"]) == 6
    assert "eval of all: " in capsys.readouterr().err


def test_one_algorithm_that_failed_leaves_nothing_to_compare(tmp_path, launched, capsys):
    _, outcomes = launched
    outcomes |= {("rloo", seed): 1 for seed in (42, 43, 44)}
    duel = plan(tmp_path)
    assert run_duel(duel) == 1 and comparison_of(duel)["verdict"]["label"] == "3 of 6 runs failed"
    outcomes["sft", 42] = 1
    lost = plan(tmp_path, "sft.trainer.max_steps=3")
    assert run_duel(lost) == 1 and not (lost.folder / "comparison.json").exists()
    assert "no run has finished" in capsys.readouterr().err


@pytest.mark.parametrize("code", [143, 130])
@pytest.mark.parametrize("stage", ["rloo", "eval"])
def test_a_duel_that_is_stopped_starts_nothing_more(tmp_path, launched, code, stage, capsys):
    ran, outcomes = launched
    outcomes[stage, 42] = code
    duel = plan(tmp_path)
    assert run_duel(duel) == code and ran[-1] == (stage, 42) and not (duel.folder / "comparison.json").exists()
    assert "the same command resumes it" in capsys.readouterr().out
    del outcomes[stage, 42]
    assert run_duel(plan(tmp_path)) == 0


def test_runs_with_other_settings_are_refused_or_moved_aside(tmp_path, launched):
    ran, _ = launched
    run_duel(plan(tmp_path, seeds="1"))
    manifest = plan(tmp_path, seeds="1").trained["ppo-seed_42"].path / "manifest.json"
    values = json.loads(manifest.read_text())
    values["settings"]["ppo"]["trainer"]["lam"] = 0.5  # as if the recipe's file had been changed since
    manifest.write_text(json.dumps(values))
    with pytest.raises(RecipeError, match="lam: 0.5 -> 1.0"):
        plan(tmp_path, seeds="1")
    before = len(ran)
    assert run_duel(plan(tmp_path, seeds="1", overwrite=True), overwrite=True) == 0
    assert ran[before] == ("ppo", 42)


def test_one_seed_is_labelled_so(tmp_path, launched):
    duel = plan(tmp_path, seeds="1")
    assert run_duel(duel) == 0
    found = comparison_of(duel)
    assert found["single_seed"] and "one seed each" in found["verdict"]["sentence"]


def test_wandb_groups_runs_by_recipe(tmp_path, launched, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    run_duel(plan(tmp_path, seeds="1"))
    assert os.environ["WANDB_RUN_GROUP"] == "imdb_tiny"


TINY = ["data.max_rows=600", "sft.trainer.max_steps=2", "reward.trainer.max_steps=2", "eval.num_prompts=16"]
TINY += [f"{stage}.trainer.per_device_train_batch_size=32" for stage in ("ppo", "rloo")]


def sampled(folder):
    lines = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    return [(line["step"], line["prompt"]) for line in lines]


@pytest.mark.slow
def test_a_duel_as_a_user_runs_it(tmp_path):
    """Killed in its midst, too: the same command goes on."""
    command = ["duel", "imdb_tiny", *TINY, "--seeds", "2", "--episodes", "96"]
    refused = cli(*command, "rloo.trainer.beta=0.9", cwd=tmp_path)
    assert refused.returncode == 2 and "trainer.beta" in refused.stderr and not (tmp_path / "runs").exists()
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf_recipes.cli", *command], cwd=tmp_path, stdout=subprocess.PIPE
    )
    try:
        while not list(tmp_path.glob("runs/imdb_tiny/duel-*/rloo-seed_42/rloo/metrics.jsonl")):
            assert process.poll() is None
            time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)  # until the stage, which writes there too, has ended
    done = cli(*command, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("runs/imdb_tiny/duel-*")
    assert "reused, finished before" in done.stdout and done.stdout.splitlines()[-1].endswith("report.html")
    found = json.loads((folder / "comparison.json").read_text())
    assert found["comparable"] and found["held_out"]["prompts"] == 16 and found["views"][0]["paired"]
    assert {run["episodes"] for run in found["runs"]} == {96}
    for seed in (42, 43):
        assert sampled(folder / f"ppo-seed_{seed}/ppo") == sampled(folder / f"rloo-seed_{seed}/rloo")
    assert sampled(folder / "ppo-seed_42/ppo") != sampled(folder / "ppo-seed_43/ppo")
    shared = {read_manifest(path)["id"] for path in tmp_path.glob("runs/imdb_tiny/sweep-shared/sft-*/sft")}
    policies = {run["settings"]["policy"] for run in found["runs"]}
    assert len(shared) == len(policies) == 1 and policies.pop().endswith(f"({shared.pop()[:8]})")
