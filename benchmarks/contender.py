"""Runs one contender of `ppo_vs_trl.py` alone in its process, so that the process's peak memory belongs to it.

    python benchmarks/contender.py TASK

TASK is JSON that `ppo_vs_trl.py` makes. The last line on standard output is JSON: seconds of every update after the first,
peak memory and memory of the imports (bytes), optimizer steps, completion tokens.
"""

import json
import resource
import sys
import tempfile
import time
from types import SimpleNamespace

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)

RAGGED_EOS = 0.04
"""Probability of EOS at every token with `--ragged`: half of the completions end within 17 tokens, 14 % not in 48."""


class Meter(TrainerCallback):
    """Records the end of every update and the peak of memory.

    Args:
        steps_per_update: Number of `on_step_end` calls in one update.
    """

    def __init__(self, steps_per_update: int):
        self.imports = peak_memory()
        self.steps_per_update = steps_per_update
        self.marks: list[float] = []
        self.optimizer_steps = 0
        register_optimizer_step_post_hook(self._count)

    def _count(self, *args) -> None:
        self.optimizer_steps += 1

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps_per_update == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.marks.append(time.perf_counter())

    def result(self) -> dict:
        return {
            "seconds": [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)],
            "peak": peak_memory(),
            "imports": self.imports,
            "optimizer_steps": self.optimizer_steps,
        }


def peak_memory() -> int:
    """Bytes: the peak of the GPU's tensors if there is a GPU, else the peak of resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    names = [*(f"w{i}" for i in range(vocabulary - 2)), "<pad>", "<eos>"]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="w0", padding_side="left"
    )


def make_config(task: SimpleNamespace, tokenizer: PreTrainedTokenizerFast, **more) -> AutoConfig:
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return AutoConfig.for_model(**task.model, **special, **more)


def make_policy(task: SimpleNamespace, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    policy = AutoModelForCausalLM.from_config(make_config(task, tokenizer), dtype=weights_type(task))
    if task.ragged:
        make_eos_likely(policy, tokenizer.eos_token_id)
    return policy


def weights_type(task: SimpleNamespace) -> torch.dtype:
    return torch.float32 if task.device == "cpu" else torch.bfloat16


@torch.no_grad()
def make_eos_likely(policy: PreTrainedModel, eos: int) -> None:
    """Shift every last hidden state along one direction that only EOS's row of the LM head reads.

    This changes the weights and not sampling, so that sampling, log-probabilities and KL agree in every trainer.
    """
    head = policy.get_output_embeddings().weight
    norm = policy.base_model.ln_f if hasattr(policy.base_model, "ln_f") else policy.base_model.final_layer_norm
    direction = torch.ones(head.shape[1], dtype=head.dtype) / head.shape[1] ** 0.5
    shift = 16.0
    # Logits of random weights are nearly 0, so the probability of a logit x is e^x / (e^x + vocabulary).
    logit = torch.tensor(len(head) * RAGGED_EOS / (1 - RAGGED_EOS)).log()
    norm.bias.add_(shift * direction)
    head[eos] = logit / shift * direction


def make_prompts(task: SimpleNamespace, tokenizer: PreTrainedTokenizerFast, different: int) -> list[list[int]]:
    """Random prompts, `different` ones for each update, for one update more than needed.

    No trainer reaches the last update: on the last batch of a dataset, TRL 1.12's PPO makes an optimizer step for each
    micro-batch (accelerate ends gradient accumulation with the dataset, and TRL accumulates inside one batch).
    """
    generator = torch.Generator().manual_seed(0)
    shape = ((task.updates + 1) * different, task.prompt_tokens)
    return torch.randint(0, len(tokenizer) - 2, shape, generator=generator).tolist()


class Parity(nn.Module):
    """A reward model for TRL 1.12 that costs nothing: it scores 1 if the last token's id is odd, else 0."""

    base_model_prefix = "backbone"

    def backbone(self, input_ids: Tensor, **kwargs) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=[(input_ids % 2).float().unsqueeze(-1)])

    def score(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


def common_arguments(task: SimpleNamespace, folder: str) -> dict:
    """Arguments of all contenders. The optimizer is the default of all: PyTorch's fused AdamW."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": task.micro_batch,
        "gradient_accumulation_steps": task.prompts // task.micro_batch,
        "learning_rate": 3e-6,
        "temperature": 1.0,
        "gradient_checkpointing": False,
        "bf16": task.device != "cpu",
        "use_cpu": task.device == "cpu",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }


def trl_ppo(task: SimpleNamespace, folder: str) -> dict:
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    meter = Meter(steps_per_update=1)
    tokenizer = make_tokenizer(task.model["vocab_size"])
    policy = make_policy(task, tokenizer)
    config = make_config(task, tokenizer, num_labels=1)
    trainer = PPOTrainer(
        args=PPOConfig(
            **common_arguments(task, folder),
            response_length=task.new_tokens,
            stop_token="eos",
            num_ppo_epochs=task.epochs,
            num_mini_batches=1,
            total_episodes=task.updates * task.prompts,
            num_sample_generations=0,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,  # TRL copies the policy
        reward_model=Parity(),
        value_model=AutoModelForSequenceClassification.from_config(config, dtype=weights_type(task)),
        train_dataset=Dataset.from_dict({"input_ids": make_prompts(task, tokenizer, task.prompts)}),
        callbacks=[meter],
    )

    starts, generated, rollouts, tokens = [], [], [], []
    batch_generation, masked_whiten = ppo_trainer.batch_generation, ppo_trainer.masked_whiten

    def timed_generation(model, queries, *args):
        starts.append(time.perf_counter())
        found = batch_generation(model, queries, *args)
        generated.append(time.perf_counter())
        tokens.append((found[0][:, queries.shape[1] :] != tokenizer.pad_token_id).sum().item() / task.prompts)
        return found

    def timed_whitening(*args, **kwargs):  # whitening the advantages is the last part of a rollout
        found = masked_whiten(*args, **kwargs)
        rollouts.append(time.perf_counter())
        return found

    ppo_trainer.batch_generation, ppo_trainer.masked_whiten = timed_generation, timed_whitening
    trainer.train()
    split = [
        {"generate": b - a, "forward": c - b, "update": d - c}
        for a, b, c, d in zip(starts, generated, rollouts, meter.marks, strict=True)
    ]
    return meter.result() | {"split": mean_of(split[1:]), "mean_tokens": sum(tokens) / len(tokens)}


def trl_rloo(task: SimpleNamespace, folder: str) -> dict:
    from trl import RLOOConfig, RLOOTrainer

    return on_policy(task, folder, RLOOTrainer, RLOOConfig, num_generations=4, disable_dropout=True)


def ours_rloo(task: SimpleNamespace, folder: str) -> dict:
    from rlhf_recipes import RLOOConfig, RLOOTrainer

    return on_policy(task, folder, RLOOTrainer, RLOOConfig, num_generations=4)


def ours_ppo_shared(task: SimpleNamespace, folder: str) -> dict:
    from rlhf_recipes import PPOConfig, PPOTrainer

    return on_policy(task, folder, PPOTrainer, PPOConfig, num_generations=1)


def ours_ppo_separate(task: SimpleNamespace, folder: str) -> dict:
    from rlhf_recipes import PPOConfig, PPOTrainer

    return on_policy(task, folder, PPOTrainer, PPOConfig, {"value_model": "policy"}, num_generations=1)


def on_policy(
    task: SimpleNamespace, folder: str, trainer_class: type, config_class: type, more: dict | None = None, **arguments
) -> dict:
    """Train with the interface of TRL 1.16, which all contenders but TRL 1.12's have."""
    meter = Meter(steps_per_update=task.epochs)
    tokenizer = make_tokenizer(task.model["vocab_size"])
    prompts = make_prompts(task, tokenizer, task.prompts // arguments["num_generations"])
    path = f"{folder}/policy"  # a folder, because TRL loads the reference from the policy's path
    make_policy(task, tokenizer).save_pretrained(path)
    lengths: list[int] = []

    def parity(prompts, completions, completion_ids, **columns) -> list[float]:
        lengths.extend(len(ids) for ids in completion_ids)
        return [float(ids[-1] % 2) for ids in completion_ids]

    trainer = trainer_class(
        model=path,
        reward_funcs=parity,
        args=config_class(
            **common_arguments(task, folder) | {"logging_steps": task.epochs},  # a line for each update
            max_completion_length=task.new_tokens,
            num_iterations=task.epochs,
            max_steps=task.updates * task.epochs,
            beta=0.05,
            model_init_kwargs={"dtype": str(weights_type(task)).removeprefix("torch.")},
            **arguments,
        ),
        train_dataset=Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in ids) for ids in prompts]}),
        processing_class=tokenizer,
        callbacks=[meter],
        **(more or {}),
    )
    trainer.train()
    logs = trainer.state.log_history
    names = ("generate", "score", "forward", "update")
    split = [{name: line.get(f"seconds_{name}") for name in names} for line in logs if "seconds_generate" in line]
    return meter.result() | {"split": mean_of(split[1:]), "mean_tokens": sum(lengths) / len(lengths)}


def mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}


def matrix_rate(task: SimpleNamespace, folder: str) -> dict:
    """Floating-point operations a second in the LM head's three products: forward, and backward to both sides."""
    n, d, v = task.prompts * task.new_tokens, task.model["hidden_size"], task.model["vocab_size"]
    device, dtype = task.device, weights_type(task)
    hidden, head = torch.randn(n, d, device=device, dtype=dtype), torch.randn(d, v, device=device, dtype=dtype)
    logits = hidden @ head
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(hidden, head, out=logits)
        logits @ head.T
        hidden.T @ logits
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"rate": 3 * 2 * n * d * v / sorted(seconds[1:])[2]}


CONTENDERS = (trl_ppo, trl_rloo, ours_rloo, ours_ppo_shared, ours_ppo_separate, matrix_rate)


def main() -> None:
    task = SimpleNamespace(**json.loads(sys.argv[1]))
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        result = {function.__name__: function for function in CONTENDERS}[task.contender](task, folder)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
