"""The page: complete, self-contained, and safe against what models write."""

import json

import pytest

from rlhf_recipes.compare import write_report
from rlhf_recipes.config import RecipeError


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
        "sft": {"completion": evil, "score": 1.0},
        "ppo": {"completion": [{"role": "assistant", "content": evil}], "score": None},
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
