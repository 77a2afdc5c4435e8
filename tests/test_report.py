"""The page: complete, self-contained, and safe against what models write."""

import json

from rlhf_recipes.compare import notes_on


def finished(folder, results):
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"status": "finished", "results": results}))


def test_notes_say_what_was_measured(tmp_path):
    sft, reward = tmp_path / "sft", tmp_path / "reward"
    assert notes_on(sft, reward) == []
    of_reward = {"eval_accuracy": 0.75, "eval_pairs": 40, "train_pairs": 400}
    finished(sft, {"eval_perplexity": 20.0, "rougeL": 0.25})
    finished(reward, of_reward | {"eval_ece": 0.0312})
    assert notes_on(sft, reward) == [
        "SFT model: perplexity 20.0 on held-out texts, ROUGE-L 0.250 on held-out prompts.",
        "Reward model: right on 75.0% of 40 held-out pairs, expected calibration error 0.031 (trained on 400).",
    ]
    finished(tmp_path / "old/sft", {"eval_perplexity": 20.0})
    finished(tmp_path / "old/reward", of_reward)
    assert notes_on(tmp_path / "old/sft", tmp_path / "old/reward") == [
        "SFT model: perplexity 20.0 on held-out texts.",
        "Reward model: right on 75.0% of 40 held-out pairs (trained on 400).",
    ]
