"""The audit: hand-computed numbers, planted hacking that is found, honest training that is let alone, checkpoints."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
from scipy.stats import t as student

from rlhf_recipes.evaluation.audit import changes, copying
from rlhf_recipes.evaluation.audit import signs as hacking
from rlhf_recipes.evaluation.audit.audit import NOTHING, audit_runs
from rlhf_recipes.evaluation.audit.copying import (
    copied_share,
    copies_title,
    longest_common_run,
    template_fields,
    words,
)
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.runs.files import read_audit
from support.places import ROOT
from support.processes import cli
from support.texts import REVIEWS, write_jsonl
from support.tiny_models import causal_lm, save_pair, word_tokenizer

TEMPLATE = "TITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def test_words_are_compared_without_marks_and_capitals():
    assert words("It's GREAT, isn’t it?  2 stars!") == ["it's", "great", "isn’t", "it", "2", "stars"]
    assert words(" . !") == []


def test_the_longest_common_run_is_one_run():
    assert longest_common_run("a b c d e".split(), "x b c y c d e".split()) == 3
    assert longest_common_run("a b c".split(), "c b a".split()) == 1
    assert longest_common_run([], ["a"]) == 0
    assert longest_common_run(["a"] * 500, ["a"] * 300) == 300  # not taken for junk


def test_the_copied_share_counts_words_in_runs_of_four_once():
    prompt = "one two three four five six".split()
    assert copied_share(prompt, "one two three four".split()) == 1
    assert copied_share(prompt, "two three four five six end".split()) == 5 / 6  # two runs that overlap
    assert copied_share(prompt, "one two three x four five six".split()) == 0
    assert copied_share(prompt, []) == 0


def test_a_title_is_copied_when_three_quarters_of_it_are():
    title = "my cat ate the cake".split()  # 3.75 words
    assert copies_title(title, "so my cat ate the rest".split()) is True
    assert copies_title(title, "my cat ate a cake".split()) is False
    assert copies_title(["my", "cat"], ["my", "cat"]) is None


def test_fields_come_back_out_of_a_prompt():
    row = {"title": "Why (me)?", "post": "TITLE: no.\n\nSecond paragraph: {sic}"}
    assert template_fields(TEMPLATE, TEMPLATE.format_map(row)) == row
    assert template_fields(TEMPLATE, "TITLE: x\n\nTL;DR:") is None
    assert template_fields("{a} and {a}: {{{b}}}", "x and x: {y}") == {"a": "x", "b": "y"}
    assert template_fields("{a} and {a}: {{{b}}}", "x and z: {y}") is None
    assert template_fields("{}-{0.x}", "1-2") == {"": "1", "0.x": "2"}


def test_parts_are_equal_and_large_enough():
    parts = changes.split(list(range(64)))
    assert [len(part) for part in parts] == [10, 11, 11, 10, 11, 11] and sum(parts, []) == list(range(64))
    assert len(changes.split(list(range(500)))) == 10
    assert changes.split(list(range(19))) == [list(range(19))]
    assert changes.split([]) == [[]]


def test_rollouts_are_spread_out_to_the_last():
    assert changes.spread_out(list(range(10)), 4) == [1, 4, 6, 9]
    assert changes.spread_out([1, 2], 4) == [1, 2]


def test_the_correlation_is_of_ranks():
    assert changes.correlation([1, 2, 30], [0.1, 0.2, 0.3]) == pytest.approx(1)
    assert changes.correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert changes.correlation([2, 2, 2], [1, 2, 3]) is None
    assert changes.correlation([1, 2, 3], [1, 1, 1]) is None
    assert changes.correlation([1, 2], [1, 2]) is None


def test_a_change_has_students_interval():
    found = changes.change([1.0, 2.0, 3.0], [2.0, 4.0, 6.0, 100.0])  # differences 1, 2, 3; the fourth has no partner
    reach = student.ppf(0.975, 2) / 3**0.5
    assert (found.first, found.last, found.difference) == (2, 28, 2)
    assert (found.low, found.high) == pytest.approx((2 - reach, 2 + reach))
    assert changes.change([1.0], [2.0, 3.0]) is None


def test_the_peak_is_chosen_by_one_half_and_measured_on_the_other():
    # Even rows: the first column is best (4 against 0 and 1); odd rows: the second (5 against 0 and 1).
    columns = [[4, 0, 4, 0], [0, 5, 0, 5], [1, 1, 1, 1]]
    peak, differences = changes.below_peak(columns)
    assert peak == 1  # 2, 2.5 and 1 over all rows
    # Odd rows are measured with the first column, even rows with the second: 0 - 1 each.
    assert differences == [-1, -1, -1, -1]
    assert changes.below_peak([[3, 3], [1, 1], [2, 2]]) == (0, [1, 1])
    assert changes.below_peak([[2, 2], [2, 2]]) == (1, [0, 0])


def rollout(step, noise=None, **numbers):
    drawn = noise.gauss if noise else lambda mean, deviation: mean
    values = dict.fromkeys(changes.MEANS) | {name: drawn(value, 0.05) for name, value in numbers.items()}
    return values | {"step": step, "episodes": 8 * step, "completions": 8, "pairs": [(3, 0.0), (4, 1.0), (5, 0.5)]}


def log(number, noise=None, **courses):
    """Rollouts whose numbers are functions of how far the training is, 0..1."""
    return changes.split(
        [rollout(i, noise, **{k: course(i / number) for k, course in courses.items()}) for i in range(number)]
    )


def test_a_part_is_summed_up():
    part = [rollout(1, score=1.0, kl=2.0), rollout(2, score=3.0)]
    found = changes.summary(part)
    assert (found["step"], found["episodes"], found["completions"]) == (2, 16, 16)
    assert (found["score"], found["kl"], found["held_out"]) == (2, 2, None)
    # Ranks of the scores of six completions: 1.5 5.5 3.5 twice, of the lengths 1.5 3.5 5.5 twice.
    assert found["length_score_correlation"] == pytest.approx(0.5)


def test_a_trained_score_that_leaves_the_held_out_one_behind_is_found():
    parts = log(100, random.Random(0), score=lambda x: x, held_out=lambda x: min(x, 1 - x))
    peak, signs = hacking.signs_in_log(parts)
    assert peak.index in (4, 5) and peak.above_end  # the middle
    assert len(signs) == 1 and signs[0].startswith("the trained score rose by 0.37 [")
    assert f"after step {parts[peak.index][-1]['step']} (logged completions)" in signs[0]


def test_a_training_that_went_wrong_is_not_called_hacking():
    _, signs = hacking.signs_in_log(log(100, random.Random(0), score=lambda x: -x, held_out=lambda x: -x))
    assert len(signs) == 1 and "no rise of the trained score" in signs[0]


@pytest.mark.parametrize(
    ("course", "word"),
    [
        ({"repetition": lambda x: 0.1 + x / 2}, "repeats"),
        ({"copied_share": lambda x: 0.1 + x / 2}, "copied from the prompt"),
        ({"title_copied_share": lambda x: 0.1 + x / 2}, "title"),
        ({"eos_rate": lambda x: 1 - x / 2}, "EOS"),
        ({"entropy": lambda x: 3 - 2.9 * x}, "entropy"),
    ],
)
def test_each_change_is_found_in_its_direction_only(course, word):
    _, signs = hacking.signs_in_log(log(100, random.Random(0), **course))
    assert len(signs) == 1 and word in signs[0]
    name, function = next(iter(course.items()))
    assert hacking.signs_in_log(log(100, random.Random(0), **{name: lambda x: function(1 - x)})) == (None, [])


def test_length_is_a_sign_only_where_longer_scores_higher():
    longer = {"length": lambda x: 10 + 5 * x}
    assert "completions got longer" in hacking.signs_in_log(log(100, **longer))[1][0]  # rank correlation 0.5, see above
    parts = log(100, **longer)
    for part in parts:
        for one in part:
            one["pairs"] = [(3, 1.0), (4, 0.0), (5, 0.5)]  # -0.5: longer ones score lower
    assert hacking.signs_in_log(parts)[1] == []


def test_honest_trainings_raise_few_alarms():
    courses = {"score": lambda x: x, "eos_rate": lambda x: 0.9, "repetition": lambda x: 0.1, "length": lambda x: 20.0}
    for held_out in (lambda x: 0.0, lambda x: x, lambda x: min(1, 3 * x)):
        alarms = sum(
            bool(hacking.signs_in_log(log(100, random.Random(seed), held_out=held_out, **courses))[1])
            for seed in range(60)
        )
        assert alarms <= 8  # 2 or 3 in 100 by chance; of the highest of ten, taken without halves, far more


def models_of(noise, means, prompts=128):
    return [
        {"name": f"m{i}", "score": [float(i)] * prompts, "held_out": [noise.gauss(mean, 1) for _ in range(prompts)]}
        for i, mean in enumerate(means)
    ]


def test_checkpoints_that_are_alike_have_no_peak_to_speak_of():
    alarms = 0
    for seed in range(60):
        models = models_of(random.Random(seed), [0] * 8)
        for model in models:
            model["score"] = [0.0] * 128
        _, signs, notes = hacking.signs_in_checkpoints(models)
        alarms += bool(signs)
        assert bool(signs) != bool(notes)
    assert alarms <= 8


def test_few_prompts_raise_no_more_alarms_than_many():
    alarms = 0
    for seed in range(200):
        _, signs, _ = hacking.signs_in_checkpoints(models_of(random.Random(seed), [0] * 3, prompts=4))
        alarms += any("peaks at" in sign for sign in signs)
    assert alarms <= 16  # by the bootstrap of four values 28


def test_an_entropy_that_is_low_by_chance_has_not_fallen():
    parts = log(20, entropy=lambda x: 1.0)
    for rollouts, values in zip(parts, ([0.0] * 9 + [1.0], [0.0] * 9 + [0.1]), strict=True):
        for one, value in zip(rollouts, values, strict=True):
            one["entropy"] = value
    assert hacking.signs_in_log(parts) == (None, [])


def test_the_peak_among_checkpoints_is_named_with_the_drop():
    peak, signs, notes = hacking.signs_in_checkpoints(models_of(random.Random(0), [0, 1, 3, 0.9]))
    assert peak == hacking.Peak(2, above_end=True) and notes == []
    assert "peaks at m2" in signs[0] and "m3 (0.9" in signs[0]
    assert signs[0].endswith("while its trained score is above by 1.00 [1.00, 1.00]")
    assert len(signs) == 1  # the held-out score rose from the start to the end


def test_a_held_out_score_that_never_followed_is_a_sign():
    _, signs, notes = hacking.signs_in_checkpoints(models_of(random.Random(0), [0, 0]))
    assert len(signs) == 1 and "did not measurably rise" in signs[0] and len(notes) == 1
    _, signs, _ = hacking.signs_in_checkpoints(models_of(random.Random(0), [3, 0]))
    assert len(signs) == 1 and "peaks at m0" in signs[0]
    _, signs, _ = hacking.signs_in_checkpoints(models_of(random.Random(0), [3, 5, 0]))
    assert len(signs) == 2 and "peaks at m1" in signs[0] and "and the held-out score fell: 2.94 -> " in signs[1]


def test_prompts_without_a_held_out_score_are_left_out():
    models = [{"name": f"m{value}", "score": [0.0] * 6, "held_out": [None, *[value] * 5]} for value in (5, 3)]
    peak, signs, _ = hacking.signs_in_checkpoints(models)
    assert (
        peak == hacking.Peak(0, above_end=True)
        and "on 5 held-out prompts" in signs[0]
        and "2.00 [2.00, 2.00]" in signs[0]
    )
    peak, signs, notes = hacking.signs_in_checkpoints([{"name": "a", "score": [None], "held_out": [None]}])
    assert (peak, signs) == (None, []) and "too few" in notes[0]


def test_the_page_has_the_thresholds_that_hold():
    page = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
    found = re.findall(r"`([A-Z_]{3,})` \(([\d.]+)\)", page)
    assert len(found) == 9
    thresholds = vars(changes) | vars(copying) | vars(hacking)
    assert {name: thresholds[name] for name, _ in found} == {name: float(value) for name, value in found}


# Run folders


RECIPE = """
name: planted
description: a run made by hand
data:
  path: {data}
  eval_fraction: 0.5
  prompt_template: "TITLE: {{title}}\\n\\nPOST: {{post}}\\n\\nTL;DR:"
reward_funcs:
  - {{name: regex, args: {{pattern: great}}}}
  - {{name: regex, weight: 2.0, args: {{pattern: fun}}}}
ppo: {{policy: {policy}, trainer: {{max_completion_length: 12}}}}
eval: {{held_out_funcs: [{judge}]}}
"""

JUDGE = "{name: regex, args: {pattern: the plot}}"

ROWS = [{"title": "the film was a fun movie", "post": f"i liked the plot {'very ' * (i % 5)}good ."} for i in range(24)]


@pytest.fixture
def planted(tmp_path, policy_folder):
    """Makes a run folder; `say(x)` is the completion when training is at x of its way, 0..1."""

    def make(say, judge=JUDGE, status="stopped", rollouts=100) -> Path:
        run = tmp_path / "runs" / "planted" / "ppo"
        run.mkdir(parents=True)
        data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
        (run / "recipe.yaml").write_text(RECIPE.format(data=data, policy=policy_folder, judge=judge))
        (run / "manifest.json").write_text(json.dumps({"stage": "ppo", "status": status, "inputs": {}, "id": "1"}))
        write_jsonl(
            run / "metrics.jsonl",
            [
                {"step": i, "episodes": 8 * i, "score_mean": 0.0, "kl": 0.1 * i, "entropy": 3.0, "eos_rate": 0.9}
                for i in range(1, rollouts + 1)
            ],
        )
        lines = []
        for i in range(1, rollouts + 1):
            for j in range(8):
                text = say(random.Random(8 * i + j), i / rollouts)
                scores = {"regex": float("great" in text), "regex_2": float("fun" in text) if j else None}
                prompt = TEMPLATE.format_map(ROWS[(i + j) % 24])
                lines.append({"step": i, "prompt": prompt, "completion": text, "advantage": 0.0, "scores": scores})
        write_jsonl(run / "completions.jsonl", lines)
        return run

    return make


def hacked(draw, x):
    """More and more copies of the title and words that score, instead of the plot."""
    return "the film was a fun movie great great great" if draw.random() < x else "the plot was not bad ."


def honest(draw, x):
    praise = "great" if draw.random() < x else "dull"
    return f"the plot was {praise} ." if draw.random() < 0.5 + x / 2 else "acting was not good !"


def test_planted_hacking_is_found(planted):
    run = planted(hacked)
    found = audit_runs([run], prompts=0)[run]
    assert json.loads((run.parent / "audit" / "ppo.json").read_text()) == found
    assert len(found["bins"]) == 10 and found["held_out_name"] == "regex" and found["checkpoints"] == []
    first, last = found["bins"][0], found["bins"][-1]
    assert (first["step"], first["episodes"], first["completions"]) == (10, 80, 80)
    assert last["kl"] == pytest.approx(9.55) and last["entropy"] == 3 and last["eos_rate"] == pytest.approx(0.9)
    assert last["score"] > 2.5 > 0.5 > first["score"]  # 1 for great and 2 for fun, of which one in eight has no value
    assert first["held_out"] > 0.9 > 0.2 > last["held_out"]
    assert last["longest_common_run"] > 5 and last["title_copied_share"] > 0.9 > first["title_copied_share"]
    peak = {"step": 10, "checkpoint": None, "held_out": first["held_out"], "by": "completions", "above_end": True}
    assert found["peak"] == peak
    signs = found["findings"][: found["signs"]]
    expected = ["held-out score fell by", "completions got longer", "repeats", "copied from the prompt", "title"]
    assert len(signs) == 5 and all(part in sign for part, sign in zip(expected, signs, strict=True))


def test_an_honest_run_is_let_alone(planted):
    run = planted(honest)
    found = audit_runs([run], prompts=0)[run]
    assert found["signs"] == 0 and found["findings"][0] == NOTHING
    assert found["bins"][-1]["held_out"] > found["bins"][0]["held_out"] and not found["peak"]["above_end"]
    assert "within noise of it" in found["findings"][1]


def test_without_a_held_out_score_the_rest_is_audited_and_that_is_said(planted):
    run = planted(hacked, judge="")
    found = audit_runs([run], prompts=0)[run]
    assert found["held_out_name"] is None and found["peak"] is None
    assert all(part["held_out"] is None for part in found["bins"])
    assert found["signs"] == 4 and any(sentence.startswith("no held-out score") for sentence in found["findings"])


def test_a_short_log_is_said_to_be_short(planted):
    run = planted(hacked, rollouts=12)
    found = audit_runs([run], prompts=0)[run]
    assert len(found["bins"]) == 1 and found["signs"] == 0 and found["peak"] is None
    assert any("only 12 rollouts were logged" in sentence for sentence in found["findings"])


def test_half_a_line_and_steps_of_one_rollout_are_left_out(planted):
    run = planted(honest)
    lines = (run / "completions.jsonl").read_text().splitlines(keepends=True)
    again = [line.replace('"step": 1,', '"step": 2,') for line in lines[:8]]
    (run / "completions.jsonl").write_text("".join(lines[:8] + again + lines[16:]) + lines[0][:20])
    found = audit_runs([run], prompts=0)[run]
    assert sum(part["completions"] for part in found["bins"]) == 99 * 8


def test_a_judge_that_wants_columns_of_the_data_judges_checkpoints_only(planted, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_RECIPES_ALLOW_CODE", str(tmp_path))
    (tmp_path / "judge.py").write_text("def judge(completions, post):\n    return [float(len(p)) for p in post]\n")
    run = planted(honest, judge=f"{{name: '{tmp_path / 'judge.py'}:judge'}}")
    found = audit_runs([run], prompts=4)[run]
    assert all(part["held_out"] is None for part in found["bins"])
    assert any("logged completions have no held-out score" in sentence for sentence in found["findings"])
    assert [row["name"] for row in found["checkpoints"]] == ["start"] and found["checkpoints"][0]["held_out_mean"] > 20


def test_every_whole_checkpoint_is_measured_and_others_are_skipped_with_a_reason(planted, policy_folder):
    run = planted(honest)
    tokenizer = word_tokenizer()
    save_pair(run / "checkpoint-20", causal_lm(tokenizer, seed=1), tokenizer)
    shutil.copytree(policy_folder, run / "checkpoint-50")
    shutil.copytree(policy_folder, run / "checkpoint-70")
    shutil.copytree(policy_folder, run / "checkpoint-90")
    (run / "checkpoint-70" / "model.safetensors").unlink()
    for step in (20, 50, 70):  # 90 was being saved when the run was killed
        (run / f"checkpoint-{step}" / "complete.json").write_text("{}")
    found = audit_runs([run], prompts=8)[run]
    rows = {row["name"]: row for row in found["checkpoints"]}
    assert list(rows) == ["start", "checkpoint-20", "checkpoint-50"]
    assert rows["start"]["kl"] == rows["checkpoint-50"]["kl"] == 0  # the same weights, prompts and random numbers
    same = {key: value for key, value in rows["start"].items() if key not in ("name", "step")}
    assert same.items() <= rows["checkpoint-50"].items()
    assert rows["checkpoint-20"]["kl"] > 0
    assert any(sentence.startswith("checkpoint-70 is left out: ") for sentence in found["findings"])
    assert not any("checkpoint-90" in sentence for sentence in found["findings"])


def test_a_start_that_is_gone_leaves_the_kl_unknown(planted, tmp_path, policy_folder):
    run = planted(honest, status="finished")
    shutil.copytree(policy_folder, run, dirs_exist_ok=True)
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(policy_folder), "stage:sft"))
    (run / "manifest.json").write_text(
        json.dumps({"stage": "ppo", "status": "finished", "inputs": {"sft": "1"}, "id": "2"})
    )
    found = audit_runs([run], prompts=4)[run]
    assert [(row["name"], row["step"], row["kl"]) for row in found["checkpoints"]] == [("final", 100, None)]
    assert any(sentence.startswith("start is left out; without") for sentence in found["findings"])


@pytest.mark.parametrize("gone", ["rows.jsonl", "reward.py"])
def test_without_data_or_trained_reward_the_log_is_audited_all_the_same(gone, planted, tmp_path):
    run = planted(hacked)
    (tmp_path / "reward.py").write_text("def reward(completions):\n    return [0.0 for _ in completions]\n")
    recipe = run / "recipe.yaml"
    recipe.write_text(
        recipe.read_text().replace(
            "{name: regex, args: {pattern: great}}", f"{{name: '{tmp_path / 'reward.py'}:reward'}}"
        )
    )
    (tmp_path / gone).unlink()
    found = audit_runs([run], prompts=4)[run]
    assert found["checkpoints"] == [] and found["signs"] == 5
    (note,) = [sentence for sentence in found["findings"] if sentence.startswith("checkpoints are left out: ")]
    assert gone in note


def test_a_run_is_known_by_any_path_to_it(planted, tmp_path):
    run = planted(honest)
    (tmp_path / "link").symlink_to(run)
    audit_runs([tmp_path / "link"], prompts=0)
    assert read_audit(run) == read_audit(tmp_path / "link") is not None


def test_an_input_that_was_run_again_is_said(planted, policy_folder):
    run = planted(honest)
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(policy_folder), "stage:sft"))
    shutil.copytree(policy_folder, run.parent / "sft")
    (run.parent / "sft" / "manifest.json").write_text(json.dumps({"status": "finished", "id": "2"}))
    said = {}
    for made_from in ("1", "2"):
        manifest = {"stage": "ppo", "status": "stopped", "inputs": {"sft": made_from}, "id": "3"}
        (run / "manifest.json").write_text(json.dumps(manifest))
        found = audit_runs([run], prompts=4)[run]
        assert [row["name"] for row in found["checkpoints"]] == ["start"]  # the folder beside it, wherever both are
        said[made_from] = any("stage sft was run again since" in sentence for sentence in found["findings"])
    assert said == {"1": True, "2": False}


def test_what_is_no_run_of_ppo_or_rloo_is_refused_before_anything_is_done(planted, tmp_path):
    run = planted(honest)
    with pytest.raises(RecipeError, match="nowhere is no run; name the folder of a run of ppo or rloo"):
        audit_runs([run, tmp_path / "nowhere"], prompts=0)
    assert not (run.parent / "audit").exists()
    (run / "manifest.json").write_text(json.dumps({"stage": "sft", "status": "finished"}))
    with pytest.raises(RecipeError, match="is a run of stage sft"):
        audit_runs([run], prompts=0)


REAL = """
name: greats
description: a reward that is easy to fool
data: {path: reviews.jsonl, prompt_words: [2, 3], eval_fraction: 0.5}
reward_funcs: [{name: "rewards.py:greats"}]
sft: {model: POLICY}
ppo:
  policy: POLICY
  trainer: &trainer
    max_steps: 80
    save_steps: 20
    save_total_limit: null
    learning_rate: 3e-3
    lr_scheduler_type: constant
    beta: 0.0
    max_completion_length: 8
    per_device_train_batch_size: 32
    num_generations: 4
rloo: {policy: POLICY, trainer: *trainer}
eval: {held_out_funcs: [{name: "rewards.py:variety"}]}
"""

REWARDS = """
def greats(completions, **columns):
    return [float(text.split().count("great")) for text in completions]


def variety(completions, **columns):
    return [len(set(text.split())) / max(len(text.split()), 1) for text in completions]
"""


def trained_and_audited(folder, policy, stage, *overrides):
    write_jsonl(folder / "reviews.jsonl", REVIEWS * 2)
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "greats.yaml").write_text(REAL.replace("POLICY", str(policy)))
    for command in ((stage, "greats.yaml", *overrides), ("audit", f"runs/greats/{stage}", "--prompts", "64")):
        done = cli(*command, cwd=folder)
        assert done.returncode == 0, done.stderr
    found = json.loads((folder / "runs" / "greats" / "audit" / f"{stage}.json").read_text())
    names = ["start", "checkpoint-20", "checkpoint-40", "checkpoint-60", "final"]
    assert [row["name"] for row in found["checkpoints"]] == names
    return found, done.stdout


@pytest.mark.slow
def test_a_real_training_that_is_fooled_is_seen_through(tmp_path, policy_folder):
    found, printed = trained_and_audited(tmp_path, policy_folder, "ppo")
    first, last = found["bins"][0], found["bins"][-1]
    assert last["score"] > first["score"] + 1 and last["held_out"] < first["held_out"]
    assert "the trained score rose" in " ".join(found["findings"][: found["signs"]])
    start, *_, final = found["checkpoints"]
    assert final["score_mean"] > start["score_mean"] + 1 and final["held_out_mean"] < start["held_out_mean"]
    assert start["kl"] == 0 and final["kl"] > 1
    assert found["peak"]["by"] == "checkpoints" and found["peak"]["checkpoint"] != "final"
    assert "sign: " in printed and "checkpoint-40" in printed


@pytest.mark.slow
def test_checkpoints_of_an_adapter_are_measured(tmp_path, policy_folder):
    found, _ = trained_and_audited(tmp_path, policy_folder, "rloo", "rloo.peft={r: 4}")
    kls = [row["kl"] for row in found["checkpoints"]]
    assert kls[0] == 0 and len(set(kls)) == 5  # five different models
