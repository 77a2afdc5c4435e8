"""Two processes are one run: the same losses, gradients, weights and metrics, and none hangs when the other fails."""

import random
import threading
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from rlhf_recipes import PPOTrainer, RLOOTrainer
from support.processes import run_python
from support.ranks import two_ranks
from support.texts import REVIEWS, write_jsonl
from support.tiny_models import word_tokenizer
from support.tiny_trainers import make, sum_of_ids

pytestmark = pytest.mark.slow

PROMPTS = ["the film", "i liked the movie and", "it was", "a very good plot", "the acting", "bad", "i hated it",
           "a fun movie"]  # fmt: skip

UNSCORED, UNSCORED_ROWS = word_tokenizer().convert_tokens_to_ids("!"), (6, 7)
"""What a completion begins with that no reward function applies to, and which do: all of them the second rank's."""

TIMES = ("seconds_", "episodes_per_second")

CASES = {
    "ppo-shared": (PPOTrainer, {"num_generations": 1}),
    "ppo-separate": (PPOTrainer, {"num_generations": 2, "value_model": "policy", "value_warmup_steps": 1}),
    # Half the KL of the update that both processes measure together: one of them alone would keep its learning rate.
    "rloo": (RLOOTrainer, {"num_generations": 2, "lr_kl_target": 0.022}),
    # One prompt for all 8 completions: its group lies across both processes.
    "rloo-across": (RLOOTrainer, {"num_generations": 8, "normalize_advantages": True}),
    "reinforce": (RLOOTrainer, {"num_generations": 2, "baseline": "moving_average"}),
}

LAYOUTS = {"whole": (8, 1), "cut": (2, 4)}
"""Completions a micro-batch and micro-batches a step, of one process; two processes have (2, 2)."""


def score(completion_ids, **kwargs):
    values = sum_of_ids(completion_ids)
    return [None if ids[0] == UNSCORED else value for ids, value in zip(completion_ids, values, strict=True)]


def bonus(completion_ids, finished, **kwargs):
    return [
        float(len(ids)) if end and ids[0] != UNSCORED else None
        for ids, end in zip(completion_ids, finished, strict=True)
    ]


def give_completions(trainer) -> None:
    """In place of sampling: ragged completions that follow from the prompt, the row in the rollout and the step."""

    def generate(prompt_ids, images, multimodal_fields):
        eos, completions = trainer.eos_token_ids[0], []
        for i, ids in enumerate(prompt_ids):
            row = trainer.accelerator.process_index * len(prompt_ids) + i
            draw = random.Random(f"{ids} {row} {trainer.state.global_step}")
            tokens = [draw.randrange(5, 25) for _ in range(draw.randint(1, 9))]
            tokens[0] = UNSCORED if row in UNSCORED_ROWS else 5
            completions.append([*tokens, eos][: trainer.max_completion_length])
        return completions

    trainer._generate_single_turn = generate


class Recorder(TrainerCallback):
    """Keeps every optimizer step's gradients, as the optimizer gets them."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        inner = getattr(model, "module", model)
        self.gradients.append({n: p.grad.clone() for n, p in inner.named_parameters() if p.grad is not None})


def train(case: str, policy: Path, folder: Path, size: int, accumulation: int, given: bool = True) -> dict:
    """Two rollouts of 8 completions, two passes over each: four optimizer steps; returns what came of them."""
    trainer_class, more = CASES[case]
    settings = {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulation,
        "num_iterations": 2,
        "max_steps": 4,
        "max_completion_length": 8,
        "beta": 0.1,
        "kl_target": 0.5,
        "kl_horizon": 20,
        "lr_kl_target": 1e-4,
        "normalize_scores": True,
        "missing_eos": {"mode": "subtract", "value": 1.0},
        "reward_weights": [1.0, 0.5],
        # Not Adam: a gradient of 0 that is 1e-9 by rounding (of attention's key bias) moves it by a whole step.
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
    }
    if trainer_class is PPOTrainer:
        settings |= {"whiten_rewards": True, "ent_coef": 0.1, "vf_coef": 0.5, "cliprange_value": 0.05}
    calls = []

    def counted(**columns):
        calls.append(len(columns["completions"]))
        return score(**columns)

    counted.__name__ = "score"
    trainer = make(trainer_class, policy, folder, [counted, bonus], PROMPTS, **settings | more)
    if given:
        give_completions(trainer)
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    return {
        "world_size": trainer.accelerator.num_processes,
        "wrapped": type(trainer.model_wrapped).__name__,
        "gradients": recorder.gradients,
        "weights": dict(trainer.model.state_dict()),
        "lines": [
            {name: value for name, value in line.items() if not name.startswith(TIMES)}
            for line in trainer.state.log_history
            if "train_runtime" not in line
        ],
        "calls": calls,
        "batch": trainer._micro_batches.rollout,
        "state": (trainer.beta, trainer._kl.lr_factor, vars(trainer._run_state.score_moments)),
    }


# Processes


# One batch, however many processes it is cut into


def train_all(rank: int, folder: Path, policy: Path) -> None:
    results = {case: train(case, policy, folder / case, 2, 2) for case in CASES}
    results["sampled"] = train("rloo-across", policy, folder / "sampled", 2, 2, given=False)
    torch.save(results, folder / f"results-{rank}.pt")


@pytest.fixture(scope="module")
def of_ranks(policy_folder, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    codes, outputs = two_ranks(train_all, folder, policy_folder, seconds=180)
    assert codes == [0, 0], outputs
    return [torch.load(folder / f"results-{rank}.pt") for rank in (0, 1)]


def assert_close(one: dict, other: dict, what: str) -> None:
    """Tensors by name, to 1e-5 of the largest entry of all of them."""
    assert one.keys() == other.keys()
    scale = max(tensor.abs().max().item() for tensor in one.values())
    for name, tensor in one.items():
        difference = (tensor - other[name]).abs().max().item()
        assert difference <= 1e-5 * max(scale, 1e-3), (what, name, difference, scale)


@pytest.mark.parametrize("case", CASES)
def test_one_batch_however_it_is_cut(case, of_ranks, policy_folder, tmp_path):
    """(8, 1) == (2, 4) == 2 processes x (2, 2): every gradient, the weights, and every metric to 1e-4 of its value."""
    expected = train(case, policy_folder, tmp_path / "whole", *LAYOUTS["whole"])
    cut = train(case, policy_folder, tmp_path / "cut", *LAYOUTS["cut"])
    ranks = [results[case] for results in of_ranks]
    assert [result["world_size"] for result in ranks] == [2, 2]
    assert [result["wrapped"] for result in ranks] == ["DistributedDataParallel"] * 2
    for got, calls in ((cut, [8, 8]), (ranks[0], [4, 4]), (ranks[1], [4, 4])):
        assert got["calls"] == calls and len(got["gradients"]) == 4
        for step, gradients in enumerate(expected["gradients"]):
            assert_close(gradients, got["gradients"][step], f"gradient of step {step}")
        assert_close(expected["weights"], got["weights"], "weights")
        for line, expected_line in zip(got["lines"], expected["lines"], strict=True):
            assert line == pytest.approx(expected_line, rel=1e-4, abs=1e-6, nan_ok=True), line["step"]
    # What must be the same on both ranks is so to the last bit, or they would part.
    assert ranks[0]["lines"] == ranks[1]["lines"] and ranks[0]["state"] == ranks[1]["state"]
    for name, tensor in ranks[0]["weights"].items():
        assert torch.equal(tensor, ranks[1]["weights"][name]), name
    # The test is worth something: policy, beta and learning rate have moved, something was clipped, some had no score.
    second = expected["lines"][2]
    assert second["episodes"] == 16 and second["beta"] != 0.1
    # In the warm-up's rollout the policy has not moved before its last step, so that there is nothing to adapt to.
    assert abs(second["kl"]) > 1e-3 and (second["learning_rate"] == 0.05) == ("value_warmup_steps" in CASES[case][1])
    assert any(line["clip_fraction"] > 0 for line in expected["lines"])
    assert ranks[1]["batch"]["advantages"][-2:].abs().sum() == 0 < ranks[0]["batch"]["advantages"].abs().sum()


@pytest.mark.parametrize("case", ["ppo-shared", "ppo-separate"])
def test_advantages_are_whitened_over_all_ranks(case, of_ranks):
    batches = [results[case]["batch"] for results in of_ranks]
    tokens = [batch["advantages"][batch["loss_mask"].bool()] for batch in batches]
    together = torch.cat(tokens)
    assert together.mean().item() == pytest.approx(0, abs=1e-5)
    assert together.var(correction=0).item() == pytest.approx(1, abs=1e-4)
    for alone in tokens:
        assert abs(alone.mean().item()) > 1e-2


def test_ranks_sample_different_completions_of_one_prompt(of_ranks):
    batches = [results["sampled"]["batch"] for results in of_ranks]
    prompts, completions = (
        [
            [row[mask.bool()].tolist() for row, mask in zip(b[f"{name}_ids"], b[f"{name}_mask"], strict=True)]
            for b in batches
        ]
        for name in ("prompt", "completion")
    )
    assert prompts[0] == prompts[1] and completions[0] != completions[1]


# A rank that fails


def hang(completions):
    threading.Event().wait(600)


BAD = {
    "raises": (lambda completions: 1 / 0, "raised ZeroDivisionError: division by zero"),
    "nan": (lambda completions: [float("nan")] * len(completions), "returned nan for sample 0"),
    "count": (lambda completions: [1.0], "returned 1 values for 4 completions"),
    "hangs": (hang, "did not answer within 0.5 s"),
}


def train_with_a_bad_rank(rank: int, folder: Path, policy: Path, trainer_class: type, kind: str) -> None:
    def my_reward(completions):
        return BAD[kind][0](completions) if rank == 1 else [1.0] * len(completions)

    make(trainer_class, policy, folder / "out", my_reward, per_device_train_batch_size=4, reward_timeout=0.5).train()


@pytest.mark.parametrize(
    ("trainer_class", "kind"),
    [(PPOTrainer, "raises"), (RLOOTrainer, "nan"), (RLOOTrainer, "count"), (PPOTrainer, "hangs")],
)
def test_a_reward_function_that_fails_on_one_rank_stops_both_with_its_message(
    trainer_class, kind, policy_folder, tmp_path
):
    codes, outputs = two_ranks(train_with_a_bad_rank, tmp_path / "bad", policy_folder, trainer_class, kind, seconds=60)
    assert 0 not in codes
    for output in outputs:
        last = output.strip().splitlines()[-1]
        assert "RewardError: reward function 'my_reward'" in last and BAD[kind][1] in last and "(process 1)" in last


def test_accelerate_launch_ends_when_a_reward_function_hangs_on_one_rank(bpe_policy_folder, tmp_path):
    """As a user starts it: the message comes first, and the manifest says what happened."""
    (tmp_path / "own.py").write_text(
        "import os, time\n\n\ndef slow(completions):\n    if os.environ['RANK'] == '1':\n        time.sleep(600)\n"
        "    return [0.0] * len(completions)\n"
    )
    (tmp_path / "two.yaml").write_text(
        "distributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: 2\nmixed_precision: 'no'\nuse_cpu: false\n"
        "main_process_port: 0\n"
    )
    (tmp_path / "imdb").mkdir()
    for split in ("train", "test"):
        write_jsonl(tmp_path / "imdb" / f"{split}.jsonl", REVIEWS)
    done = run_python(
        "-m", "accelerate.commands.launch", "--config_file", "two.yaml", "-m", "rlhf_recipes.rloo",
        "--recipe", "imdb_positive", f"rloo.policy={bpe_policy_folder}",
        "reward_funcs=[{name: 'own.py:slow', timeout: 1}]",
        "rloo.trainer={per_device_train_batch_size: 4, num_generations: 4, max_completion_length: 6}",
        f"data.path={tmp_path / 'imdb'}", "data.prompt_tokens=[2, 4]", "episodes=16", cwd=tmp_path, timeout=90,
    )  # fmt: skip
    assert done.returncode != 0
    said = "reward function 'slow' did not answer within 1 s"
    announced, first, *_ = done.stderr.splitlines()
    assert announced.startswith(f"your code runs: {tmp_path}/own.py") and done.stderr.count("your code runs") == 1
    assert f"error: {said}" in first, done.stderr  # before what the launcher has to say
    manifest = (tmp_path / "runs" / "imdb_positive" / "rloo" / "manifest.json").read_text()
    assert '"status": "failed"' in manifest and said in manifest
