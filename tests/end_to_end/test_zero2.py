"""DeepSpeed on two CPU processes: really in force, one run with DDP and one process, and exact when killed and resumed."""

import json
import os
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils.other import get_free_port
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from support.places import ROOT
from support.processes import TIMES, become_stage, call, run_python
from support.ranks import wait_or_kill
from support.texts import HELD_OUT_REVIEWS, REVIEWS, write_jsonl
from support.tiny_models import bpe_tokenizer, causal_lm, save_pair

pytestmark = pytest.mark.slow

CONFIGS = ROOT / "accelerate_configs"

OWN = """
import os
import random
import signal

from accelerate import PartialState
from rlhf_recipes.trainers.on_policy import OnPolicyTrainer

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


def launched_environment(config: str) -> dict[str, str]:
    """The environment in which `accelerate launch --config_file CONFIG` starts its processes."""
    found, arguments = {}, ["--config_file", str(CONFIGS / f"{config}.yaml"), "-m", "rlhf_recipes.rloo"]
    before = dict(os.environ)

    def started(args):
        found.update(os.environ, WORLD_SIZE=str(args.nproc_per_node))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.run.run", started)
        launch_command(launch_command_parser().parse_args(arguments))
    os.environ.clear()
    os.environ.update(before)
    return found


class Launcher:
    """Starts stages of a small recipe, each run in a folder of its own.

    Args:
        folder: Gets these folders.
        overrides: Of recipe imdb_positive.
    """

    def __init__(self, folder: Path, overrides: list[str]):
        self.folder, self.overrides = folder, overrides

    def run(self, config: str | None, stage: str, name: str, *more: str, **environment: str) -> list[int]:
        """Exit codes of the processes that a configuration asks for, None: one; forked instead of launched."""
        (self.folder / name).mkdir(exist_ok=True)
        variables = os.environ | {"WORLD_SIZE": "1"} if config is None else launched_environment(config)
        variables |= {"RLHF_RECIPES_ALLOW_CODE": str(self.folder)} | environment  # own.py is beside the stages' folders
        if config is not None:
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
            variables["LOCAL_WORLD_SIZE"] = variables["WORLD_SIZE"]
        started = []
        for rank in range(int(variables["WORLD_SIZE"])):
            of_rank = {} if config is None else {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            arguments = ["imdb_positive", *self.overrides, *more]
            started.append(call(become_stage, stage, arguments, self.folder / name, variables | of_rank))
        assert not wait_or_kill(started, 120), self.output(name)
        return [process.returncode for process in started]

    def launch(self, config: str, stage: str, name: str, *more: str, **environment: str):
        """`accelerate launch --config_file ... -m rlhf_recipes.<stage> ...`, as a user types it."""
        (self.folder / name).mkdir(exist_ok=True)
        return run_python(
            "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml"), "-m",
            f"rlhf_recipes.{stage}", "--recipe", "imdb_positive", *self.overrides, *more,
            cwd=self.folder / name, timeout=180, **{"RLHF_RECIPES_ALLOW_CODE": str(self.folder)} | environment,
        )  # fmt: skip

    def zero3(self) -> str:
        """A configuration of ZeRO-3 with no weight so small that it is left whole on every process."""
        config = {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {
                "stage": 3,
                "stage3_gather_16bit_weights_on_model_save": True,
                "stage3_param_persistence_threshold": 0,
            },
        }
        (self.folder / "zero3.json").write_text(json.dumps(config))
        (self.folder / "zero3.yaml").write_text(
            f"distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: {self.folder}/zero3.json\n"
            "gpu_ids: '-1,-1'\nnum_machines: 1\nnum_processes: 2\nmain_process_port: 0\nuse_cpu: false\n"
        )
        return str(self.folder / "zero3")

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
    every = "logging_steps: 1, save_steps: 3, max_grad_norm: 0.2"
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


LORA = "{r: 4, lora_dropout: 0.0}"
NF4 = "{load_in_4bit: true, bnb_4bit_quant_type: nf4}"

CASES = {
    "sft": ("sft", ()),
    "reward": ("reward", ()),
    "rloo": ("rloo", ()),
    "ppo-shared": ("ppo", ()),
    "ppo-separate": ("ppo", ("ppo.value_model=policy",)),
    "rloo-lora": ("rloo", (f"rloo.peft={LORA}",)),
    "ppo-lora": ("ppo", (f"ppo.peft={LORA}",)),
    "rloo-4bit": ("rloo", (f"rloo.peft={LORA}", f"rloo.quantization={NF4}")),
    "ppo-4bit": ("ppo", (f"ppo.peft={LORA}", f"ppo.quantization={NF4}", "ppo.value_model=policy")),
}

LAUNCHED = ("sft", "reward", "rloo", "ppo-shared", "ppo-separate")
"""Cases whose ZeRO-2 run goes through `accelerate launch`: each stage."""

DDP, ZERO2 = "cpu_ddp_2", "cpu_zero2_2"

CUTS = {None: (8, 1), DDP: (4, 1), ZERO2: (2, 2)}
"""Rows a micro-batch and micro-batches an optimizer step of one process: 8 rows a step in all of them."""

PER_CUT = ("min_reward", "max_reward")
"""In names of metrics that TRL takes of every micro-batch."""


def settings(case: str, config: str | None) -> list[str]:
    stage, more = CASES[case]
    size, accumulation = CUTS[config]
    batch = [f"{stage}.trainer.gradient_accumulation_steps={accumulation}"]
    if config == ZERO2:  # accumulation follows
        batch = [f"{stage}.global_batch_size=8"]
    return [
        *more,
        f"{stage}.trainer.per_device_train_batch_size={size}",
        *batch,
        # Not Adam: a gradient of 0 that is 1e-9 by rounding (of attention's key bias) moves it by a whole step.
        f"{stage}.trainer.optim=sgd",
        f"{stage}.trainer.learning_rate=0.05",
        f"{stage}.trainer.lr_scheduler_type=constant",
    ]


def lines(path: Path) -> list[dict]:
    """A jsonl file, without what is measured in seconds."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if not any(part in key for part in TIMES)} for row in rows]


def weights(path: Path) -> dict[str, torch.Tensor]:
    """All that a finished run has trained, by file and name."""
    files = [*path.glob("*.safetensors"), *path.glob("value_model/*.safetensors")]
    assert files
    return {f"{file.relative_to(path)}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


def size_of_shard(checkpoint: Path, rank: int) -> int:
    """Numbers in a rank's part of the weights that are trained, as ZeRO-2 keeps them and their optimizer states."""
    (file,) = checkpoint.glob(f"global_step*/*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    state = torch.load(file, weights_only=False)["optimizer_state_dict"]
    assert state["zero_stage"] == 2 and set(state["partition_count"]) == {2}
    assert all(part.dtype == torch.float32 for part in state["single_partition_of_fp32_groups"])
    parts = [len(part) for part in state["single_partition_of_fp32_groups"]]
    for of_group, part in zip(state["base_optimizer_state"]["state"].values(), parts, strict=False):
        for moment in {"exp_avg", "exp_avg_sq"} & of_group.keys():
            assert 0 <= len(of_group[moment]) - part < 8, moment  # the last rank's has some padding
    return sum(parts)


def assert_setup(checkpoint: Path, config: str | None) -> None:
    """A checkpoint shows how many processes trained, and with what."""
    ranks = {None: 1, DDP: 2, ZERO2: 2}[config]
    assert len([*checkpoint.glob("since_last_log_*.pt")]) == ranks
    assert (checkpoint / "optimizer.pt").exists() == (config != ZERO2)
    if config == ZERO2:
        assert len([*checkpoint.glob("global_step*/*_optim_states.pt")]) == 2
        shards = [size_of_shard(checkpoint, rank) for rank in (0, 1)]
        (file,) = checkpoint.glob("global_step*/mp_rank_00_model_states.pt")
        shapes = torch.load(file, weights_only=False)["param_shapes"]
        trained = {name: shape.numel() for group in shapes for name, shape in group.items()}
        assert sum(shards) == sum(trained.values()) and abs(shards[0] - shards[1]) < 0.01 * sum(shards)
        # One engine has them both.
        assert any("value_network" in name for name in trained) == ("ppo" in checkpoint.parts)
        assert not all("value_network" in name for name in trained)


def trained(launcher: Launcher, case: str, config: str | None, kind: str = "", *more: str, **environment: str) -> Path:
    """The folder of a finished run with given completions; each is run once."""
    stage, name = CASES[case][0], f"{case}-{config}{kind}"
    path, arguments = launcher.path(stage, name), [*settings(case, config), *more]
    if path.exists():
        return path
    if config == ZERO2 and case in LAUNCHED and not kind:
        done = launcher.launch(config, stage, name, *arguments, GIVEN="1")
        assert done.returncode == 0 and "mismatch" not in done.stderr, done.stderr
    else:
        codes = launcher.run(config, stage, name, *arguments, GIVEN="1", **environment)
        assert set(codes) == {0}, launcher.output(name)
    return path


def assert_one_run(path: Path, other: Path) -> None:
    """To float tolerance: losses, gradient norms, learning rates, all other metrics, and what is saved."""
    expected, found = weights(path), weights(other)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert (tensor - expected[name]).abs().max() < 1e-6, name
    for pair in zip(*(lines(folder / "metrics.jsonl") for folder in (other, path)), strict=True):
        line, expected_line = ({k: x[k] for k in x if not k.endswith(PER_CUT)} for x in pair)
        assert line == pytest.approx(expected_line, rel=1e-4, abs=1e-5), line["step"]


@pytest.mark.parametrize("case", CASES)
def test_zero2_is_ddp_is_one_process(case, launcher):
    stage = CASES[case][0]
    one, *others = (trained(launcher, case, config) for config in CUTS)
    expected, expected_lines = weights(one), lines(one / "metrics.jsonl")
    for path, config in zip((one, *others), CUTS, strict=True):
        assert_setup(path / "checkpoint-3", config)
        assert_one_run(one, path)
    # The test is worth something: gradients were clipped, weights and learning rate have moved.
    assert max(line.get("grad_norm", 0) for line in expected_lines) > 0.2
    if stage in ("rloo", "ppo"):
        assert expected_lines[2]["learning_rate"] != 0.05 and expected_lines[2]["beta"] != 0.1
    if "model.safetensors" in {name.split(":")[0] for name in expected}:
        start = weights(launcher.folder / "policy")
        moved = [(tensor - start[name]).abs().max() for name, tensor in expected.items() if name in start]
        assert len(moved) >= 28 and max(moved) > 1e-4
    if case in ("ppo-separate", "ppo-4bit"):
        start = weights(launcher.folder / "policy")
        value_model = AutoModelForSequenceClassification.from_pretrained(others[-1] / "value_model")
        layers = {f"model.safetensors:transformer.{n}": t for n, t in value_model.base_model.named_parameters()}
        assert layers.keys() == start.keys()
        assert max((layers[name] - tensor).abs().max() for name, tensor in start.items()) > 1e-5
        assert value_model.score.weight.abs().max() > 1e-3  # it begins at 0


@pytest.mark.parametrize(
    ("case", "zero", "precision"),
    [("rloo", 2, "bf16"), ("ppo-separate", 2, "no"), ("ppo-lora", 2, "no"), ("ppo-shared", 3, "no")],
)
def test_killed_in_a_rollout_it_ends_as_if_never_stopped(case, zero, precision, launcher):
    """kill -9 of all ranks; the checkpoint is of the third of a rollout's four steps. Sampling is real here, and Adam.

    In bf16, too: a checkpoint has the weights in float32 that DeepSpeed keeps.
    """
    stage, more = CASES[case]
    settings = [
        *more,
        "episodes=16",
        f"{stage}.trainer.per_device_train_batch_size=2",
        f"{stage}.trainer.steps_per_generation=2",
        f"{stage}.trainer.learning_rate=1e-3",
        f"{stage}.trainer.sampling_batch_size=3",  # of 4
        f"{stage}.trainer.bf16={str(precision == 'bf16').lower()}",
    ]
    config, environment = ZERO2 if zero == 2 else launcher.zero3(), {"ACCELERATE_MIXED_PRECISION": precision}
    whole, killed = launcher.path(stage, f"{case}-whole"), launcher.path(stage, f"{case}-killed")
    codes = launcher.run(config, stage, f"{case}-whole", *settings, **environment)
    assert codes == [0, 0], launcher.output(f"{case}-whole")
    assert launcher.run(config, stage, f"{case}-killed", *settings, KILLED_AT="2", **environment) == [-9, -9]
    assert [path.name for path in killed.glob("checkpoint-*")] == ["checkpoint-3"]
    codes = launcher.run(config, stage, f"{case}-killed", *settings, **environment)
    assert codes == [0, 0], launcher.output(f"{case}-killed")
    assert "MA " not in launcher.output(f"{case}-whole")  # of DeepSpeed's memory statistics
    manifest = json.loads((killed / "manifest.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in manifest["resumed"]] == [3]
    for path in (whole, killed) if zero == 2 else ():
        assert_setup(path / "checkpoint-8", ZERO2)
    assert manifest["setup"]["zero_stage"] == zero
    expected, found = weights(whole), weights(killed)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    expected_lines = lines(whole / "metrics.jsonl")
    assert lines(killed / "metrics.jsonl") == expected_lines and len(expected_lines) == 8
    assert lines(killed / "completions.jsonl") == lines(whole / "completions.jsonl")
    assert len({line["grad_norm"] for line in expected_lines}) > 4


@pytest.mark.parametrize("case", ["rloo", "ppo-separate"])
def test_bf16(case, launcher):
    """Numbers are near those of float32."""
    expected = trained(launcher, case, None)
    more = f"{CASES[case][0]}.trainer.bf16=true"
    found = trained(launcher, case, ZERO2, "-bf16", more, ACCELERATE_MIXED_PRECISION="bf16")
    exact = weights(expected)
    for name, tensor in weights(found).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.allclose(tensor.float(), exact[name], rtol=2**-7, atol=1e-3), name
    for line, exact_line in zip(*(lines(path / "metrics.jsonl") for path in (found, expected)), strict=True):
        for metric in {"loss", "grad_norm", "policy_loss", "score_mean", "entropy", "value_loss"} & exact_line.keys():
            assert line[metric] == pytest.approx(exact_line[metric], rel=0.05, abs=0.02), metric


@pytest.mark.parametrize("case", ["sft", "reward", "rloo", "ppo-shared", "ppo-separate", "ppo-lora"])
def test_zero3_is_one_process(case, launcher):
    stage, name = CASES[case][0], f"{case}-zero3"
    codes = launcher.run(launcher.zero3(), stage, name, *settings(case, ZERO2), GIVEN="1")
    assert codes == [0, 0], launcher.output(name)
    found = launcher.path(stage, name)
    assert_one_run(trained(launcher, case, None), found)
    assert len([*found.glob("checkpoint-3/global_step3/zero_pp_rank_?_mp_rank_00_model_states.pt")]) == 2


def test_zero3_with_a_reward_model(launcher):
    """As reward function each process has it whole, though transformers would spread it; as value network it is spread."""
    model = trained(launcher, "reward", None)
    functions = f"{{name: reward_model, args: {{model: {model}}}}}, {{name: '{launcher.folder}/own.py:score'}}"
    more = [f"ppo.value_model={model}", f"reward_funcs=[{functions}]"]
    codes = launcher.run(launcher.zero3(), "ppo", "rm-zero3", *settings("ppo-shared", ZERO2), *more, GIVEN="1")
    assert codes == [0, 0], launcher.output("rm-zero3")
    assert_one_run(trained(launcher, "ppo-shared", None, "-rm", *more), launcher.path("ppo", "rm-zero3"))


def test_the_best_checkpoint_is_what_is_saved(launcher):
    """With evaluation during training; the first is made the best one, as none but it tells whether it was loaded."""
    more = (
        "max_steps: 4, save_steps: 2, eval_strategy: steps, eval_steps: 2, load_best_model_at_end: true, "
        "metric_for_best_model: eval_loss, greater_is_better: true, save_total_limit: 5"
    )
    codes = launcher.run(ZERO2, "sft", "best", *settings("sft", ZERO2), f"sft.trainer={{{more}}}")
    assert codes == [0, 0], launcher.output("best")
    path = launcher.path("sft", "best")
    best, last, saved = (weights(folder) for folder in (path / "checkpoint-2", path / "checkpoint-4", path))
    assert all(torch.equal(saved[name], tensor) for name, tensor in best.items())
    assert not all(torch.equal(last[name], tensor) for name, tensor in best.items())
    assert [line["step"] for line in lines(path / "metrics.jsonl") if "eval_loss" in line][:2] == [2, 4]


def test_value_warmup_is_refused_under_deepspeed(launcher):
    codes = launcher.run(ZERO2, "ppo", "warm", *settings("ppo-shared", ZERO2), "ppo.trainer.value_warmup_steps=1")
    assert codes == [2, 2]
    assert (
        "error: ppo.trainer.value_warmup_steps is 1, but an optimizer step of DeepSpeed or FSDP changes all"
        in launcher.output("warm")
    )


def test_zero3_that_would_save_no_whole_model_is_refused(launcher):
    codes = launcher.run(ZERO2, "rloo", "parts", *settings("rloo", ZERO2), ACCELERATE_DEEPSPEED_ZERO_STAGE="3")
    assert codes == [2, 2]
    assert "set zero3_save_16bit_model: true under deepspeed_config" in launcher.output("parts")
