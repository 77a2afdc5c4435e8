"""Makes one score per completion from the values of the reward functions."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


def shape_scores(
    values: "Tensor",
    weights: "Tensor",
    finished: "Tensor",
    missing_eos: dict | None = None,
    normalize: "Callable[[Tensor], Tensor] | None" = None,
    clip_range: tuple[float, float] | None = None,
) -> "Tensor":
    """The score of every completion, (N,): a weighted sum, then normalization, clipping and missing_eos, in this order.

    `missing_eos` comes last, so that the score of an unfinished completion is what the recipe says, whatever the range.

    Args:
        values: Of every reward function, (N, F); NaN where it does not apply.
        weights: (F,).
        finished: True where a completion ended with EOS, (N,).
        missing_eos: `mode` and `value` of `apply_missing_eos`. None: an unfinished completion keeps its score.
        normalize: Scores -> scores. None: they stay as they are.
        clip_range: Lowest and highest score. None: no limits.

    Returns:
        Scores; NaN where no reward function applies.
    """
    scores = weighted_sum(values, weights)
    if normalize is not None:
        scores = normalize(scores)
    if clip_range is not None:
        scores = scores.clamp(*clip_range)
    return scores if missing_eos is None else apply_missing_eos(scores, finished, **missing_eos)


def weighted_sum(values: "Tensor", weights: "Tensor") -> "Tensor":
    """Sums weight times value over the functions that apply: scores (N,), NaN where none applies.

    Args:
        values: (N, F), NaN where a function does not apply.
        weights: (F,), the recipe's `reward_funcs[].weight`.
    """
    scores = (values * weights.to(values.device).unsqueeze(0)).nansum(dim=1)
    scores[values.isnan().all(dim=1)] = math.nan
    return scores


def apply_missing_eos(
    scores: "Tensor", finished: "Tensor", mode: Literal["replace", "subtract"], value: float
) -> "Tensor":
    """Lowers the scores of completions without EOS. NaN, where no reward function applies, stays NaN.

    Source: `replace`, with -1, in Huang et al. 2024 (2403.17031); `subtract` as the `missing_eos_penalty` that TRL had.

    Args:
        scores: (B,).
        finished: Whether a completion ended with EOS, boolean (B,).
        mode: `replace` sets the score of an unfinished completion to `value`; `subtract` subtracts `value` from it.
        value: The score, or the penalty.
    """
    if mode not in ("replace", "subtract"):
        raise ValueError(f"missing_eos: mode must be replace or subtract, not {mode!r}")
    unfinished = scores.new_full((), value) if mode == "replace" else scores - value
    return unfinished.where(~(finished | scores.isnan()), scores)
