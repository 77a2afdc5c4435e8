"""Signs, at the end of a training, that a policy has collapsed although all its numbers are finite."""

from statistics import fmean, stdev
from typing import Any

from rlhf_recipes.recipe.messages import as_text

LEAST_ENTROPY = 0.05
"""In nats per token; a policy below it says nearly the same every time."""

MOST_KL = 50.0
"""In nats per completion; the published runs of these tasks end below 30."""


def signs_of_collapse(scores: list[float], last: dict[str, float], completions: list[dict[str, Any]]) -> list[str]:
    """Sentences about a finished training; [] if nothing is wrong.

    Args:
        scores: Mean score of every logged rollout.
        last: The last value of every metric.
        completions: Of the last rollout, with their prompts, as `sampled_completions` gives them.
    """
    found = []
    if last.get("entropy", LEAST_ENTROPY) < LEAST_ENTROPY:
        found.append(
            f"the entropy is {last['entropy']:.3f} nats per token, below {LEAST_ENTROPY}: the policy has little left to choose"
        )
    texts = {as_text(row["completion"]) for row in completions}
    if len(completions) > 1 and len(texts) == 1:
        found.append(f"all {len(completions)} sampled completions of the last rollout are equal")
    if last.get("kl", 0.0) > MOST_KL:
        found.append(f"the KL to the reference is {last['kl']:.0f} nats per completion, above {MOST_KL:.0f}")
    part = max(2, len(scores) // 5)
    if len(scores) >= 2 * part:
        first, end = scores[:part], scores[-part:]
        noise = ((stdev(first) ** 2 + stdev(end) ** 2) / part) ** 0.5
        if fmean(end) < fmean(first) - 2 * noise:
            found.append(f"the score ends below where it began: {fmean(first):.2f} -> {fmean(end):.2f}")
    return found
