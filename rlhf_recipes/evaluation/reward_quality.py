"""How good a reward model is: accuracy, by margin too, calibration, and the scores of the data's own completions."""

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rlhf_recipes.data.rows import load_rows
from rlhf_recipes.data.shapes import prompts
from rlhf_recipes.evaluation.metrics import accuracy_by_margin, calibration, mean_and_std, pair_accuracy
from rlhf_recipes.models.samples import shared_out
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.rewards.reader import RewardModelReader
from rlhf_recipes.rewards.scoring import Scoring
from rlhf_recipes.runs.folder import Run

if TYPE_CHECKING:
    from datasets import Dataset


logger = logging.getLogger(__name__)

Text = tuple[str | list[dict], str | list[dict]]
"""A prompt and its completion, both plain texts or both chat messages; the prompt may be empty."""


def scorer(run: Run, trainer: Any, scoring: Scoring) -> Callable[[list[Text]], list[float]]:
    """What the trained model scores finished texts, read by `scoring`; every process reads its share of them."""
    batch_size = trainer.args.per_device_eval_batch_size
    read = RewardModelReader(str(run.path), trainer.model, trainer.processing_class, batch_size, None, scoring)

    def score(texts: list[Text]) -> list[float]:
        prompts, completions = [text[0] for text in texts], [text[1] for text in texts]
        return read(prompts=prompts, completions=completions, finished=[True] * len(texts))

    return lambda texts: shared_out(trainer.accelerator, texts, score)


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


def own_references(run: Run, tokenizer: Any, chat: bool) -> list[Text]:
    """Held-out prompts with the data's own completions, where the recipe has them and they are of the pairs' kind.

    Raises:
        RecipeError: There are none, and `reward.center` needs them.
    """
    recipe, found = run.recipe, []
    if recipe.reward.data is None or recipe.reward.center == "reference":
        rows = load_rows(recipe.data, recipe.seed)[1]
        if "completion" in rows.column_names:
            rows = prompts(recipe.data, rows, tokenizer, recipe.seed)
            found = list(zip(rows["prompt"], rows["reference"], strict=True))
    if found and chat == isinstance(found[0][0], str):
        found = []
    if not found and recipe.reward.center == "reference":
        raise RecipeError(
            f"reward.center: reference is the mean score of held-out completions, but {recipe.data.path} has no "
            f"rows with prompt and completion in {'chat messages' if chat else 'plain text'}, as the pairs are; set it "
            "to pairs or none."
        )
    return found


def kept(pairs: "Dataset", by_trl: "Dataset", args: Any) -> "Dataset":
    """Those of the pairs whose number stands in the column `row` of what TRL has kept: none is longer than `max_length`.

    Raises:
        RecipeError: None is left.
    """
    if 0 < len(by_trl) < len(pairs):
        logger.warning(
            "reward.trainer.max_length: %d of %d pairs have a text of more than %d tokens and are left out",
            len(pairs) - len(by_trl),
            len(pairs),
            args.max_length,
        )
    if len(by_trl) == 0:
        raise RecipeError(
            f"reward.trainer.max_length: each of {len(pairs)} pairs has a text of more than {args.max_length} tokens, "
            "and is left out; raise it, or shorten the texts."
        )
    return pairs.select(by_trl["row"][:])
