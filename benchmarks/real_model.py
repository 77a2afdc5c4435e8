"""PPO and RLOO of this project against TRL 1.16's RLOO on a real language model: SmolLM2-135M with LoRA, on a CPU.

    rlhf-recipes fetch smollm2
    python benchmarks/real_model.py                 # float32, 32 episodes of 24 tokens an update, 2 rounds
    python benchmarks/real_model.py --dtype bfloat16    # frozen weights in bfloat16, for all contenders

Every contender runs in its own process, in turn, with the same prompts (openings of film reviews), number of updates and
threads. All train an adapter of the same rank on one batch an update. TRL's trainer runs with its fastest micro-batch. The
first update is not counted. The last line is JSON:

- `rloo_over_trl`: our RLOO's episodes a second over TRL's; `ppo_over_rloo_time`: time of our PPO over that of our RLOO
- `peak_gb`: largest resident memory of our two, with all imports
- `seconds_per_phase`: of one update of each of our two
- `of_arithmetic_limit`: share of the operations a second that the machine reaches in the LM head's products
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from statistics import median

EPISODES, PROMPTS, NEW_TOKENS, RANK = 32, 8, 24, 16
HIDDEN, VOCABULARY, BACKBONE, PROMPT_TOKENS = 576, 49152, 106e6, 5.5
"""Of SmolLM2-135M: width, words, weights without embeddings; and the mean length of the prompts."""

CONTENDERS = {"ours_rloo": (32, 8), "trl_rloo": (32, 8), "ours_ppo": (32, 8)}
"""Name -> micro-batches to try before the rounds; the fastest one is measured."""


def child(name: str, micro_batch: int, dtype: str, updates: int) -> None:
    """Train with one contender; prints its report as JSON."""
    import trl
    from contender import Meter, mean_of
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer

    import rlhf_recipes
    from rlhf_recipes.runs.fetched import locate_fetched

    trainer_class, config_class = {
        "trl_rloo": (trl.RLOOTrainer, trl.RLOOConfig),
        "ours_rloo": (rlhf_recipes.RLOOTrainer, rlhf_recipes.RLOOConfig),
        "ours_ppo": (rlhf_recipes.PPOTrainer, rlhf_recipes.PPOConfig),
    }[name]
    model = str(locate_fetched("benchmark", "smollm2"))
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.pad_token = "<|endoftext|>"
    meter = Meter(steps_per_update=1)
    lengths: list[int] = []

    def parity(prompts, completions, completion_ids, **columns) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [float(ids[-1] % 2) for ids in completion_ids]

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=model,
            reward_funcs=parity,
            args=config_class(
                output_dir=folder,
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=EPISODES // micro_batch,
                num_generations=EPISODES // PROMPTS,
                max_completion_length=NEW_TOKENS,
                num_iterations=1,
                max_steps=updates,
                learning_rate=1e-5,
                beta=0.05,
                temperature=1.0,
                model_init_kwargs={"dtype": dtype},
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                save_strategy="no",
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": prompts((updates + 1) * PROMPTS, tokenizer)}),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[meter],
        )
        trainer.train()
    phases = ("generate", "score", "forward", "update")
    logs = [line for line in trainer.state.log_history if "seconds_generate" in line][1:]  # TRL has no such times
    split = mean_of([{phase: line[f"seconds_{phase}"] for phase in phases} for line in logs])
    print(json.dumps(meter.result() | {"split": split, "tokens": sum(lengths) / len(lengths)}))


def prompts(number: int, tokenizer) -> list[str]:
    """Beginnings of film reviews, 3 to 8 tokens, as the recipe `imdb_smol` cuts them."""
    from rlhf_recipes.data.rows import load_rows
    from rlhf_recipes.data.shapes import prompts
    from rlhf_recipes.recipe.load import load_recipe

    recipe = load_recipe("imdb_smol", ["data.max_rows=2000"])
    return prompts(recipe.data, load_rows(recipe.data, 0)[0], tokenizer, 0)["prompt"][:number]


def matrix_rate(dtype: str) -> None:
    """Print the floating-point operations a second in products of the model's LM head, on one rollout's rows."""
    import torch

    rows = torch.randn(EPISODES * NEW_TOKENS, HIDDEN, dtype=getattr(torch, dtype))
    head = torch.randn(HIDDEN, VOCABULARY, dtype=rows.dtype)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        rows @ head
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"rate": 2 * rows.numel() * VOCABULARY / median(seconds)}))


def run(options: argparse.Namespace, name: str, micro_batch: int = 0) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, "--child", name, str(micro_batch), "--dtype", options.dtype]
        + ["--updates", str(options.updates)],
        env=os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{name} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if name == "matrix_rate":
        return found
    found |= {"micro_batch": micro_batch, "time": median(found["seconds"])}
    print(
        f"  {name:<10} micro-batch {micro_batch:>2}   {EPISODES / found['time']:5.2f} episodes/s   "
        f"{found['peak'] / 1e9:.2f} GB   {json.dumps({k: round(v, 2) for k, v in found['split'].items()})}",
        flush=True,
    )
    return found


def operations(tokens: float) -> float:
    """Floating-point operations that an update needs, for completions of so many tokens on average.

    Four passes: sampling, which gives the policy's log-probabilities too, the reference, and forward and backward of
    training; frozen weights need no gradients, so that a backward pass costs as much as a forward pass.
    """
    return 4 * 2 * EPISODES * (BACKBONE * (PROMPT_TOKENS + tokens) + HIDDEN * VOCABULARY * tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen weights")
    parser.add_argument("--updates", type=int, default=3, help="updates of one process; the first is not counted")
    parser.add_argument("--rounds", type=int, default=2, help="runs of every contender")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--child", nargs=2, metavar=("NAME", "MICRO_BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, micro_batch = options.child
        if name == "matrix_rate":
            matrix_rate(options.dtype)
        else:
            child(name, int(micro_batch), options.dtype, options.updates)
        return
    rate = run(options, "matrix_rate")["rate"]
    print("micro-batches:")
    tried = {name: [run(options, name, size) for size in sizes] for name, sizes in CONTENDERS.items()}
    sizes = {name: min(found, key=lambda each: each["time"])["micro_batch"] for name, found in tried.items()}
    print("rounds:")
    rounds = [{name: run(options, name, sizes[name]) for name in CONTENDERS} for _ in range(options.rounds)]

    def middle(above: str, below: str) -> float:
        return round(median(each[above]["time"] / each[below]["time"] for each in rounds), 3)

    ours = [name for name in CONTENDERS if name.startswith("ours")]
    limits = [operations(each["ours_rloo"]["tokens"]) / rate / each["ours_rloo"]["time"] for each in rounds]
    result = {
        "rloo_over_trl": middle("trl_rloo", "ours_rloo"),
        "ppo_over_rloo_time": middle("ours_ppo", "ours_rloo"),
        "peak_gb": round(max(each[name]["peak"] for each in rounds for name in ours) / 1e9, 2),
        "seconds_per_phase": {name: rounds[-1][name]["split"] for name in ours},
        "of_arithmetic_limit": round(median(limits), 3),
        "gflops": round(rate / 1e9),
        "dtype": options.dtype,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
