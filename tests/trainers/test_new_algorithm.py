"""A new algorithm is a trainer, a door, and the class of its section in the schema: here REINFORCE.

The test adds these three to a copy of the package, and runs the commands of the copy.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import rlhf_recipes
from rlhf_recipes.system.files import read_json, read_lines
from support.texts import REVIEWS, write_jsonl
from support.tiny_models import causal_lm, save_pair, word_tokenizer

FILES = Path(__file__).parents[1] / "data/new_algorithm"

SECTION = '''
class Reinforce(OnPolicy):
    """REINFORCE with the mean of the batch as baseline."""

    config_class = ("rlhf_recipes/trainers/reinforce.py", "ReinforceConfig")
    trainer: dict[str, Any] = {}


class Eval(Section):
'''


def replace(file, texts):
    text = file.read_text()
    for old, new in texts.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    file.write_text(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the extended package, a recipe, and the files that it names."""
    folder = tmp_path_factory.mktemp("reinforce")
    package = folder / "rlhf_recipes"
    shutil.copytree(Path(rlhf_recipes.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(FILES / "trainer.py", package / "trainers/reinforce.py")
    shutil.copy(FILES / "door.py", package / "reinforce.py")
    replace(package / "recipe/stages.py", {"\nclass Eval(Section):\n": SECTION})
    replace(
        package / "recipe/schema.py",
        {
            "import Eval, Judge, OnPolicy, Ppo, Reward,": "import Eval, Judge, OnPolicy, Ppo, Reinforce, Reward,",
            "    rloo: Rloo | None = None\n": "    rloo: Rloo | None = None\n    reinforce: Reinforce | None = None\n",
        },
    )

    write_jsonl(folder / "reviews.jsonl", REVIEWS)
    save_pair(folder / "model", causal_lm(word_tokenizer()), word_tokenizer())
    trainer = {
        "per_device_train_batch_size": 8,
        "num_generations": 2,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "beta": 0.1,
    }
    recipe = {
        "name": "toy",
        "description": "toy",
        "data": {"path": "reviews.jsonl", "prompt_tokens": [2, 4], "eval_fraction": 0.3},
        "reward_funcs": [{"name": "length"}],
        "episodes": 16,
        "reinforce": {"policy": "model", "trainer": trainer},
        "eval": {"num_prompts": 4, "num_samples": 2},
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def run_module(folder, *arguments):
    """`python -m ...` with the extended package."""
    path = os.pathsep.join([str(folder), str(Path(__file__).parents[1])])
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_its_stage_runs_by_its_command_and_is_measured_and_compared(folder):
    done = run_module(folder, "rlhf_recipes.cli", "reinforce", "toy.yaml")
    assert done.returncode == 0, done.stderr
    assert "16 episodes" in done.stdout
    run = folder / "runs/toy/reinforce"
    assert read_json(run / "manifest.json")["status"] == "finished"
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2] and lines[0]["kl"] == 0.0 and lines[1]["kl"] != 0.0
    done = run_module(folder, "support.all_stages", "eval,compare", "toy.yaml")
    assert done.returncode == 0, done.stderr
    assert list(read_json(folder / "runs/toy/eval/eval.json")["models"]) == ["sft", "reinforce"]
    assert "REINFORCE" in (folder / "runs/toy/compare/report.html").read_text()


def test_its_keys_are_checked_and_its_command_is_listed(folder):
    refused = run_module(folder, "rlhf_recipes.cli", "reinforce", "toy.yaml", "reinforce.trainer.baseline_wait=0.5")
    assert refused.returncode == 2 and "nearest: baseline_weight" in refused.stderr
    assert "train the policy with REINFORCE" in run_module(folder, "rlhf_recipes.cli", "--help").stdout
