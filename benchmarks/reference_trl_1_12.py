"""Makes reference numbers for PPO with TRL 1.12.0's `trl.experimental.ppo`, from fixed completions and scores.

    python benchmarks/reference_trl_1_12.py

Writes `tests/data/trl_1_12_ppo.npz` (arrays) and `tests/data/trl_1_12_ppo.json` (settings, scalars, versions);
`benchmarks/README.md` describes each and lists where TRL 1.12.0 differs from the textbook.

Every number is a local variable of TRL's own `PPOTrainer.train()`, or one of its gradients. The script fixes three things
from outside: the sampled tokens (`torch.multinomial`), the reward model's scores, and the effect of the optimizer step,
which records the gradients and sets prepared weights. So the first epoch has the weights that sampled (ratios are 1), and
the second has other weights (ratios and values move far enough to be clipped).
"""

import trl_venv

if __name__ == "__main__":
    trl_venv.rerun_under_trl_1_12(__file__)

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

PAD, EOS, VOCABULARY = 0, 1, 40
PROMPT_LENGTHS = (6, 3, 5, 4, 6, 2, 3, 5)
RAGGED_LENGTHS = (10, 4, 1, 10, 7, 2, 9, 10)
"""Completion tokens, EOS included; of the rows with 10, only the fourth ends in EOS."""
ENDS_WITH_EOS = {"ragged": (0, 1, 1, 1, 1, 1, 1, 0), "full": (0, 1, 0, 1, 0, 1, 0, 0)}
NEW_TOKENS = 10
SCORES = (1.5, -0.5, 0.25, 2.0, -1.25, 0.75, -2.0, 0.5)

MODEL = {
    "vocab_size": VOCABULARY,
    "n_layer": 2,
    "n_embd": 16,
    "n_head": 2,
    "n_inner": 16,
    "n_positions": 16,
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
SETTINGS = {
    "gamma": 1.0,
    "lam": 0.95,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "kl_coef": 0.05,
    "kl_estimator": "k1",
    "temperature": 0.7,
    "whiten_rewards": False,
    "missing_eos_penalty": None,
}
CASES = {
    "full": {"batch": "full", "gamma": 0.99},
    "full_k3": {"batch": "full", "kl_estimator": "k3"},
    "full_whiten_rewards": {"batch": "full", "gamma": 0.99, "whiten_rewards": True},
    "full_missing_eos": {"batch": "full", "missing_eos_penalty": 1.0, "temperature": 1.0},
    "ragged": {"batch": "ragged"},
    "ragged_discounted": {"batch": "ragged", "gamma": 0.99, "missing_eos_penalty": 1.0},
    "ragged_k3": {"batch": "ragged", "kl_estimator": "k3"},
    "ragged_whiten_rewards": {"batch": "ragged", "whiten_rewards": True},
    "ragged_monte_carlo": {"batch": "ragged", "lam": 1.0},
}
WITH_GRADIENTS = ("full", "ragged_monte_carlo")
"""Cases whose gradients are stored: those that agree with the textbook. All cases would make the file large."""

PER_ROW = ("scores", "sequence_lengths")
PER_TOKEN = ("logprobs", "ref_logprobs", "kl", "values", "rewards", "advantages", "returns")
PER_PASS_SCALARS = ("loss", "pg_loss", "vf_loss", "vf_clipfrac")
PER_PASS_STATS = ("approxkl", "pg_clipfrac", "entropy", "ratio")


class PreparedSteps(torch.optim.SGD):
    """Records the gradients of every step, and sets the prepared weights instead of a gradient step."""

    def __init__(self, models: dict[str, nn.Module], weights: dict[str, Tensor]):
        super().__init__([p for model in models.values() for p in model.parameters()], lr=0.0)
        self.models, self.weights = models, weights
        self.gradients: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def step(self, closure=None):
        self.gradients.append(
            {role: parameters_to_vector([p.grad for p in model.parameters()]) for role, model in self.models.items()}
        )
        for role, model in self.models.items():
            vector_to_parameters(self.weights[f"{role}_after"].clone(), model.parameters())


def make_policy() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(**MODEL))


def make_value_model() -> GPT2ForSequenceClassification:
    return GPT2ForSequenceClassification(GPT2Config(**MODEL, num_labels=1))


def make_weights() -> dict[str, Tensor]:
    """Vectors of weights: policy and value network before and after the step, and a reference near the policy."""
    torch.manual_seed(0)
    policy = parameters_to_vector(make_policy().parameters()).detach()
    value = parameters_to_vector(make_value_model().parameters()).detach()
    return {
        "policy": policy,
        "ref": policy + 0.03 * torch.randn_like(policy),
        "value": value,
        "policy_after": policy + 0.03 * torch.randn_like(policy),
        "value_after": value + 0.03 * torch.randn_like(value),
    }


def load(model: nn.Module, weights: Tensor) -> nn.Module:
    vector_to_parameters(weights.clone(), model.parameters())
    return model


def make_batch(name: str) -> dict[str, np.ndarray]:
    """Prompts padded on the left, completions padded on the right, and their masks."""
    generator = np.random.default_rng(7)
    rows, P = len(PROMPT_LENGTHS), max(PROMPT_LENGTHS)
    lengths = RAGGED_LENGTHS if name == "ragged" else (NEW_TOKENS,) * rows
    prompt_mask = np.arange(P)[None] >= P - np.array(PROMPT_LENGTHS)[:, None]
    completion_mask = np.arange(NEW_TOKENS)[None] < np.array(lengths)[:, None]
    prompt_ids = np.where(prompt_mask, generator.integers(2, VOCABULARY, (rows, P)), PAD)
    completion_ids = np.where(completion_mask, generator.integers(2, VOCABULARY, (rows, NEW_TOKENS)), PAD)
    for row, ends in enumerate(ENDS_WITH_EOS[name]):
        if ends:
            completion_ids[row, lengths[row] - 1] = EOS
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask.astype(np.int64),
        "completion_ids": completion_ids,
        "completion_mask": completion_mask.astype(np.int64),
        "scores": np.array(SCORES, dtype=np.float32),
    }


def make_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    names = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, VOCABULARY))]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w2"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="w2", padding_side="left"
    )


def run_case(weights: dict[str, Tensor], batch: dict[str, np.ndarray], settings: dict) -> tuple[dict, dict]:
    """One call of TRL's `train()`: one update, two epochs, all rows in one mini-batch.

    Returns:
        Arrays by name, rows in the batch's order, and scalars: of the rollout, and of each epoch a list.
    """
    transformers.set_seed(0)  # TRL shuffles with numpy's generator, which it does not seed
    models = {"policy": load(make_policy(), weights["policy"]), "value": load(make_value_model(), weights["value"])}
    reward_model = nn.Identity()
    optimizer = PreparedSteps(models, weights)
    prompts = [ids[mask == 1].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            output_dir=folder,
            **settings,
            response_length=NEW_TOKENS,
            stop_token="eos",
            per_device_train_batch_size=len(prompts),
            gradient_accumulation_steps=1,
            total_episodes=len(prompts),
            num_ppo_epochs=2,
            num_mini_batches=1,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            use_cpu=True,
        )
        trainer = PPOTrainer(
            args=args,
            processing_class=make_tokenizer(),
            model=models["policy"],
            ref_model=load(make_policy(), weights["ref"]),
            reward_model=reward_model,
            value_model=models["value"],
            train_dataset=Dataset.from_dict({"input_ids": prompts}),
            optimizers=(optimizer, None),
        )

    order: list[int] = []  # the dataloader shuffles: TRL has row order[i] of the batch in place i
    passes: list[dict] = []
    whitened: list[Tensor] = []
    stats: dict[str, Tensor] = {}
    batch_generation, get_reward, backward = (
        ppo_trainer.batch_generation,
        ppo_trainer.get_reward,
        trainer.accelerator.backward,
    )
    masked_whiten = ppo_trainer.masked_whiten

    def generate_fixed(model, queries, *args):
        order[:] = [int((batch["prompt_ids"] == query.numpy()).all(1).argmax()) for query in queries]
        tokens = iter(torch.from_numpy(batch["completion_ids"])[order].T)
        with mock.patch("torch.multinomial", lambda probs, num_samples: next(tokens)[:, None]):
            return batch_generation(model, queries, *args)

    def score_fixed(model, *args):
        if model is not reward_model:
            return get_reward(model, *args)
        return None, torch.from_numpy(batch["scores"])[order], None

    def remember_input(values, *args, **kwargs):
        whitened.append(values.clone())
        return masked_whiten(values, *args, **kwargs)

    def remember_pass(loss):
        passes.append(dict(sys._getframe(1).f_locals))  # the local variables of TRL's train()
        backward(loss)

    def remember_stats(metrics):
        local = sys._getframe(1).f_locals
        stats.update({name: local[f"{name}_stats"].flatten() for name in PER_PASS_STATS})

    trainer.accelerator.backward = remember_pass
    trainer.log = remember_stats
    with (
        mock.patch.object(ppo_trainer, "batch_generation", generate_fixed),
        mock.patch.object(ppo_trainer, "get_reward", score_fixed),
        mock.patch.object(ppo_trainer, "masked_whiten", remember_input),
    ):
        trainer.train()

    place = np.argsort(order)
    rollout = passes[0]
    assert (rollout["responses"].numpy()[place] == batch["completion_ids"]).all(), "TRL changed the completions"
    arrays = {name: rollout[name].numpy()[place] for name in (*PER_ROW, *PER_TOKEN)}
    arrays["unwhitened_advantages"] = whitened[-1].numpy()[place]
    if settings["whiten_rewards"]:
        arrays["unwhitened_rewards"] = whitened[0].numpy()[place]
    for number, epoch in enumerate(passes):
        back = np.argsort(np.array(order)[epoch["micro_batch_inds"]])
        for name in ("new_logprobs", "vpred", "ratio"):
            arrays[f"pass{number}/{name}"] = epoch[name].detach().numpy()[back]
    for number, gradients in enumerate(optimizer.gradients):
        arrays |= {f"pass{number}/gradient/{name}": x.numpy() for name, x in gradients.items()}
    scalars = {name: [epoch[name].item() for epoch in passes] for name in PER_PASS_SCALARS}
    scalars |= {name: stats[name].tolist() for name in stats}
    return arrays, scalars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=trl_venv.ROOT / "tests/data", help="folder of the two files")
    trl_venv.add_venv_option(parser)
    options = parser.parse_args()

    weights = make_weights()
    arrays = {f"weights/{name}": x.numpy() for name, x in weights.items()}
    cases = {}
    for name, changes in CASES.items():
        settings = SETTINGS | {key: value for key, value in changes.items() if key != "batch"}
        batch = make_batch(changes["batch"])
        arrays |= {f"batch/{changes['batch']}/{key}": x for key, x in batch.items()}
        found, scalars = run_case(weights, batch, settings)
        kept = {key: x for key, x in found.items() if name in WITH_GRADIENTS or "/gradient/" not in key}
        arrays |= {f"case/{name}/{key}": x for key, x in kept.items()}
        cases[name] = {"batch": changes["batch"], "settings": settings, "scalars": scalars}
    about = {
        "made_by": "benchmarks/reference_trl_1_12.py",
        "versions": {module.__name__: module.__version__ for module in (trl, transformers, torch, np)},
        "model": MODEL,
        "new_tokens": NEW_TOKENS,
        "cases": cases,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(options.out / "trl_1_12_ppo.npz", **arrays)
    (options.out / "trl_1_12_ppo.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(f"{len(arrays)} arrays of {len(cases)} cases written to {options.out}")


if __name__ == "__main__":
    main()
