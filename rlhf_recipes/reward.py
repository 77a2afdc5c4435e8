"""Stage reward: train a reward model on pairs of a chosen and a rejected text.

    accelerate launch -m rlhf_recipes.reward --recipe imdb_tiny

Reads `data` and `reward`; writes a sequence classifier with one label, its tokenizer, `scoring.json` (how it was
trained to read, which the reward function `reward_model` follows) and `reward_report.json` (how good it is) to
`<runs_dir>/<recipe>/reward/`.
"""

import json
import logging
import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rlhf_recipes.config import RecipeError
from rlhf_recipes.entry import stage_command
from rlhf_recipes.metrics import accuracy_by_margin, calibration, mean_and_std, pair_accuracy
from rlhf_recipes.run import Run

if TYPE_CHECKING:
    from datasets import Dataset

Text = tuple[str | list[dict], str | list[dict]]
"""A prompt and its completion, both plain texts or both chat messages; the prompt may be empty."""

REPORT = "reward_report.json"

log = logging.getLogger(__name__)


def main(run: Run) -> str:
    from trl import RewardConfig, RewardTrainer
    from trl.data_utils import is_conversational

    from rlhf_recipes.callbacks import attach
    from rlhf_recipes.checkpoints import resumable
    from rlhf_recipes.data import load_rows, pairs
    from rlhf_recipes.finish import save_model
    from rlhf_recipes.models import load_tokenizer, loading, resolve_model
    from rlhf_recipes.samples import shared_out
    from rlhf_recipes.scoring import reader, trained_scoring
    from rlhf_recipes.terminal import expected
    from rlhf_recipes.trainer_args import effective_batch, trainer_args

    recipe, reward = run.recipe, run.recipe.reward
    args = trainer_args(run, RewardConfig)
    model = resolve_model(recipe, "reward.model", reward.model)
    tokenizer = load_tokenizer("reward.model", model, classifier=True)
    train, held_out = load_rows(recipe)
    own_rows = held_out
    train = pairs(recipe, train, reward.pairs)
    held_out = pairs(recipe, held_out, reward.pairs and max(1, reward.pairs // 10))
    chat = is_conversational(train[0])
    references = _references(run, own_rows, tokenizer, chat)
    if args.max_steps > 0:  # tokenize no more than training will see
        train = train.select(range(min(len(train), args.max_steps * effective_batch(args))))
    # TRL leaves pairs out that are too long; the numbers of rows tell which ones it has kept.
    train, held_out = (part.add_column("row", range(len(part))) for part in (train, held_out))
    with loading("reward.model", model), expected("LOAD REPORT"):  # the scalar head is new
        trainer = resumable(RewardTrainer)(
            model=model, args=args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer
        )
    train, held_out = _kept(train, trainer.train_dataset, args), _kept(held_out, trainer.eval_dataset, args)
    if reward.scale_head:
        scale_head(trainer.model, recipe.seed)
    attach(trainer, run)
    trainer.train(run.checkpoint and str(run.checkpoint))
    loss = trainer.evaluate()["eval_loss"]
    scoring = trained_scoring(trainer, chat, center=0.0)
    read = reader(str(run.path), trainer.model, tokenizer, args.per_device_eval_batch_size, None, scoring)

    def score(texts: list[Text]) -> list[float]:
        prompts, completions = [text[0] for text in texts], [text[1] for text in texts]
        return read(prompts=prompts, completions=completions, finished=[True] * len(texts))

    report = measure(
        lambda texts: shared_out(trainer.accelerator, texts, score),
        train.select(random.Random(recipe.seed).sample(range(len(train)), min(len(train), len(held_out)))),
        held_out,
        references,
        reward.center,
    )
    report = {"eval_loss": loss, "train_pairs": len(train), "eval_pairs": len(held_out)} | report
    if run.is_main:  # the center stands here and in no bias: the scalar head of a causal backbone has none
        scoring.model_copy(update={"center": report["score_center"]}).write(run.path)
        (run.path / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    run.results = {name: value for name, value in report.items() if not isinstance(value, list)}
    save_model(trainer, run)
    return (
        f"held-out accuracy {report['eval_accuracy']:.1%} on {len(held_out)} pairs, calibration error "
        f"{report['eval_ece']:.3f}; training accuracy {report['train_accuracy']:.1%} ({len(train)} pairs)"
    )


def scale_head(model: Any, seed: int) -> None:
    """Draw a new scalar head's weights from N(0, 1 / (d + 1)), d its input features, and set its bias to 0.

    A head that comes with the model is trained already and stays as it is; the log says so. The seed alone decides:
    the global random numbers go on as without.

    Source: Huang et al. 2024 (2403.17031), detail 11.

    Raises:
        RecipeError: The model has no linear layer that gives one number.
    """
    import torch

    if any("ForSequenceClassification" in name for name in model.config.architectures or ()):
        log.warning("reward.scale_head: reward.model brings a trained head, which is kept.")
        return
    heads = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer.out_features == 1]
    if not heads:
        raise RecipeError(
            f"reward.scale_head: {type(model).__name__} has no linear layer that gives one number; set it to false."
        )
    with torch.no_grad():
        for head in heads:
            std = (head.in_features + 1) ** -0.5
            drawn = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)) * std
            head.weight.copy_(drawn)
            if head.bias is not None:
                head.bias.zero_()


def measure(
    score: Callable[[list[Text]], list[float]],
    train: "Dataset",
    held_out: "Dataset",
    references: list[Text],
    center: str,
) -> dict[str, Any]:
    """How good a reward model is, in numbers and (lists) in bins; scores are those of the reward function, centered.

    Args:
        score: The reward model's uncentered scores of texts.
        train: Pairs that it was trained on.
        held_out: Pairs that it was not.
        references: Held-out completions of the data; may be empty, unless they are the center.
        center: See `reward.center`.

    Raises:
        RecipeError: A score is not finite.
    """
    train_margins, _, _ = _margins(score, train)
    margins, chosen, rejected = _margins(score, held_out)
    of_references = score(references) if references else []
    bad = [value for value in train_margins + chosen + rejected + of_references if not math.isfinite(value)]
    if bad:
        raise RecipeError(
            f"reward.trainer: {len(bad)} scores of the trained model are {bad[0]}, so training has diverged; lower "
            "learning_rate, or max_grad_norm."
        )
    shift = {"pairs": chosen + rejected, "reference": of_references, "none": [0.0]}[center]
    shift, _ = mean_and_std(shift)
    report = {"train_accuracy": pair_accuracy(train_margins), "eval_accuracy": pair_accuracy(margins)}
    calibrated = calibration(margins)
    report |= {"eval_ece": calibrated["ece"], "eval_brier": calibrated["brier"], "score_center": shift}
    for name, scores in (("chosen", chosen), ("rejected", rejected), ("reference", of_references)):
        if scores:
            mean, std = mean_and_std(scores)
            report |= {f"score_{name}_mean": mean - shift, f"score_{name}_std": std}
    return report | {"accuracy_by_margin": accuracy_by_margin(margins), "calibration": calibrated["bins"]}


def _margins(score: Callable[[list[Text]], list[float]], pairs: "Dataset") -> tuple[list[float], ...]:
    """Margins of pairs, scores of their chosen texts, scores of their rejected ones."""
    nothing = "" if isinstance(pairs[0]["chosen"], str) else []
    chosen, rejected = (
        score([(row.get("prompt", nothing), row[side]) for row in pairs]) for side in ("chosen", "rejected")
    )
    return [c - r for c, r in zip(chosen, rejected, strict=True)], chosen, rejected


def _references(run: Run, rows: "Dataset", tokenizer: Any, chat: bool) -> list[Text]:
    """Held-out prompts with the data's own completions, where it has them and they are of the pairs' kind.

    Raises:
        RecipeError: There are none, and `reward.center` needs them.
    """
    from rlhf_recipes.samples import prompts_and_references

    found = []
    if {"prompt", "completion"} <= set(rows.column_names):
        rows = prompts_and_references(run.recipe, rows, tokenizer)
        found = list(zip(rows["prompt"], rows["reference"], strict=True))
    if found and chat == isinstance(found[0][0], str):
        found = []
    if not found and run.recipe.reward.center == "reference":
        raise RecipeError(
            f"reward.center: reference is the mean score of held-out completions, but {run.recipe.data.path} has no "
            f"rows with prompt and completion in {'chat messages' if chat else 'plain text'}, as the pairs are; set it "
            "to pairs or none."
        )
    return found


def _kept(pairs: "Dataset", by_trl: "Dataset", args: Any) -> "Dataset":
    if len(by_trl) == 0:
        raise RecipeError(
            f"reward.trainer.max_length: each of {len(pairs)} pairs has a text of more than {args.max_length} tokens, "
            "and is left out; raise it, or shorten the texts."
        )
    return pairs.select(by_trl["row"][:])


if __name__ == "__main__":
    stage_command("reward", main)
