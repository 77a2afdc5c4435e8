"""How good a reward model is: accuracy, by margin too, calibration, and its scores of the data's own completions."""

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rlhf_recipes.data.rows import load_rows
from rlhf_recipes.data.shapes import prompts
from rlhf_recipes.evaluation.bound import drawn
from rlhf_recipes.evaluation.metrics import accuracy_by_margin, calibration, mean_and_std, pair_accuracy, pair_loss
from rlhf_recipes.models.samples import shared_out
from rlhf_recipes.recipe.messages import as_text
from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.rewards.reader import RewardModelReader
from rlhf_recipes.rewards.scoring import Scoring
from rlhf_recipes.runs.folder import Run

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Text = tuple[str | list[dict], str | list[dict]]
"""A prompt and its completion, both plain texts or both chat messages; the prompt may be empty."""

Score = Callable[[list[Text]], list[float]]


def scorer(run: Run, trainer: Any, scoring: Scoring) -> Score:
    """The trained model's scores of finished texts, read by `scoring`; every process scores its share of them."""
    batch_size = trainer.args.per_device_eval_batch_size
    read = RewardModelReader(str(run.path), trainer.model.eval(), trainer.processing_class, batch_size, None, scoring)

    def score(texts: list[Text]) -> list[float]:
        prompts, completions = [text[0] for text in texts], [text[1] for text in texts]
        return read(prompts=prompts, completions=completions, finished=[True] * len(texts))

    return lambda texts: shared_out(trainer.accelerator, texts, score)


def measure(
    score: Score, train: "Dataset", held_out: "Dataset", gold: list[Text], center: str, coefficient: float = 0.0
) -> dict[str, Any]:
    """The quality of a reward model, in numbers and (lists) in bins; scores are those of the reward function, centered.

    Args:
        score: Gives the reward model's uncentered scores.
        gold: Held-out completions of the data; may be empty, unless they are the center.
        center: See `reward.center`.
        coefficient: TRL's `center_rewards_coefficient`.

    Raises:
        RecipeError: A score is not finite.
    """
    train_margins, _, _ = _margins(score, train)
    margins, chosen, rejected = _margins(score, held_out)
    of_gold = score(gold) if gold else []
    bad = [value for value in train_margins + chosen + rejected + of_gold if not math.isfinite(value)]
    if bad:
        raise RecipeError(
            f"reward.trainer: {len(bad)} scores of the trained model are {bad[0]}, so training has diverged; lower "
            "learning_rate, or max_grad_norm."
        )
    shift, _ = mean_and_std({"pairs": chosen + rejected, "gold": of_gold, "none": [0.0]}[center])
    calibrated = calibration(margins)
    least = held_out["margin"][:] if "margin" in held_out.column_names else [0.0] * len(held_out)
    report = {
        "eval_loss": pair_loss(list(zip(chosen, rejected, strict=True)), least, coefficient),
        "train_accuracy": pair_accuracy(train_margins),
        "eval_accuracy": pair_accuracy(margins),
        "eval_ece": calibrated["ece"],
        "eval_brier": calibrated["brier"],
        "score_center": shift,
    }
    for name, scores in (("chosen", chosen), ("rejected", rejected), ("gold", of_gold)):
        if scores:
            mean, std = mean_and_std(scores)
            report |= {f"score_{name}_mean": mean - shift, f"score_{name}_std": std}
    return report | {"accuracy_by_margin": accuracy_by_margin(margins), "calibration": calibrated["bins"]}


def _margins(score: Score, pairs: "Dataset") -> tuple[list[float], list[float], list[float]]:
    """Margins of pairs, scores of their chosen texts, scores of their rejected ones."""
    nothing = "" if isinstance(pairs[0]["chosen"], str) else []
    chosen, rejected = (
        score([(row.get("prompt", nothing), row[side]) for row in pairs]) for side in ("chosen", "rejected")
    )
    return [c - r for c, r in zip(chosen, rejected, strict=True)], chosen, rejected


def gold_texts(recipe: Recipe, center: str, tokenizer: Any, chat: bool, most: int) -> list[Text]:
    """Held-out prompts with the data's own completions; none where the recipe has none of the pairs' kind.

    Args:
        center: See `reward.center`.
        most: Most texts, drawn with the recipe's seed.
        chat: Whether the pairs are chat messages.

    Raises:
        RecipeError: There are none, and they are the center.
    """
    found: list[Text] = []
    if center == "gold" or not (recipe.reward and recipe.reward.data):
        rows = load_rows(recipe.data, recipe.seed)[1]
        if "completion" in rows.column_names:
            rows = prompts(recipe.data, drawn(rows, most, recipe.seed), tokenizer, recipe.seed)
            found = list(zip(rows["prompt"], rows["gold"], strict=True))
    if found and chat == isinstance(found[0][0], str):
        found = []
    if not found and center == "gold":
        raise RecipeError(
            f"reward.center: gold is the mean score of held-out completions, but {recipe.data.path} has no rows with "
            f"prompt and completion in {'chat messages' if chat else 'plain text'}, as the pairs are; set it to pairs "
            "or none."
        )
    return found


def lengths_of(pairs: "Dataset") -> list[int]:
    """Characters of the longer text of each pair, by which `group_by_length` makes batches with little padding."""
    return [max(len(as_text(row["chosen"])), len(as_text(row["rejected"]))) for row in pairs]


def kept_pairs(pairs: "Dataset", by_trl: "Dataset", args: Any) -> "Dataset":
    """The pairs that TRL has kept, because no text is longer than `max_length`.

    Args:
        by_trl: TRL's rows; their column `row` has the numbers of their pairs.

    Raises:
        RecipeError: None is left.
    """
    out = f"{len(pairs) - len(by_trl)} of {len(pairs)} pairs have a text of more than {args.max_length} tokens"
    if len(by_trl) == 0:
        raise RecipeError(f"reward.trainer.max_length: {out}, so no pair is left; raise it, or shorten the texts.")
    if len(by_trl) < len(pairs):
        logger.warning("reward.trainer.max_length: %s and are left out", out)
    return pairs.select(by_trl["row"][:])
