"""Measures on one GPU in a few minutes: exactness on CUDA, speed against TRL, memory against `plan`.

    python benchmarks/gpu.py --minutes 12 --trl-1-12 site-trl-1.12     # see gpu_wheels.txt; one GPU
    python benchmarks/gpu.py --sizes tiny                              # checks that it runs, on a CPU too

The most important parts come first. Each prints one line of JSON when it ends; a part is skipped if too little of
`--minutes` is left. If a part fails, its line says so, and the others still run.

- `identities`: deviations of the first step from ratio 1, KL 0 and clip fraction 0, with their bounds.
- `resume`: the largest difference of weights between a run that resumed in the middle of a rollout and a run without
  interruption; the same for two runs without interruption; if one is not 0, the same with deterministic kernels.
- `speed`: contenders of `ppo_vs_trl.py`: episodes per second (median of the updates after the first) and peak memory.
- `memory`: peak memory of a stage, and the forecast of `plan`.

Weights are random. `speed` has bfloat16 weights on a GPU; the other parts have float32 weights, under bfloat16 autocast on
a GPU, as in recipes. Only TRL 1.12.0 runs in another process, because importing the libraries takes 10 s and more.
GB are 2^30 bytes. The last line is JSON with the results of all parts.
"""

import argparse
import gc
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "WANDB_MODE": "disabled"}
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic kernels
sys.path.insert(1, str(Path(__file__).parents[1]))

import contender
import ppo_vs_trl
import torch
from datasets import Dataset
from transformers import set_seed

from rlhf_recipes import PPOConfig, PPOTrainer, RLOOConfig, RLOOTrainer

LORA = "peft={r: 16, lora_alpha: 32, target_modules: all-linear}"
MODES = {
    "full": [],
    "lora": [LORA],
    "4bit": [LORA, "quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true}"],
}
TRAINERS = {"ppo": (PPOTrainer, PPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
CONTENDERS = ("ours_rloo", "trl_rloo", "ours_ppo_separate", "trl_ppo", "ours_ppo_shared")
SECONDS = {"identities": 40, "resume": 90, "speed": 40, "memory": 50}
"""Guess of the time of one line of a part at 410M parameters."""

BOUNDS = {
    "bfloat16": {"ratio": 0.05, "approx_kl": 1e-3, "kl_per_token": 1e-3, "kl_k3_per_token": 1e-3, "clip_fraction": 0.0},
    "float32": {"ratio": 1e-3, "approx_kl": 1e-5, "kl_per_token": 1e-5, "kl_k3_per_token": 1e-5, "clip_fraction": 0.0},
}
"""Type of the matrix products -> largest deviation from 1 (ratio) and from 0 (the others) at the first step."""

CUDA = torch.cuda.is_available()
BATCH, PROMPT, COMPLETION = (64, 64, 48) if CUDA else (8, 16, 8)
GIB = 2**30


class Session:
    """Runs the parts one after the other and keeps their results.

    Args:
        minutes: Time for all parts.
        parts: The parts to run.
    """

    def __init__(self, minutes: float, parts: list[str]):
        self.parts = parts
        self.ends = time.monotonic() + 60 * minutes
        self.found: dict[str, Any] = {}

    def run(self, part: str, what: str, function: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        """Run `function` and print its result, if its part is selected and enough time is left."""
        if part not in self.parts:
            return
        name, seconds, left = f"{part} {what}", SECONDS[part], self.ends - time.monotonic()
        if left < seconds:
            self._tell(name, {"skipped": f"{max(left, 0):.0f} s left, about {seconds:.0f} s needed"})
            return
        started = time.monotonic()
        try:
            with redirect_stdout(sys.stderr):  # standard output has one line for each part
                found = function(*arguments)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # the other parts still run
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {str(error)[-500:]}"}
        self._tell(name, found | {"seconds": round(time.monotonic() - started, 1)})
        forget()

    def _tell(self, name: str, found: dict[str, Any]) -> None:
        self.found[name] = found
        print(name, json.dumps(found), flush=True)


def forget() -> None:
    """Free the GPU memory of finished parts and reset the peak."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def task_of(size: str) -> SimpleNamespace:
    """The part of a task that `contender.py` needs to make a model: float32, completions of full length."""
    return SimpleNamespace(model=ppo_vs_trl.MODELS[size], device="cpu", ragged=False)


def policy_of(folder: Path, size: str) -> Path:
    """Folder of a policy with random weights and its tokenizer; the first call makes it."""
    policy = folder / size
    if not policy.exists():
        set_seed(0)
        task = task_of(size)
        tokenizer = contender.make_tokenizer(task.model["vocab_size"])
        contender.make_policy(task, tokenizer).save_pretrained(policy)
        tokenizer.save_pretrained(policy)
    return policy


def prompts(number: int, length: int, vocabulary: int) -> list[str]:
    ids = torch.randint(0, vocabulary - 2, (number, length), generator=torch.Generator().manual_seed(0)).tolist()
    return [" ".join(f"w{i}" for i in row) for row in ids]


def parity(completion_ids, **columns) -> list[float]:
    """A score that costs nothing and differs between completions."""
    return [float(ids[-1] % 2) for ids in completion_ids]


def trained(algorithm: str, folder: Path, size: str, resume: Path | None = None, **settings) -> Any:
    """A trainer after its training."""
    trainer_class, config_class = TRAINERS[algorithm]
    set_seed(0)
    vocabulary = ppo_vs_trl.MODELS[size]["vocab_size"]
    common = {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": BATCH // 4,
        "gradient_accumulation_steps": 4,
        "num_generations": 4,
        "num_iterations": 2,
        "max_completion_length": COMPLETION,
        "beta": 0.05,
        "bf16": CUDA,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    trainer = trainer_class(
        model=str(policy_of(folder, size)),
        reward_funcs=parity,
        args=config_class(**common | settings),
        train_dataset=Dataset.from_dict({"prompt": prompts(4 * BATCH, PROMPT, vocabulary)}),
        processing_class=contender.make_tokenizer(vocabulary),
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def identities(algorithm: str, folder: Path, size: str, half: bool) -> dict[str, Any]:
    """Deviations of the first step from its values by definition."""
    trainer = trained(algorithm, folder, size, bf16=half, max_steps=1)
    first = trainer.state.log_history[0]
    bounds = BOUNDS["bfloat16" if half else "float32"]
    deviations = {name: abs(first[name] - (name == "ratio")) for name in bounds}
    return {
        "deviations": deviations,
        "bounds": bounds,
        "within": all(deviations[name] <= bound for name, bound in bounds.items()),
    }


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in trainer.model.state_dict().items()}


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    return max((ours[name].float() - theirs[name].float()).abs().max().item() for name in ours)


def resume(algorithm: str, folder: Path, size: str) -> dict[str, Any]:
    """Five steps of two passes over a rollout, with a checkpoint after the third: in the middle of the second rollout."""
    steps = {"max_steps": 5, "learning_rate": 1e-4}

    def compare() -> dict[str, Any]:
        whole = weights(trained(algorithm, folder, size, save_strategy="steps", save_steps=3, **steps))
        forget()
        resumed = weights(trained(algorithm, folder, size, resume=folder / "run/checkpoint-3", **steps))
        forget()
        again = weights(trained(algorithm, folder, size, **steps))
        shutil.rmtree(folder / "run")
        return {
            "resumed_max_difference": largest_difference(resumed, whole),
            "resumed_equal": all(torch.equal(resumed[name], whole[name]) for name in whole),
            "two_runs_max_difference": largest_difference(again, whole),
        }

    found = compare()
    if not found["resumed_equal"] or found["two_runs_max_difference"]:
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            found["with_deterministic_kernels"] = compare()
        finally:
            torch.use_deterministic_algorithms(False)
    return found


def speed(name: str, folder: Path, size: str, trl_1_12: Path | None) -> dict[str, Any]:
    """Run one contender of `ppo_vs_trl.py`; TRL 1.12.0's runs in another process."""
    given = ["--model", size, "--device", "cuda" if CUDA else "cpu", "--prompts", str(BATCH), "--updates", "4"]
    asked = ppo_vs_trl.parse([*given, "--new-tokens", str(COMPLETION)])
    asked.trl_1_12 = trl_1_12
    if name == "trl_ppo":
        if asked.trl_1_12 is None:
            return {"skipped": "no --trl-1-12"}
        result = ppo_vs_trl.run(asked, name, BATCH)
    else:
        set_seed(0)
        task = SimpleNamespace(**ppo_vs_trl.task_of(asked, name, BATCH))
        (folder / name).mkdir()
        result = getattr(contender, name)(task, str(folder / name))
        shutil.rmtree(folder / name)
        result = ppo_vs_trl.with_rates(asked, name, result)
    return {
        "episodes_per_second": round(result["episodes"], 2),
        "peak_gb": round(result["memory"] / GIB, 3) if CUDA else None,
        "mean_tokens": result["mean_tokens"],
        "split": {phase: round(seconds, 3) for phase, seconds in result["split"].items() if seconds is not None},
    }


def memory(stage: str, folder: Path, size: str, mode: str) -> dict[str, Any]:
    """Run one stage of a small recipe: two rollouts with one pass each."""
    from rlhf_recipes.planning.machine import launch_of, machine_of
    from rlhf_recipes.planning.stage import plan_stage
    from rlhf_recipes.recipe.load import load_recipe
    from rlhf_recipes.stage import run_stage

    if mode == "4bit" and find_spec("bitsandbytes") is None:
        return {"skipped": "no bitsandbytes"}
    rows = prompts(4 * BATCH, PROMPT, ppo_vs_trl.MODELS[size]["vocab_size"])
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": row, "completion": " w1"}) + "\n" for row in rows))
    trainer = {
        "per_device_train_batch_size": BATCH // 4,
        "gradient_accumulation_steps": 4,
        "num_generations": 4,
        "max_steps": 2,
        "max_completion_length": COMPLETION,
        "beta": 0.05,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"name: gpu\ndescription: memory\nruns_dir: {folder / 'runs'}\n"
        f"data: {{path: {folder / 'rows.jsonl'}, max_prompt_tokens: {PROMPT}}}\nreward_funcs: [{{name: length}}]\n"
        f"{stage}:\n  policy: {policy_of(folder, size)}\n  trainer: {json.dumps(trainer)}\n",
        encoding="utf-8",
    )
    overrides = [f"{stage}.{override}" for override in MODES[mode]]
    machine = machine_of(None)
    planned = plan_stage(load_recipe(str(recipe), overrides), stage, machine, launch_of(machine, None)).total
    forget()
    before = torch.cuda.memory_allocated() if CUDA else 0
    main = importlib.import_module(f"rlhf_recipes.{stage}").main
    code = run_stage(stage, main, str(recipe), overrides, overwrite=True)
    if code:
        raise RuntimeError(f"stage {stage} ended with exit code {code}; its message is above.")
    shutil.rmtree(folder / "runs")
    peak = torch.cuda.max_memory_allocated() - before if CUDA else None
    return {
        "peak_gb": peak and round(peak / GIB, 3),
        "planned_gb": round(planned / GIB, 3),
        "planned_over_peak": peak and round(planned / peak, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=12, help="skips parts that would take longer")
    parser.add_argument("--sizes", nargs="+", default=["pythia-410m", "pythia-1b"], choices=list(ppo_vs_trl.MODELS),
                        help="the first runs all parts, the others only memory")  # fmt: skip
    parser.add_argument("--parts", nargs="+", default=list(SECONDS), choices=list(SECONDS))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES), help="modes of the part memory")
    parser.add_argument(
        "--stages", nargs="+", default=list(TRAINERS), choices=list(TRAINERS), help="stages of all parts but speed"
    )
    parser.add_argument("--trl-1-12", type=Path, help="folder of `pip install --target` with TRL 1.12.0")
    options = parser.parse_args()
    session, size = Session(options.minutes, options.parts), options.sizes[0]
    name = torch.cuda.get_device_name() if CUDA else "CPU; no GPU, so no GPU memory is measured"
    print(f"{name}; torch {torch.__version__}, Python {sys.version.split()[0]}", flush=True)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        for half in (True, False) if CUDA else (False,):
            for algorithm in options.stages:
                what = f"{algorithm} {size} {'bfloat16' if half else 'float32'}"
                session.run("identities", what, identities, algorithm, folder, size, half)
        for algorithm in options.stages:
            session.run("resume", f"{algorithm} {size}", resume, algorithm, folder, size)
        for one in CONTENDERS:
            session.run("speed", f"{one} {size}", speed, one, folder, size, options.trl_1_12)
        for of_memory, mode, stage in product(options.sizes, options.modes, options.stages):
            session.run("memory", f"{stage} {of_memory} {mode}", memory, stage, folder, of_memory, mode)
    print(json.dumps(session.found))


if __name__ == "__main__":
    main()
