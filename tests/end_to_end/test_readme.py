"""Every command of the README, run as it stands there, with only sizes made smaller."""

import json
import re
import shlex
import shutil

import pytest

from rlhf_recipes.pages.metrics import EVAL, TRAINING, markdown
from rlhf_recipes.recipe.load import recipe_files
from support.finished_runs import FEW
from support.places import ROOT
from support.processes import cli, run_python
from support.texts import REVIEWS, write_jsonl

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip() if " # " in line else line.strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
]

ELSEWHERE = {
    "make quickstart": "test_makefile_targets: it is `run imdb_tiny`",
    "make real": "test_recipes runs imdb_smol with stand-ins, test_real_model trains the model itself",
    "make test": "runs this test",
    "source .venv/bin/activate": "the tests run in that environment",
    "accelerate launch -m rlhf_recipes.ppo --recipe imdb_positive": "test_pipeline, with local stand-ins",
    "accelerate launch -m rlhf_recipes.rloo --recipe imdb_positive": "test_pipeline, with local stand-ins",
    "rlhf-recipes run imdb_tiny": "the fixture `few_steps`",
    "rlhf-recipes duel imdb_tiny --seeds 3": "test_duel, with two seeds",
    "python benchmarks/ppo_vs_trl.py": "test_benchmarks runs a small one",
    "tensorboard --logdir runs": "a server; test_pipeline reads its files",
    **{
        command: "test_sweep runs one over keys that change together"
        for command in COMMANDS
        if "baseline=none," in command or "ppo,rloo" in command
    },
}
"""Commands that this file does not run, and where they are tested."""

SMALLER = {
    "run": FEW,
    "audit": ["--prompts=0"],
    "sweep": [
        *("--seeds=1", "--no-eval"),
        *("data.max_rows=400", "episodes=32"),
        *("rloo.policy=package:rlhf_recipes/base", "rloo.trainer.per_device_train_batch_size=32"),
    ],
    "ppo": ["data.max_rows=1500", "episodes=64", "ppo.trainer.per_device_train_batch_size=32"],
    "rloo": ["data.max_rows=1500", "episodes=64", "rloo.trainer.per_device_train_batch_size=32"],
}
"""Subcommand -> arguments that make it quick."""

READS_RUNS = ("score", "compare", "judge", "audit")
"""Subcommands that the README calls on the runs which `run imdb_tiny` has left."""


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ELSEWHERE])
def test_a_command_works(command, tmp_path, few_steps):
    if command.split()[1] in READS_RUNS or "--overwrite" in command:
        shutil.copytree(few_steps / "runs", tmp_path / "runs")
    (tmp_path / "my_rewards.py").write_text(
        re.search(r"```python\n# my_rewards.py\n(.*?)```", README, flags=re.DOTALL)[1]
    )
    reviews = [
        {"review": row["text"].replace("the film", what), "stars": row["label"]}
        for what in ("the film", "a movie", "this one", "the first half")
        for row in REVIEWS
    ]
    write_jsonl(tmp_path / "reviews.jsonl", reviews)
    shutil.copytree(ROOT / "accelerate_configs", tmp_path / "accelerate_configs")
    words = shlex.split(command)
    environment = dict(word.split("=") for word in words if re.fullmatch(r"[A-Z_]+=\w+", word))
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\w+", word)]
    if words[:2] == ["accelerate", "launch"]:
        launch = ["-m", "accelerate.commands.launch", *words[2:], *SMALLER["ppo"]]
        done = run_python(*launch, cwd=tmp_path, **environment)
    else:
        assert words[0] == "rlhf-recipes", "no test knows this command"
        done = cli(*words[1:], *SMALLER.get(words[1], []), cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    if "--overwrite" in command:
        assert done.stdout.count("reused") == 2, done.stdout  # sft and reward
    if "name=sweet" in command:
        measured = json.loads((tmp_path / "runs/sweet/eval/eval.json").read_text())
        assert "score/short_and_sweet" in measured["models"]["ppo"]


def test_commands_that_are_tested_elsewhere_are_still_in_the_readme():
    assert set(ELSEWHERE) <= set(COMMANDS) and len(COMMANDS) - len(ELSEWHERE) >= 20


def test_makefile_targets():
    makefile = (ROOT / "Makefile").read_text()
    assert "rlhf-recipes run imdb_tiny" in makefile
    assert "rlhf-recipes fetch smollm2 minilm\n\t$(BIN)/rlhf-recipes run imdb_smol\n" in makefile
    assert "-m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not nightly'\n" in makefile
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test"


def test_recipe_table_is_what_the_command_prints(tmp_path):
    done = cli("list", "--markdown", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"<!-- recipes -->\n{done.stdout}<!-- /recipes -->" in README, "put in what `list --markdown` prints"
    for name in recipe_files():
        assert f"\n| `{name}` |" in done.stdout, name


def test_file_tree_is_complete():
    tree = re.search(r"## Files\n\n```\n(.*?)```", README, flags=re.DOTALL)[1]
    package = ROOT / "rlhf_recipes"
    doors = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    folders = {f"{path.parent.name}/" for path in package.rglob("__init__.py")} | {"base/"}
    assert doors == set(re.findall(r"\b[a-z_]+\.py\b", tree))
    assert folders <= set(re.findall(r"^ *([a-z_]+/)", tree, flags=re.MULTILINE))
    for name in re.findall(r"^([a-z_]+/)", tree, flags=re.MULTILINE):
        assert (ROOT / name).is_dir(), name


def test_metric_tables_are_the_registrys_and_have_every_metric_that_is_logged():
    from support.tiny_trainers import OF_PPO, OF_RLOO, SHARED

    for table in (markdown(TRAINING), markdown(EVAL)):
        assert f"\n\n{table}\n" in README, f"put this in:\n{table}"
    logged = SHARED | OF_PPO | OF_RLOO
    assert len(SHARED) > 20 and {name.replace("/length", "/NAME") for name in logged} <= TRAINING.keys()


@pytest.mark.slow
def test_the_script_runs_as_it_stands(tmp_path):
    script = re.search(r"```python\n# my_ppo.py\n(.*?)```", README, flags=re.DOTALL)[1]
    assert len([line for line in script.splitlines() if line]) <= 15
    (tmp_path / "my_ppo.py").write_text(script)
    done = run_python("my_ppo.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my-ppo/model.safetensors").is_file() and (tmp_path / "my-ppo/value_model/config.json").is_file()
    scores = [float(score) for score in re.findall(r"'score_mean': '([-.\de]+)'", done.stdout)]
    assert len(scores) >= 2 and scores[-1] > scores[0]


def test_module_help(tmp_path):
    done = run_python("-m", "rlhf_recipes.ppo", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "--recipe" in done.stdout
