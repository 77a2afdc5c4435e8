"""Questions and answers of a judge, the label that an answer names, and the outcome of a prompt.

Questions and answers are plain dictionaries: `{"text"}` -> `{"text", "cut", "input_tokens", "output_tokens"}`, and for
a reward model `{"prompt", "completion", "finished"}` -> `{"score"}`. An answer with `refused`, a sentence, says why the
endpoint refused the request: for its settings, or for this text (too long, or filtered).
"""

import re
from typing import Any

Question = dict[str, Any]
Answer = dict[str, Any]

OUTCOMES = {"win": 1.0, "loss": 0.0, "tie": 0.5, "inconsistent": 0.5}
"""Value of a prompt in the win rate; a prompt with an `unparsable` answer is left out."""

LABEL_ALONE = re.compile(
    r"[\W_]*(?:(?:my |the )?(?:final )?(?:answer|verdict|choice)\b(?: is)?[\W_]*)?(?:completion )?[\W_]*"
    r"(?P<label>a|b|(?:a )?tie)[\W_]*",
    re.IGNORECASE,
)

MAX_LABEL_CHARACTERS = 100
"""A longer text says more than a label."""

THOUGHTS = re.compile(r"\A.*</think>", re.DOTALL)
"""Reasoning that some open models write before an answer; its opening tag may stand in their chat template."""


def vote(answer: Answer) -> str | None:
    """The label that an answer names: `A`, `B` or `tie`; None if it names none, or was cut off.

    The answer must be the label and nothing else, except `Answer:` and marks around it.
    """
    text = THOUGHTS.sub("", answer["text"]).strip()
    found = None if answer["cut"] or len(text) > MAX_LABEL_CHARACTERS else LABEL_ALONE.fullmatch(text)
    if found is None:
        return None
    label = found["label"].upper()
    return label if label in ("A", "B") else "tie"


def outcome_of_orders(first: str | None, second: str | None) -> str:
    """Combines two votes: the first was shown a as A, the second a as B.

    Both for the same side: `win` (a) or `loss` (b); both a tie: `tie`; either not parsed: `unparsable`; anything else:
    `inconsistent`.
    """
    if first is None or second is None:
        return "unparsable"
    return {("A", "B"): "win", ("B", "A"): "loss", ("tie", "tie"): "tie"}.get((first, second), "inconsistent")
