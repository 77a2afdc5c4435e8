"""A launch is what was asked for, or nothing is trained."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from rlhf_recipes import stage as entry
from rlhf_recipes.launch import checks
from rlhf_recipes.launch import setup as distributed
from rlhf_recipes.launch.checks import check_launch, check_setup, require_same
from rlhf_recipes.launch.setup import Setup, launched
from rlhf_recipes.recipe.schema import RecipeError
from support.places import ROOT
from support.processes import run_python
from support.texts import REVIEWS, write_jsonl

CONFIGS = ROOT / "accelerate_configs"

VARIABLES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE",
             "RLHF_RECIPES_LAUNCH", "ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_CPU")  # fmt: skip


@pytest.fixture
def launch(monkeypatch):
    """Makes this process look as if `accelerate launch` had started it, in the environment that it was given."""

    def make(*command: str, processes: int = 1, **variables: str) -> None:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        variables |= {"ACCELERATE_MIXED_PRECISION": "no"}
        if processes > 1:
            variables |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        words = ["python", "/bin/accelerate", "launch", *command, "-m", "rlhf_recipes.ppo", "--recipe", "imdb_tiny"]
        monkeypatch.setattr(distributed.psutil, "Process", lambda pid: SimpleNamespace(cmdline=lambda: words))

    return make


def config(folder: Path, **keys) -> str:
    path = folder / "own.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()))
    return str(path)


DDP = {
    "distributed_type": "MULTI_GPU",
    "num_machines": 1,
    "num_processes": 2,
    "mixed_precision": "no",
    "use_cpu": False,
}
ZERO = DDP | {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}}
OF_ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


def test_what_was_asked_for_is_read_off_the_launcher(launch, tmp_path):
    launch("--config_file", config(tmp_path, **ZERO))
    wanted = distributed.asked()
    assert (wanted.num_processes, wanted.kind, wanted.zero_stage, wanted.mixed_precision) == (2, "DEEPSPEED", 2, "no")
    launch(
        "--config_file", config(tmp_path, **DDP), "--num_processes", "4", "--mixed_precision=bf16", "--gpu_ids", "all"
    )
    wanted = distributed.asked()  # the command line beats the file
    assert (wanted.num_processes, wanted.kind, wanted.mixed_precision, wanted.gpu_ids) == (4, "MULTI", "bf16", "all")
    launch("--multi_gpu", "--num_processes", "2")
    assert distributed.asked().kind == "MULTI" and distributed.asked().mixed_precision is None


@pytest.mark.parametrize(
    "started",
    [
        ["/bin/accelerate-launch"],
        ["-m", "accelerate.commands.launch"],
        ["-m", "accelerate.commands.accelerate_cli", "launch"],
    ],
    ids=lambda words: words[-1],
)
def test_every_way_to_start_accelerate_is_seen(started, launch, monkeypatch):
    launch()
    words = ["python", *started, "--mixed_precision", "bf16", "-m", "rlhf_recipes.ppo", "--recipe", "imdb_tiny"]
    monkeypatch.setattr(distributed.psutil, "Process", lambda pid: SimpleNamespace(cmdline=lambda: words))
    assert distributed.asked().mixed_precision == "bf16"


def test_without_accelerate_nothing_was_asked_for(launch, monkeypatch):
    launch()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert distributed.asked() is None


@pytest.mark.parametrize(
    ("asked", "processes", "variables"),
    [(DDP, 2, {}), (ZERO, 2, OF_ZERO), (DDP | {"num_processes": 1, "distributed_type": "NO"}, 1, {})],
)
def test_a_launch_that_is_what_was_asked_for_passes(launch, tmp_path, monkeypatch, asked, processes, variables):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    launch("--config_file", config(tmp_path, **asked), processes=processes, **variables)
    check_launch({})


def test_a_zero_stage_that_nobody_says_is_accelerates_2(launch, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    of_zero = {"ACCELERATE_USE_DEEPSPEED": "true"}
    for command in (
        ["--use_deepspeed", "--num_processes", "2"],
        ["--config_file", config(tmp_path, **ZERO | {"deepspeed_config": {"gradient_clipping": 1.0}})],
    ):
        launch(*command, processes=2, **of_zero)
        check_launch({})
        assert launched() == Setup(2, "DEEPSPEED", 2)


def test_deepspeeds_own_file_on_the_command_line_beats_the_configuration(launch, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    file = tmp_path / "ds.json"
    command = ("--config_file", config(tmp_path, **ZERO), "--deepspeed_config_file", str(file))
    launch(*command, processes=2, ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE=str(file))
    with pytest.raises(RecipeError, match="ds.json: no such file"):
        check_launch({})
    file.write_text('{\n\t"zero_optimization": {"stage": 1}\n}')  # indented by tabs, which YAML would not take
    check_launch({})
    assert launched().zero_stage == 1


@pytest.mark.parametrize(
    ("asked", "processes", "variables", "said"),
    [
        (DDP | {"distributed_type": "MULTI_CPU", "use_cpu": True}, 1, {}, "2 processes with DDP asked for, .* gives 1 process"),
        (DDP, 1, {}, "2 processes with DDP asked for"),
        (ZERO, 2, {}, "with DeepSpeed ZeRO-2 asked for, but this launch gives 2 processes with DDP"),
        (ZERO, 2, OF_ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "2 processes with DeepSpeed ZeRO-2 asked for, but this launch gives 2 processes with DeepSpeed ZeRO-1"),
        (ZERO, 2, OF_ZERO | {"ACCELERATE_USE_CPU": "true"}, "gives plain DDP"),
        (DDP | {"distributed_type": "FSDP"}, 2, {}, "with FSDP asked for, but this launch gives 2 processes with DDP"),
    ],
)  # fmt: skip
def test_a_launch_that_is_something_else_is_refused(launch, tmp_path, asked, processes, variables, said):
    launch("--config_file", config(tmp_path, **asked), processes=processes, **variables)
    with pytest.raises(RecipeError, match=said):
        check_launch({})


def test_more_gpus_than_there_are_are_refused(launch, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    launch("--config_file", config(tmp_path, **DDP), processes=2)
    with pytest.raises(RecipeError, match=r"2 process.es. on this machine's GPUs asked for, and it has 1 "):
        check_launch({})
    check_launch({"use_cpu": True})
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    check_launch({})  # on the CPU, as nothing speaks of GPUs and there are cores enough
    for keys in ({"gpu_ids": "all"}, {"num_processes": 1, "distributed_type": "NO", "gpu_ids": "all"}):
        launch("--config_file", config(tmp_path, **DDP | keys), processes=(DDP | keys)["num_processes"])
        with pytest.raises(RecipeError, match="and it has 0 that torch can use"):
            check_launch({})
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    launch("--config_file", config(tmp_path, **DDP | {"num_processes": 8}), processes=8)
    with pytest.raises(RecipeError, match="8 process.es. .* it has 0"):
        check_launch({})
    launch("--config_file", config(tmp_path, **DDP | {"num_processes": 8, "gpu_ids": "-1,-1"}), processes=8)
    check_launch({})  # a configuration for the CPU


def test_deepspeed_that_is_not_installed_names_the_extra(launch, monkeypatch):
    launch(processes=2, **OF_ZERO)
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'rlhf-recipes\[deepspeed\]'"):
        check_launch({})


def test_stopped_while_torch_is_imported_a_rank_ends_without_importing_it_again(monkeypatch):
    """What is left half imported cannot be imported a second time."""
    monkeypatch.setattr(entry, "run_stage", lambda *arguments, **more: 143)
    monkeypatch.setattr(sys, "argv", ["rloo", "--recipe", "imdb_tiny"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "accelerate.state", raising=False)
    with pytest.raises(SystemExit) as ended:
        entry.stage_command("rloo", lambda run: "")
    assert ended.value.code == 143


def test_what_the_trainer_makes_of_the_launch_is_checked(launch, tmp_path):
    launch("--config_file", config(tmp_path, **DDP | {"mixed_precision": "bf16"}), processes=2)
    check_setup(SimpleNamespace(world_size=2, bf16=True, fp16=False))
    with pytest.raises(
        RecipeError, match="asks for mixed_precision bf16, but the recipe's trainer section asks for float32"
    ):
        check_setup(SimpleNamespace(world_size=2, bf16=False, fp16=False))
    with pytest.raises(RecipeError, match="launched as 2 processes with DDP, but transformers uses 1 process"):
        check_setup(SimpleNamespace(world_size=1, bf16=True, fp16=False))


def test_what_deepspeeds_configuration_says_otherwise_than_the_recipe_is_refused(monkeypatch, tmp_path):
    """transformers finds it when it makes the engine, after data and models, in a traceback of every process."""
    from transformers import TrainingArguments

    own = {"zero_optimization": {"stage": 1}, "gradient_clipping": 0.5, "train_batch_size": "auto"}
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", json.dumps(own))
    check_setup(TrainingArguments(tmp_path, max_grad_norm=0.5, use_cpu=True))
    with pytest.raises(RecipeError, match="differ: gradient_clipping=0.5, but max_grad_norm=1.0; write auto"):
        check_setup(TrainingArguments(tmp_path, use_cpu=True))


def test_a_checkpoint_is_for_the_setup_that_saved_it(launch):
    saved = Setup(2, "DEEPSPEED", 2, "bf16", "cuda")
    launch(processes=2, **OF_ZERO)
    require_same(Path("c"), saved, launched())
    require_same(Path("c"), saved, Setup(2, "DEEPSPEED", 2, "bf16", "cpu"))
    require_same(Path("c"), Setup(2, "MULTI_GPU"), Setup(2, "MULTI_CPU"))
    require_same(Path("c"), Setup(1, "NO"), Setup(1, "MULTI_CPU"))  # DDP's configuration with --num_processes 1
    for other, said in (
        (Setup(2, "MULTI_GPU"), "saved by 2 processes with DeepSpeed ZeRO-2, and this launch is 2 processes with DDP"),
        (Setup(4, "DEEPSPEED", 2), "this launch is 4 processes with DeepSpeed ZeRO-2"),
        (Setup(2, "DEEPSPEED", 3), "this launch is 2 processes with DeepSpeed ZeRO-3"),
        (Setup(2, "DEEPSPEED", 2, "no"), "ZeRO-2 in mixed_precision bf16, and this launch is .* no[.]"),
        (Setup(1, "NO"), "this launch is 1 process"),
    ):
        with pytest.raises(RecipeError, match=said):
            require_same(Path("c"), saved, other)


# As a user launches it


@pytest.fixture(scope="module")
def work(tmp_path_factory, bpe_policy_folder) -> Path:
    folder = tmp_path_factory.mktemp("launches")
    (folder / "imdb").mkdir()
    for split in ("train", "test"):
        write_jsonl(folder / "imdb" / f"{split}.jsonl", REVIEWS)
    (folder / "own.py").write_text(
        "import os, signal\n\n\ndef length(completions):\n    return [float(len(c)) for c in completions]\n\n\n"
        "def dies(completions, trainer_state):\n"
        "    if trainer_state.global_step == 4 and os.environ.get('RANK') == '1':\n"
        "        if os.environ['HOW'] == 'kill':\n            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        os._exit(3)\n    return length(completions)\n"
    )
    return folder


def command(work: Path, policy: Path, configuration: str, *more: str) -> list[str]:
    return [
        "-m", "accelerate.commands.launch", "--config_file", configuration, "-m", "rlhf_recipes.rloo",
        "--recipe", "imdb_positive", f"rloo.policy={policy}", "reward_funcs=[{name: 'own.py:length'}]",
        "rloo.trainer={per_device_train_batch_size: 4, num_generations: 4, max_completion_length: 6, save_steps: 1}",
        f"data.path={work / 'imdb'}", "data.prompt_tokens=[2, 4]", "episodes=32", *more,
    ]  # fmt: skip


def manifest_of(work: Path, name: str) -> dict:
    return json.loads((work / "runs" / name / "rloo" / "manifest.json").read_text())


@pytest.mark.slow
@pytest.mark.cold  # stages read the launcher's command line; a forked launcher has none
def test_a_configuration_that_gives_one_process_trains_nothing(work, bpe_policy_folder):
    quiet = DDP | {"distributed_type": "MULTI_CPU", "use_cpu": True}
    done = run_python(*command(work, bpe_policy_folder, config(work, **quiet), "name=quiet"), cwd=work)
    assert done.returncode != 0 and "2 processes with DDP asked for, but this launch gives 1 process" in done.stderr
    assert not (work / "runs" / "quiet").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "exit"])
def test_a_rank_that_dies_takes_the_other_down_and_the_run_goes_on_only_as_it_was(work, bpe_policy_folder, how):
    arguments = command(
        work, bpe_policy_folder, str(CONFIGS / "cpu_ddp_2.yaml"), f"name={how}", "reward_funcs=[{name: 'own.py:dies'}]"
    )
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=work, env=os.environ | {"HOW": how}, stderr=subprocess.PIPE, text=True
    )
    ranks: list[psutil.Process] = []
    died = None
    while process.poll() is None and time.monotonic() - began < 240:
        found = psutil.Process(process.pid).children() if psutil.pid_exists(process.pid) else []
        ranks = max(ranks, found, key=len)
        if died is None and len(ranks) >= 2 and not all(r.is_running() and r.status() != "zombie" for r in ranks):
            died = time.monotonic()
        time.sleep(0.1)
    stderr = process.stderr.read()
    process.wait()
    assert process.returncode not in (0, None) and died is not None, stderr
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert time.monotonic() - died < 60 and not alive
    said = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert (
        said and "another process of this run has ended" in said[0] and "Traceback" not in stderr.partition("error:")[0]
    ), stderr
    assert manifest_of(work, how)["status"] == "failed"
    assert manifest_of(work, how)["setup"] == Setup(2, "MULTI_CPU", None, "no", "cpu").to_dict()
    if how == "exit":
        return
    # Only two processes with DDP go on with it: neither one process nor ZeRO-2.
    alone = [sys.executable, *arguments[arguments.index("-m", 1) :]]
    for start, launch in ((alone, "1 process."), ([sys.executable, *_with(arguments, "cpu_zero2_2.yaml")], "ZeRO-2.")):
        done = subprocess.run(start, cwd=work, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode != 0 and "was saved by 2 processes with DDP, and this launch is" in done.stderr, (
            done.stderr
        )
        assert launch in done.stderr and done.stderr.count("error:") == 1


def _with(arguments: list[str], name: str) -> list[str]:
    return [str(CONFIGS / name) if word.endswith("cpu_ddp_2.yaml") else word for word in arguments]
