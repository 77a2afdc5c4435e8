"""Comparisons: reading runs, differences that refuse a verdict, held-out numbers, views by budget, bands."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_recipes.comparison.build import build_comparison
from rlhf_recipes.comparison.curves import bands, value_at
from rlhf_recipes.comparison.differences import find_differences
from rlhf_recipes.comparison.held_out import Measured
from rlhf_recipes.comparison.runs import columns, read_runs
from rlhf_recipes.comparison.write import compare_runs, notes_on, write_comparison
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.runs.inputs import sources
from support.finished_runs import evaluated, trained
from support.processes import cli
from support.texts import write_jsonl


def compared(*paths):
    runs, failed = read_runs([str(path) for path in paths])
    return build_comparison(runs, "t", [], failed)


def pair(tmp_path, of_rloo=(), **manifest):
    return compared(trained(tmp_path / "a", "ppo"), trained(tmp_path / "b", "rloo", overrides=of_rloo, **manifest))


def refusing(comparison):
    return {d["key"]: d["kind"] for d in comparison["differences"] if d["refuses"]}


OTHER_SFT = {"rloo.policy": {"reference": "stage:sft", "revision": "0711e4", "path": "x"}}
OTHER_DATA = {"data.path": {"reference": "a.csv", "revision": None, "path": "a.csv", "sha256": "07"}}


@pytest.mark.parametrize(
    ("overrides", "manifest", "key", "kind"),
    [
        (["data.prompt_tokens=[2,5]"], {}, "data.prompt_tokens", "data"),
        (["data.max_rows=100"], {}, "data.max_rows", "data"),
        ([], {"sources": OTHER_DATA}, "data.path", "data"),
        ([], {"sources": OTHER_SFT}, "policy", "model"),
        (["rloo.peft={}"], {}, "peft", "model"),
        (["special_tokens={pad_token: '[PAD]'}"], {}, "special_tokens.pad_token", "model"),
        (["reward_funcs=[{name: length}]"], {}, "reward_funcs.0.name", "reward"),
        (["reward_funcs.0.weight=2.0"], {}, "reward_funcs.0.weight", "reward"),
        (["missing_eos={mode: replace, value: -1.0}"], {}, "missing_eos.value", "reward"),
        (["rloo.trainer.max_completion_length=19"], {}, "trainer.max_completion_length", "budget"),
        (["rloo.trainer.temperature=0.7"], {}, "trainer.temperature", "budget"),
        (["episodes=8192"], {}, "episodes", "budget"),
        ([], {"results": {"episodes": 2048}}, "episodes", "budget"),
        (["rloo.trainer.beta=0.1"], {}, "trainer.beta", "objective"),
        (["rloo.trainer.kl_estimator=k3"], {}, "trainer.kl_estimator", "objective"),
        (["rloo.trainer.kl_target=6.0"], {}, "trainer.kl_target", "objective"),
        (["rloo.trainer.sync_ref_model=true"], {}, "trainer.sync_ref_model", "objective"),
        (["rloo.trainer.reward_clip_range=[-1.0,1.0]"], {}, "trainer.reward_clip_range", "reward"),
        (["rloo.trainer.shuffle_dataset=false"], {}, "trainer.shuffle_dataset", "data"),
        (["rloo.trainer.vllm_structured_outputs_regex=a+"], {}, "trainer.vllm_structured_outputs_regex", "budget"),
    ],
)
def test_differences_beyond_the_algorithm_refuse_a_verdict(tmp_path, overrides, manifest, key, kind):
    found = pair(tmp_path, overrides, **manifest)
    assert refusing(found).get(key) == kind, found["differences"]
    assert not found["comparable"] and found["verdict"]["winner"] is None
    assert found["verdict"]["label"] == "not comparable" and key in found["verdict"]["sentence"]
    assert {view["label"] for view in found["views"]} == {"not comparable"}


@pytest.mark.parametrize(
    ("overrides", "manifest", "listed"),
    [
        ([], {}, None),
        (["rloo.trainer.learning_rate=1e-5"], {}, "trainer.learning_rate"),
        (["rloo.trainer.num_generations=2"], {}, "trainer.num_generations"),
        (["rloo.baseline=none"], {}, "baseline"),
        (["rloo.trainer.temperature=1.0", "rloo.trainer.kl_estimator=k1"], {}, None),  # defaults written out
        (["rloo.trainer.logging_steps=3", "rloo.trainer.save_steps=5", "trust_remote_code=[a/b]"], {}, None),
        (["runs_dir=elsewhere", "description=another", "sft.trainer.max_steps=1"], {}, None),
        ([], {"results": {"episodes": 4128}}, "episodes"),  # one rollout more
        ([], {"versions": {"trl": "1.17.0"}}, "versions.trl"),
        ([], {"hardware": {"machine": "x86_64", "cores": 8, "memory_gib": 64.0, "gpus": []}}, "hardware"),
        (
            ["rloo.global_batch_size=64"],
            {"setup": {"num_processes": 2, "mixed_precision": "no"}},
            "setup.num_processes",
        ),
        ([], {"sources": {"rloo.policy": {"reference": "./copy", "revision": "5f7", "path": "copy"}}}, None),
    ],
)
def test_differences_without_effect_or_of_the_algorithm_refuse_nothing(tmp_path, overrides, manifest, listed):
    found = pair(tmp_path, overrides, **manifest)
    assert found["comparable"] and refusing(found) == {}
    keys = {difference["key"] for difference in found["differences"]}
    assert keys - {"trainer.lam", "value_model", "baseline"} == ({listed} - {None, "baseline"})


def own_function(tmp_path, checksum):
    source = {"reference": "own.py:score", "revision": None, "path": f"{tmp_path}/own.py", "sha256": checksum}
    return {"reward_funcs.0.name": source}


def test_a_users_reward_function_is_identified_by_its_content(tmp_path):
    func = ["reward_funcs=[{name: 'own.py:score'}]"]
    one = trained(tmp_path / "a", "ppo", overrides=func, sources=own_function(tmp_path / "a", "01"))
    same = trained(tmp_path / "b", "rloo", overrides=func, sources=own_function(tmp_path / "b", "01"))
    other = trained(tmp_path / "c", "rloo", overrides=func, sources=own_function(tmp_path / "a", "02"))
    assert compared(one, same)["comparable"]
    assert refusing(compared(one, other)) == {"reward_funcs.0.name": "reward"}


@pytest.mark.parametrize("key", ["reward_funcs.0.name", "data.path"])
def test_a_function_or_data_that_changed_between_seeds_refuses(tmp_path, key):
    """Each seed may have its own model, but not its own function or data."""
    func = ["reward_funcs=[{name: 'own.py:score'}]"]
    runs = [
        trained(
            tmp_path / f"{stage}{seed}",
            stage,
            seed,
            overrides=func,
            sources={key: {"reference": "x", "revision": None, "path": "x", "sha256": f"{seed}"}},
        )
        for seed in (42, 43)
        for stage in ("ppo", "rloo")
    ]
    assert list(refusing(compared(*runs))) == [key]


def test_another_model_behind_the_same_reference_is_another_reward(tmp_path):
    func = ["reward_funcs=[{name: reward_model, args: {model: stage:reward}}]"]
    key = "reward_funcs.0.args.model"
    runs = [
        trained(
            folder, stage, overrides=func, sources={key: {"reference": "stage:reward", "revision": id_, "path": "r"}}
        )
        for folder, stage, id_ in ((tmp_path / "a", "ppo", "r1"), (tmp_path / "b", "rloo", "r2"))
    ]
    assert refusing(compared(*runs)) == {key: "reward"}


def of_sft(stage, name):
    return {"sources": {f"{stage}.policy": {"reference": "stage:sft", "revision": name, "path": name}}}


def test_start_models_may_differ_by_seed_but_not_by_algorithm(tmp_path):
    def runs(folder, of_rloo):
        for seed, sft in ((42, "s1"), (43, "s2")):
            yield trained(tmp_path / folder / str(seed), "ppo", seed, **of_sft("ppo", sft))
            yield trained(tmp_path / folder / str(seed), "rloo", seed, **of_sft("rloo", of_rloo[seed]))

    assert compared(*runs("each", {42: "s1", 43: "s2"}))["comparable"]
    assert refusing(compared(*runs("swapped", {42: "s2", 43: "s1"}))) == {"policy": "model"}
    assert refusing(compared(*runs("one", {42: "s1", 43: "s1"}))) == {"policy": "model"}


def test_seeds_of_one_algorithm_must_have_the_same_settings(tmp_path):
    low = trained(tmp_path / "a", "ppo", overrides=["ppo.trainer.learning_rate=1e-6"])
    high = trained(tmp_path / "b", "ppo", 43)
    assert refusing(compared(low, high, trained(tmp_path / "c", "rloo"))) == {"trainer.learning_rate": "algorithm"}
    named = compared(f"slow={low}", f"fast={high}")  # two settings of one algorithm, named apart
    assert named["comparable"] and named["algorithms"] == ["slow", "fast"]


def test_more_processes_are_a_larger_batch_unless_the_recipe_fixes_it(tmp_path):
    def runs(folder, overrides=()):
        for seed in (42, 43):
            for stage in ("ppo", "rloo"):
                setup = {"num_processes": seed - 41, "mixed_precision": "no"}
                yield trained(tmp_path / folder / f"{stage}{seed}", stage, seed, overrides=overrides, setup=setup)

    assert refusing(compared(*runs("grows"))) == {"global_batch_size": "algorithm"}
    assert compared(*runs("fixed", ["ppo.global_batch_size=64", "rloo.global_batch_size=64"]))["comparable"]


def test_one_algorithm_alone_is_nothing_to_compare(tmp_path):
    found = compared(trained(tmp_path / "a", "ppo"), trained(tmp_path / "b", "ppo", 43))
    assert found["verdict"]["label"] == "nothing to compare" and found["views"] == []
    assert len(found["bands"]["episodes"]["score_mean"]["ppo"]["x"]) == 4
    three = compared(
        trained(tmp_path / "c", "ppo"), trained(tmp_path / "d", "rloo"), f"x={trained(tmp_path / 'e', 'rloo')}"
    )
    assert three["verdict"]["label"] == "nothing to compare"


def test_all_unfinished_runs_are_refused_in_one_message(tmp_path):
    trained(tmp_path / "half", "ppo", status="stopped")
    sft = json.loads((trained(tmp_path / "other", "ppo") / "manifest.json").read_text()) | {"stage": "sft"}
    (tmp_path / "other/ppo/manifest.json").write_text(json.dumps(sft))
    (tmp_path / "empty").mkdir()
    good = trained(tmp_path / "good", "rloo")
    paths = [tmp_path / "half/ppo", tmp_path / "other/ppo", tmp_path / "empty", tmp_path / "nowhere", good, good]
    with pytest.raises(RecipeError) as caught:
        compared(*paths)
    found = str(caught.value)
    for part in (
        "stage ppo, stopped",
        "rlhf-recipes ppo imdb_tiny",
        "stage sft",
        "neither a manifest.json",
        "no such run",
    ):
        assert part in found
    assert f"the same run twice: {good.resolve()}" in found and len(found.splitlines()) == 5


def duel(tmp_path, ppo, rloo, metrics=None, **more):
    """Runs as a duel leaves them, with these held-out scores."""
    runs = {}
    for i, scores in enumerate(zip(ppo, rloo, strict=True)):
        for stage, score in zip(("ppo", "rloo"), scores, strict=True):
            runs[f"{stage}-seed_{42 + i}"] = trained(tmp_path / f"{stage}-seed_{42 + i}", stage, 42 + i, score)
    scored = zip(runs, [score for scores in zip(ppo, rloo, strict=True) for score in scores], strict=True)
    found = {name: {"score_mean": score, "kl": 5.0} | (metrics or {}) for name, score in scored}
    evaluated(tmp_path, runs, found, **more)
    return list(runs.values())


def test_a_duel_is_decided_on_held_out_prompts(tmp_path):
    found = compared(*duel(tmp_path, [0.50, 0.60, 0.70], [0.41, 0.50, 0.61]))
    assert found["verdict"]["winner"] == "ppo" and "held-out" in found["verdict"]["sentence"]
    first, *others = found["views"]
    assert (first["view"], first["paired"], first["seeds"]) == ("held_out", True, {"ppo": 3, "rloo": 3})
    assert first["difference"] == pytest.approx((0.09 + 0.10 + 0.09) / 3)
    assert [view["view"] for view in others] == ["episodes", "tokens", "seconds"]
    held_out = found["held_out"]
    assert held_out["prompts"] == 3 and held_out["metrics"]["score_mean"]["rloo"]["values"] == [0.41, 0.5, 0.61]
    assert held_out["metrics"]["score_mean"]["ppo"]["mean"] == pytest.approx(0.6)
    assert [line["prompt"] for line in found["samples"]][2] == "<script>alert(1)</script>"
    assert "samples" not in found["evaluation"] and set(found["evaluation"]["models"]) >= {"sft", "ppo-seed_42"}
    assert found["frontier"][0]["held_out"] == [5.0, 0.5] and found["single_seed"] is False
    json.dumps(found, allow_nan=False)


def test_one_seed_each_has_no_winner(tmp_path):
    runs = [trained(tmp_path, "ppo", score=0.9), trained(tmp_path, "rloo", score=0.1)]
    evaluated(
        tmp_path,
        dict(zip(("ppo", "rloo"), runs, strict=True)),
        {"ppo": {"score_mean": 0.9}, "rloo": {"score_mean": 0.1}},
    )
    found = compared(*runs)
    assert (
        found["single_seed"] and found["verdict"]["winner"] is None and "one seed each" in found["verdict"]["sentence"]
    )
    assert found["views"][0]["means"] == {"ppo": 0.9, "rloo": 0.1}


def test_an_eval_of_an_earlier_run_is_not_used(tmp_path):
    runs = duel(tmp_path, [0.5, 0.6], [0.4, 0.5])
    manifest = json.loads((runs[0] / "manifest.json").read_text())
    (runs[0] / "manifest.json").write_text(json.dumps(manifest | {"id": "anew"}))
    found = compared(*runs)
    assert found["held_out"] is None and found["views"][0]["view"] == "episodes"
    assert any("an earlier run" in note for note in found["notes"]) and any(
        "has none" in note for note in found["notes"]
    )


@pytest.mark.parametrize("file", ["ppo-seed_42/ppo/metrics.jsonl", "eval/eval.json", "judge/ppo-vs-rloo.json"])
def test_a_damaged_or_missing_file_is_an_error(tmp_path, file):
    paths = duel(tmp_path, [0.5, 0.6], [0.4, 0.5])
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text('{"torn')
    with pytest.raises(RecipeError, match="cannot be read"):
        compared(*paths)
    (tmp_path / file).unlink()
    if "judge" not in file:
        with pytest.raises(RecipeError, match="cannot be read"):
            compared(*paths)


@pytest.mark.parametrize(
    ("prompts", "settings", "usable"),
    [
        ({42: ["a"], 43: ["b"]}, {}, True),  # each seed on prompts of its own, the same for both algorithms
        ({42: ["a"], 43: ["a"]}, {}, True),
        ({42: ["a"], 43: ["b"], (42, "rloo"): ["c"]}, {}, False),
        ({42: ["a"], 43: ["b"]}, {"temperature": 0.5}, False),
    ],
)
def test_evals_of_single_runs_are_compared_if_they_asked_the_same(tmp_path, prompts, settings, usable):
    paths = []
    for seed in (42, 43):
        for stage in ("ppo", "rloo"):
            folder = tmp_path / f"{stage}-{seed}"
            run = trained(folder, stage, seed)
            file = evaluated(
                folder, {stage: run}, {stage: {"score_mean": 0.5}}, prompts=prompts.get((seed, stage), prompts[seed])
            )
            if settings and stage == "rloo":
                manifest = json.loads((file / "manifest.json").read_text())
                manifest["settings"]["eval"] |= settings
                (file / "manifest.json").write_text(json.dumps(manifest))
            paths.append(run)
    found = compared(*paths)
    assert (found["held_out"] is not None) is usable
    assert usable or any("No numbers on held-out prompts" in note for note in found["notes"])


def test_prompts_may_hold_line_separators(tmp_path):
    folder = evaluated(tmp_path, {}, {})
    line = json.dumps({"prompt": "a\u2028b\x85", "models": {}}, ensure_ascii=False)
    (folder / "completions.jsonl").write_text(line + "\n", encoding="utf-8")
    assert len(Measured(folder, "ppo", {}, {}).prompts_sha256) == 64


def test_views_use_the_largest_budget_that_all_runs_reached(tmp_path):
    ppo, rloo = trained(tmp_path / "a", "ppo"), trained(tmp_path / "b", "rloo")
    lines = [
        {"step": i, "episodes": 10 * i, "tokens": 1000 * i, "seconds": i, "score_mean": i / 100} for i in range(1, 101)
    ]
    write_jsonl(ppo / "metrics.jsonl", lines)
    write_jsonl(rloo / "metrics.jsonl", [line | {"tokens": 10 * line["tokens"]} for line in lines[:80]])
    views = {view["view"]: view for view in compared(ppo, rloo)["views"]}
    assert views["episodes"]["at"] == 800 and views["tokens"]["at"] == 100_000
    of_episodes = sum(range(73, 81)) / 8 / 100  # the last tenth of 800 episodes: those above 720
    assert views["episodes"]["means"] == {"ppo": pytest.approx(of_episodes), "rloo": pytest.approx(of_episodes)}
    assert views["tokens"]["means"]["ppo"] == pytest.approx(sum(range(91, 101)) / 10 / 100)
    assert views["tokens"]["means"]["rloo"] == pytest.approx(0.10)  # of its lines at 1, 2, ... 10 x 10,000: the last


def test_runs_on_different_machines_have_no_winner_by_seconds(tmp_path):
    runs = []
    for i, noise in enumerate((0.0, 0.01, 0.03)):
        runs.append(trained(tmp_path / f"{i}", "ppo", 42 + i, 0.9 + noise, setup={"num_processes": 2}))
        runs.append(trained(tmp_path / f"{i}", "rloo", 42 + i, 0.1))
    found = compared(*runs)
    views = {view["view"]: view for view in found["views"]}
    assert views["episodes"]["winner"] == found["verdict"]["winner"] == "ppo"
    assert views["seconds"]["winner"] is None and views["seconds"]["label"] == "not comparable"
    assert any("setup.num_processes" in note for note in found["notes"])


LINES = st.lists(st.tuples(st.floats(0.1, 5), st.floats(-5, 5)), min_size=1, max_size=30)


@settings(deadline=None)  # scipy loads in the first example
@given(LINES, LINES)
def test_bands_stay_within_the_runs_and_end_where_the_first_does(first, second):
    runs = []
    for seed, line in ((42, first), (43, second)):
        at, rows = 0.0, []
        for step, (gap, score) in enumerate(line):
            at += gap
            rows.append({"step": step, "episodes": at, "score_mean": score})
        runs.append(run_of(columns(rows), seed))
    bands = build_comparison(runs, "t", [])["bands"]
    if "episodes" not in bands:
        assert min(r.curves["episodes"][-1] for r in runs) < max(r.curves["episodes"][0] for r in runs)
        return
    band = bands["episodes"]["score_mean"]["x"]
    every = [score for _, score in first + second]
    assert band["x"][-1] == pytest.approx(min(run.curves["episodes"][-1] for run in runs), rel=1e-5)
    slack = 1e-4 + 1e-4 * max(map(abs, every))
    for low, mean, high in zip(band["low"], band["mean"], band["high"], strict=True):
        assert min(every) - slack <= low <= mean + slack and mean - slack <= high <= max(every) + slack


def run_of(curves, seed=None, label="x"):
    from pathlib import Path

    from rlhf_recipes.comparison.runs import TrainedRun

    run = TrainedRun(label, Path("x"), {}, curves)
    run.name = f"{label} {seed}"
    return run


def test_runs_that_share_one_budget_only_have_a_band_of_one_point(tmp_path):
    """The first run logged more often, and stopped where the second begins."""
    one = run_of({"episodes": [8, 16], "score_mean": [0.0, 1.0]}, label="a")
    other = run_of({"episodes": [16, 32], "score_mean": [3.0, 5.0]}, label="b")
    found = bands([one, other], ["a", "b"])["episodes"]["score_mean"]
    assert (found["a"]["x"], found["a"]["mean"], found["b"]["mean"]) == ([16], [1.0], [3.0])


def test_a_long_run_has_a_short_band_of_means(tmp_path):
    rows = [{"step": i, "episodes": i, "score_mean": float(i % 2)} for i in range(1, 4001)]
    band = build_comparison([run_of(columns(rows))], "t", [])["bands"]["episodes"]["score_mean"]["x"]
    assert len(band["x"]) == 400 and band["low"] is None and band["seeds"] == 1
    assert all(0.3 < value < 0.7 for value in band["mean"][1:-1])  # of about ten lines each, not single ones


def test_values_that_are_no_finite_numbers_become_none():
    rows = [
        {"step": 1, "a": math.nan, "b": True, "c": "x"},
        {"step": 2, "a": 1.5, "d": None, "score_mean": math.inf, "e": 10**400},
    ]
    assert columns(rows) == {
        **{axis: [None, None] for axis in ("episodes", "tokens", "seconds")},
        "step": [1, 2],
        "a": [None, 1.5],
    }
    assert value_at(run_of(columns(rows)), "step", 2, "score_mean") is None


RLOO_LOG = [
    {"step": 1, "reward": 0.1, "kl": 0.01, "num_tokens": 100.0, "completions/mean_length": 9.0}
    | {"completions/clipped_ratio": 0.25, "rewards/vader/mean": 0.1, "rewards/vader/std": 0.2, "entropy": 3.0},
    {"step": 2, "reward": 0.3, "kl": 0.02, "num_tokens": 200.0},
    {"step": 2, "eval_reward": 9.0},
    {"step": 2, "train_runtime": 5.0, "reward": 9.0},
]
PPO_LOG = [{"step": i, "episode": 64 * i, "objective/scores": 0.2 * i, "objective/kl": 1.5, "lr": 1e-5} for i in (1, 2)]


def plain(folder, log):
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log, "global_step": 2}))
    return folder


@pytest.mark.parametrize("ppo_failed", [[1], [0, 1, 2]])
def test_failed_runs_stay_out_of_every_mean_and_nobody_wins(ppo_failed, tmp_path):
    """Three seeds each, far apart: without the failed ones, RLOO would win."""
    paths = [
        trained(tmp_path / f"{stage}{seed}", stage, seed, score + 0.01 * seed,
                **({"status": "failed", "error": "Diverged: step 3"} if stage == "ppo" and seed in ppo_failed else {}))
        for seed in range(3) for stage, score in (("ppo", 0.1), ("rloo", 0.9))
    ]  # fmt: skip
    found, k = compared(*paths), len(ppo_failed)
    assert found["verdict"]["winner"] is None and found["verdict"]["label"] == f"{k} of 6 runs failed"
    assert [run["seed"] for run in found["runs"] if run["algorithm"] == "ppo"] == [
        s for s in range(3) if s not in ppo_failed
    ]
    assert found["notes"][:k] == found["failed"] and "ppo seed 1 failed: Diverged: step 3" in " ".join(found["notes"])
    for view in found["views"]:
        assert view["winner"] is None and view["label"] == f"{k} of 6 runs failed"
    write_comparison(tmp_path, found)
    assert f"{k} of 6 runs failed" in (tmp_path / "report.md").read_text()


def test_a_comparison_of_failed_runs_only_says_why_each_failed(tmp_path):
    failed = trained(tmp_path / "a", "ppo", status="failed", error="Diverged: step 3: the loss is nan")
    with pytest.raises(RecipeError, match="ppo seed 42 failed: Diverged: step 3: the loss is nan"):
        compared(failed)


def test_findings_of_a_run_are_shown_with_the_comparison(tmp_path):
    found = pair(tmp_path, findings=["the entropy is 0.001"])
    assert "rloo seed 42: the entropy is 0.001." in found["notes"]


def test_plain_trainers_runs_are_read_under_our_names(tmp_path):
    plain(tmp_path / "rloo/checkpoint-2", RLOO_LOG[:1])
    plain(tmp_path / "rloo/checkpoint-10", RLOO_LOG)
    (ppo, rloo), _ = read_runs([f"ppo={plain(tmp_path / 'ppo', PPO_LOG)}", f"rloo={tmp_path / 'rloo'}"])
    assert (
        ppo.curves["score_mean"] == [0.2, 0.4]
        and ppo.curves["episodes"] == [64, 128]
        and ppo.curves["kl"] == [1.5, 1.5]
    )
    wanted = {"step": [1, 2], "score_mean": [0.1, 0.3], "kl_per_token": [0.01, 0.02], "tokens": [100.0, 200.0]}
    wanted |= {
        "length_mean": [9.0, None],
        "eos_rate": [0.75, None],
        "score/vader": [0.1, None],
        "episodes": [None, None],
    }
    assert wanted.items() <= rloo.curves.items() and "kl" not in rloo.curves
    with pytest.raises(RecipeError, match="the same run twice"):
        read_runs([f"x={tmp_path / 'rloo'}", f"y={tmp_path / 'rloo/checkpoint-10'}"])
    (same,) = read_runs([f"x={tmp_path / 'rloo/checkpoint-10/trainer_state.json'}"])[0]
    assert same.curves == rloo.curves and same.seed is None


def test_plain_trainers_runs_give_numbers_but_no_winner(tmp_path, capsys):
    named = [
        f"ppo={plain(tmp_path / f'p{i}', [line | {'reward': 0.9 + i / 100} for line in RLOO_LOG])}" for i in range(3)
    ]
    named += [
        f"rloo={plain(tmp_path / f'r{i}', [line | {'reward': 0.1 + i / 99} for line in RLOO_LOG])}" for i in range(3)
    ]
    assert compare_runs(named, tmp_path / "out") is False
    found = json.loads((tmp_path / "out/comparison.json").read_text())
    assert [view["view"] for view in found["views"]] == ["step", "tokens"]
    assert found["views"][0]["winner"] == "ppo" and not found["views"][0]["paired"]
    assert found["verdict"]["winner"] is None and "do not store their settings" in found["verdict"]["sentence"]
    assert [run["name"] for run in found["runs"]][:2] == ["ppo #1", "ppo #2"] and set(found["bands"]) == {
        "step",
        "tokens",
    }
    assert "report: " in capsys.readouterr().out


def test_plain_runs_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="write ppo="):
        read_runs([str(plain(tmp_path / "a", RLOO_LOG))])
    with pytest.raises(RecipeError, match="its log has no reward"):
        read_runs([f"ppo={plain(tmp_path / 'b', [{'step': 1, 'loss': 2.0}])}"])
    for i, broken in enumerate(
        (b"", b"{", b"[]", b"null", b'{"log_history": null}', b'{"log_history": ["a", 1]}', b"\xff")
    ):
        folder = tmp_path / f"c{i}"
        folder.mkdir()
        (folder / "manifest.json").write_text('{"stage": "of something else"}')
        (folder / "trainer_state.json").write_bytes(broken)
        with pytest.raises(RecipeError, match="not the trainer_state.json of a Trainer"):
            read_runs([f"ppo={folder}"])


def test_a_comparison_is_written_as_a_whole(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    found = compared(*duel(tmp_path / "duel", [0.5, 0.6], [0.4, 0.55], metrics={"held_out_mean": 0.25}))
    write_comparison(out, found)
    assert json.loads((out / "comparison.json").read_text()) == found
    assert found["verdict"]["sentence"] in (out / "report.md").read_text()
    page = (out / "report.html").read_text()
    assert "<script>alert" not in page and list(out.glob("*.png"))


def test_a_comparison_contains_the_files_of_judge_and_audit(tmp_path):
    runs = duel(tmp_path, [0.5, 0.6], [0.4, 0.55])
    (tmp_path / "judge").mkdir()
    judged = {"eval": json.loads((tmp_path / "eval/manifest.json").read_text())["id"], "a": "ppo", "win_rate": 0.5}
    (tmp_path / "judge/ppo-vs-rloo.json").write_text(json.dumps(judged))
    (tmp_path / "judge/ppo-vs-sft.json").write_text(json.dumps(judged | {"eval": "an earlier one"}))
    (runs[0].parent / "audit").mkdir()
    audit = {"id": json.loads((runs[0] / "manifest.json").read_text())["id"], "findings": []}
    (runs[0].parent / "audit/ppo.json").write_text(json.dumps(audit))
    found = compared(*runs)
    assert found["judge"] == [judged] and found["audit"] == {"ppo seed 42": audit}


def test_versions_are_listed_and_identical_runs_have_no_difference(tmp_path):
    same = [trained(tmp_path / name, "ppo", seed) for name, seed in (("a", 42), ("b", 43))]
    assert find_differences(read_runs([str(path) for path in same])[0]) == []


def test_manifests_say_which_run_made_a_model_and_which_file_a_function(tmp_path):
    """Comparisons identify them by this."""
    folder = trained(tmp_path, "rloo")
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    (tmp_path / "own.py").write_text("def score(completions): return [0.0] * len(completions)")
    own = f"reward_funcs=[{{name: '{tmp_path}/own.py:score'}}]"
    found = sources(load_recipe("imdb_tiny", [own, f"rloo.policy={folder}"]), "rloo")
    assert found["rloo.policy"]["revision"] == "rloo-42-0.5"
    first = found["reward_funcs.0.name"]["sha256"]
    (tmp_path / "own.py").write_text("def score(completions): return [1.0] * len(completions)")
    assert (
        sources(load_recipe("imdb_tiny", [own, f"rloo.policy={folder}"]), "rloo")["reward_funcs.0.name"]["sha256"]
        != first
    )


METRICS_OF_ONE = {"ppo": {"score_mean": 0.9, "held_out_mean": 1.0}, "rloo": {"score_mean": None, "held_out_mean": 0.5}}


def test_a_model_without_a_held_out_score_is_noted(tmp_path):
    runs = [trained(tmp_path, "ppo"), trained(tmp_path, "rloo")]
    evaluated(
        tmp_path,
        dict(zip(("ppo", "rloo"), runs, strict=True)),
        METRICS_OF_ONE,
    )
    found = compared(*runs)
    assert found["views"][0]["view"] == "episodes" and any("rloo seed 42 has none" in note for note in found["notes"])


@pytest.mark.slow
def test_compare_as_a_user_runs_it(tmp_path):
    duel(tmp_path, [0.50, 0.60, 0.70], [0.41, 0.50, 0.61])
    runs = sorted(path.relative_to(tmp_path) for path in tmp_path.glob("*-seed_*/*") if path.is_dir())
    done = cli("compare", *map(str, runs), "--out", "both", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *_, verdict, report = done.stdout.splitlines()
    assert verdict.startswith("PPO better: On held-out prompts the mean score is 0.600 with PPO and 0.507 with RLOO")
    assert report == "report: both/report.html" and "held out score mean" in done.stdout
    other = trained(tmp_path / "x", "rloo", overrides=["rloo.trainer.beta=0.5"])
    refused = cli("compare", str(runs[0]), str(other), cwd=tmp_path)
    assert refused.returncode == 1 and "trainer.beta" in refused.stdout and "not comparable" in refused.stdout
    assert (tmp_path / "comparison/report.html").is_file()


def with_results(folder, results):
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"status": "finished", "results": results}))


def test_notes_tell_the_quality_of_the_start_models(tmp_path):
    sft, reward = tmp_path / "sft", tmp_path / "reward"
    assert notes_on(sft, reward) == []
    of_reward = {"eval_accuracy": 0.75, "eval_pairs": 40, "train_pairs": 400}
    with_results(sft, {"eval_perplexity": 20.0, "rougeL": 0.25})
    with_results(reward, of_reward | {"eval_ece": 0.0312})
    assert notes_on(sft, reward) == [
        "SFT model: perplexity 20.0 on held-out texts, ROUGE-L 0.250 on held-out prompts.",
        "Reward model: right on 75.0% of 40 held-out pairs, expected calibration error 0.031 (trained on 400).",
    ]
    with_results(tmp_path / "old/sft", {"eval_perplexity": 20.0})
    with_results(tmp_path / "old/reward", of_reward)
    assert notes_on(tmp_path / "old/sft", tmp_path / "old/reward") == [
        "SFT model: perplexity 20.0 on held-out texts.",
        "Reward model: right on 75.0% of 40 held-out pairs (trained on 400).",
    ]
