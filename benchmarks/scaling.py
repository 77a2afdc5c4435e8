"""Measures the effect of more processes: weights and losses (none), bytes sent, memory, time, and waiting.

    python benchmarks/scaling.py                 # 1, 2 and 4 processes on a CPU: DDP, ZeRO-1, ZeRO-2
    python benchmarks/scaling.py --quick         # a small model, 1 and 2 processes
    python benchmarks/scaling.py --accumulation 4
    python benchmarks/scaling.py --imbalance     # only the last table, simulated

Every launch trains the same random GPT-2 with our RLOO trainer: 16 completions for each update, two passes over each
rollout, for any number of processes. The completions are given, not sampled, because samples differ between ranks.
Columns of the first table:

- difference: largest difference of final weights, and of losses, from those of one process
- bytes: bytes that a rank sends for an update in a ring, in units of the bytes of all weights. An all-reduce of S bytes
  sends 2 (N-1)/N S; reduce, broadcast, reduce-scatter and all-gather send (N-1)/N S each. In brackets: the formula
- memory of a process, in units of the bytes of all weights: its tensors between updates, when only DDP's buckets hold
  gradients, and the peak of all its memory minus the memory of imports
- seconds: time of an update without sampling; the first is not counted

The last line is JSON.
"""

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SIZES = {"quick": (2, 64), "full": (6, 512)}
"""Layers and width."""

ROWS, UPDATES = 16, 4

KINDS = {
    "one": "distributed_type: 'NO'\ngpu_ids: \"-1\"\n",
    "ddp": 'distributed_type: MULTI_GPU\ngpu_ids: "-1,-1"\n',
    "zero1": 'distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 1}\ngpu_ids: "-1,-1"\n',
    "zero2": 'distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 2}\ngpu_ids: "-1,-1"\n',
}
COMMON = "num_machines: 1\nmain_process_port: 0\nmixed_precision: 'no'\nuse_cpu: false\n"

LENGTHS = {
    # name: (median, sigma of the logarithm, longest); sigma None: geometric with that mean, any token may be the last
    "short: geometric, mean 40 if not cut, at most 53": (40, None, 53),
    "medium: lognormal, median 200, sigma 0.6, at most 1024": (200, 0.6, 1024),
    "long: lognormal, median 1000, sigma 1, at most 8192": (1000, 1.0, 8192),
}
RANKS = (1, 2, 4, 8, 16, 32, 64)


# The table of launches


def launch(kind: str, processes: int, size: str, accumulation: int, folder: Path) -> dict:
    """Train in `processes` processes; returns the result of rank 0, with the largest memory of all ranks."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"{KINDS[kind]}num_processes: {processes}\n{COMMON}")
    command = ["-m", "accelerate.commands.launch", "--config_file", str(folder / "config.yaml")]
    done = subprocess.run(
        [
            sys.executable,
            *command,
            __file__,
            "--worker",
            str(folder),
            "--size",
            size,
            "--accumulation",
            str(accumulation),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(done.stderr)
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    assert [rank["processes"] for rank in ranks] == [processes] * processes
    assert {rank["zero_stage"] for rank in ranks} == {{"zero1": 1, "zero2": 2}.get(kind)}
    return ranks[0] | {key: max(rank[key] for rank in ranks) for key in ("memory", "held")}


def expected_bytes(kind: str, processes: int, accumulation: int) -> float:
    """Bytes that a rank sends for an update, in units of the bytes of all weights.

    DDP and ZeRO-1 reduce the summed gradients after the last micro-batch. ZeRO-2 keeps no whole gradients, so that it
    reduces those of every micro-batch. DeepSpeed reduces by an all-reduce in both, and then gathers the new weights.
    """
    reductions = {"one": 0, "ddp": 2, "zero1": 2, "zero2": 2 * accumulation}[kind]
    return (reductions + kind.startswith("zero")) * (processes - 1) / processes


def difference(folder: Path, other: Path) -> float:
    from safetensors.torch import load_file

    one, two = load_file(folder / "weights.safetensors"), load_file(other / "weights.safetensors")
    return max((tensor - two[name]).abs().max().item() for name, tensor in one.items())


# The code of a launched process


def count_bytes(sent: dict[str, float]) -> None:
    """Make every collective of torch.distributed add the bytes that a ring sends for it to `sent`."""
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    def counted(name, factor, whole):
        original = getattr(dist, name)

        def call(*args, **kwargs):
            processes = dist.get_world_size()
            size = sum(tensor.nbytes for tensor in whole([*args, *kwargs.values()]))
            sent[name] = sent.get(name, 0.0) + factor * (processes - 1) / processes * size
            return original(*args, **kwargs)

        setattr(dist, name, call)

    for name in ("all_reduce", "reduce", "broadcast"):
        counted(name, 2 if name == "all_reduce" else 1, lambda args: [args[0]])
    counted("all_gather_into_tensor", 1, lambda args: [args[0]])
    counted("all_gather", 1, lambda args: args[0])
    counted("reduce_scatter_tensor", 1, lambda args: [args[1]])
    counted("reduce_scatter", 1, lambda args: args[1])
    made = DistributedDataParallel.__init__

    def make(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.register_comm_hook(None, allreduce_hook)  # without a hook, DDP calls no Python function

    DistributedDataParallel.__init__ = make


def tensor_bytes() -> int:
    """Bytes of all tensors that Python holds."""
    import torch

    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def work(folder: Path, size: str, accumulation: int) -> None:
    sent: dict[str, float] = {}
    count_bytes(sent)
    import psutil
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list
    from datasets import Dataset
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    import rlhf_recipes
    from rlhf_recipes import RLOOConfig, RLOOTrainer

    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        import deepspeed  # noqa: F401  # its memory must not count as the model's

    tokenizer = AutoTokenizer.from_pretrained(Path(rlhf_recipes.__file__).parent / "base")
    before = psutil.Process().memory_info().rss
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    layers, width = SIZES[size]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt2", n_layer=layers, n_embd=width, n_head=4, n_positions=64, vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    args = RLOOConfig(
        str(folder / "out"),
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_dropout=True, report_to=[], disable_tqdm=True,
        save_strategy="no", logging_steps=1, per_device_train_batch_size=ROWS // processes // accumulation,
        gradient_accumulation_steps=accumulation, num_generations=2,
        num_iterations=2, max_steps=UPDATES, max_completion_length=32, learning_rate=1e-3, adam_epsilon=1e-4, beta=0.0,
    )  # fmt: skip
    trainer = RLOOTrainer(
        model=model,
        reward_funcs=lambda completion_ids, **columns: [float(sum(ids) % 7) for ids in completion_ids],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["the film was", "i liked", "a very good plot", "it"] * 16}),
        processing_class=tokenizer,
    )

    def given(prompt_ids, images, multimodal_fields):
        first, completions = PartialState().process_index * len(prompt_ids), []
        for row, ids in enumerate(prompt_ids, start=first):
            draw = random.Random(f"{ids} {row} {trainer.state.global_step}")
            tokens = [draw.randrange(20, len(tokenizer)) for _ in range(draw.randint(8, 31))]
            completions.append([*tokens, tokenizer.eos_token_id])
        return completions

    trainer._generate_single_turn = given

    class Clock(TrainerCallback):
        marks: list = []
        held = 0

        def on_step_end(self, *args, **kwargs):
            self.marks.append((time.monotonic(), dict(sent)))
            if len(self.marks) == UPDATES:
                self.held = tensor_bytes()

    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    import resource

    (started, at_start), *_, (ended, at_end) = clock.marks
    rank, updates = PartialState().process_index, len(clock.marks) - 1
    weights = {
        name: tensor.contiguous() for name, tensor in trainer.model.state_dict().items() if "lm_head" not in name
    }
    weight_bytes = sum(tensor.nbytes for tensor in weights.values())
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    result = {
        "processes": trainer.accelerator.num_processes,
        "zero_stage": plugin and plugin.zero_stage,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "bytes": {name: (at_end[name] - at_start.get(name, 0)) / updates / weight_bytes for name in at_end},
        "held": clock.held / weight_bytes,
        "memory": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / weight_bytes,
        "seconds": (ended - started) / updates,
        "weight_bytes": weight_bytes,
    }
    (folder / f"{rank}.json").write_text(json.dumps(result))
    if rank == 0:
        save_file(weights, folder / "weights.safetensors")
    if processes > 1:
        broadcast_object_list([None])  # waits until all have written
        PartialState().destroy_process_group()


# The table of waiting


def draw_lengths(kind: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    median, sigma, longest = LENGTHS[kind]
    if sigma is None:
        return np.minimum(generator.geometric(1 / median, shape), longest)
    return np.clip(np.exp(generator.normal(np.log(median), sigma, shape)).round(), 1, longest)


def steps_and_tokens(lengths: np.ndarray) -> tuple[float, float]:
    """Sampling time of the slowest rank, divided by the mean time of a rank.

    Args:
        lengths: Lengths of completions, (rollouts, ranks, completions of a rank).

    Returns:
        The ratio if a step takes the same time for any number of rows, so that a rank's longest completion decides; and
        if its time grows with the rows, so that the sum of tokens decides.
    """
    longest, tokens = lengths.max(2), lengths.sum(2)
    return longest.max(1).mean() / longest.mean(), tokens.max(1).mean() / tokens.mean()


def rows_left(lengths: np.ndarray) -> float:
    """Share of rows x steps that a rank computes if finished completions leave the batch as in `sampling.py`."""
    work = whole = 0
    for row in lengths.reshape(-1, lengths.shape[-1]):
        ordered, rows, step = np.sort(row), lengths.shape[-1], 0
        whole += rows * ordered[-1]
        for ended, length in enumerate(ordered, start=1):
            work += rows * (length - step)
            step = length
            if len(ordered) - ended <= 0.875 * rows:
                rows = len(ordered) - ended
    return work / whole


def imbalance(rollouts: int, rows: int = 32) -> dict:
    """`steps_and_tokens` for each distribution of lengths and number of ranks, with `rows` completions on each rank."""
    generator, table = np.random.default_rng(0), {}
    for kind in LENGTHS:
        found = {n: steps_and_tokens(draw_lengths(kind, (rollouts, n, rows), generator)) for n in RANKS}
        table[kind] = {
            "steps": {n: round(steps, 2) for n, (steps, _) in found.items()},
            "tokens": {n: round(tokens, 2) for n, (_, tokens) in found.items()},
            "rows_left": round(rows_left(draw_lengths(kind, (rollouts, 1, rows), generator)), 2),
        }
    return table


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model, 1 and 2 processes, few rollouts")
    parser.add_argument("--imbalance", action="store_true", help="only the table of waiting")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS)[1:], default=list(KINDS)[1:])
    parser.add_argument("--accumulation", type=int, choices=(1, 2, 4), default=1, help="micro-batches for each update")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=SIZES, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker is not None:
        work(given.worker, given.size, given.accumulation)
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder, size = Path(temporary), "quick" if given.quick else "full"
        many = () if given.imbalance else (2,) if given.quick else (2, 4)
        cells = [("one", 1), *((kind, n) for n in many for kind in given.kinds)] if many else []
        for kind, processes in cells:
            result = launch(kind, processes, size, given.accumulation, folder / f"{kind}-{processes}")
            one = rows[0] if rows else result
            row = {
                "kind": kind,
                **{
                    key: result[key]
                    for key in ("processes", "losses", "bytes", "held", "memory", "seconds", "weight_bytes")
                },
                "weights_differ_by": difference(folder / f"{kind}-{processes}", folder / "one-1"),
                "losses_differ_by": max(abs(a - b) for a, b in zip(result["losses"], one["losses"], strict=True)),
                "expected_bytes": expected_bytes(kind, processes, given.accumulation),
            }
            rows.append(row)
            by = ", ".join(f"{name} {value:.2f}" for name, value in row["bytes"].items() if value >= 0.005)
            print(
                f"{kind:<6} {processes}   difference {row['weights_differ_by']:.0e}, {row['losses_differ_by']:.0e}   "
                f"bytes {sum(row['bytes'].values()):.2f} ({row['expected_bytes']:.2f}): {by or '-'}   "
                f"memory {row['held']:.1f}, {row['memory']:.1f}   {row['seconds']:.2f} s",
                flush=True,
            )
    table = imbalance(20 if given.quick else 1000)
    for kind, found in table.items():
        print(f"{kind}; {found['rows_left']:.0%} of rows x steps are computed")
        for what in ("steps", "tokens"):
            print(f"  {what:<7}" + "".join(f"{n:>4}: {value:.2f}" for n, value in found[what].items()))
    print(json.dumps({"launches": rows, "imbalance": table}))


if __name__ == "__main__":
    main(sys.argv[1:])
