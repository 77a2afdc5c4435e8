"""Faults on purpose: kills, damaged files, odd settings and odd reward functions. Each trial is a stage of two tiny recipes.

`Bench` makes the recipe and runs its stages; `kill`, `damage`, `odd_settings` and `odd_reward` are the four kinds of a
trial, each with a random generator of its own. A trial ends as one of `OUTCOMES`.
"""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from rlhf_recipes.launch.start import USER_ERROR
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.stage import load_checked
from support.processes import TIMES, become_stage, call
from support.texts import REVIEWS, write_jsonl
from support.tiny_models import causal_lm, save_pair, word_tokenizer

OUTCOMES = ("equal", "finished", "lost, and said so", "refused", "failed with a sentence") + (
    WRONG := ("traceback", "silent loss", "not finite", "hangs")
)
"""How a trial may end; those in `WRONG` are faults of the project."""

LONGEST = 60
"""Seconds until a stage that takes two is said to hang."""

KINDS = ("kill", "damage", "settings", "reward")

TRAINER = (
    "per_device_train_batch_size: 4, num_generations: 2, max_completion_length: 4, logging_steps: 1, save_steps: 2, "
    "learning_rate: 1.0e-3"
)

ODD_REWARDS = """
import os, random, signal, sys, threading, time, warnings
import numpy as np, torch

def plain(completions, **_): return [float(len(c)) for c in completions]
def good(completions, **_): return [float(c.count("good")) for c in completions]
def draws(completions, **_): return [random.random() + float(np.random.rand()) + float(torch.rand(())) for c in completions]

def reseeds(completions, **_):
    random.seed(0); np.random.seed(0); torch.manual_seed(0)
    return plain(completions)

def grad_off(completions, **_): torch.set_grad_enabled(False); return plain(completions)
def other_dtype(completions, **_): torch.set_default_dtype(torch.float64); return plain(completions)
def changes_directory(completions, **_): os.chdir("/"); return plain(completions)
def hides_warnings(completions, **_): warnings.simplefilter("ignore"); return plain(completions)
def changes_inputs(completions, prompts, **_): n = plain(completions); completions.clear(); prompts.clear(); return n
def as_array(completions, **_): return np.array(plain(completions))
def as_tensor(completions, **_): return torch.tensor(plain(completions))

def nan(completions, **_): return [float("nan")] * len(completions)
def infinite(completions, **_): return [float("inf")] * len(completions)
def one_nan(completions, **_): return [float("nan"), *plain(completions)[1:]]
def huge(completions, **_): return [1e38 * (-1) ** i for i, _ in enumerate(completions)]
def one_short(completions, **_): return plain(completions)[1:]
def nothing(completions, **_): return None
def texts(completions, **_): return ["much"] * len(completions)
def nested(completions, **_): return [[1.0]] * len(completions)
def number(completions, **_): return 1.0
def none(completions, **_): return [None] * len(completions)
def error(completions, **_): raise ValueError("no luck")
def base_error(completions, **_): raise BaseException("no luck")
def stops(completions, **_): raise KeyboardInterrupt
def generator_exit(completions, **_): raise GeneratorExit
def recursion(completions, **_): return recursion(completions)
def leaves(completions, **_): sys.exit(0)
def leaves_at_once(completions, **_): os._exit(0)
def kills(completions, **_): os.kill(os.getpid(), signal.SIGKILL)
def closes_output(completions, **_): os.close(1); return plain(completions)
def constant(completions, **_): return [0.5] * len(completions)
def sleeps(completions, **_): time.sleep(0.1); return plain(completions)
def sleeps_long(completions, **_): time.sleep(600); return plain(completions)
def asks_for_more(completions, nowhere, **_): return plain(completions)
async def later(completions, **_): return plain(completions)
"""
INNOCENT = (
    "reseeds", "grad_off", "other_dtype", "changes_directory", "hides_warnings", "changes_inputs", "as_array", "as_tensor",
    "sleeps", "later",
)  # fmt: skip
"""Functions that return what `plain` does, so that the model must be the same."""

ODD_VALUES: list[Any] = [
    -1, 0, 1, 2, 3, 0.5, 1e-8, 1e30, -1e30, 1e308, 10**19, float("nan"), float("inf"), float("-inf"), True, False, None, "",
    "x", "0.5", "1e3", "auto", "steps", "no", [], [1], [1, -1], [0, 1], {}, {"a": 1}, "nan",
]  # fmt: skip

SANE_VALUES: dict[str, list[Any]] = {
    "learning_rate": [0, 1e-5, 1e-2], "beta": [0, 0.01, 10], "epsilon": [0.1, 0.3], "epsilon_high": [0.3, None],
    "temperature": [0.5, 2], "num_iterations": [1, 2], "steps_per_generation": [1, 2], "weight_decay": [0, 0.1],
    "max_grad_norm": [0.1, 10], "warmup_steps": [0, 1], "gradient_accumulation_steps": [1, 2], "gamma": [0.9, 1],
    "lam": [0.9, 1], "vf_coef": [0, 0.5], "ent_coef": [0, 0.01], "lr_scheduler_type": ["cosine", "constant"],
    "optim": ["adamw_torch", "sgd", "adafactor"], "logging_steps": [1, 2], "save_steps": [1, 2], "seed": [0, 7],
    "max_completion_length": [1, 8], "num_generations": [2, 4], "bf16": [False], "reward_clip_range": [[-1, 1]],
    "missing_eos": [{"mode": "replace", "value": -1}], "data.max_rows": [20], "data.prompt_tokens": [[1, 3]],
    "normalize_advantages": [True, False], "shuffle_dataset": [True, False], "disable_dropout": [True],
}  # fmt: skip

OF_PPO = ("gamma", "lam", "vf_coef", "ent_coef")

OTHER_KEYS = [
    "adam_beta1", "adam_beta2", "adam_epsilon", "cliprange_value", "kl_target", "kl_horizon", "kl_estimator", "lr_kl_target",
    "lr_scheduler_kwargs", "max_steps", "num_train_epochs", "normalize_scores", "per_device_train_batch_size", "sync_ref_model",
    "ref_model_sync_steps", "ref_model_mixup_alpha", "value_warmup_steps", "whiten_rewards", "reward_weights", "top_k",
    "top_p", "min_p", "repetition_penalty", "generation_kwargs", "model_init_kwargs", "save_total_limit", "save_strategy",
    "eval_strategy", "eval_steps", "dataloader_drop_last", "dataloader_num_workers", "pad_to_multiple_of", "group_by_length",
    "report_to", "metric_for_best_model", "load_best_model_at_end", "neftune_noise_alpha", "max_prompt_length",
    "learnig_rate", "gradient_checkpointing", "optim_args", "max_model_length", "cache_implementation", "mask_truncated_completions",
    "data.eval_fraction", "data.filter", "data.columns", "data.prompt_template", "data.completion_prefix", "data.max_prompt_tokens",
    "data.train_split", "data.eval_split", "data.truncate", "data.invalid_rows", "data.prompt_words", "special_tokens", "episodes",
    "seed", "name", "ppo.value_model", "rloo.baseline", "ppo.peft", "rloo.peft", "ppo.global_batch_size", "rloo.global_batch_size",
    "ppo.quantization", "reward_funcs.0.weight", "reward_funcs.0.timeout", "reward_funcs.0.args", "trust_remote_code", "no.such.key",
]  # fmt: skip

STATE_FILES = (
    "manifest.json", "metrics.jsonl", "completions.jsonl", "recipe.yaml", "log.txt", "checkpoint-*/complete.json",
    "checkpoint-*/trainer_state.json", "checkpoint-*/on_policy_0.pt", "checkpoint-*/since_last_log_0.pt", "checkpoint-*/optimizer.pt",
    "checkpoint-*/model.safetensors", "checkpoint-*/log_sizes.json", "checkpoint-*/manifest_copy.json", "checkpoint-*/rng_state.pth",
    "checkpoint-*/scheduler.pt", "checkpoint-*/config.json", "checkpoint-*/training_args.bin", "tensorboard/*",
)  # fmt: skip


def killed_stage(at: int, delay: float, *stage: Any) -> None:
    """A stage that SIGKILL ends `delay` seconds after its `at`-th write to a folder named `runs`; 0: it counts its writes."""
    seen = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal seen
        writes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.copyfile")
        if event == "open" and len(arguments) > 2 and isinstance(arguments[2], int):
            writes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if not writes or "runs" not in str(arguments[0]).split(os.sep):
            return
        seen += 1
        if seen == at:
            if delay < 1e-3:
                os.kill(os.getpid(), signal.SIGKILL)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process without a word, as SIGKILL does
            signal.setitimer(signal.ITIMER_REAL, delay)

    sys.addaudithook(count)
    try:
        become_stage(*stage)
    finally:
        Path("writes.txt").write_text(str(seen))


class Bench:
    """A recipe with tiny stages ppo and rloo, and a folder for each trial."""

    def __init__(self, folder: Path):
        self.folder, self.trials = folder, 0
        tokenizer = word_tokenizer()
        save_pair(folder / "policy", causal_lm(tokenizer), tokenizer)
        write_jsonl(folder / "rows.jsonl", REVIEWS)
        (folder / "odd.py").write_text(ODD_REWARDS)
        (folder / "r.yaml").write_text(
            f"name: r\ndescription: d\ndata: {{path: {folder}/rows.jsonl, prompt_tokens: [2, 3]}}\n"
            f"reward_funcs: [{{name: '{folder}/odd.py:draws'}}]\n"
            + "".join(f"{s}: {{policy: {folder}/policy, trainer: {{{TRAINER}}}}}\n" for s in ("ppo", "rloo"))
        )
        self.drawn: set[str] = set()
        self._whole: dict[tuple[str, ...], Path] = {}

    def run(self, stage: str, name: str, *overrides: str, kill: tuple[int, float] | None = None) -> int | None:
        """The exit code of a stage in a trial's folder; None: it hangs. What it said is in `output.txt`."""
        (self.folder / name).mkdir(exist_ok=True)
        arguments = (stage, [str(self.folder / "r.yaml"), *overrides], self.folder / name, dict(os.environ))
        process = call(become_stage, *arguments) if kill is None else call(killed_stage, *kill, *arguments)
        try:
            return process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            return None
        finally:
            process.kill()
            process.wait()

    def path(self, stage: str, name: str) -> Path:
        return self.folder / name / "runs" / "r" / stage

    def output(self, name: str) -> str:
        return (self.folder / name / "output.txt").read_text(encoding="utf-8", errors="replace")

    def name(self) -> str:
        self.trials += 1
        return f"trial-{self.trials}"

    def whole(self, stage: str, *overrides: str) -> Path:
        """The folder of a run without faults."""
        key = (stage, *overrides)
        if key not in self._whole:
            name = f"whole-{len(self._whole)}"
            assert self.run(stage, name, *overrides, kill=(0, 0.0)) == 0, self.output(name)
            self._whole[key] = self.path(stage, name)
        return self._whole[key]

    def ended(self, name: str, code: int | None) -> str:
        """The outcome of a stage that did not finish."""
        said = self.output(name)
        if code is None:
            return "hangs"
        is_sentence = code == USER_ERROR and "error: " in said and "Traceback" not in said
        return "failed with a sentence" if is_sentence or code in (129, 130, 143) else "traceback"


def logged(path: Path) -> list[dict[str, Any]]:
    """The lines of a jsonl file without its clock columns."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if not any(time in key for time in TIMES)} for row in rows]


def differences(one: Path, other: Path, logs: bool = True) -> list[str]:
    """The files in which two finished runs differ."""
    names = [path.relative_to(one) for path in one.rglob("*.safetensors") if "checkpoint-" not in str(path)]
    found = [str(name) for name in names if (one / name).read_bytes() != (other / name).read_bytes()]
    if logs:
        found += [name for name in ("metrics.jsonl", "completions.jsonl") if logged(one / name) != logged(other / name)]
        states = [
            json.loads(max(path.glob("checkpoint-*")).joinpath("trainer_state.json").read_text())
            for path in (one, other)
        ]
        for state in states:
            state["log_history"] = [
                {k: v for k, v in line.items() if not any(t in k for t in TIMES)} for line in state["log_history"]
            ]
        found += ["trainer_state.json"] if json.dumps(states[0]) != json.dumps(states[1]) else []
    return found


def kill(bench: Bench, rng: random.Random) -> tuple[str, str]:
    """A stage is killed once or twice, at random writes, and resumed."""
    stage, name = rng.choice(("ppo", "rloo")), bench.name()
    overrides = (f"{stage}.trainer.max_steps=6", f"{stage}.trainer.num_iterations={rng.choice((1, 2))}")
    whole = bench.whole(stage, *overrides)
    writes = int((whole.parents[2] / "writes.txt").read_text())
    kills = [(rng.randint(1, writes), rng.choice((0.0, rng.random() * 0.05))) for _ in range(rng.choice((1, 2)))]
    for at in kills:
        bench.run(stage, name, *overrides, kill=at)
    case = f"{stage} {' '.join(overrides)} killed at {kills} of {writes}"
    code = bench.run(stage, name, *overrides)
    if code != 0:
        return bench.ended(name, code), case
    found = differences(whole, bench.path(stage, name))
    return ("silent loss" if found else "equal"), f"{case}: {found}"


def harm(file: Path, rng: random.Random) -> str:
    """Damages a file; returns how."""
    data, how = bytearray(file.read_bytes()), rng.choice(("flip", "flip", "cut", "empty", "delete", "zeros", "more"))
    at = rng.randrange(len(data)) if data else 0
    if how == "delete" or not data:
        file.unlink()
        return "delete"
    if how == "flip":
        for _ in range(rng.choice((1, 1, 5))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "zeros":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif how == "more":
        data += rng.randbytes(20)
    else:
        data = data[: at if how == "cut" else 0]
    file.write_bytes(data)
    return how


def damage(bench: Bench, rng: random.Random) -> tuple[str, str]:
    """Files of a stopped run are damaged before the same command goes on."""
    stage, name = rng.choice(("ppo", "rloo")), bench.name()
    overrides = (f"{stage}.trainer.max_steps=6", f"{stage}.trainer.num_iterations=1")
    whole, stopped = bench.whole(stage, *overrides), f"stopped-{stage}"
    if not (bench.folder / stopped).exists():  # killed behind the last step, before the final model
        shutil.copytree(whole.parents[2], bench.folder / stopped)
        path = bench.path(stage, stopped)
        manifest = json.loads((path / "manifest.json").read_text()) | {"status": "running"}
        (path / "manifest.json").write_text(json.dumps(manifest, indent=2))
        for part in [*path.glob("*.safetensors"), path / "checkpoint-6" / "complete.json"]:
            part.unlink()
    shutil.copytree(bench.folder / stopped, bench.folder / name)
    (bench.folder / name / "output.txt").write_text("")
    path, harms = bench.path(stage, name), []
    for pattern in rng.sample(STATE_FILES, rng.choice((1, 1, 2))):
        if files := sorted(path.glob(pattern)):
            file = rng.choice(files)
            harms.append(f"{harm(file, rng)} {file.relative_to(path)}")
    case = f"{stage}: {', '.join(harms)}"
    code = bench.run(stage, name, *overrides)
    if code != 0:
        return bench.ended(name, code), case
    found = differences(whole, path)
    if not found:
        return "equal", case
    logs = {"metrics.jsonl", "completions.jsonl"}
    said = any(word in bench.output(name) for word in ("damaged", "left out"))
    return ("lost, and said so" if said and set(found) <= logs else "silent loss"), f"{case}: {found}"


def as_override(key: str, value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        value = f"{'-' if value < 0 else '.'}{'.inf' if value < 0 else 'nan' if value != value else 'inf'}"
        return f"{key}={value}"
    return f"{key}={json.dumps(value)}"


def is_finite(path: Path) -> bool:
    tensors = [tensor for file in path.rglob("*.safetensors") for tensor in load_file(file).values()]
    return bool(tensors) and all(abs(tensor).max(initial=0) < math.inf for tensor in tensors)


def odd_settings(bench: Bench, stage: str, settings: dict[str, Any]) -> tuple[str, str]:
    """A stage with settings that nobody means trains for two updates, or is refused."""
    overrides = [f"{stage}.trainer.max_steps=2"]
    for key, value in settings.items():
        is_ours = "." in key or key in (
            "seed",
            "name",
            "episodes",
            "special_tokens",
            "missing_eos",
            "trust_remote_code",
        )
        overrides.append(as_override(key if is_ours else f"{stage}.trainer.{key}", value))
    case, name = f"{stage} {' '.join(overrides[1:])}", bench.name()
    try:
        load_checked(str(bench.folder / "r.yaml"), overrides)
    except RecipeError:
        return "refused", case
    except Exception as error:  # noqa: BLE001 - it is the finding
        return "traceback", f"{case}: {error!r}"
    code = bench.run(stage, name, *overrides)
    if code != 0:
        return bench.ended(name, code), f"{case}: {bench.output(name).strip().splitlines()[-1:]}"
    finished = list((bench.folder / name / "runs").glob(f"*/{stage}"))
    return ("finished" if is_finite(finished[0]) else "not finite"), case


def odd_reward(bench: Bench, rng: random.Random) -> tuple[str, str]:
    """A reward function that misbehaves, perhaps beside a good one."""
    functions = [
        name.split("(")[0].split()[-1] for name in ODD_REWARDS.splitlines() if name.startswith(("def", "async"))
    ]
    stage, name, odd = rng.choice(("ppo", "rloo")), bench.name(), rng.choice(functions)
    timeout = ", timeout: 5" if odd == "sleeps_long" or (odd != "leaves_at_once" and rng.random() < 0.2) else ""

    def overrides(function: str) -> list[str]:
        beside = f", {{name: '{bench.folder}/odd.py:good'}}" if is_beside else ""
        return [
            f"{stage}.trainer.max_steps=2",
            f"reward_funcs=[{{name: '{bench.folder}/odd.py:{function}'{timeout}}}{beside}]",
        ]

    is_beside = rng.random() < 0.5
    case = f"{stage} {odd}{timeout}{' beside a good one' if is_beside else ''}"
    code = bench.run(stage, name, *overrides(odd))
    if odd in ("leaves_at_once", "kills"):  # no code can prevent it: it must not look finished
        manifest = json.loads((bench.path(stage, name) / "manifest.json").read_text())
        return ("silent loss" if manifest["status"] == "finished" else "failed with a sentence"), case
    if code != 0:
        return bench.ended(name, code), f"{case}: {bench.output(name).strip().splitlines()[-1:]}"
    if not is_finite(bench.path(stage, name)):
        return "not finite", case
    if odd in INNOCENT and differences(bench.whole(stage, *overrides("plain")), bench.path(stage, name), logs=False):
        return "silent loss", case
    return "finished", case


def table(found: dict[str, Counter]) -> str:
    """Outcomes of each kind of trial, as a table."""
    lines = [" | ".join(["kind", "draws", *OUTCOMES]), " | ".join(["---"] * (len(OUTCOMES) + 2))]
    lines += [
        " | ".join(map(str, [kind, count.total(), *(count[o] for o in OUTCOMES)])) for kind, count in found.items()
    ]
    return "\n".join(f"| {line} |" for line in lines)
