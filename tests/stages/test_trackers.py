"""What trackers get: read back from their own files, or from a server on loopback that stands in for W&B's."""

import itertools
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.runs import trackers, workspace
from rlhf_recipes.runs.callbacks import TABLES
from rlhf_recipes.runs.folder import Run
from support.processes import become_stage, call, cli, run_python
from support.texts import HELD_OUT_REVIEWS, REVIEWS, write_jsonl
from support.tiny_models import causal_lm, word_tokenizer
from support.tiny_trainers import ALGORITHMS, PROMPTS, length, make

ONLY_PPO = {"value_loss", "value_clip_fraction", "value_mean", "return_mean", "explained_variance"}
ONLY_RLOO = {"baseline_mean", "no_signal_fraction"}
KEY = "0123456789" * 4
NOWHERE = "http://127.0.0.1:9"
"""Nobody listens there."""


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def offline_folder(path: Path) -> Path:
    """The one run that W&B has written below a folder."""
    (found,) = path.glob("wandb/offline-run-*")
    return found


def records(path: Path) -> list[dict]:
    """What W&B wrote below a folder, read back by W&B's own reader."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(offline_folder(path))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def of_kind(kind: str, found: list[dict]) -> list[dict]:
    return [record[kind] for record in found if record["type"] == kind]


def rows(found: list[dict]) -> list[dict]:
    """Rows of the history that hold metrics of training."""
    history = [record["item"] for record in of_kind("history", found)]
    return [row for row in history if "train/score_mean" in row]


def tables(path: Path, name: str) -> list[dict]:
    files = offline_folder(path).glob(f"files/media/table/{name}_*.json")
    return [json.loads(file.read_text()) for file in sorted(files, key=lambda file: int(file.name.split("_")[1]))]


def clean(home: Path, **environment: str) -> dict[str, str]:
    """Changes to the environment after which nobody has ever heard of W&B; WANDB_MODE is the tests' own."""
    home.mkdir(exist_ok=True)
    return {"HOME": str(home), "NETRC": str(home / ".netrc")} | environment


@pytest.fixture(scope="module")
def small(bpe_policy_folder, tmp_path_factory) -> list[str]:
    """Overrides of imdb_positive: a tiny policy, two reward functions, four rollouts."""
    folder = tmp_path_factory.mktemp("data")
    for split, reviews in (("train", REVIEWS), ("test", HELD_OUT_REVIEWS)):
        write_jsonl(folder / f"{split}.jsonl", reviews)
    trainer = "{per_device_train_batch_size: 8, max_completion_length: 6, num_generations: 4, num_iterations: 1}"
    return [
        f"ppo.policy={bpe_policy_folder}",
        f"rloo.policy={bpe_policy_folder}",
        "reward_funcs=[{name: vader_sentiment}, {name: length, weight: 0.1}]",
        f"data.path={folder}",
        "data.columns={text: text, label: label}",
        "data.prompt_tokens=[2, 4]",
        "episodes=32",
        f"ppo.trainer={trainer}",
        f"rloo.trainer={trainer}",
    ]


def start(stage: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.Popen:
    """Start a stage of imdb_positive as `python -m rlhf_recipes.<stage>` does."""
    outputs = (f"{stage}.stdout", f"{stage}.stderr")
    for name in outputs:
        (cwd / name).unlink(missing_ok=True)
    return call(become_stage, stage, ["imdb_positive", *arguments], cwd, os.environ | environment, outputs)


def run_stage(stage: str, *arguments: str, cwd: Path, **environment: str) -> SimpleNamespace:
    """Run it to its end; what it said."""
    process = start(stage, *arguments, cwd=cwd, **environment)
    process.wait(300)
    said = {name: (cwd / f"{stage}.{name}").read_text() for name in ("stdout", "stderr")}
    return SimpleNamespace(returncode=process.returncode, **said)


SECRETS = {
    name: f"s3cret-{i}-{name.replace('_', '-').lower()}"
    for i, name in enumerate(
        "hub model server source api password bearer argv secret HF_TOKEN OPENAI_API_KEY WANDB_API_KEY".split()
    )
} | {"known": "hf_" + "kNoWn" * 6, "WANDB_API_KEY": "fedcba9876" * 4}
"""Where it is planted -> a secret."""

PLANTED = [
    f"rloo.trainer.hub_token={SECRETS['hub']}",
    f"rloo.trainer.model_init_kwargs={{token: {SECRETS['model']}}}",
    f"rloo.trainer.vllm_server_base_url='http://me:{SECRETS['server']}@localhost:8000'",
    f"about.source='https://me:{SECRETS['source']}@example.org/x, and {SECRETS['known']}'",
    f"judge.parameters={{api_key: {SECRETS['api']}}}",
    f"judge.criterion='{SECRETS['OPENAI_API_KEY']} and {SECRETS['HF_TOKEN']} and {SECRETS['WANDB_API_KEY']}'",
    "eval.held_out_funcs=[{name: own.py:remote, args: {"
    f"password: {SECRETS['password']}, headers: {{Authorization: Bearer {SECRETS['bearer']}}}, "
    f"argv: ['--x-token={SECRETS['argv']}'], nested: [{{clientSecret: {SECRETS['secret']}}}]}}}}]",
]


@pytest.fixture(scope="module")
def offline(small, tmp_path_factory):
    """The folder in which ppo and rloo have run with W&B offline, and what they said; rloo with secrets in its settings."""
    folder, said = tmp_path_factory.mktemp("offline"), {}
    (folder / "own.py").write_text("def remote(completions, **columns): return [0.0] * len(completions)\n")
    for stage, planted in (("ppo", []), ("rloo", PLANTED)):
        own = {name: secret for name, secret in SECRETS.items() if name.isupper()} if planted else {}
        done = run_stage(stage, *small, *planted, cwd=folder, **clean(folder / "home", WANDB_MODE="offline", **own))
        assert done.returncode == 0, done.stderr
        said[stage] = done
    return folder, said


def run_of(offline, stage: str) -> Path:
    return offline[0] / "runs" / "imdb_positive" / stage


@pytest.mark.slow
def test_both_algorithms_log_the_same_keys(offline):
    keys = {
        stage: {key for row in rows(records(run_of(offline, stage))) for key in row if not key.startswith("_")}
        for stage in ("ppo", "rloo")
    }
    only_ppo, only_rloo = ({f"train/{name}" for name in names} for names in (ONLY_PPO, ONLY_RLOO))
    assert only_ppo <= keys["ppo"] and only_rloo <= keys["rloo"]
    assert keys["ppo"] - only_ppo == keys["rloo"] - only_rloo
    assert {"train/score/vader_sentiment", "train/score/length", "train/global_step"} <= keys["ppo"]
    assert all(key.startswith(("train/", "completions.")) for key in keys["ppo"] | keys["rloo"])


@pytest.mark.slow
def test_no_secret_is_in_any_file_of_a_run_or_its_trackers(offline, small, monkeypatch, tmp_path):
    """Nor in its output; the run is still known as finished, also with another token."""
    folder, _ = offline
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"training_args.bin", "recipe.yaml", "manifest.json", "log.txt", "rloo.stderr"} <= {
        path.name for path in files
    }
    assert any(path.suffix == ".wandb" for path in files) and any("tfevents" in path.name for path in files)
    found = [
        (str(path.relative_to(folder)), name)
        for path in files
        for name, secret in SECRETS.items()
        if secret.encode() in path.read_bytes()
    ]
    assert found == []
    monkeypatch.chdir(folder)
    for token in (SECRETS["hub"], "another-token"):
        assert Run(
            load_recipe("imdb_positive", [*small, *PLANTED, f"rloo.trainer.hub_token={token}"]), "rloo"
        ).is_done()
    copy = load_recipe(str(run_of(offline, "rloo") / "recipe.yaml"))
    assert "hub_token" not in copy.rloo.trainer and copy.rloo.trainer["vllm_server_base_url"] == "http://localhost:8000"
    assert Run(copy, "rloo").is_done()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ppo", "rloo"])
def test_an_offline_run_holds_what_the_run_logged(stage, offline):
    path = run_of(offline, stage)
    found, logged = records(path), lines(path / "metrics.jsonl")
    assert len(rows(found)) == len(logged) == 4
    assert len(of_kind("history", found)) == 5  # no more rows than lines, but for the one that transformers ends with
    for row, line in zip(rows(found), logged, strict=True):
        assert row["train/global_step"] == line["step"]
        for name, value in line.items():
            if name not in ("step", "seconds"):
                assert row[f"train/{name}"] == value, name
    axes = {metric.get("name"): metric.get("step_metric") for metric in of_kind("metric", found)}
    names = {key for row in rows(found) for key in row if key.startswith("train/")}
    assert all(
        axes[name] == "train/episodes" for name in names - {"train/episodes", "train/global_step", "train/epoch"}
    )
    assert [end["exit_code"] for end in of_kind("exit", found)] == [0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ppo", "rloo"])
def test_names_groups_and_settings_of_a_run(stage, offline):
    path = run_of(offline, stage)
    found = records(path)
    run, manifest = of_kind("run", found)[0], json.loads((path / "manifest.json").read_text())
    assert run["display_name"] == f"imdb_positive {stage} seed 42" and run["run_id"] == manifest["id"]
    assert (run["project"], run["run_group"], run["job_type"]) == ("rlhf_recipes", "imdb_positive", stage)
    assert run["tags"] == ["imdb_positive", stage]
    assert run["config"]["update"]["recipe"][stage] == manifest["settings"][stage]
    assert run["config"]["update"]["recipe"]["reward_funcs"] == manifest["settings"]["reward_funcs"]
    of_trainer = of_kind("config", found)[0]["update"]
    assert of_trainer["max_completion_length"] == 6 and of_trainer["seed"] == 42


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ppo", "rloo"])
def test_completions_are_tables(stage, offline):
    path = run_of(offline, stage)
    found, written = tables(path, "completions"), lines(path / "completions.jsonl")
    assert len(found) == 4
    columns = ["step", "prompt", "completion", "advantage", "score/vader_sentiment", "score/length"]
    expected = [
        [line["step"], line["prompt"], line["completion"], line["advantage"], *line["scores"].values()]
        for line in written
    ]
    assert all(table["columns"] == columns for table in found)
    assert [row for table in found for row in table["data"]] == expected


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ppo", "rloo"])
def test_the_terminal_has_one_line_of_wandb(stage, offline):
    done, path = offline[1][stage], run_of(offline, stage)
    there = offline_folder(path).relative_to(offline[0])
    (line,) = [line for line in done.stdout.splitlines() if "wandb" in line]
    assert line == f"{stage:<8} W&B: offline, upload it with: wandb sync {there}"
    assert "wandb" not in done.stderr and "URL not available" not in done.stderr


@pytest.mark.slow
def test_a_killed_run_can_be_read(small, tmp_path):
    path = tmp_path / "runs" / "imdb_positive" / "ppo"
    environment = clean(tmp_path / "home", WANDB_MODE="offline")
    process = start("ppo", *small, "episodes=8000", cwd=tmp_path, **environment)
    metrics = path / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 40):
        assert process.poll() is None
        time.sleep(0.2)
    process.kill()
    process.wait()
    time.sleep(2)  # W&B's own process writes what it has got, and ends
    found = rows(records(path))
    assert 20 < len(found) <= len(lines(metrics)) + 1
    for row, line in zip(found, lines(metrics), strict=False):
        assert (row["train/global_step"], row["train/score_mean"]) == (line["step"], line["score_mean"])


@pytest.mark.slow
def test_of_two_processes_one_logs(small, tmp_path):
    arguments = [*small, "episodes=16", "ppo.trainer.per_device_train_batch_size=4"]
    done = cli(
        "ppo", "imdb_positive", *arguments, "--accelerate-config", "cpu_ddp_2",
        cwd=tmp_path, **clean(tmp_path / "home", WANDB_MODE="offline", OMP_NUM_THREADS="1"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    path = tmp_path / "runs" / "imdb_positive" / "ppo"
    assert [row["train/global_step"] for row in rows(records(path))] == [1, 2]
    assert done.stdout.count("W&B") == 1


CASES = {
    "nothing": ({}, ["tensorboard"]),
    "offline": ({"WANDB_MODE": "offline"}, ["tensorboard", "wandb"]),
    "disabled": ({"WANDB_MODE": "disabled", "WANDB_API_KEY": KEY}, ["tensorboard"]),
    "disabled as before": ({"WANDB_DISABLED": "true", "WANDB_API_KEY": KEY}, ["tensorboard"]),
    "key": ({"WANDB_API_KEY": KEY}, ["tensorboard", "wandb"]),
    "half a key": ({"WANDB_API_KEY": "0123"}, ["tensorboard"]),
    "logged in": ({"WANDB_BASE_URL": "http://wandb.example"}, ["tensorboard", "wandb"]),
    "logged in elsewhere": ({"WANDB_BASE_URL": "http://other.example"}, ["tensorboard"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_nobody_is_asked_for_a_login(case, tmp_path, monkeypatch):
    environment, expected = CASES[case]
    monkeypatch.delenv("WANDB_MODE")
    home = clean(tmp_path / "home", **environment)
    (tmp_path / "home" / ".netrc").write_text(f"machine wandb.example\nlogin user\npassword {KEY}\n")
    program = (
        "from rlhf_recipes.system.terminal import log_to; from pathlib import Path; log_to(Path('log.txt'))\n"
        "from rlhf_recipes.runs.trackers import chosen_trackers; print(chosen_trackers('ppo', None))"
    )
    done = run_python("-c", program, cwd=tmp_path, timeout=30, **home)
    assert done.stdout.splitlines() == [str(expected)], done.stderr
    warned = case == "half a key"
    assert ("WARNING: W&B is not used: WANDB_API_KEY invalid" in done.stderr) == warned
    assert len(done.stderr.splitlines()) == warned
    log = (tmp_path / "log.txt").read_text()
    assert ("nobody is logged in" in log) == (case in ("nothing", "logged in elsewhere"))
    assert KEY not in log


@pytest.mark.slow
def test_without_a_login_training_does_without_wandb(small, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    done = run_stage("rloo", *small, "episodes=8", cwd=tmp_path, **clean(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    path = tmp_path / "runs" / "imdb_positive" / "rloo"
    assert not (path / "wandb").exists() and "W&B" not in done.stdout + done.stderr
    assert (path / "log.txt").read_text().count("W&B is not used") == 1


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_waited_for_a_little(small, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    home = clean(tmp_path / "home", WANDB_API_KEY=KEY, WANDB_BASE_URL=NOWHERE, WANDB_INIT_TIMEOUT="1")
    began = time.monotonic()
    done = run_stage("rloo", *small, "episodes=8", cwd=tmp_path, **home)
    assert done.returncode == 0 and time.monotonic() - began < 90, done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if "W&B" in line]
    assert warning.startswith("WARNING: W&B: ") and warning.endswith("; this run is written offline.")
    assert len(rows(records(tmp_path / "runs" / "imdb_positive" / "rloo"))) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"WANDB_MODE": "of"}, "mode"),
        ({"WANDB_MODE": "offline", "WANDB_PROJECT": "films/ppo"}, "Invalid project name 'films/ppo'"),
    ],
)
def test_an_environment_that_wandb_does_not_understand(environment, expected, tmp_path):
    program = "from rlhf_recipes.runs.trackers import chosen_trackers; chosen_trackers('ppo', None)"
    done = run_python("-c", program, cwd=tmp_path, **environment)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("rlhf_recipes.recipe.schema.RecipeError: W&B refuses a value") and expected in last


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ["tensorboard", "wandb"]),
        ([], ["tensorboard"]),
        ("none", ["tensorboard"]),
        ("tensorboard", ["tensorboard"]),
        ("wandb", ["tensorboard", "wandb"]),
        (["tensorboard", "trackio"], ["tensorboard", "trackio"]),
        (["wandb", "trackio"], ["tensorboard", "wandb", "trackio"]),
        (["wandb", "none", "wandb"], ["tensorboard", "wandb"]),  # twice the name would be twice the lines
    ],
)
def test_what_the_recipe_asks_for(given, expected, monkeypatch):
    monkeypatch.setattr(trackers, "wandb_mode", lambda: ("offline", ""))
    assert trackers.chosen_trackers("ppo", given) == expected


def test_what_the_recipe_asks_for_and_cannot_have(monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(trackers, "wandb_mode", lambda: (None, "nobody is logged in"))
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(integration_utils, "is_trackio_available", lambda: False)
    for given, expected in (
        ("wandb", "rloo.trainer.report_to: W&B cannot be used: nobody is logged in."),
        (["trackio"], "rloo.trainer.report_to: trackio is not installed; pip install its package, or remove it."),
        ("all", "rloo.trainer.report_to: no tracker is called 'all'"),
        ("wandb,trackio", "rloo.trainer.report_to: no tracker is called 'wandb,trackio'; there are: none, azure_ml, "),
        ("", "rloo.trainer.report_to: no tracker is called ''; "),
    ):
        with pytest.raises(RecipeError, match=f"^{expected}"):
            trackers.chosen_trackers("rloo", given)
    monkeypatch.setenv("WANDB_MODE", "disabled")  # for all recipes, by the one who runs them
    assert trackers.chosen_trackers("rloo", ["wandb"]) == ["tensorboard"]


@pytest.mark.slow
def test_trackio_when_asked_for(small, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    folder = tmp_path / "trackio"
    home = clean(tmp_path / "home", TRACKIO_DIR=str(folder))
    # A process of its own: Trackio takes its folder from the environment when it is imported.
    done = cli("rloo", "imdb_positive", *small, "rloo.trainer.report_to=trackio", cwd=tmp_path, **home)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "runs" / "imdb_positive" / "rloo"
    (file,) = folder.glob("*.db")
    assert file.stem == "rlhf_recipes"
    with sqlite3.connect(file) as database:
        found = database.execute("select run_name, metrics from metrics order by id").fetchall()
    values = [json.loads(metrics) for _, metrics in found]
    logged = lines(path / "metrics.jsonl")
    scores = [(row["train/global_step"], row["train/score_mean"]) for row in values if "train/score_mean" in row]
    assert scores == [(line["step"], line["score_mean"]) for line in logged]
    assert {name for name, _ in found} == {"imdb_positive rloo seed 42"}
    assert not (path / "wandb").exists()
    events = EventAccumulator(str(path / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("train/score_mean")) == len(logged)


class Session:
    """Stands in for wandb's module: keeps what it is given."""

    def __init__(self):
        self.run, self.axes, self.logged = object(), {}, []

    def define_metric(self, name, step_metric):
        assert name not in self.axes
        self.axes[name] = step_metric

    def log(self, values, commit):
        assert not commit  # the metrics of the same line come into the same row
        self.logged.append(values["completions"])

    def Table(self, columns, data):
        return columns, data


def sometimes(completion_ids, **kwargs):
    return [None if i % 2 else 1.0 for i in range(len(completion_ids))]


@pytest.mark.parametrize("trainer_class", ALGORITHMS)
def test_tables_of_chats_and_of_functions_that_do_not_always_apply(trainer_class, tmp_path, monkeypatch):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    chats = [[{"role": "system", "content": "very"}, {"role": "user", "content": text}] for text in PROMPTS]
    trainer = make(trainer_class, causal_lm(tokenizer), tmp_path, [length, sometimes], chats, tokenizer, max_steps=2)
    session = Session()
    monkeypatch.setitem(sys.modules, "wandb", session)
    trainer.args.report_to = ["wandb"]
    trainer.train()
    assert len(session.logged) == 2 and set(session.axes.values()) == {"train/episodes"}
    for columns, data in session.logged:
        assert columns == ["step", "prompt", "completion", "advantage", "score/length", "score/sometimes"]
        assert all(row[1] in {f"system: very\nuser: {text}" for text in PROMPTS} for row in data)
        assert all(row[2].startswith("assistant: ") for row in data)
        assert {row[5] for row in data} == {None, 1.0} and len(data) == 8


@pytest.mark.parametrize("trainer_class", ALGORITHMS)
def test_a_long_run_logs_few_tables(trainer_class, tmp_path, monkeypatch):
    trainer = make(trainer_class, causal_lm(word_tokenizer()), tmp_path, max_steps=3 * TABLES, max_completion_length=1)
    session = Session()
    monkeypatch.setitem(sys.modules, "wandb", session)
    trainer.args.report_to = ["wandb"]
    trainer.train()
    steps = [data[0][0] for _, data in session.logged]
    assert steps[0] == 1 and steps[-1] == 3 * TABLES and len(steps) == TABLES + 1
    assert max(b - a for a, b in itertools.pairwise(steps)) == 3


RESULTS = """
import json, sys
from pathlib import Path
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.runs.trackers import log_comparison, log_eval
log_eval(load_recipe("imdb_tiny"), Path("eval"), "one")
log_comparison(load_recipe("imdb_tiny"), "duel", Path("my duel"))
"""


@pytest.mark.slow
def test_results_of_eval_and_of_a_comparison(tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "my duel").mkdir()
    models = {"sft": {"score_mean": 0.1, "kl": 0.0}, "ppo": {"score_mean": 0.7, "kl": None}}
    (tmp_path / "eval" / "eval.json").write_text(json.dumps({"models": models}))
    said = {
        "sft": {"completion": " bad", "score": -1.0},
        "ppo": {"completion": " good", "score": 0.5, "held_out": None},
    }
    write_jsonl(tmp_path / "eval" / "completions.jsonl", [{"prompt": "it was", "gold": " so", "models": said}])
    view = {"view": "held_out", "metric": "score_mean", "at": None, "difference": 0.2, "interval": [0.1, 0.3]}
    view |= {"means": {"ppo": 0.7, "rloo": 0.5}, "label": "PPO better", "sentence": "PPO is better.", "paired": True}
    verdict = {"winner": "ppo", "label": "PPO better", "sentence": "PPO is better."}
    comparison = {"verdict": verdict, "views": [view, view | {"view": "tokens", "interval": None}]}
    (tmp_path / "my duel" / "comparison.json").write_text(json.dumps(comparison))
    done = run_python("-c", RESULTS, cwd=tmp_path, **clean(tmp_path / "home", WANDB_MODE="offline"))
    assert done.returncode == 0, done.stderr
    assert "wandb sync 'my duel/wandb/offline-run-" in done.stdout
    found = records(tmp_path / "eval")
    run, summary = of_kind("run", found)[0], {}
    for record in of_kind("summary", found):
        summary |= record["update"]
    assert (run["run_id"], run["job_type"], run["run_group"]) == ("one", "eval", "imdb_tiny")
    assert (summary["sft/score_mean"], summary["ppo/score_mean"], summary["ppo/kl"]) == (0.1, 0.7, None)
    (table,) = tables(tmp_path / "eval", "models")
    assert (table["columns"], table["data"]) == (["model", "score_mean", "kl"], [["sft", 0.1, 0.0], ["ppo", 0.7, None]])
    (table,) = tables(tmp_path / "eval", "completions")
    assert table["columns"] == ["prompt", "gold", "sft", "sft score", "ppo", "ppo score", "ppo held_out"]
    assert table["data"] == [["it was", " so", " bad", -1.0, " good", 0.5, None]]
    found = records(tmp_path / "my duel")
    summary = {}
    for record in of_kind("summary", found):
        summary |= record["update"]
    assert of_kind("run", found)[0]["job_type"] == "duel"
    assert summary["verdict/label"] == "PPO better" and summary["held_out/score_mean/difference"] == 0.2
    (table,) = tables(tmp_path / "my duel", "views")
    held_out, tokens = (dict(zip(table["columns"], row, strict=True)) for row in table["data"])
    assert (held_out["low"], held_out["high"], tokens["low"]) == (0.1, 0.3, None)


@pytest.fixture
def server():
    """Answers as W&B's does to what a view asks, and keeps the views that it is sent."""
    views = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            answer = {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
            if b"upsertView" in body:
                variables = json.loads(body)["variables"]
                views.append(variables | {"spec": json.loads(variables["spec"])})
                answer = {"upsertView": {"view": {"id": "2", "name": variables["name"]}, "inserted": True}}
            text = json.dumps({"data": answer}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", views
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_view_overlays_ppo_and_rloo(offline, small, server, tmp_path, monkeypatch):
    address, views = server
    monkeypatch.delenv("WANDB_MODE")
    home = clean(tmp_path / "home", WANDB_API_KEY=KEY, WANDB_BASE_URL=address)
    done = cli("wandb", "imdb_positive", *small, cwd=offline[0], **home)
    assert done.returncode == 0, done.stderr
    (view,) = views
    assert (view["entityName"], view["projectName"]) == ("me", "rlhf_recipes")
    name = view["name"].removeprefix("nw-").removesuffix("-v")
    folders = sorted(str(offline_folder(run_of(offline, stage)).relative_to(offline[0])) for stage in ("ppo", "rloo"))
    assert done.stdout.splitlines() == [
        "2 offline runs are not uploaded to W&B yet; upload them with",
        f"  wandb sync {' '.join(folders)}",
        f"{address}/me/rlhf_recipes?nw={name}",
    ]
    section = view["spec"]["section"]
    (runs,) = section["runSets"]
    assert runs["grouping"] == [{"section": "run", "name": "jobType"}]
    text = json.dumps(runs["filters"])
    assert '"group"' in text and '"imdb_positive"' in text and '"jobType"' in text and '"ppo"' in text
    panels = [panel for part in section["panelBankConfig"]["sections"] for panel in part["panels"]]
    plots = [panel["config"] for panel in panels if panel["viewType"] == "Run History Line Plot"]
    logged = [{key for row in rows(records(run_of(offline, stage))) for key in row} for stage in ("ppo", "rloo")]
    shown = [metric for plot in plots for metric in plot["metrics"]]
    assert set(shown) <= logged[0] & logged[1]
    wanted = ("score_mean", "kl", "entropy", "length_mean", "eos_rate", "score/vader_sentiment")
    assert {f"train/{metric}" for metric in wanted} <= set(shown)
    for plot in plots:
        assert (plot["xAxis"], plot["groupBy"], plot["groupAgg"]) == ("train/episodes", "jobType", "mean")
        assert plot["groupArea"] == "minmax" and plot["aggregate"]
    assert "completions" in json.dumps([panel for panel in panels if panel["viewType"] != "Run History Line Plot"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "and nobody is logged in (wandb login, or WANDB_API_KEY)"),
        ({"WANDB_MODE": "offline"}, "and WANDB_MODE is offline."),
        pytest.param(  # waits until W&B's client gives up
            {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": NOWHERE}, "the view was not saved: ", marks=pytest.mark.nightly
        ),
    ],
)
def test_no_view_without_a_login_or_a_server(environment, expected, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    done = cli("wandb", "imdb_tiny", cwd=tmp_path, timeout=90, **clean(tmp_path / "home", **environment))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: wandb: ") and expected in line


def test_no_view_without_the_package(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workspace, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'rlhf-recipes\[workspace\]'"):
        workspace.save_view(load_recipe("imdb_tiny"), None)
