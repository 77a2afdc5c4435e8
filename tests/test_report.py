"""The page: complete, self-contained, and safe against what models write."""

import json

import pytest

from rlhf_recipes.compare import _notes, write_report
from rlhf_recipes.config import RecipeError
from rlhf_recipes.recipe import load_recipe


def fake_run(folder, stage="ppo", status="finished"):
    folder.mkdir(parents=True)
    manifest = {
        "stage": stage,
        "status": status,
        "wall_seconds": 3.0,
        "peak_memory_gib": 0.5,
        "results": {"episodes": 64, "score_first": 0.0, "score_last": 1.0},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    lines = [{"step": i, "episodes": 32 * i, "score_mean": 0.1 * i, "kl": 0.2, "entropy": None} for i in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_completions_are_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    sample = {
        "prompt": evil,
        "models": {
            "sft": {"completion": evil, "score": 1.0},
            "ppo": {"completion": [{"role": "assistant", "content": evil}], "score": None},
        },
    }
    measured = {
        "models": {"sft": {"score_mean": 0.5, "kl": 0.0}, "ppo": {"score_mean": 1.5, "kl": 2.0}},
        "samples": [sample],
        "num_prompts": 1,
        "seed": 0,
    }
    page = write_report(tmp_path, "t", [fake_run(tmp_path / "a" / "ppo")], measured, ["a <note>"]).read_text()
    assert "<script" not in page and page.count("&lt;script&gt;alert") == 4 and "&lt;note&gt;" in page
    assert "1.50" in page and (tmp_path / "curves.png").stat().st_size > 10_000


def test_runs_of_the_same_stage_are_told_apart_and_others_refused(tmp_path):
    paths = [fake_run(tmp_path / name / "ppo") for name in ("a", "b")]
    page = write_report(tmp_path, "t", paths, None, []).read_text()
    assert "a/ppo" in page and "b/ppo" in page
    for wrong in (
        fake_run(tmp_path / "sft", stage="sft"),
        fake_run(tmp_path / "half", status="running"),
        tmp_path / "nowhere",
    ):
        with pytest.raises(RecipeError, match="not a finished run"):
            write_report(tmp_path, "t", [wrong], None, [])
    with pytest.raises(RecipeError, match="the same run twice"):
        write_report(tmp_path, "t", [paths[0], paths[0]], None, [])


def test_lengths_are_drawn_where_they_were_measured(tmp_path):
    run = fake_run(tmp_path / "ppo")
    metrics = {"score_mean": 0.5, "rouge1": 0.31234, "rouge2": 0.1, "rougeL": 0.25}
    measured = {"models": {"sft": metrics, "ppo": metrics}, "samples": [], "num_prompts": 4, "seed": 0}
    page = write_report(tmp_path, "t", [run], measured, []).read_text()
    assert page.count("<img") == 1 and "0.312" in page and "ROUGE-L" in page  # evaluated before there were histograms
    measured["length_histograms"] = {"edges": [0, 2, 4], "counts": {"sft": [1, 3], "ppo": [4, 0]}}
    page = write_report(tmp_path, "t", [run], measured, []).read_text()
    assert page.count("<img") == 2 and "one histogram for each of sft, ppo" in page
    assert (tmp_path / "lengths.png").stat().st_size > 5_000


def test_a_histogram_without_completions_is_drawn(tmp_path):
    measured = {"models": {}, "samples": [], "num_prompts": 0, "seed": 0}
    measured["length_histograms"] = {"edges": [0, 2, 4], "counts": {"sft": [0, 0]}}
    write_report(tmp_path, "t", [fake_run(tmp_path / "ppo")], measured, [])


def finished(folder, results):
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"status": "finished", "results": results}))


def test_notes_say_what_was_measured(tmp_path):
    recipe = load_recipe("imdb_tiny", [f"runs_dir={tmp_path}"])
    assert _notes(recipe) == []
    of_reward = {"eval_accuracy": 0.75, "eval_pairs": 40, "train_pairs": 400}
    finished(tmp_path / "imdb_tiny/sft", {"eval_perplexity": 20.0, "rougeL": 0.25})
    finished(tmp_path / "imdb_tiny/reward", of_reward | {"eval_ece": 0.0312})
    assert _notes(recipe) == [
        "SFT model: perplexity 20.0 on held-out texts, ROUGE-L 0.250 on held-out prompts.",
        "Reward model: right on 75.0% of 40 held-out pairs, expected calibration error 0.031 (trained on 400).",
    ]
    finished(tmp_path / "old/imdb_tiny/sft", {"eval_perplexity": 20.0})
    finished(tmp_path / "old/imdb_tiny/reward", of_reward)
    assert _notes(load_recipe("imdb_tiny", [f"runs_dir={tmp_path / 'old'}"])) == [
        "SFT model: perplexity 20.0 on held-out texts.",
        "Reward model: right on 75.0% of 40 held-out pairs (trained on 400).",
    ]
