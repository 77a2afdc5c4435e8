"""The product as users meet it: real commands, real processes, local stand-ins for what comes from the Hub."""

import json
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from support.finished_runs import FEW
from support.processes import cli, run_python
from support.texts import HELD_OUT_REVIEWS, REVIEWS, write_jsonl

pytestmark = pytest.mark.slow


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def launch(module: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """`accelerate launch -m rlhf_recipes.<module> --recipe ...`"""
    return run_python(
        "-m",
        "accelerate.commands.launch",
        "-m",
        f"rlhf_recipes.{module}",
        "--recipe",
        *arguments,
        cwd=cwd,
        **environment,
    )


@pytest.fixture(scope="module")
def tiny(few_steps, tmp_path_factory):
    """A folder in which `run imdb_tiny` has been called once, in few steps, and what it said."""
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copytree(few_steps / "runs", folder / "runs")
    said = {name: (few_steps / name).read_text() for name in ("stdout", "stderr")}
    return folder, SimpleNamespace(**said)


def test_run_leaves_everything_it_promises(tiny):
    folder, _ = tiny
    root = folder / "runs" / "imdb_tiny"
    for stage in ("sft", "reward", "ppo", "rloo"):
        path = root / stage
        found = {p.name for p in path.iterdir()}
        assert {
            "model.safetensors",
            "config.json",
            "tokenizer.json",
            "recipe.yaml",
            "manifest.json",
            "metrics.jsonl",
            "log.txt",
            "tensorboard",
        } <= found
        manifest = json.loads((path / "manifest.json").read_text())
        assert manifest["status"] == "finished" and manifest["command"] and manifest["wall_seconds"] > 0
        assert [line["step"] for line in lines(path / "metrics.jsonl")] == sorted(
            line["step"] for line in lines(path / "metrics.jsonl")
        )
        events = EventAccumulator(str(path / "tensorboard"))
        events.Reload()
        assert events.Tags()["scalars"]
        assert not any(p.name.endswith(".bin") or p.name.startswith(".") for p in path.iterdir())
    for stage in ("ppo", "rloo"):
        metrics, completions = lines(root / stage / "metrics.jsonl"), lines(root / stage / "completions.jsonl")
        assert [line["episodes"] for line in metrics] == [32, 64, 96, 128]  # equal budgets
        assert all(
            {"score_mean", "kl", "entropy", "eos_rate", "length_mean", "grad_norm"} <= set(line) for line in metrics
        )
        assert {"prompt", "completion", "scores", "advantage", "step"} <= set(completions[0])
    same = [[line["prompt"] for line in lines(root / stage / "completions.jsonl")] for stage in ("ppo", "rloo")]
    assert same[0] == same[1]  # the same prompts in the same order


def test_final_models_load_with_plain_transformers_without_warnings(tiny):
    root = tiny[0] / "runs" / "imdb_tiny"
    for stage, auto in (
        ("sft", AutoModelForCausalLM),
        ("ppo", AutoModelForCausalLM),
        ("rloo", AutoModelForCausalLM),
        ("reward", AutoModelForSequenceClassification),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, info = auto.from_pretrained(root / stage, output_loading_info=True)
            AutoTokenizer.from_pretrained(root / stage)
        assert not any(info.values()), info
        assert (model.config.num_labels == 1) if stage == "reward" else model.can_generate()


def test_eval_and_report(tiny):
    folder, done = tiny
    measured = json.loads((folder / "runs/imdb_tiny/eval/eval.json").read_text())
    wanted = {
        "score_mean",
        "held_out_mean",
        "positive_share",
        "kl",
        "length_mean",
        "distinct_1",
        "distinct_2",
        "repetition",
        "perplexity",
        "eos_rate",
    }
    assert list(measured["models"]) == ["base", "sft", "ppo", "rloo"]
    for metrics in measured["models"].values():
        assert wanted <= set(metrics) and all(isinstance(metrics[key], float) for key in wanted)
    assert abs(measured["models"]["sft"]["kl"]) < 1e-3
    assert len(measured["samples"]) == 16 and set(measured["samples"][0]["models"]) == set(measured["models"])
    report = (folder / "runs/imdb_tiny/compare/report.html").read_text()
    assert "one seed each" in report
    assert "runs/imdb_tiny/compare/report.html" in done.stdout.splitlines()[-1]
    again = cli("eval", "imdb_tiny", *FEW, cwd=folder)
    table = again.stdout.partition("\n")[2]
    assert "nothing to do" in again.stdout and table.strip() in done.stdout
    assert all(name in table for name in ("positive", "held out", "KL", "perplexity", "distinct-3", "rloo"))


def test_terminal_stays_readable(tiny):
    _, done = tiny
    assert done.stderr.strip() == ""
    assert len([line for line in done.stdout.splitlines() if " s   " in line]) == 6  # one line a finished stage


def test_a_second_run_reuses_everything_at_once(tiny):
    folder, _ = tiny
    started = time.monotonic()
    again = cli("run", "imdb_tiny", *FEW, cwd=folder)
    assert again.returncode == 0 and again.stdout.count("reused") == 6 and "report.html" in again.stdout
    assert time.monotonic() - started < 15


def test_an_override_is_refused_where_a_run_has_finished(tiny):
    """With `--overwrite` only what it changes runs again: test_readme has that command."""
    folder, _ = tiny
    refused = cli("rloo", "imdb_tiny", *FEW, "rloo.baseline=group_mean", cwd=folder)
    assert refused.returncode == 2 and "rloo.baseline" in refused.stderr and "Traceback" not in refused.stderr


def test_compare_and_score_commands(tiny):
    folder, _ = tiny
    done = cli("compare", "runs/imdb_tiny/ppo", "runs/imdb_tiny/rloo", "--out", "both", cwd=folder)
    assert done.returncode == 0 and (folder / "both" / "report.html").is_file(), done.stdout + done.stderr
    assert "one seed each" in done.stdout and "held out score mean" in done.stdout
    wrong = cli("compare", "runs/imdb_tiny/sft", cwd=folder)
    assert wrong.returncode == 2 and "stage sft" in wrong.stderr
    scored = cli("score", "imdb_tiny", "--text", "this movie is great .", "--text", "the plot is awful .", cwd=folder)
    assert scored.returncode == 0 and "vader_sentiment" in scored.stdout and "the plot is awful ." in scored.stdout, (
        scored.stderr
    )


@pytest.fixture(scope="module")
def stand_ins(bpe_policy_folder, classifier_folder, tmp_path_factory):
    """Overrides that put local models and data in place of imdb_positive's; pad == EOS, other column names."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "imdb").mkdir()
    for split, reviews in (("train", REVIEWS), ("test", HELD_OUT_REVIEWS)):
        rows = [{"review": row["text"], "stars": row["label"]} for row in reviews]
        write_jsonl(folder / "imdb" / f"{split}.jsonl", rows)
    small = "{per_device_train_batch_size: 8, max_completion_length: 6, num_generations: 4, num_iterations: 1}"
    return [
        f"sft.model={bpe_policy_folder}",
        f"reward.model={bpe_policy_folder}",
        f"ppo.policy={bpe_policy_folder}",
        f"rloo.policy={bpe_policy_folder}",
        f"reward_funcs.0.args.model={classifier_folder}",
        f"data.path={folder / 'imdb'}",
        "data.columns={text: review, label: stars}",
        "data.prompt_tokens=[2, 4]",
        "episodes=16",
        f"ppo.trainer={small}",
        f"rloo.trainer={small}",
        "sft.trainer={per_device_train_batch_size: 4, max_steps: 2, max_length: 32}",
        "reward.trainer={per_device_train_batch_size: 4, max_steps: 2, max_length: 40}",
        "eval.num_prompts=8",
    ]


@pytest.mark.parametrize("stage", ["sft", "reward", pytest.param("ppo", marks=pytest.mark.cold), "rloo"])
def test_accelerate_launch_with_local_stand_ins(stage, stand_ins, tmp_path):
    done = launch(stage, "imdb_positive", *stand_ins, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "runs" / "imdb_positive" / stage
    assert json.loads((path / "manifest.json").read_text())["status"] == "finished"
    if stage in ("ppo", "rloo"):
        assert all(line["score/sentiment"] is not None for line in lines(path / "metrics.jsonl"))


def test_a_bert_type_reward_model_is_trained_and_used(stand_ins, classifier_folder, tmp_path):
    """A reward model with another tokenizer than the policy's, and without an EOS of its own."""
    from transformers import DistilBertConfig, DistilBertModel

    bert = tmp_path / "bert"
    DistilBertModel(DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=2, hidden_dim=64)).save_pretrained(bert)
    AutoTokenizer.from_pretrained(classifier_folder).save_pretrained(bert)
    overrides = [*stand_ins, f"reward.model={bert}", "reward_funcs=[{name: reward_model, args: {model: stage:reward}}]"]
    for stage in ("reward", "rloo"):
        done = cli(stage, "imdb_positive", *overrides, cwd=tmp_path)
        assert done.returncode == 0 and done.stderr == "", done.stderr


def test_chat_prompts_own_reward_and_eval_through_the_cli(stand_ins, tmp_path, bpe_policy_folder):
    tokenizer = AutoTokenizer.from_pretrained(bpe_policy_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    model = tmp_path / "chat-model"
    AutoModelForCausalLM.from_pretrained(bpe_policy_folder).save_pretrained(model)
    tokenizer.save_pretrained(model)
    write_jsonl(
        tmp_path / "chats.jsonl",
        [{"prompt": [{"role": "user", "content": f"film {i}"}], "weight": i} for i in range(40)],
    )
    (tmp_path / "mine.py").write_text(
        "def mine(completions, weight):\n    return [len(c[0]['content']) * w for c, w in zip(completions, weight)]\n"
    )
    overrides = [
        *stand_ins,
        f"ppo.policy={model}",
        f"rloo.policy={model}",
        "data.path=./chats.jsonl",
        "data.columns=null",
        "data.eval_split=null",
        "data.eval_fraction=0.2",
        "reward_funcs=[{name: './mine.py:mine'}]",
    ]
    done = cli("run", "imdb_positive", *overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "score/mine" in lines(tmp_path / "runs/imdb_positive/rloo/metrics.jsonl")[0]
    sample = json.loads((tmp_path / "runs/imdb_positive/eval/eval.json").read_text())["samples"][0]
    assert sample["models"]["ppo"]["completion"][0]["role"] == "assistant"
    assert "film" in (tmp_path / "runs/imdb_positive/compare/report.html").read_text()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("def bad(completions): return [float('nan')] * len(completions)", "returned nan for sample 0"),
        ("def bad(completions): return [None] * len(completions)", "returned None for sample 0"),
        ("def bad(completions): return [1.0]", "returned 1 values for 8"),
        ("def bad(completions): raise RuntimeError('no such thing')", "raised RuntimeError: no such thing"),
    ],
)
def test_a_bad_reward_function_stops_the_run_with_a_word(function, expected, stand_ins, tmp_path):
    (tmp_path / "own.py").write_text(function)
    done = cli("ppo", "imdb_positive", *stand_ins, "reward_funcs=[{name: 'own.py:bad'}]", cwd=tmp_path)
    assert (
        done.returncode == 2 and expected in done.stderr and "'bad'" in done.stderr and "Traceback" not in done.stderr
    )
    path = tmp_path / "runs" / "imdb_positive" / "ppo"
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["status"] == "failed" and expected in manifest["error"]
    assert "Traceback" in (path / "log.txt").read_text()  # for whoever wrote the function
    assert not (path / "model.safetensors").exists()


def test_models_that_cannot_be_used(stand_ins, bpe_policy_folder, classifier_folder, tmp_path):
    """A folder without weights, and one that holds no causal language model."""
    shutil.copytree(bpe_policy_folder, tmp_path / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    weightless = cli("ppo", "imdb_positive", *stand_ins, "ppo.policy=./weightless", cwd=tmp_path)
    assert (
        weightless.returncode == 2 and "ppo.policy: ./weightless has no weights in safetensors" in weightless.stderr
    ), weightless.stderr
    bert = cli("rloo", "imdb_positive", *stand_ins, f"rloo.policy={classifier_folder}", cwd=tmp_path)
    assert bert.returncode == 2 and "rloo.policy" in bert.stderr and "Traceback" not in bert.stderr


@pytest.mark.parametrize("stage", ["ppo", "rloo"])
def test_fewer_prompts_than_a_rollout_takes(stage, stand_ins, tmp_path):
    write_jsonl(tmp_path / "one.jsonl", [{"prompt": "the film"}, {"prompt": "it was"}])
    own = ["data.path=one.jsonl", "data.columns=null", "data.eval_split=null"]
    done = cli(stage, "imdb_positive", *stand_ins, *own, cwd=tmp_path)
    assert done.returncode == 2 and "1 training prompts, but one rollout takes 2" in done.stderr, done.stderr


@pytest.mark.cold
def test_a_killed_run_is_not_taken_for_finished_and_starts_again(stand_ins, tmp_path):
    (tmp_path / "own.py").write_text(
        "import time\ndef slow(completions):\n    time.sleep(1)\n    return [0.0] * len(completions)\n"
    )
    overrides = [*stand_ins, "reward_funcs=[{name: 'own.py:slow'}]"]
    path = tmp_path / "runs" / "imdb_positive" / "ppo"
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf_recipes.ppo", "--recipe", "imdb_positive", *overrides, "episodes=8000"],
        cwd=tmp_path,
    )
    while not ((path / "metrics.jsonl").exists() and len(lines(path / "metrics.jsonl")) >= 2):
        assert process.poll() is None
        time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((path / "manifest.json").read_text())["status"] == "running"
    needs_it = cli("rloo", "imdb_positive", *overrides, "rloo.policy=stage:ppo", cwd=tmp_path)
    assert needs_it.returncode == 2 and "was not finished" in needs_it.stderr
    again = cli("ppo", "imdb_positive", *overrides, "--overwrite", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    aside = [p for p in path.parent.iterdir() if p.name.startswith("ppo.")]
    assert len(aside) == 1 and len(lines(aside[0] / "metrics.jsonl")) >= 2


def test_wandb_offline_writes_a_run_and_asks_nothing(stand_ins, tmp_path):
    done = cli("rloo", "imdb_positive", *stand_ins, cwd=tmp_path, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    runs = list((tmp_path / "runs/imdb_positive/rloo/wandb").glob("offline-run-*"))
    assert len(runs) == 1 and list(runs[0].glob("*.wandb"))
    tables = [json.loads(path.read_text()) for path in runs[0].glob("files/media/table/completions*.json")]
    assert tables and tables[0]["columns"] == ["step", "prompt", "completion", "advantage", "score/sentiment"]
    assert len(tables[0]["data"]) > 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ppo", "imdb_positiv"], "imdb_positive"),
        (["ppo", "imdb_tiny", "runs_dir=empty"], "rlhf-recipes sft imdb_tiny"),
        (["reward", "imdb_base"], "has no stage reward"),
        (["ppo", "imdb_tiny", "ppo.trainer.learning_rate=fast"], "ppo.trainer.learning_rate"),
        (
            ["rloo", "imdb_tiny", "rloo.policy=package:rlhf_recipes/base", "rloo.trainer.num_generations=1"],
            "rloo.trainer.num_generations is 1",
        ),
        (["rloo", "imdb_tiny", "rloo.policy=package:rlhf_recipes/base", "rloo.trainer.num_generations=5"], "divisible"),
        (["show", "imdb_tiny", "extends=x"], "extends"),
        (["score", "imdb_tiny"], "nothing to score"),
    ],
)
def test_mistakes_get_one_message_and_exit_code_2(arguments, expected, tmp_path):
    done = cli(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and expected in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("stage", ["ppo", "rloo"])
def test_two_processes_are_one_run(stage, stand_ins, tmp_path):
    """DDP on the CPU: one run folder, half the micro-steps each, and a second launch finds it finished."""
    (tmp_path / "two.yaml").write_text(
        "distributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: 2\nmixed_precision: 'no'\nuse_cpu: false\nmain_process_port: 0\n"
    )
    command = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "two.yaml",
        "-m",
        f"rlhf_recipes.{stage}",
        "--recipe",
        "imdb_positive",
        *stand_ins,
    ]
    done = run_python(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "runs" / "imdb_positive" / stage
    assert [line["episodes"] for line in lines(path / "metrics.jsonl")] == [16]  # 2 processes x 8 at once
    assert sorted(p.name for p in path.parent.iterdir()) == [f".{stage}.lock", stage]
    again = run_python(*command, cwd=tmp_path)
    assert again.returncode == 0 and "finished before" in again.stdout, again.stderr
