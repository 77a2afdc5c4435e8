"""PPO and RLOO on one GPU, at sizes that people train: episodes a second, peak memory, and what `plan` says beside it.

    python benchmarks/gpu.py                                   # needs a GPU; not measured yet
    python benchmarks/gpu.py --sizes 410m --modes full lora    # a part of it
    python benchmarks/gpu.py --sizes tiny --rollouts 2         # does it run? on a CPU, too

Each case is a stage of recipe imdb_tiny, with a policy of random weights in the given size, which samples completions of full
length: 64 at once, of 48 tokens behind prompts of 64 at most, four passes over each rollout. Weights are float32 under
autocast, as a recipe trains them. Episodes a second are the median over rollouts without the first; the peak is torch's own
(on a CPU there is none). The last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = {
    "tiny": ("gpt2", {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 3500}),
    "gpt2": ("gpt2", {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257}),
    "410m": ("gpt_neox", {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16,
                          "intermediate_size": 4096, "vocab_size": 50304}),
    "1b": ("gpt_neox", {"num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 8,
                        "intermediate_size": 8192, "vocab_size": 50304}),
}  # fmt: skip
"""Architecture and sizes; 410m and 1b are Pythia's."""

LORA = "peft={r: 16, lora_alpha: 32, target_modules: all-linear}"
MODES = {
    "full": [],
    "lora": [LORA],
    "4bit": [LORA, "quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true}"],
}

BATCH = 64


def make(folder: Path, size: str) -> None:
    """A policy with random weights, and the tokenizer of the model that comes with the package."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import rlhf_recipes

    tokenizer = AutoTokenizer.from_pretrained(Path(rlhf_recipes.__file__).parent / "base")
    architecture, numbers = SIZES[size]
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **numbers, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def overrides(stage: str, mode: str, policy: Path, rollouts: int, runs: Path) -> list[str]:
    settings = {
        "per_device_train_batch_size": BATCH // 4,
        "gradient_accumulation_steps": 4,
        "num_generations": 4,
        "num_iterations": 4,
        "max_completion_length": 48,
        "learning_rate": 1e-6,
        "save_strategy": "no",
    }
    return [
        f"runs_dir={runs}",
        f"{stage}.policy={policy}",
        f"episodes={BATCH * rollouts}",
        "data.sentences=null",
        "data.prompt_tokens=[16, 64]",
        f"data.max_rows={max(200, 2 * BATCH * rollouts)}",
        *(f"{stage}.trainer.{name}={value}" for name, value in settings.items()),
        *(f"{stage}.{more}" for more in MODES[mode]),
    ]


def measure(stage: str, size: str, mode: str, rollouts: int) -> dict[str, float | None]:
    """Run one case; GB are 2^30 bytes."""
    from rlhf_recipes.planning.stage import launch_of, machine_of, plan_stage
    from rlhf_recipes.recipe.load import load_recipe
    from rlhf_recipes.runs.folder import read_manifest, read_metrics

    with tempfile.TemporaryDirectory() as name:
        policy, runs = Path(name) / "policy", Path(name) / "runs"
        make(policy, size)
        given = overrides(stage, mode, policy, rollouts, runs)
        subprocess.run([sys.executable, "-m", f"rlhf_recipes.{stage}", "--recipe", "imdb_tiny", *given], check=True)
        run = runs / "imdb_tiny" / stage
        rates = [line["episodes_per_second"] for line in read_metrics(run) if "episodes_per_second" in line]
        machine = machine_of(None)
        planned = plan_stage(load_recipe("imdb_tiny", given), stage, machine, launch_of(machine, None))
        return {
            "episodes_per_second": statistics.median(rates[1:]),
            "peak_gb": read_manifest(run)["peak_gpu_memory_gib"],
            "planned_gb": planned.total / 2**30,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["gpt2", "410m", "1b"], choices=list(SIZES))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--stages", nargs="+", default=["ppo", "rloo"], choices=["ppo", "rloo"])
    parser.add_argument("--rollouts", type=int, default=6)
    options = parser.parse_args()
    found = {}
    for size in options.sizes:
        for mode in options.modes:
            for stage in options.stages:
                row = found[f"{size} {mode} {stage}"] = measure(stage, size, mode, options.rollouts)
                shown = " | ".join("" if value is None else f"{value:.2f}" for value in row.values())
                print(f"| {size} | {mode} | {stage} | {shown} |", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
