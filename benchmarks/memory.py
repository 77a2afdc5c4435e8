"""Compares the forecast of `rlhf-recipes plan` with a stage's peak memory, minus the memory before its first model.

    python benchmarks/memory.py                          # all cases, on the CPU
    python benchmarks/memory.py --cases sft ppo_ddp     # some
    python benchmarks/memory.py --device cuda --cases sft ppo_shared   # takes torch's own peak; never run

Every case runs a real stage of a small recipe in its own process (DDP and ZeRO: in two), with random weights, for three
optimizer steps or two rollouts. The model is a Llama of 38M parameters with a vocabulary of 20,000, unless the case names
another one.

On a CPU the peak is that of resident memory (VmHWM), which the script resets when training starts, minus the resident
memory right before the first model is made. MALLOC_MMAP_THRESHOLD_ makes glibc return every block of 64 KiB and more at
once: by default it keeps freed memory, and the peak would depend on earlier blocks. A hook in torch's dispatcher would not
count the buffers of its libraries, and would slow the stage down.

The last line is JSON: for every case `predicted` and `measured` (bytes of the rank with the most) and their `ratio`.
"""

import argparse
import ctypes
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

MODELS = {
    "llama": {
        "hidden_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 1408,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    },
    "gpt2": {"n_embd": 512, "n_layer": 6, "n_head": 8, "n_positions": 512},
    "small": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 704,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
}
VOCABULARY = 20_000
SMALL_VOCABULARY = 32_000

PROMPT, COMPLETION = 64, 32
LENGTH = PROMPT + COMPLETION

LORA = "{r: 8, lora_alpha: 16, target_modules: all-linear}"
NF4 = "{load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true}"

CASES = {
    # name: (stage, model, accelerate's configuration, overrides below the stage)
    "sft": ("sft", "llama", None, ()),
    "sft_gpt2": ("sft", "gpt2", None, ()),
    "sft_checkpointing": ("sft", "llama", None, ("trainer.gradient_checkpointing=true",)),
    "sft_lora": ("sft", "llama", None, (f"peft={LORA}",)),
    "sft_4bit": ("sft", "llama", None, (f"peft={LORA}", f"quantization={NF4}")),
    "sft_8bit_adam": ("sft", "llama", None, ("trainer.optim=adamw_8bit",)),
    "reward": ("reward", "llama", None, ()),
    "rloo": ("rloo", "llama", None, ()),
    "ppo_shared": ("ppo", "llama", None, ()),
    "ppo_separate": ("ppo", "llama", None, ("value_model=policy",)),
    "ppo_4bit": ("ppo", "llama", None, (f"peft={LORA}", f"quantization={NF4}")),
    "rloo_reward_model": ("rloo", "llama", None, ("reward",)),
    "small_sampling": ("rloo", "small", None, ("trainer.gradient_accumulation_steps=48",)),
    "sft_ddp": ("sft", "llama", "cpu_ddp_2", ()),
    "ppo_ddp": ("ppo", "llama", "cpu_ddp_2", ()),
    "sft_zero2": ("sft", "llama", "cpu_zero2_2", ()),
    "ppo_zero2": ("ppo", "llama", "cpu_zero2_2", ("value_model=policy",)),
    "small_sft": ("sft", "small", None, ()),
    "small_reward": ("reward", "small", None, ()),
    "small_rloo": ("rloo", "small", None, ()),
    "small_ppo": ("ppo", "small", None, ("value_model=policy",)),
}
"""A test runs the quick cases, which are named small_*."""


def make(folder: Path, kind: str) -> None:
    """Make a model with random weights, a tokenizer of words, and rows with texts of the longest allowed length."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    vocabulary = SMALL_VOCABULARY if kind == "small" else VOCABULARY
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt2" if kind == "gpt2" else "llama",
        **MODELS[kind],
        vocab_size=vocabulary,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    draw = random.Random(0)

    def text(length: int) -> str:
        return " ".join(f"w{draw.randrange(3, vocabulary)}" for _ in range(length))

    rows = []
    for _ in range(400):
        prompt, chosen, rejected = text(PROMPT), text(COMPLETION - 1), text(COMPLETION - 1)
        rows.append(
            {
                "prompt": prompt,
                "completion": " " + chosen,
                "chosen": f"{prompt} {chosen}",
                "rejected": f"{prompt} {rejected}",
            }
        )
    for name, columns in (("texts", ("prompt", "completion")), ("pairs", ("chosen", "rejected"))):
        lines = (json.dumps({column: row[column] for column in columns}) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def recipe(folder: Path, case: str) -> tuple[str, list[str]]:
    """Write the recipe of a case; returns its file and overrides."""
    stage, _, _, more = CASES[case]
    rewards = "[{name: length}]"
    if "reward" in more:
        rewards = f"[{{name: reward_model, args: {{model: {folder / 'reward_model'}}}}}]"
    on_policy = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "max_completion_length": COMPLETION,
        "beta": 0.05,
        "num_generations": 2,
    }
    trainer = (
        on_policy
        if stage in ("ppo", "rloo")
        else {"per_device_train_batch_size": 4, "max_steps": 3, "max_length": LENGTH}
    )
    trainer |= {"save_strategy": "no", "gradient_checkpointing": False, "per_device_eval_batch_size": 4}
    name = "policy" if stage in ("ppo", "rloo") else "model"
    file = folder / "recipe.yaml"
    file.write_text(
        f"name: {case}\ndescription: memory\nruns_dir: {folder / 'runs'}\n"
        f"data: {{path: {folder / ('pairs' if stage == 'reward' else 'texts')}.jsonl, max_prompt_tokens: {PROMPT}, max_rows: 200}}\n"
        f"reward_funcs: {rewards}\n{stage}:\n  {name}: {folder / 'model'}\n  trainer: {json.dumps(trainer)}\n",
        encoding="utf-8",
    )
    return str(file), [f"{stage}.{override}" for override in more if override != "reward"]


def predicted(file: str, overrides: list[str], stage: str, config: str | None, device: str) -> float:
    from rlhf_recipes.planning.machine import launch_of, machine_of
    from rlhf_recipes.planning.stage import plan_stage
    from rlhf_recipes.recipe.load import load_recipe

    gpu = f"{2 if config else 1}x{device if device == 'cpu' else 'GPU'}-64"
    machine = machine_of(gpu)
    accelerate = config and str(ROOT / "accelerate_configs" / f"{config}.yaml")
    planned = plan_stage(load_recipe(file, overrides), stage, machine, launch_of(machine, accelerate))
    return planned.total


def status(name: str) -> int:
    """Bytes in the line `name` of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def work(file: str, overrides: list[str], stage: str, device: str, result: Path) -> None:
    """Run a stage in this process of a launch, and write its peak to a file."""
    import importlib

    import torch
    import transformers

    for name in (
        "models.start",
        "data.rows",
        "trainers.ppo",
        "trainers.rloo",
        "trainers.args",
        "evaluation.sft_quality",
        "evaluation.reward_quality",
        "runs.callbacks",
    ):
        importlib.import_module(f"rlhf_recipes.{name}")
    for name in ("peft", "trl", "bitsandbytes", "pandas", "deepspeed", "torch.distributed"):
        if importlib.util.find_spec(name):
            importlib.import_module(name)
    from trl import RewardTrainer, SFTTrainer  # noqa: F401  # TRL imports them on first use

    if any("quantization" in override for override in overrides):  # bitsandbytes compiles its functions on first use
        import bitsandbytes

        layer = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4").to(device)
        layer(torch.ones(1, 64, device=device, requires_grad=True)).sum().backward()

    from rlhf_recipes.stage import run_stage

    seen = {}

    def baseline() -> None:
        if "before" in seen:
            return
        gc.collect()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            seen["before"] = torch.cuda.memory_allocated()
            return
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        seen["before"] = status("VmRSS")

    made = transformers.PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls, *args, **kwargs):
        baseline()
        loaded = made(cls, *args, **kwargs)
        # Copies tensors out of the mapped file: otherwise pages of it count that held tensors before their quantization.
        for parameter in (loaded[0] if isinstance(loaded, tuple) else loaded).parameters():
            if parameter.dtype == torch.float32 and device == "cpu":
                parameter.data = parameter.data.clone()
        return loaded

    transformers.PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    trained = transformers.Trainer.train

    def train(self, *args, **kwargs):
        if device == "cpu":  # counts training only: a loading model is also in its file's pages
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        output = trained(self, *args, **kwargs)
        seen["peak"] = torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM")
        return output

    transformers.Trainer.train = train
    main = importlib.import_module(f"rlhf_recipes.{stage}").main
    code = run_stage(stage, main, file, overrides, overwrite=True)
    rank = os.environ.get("RANK", "0")
    (result / f"{rank}.json").write_text(json.dumps(seen | {"code": code}), encoding="utf-8")
    if "RANK" in os.environ:
        from accelerate import PartialState

        PartialState().destroy_process_group()
    sys.exit(code)


def measured(file: str, overrides: list[str], stage: str, config: str | None, device: str, folder: Path) -> float:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable]
    if config:
        command += [
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(ROOT / "accelerate_configs" / f"{config}.yaml"),
        ]
    result = folder / "peaks"
    result.mkdir(exist_ok=True)
    command += [
        __file__,
        "--work",
        stage,
        "--file",
        file,
        "--result",
        str(result),
        "--device",
        device,
        "--",
        *overrides,
    ]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    peaks = [json.loads(path.read_text(encoding="utf-8")) for path in result.glob("*.json")]
    if done.returncode or not peaks or any("peak" not in peak for peak in peaks):
        raise RuntimeError(f"{stage}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    return max(peak["peak"] - peak["before"] for peak in peaks)


def compare(case: str, device: str = "cpu") -> dict[str, float]:
    """Forecast and measurement of one case."""
    stage, kind, config, more = CASES[case]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, __file__, "--make", kind, "--result", name], check=True)
        if "reward" in more:
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            classifier = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
            classifier.save_pretrained(folder / "reward_model")
            AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "reward_model")
        file, overrides = recipe(folder, case)
        found = {
            "predicted": predicted(file, overrides, stage, config, device),
            "measured": measured(file, overrides, stage, config, device, folder),
        }
    return found | {"ratio": found["predicted"] / found["measured"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.result, options.make)
        return
    if options.work:
        work(options.file, options.overrides, options.work, options.device, options.result)
    found = {}
    for case in options.cases:
        found[case] = compare(case, options.device)
        row = found[case]
        print(
            f"| `{case}` | {row['predicted'] / 1e6:.0f} | {row['measured'] / 1e6:.0f} | {row['ratio']:.2f} |",
            flush=True,
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
