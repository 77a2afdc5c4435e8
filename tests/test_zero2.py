"""ZeRO-2 on two CPU processes: really in force, one run with DDP and one process, and exact when killed and resumed."""

import json
import multiprocessing
import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils.other import get_free_port
from conftest import HELD_OUT_REVIEWS, REVIEWS, bpe_tokenizer, causal_lm, run_python, save_pair, write_jsonl
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

PRELOADED = [
    "deepspeed",
    "trl.trainer.sft_trainer",
    "trl.trainer.reward_trainer",
    "rlhf_recipes.rloo_trainer",
    "rlhf_recipes.ppo_trainer",
    "rlhf_recipes.callbacks",
    "rlhf_recipes.checkpoints",
]
"""What takes seconds to import: a server does it once and forks the processes of these tests."""

CONFIGS = Path(__file__).parents[1] / "accelerate_configs"

TIMES = ("seconds", "runtime", "per_second")
"""In names of metrics that differ from run to run."""

OWN = """
import os
import random
import signal

from accelerate import PartialState
from rlhf_recipes.on_policy import OnPolicyTrainer

calls = 0


def score(completions, completion_ids):
    global calls
    calls += 1
    if calls == int(os.environ.get("KILLED_AT", "0")):
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(sum(ids) % 7) + 0.1 * len(ids) for ids in completion_ids]


def given(self, prompt_ids, images, multimodal_fields):
    first, completions = PartialState().process_index * len(prompt_ids), []
    for row, ids in enumerate(prompt_ids, start=first):
        draw = random.Random(f"{ids} {row} {self.state.global_step}")
        tokens = [draw.randrange(20, 200) for _ in range(draw.randint(1, 7))]
        completions.append([*tokens, self.eos_token_ids[0]][: self.max_completion_length])
    return completions


if "GIVEN" in os.environ:
    OnPolicyTrainer._generate_single_turn = given
"""
"""A user's own reward module. With GIVEN it puts ragged completions that follow from prompt, row and step in the place of
sampling, which differs from rank to rank; with KILLED_AT its process is killed in that call, as all ranks are."""


def as_rank(stage: str, arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
    """What a process does that `accelerate launch` would start; its output goes to `output.txt`."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [stage, "--recipe", "imdb_positive", *arguments]
    import_module("rlhf_recipes.entry").stage_command(stage, import_module(f"rlhf_recipes.{stage}").main)


def launched_environment(config: str) -> dict[str, str]:
    """The environment in which `accelerate launch --config_file CONFIG` starts its processes."""
    found, arguments = {}, ["--config_file", str(CONFIGS / f"{config}.yaml"), "-m", "rlhf_recipes.rloo"]

    def started(args):
        found.update(os.environ, WORLD_SIZE=str(args.nproc_per_node))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.run.run", started)
        launch_command(launch_command_parser().parse_args(arguments))
    return found


class Launcher:
    """Starts stages of a small recipe, each run in a folder of its own.

    Args:
        folder: Gets these folders.
        overrides: Of recipe imdb_positive.
    """

    def __init__(self, folder: Path, overrides: list[str]):
        self.folder, self.overrides = folder, overrides
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(PRELOADED)

    def run(self, config: str | None, stage: str, name: str, *more: str, **environment: str) -> list[int]:
        """Exit codes of the processes that a configuration asks for, None: one; forked instead of launched."""
        (self.folder / name).mkdir(exist_ok=True)
        variables = os.environ | {"WORLD_SIZE": "1"} if config is None else launched_environment(config)
        variables |= environment
        if config is not None:
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
            variables["LOCAL_WORLD_SIZE"] = variables["WORLD_SIZE"]
        started = []
        for rank in range(int(variables["WORLD_SIZE"])):
            of_rank = {} if config is None else {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            arguments = (stage, [*self.overrides, *more], self.folder / name, variables | of_rank)
            started.append(self.processes.Process(target=as_rank, args=arguments))
            started[-1].start()
        deadline = time.monotonic() + 120
        for process in started:
            process.join(max(0, deadline - time.monotonic()))
        hanging = [process for process in started if process.is_alive()]
        for process in hanging:
            process.kill()
            process.join()
        assert not hanging, self.output(name)
        return [process.exitcode for process in started]

    def launch(self, config: str, stage: str, name: str, *more: str, **environment: str):
        """`accelerate launch --config_file ... -m rlhf_recipes.<stage> ...`, as a user types it."""
        (self.folder / name).mkdir(exist_ok=True)
        return run_python(
            "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml"), "-m",
            f"rlhf_recipes.{stage}", "--recipe", "imdb_positive", *self.overrides, *more,
            cwd=self.folder / name, timeout=180, **environment,
        )  # fmt: skip

    def path(self, stage: str, name: str) -> Path:
        return self.folder / name / "runs" / "imdb_positive" / stage

    def output(self, name: str) -> str:
        return (self.folder / name / "output.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def launcher(tmp_path_factory) -> Launcher:
    folder = tmp_path_factory.mktemp("zero2")
    tokenizer = bpe_tokenizer()
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # it differs from rank to rank
    policy = save_pair(folder / "policy", causal_lm(tokenizer, **no_dropout), tokenizer)
    (folder / "imdb").mkdir()
    # Whole batches only: else a process would get some rows twice.
    more = [[row | {"text": row["text"].replace("the film", words)} for row in REVIEWS] for words in ("acting", "plot")]
    write_jsonl(folder / "imdb" / "train.jsonl", REVIEWS + more[0])
    write_jsonl(folder / "imdb" / "test.jsonl", HELD_OUT_REVIEWS + more[1][14:16])
    (folder / "own.py").write_text(OWN)
    every = "logging_steps: 1, save_steps: 3, max_grad_norm: 0.3"
    # Two rollouts of 8 completions, two passes over each: four optimizer steps, a checkpoint in the midst of the second.
    rollouts = (
        f"{every}, num_iterations: 2, num_generations: 2, max_completion_length: 6, beta: 0.1, kl_target: 0.5, "
        "kl_horizon: 20, lr_kl_target: 0.02, normalize_scores: true"
    )
    return Launcher(
        folder,
        [
            *(f"{stage}.model={policy}" for stage in ("sft", "reward")),
            *(f"{stage}.policy={policy}" for stage in ("ppo", "rloo")),
            *(f"{stage}.trainer={{{every}, max_length: 32, max_steps: 3}}" for stage in ("sft", "reward")),
            f"rloo.trainer={{{rollouts}}}",
            f"ppo.trainer={{{rollouts}, ent_coef: 0.1, vf_coef: 0.5, whiten_rewards: true}}",
            f"reward_funcs=[{{name: '{folder}/own.py:score'}}]",
            "missing_eos={mode: subtract, value: 1.0}",
            f"data.path={folder / 'imdb'}",
            "data.prompt_tokens=[2, 4]",
            "episodes=16",
        ],
    )


CASES = {
    "sft": ("sft", ()),
    "reward": ("reward", ()),
    "rloo": ("rloo", ()),
    "ppo-shared": ("ppo", ()),
    "ppo-separate": ("ppo", ("ppo.value_model=policy",)),
}

CUTS = {None: (8, 1), "cpu_ddp_2": (4, 1), "cpu_zero2_2": (2, 2)}
"""Rows a micro-batch and micro-batches an optimizer step of one process: 8 rows a step in all of them."""


def equal_settings(stage: str, config: str | None) -> list[str]:
    size, accumulation = CUTS[config]
    return [
        f"{stage}.trainer.per_device_train_batch_size={size}",
        f"{stage}.trainer.gradient_accumulation_steps={accumulation}",
        # Not Adam: a gradient of 0 that is 1e-9 by rounding (of attention's key bias) moves it by a whole step.
        f"{stage}.trainer.optim=sgd",
        f"{stage}.trainer.learning_rate=0.05",
        f"{stage}.trainer.lr_scheduler_type=constant",
    ]
