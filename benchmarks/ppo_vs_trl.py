"""PPO and RLOO of this project against TRL 1.12.0's PPO and TRL 1.16's RLOO: episodes a second and peak memory.

    python benchmarks/ppo_vs_trl.py                     # 4 epochs, 48 new tokens, separate value network, fp32, CPU
    python benchmarks/ppo_vs_trl.py --epochs 1
    python benchmarks/ppo_vs_trl.py --new-tokens 128
    python benchmarks/ppo_vs_trl.py --ragged            # EOS likely: lengths spread over 1..48
    python benchmarks/ppo_vs_trl.py --device cuda --model gpt2      # or pythia-410m; bf16

Every contender runs in its own process, in turn (A B C, A B C, ...), on the same random weights, prompts, number of
tokens, epochs and optimizer steps, with the same optimizer and threads. The first update is not counted. Memory is the
peak minus the memory of the imports. TRL's trainers run with their fastest micro-batch.

The last line is JSON. Each key has a `<key>_spread`, the smallest and the largest ratio of one round:

- `episodes_ratio_separate`, `episodes_ratio_shared`: our PPO's episodes a second over TRL 1.12.0's
- `memory_ratio_separate`: our PPO's memory over TRL 1.12.0's, both with a separate value network
- `ppo_over_rloo_time`: time of our PPO with the shared value head over that of our RLOO
- `rloo_over_trl`: our RLOO's episodes a second over TRL 1.16's
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, median

import trl_venv

GPT2 = {"model_type": "gpt2", "vocab_size": 50304, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS = {
    "tiny": GPT2 | {"vocab_size": 512, "num_hidden_layers": 2, "hidden_size": 32, "n_head": 2, "n_positions": 256},
    "small": GPT2 | {"num_hidden_layers": 6, "hidden_size": 256, "n_head": 4, "n_positions": 256},
    "gpt2": GPT2 | {"num_hidden_layers": 12, "hidden_size": 768, "n_head": 12, "n_positions": 1024},
    "pythia-410m": {
        "model_type": "gpt_neox",
        "vocab_size": 50304,
        "num_hidden_layers": 24,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "max_position_embeddings": 2048,
    },
    "pythia-1b": {
        "model_type": "gpt_neox",
        "vocab_size": 50304,
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 8,
        "intermediate_size": 8192,
        "max_position_embeddings": 2048,
    },
}
PROMPT_TOKENS = 12
TRL_MICRO_BATCHES = (32, 8)
"""The warm-up tries these; the fastest one is measured."""

OURS = ("ours_ppo_separate", "ours_ppo_shared", "ours_rloo")
TRLS = ("trl_ppo", "trl_rloo")
RATIOS = {
    # name: (measure, numerator, denominator)
    "episodes_ratio_separate": ("episodes", "ours_ppo_separate", "trl_ppo"),
    "memory_ratio_separate": ("memory", "ours_ppo_separate", "trl_ppo"),
    "episodes_ratio_shared": ("episodes", "ours_ppo_shared", "trl_ppo"),
    "ppo_over_rloo_time": ("time", "ours_ppo_shared", "ours_rloo"),
    "rloo_over_trl": ("episodes", "ours_rloo", "trl_rloo"),
}


def task_of(options: argparse.Namespace, contender: str, micro_batch: int) -> dict:
    """The task for `contender.py`."""
    return {
        "contender": contender,
        "model": MODELS[options.model],
        "device": options.device,
        "prompts": options.prompts,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": options.new_tokens,
        "epochs": options.epochs,
        "updates": options.updates,
        "ragged": options.ragged,
        "micro_batch": micro_batch,
    }


def with_rates(options: argparse.Namespace, contender: str, result: dict) -> dict:
    """A contender's report, with `episodes` (a second), `time` (seconds of an update), `memory` (bytes above the imports).

    Raises:
        SystemExit: The contender made another number of optimizer steps.
    """
    steps = options.updates * options.epochs
    if result["optimizer_steps"] != steps:
        raise SystemExit(f"{contender} made {result['optimizer_steps']} optimizer steps instead of {steps}.")
    time = median(result["seconds"])
    return result | {"time": time, "episodes": options.prompts / time, "memory": result["peak"] - result["imports"]}


def run(options: argparse.Namespace, contender: str, micro_batch: int = 0) -> dict:
    """Run one contender in its own process; returns its report, see `with_rates`."""
    # No torch in this process: a child's peak of resident memory starts at its parent's.
    environment = os.environ | {
        "OMP_NUM_THREADS": str(options.threads),
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    python, variables = trl_venv.python_and_path(options) if contender == "trl_ppo" else (sys.executable, {})
    done = subprocess.run(
        [python, Path(__file__).with_name("contender.py"), json.dumps(task_of(options, contender, micro_batch))],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{contender} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    if contender != "matrix_rate":
        result = with_rates(options, contender, result)
        print(
            f"  {contender:<18} micro-batch {micro_batch:>3}   {result['episodes']:6.2f} episodes/s   "
            f"{result['memory'] / 1e9:5.2f} GB above {result['imports'] / 1e9:.2f}",
            flush=True,
        )
    return result


def operations_per_update(options: argparse.Namespace, contender: str, tokens: float) -> float:
    """Floating-point operations that every update needs.

    Args:
        contender: RLOO has no value network, a shared value head costs nothing.
        tokens: Mean completion length.
    """
    model = MODELS[options.model]
    d, layers, vocabulary = model["hidden_size"], model["num_hidden_layers"], model["vocab_size"]
    length = PROMPT_TOKENS + tokens
    # A block has 12 d^2 weights, two operations each; attention's two products see half of the sequence on average.
    backbone = options.prompts * (length - 1) * layers * (24 * d * d + 2 * d * length)
    head = options.prompts * tokens * 2 * d * vocabulary  # on completion positions only
    values = backbone if contender in ("trl_ppo", "ours_ppo_separate") else 0.0
    # Sampling runs every token through the model once, with a cache, and gives the old log-probabilities.
    sampling = backbone + head
    reference = backbone + head
    # A backward pass costs twice as much as a forward pass.
    training = options.epochs * 3 * (backbone + head + values)
    return sampling + reference + values + training


def print_table(options: argparse.Namespace, runs: dict[str, list[dict]], sizes: dict[str, int], rate: float) -> None:
    print(f"\nMatrix rate {rate / 1e9:.0f} GFLOP/s in the LM head's products; the limit is arithmetic at that rate.")
    print("| contender | micro-batch | episodes/s | min-max | memory, GB | limit, episodes/s | reached | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for contender, results in runs.items():
        speeds = [result["episodes"] for result in results]
        tokens = mean(result["mean_tokens"] for result in results)
        limit = options.prompts / (operations_per_update(options, contender, tokens) / rate)
        split = ", ".join(
            f"{name} {mean(result['split'][name] for result in results):.2f}" for name in results[0]["split"]
        )
        print(
            f"| {contender} | {sizes[contender]} x {options.prompts // sizes[contender]} | {median(speeds):.2f} "
            f"| {min(speeds):.2f}-{max(speeds):.2f} | {median(r['memory'] for r in results) / 1e9:.2f} "
            f"| {limit:.2f} | {median(speeds) / limit:.0%} | {split} |"
        )


def ratios(runs: dict[str, list[dict]]) -> dict[str, float | list[float] | None]:
    """Median and extremes of the ratios, each within one round; None if a contender did not run."""
    found = {}
    for name, (what, above, below) in RATIOS.items():
        pairs = zip(runs.get(above, []), runs.get(below, []), strict=False)
        values = [first[what] / second[what] for first, second in pairs]
        found[name] = round(median(values), 4) if values else None
        found[f"{name}_spread"] = [round(min(values), 4), round(max(values), 4)] if values else None
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=48)

    parser.add_argument("--prompts", type=int, default=32, help="episodes of one update")
    parser.add_argument("--ragged", action="store_true", help="make EOS likely, so that lengths differ")
    parser.add_argument("--model", choices=MODELS, default="small", help="sizes; the weights are random")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--updates", type=int, default=4, help="updates of one process; the first is not counted")
    parser.add_argument("--rounds", type=int, default=3, help="runs of every contender")
    parser.add_argument("--micro-batch", type=int, default=8, help="of our trainers")

    parser.add_argument("--contenders", nargs="+", choices=(*TRLS, *OURS), default=["trl_ppo", *OURS, "trl_rloo"])
    parser.add_argument("--quick", action="store_true", help="smoke test: a tiny model, one round, without TRL's")
    trl_venv.add_venv_option(parser)
    options = parser.parse_args(arguments)
    if options.quick:
        options.model, options.updates, options.rounds, options.new_tokens = "tiny", 2, 1, 8
        options.contenders = [name for name in options.contenders if name in OURS]
    return options


def main() -> None:
    options = parse()
    rate = run(options, "matrix_rate")["rate"]
    sizes = dict.fromkeys(options.contenders, options.micro_batch)
    if not options.quick:
        print("Warm-up, and the micro-batch for TRL:")
        for contender in options.contenders:
            tried = TRL_MICRO_BATCHES if contender in TRLS else [options.micro_batch]
            speeds = {size: run(options, contender, size)["episodes"] for size in tried}
            sizes[contender] = max(speeds, key=speeds.get)
    runs = {contender: [] for contender in options.contenders}
    for number in range(options.rounds):
        print(f"Round {number + 1}:")
        for contender in options.contenders:
            runs[contender].append(run(options, contender, sizes[contender]))
    print_table(options, runs, sizes, rate)
    print(json.dumps(ratios(runs)))


if __name__ == "__main__":
    main()
