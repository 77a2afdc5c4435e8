"""Configurations of accelerate: each is what its name says, each can be launched with, and wrong ones get a sentence."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin
from safetensors.torch import load_file

import rlhf_recipes
from rlhf_recipes.launch.configs import config_files, find_config, kind, launchable, read_config
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.runs.files import read_manifest, read_metrics
from rlhf_recipes.system.files import MARKER
from support.processes import cli, run_python

FOLDER = Path(rlhf_recipes.__file__).parent.parent / "accelerate_configs"
FILES = sorted(FOLDER.glob("*"))

EXPECTED = {  # processes, machines, type, ZeRO stage, precision, GPUs
    "single_gpu": (1, 1, "NO", None, "no", "0"),
    "cpu": (1, 1, "NO", None, "no", "-1"),
    "ddp_8gpu": (8, 1, "MULTI_GPU", None, "no", "all"),
    "zero2_8xh100": (8, 1, "DEEPSPEED", 2, "bf16", "all"),
    "zero2_2x8": (16, 2, "DEEPSPEED", 2, "bf16", "all"),
    "zero3_8xh100": (8, 1, "DEEPSPEED", 3, "bf16", "all"),
    "zero2_offload": (1, 1, "DEEPSPEED", 2, "no", "all"),
    "fsdp2_8gpu": (8, 1, "FSDP", None, "bf16", "all"),
    "cpu_ddp_2": (2, 1, "MULTI_GPU", None, "no", "-1,-1"),
    "cpu_zero2_2": (2, 1, "DEEPSPEED", 2, "no", "-1,-1"),
}

TINY = ["data.max_rows=1500", "rloo.policy=package:rlhf_recipes/base", "rloo.trainer.per_device_train_batch_size=32"]
"""Of imdb_tiny: rollouts of 64 completions with two processes."""


# The files


def test_the_list_is_complete():
    assert {path.stem for path in FILES} == set(EXPECTED) == set(config_files())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_makes_of_it_what_its_name_says(path, monkeypatch):
    given = launch_command_parser().parse_args(["--config_file", str(path), "-m", "rlhf_recipes.ppo", "--recipe", "x"])
    args, config, _ = _validate_launch_command(given)
    processes, machines, distributed_type, stage, precision, gpus = EXPECTED[path.stem]
    assert (args.num_processes, args.num_machines, args.mixed_precision) == (processes, machines, precision)
    assert config.distributed_type.value == distributed_type and args.gpu_ids == gpus
    assert args.use_deepspeed == (distributed_type == "DEEPSPEED") and args.use_fsdp == (distributed_type == "FSDP")
    assert args.multi_gpu == (distributed_type == "MULTI_GPU")
    assert args.use_cpu == (path.stem == "cpu")  # several processes with it would be one
    if machines == 1 and distributed_type != "NO":
        assert args.main_process_port == 0
    if stage is not None:
        from accelerate.utils.launch import prepare_deepspeed_cmd_env

        args.deepspeed_fields_from_accelerate_config = ""
        args.main_process_ip = "127.0.0.1"
        command, environment = prepare_deepspeed_cmd_env(args)
        assert command is None  # DeepSpeed's own launcher would log in to machines
        for name in list(environment):
            if name.startswith("ACCELERATE_"):
                monkeypatch.setenv(name, environment[name])
        plugin = DeepSpeedPlugin()
        assert plugin.zero_stage == stage == plugin.deepspeed_config["zero_optimization"]["stage"]
        offloaded = path.stem == "zero2_offload"
        assert plugin.deepspeed_config["zero_optimization"]["offload_optimizer"]["device"] == (
            "cpu" if offloaded else "none"
        )
        whole = plugin.deepspeed_config["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save")
        assert stage != 3 or whole is True  # else no whole model would be saved
        # False: torch's Adam stays, and nothing is compiled.
        assert plugin.deepspeed_config.get("zero_force_ds_cpu_optimizer", True) == (not offloaded)
    assert kind(read_config(path)) == {
        "NO": "one process", "MULTI_GPU": "DDP", "DEEPSPEED": f"DeepSpeed ZeRO-{stage}", "FSDP": "FSDP"
    }[distributed_type]  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_header_has_purpose_stages_precision_what_was_run_and_commands(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    header = [line for line in lines if line.startswith("#")]
    assert lines[: len(header)] == header and len(header) >= 5
    assert header[0].startswith(f"# {path.stem}: ") and header[0].endswith(".")
    labels = [match[1] for line in header[1:] if (match := re.match(r"# ([A-Z]\w*)[: ]", line))]
    assert [label for label in labels if label != "Needs"] == ["Stages", "Precision", "Run"]
    commands = [line for line in header if line.startswith("#   ")]
    assert commands == header[-len(commands) :]
    launches = [command for command in commands if "accelerate launch" in command]
    assert launches and all(f"--config_file accelerate_configs/{path.name} " in command for command in launches)
    if path.stem == "zero2_2x8":
        assert ["--machine_rank 0" in launches[0], "--machine_rank 1" in launches[1]] == [True, True]
        assert all("--main_process_ip" in command for command in launches)


# Finding and checking them


def test_own_configurations_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "accelerate_configs").mkdir()
    own = tmp_path / "accelerate_configs" / "cpu_ddp_2.yaml"
    own.write_text((FOLDER / "cpu_ddp_2.yaml").read_text())
    (tmp_path / "mine.yaml").write_text(own.read_text())
    assert find_config("cpu_ddp_2").resolve() == own and find_config("cpu") == FOLDER / "cpu.yaml"
    assert find_config("mine.yaml") == Path("mine.yaml") and set(EXPECTED) == set(config_files())
    with pytest.raises(RecipeError, match="no accelerate configuration named 'zero2'. Nearest: zero2_"):
        find_config("zero2")
    with pytest.raises(RecipeError, match=r"my.yaml: no such file"):
        find_config("my.yaml")


DDP = "distributed_type: MULTI_GPU\nnum_processes: 2\n"
ZERO = "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: "


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1\nb: 2", "own.yaml, line 2: "),
        ("- a\n", "mapping of keys to values, not list"),
        (DDP + "num_proceses: 3\n", "num_proceses: unknown key of accelerate's configurations; nearest: num_processes"),
        ("num_processes: 2\n", "distributed_type is None; set one of NO"),
        ("distributed_type: NO\n", "distributed_type is False; set one of NO, .*in quotes"),
        ("distributed_type: MULTI_CPU\nnum_processes: 2\n", "MULTI_CPU would start one process"),
        (DDP + "use_cpu: true\n", "use_cpu: true would start one process"),
        ("distributed_type: DEEPSPEED\nnum_processes: 2\nuse_cpu: true\n", "would start plain DDP"),
        (DDP + "mixed_precision: no\n", "mixed_precision is False; write 'no' in quotes"),
        ("distributed_type: MULTI_GPU\n", "num_processes: set it to the number of processes"),
        ("distributed_type: MULTI_GPU\nnum_processes: '2'\n", "num_processes: should be a valid integer, not '2'"),
        (
            "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {zero_stag: 3}\n",
            "deepspeed_config.zero_stag: unknown key .*; nearest: zero_stage",
        ),
        (
            "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {deepspeed_config_file: ds.json}\n",
            "ds.json: no such file",
        ),
        (ZERO + "{deepspeed_config_file: own.yaml}\n", "deepspeed_config_file: own.yaml: not DeepSpeed's JSON: "),
        (ZERO + "{deepspeed_config_file: '{\"a\": '}\n", "deepspeed_config_file: its text: not DeepSpeed's JSON: "),
        (ZERO + "{deepspeed_config_file: 5}\n", "deepspeed_config_file: 5: not DeepSpeed's JSON"),
        (ZERO + "{zero_stage: 4}\n", "zero_stage is 4; set 0, 1, 2 or 3"),
        ("distributed_type: [DEEPSPEED]\nnum_processes: 2\n", r"distributed_type is \['DEEPSPEED'\]; set one of NO"),
        (DDP + "gpu_ids: 0\n", "gpu_ids: should be .*a valid string, not 0"),
        ("distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {1: 2}\n", "fsdp_config.fsdp_1: unknown key"),
        (
            "distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {versio: 2}\n",
            "fsdp_config.fsdp_versio: unknown key",
        ),
    ],
)
def test_a_wrong_configuration_gets_a_sentence(text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(RecipeError, match=said):
        read_config(tmp_path / "own.yaml")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (DDP + "gpu_ids: '0'\n", "at least two are specified for `--gpu_ids`"),
        (DDP + "mixed_precision: bf17\n", "Unknown mixed_precision mode: bf17"),
    ],
)
def test_what_accelerate_refuses_is_one_sentence(text, said, tmp_path):
    (tmp_path / "own.yaml").write_text(text)
    done = cli("rloo", "imdb_tiny", *TINY, "--accelerate-config", "own.yaml", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: --accelerate-config own.yaml: ") and said in done.stderr


def test_what_accelerate_itself_writes_is_taken(tmp_path):
    from accelerate.commands.config.config_args import ClusterConfig

    for path in FILES:
        ClusterConfig.from_yaml_file(str(path)).to_yaml_file(str(tmp_path / path.name))
        assert kind(read_config(tmp_path / path.name)) == kind(read_config(path))


def test_several_machines_and_a_missing_deepspeed_are_refused_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        RecipeError, match="2 machines.*accelerate launch --config_file .*zero2_2x8.yaml --machine_rank"
    ):
        launchable("zero2_2x8")
    assert launchable("cpu_zero2_2") == FOLDER / "cpu_zero2_2.yaml"
    monkeypatch.setattr("rlhf_recipes.launch.configs.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"needs DeepSpeed, .*: pip install 'rlhf-recipes\[deepspeed\]'"):
        launchable("cpu_zero2_2")
    assert launchable("cpu_ddp_2")


def test_the_command_lists_them(tmp_path):
    done = cli("configs", cwd=tmp_path, COLUMNS="200")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines()[1:]}
    assert list(rows) == sorted(EXPECTED)
    assert re.search(r" 16 +DeepSpeed ZeRO-2 +two machines with 8 GPUs each", rows["zero2_2x8"])


@pytest.mark.parametrize(
    "arguments",
    [["run", "imdb_tiny"], ["ppo", "imdb_tiny"], ["rloo", "imdb_tiny"], ["sft", "imdb_tiny"],
     ["reward", "imdb_tiny"], ["sweep", "imdb_tiny", "--seeds=2"]],
)  # fmt: skip
def test_unknown_names_and_recipes_with_errors_start_nothing(arguments, tmp_path):
    for more, said in (
        (["--accelerate-config", "cpu_ddp"], "error: there is no accelerate configuration named 'cpu_ddp'. Nearest: cpu_ddp_2"),
        (["--accelerate-config", "cpu_ddp_2", "rloo.betta=1"], "rloo.betta: unknown key"),
    ):  # fmt: skip
        done = cli(*arguments, *more, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not list(tmp_path.iterdir())


# Launching with them


def test_a_broken_file_of_ones_own_does_not_hide_the_others(tmp_path):
    (tmp_path / "accelerate_configs").mkdir()
    (tmp_path / "accelerate_configs" / "broken.yaml").write_text("a: [")
    done = cli("configs", cwd=tmp_path)
    assert done.returncode == 0 and "cannot be used" in done.stdout and "zero2_8xh100" in done.stdout
    done = cli("plan", "tldr_1b", "--gpu", "2x8", cwd=tmp_path)
    assert done.returncode == 1 and "does not fit" in done.stdout and "error" not in done.stderr


@pytest.mark.slow
def test_run_trains_with_two_processes_and_the_rest_with_one(tmp_path):
    """A recipe of two stages and eval; rloo with ZeRO-2 by another launch is the same rloo."""
    settings = [
        *TINY, "sft=null", "reward=null", "ppo=null", "episodes=128", "rloo.trainer.logging_steps=1",
        "eval={num_prompts: 16, held_out_funcs: []}", "rloo.policy=package:rlhf_recipes/base",
    ]  # fmt: skip
    done = cli("run", "imdb_tiny", *settings, "--accelerate-config", "cpu_ddp_2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout and done.stdout.count("episodes   runs/imdb_tiny/rloo") == 1
    done = cli("rloo", "imdb_tiny", *settings, "--accelerate-config", "cpu_zero2_2", "name=zero", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    runs = {name: tmp_path / "runs" / name / "rloo" for name in ("imdb_tiny", "zero")}
    logged = {name: read_metrics(path) for name, path in runs.items()}
    for name, lines in logged.items():
        assert [line["episodes"] for line in lines if "episodes" in line][-1] == 128, name
    # 2 rollouts of 64 = 2 processes x 32: one process would have sampled 4 of 32.
    assert logged["imdb_tiny"][-1]["step"] == logged["zero"][-1]["step"] == 4
    assert logged["imdb_tiny"][-1]["loss"] == pytest.approx(logged["zero"][-1]["loss"], rel=1e-3, abs=1e-5)
    weights = {name: load_file(path / "model.safetensors") for name, path in runs.items()}
    for key, tensor in weights["imdb_tiny"].items():
        assert (tensor - weights["zero"][key]).abs().max() < 1e-4, key


def start(tmp_path: Path, config: str, *arguments: str) -> subprocess.Popen:
    """`rlhf-recipes rloo imdb_tiny --accelerate-config ...`; its output is added to `output.txt`."""
    command = ["-m", "rlhf_recipes.cli", "rloo", "imdb_tiny", *TINY, "rloo.trainer.save_steps=2", *arguments]
    with open(tmp_path / "output.txt", "a") as output:
        return subprocess.Popen(
            [sys.executable, *command, "--accelerate-config", config], cwd=tmp_path, stdout=output, stderr=output
        )


def wait_until(done, tmp_path: Path, process: subprocess.Popen) -> None:
    while not done():
        assert process.poll() is None, (tmp_path / "output.txt").read_text()
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "sent"),
    [
        ("cpu_ddp_2", signal.SIGTERM),
        pytest.param("cpu_zero2_2", signal.SIGINT, marks=pytest.mark.nightly),
        pytest.param("cpu", signal.SIGTERM, marks=pytest.mark.nightly),
    ],
)
def test_stopped_it_saves_and_goes_on(config, sent, tmp_path):
    path = tmp_path / "runs" / "imdb_tiny" / "rloo"
    process = start(tmp_path, config, "episodes=6400")
    wait_until(lambda: any(path.glob(f"checkpoint-*/{MARKER}")), tmp_path, process)
    process.send_signal(sent)
    assert process.wait(60) == 128 + sent
    output = (tmp_path / "output.txt").read_text()
    stopped = re.search(r"rloo     stopped, the same command resumes from step (\d+)   runs/imdb_tiny/rloo\n", output)
    assert stopped and "Traceback" not in output and "elastic" not in output, output
    assert read_manifest(path)["status"] == "stopped"
    process = start(tmp_path, config, "episodes=6400")
    going_on = f"rloo     resumes from step {stopped[1]} of "
    wait_until(lambda: going_on in (tmp_path / "output.txt").read_text(), tmp_path, process)
    process.send_signal(sent)
    assert process.wait(60) == 128 + sent
    assert [entry["step"] for entry in read_manifest(path)["resumed"]] == [int(stopped[1])]


@pytest.mark.slow
def test_killed_it_leaves_no_process_behind(tmp_path):
    path = tmp_path / "runs" / "imdb_tiny" / "rloo"
    process = start(tmp_path, "cpu_ddp_2", "episodes=6400")
    wait_until(lambda: any(path.glob(f"checkpoint-*/{MARKER}")), tmp_path, process)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3  # the launcher and two ranks
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    assert read_manifest(path)["status"] == "stopped"


@pytest.mark.slow
def test_a_second_ctrl_c_kills(tmp_path):
    """A rank that hangs hears no SIGTERM out of what it hangs in."""
    (tmp_path / "own.py").write_text(
        "import os, signal, time\n\nif 'RANK' in os.environ:\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n\n\n"
        "def deaf(completions):\n    open('asleep', 'w').close()\n    time.sleep(600)\n"
    )
    process = start(tmp_path, "cpu_ddp_2", "reward_funcs=[{name: 'own.py:deaf'}]")
    wait_until((tmp_path / "asleep").exists, tmp_path, process)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 137


@pytest.mark.slow
def test_an_error_of_all_ranks_is_said_once_and_ends_with_2(tmp_path):
    (tmp_path / "own.py").write_text(
        "import atexit, os, time\n\nif os.environ.get('RANK') == '0':\n    atexit.register(time.sleep, 4)  # slow to end\n\n\n"
        "def zero(completions):\n    return [0.0] * len(completions)\n"
    )
    settings = [*TINY, "episodes=32", "reward_funcs=[{name: 'own.py:zero'}]"]
    done = cli("rloo", "imdb_tiny", *settings, "--accelerate-config", "cpu_ddp_2", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: episodes: 32 is less than one rollout of 64 completions")
    died = run_python(
        *(
            "-m",
            "rlhf_recipes.launch.processes",
            "--config_file",
            str(FOLDER / "cpu_ddp_2.yaml"),
            "-m",
            "rlhf_recipes.nothing",
        ),
        cwd=tmp_path,
    )
    assert died.returncode == 1 and "No module named rlhf_recipes.nothing" in died.stderr
