"""Killed, stopped, out of disk: the same command goes on, and ends as a run that was never stopped."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from rlhf_recipes import PPOTrainer
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.runs.callbacks import RunCallback
from rlhf_recipes.runs.checkpoints import StopCallback
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.system.files import MARKER, last_complete, mark_complete, step_of, write_whole, writing
from support.processes import TIMES, become_stage, call
from support.texts import HELD_OUT_REVIEWS, REVIEWS, write_jsonl
from support.tiny_models import causal_lm, save_pair, word_tokenizer
from support.tiny_trainers import ALGORITHMS, PROMPTS, make

NOISY = """
import random

import numpy as np


def noisy(completions, log_extra, log_metric):
    draws = np.random.random(len(completions))
    log_extra("draw", list(draws))
    log_metric("kl_of_mine", draws.mean())
    return draws + random.random()
"""
"""A reward function that draws from the global random numbers, and logs numpy's numbers."""


class Launcher:
    """Starts one stage of a small recipe in a folder of its own.

    Args:
        folder: Gets the subfolder of each run.
        overrides: Of recipe imdb_positive.
    """

    def __init__(self, folder: Path, overrides: list[str]):
        self.folder, self.overrides = folder, overrides

    def start(
        self,
        stage: str,
        name: str,
        *more: str,
        largest_file: int | None = None,
        ranks: int = 1,
        port: int = 0,
        **environment: str,
    ):
        (self.folder / name).mkdir(exist_ok=True)
        started = []
        for rank in range(ranks):
            distributed = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            allowed = {"RLHF_RECIPES_ALLOW_CODE": str(self.folder)}  # own.py is beside the stages' folders
            variables = os.environ | allowed | environment | (distributed if ranks > 1 else {})
            arguments = ["imdb_positive", *self.overrides, *more]
            started.append(
                call(become_stage, stage, arguments, self.folder / name, variables, largest_file=largest_file)
            )
        return started if ranks > 1 else started[0]

    def finish(self, stage: str, name: str, *more: str, **options) -> int:
        """Run it to its end; returns its exit code."""
        started = self.start(stage, name, *more, **options)
        for process in started if isinstance(started, list) else [started]:
            process.wait(120)
        return process.returncode

    def path(self, stage: str, name: str) -> Path:
        return self.folder / name / "runs" / "imdb_positive" / stage

    def output(self, name: str) -> str:
        return (self.folder / name / "output.txt").read_text(encoding="utf-8")

    def manifest(self, stage: str, name: str) -> dict:
        return json.loads((self.path(stage, name) / "manifest.json").read_text(encoding="utf-8"))

    def wait_for_checkpoint(self, stage: str, name: str, process, after: int = 0) -> None:
        """Until a whole checkpoint of a step after `after` is there, or the process has ended."""
        deadline = time.monotonic() + 60
        while process.poll() is None and not any(step > after for step in self.steps(stage, name)):
            assert time.monotonic() < deadline, self.output(name)
            time.sleep(0.01)

    def wait_for_a_save(self, stage: str, name: str, process, after: int) -> None:
        """Until a checkpoint of a step after `after` is being written, or the process has ended."""
        while process.poll() is None:
            for folder in self.path(stage, name).glob("checkpoint-*"):
                if step_of(folder) > after and not (folder / MARKER).exists() and any(folder.iterdir()):
                    return
            time.sleep(0.001)

    def steps(self, stage: str, name: str) -> list[int]:
        return sorted(int(p.parent.name.split("-")[1]) for p in self.path(stage, name).glob(f"checkpoint-*/{MARKER}"))


@pytest.fixture(scope="module")
def launcher(bpe_policy_folder, classifier_folder, tmp_path_factory) -> Launcher:
    folder = tmp_path_factory.mktemp("resume")
    (folder / "imdb").mkdir()
    for split, reviews in (("train", REVIEWS), ("test", HELD_OUT_REVIEWS)):
        write_jsonl(folder / "imdb" / f"{split}.jsonl", reviews)
    (folder / "own.py").write_text(NOISY)
    plain = "per_device_train_batch_size: 2, max_length: 32, num_train_epochs: 3, logging_steps: 4, save_steps: 3"
    # 4 optimizer steps a rollout, 7 rollouts an epoch, 9 in all: neither lines nor checkpoints fall in step with them.
    rollouts = (
        "per_device_train_batch_size: 2, gradient_accumulation_steps: 2, steps_per_generation: 4, num_iterations: 2, "
        "num_generations: 2, max_completion_length: 6, kl_target: 0.5, kl_horizon: 100, logging_steps: 5, save_steps: 3"
    )
    sentiment = f"{{name: sentiment, args: {{model: {classifier_folder}}}}}"
    return Launcher(
        folder,
        [
            *(f"{stage}.model={bpe_policy_folder}" for stage in ("sft", "reward")),
            *(f"{stage}.policy={bpe_policy_folder}" for stage in ("ppo", "rloo")),
            *(f"{stage}.trainer={{{plain}}}" for stage in ("sft", "reward")),
            *(f"{stage}.trainer={{{rollouts}, learning_rate: 1e-3}}" for stage in ("ppo", "rloo")),
            f"reward_funcs=[{sentiment}, {{name: '{folder}/own.py:noisy'}}]",
            f"data.path={folder / 'imdb'}",
            "data.prompt_tokens=[2, 4]",
            "episodes=72",
        ],
    )


@pytest.fixture(scope="module")
def uninterrupted(launcher):
    """Runs each stage once, when a test asks for it first; returns its folder."""
    done = {}

    def path(stage: str) -> Path:
        if stage not in done:
            assert launcher.finish(stage, f"{stage}-whole") == 0, launcher.output(f"{stage}-whole")
            done[stage] = launcher.path(stage, f"{stage}-whole")
        return done[stage]

    return path


def lines(path: Path) -> list[dict]:
    """A jsonl file, without what is measured in seconds."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if not any(time in key for time in TIMES)} for row in rows]


def weights(file: Path) -> dict:
    with safe_open(file, framework="np") as tensors:
        return {name: tensors.get_tensor(name).tobytes() for name in tensors.keys()}  # noqa: SIM118


def events(path: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run's training: steps and values.

    The evaluation behind the last step, which has no step of its own, is there twice when that part is done twice.
    """
    read = EventAccumulator(str(path / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    names = {name for name in read.Tags()["scalars"] if name.startswith("train/")} - {"train/epoch"}
    assert "train/loss" in names
    names -= {name for name in names if any(time in name for time in TIMES)}
    return {name: [(event.step, event.value) for event in read.Scalars(name)] for name in names}


def assert_same_run(one: Path, other: Path) -> None:
    files = [path.name for path in one.glob("*.safetensors")]
    assert "model.safetensors" in files
    if one.name == "ppo":
        files += [f"value_model/{path.name}" for path in (one / "value_model").glob("*.safetensors")]
        assert len(files) == 2
    for name in files:
        assert weights(one / name) == weights(other / name), name
    assert lines(one / "metrics.jsonl") == lines(other / "metrics.jsonl")
    seconds = [json.loads(line)["seconds"] for line in (other / "metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds)
    assert events(one) == events(other)
    if (one / "completions.jsonl").exists():
        assert lines(one / "completions.jsonl") == lines(other / "completions.jsonl")
    results = [json.loads((path / "manifest.json").read_text())["results"] for path in (one, other)]
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "rloo"])
def test_killed_again_and_again_it_ends_as_if_never_stopped(stage, launcher, uninterrupted):
    whole, name = uninterrupted(stage), f"{stage}-killed"
    kills, last, temporary = [], 0, launcher.folder / f"{name}.tmp"
    temporary.mkdir()
    while len(kills) < 3:
        process = launcher.start(stage, name, TMPDIR=str(temporary))
        if len(kills) == 1:
            launcher.wait_for_a_save(stage, name, process, after=last)
        else:
            launcher.wait_for_checkpoint(stage, name, process, after=last)
            time.sleep(random.random() * 0.1)
        process.kill()
        process.wait()
        if process.returncode == 0:  # it was faster
            break
        kills.append(launcher.steps(stage, name))
        last = kills[-1][-1]
    assert kills, "ended before it could be killed"
    before = launcher.manifest(stage, name)
    assert launcher.finish(stage, name, TMPDIR=str(temporary)) == 0, launcher.output(name)
    manifest = launcher.manifest(stage, name)
    assert manifest["status"] == "finished" and manifest["id"] == before["id"]
    resumed = [entry["step"] for entry in manifest["resumed"]]
    assert resumed == sorted(resumed) and resumed[0] >= kills[0][0], (kills, resumed)
    assert f"{stage:<8} resumes from step {resumed[-1]} of " in launcher.output(name)
    torn = "saving it was interrupted"  # killed while it was written: true, and no harm
    said = {line for line in launcher.output(name).splitlines() if torn not in line and line.split()[0] != stage}
    assert said <= set(launcher.output(f"{stage}-whole").splitlines())
    assert_same_run(whole, launcher.path(stage, name))
    if stage in ("ppo", "rloo"):
        assert all("kl_of_mine" in line for line in lines(whole / "metrics.jsonl"))
    assert sorted(path.name for path in whole.parent.iterdir()) == [f".{stage}.lock", stage]
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "sent"), [("sft", signal.SIGTERM), ("sft", signal.SIGHUP), ("ppo", signal.SIGINT)])
def test_a_signal_saves_stops_and_the_same_command_goes_on(stage, sent, launcher, uninterrupted):
    """With W&B, too: both parts are one run there, and it takes nothing out of the random numbers."""
    whole, name = uninterrupted(stage), f"{stage}-stopped-{sent}"
    process = launcher.start(stage, name, WANDB_MODE="offline")
    launcher.wait_for_checkpoint(stage, name, process)
    process.send_signal(sent)
    process.wait(60)
    assert process.returncode == 128 + sent, launcher.output(name)
    path = launcher.path(stage, name)
    assert launcher.manifest(stage, name)["status"] == "stopped" and not (path / "model.safetensors").exists()
    state = json.loads((last_complete(path) / "trainer_state.json").read_text())
    assert state["global_step"] < state["max_steps"]
    assert f"{stage:<8} stopped, the same command resumes from step {state['global_step']}" in launcher.output(name)
    assert launcher.finish(stage, name, WANDB_MODE="offline") == 0, launcher.output(name)
    assert launcher.manifest(stage, name)["resumed"][0]["step"] == state["global_step"]
    assert_same_run(whole, path)
    parts = [part.name for part in (path / "wandb").glob("offline-run-*")]
    assert len(parts) == 2 and {part.rpartition("-")[2] for part in parts} == {launcher.manifest(stage, name)["id"]}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_killed_behind_its_last_step_no_further_one_is_trained(stage, launcher, uninterrupted):
    """While the final model is written, or between that and the manifest: once in mid-epoch, once at an epoch's end."""
    whole, name = uninterrupted(stage), f"{stage}-late"
    shutil.copytree(whole.parents[2], launcher.folder / name)
    path = launcher.path(stage, name)
    manifest = launcher.manifest(stage, name) | {"status": "running"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "model.safetensors").unlink()
    (path / ".final").mkdir()
    (path / ".final" / "model.safetensors").write_bytes(b"half")
    assert launcher.finish(stage, name) == 0, launcher.output(name)
    assert_same_run(whole, path)
    assert not (path / ".final").exists()
    assert weights(path / "model.safetensors") == weights(last_complete(path) / "model.safetensors")


@pytest.mark.slow
def test_a_torn_checkpoint_is_left_out_with_a_warning(launcher, uninterrupted):
    name = "sft-torn"
    process = launcher.start("sft", name)
    launcher.wait_for_checkpoint("sft", name, process, after=3)
    process.kill()
    process.wait()
    *_, before, last = launcher.steps("sft", name)
    model = launcher.path("sft", name) / f"checkpoint-{last}" / "model.safetensors"
    with open(model, "r+b") as file:
        file.truncate(1000)
    assert launcher.finish("sft", name) == 0, launcher.output(name)
    assert f"checkpoint-{last} is left out, it is not complete: model.safetensors has 1000 bytes" in launcher.output(
        name
    )
    assert launcher.manifest("sft", name)["resumed"][0]["step"] == before
    assert_same_run(uninterrupted("sft"), launcher.path("sft", name))


@pytest.mark.slow
def test_without_a_whole_checkpoint_it_starts_anew(launcher, uninterrupted):
    name = "sft-none"
    process = launcher.start("sft", name)
    while not (launcher.path("sft", name) / "manifest.json").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    shutil.rmtree(launcher.path("sft", name) / "checkpoint-3", ignore_errors=True)
    assert launcher.finish("sft", name) == 0, launcher.output(name)
    assert "resumed" not in launcher.manifest("sft", name) and "resumes" not in launcher.output(name)
    assert sorted(p.name[:4] for p in launcher.path("sft", name).parent.glob("sft*")) == ["sft", "sft."]


@pytest.mark.slow
def test_a_disk_that_takes_no_more_gets_one_sentence_and_the_run_goes_on_later(launcher, uninterrupted):
    """A limit on the size of files stands in for a full disk: the optimizer's state, twice the model, is too large."""
    name = "sft-full"
    process = launcher.start("sft", name)
    launcher.wait_for_checkpoint("sft", name, process)
    process.kill()
    process.wait()
    path, step = launcher.path("sft", name), launcher.steps("sft", name)[-1]
    (launcher.folder / name / "output.txt").unlink()
    model = (path / f"checkpoint-{step}" / "model.safetensors").stat().st_size
    assert launcher.finish("sft", name, largest_file=model + 1000) == 2, launcher.output(name)
    (error,) = [line for line in launcher.output(name).splitlines() if "error: " in line]
    assert f"error: checkpoint-{step + 3} could not be written to " in error and "GiB are free there" in error
    assert f"earlier checkpoints are intact (last: checkpoint-{step})" in error
    assert "Traceback" not in launcher.output(name)
    assert not (path / f"checkpoint-{step + 3}").exists() and launcher.manifest("sft", name)["status"] == "failed"
    assert launcher.finish("sft", name) == 0, launcher.output(name)
    assert_same_run(uninterrupted("sft"), path)


@pytest.mark.slow
def test_a_final_model_that_cannot_be_written_leaves_nothing_half(launcher):
    name = "reward-full"
    options = ["reward.trainer.save_strategy=no", "reward.trainer.num_train_epochs=1"]
    assert launcher.finish("reward", name, *options, largest_file=100_000) == 2, launcher.output(name)
    assert "error: the final model could not be written to " in launcher.output(name)
    assert "there is no earlier checkpoint" in launcher.output(name)
    path = launcher.path("reward", name)
    assert not (path / ".final").exists() and not list(path.glob("*.safetensors"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_metrics_that_cannot_be_written_stop_the_run(tmp_path):
    run = SimpleNamespace(path=tmp_path, stage="sft", checkpoint=None)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    callback = RunCallback(run, trainer=None)
    with pytest.raises(RecipeError, match=r"metrics.jsonl could not be written to .*: No space left on device"):
        callback.on_log(None, SimpleNamespace(is_world_process_zero=True, global_step=1), None, {"loss": 1.0})


def test_lines_of_steps_that_come_again_are_dropped(tmp_path, caplog):
    """By size where the checkpoint has it; a line of the same step, written after the checkpoint, goes too."""
    run = SimpleNamespace(path=tmp_path, stage="ppo", checkpoint=tmp_path / "checkpoint-4")
    run.checkpoint.mkdir()
    rows = [{"step": s, "seconds": s / 2, "score_mean": s / 10, "kl": float(s)} for s in (2, 4)]
    write_jsonl(tmp_path / "metrics.jsonl", rows)
    write_jsonl(tmp_path / "completions.jsonl", [{"step": s, "prompt": "the film"} for s in (2, 4, 6)])
    kept = (tmp_path / "metrics.jsonl").read_bytes()
    state = SimpleNamespace(is_world_process_zero=True, global_step=4, max_steps=8)
    (tmp_path / "manifest.json").write_text("{}")
    RunCallback(run, trainer=None).on_checkpoint(run.checkpoint)
    for torn in ('{"step": 4, "seconds": 2.5, "eval_loss": 1.0}\n{"step": 6, "se', ""):
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write(torn)
        callback = RunCallback(run, trainer=None)
        callback.on_train_begin(None, state, None)
        assert (tmp_path / "metrics.jsonl").read_bytes() == kept
        assert callback.scores == [0.2, 0.4] and callback.last["kl"] == 4.0
        (run.checkpoint / "log_sizes.json").unlink(missing_ok=True)  # as earlier versions left it after a kill
    assert not caplog.records
    assert [row["step"] for row in lines(tmp_path / "completions.jsonl")] == [2, 4]
    callback.on_log(None, state, None, {"loss": 1.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["seconds"] >= 2.0


@pytest.mark.parametrize("harm", ["cut", "flip a digit", "break a line", "delete"])
def test_a_log_that_was_damaged_before_the_run_resumes_gets_a_warning(harm, tmp_path, caplog):
    run = SimpleNamespace(path=tmp_path, stage="ppo", checkpoint=tmp_path / "checkpoint-4")
    run.checkpoint.mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    file = write_jsonl(tmp_path / "metrics.jsonl", [{"step": s, "seconds": 1.0, "kl": 2.5} for s in (1, 2, 3, 4)])
    RunCallback(run, trainer=None).on_checkpoint(run.checkpoint)
    whole = file.read_bytes()
    harmed = {"cut": whole[:60], "flip a digit": whole.replace(b"2.5", b"2.7", 1)}
    harmed["break a line"] = whole[:50] + b"\xff" + whole[51:]
    file.unlink() if harm == "delete" else file.write_bytes(harmed[harm])
    state = SimpleNamespace(is_world_process_zero=True, global_step=4, max_steps=8)
    RunCallback(run, trainer=None).on_train_begin(None, state, None)
    assert "metrics.jsonl has been damaged or changed since checkpoint-4" in caplog.text
    kept = [row["step"] for row in lines(file)]
    assert kept == {"cut": [1], "flip a digit": [1, 2, 3, 4], "break a line": [1, 3, 4], "delete": []}[harm]


@pytest.mark.slow
def test_two_processes_at_one_run_are_refused(launcher):
    name = "sft-twice"
    first = launcher.start("sft", name, "sft.trainer.num_train_epochs=500")
    launcher.wait_for_checkpoint("sft", name, first)
    assert launcher.finish("sft", name, "sft.trainer.num_train_epochs=500") == 2
    assert f"process {first.pid} still works on this run" in launcher.output(name)
    assert first.poll() is None and launcher.manifest("sft", name)["status"] == "running"
    first.kill()
    first.wait()


@pytest.mark.slow
def test_two_ranks_go_on_stop_together_and_refuse_another_number(launcher):
    """DDP on the CPU: killed, then stopped by a signal to one rank only, then finished; as a run never stopped.

    5 rollouts of 4 steps and of 16 completions, 3 an epoch; the checkpoints lie within rollouts.
    """

    def port() -> int:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return free.getsockname()[1]

    assert launcher.finish("ppo", "two-whole", ranks=2, port=port()) == 0, launcher.output("two-whole")
    name = "two"
    ranks = launcher.start("ppo", name, ranks=2, port=port())
    launcher.wait_for_checkpoint("ppo", name, ranks[0])
    for process in ranks:
        process.kill()
        process.wait()
    killed_at = launcher.steps("ppo", name)[-1]
    assert launcher.finish("ppo", name) == 2
    assert "was saved by 2 processes with DDP, and this launch is 1 process" in launcher.output(name)
    # The model fits, the optimizer's state does not: only rank 0 writes it, both stop.
    both = launcher.start("ppo", name, ranks=2, port=port(), largest_file=140_000)
    for process in both:
        process.wait(60)
        assert process.returncode == 2, launcher.output(name)
    assert launcher.output(name).count("could not be written") == 1 and launcher.steps("ppo", name)[-1] == killed_at
    ranks = launcher.start("ppo", name, ranks=2, port=port())
    launcher.wait_for_checkpoint("ppo", name, ranks[0], after=killed_at)
    ranks[1].terminate()
    for process in ranks:
        process.wait(60)
        assert process.returncode == 143, launcher.output(name)
    assert launcher.manifest("ppo", name)["status"] == "stopped"
    assert launcher.finish("ppo", name, ranks=2, port=port()) == 0, launcher.output(name)
    assert len(launcher.manifest("ppo", name)["resumed"]) == 3
    assert_same_run(launcher.path("ppo", "two-whole"), launcher.path("ppo", name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch", "sent", "code", "status"),
    [
        (["rlhf_recipes.cli", "sft"], signal.SIGTERM, 143, "stopped"),
        (["rlhf_recipes.cli", "sft"], signal.SIGINT, 130, "stopped"),
        (["rlhf_recipes.cli", "sft"], signal.SIGHUP, 129, "stopped"),
        (["accelerate.commands.launch", "-m", "rlhf_recipes.sft", "--recipe"], signal.SIGTERM, -15, "stopped"),
    ],
)
def test_launchers_leave_no_orphan(launch, sent, code, status, launcher, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_RECIPES_ALLOW_CODE", str(launcher.folder))
    command = [sys.executable, "-m", *launch, "imdb_positive", *launcher.overrides, "sft.trainer.num_train_epochs=500"]
    with open(tmp_path / "output.txt", "w") as output:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output)
    path = tmp_path / "runs" / "imdb_positive" / "sft"
    while not any(path.glob(f"checkpoint-*/{MARKER}")):
        assert process.poll() is None, (tmp_path / "output.txt").read_text()
        time.sleep(0.1)
    process.send_signal(sent)
    assert process.wait(60) == code
    deadline = time.monotonic() + 20  # accelerate does not wait for what it has started
    while (manifest := json.loads((path / "manifest.json").read_text()))["status"] == "running":
        assert time.monotonic() < deadline, (tmp_path / "output.txt").read_text()
        time.sleep(0.1)
    assert manifest["status"] == status


def fail_under_a_signal(cwd: Path, overrides: list[str]) -> None:
    """A stage whose rank gets the launcher's SIGTERM when it is about to say in the manifest why it failed."""
    os.chdir(cwd)
    fail = Run.fail

    def interrupted(run, error):
        signal.raise_signal(signal.SIGTERM)
        fail(run, error)

    def main(run):
        raise RecipeError("no reward")

    Run.fail = interrupted
    sys.exit(import_module("rlhf_recipes.stage").run_stage("sft", main, "imdb_positive", overrides, False))


@pytest.mark.slow
def test_the_reason_of_a_failure_is_written_although_the_launcher_ends_all_ranks(launcher, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_RECIPES_ALLOW_CODE", str(launcher.folder))
    process = call(fail_under_a_signal, tmp_path, launcher.overrides)
    process.wait(60)
    manifest = json.loads((tmp_path / "runs" / "imdb_positive" / "sft" / "manifest.json").read_text())
    assert process.returncode == 2 and manifest["status"] == "failed" and "no reward" in manifest["error"]


class FailsOnce:
    """A reward function that draws random numbers, and raises when it is called for the `at`-th time."""

    __name__ = "fails_once"

    def __init__(self, at: int):
        self.at, self.calls = at, 0

    def __call__(self, completion_ids):
        self.calls += 1
        if self.calls == self.at:
            raise RuntimeError("no connection")
        return [len(ids) + random.random() for ids in completion_ids]


@pytest.mark.slow
@pytest.mark.parametrize("trainer_class", ALGORITHMS)
def test_the_same_trainer_goes_on_after_an_error(trainer_class, policy_folder, tmp_path):
    """As in a notebook: from within the second rollout, behind an error in the third."""
    settings = {"num_iterations": 4, "max_steps": 12, "save_strategy": "steps", "save_steps": 3}
    whole = make(trainer_class, policy_folder, tmp_path / "whole", FailsOnce(at=0), **settings)
    whole.train()
    trainer = make(trainer_class, policy_folder, tmp_path / "again", FailsOnce(at=3), **settings)
    with pytest.raises(RecipeError, match="no connection"):
        trainer.train()
    assert last_complete(tmp_path / "again").name == "checkpoint-6"
    trainer.train(resume_from_checkpoint=True)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name


@pytest.mark.slow
def test_evaluation_workers_chats_and_logged_columns_do_not_spoil_a_resume(tmp_path):
    """4 steps a rollout, 4 rollouts an epoch; a line only every 9 steps; an evaluation before the first and every 5."""

    def reward(completions, log_extra, log_metric):
        log_extra("words", [np.int64(len(c[0]["content"].split())) for c in completions])
        log_metric("draw", np.random.random())
        return [len(c[0]["content"]) + random.random() for c in completions]

    tokenizer = word_tokenizer(chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}")
    policy = save_pair(tmp_path / "policy", causal_lm(tokenizer), tokenizer)
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    settings = {
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "num_iterations": 2,
        "max_steps": 20,
        "logging_steps": 9,
        "log_completions": True,
        "eval_on_start": True,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "per_device_eval_batch_size": 4,
        "dataloader_num_workers": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }

    def train(name: str, resume: Path | None = None):
        trainer = make(PPOTrainer, policy, tmp_path / name, reward, chats, tokenizer, eval_dataset=chats, **settings)
        trainer.train(resume_from_checkpoint=resume and str(resume))
        lines = [
            {k: v for k, v in line.items() if not any(t in k for t in TIMES)} for line in trainer.state.log_history
        ]
        return trainer, [{k: v for k, v in line.items() if v == v} for line in lines[:-1]]

    whole, lines = train("whole")
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 5, 10, 15, 20] and len(lines) == 7
    for step in (6, 16, 18):  # within an epoch, at its end, and in the next one
        trainer, again = train(f"from-{step}", tmp_path / "whole" / f"checkpoint-{step}")
        assert again == lines
        for name, tensor in trainer.model.state_dict().items():
            assert torch.equal(tensor, whole.model.state_dict()[name]), (step, name)


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "global_step").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    (path / "global_step" / "rank_0.pt").write_bytes(b"states")
    mark_complete(path, {"num_processes": 1, "distributed_type": "NO"})
    return path


def flip(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[1000] ^= 1
    (path / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: (path / MARKER).unlink(), "saving it was interrupted"),
        (lambda path: (path / MARKER).write_text('{"files": '), "complete.json is damaged"),
        (lambda path: (path / MARKER).write_bytes(b"\xff\xfe"), "complete.json is damaged"),
        (lambda path: (path / MARKER).write_text("[]"), "complete.json is damaged"),
        (lambda path: (path / MARKER).write_text('{"files": ["a"]}'), "complete.json is damaged"),
        (lambda path: (path / MARKER).write_text('{"files": {"model.safetensors": 3}}'), "complete.json is damaged"),
        (lambda path: (path / "global_step" / "rank_0.pt").unlink(), "global_step/rank_0.pt is missing"),
        (lambda path: (path / "model.safetensors").write_bytes(b""), "has 0 bytes instead of 25600"),
        (flip, "the content of model.safetensors has changed"),
    ],
)
def test_the_last_whole_checkpoint_is_found(harm, said, tmp_path, caplog):
    assert last_complete(tmp_path) is None
    for step in (5, 20, 100):  # by number, not by name
        checkpoint(tmp_path, step)
    assert last_complete(tmp_path).name == "checkpoint-100" and not caplog.records
    harm(tmp_path / "checkpoint-100")
    assert last_complete(tmp_path).name == "checkpoint-20"
    assert "checkpoint-100" in caplog.text and said in caplog.text


def test_no_flipped_bit_in_the_marker_is_taken_for_whole(tmp_path):
    """The setup in it decides whether a run may resume."""
    marker = checkpoint(tmp_path, 5) / MARKER
    whole = marker.read_bytes()
    for position in range(len(whole)):
        for bit in (1, 4, 128):
            marker.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
            if last_complete(tmp_path) is not None:  # a blank became another blank
                found, saved = (json.loads(text) for text in (marker.read_bytes(), whole))
                assert (found["setup"], found["files"]) == (saved["setup"], saved["files"])


@pytest.mark.slow
def test_checkpoints_go_by_step_not_by_the_clock(policy_folder, tmp_path):
    """Each checkpoint looks a day older than the one before."""

    class ClockStepsBack(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            then = time.time() + 1e6 - 86400 * state.global_step
            os.utime(Path(args.output_dir) / f"checkpoint-{state.global_step}", (then, then))

    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    trainer = make(PPOTrainer, policy_folder, tmp_path, **settings)
    trainer.add_callback(ClockStepsBack())
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_the_second_ctrl_c_takes_effect_at_once_and_an_ignored_signal_stays_ignored():
    stop = StopCallback(SimpleNamespace())
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with pytest.raises(KeyboardInterrupt), stop.listening():
            signal.raise_signal(signal.SIGHUP)
            assert stop._asked is None
            signal.raise_signal(signal.SIGINT)
            assert stop._asked == signal.SIGINT
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_files_added_to_a_checkpoint_later_do_not_tear_it(tmp_path):
    (checkpoint(tmp_path, 5) / "log_sizes.json").write_text("{}")
    assert last_complete(tmp_path) is not None


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "manifest.json"
    write_whole(path, "old")
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        match = "the manifest could not be written to .*No space left on device"
        with pytest.raises(RecipeError, match=match), writing("the manifest", path):
            write_whole(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("error", "is_disk"),
    [
        (OSError(28, "No space left on device"), True),
        (ValueError("unable to write to file </torch_1>: No space left on device (28)"), True),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), True),
        (RuntimeError("Some tensors share memory"), False),
        (OSError("504 Gateway Timeout"), False),  # the network's errors are OSErrors too, without a number
    ],
)
def test_errors_that_are_not_the_disks_stay_what_they_are(error, is_disk, tmp_path):
    folder = tmp_path / "checkpoint-3"
    with pytest.raises(RecipeError if is_disk else type(error)) as caught, writing("checkpoint-3", folder):
        raise error
    assert is_disk == isinstance(caught.value, RecipeError)
