"""Sweeps: the grid, where runs go, what is shared and skipped, and numbers that are those of the runs."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlhf_recipes.experiments.grid import Axis, in_path, parse_grid, parse_seeds, path_parts, split_values
from rlhf_recipes.experiments.sweep import plan_sweep, run_sweep
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.runs.files import read_manifest
from rlhf_recipes.runs.folder import Run
from support.finished_runs import stand_in
from support.processes import cli
from support.texts import write_jsonl

BASE = "rloo.policy=package:rlhf_recipes/base"

WHOLE_VALUES = st.sampled_from(
    ["1", "-1e-5", "", "none", "don't", "[2,8]", "{a: 1, b: [x, y]}", "'a,b'", "'it''s, so'", '"a\\",b"', "['a]', b]"]
)


@given(st.lists(WHOLE_VALUES, min_size=1))
def test_values_come_apart_where_they_were_joined(values):
    assert split_values(",".join(values)) == values
    assert split_values(" , ".join(values)) == values


@given(st.text(alphabet="a1,'\"[]{}\\: "))
def test_whatever_is_split_is_still_all_there(text):
    assert "".join(",".join(split_values(text)).split()) == "".join(text.split())


def test_grid():
    axes, plain = parse_grid(["a=1,2", "b.c,b.d=[1,2],[3,4]", "e=[1,2]", "f,g=5", "h="])
    assert axes == [Axis(("a",), ("1", "2")), Axis(("b.c", "b.d"), ("[1,2]", "[3,4]"))]
    assert plain == ["e=[1,2]", "f=5", "g=5", "h="]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["seed=1,2"], ["seed", "--seeds"]),
        (["name=a,b"], ["name", "its own folder"]),
        (["a=1,,2"], ["a: a value of '1,,2' is empty"]),
        (["a=1,2,1"], ["value 1 is given twice"]),
        (["a=1,2", "a=3"], ["a: is set twice"]),
        (["a,b=1,2", "b=3,4", "runs_dir=x,y"], ["b: is set twice", "runs_dir"]),
    ],
)
def test_a_grid_that_cannot_be(overrides, expected):
    with pytest.raises(RecipeError) as caught:
        parse_grid(overrides)
    assert all(part in str(caught.value) for part in expected), str(caught.value)


def test_seeds():
    assert parse_seeds("3", 42) == [42, 43, 44] and parse_seeds("7,5", 42) == [7, 5]
    for wrong in ("0", "-1", "1,1", "a", "", "1,"):
        with pytest.raises(RecipeError, match="--seeds"):
            parse_seeds(wrong, 42)


@given(st.text(min_size=1))
@example("߀")
def test_values_make_parts_of_paths(text):
    part = in_path(text)
    assert len(part) <= 40 and all(c.isascii() and (c.isalnum() or c in "._-") for c in part)


def plan(tmp_path, *overrides, stages=("rloo",), seeds="1", **more):
    return plan_sweep("imdb_tiny", [f"runs_dir={tmp_path}", *overrides], list(stages), seeds, **more)


@given(
    st.lists(st.from_regex(r"[a-z0-9_.-]{1,9}", fullmatch=True), min_size=1, max_size=4, unique=True),
    st.lists(st.from_regex(r"[a-z0-9_.-]{1,9}", fullmatch=True), min_size=1, max_size=4, unique=True),
)
def test_no_two_combinations_have_the_same_path(first, second):
    names = ["-".join(path_parts({"a": x, "b": y})) for x, y in product(first, second)]
    assert len(set(names)) == len(names)


def test_every_combination_and_seed_has_a_folder_of_its_own(tmp_path):
    sweep = plan(tmp_path, "rloo.trainer.num_generations=2,4", "data.prompt_tokens=[2,4],[3,4]", seeds="3")
    paths = [cell.training.path for row in sweep.rows for cell in row.cells]
    assert len(sweep.rows) == 4 and len(set(paths)) == 12
    assert sweep.folder == tmp_path / "imdb_tiny" / "sweep-data.prompt_tokens-rloo.num_generations"
    assert all(path.parent.parent == sweep.folder and path.name == "rloo" for path in paths)
    for row, (n, tokens) in zip(sweep.rows, product((2, 4), ([2, 4], [3, 4])), strict=True):
        assert f"num_generations={n}" in row.label
        for cell, seed in zip(row.cells, (42, 43, 44), strict=True):
            recipe = cell.training.recipe
            assert (recipe.rloo.trainer["num_generations"], recipe.data.prompt_tokens, recipe.seed) == (n, tokens, seed)


def test_a_path_does_not_depend_on_the_order_of_the_keys(tmp_path):
    keys = ["rloo.trainer.num_generations=2,4", "rloo.baseline=none,constant"]
    forth, back = (plan(tmp_path, *order) for order in (keys, keys[::-1]))
    assert {job.path for job in forth.jobs} == {job.path for job in back.jobs}


def test_stages_that_runs_build_on_are_made_once_for_each_of_their_settings(tmp_path):
    sweep = plan(tmp_path, "rloo.trainer.beta=0.1,0.2,0.3", seeds="2")
    assert [job.stage for job in sweep.jobs].count("sft") == [job.stage for job in sweep.jobs].count("reward") == 2
    for job in sweep.jobs:
        position = sweep.jobs.index(job)
        assert all(sweep.jobs.index(needed) < position for needed in job.needs)
        assert "stage:" not in json.dumps(Run(job.recipe, job.stage).settings).replace("stage:rloo", "", 1)
    for cell in (cell for row in sweep.rows for cell in row.cells):
        (sft,) = cell.training.needs
        assert cell.training.recipe.rloo.policy == str(sft.path) and sft.recipe.seed == cell.seed
        (judge,) = (job for job in cell.evaluation.needs if job.stage == "reward")
        assert cell.evaluation.recipe.eval.held_out_funcs[0].args["model"] == str(judge.path)
        assert judge.recipe.reward.model == str(sft.path)
    other = plan(tmp_path, "rloo.baseline=none,constant", seeds="2")  # another sweep shares them too
    assert {job.path for job in other.jobs if job.stage == "sft"} == {j.path for j in sweep.jobs if j.stage == "sft"}
    changed = plan(tmp_path, "sft.trainer.learning_rate=1e-4,2e-4", with_eval=False)
    assert [job.stage for job in changed.jobs] == ["sft", "rloo", "sft", "rloo"]
    both = plan(tmp_path, stages=["sft", "rloo"], with_eval=False)  # what is swept is what the other builds on
    assert [job.stage for job in both.jobs] == ["sft", "rloo"] and both.jobs[1].needs == [both.jobs[0]]


def test_keys_that_change_together_and_stages_that_a_key_does_not_concern(tmp_path):
    together = plan(tmp_path, "ppo.trainer.beta,rloo.trainer.beta=0.1,0.3", stages=["ppo,rloo"])
    assert [row.label for row in together.rows] == ["ppo beta=0.1", "ppo beta=0.3", "rloo beta=0.1", "rloo beta=0.3"]
    for row in together.rows:
        recipe = row.cells[0].training.recipe
        assert getattr(recipe, row.stage).trainer["beta"] == float(row.settings["beta"])
    by_default = plan(tmp_path, "rloo.baseline=none,constant", stages=[])
    assert [row.label for row in by_default.rows] == ["ppo", "rloo baseline=none", "rloo baseline=constant"]


def test_eval_compares_with_what_the_recipe_refers_to(tmp_path):
    models = "eval.models={start: stage:sft, ppo: stage:ppo, rloo: stage:rloo}"
    (row,) = plan(tmp_path, models).rows
    sft = next(job for job in row.cells[0].evaluation.needs if job.stage == "sft")
    assert row.cells[0].evaluation.recipe.eval.models == {"start": str(sft.path), "rloo": "stage:rloo"}
    (row,) = plan(tmp_path, "eval.reference=base").rows
    models = row.cells[0].evaluation.recipe.eval.models
    assert models == {"base": "package:rlhf_recipes/base", "rloo": "stage:rloo"}


@pytest.mark.parametrize(
    ("overrides", "stages", "expected"),
    [
        (["rloo.trainer.bata=1,2", "sed=3", "rloo.baseline=none,nothing"], ["rloo"], ["bata", "sed", "'nothing'"]),
        (["rloo.trainer.beta=0.1,high"], ["rloo"], ["rloo.trainer.beta", "'high'"]),
        (["reward_funcs.0.name=length,lenght"], ["rloo"], ["unknown reward function 'lenght'"]),
        ([], ["rlo", "compare"], ["--stage rlo, compare", "ppo, rloo"]),
        (["ppo.trainer.beta=0.1,0.2"], ["rloo"], ["ppo.trainer.beta", "do not depend on it"]),
        (["ppo=null", "rloo=null"], [], ["no stage ppo or rloo"]),
        (["sft=null"], ["rloo"], ["stage:sft", "no stage sft"]),
        (["sft.model=stage:reward"], ["reward"], ["reward -> sft -> reward"]),
    ],
)
def test_what_is_wrong_is_found_before_anything_runs(tmp_path, overrides, stages, expected):
    with pytest.raises(RecipeError) as caught:
        plan(tmp_path, *overrides, stages=stages)
    assert all(part in str(caught.value) for part in expected), str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def launched(monkeypatch):
    """Stages that only write what a stage leaves; a score of (seed, num_generations) that is an int is an exit code."""
    scores = {}

    def entry(stage, recipe):
        return stage, recipe.seed, recipe.rloo and recipe.rloo.trainer["num_generations"]

    def leave(run, recipe, score):
        if run.stage == "rloo":
            run.results = {"score_last": score, "kl_last": 2.0, "episodes": 64}
            write_jsonl(
                run.path / "metrics.jsonl",
                [{"step": i, "episodes": 32 * i, "score_mean": score * i} for i in (1, 2)],
            )
        if run.stage == "eval":
            (run.path / "eval.json").write_text(json.dumps({"models": {"rloo": {"score_mean": 10 * score}}}))

    ran = stand_in(monkeypatch, entry, lambda ran: scores.get(ran[1:], 0.0), leave)
    return ran, scores


def test_table_is_mean_and_deviation_of_the_runs(tmp_path, launched, capsys):
    _, scores = launched
    scores |= {(42, 2): 0.25, (43, 2): 0.75, (42, 4): 1.5, (43, 4): 1.5}
    sweep = plan(tmp_path, BASE, "rloo.trainer.num_generations=2,4", seeds="2")
    assert run_sweep(sweep) == 0
    result = json.loads((sweep.folder / "sweep.json").read_text())
    first, second = (row["numbers"] for row in result["rows"])
    assert first["score_last"] == {"mean": 0.5, "std": stdev([0.25, 0.75]), "n": 2}
    assert first["eval/score_mean"]["mean"] == 5.0 and second["score_last"] == {"mean": 1.5, "std": 0.0, "n": 2}
    with open(sweep.folder / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["num_generations"] for row in rows] == ["2", "4"]
    assert float(rows[0]["score_last_std"]) == stdev([0.25, 0.75]) and rows[0]["seeds"] == "2"
    shown = capsys.readouterr().out
    assert "0.50 ± 0.35" in shown and "5.00 ± 3.54" in shown and "1.50 ± 0.00" in shown
    assert shown.splitlines()[-1].endswith(str(sweep.folder / "sweep.png"))
    assert (sweep.folder / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_one_seed_has_no_deviation(tmp_path, launched, capsys):
    _, scores = launched
    scores[42, 4] = 0.5
    assert run_sweep(plan(tmp_path, BASE)) == 0
    shown = capsys.readouterr().out
    assert "±" not in shown and "one seed" in shown and "0.50" in shown


def test_what_fails_is_named_and_stops_nothing_else(tmp_path, launched, capsys):
    ran, scores = launched
    scores |= {(42, 2): 1, (43, 2): 0.75}
    sweep = plan(tmp_path, BASE, "rloo.trainer.num_generations=2,4", seeds="2")
    assert run_sweep(sweep) == 1
    assert ("eval", 42, 2) not in ran and {("eval", 43, 2), ("eval", 42, 4), ("eval", 43, 4)} <= set(ran)
    shown = capsys.readouterr()
    assert "rloo num_generations=2 seed=42: RuntimeError: no luck   " in shown.err and "at all" not in shown.err
    assert str(sweep.rows[0].cells[0].training.path / "log.txt") in shown.err
    assert "eval: not run, because rloo num_generations=2 seed=42 failed" in shown.err
    assert "2, 1 failed" in shown.out
    row = json.loads((sweep.folder / "sweep.json").read_text())["rows"][0]
    assert row["numbers"]["score_last"] == {"mean": 0.75, "std": None, "n": 1}
    assert [run.get("error", "")[:12] for run in row["runs"]] == ["RuntimeError", ""]

    scores[42, 2] = 0.25  # mended: the same command runs what is missing, and only that
    before = len(ran)
    assert run_sweep(plan(tmp_path, BASE, "rloo.trainer.num_generations=2,4", seeds="2")) == 0
    assert ran[before:] == [("rloo", 42, 2), ("eval", 42, 2)]
    assert capsys.readouterr().out.count("reused, finished before") == len(sweep.jobs) - 2


@pytest.mark.parametrize("code", [143, 130])
def test_a_sweep_that_is_stopped_starts_nothing_more(tmp_path, launched, code):
    ran, scores = launched
    scores[42, 2] = code
    sweep = plan(tmp_path, BASE, "rloo.trainer.num_generations=2,4", with_eval=False)
    assert run_sweep(sweep) == code and len(ran) == 1 and not (sweep.folder / "sweep.json").exists()
    scores[42, 2] = 0.5
    assert run_sweep(plan(tmp_path, BASE, "rloo.trainer.num_generations=2,4", with_eval=False)) == 0


@pytest.mark.parametrize(("code", "said"), [(137, "exit code 137"), (0, "exit code 2")])
def test_a_run_that_something_ended_is_a_failed_one(code, said, tmp_path, launched, capsys):
    """Also one that `os._exit(0)` in a reward function ended."""
    _, scores = launched
    scores[42, 4] = code
    assert run_sweep(plan(tmp_path, BASE, with_eval=False)) == 1
    assert f"rloo seed=42: {said}" in (printed := capsys.readouterr().err)
    assert ("ended with exit code 0 but did not finish" in printed) == (code == 0)


def test_runs_with_other_settings_are_refused_at_once_or_moved_aside(tmp_path, launched):
    ran, _ = launched
    grid = [BASE, "rloo.trainer.num_generations=2,4"]
    run_sweep(plan(tmp_path, *grid, with_eval=False))
    with pytest.raises(RecipeError) as caught:
        plan(tmp_path, *grid, "episodes=64", with_eval=False)
    found = str(caught.value)
    assert found.count("episodes: 4096 -> 64") == 2 and "name=imdb_tiny-2" in found and "-seed_42-2" not in found
    before = len(ran)
    assert run_sweep(plan(tmp_path, *grid, "episodes=64", with_eval=False, overwrite=True), overwrite=True) == 0
    assert len(ran) == before + 2


OWN = """
import os, time

def scorer(penalty=0.0):
    def score(completions):
        if penalty < 0:
            raise RuntimeError("a penalty below zero")
        time.sleep(float(os.environ.get("NAP", 0)))
        return [-penalty * len(text) for text in completions]
    return score
"""

TINY = [
    "reward_funcs=[{name: 'own.py:scorer', args: {penalty: 0.5}}]",
    "data.max_rows=400",
    "sft.trainer.max_steps=2",
    "rloo.trainer.per_device_train_batch_size=32",
    "eval.held_out_funcs=[]",
    "eval.num_prompts=16",
]


@pytest.mark.slow
def test_a_sweep_as_a_user_runs_it(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    command = ["sweep", "imdb_tiny", "--stage", "rloo", *TINY, "episodes=64", "reward_funcs.0.args.penalty=0.1,-1"]
    refused = cli(*command, "rloo.trainer.bta=1", "--seeds", "2", cwd=tmp_path)
    assert refused.returncode == 2 and "rloo.trainer.bta" in refused.stderr and not (tmp_path / "runs").exists()
    done = cli(*command, "--seeds", "2", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    folder = Path("runs/imdb_tiny/sweep-reward_funcs.0.args.penalty")
    assert done.stdout.splitlines()[-1].endswith(str(folder / "sweep.png"))
    end = done.stderr[done.stderr.rindex("error: rloo penalty=-1 seed=42: ") :]
    assert "a penalty below zero" in end and str(folder / "rloo-penalty_-1-seed_43/rloo/log.txt") in end
    shared = [path.name for path in (tmp_path / "runs/imdb_tiny/sweep-shared").iterdir()]
    assert len(shared) == 2 and all(name.startswith("sft-seed_4") for name in shared)
    good, bad = json.loads((tmp_path / folder / "sweep.json").read_text())["rows"]
    assert bad["numbers"] == {} and all("a penalty below zero" in run["error"] for run in bad["runs"])
    cells = [tmp_path / folder / f"rloo-penalty_0.1-seed_{seed}" for seed in (42, 43)]
    trained = [read_manifest(cell / "rloo")["results"]["score_last"] for cell in cells]
    measured = [json.loads((cell / "eval/eval.json").read_text())["models"]["rloo"] for cell in cells]
    assert good["numbers"]["score_last"] == {"mean": fmean(trained), "std": stdev(trained), "n": 2}
    for metric in ("score_mean", "positive_share", "kl", "length_mean"):
        assert good["numbers"][f"eval/{metric}"]["mean"] == fmean(values[metric] for values in measured)
    again = cli(*command, "--seeds", "1", cwd=tmp_path)
    assert again.returncode == 1 and again.stdout.count("reused, finished before") == 3, again.stdout  # sft, rloo, eval


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.nightly)]
)
def test_a_sweep_stops_when_asked_or_killed_and_goes_on(number, tmp_path):
    """Its stage does not train on alone: the same command could not go on with that run."""
    (tmp_path / "own.py").write_text(OWN)
    arguments = ["sweep", "imdb_tiny", "--stage", "rloo", *TINY, "episodes=256", BASE, "--no-eval"]
    command = [sys.executable, "-m", "rlhf_recipes.cli", *arguments]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"NAP": "1"}, stdout=subprocess.PIPE, text=True)
    path = tmp_path / "runs/imdb_tiny/sweep-seeds/rloo-seed_42/rloo"
    while not (path / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)  # until the stage, which writes there too, has ended
    ends = {signal.SIGTERM: (143, "stopped"), signal.SIGINT: (130, "stopped"), signal.SIGKILL: (-9, "stopped")}
    assert (process.returncode, read_manifest(path)["status"]) == ends[number]
    assert number == signal.SIGKILL or "sweep stopped" in said
    done = cli(*arguments, cwd=tmp_path)
    assert done.returncode == 0 and "resumes from step" in done.stdout, done.stdout
    assert [json.loads(line)["episodes"] for line in (path / "metrics.jsonl").read_text().splitlines()][-1] == 256
