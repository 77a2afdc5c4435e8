"""Trainings that are watched: bounds at which they end early, and the best checkpoint as the final model."""

import pytest
import torch
from safetensors.torch import load_file

from rlhf_recipes.recipe.checks import check_recipe
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.runs.files import VALUE_MODEL, read_manifest, read_metrics

HELD_OUT = {"num_prompts": 4, "held_out_funcs": [{"name": "repetition"}]}
OFTEN = {"max_steps": 6, "save_steps": 1, "save_total_limit": 2, "learning_rate": 3e-2}


@pytest.mark.parametrize("stage", ["ppo", "rloo"])
def test_the_best_checkpoint_is_the_final_model(stage, models, run):
    section = {"policy": str(models["gpt2"]), "keep_best": "held_out_mean", "trainer": OFTEN}
    folder = run(stage, {stage: section}, eval=HELD_OUT)
    means = {line["step"]: line["eval_held_out_mean"] for line in read_metrics(folder) if "eval_held_out_mean" in line}
    assert len(means) == 6 and len(set(means.values())) > 1
    best = max(means, key=lambda step: (means[step], -step))
    saved = folder / f"checkpoint-{best}"
    files = ["model.safetensors"] + ([f"{VALUE_MODEL}/value_head.safetensors"] if stage == "ppo" else [])
    for name in files:
        final, kept = load_file(folder / name), load_file(saved / name)
        assert all(torch.equal(final[key], kept[key]) for key in kept)
    assert f"the model is that of checkpoint-{best}: the best held_out_mean" in read_manifest(folder)["findings"]


def test_a_training_ends_early_with_its_model(models, run):
    section = {"policy": str(models["gpt2"]), "stop_when": {"kl_above": 1e-4}, "trainer": OFTEN}
    folder = run("rloo", {"rloo": section})
    last = read_metrics(folder)[-1]
    assert last["step"] == 2 and last["kl"] > 1e-4 and (folder / "model.safetensors").is_file()
    (finding,) = (text for text in read_manifest(folder)["findings"] if "stopped early" in text)
    assert finding.startswith("stopped early: at step 2 the KL to the reference is")


def test_watching_does_not_change_the_training(models, run):
    lines = []
    for name, more in (("plain", {}), ("watched", {"keep_best": "score_mean"})):
        folder = run("ppo", {"ppo": {"policy": str(models["gpt2"]), "trainer": OFTEN} | more}, name=name)
        lines.append([line["score_mean"] for line in read_metrics(folder) if "score_mean" in line])
    assert lines[0] == lines[1] and len(lines[0]) == 6


def test_a_held_out_score_must_be_there_to_be_watched():
    values = {"name": "x", "description": "x", "data": {"path": "x.jsonl"}, "reward_funcs": [{"name": "length"}]}
    for section in ({"keep_best": "held_out_mean"}, {"stop_when": {"held_out_falls": 2}}):
        with pytest.raises(RecipeError, match=r"ppo\.(keep_best|stop_when.held_out_falls): .* set eval.held_out_funcs"):
            check_recipe(values | {"ppo": section}, "x.yaml")
