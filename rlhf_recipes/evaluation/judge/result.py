"""The result of a judge: what its answers say of every pair, the rates over all pairs, and the cost."""

from dataclasses import dataclass
from typing import Any

from rlhf_recipes.evaluation.judge.backends import Backend
from rlhf_recipes.evaluation.judge.parse import OUTCOMES, Answer, outcome_of_orders, vote
from rlhf_recipes.evaluation.judge.win_rate import (
    agreement,
    length_controlled_win_rate,
    log_length_ratio,
    win_rate,
    win_rate_by_length,
)
from rlhf_recipes.recipe.messages import as_text
from rlhf_recipes.recipe.stages import Judge
from rlhf_recipes.system.terminal import say

Text = str | list[dict]
"""Plain text, or chat messages."""

TwoAnswers = list[Answer | None]
"""Answers to the two questions about a pair; None for a pair of equal texts, which nobody is asked about."""


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt."""

    prompt: Text
    a: Text
    b: Text
    finished: tuple[bool, bool]
    """Whether they ended with EOS."""
    scores: dict[str, float | None]
    """`score` and `held_out` of eval: those of a minus those of b; None where either has none."""


def result_of(
    settings: Judge, backend: Backend, names: tuple[str, str], pairs: list[Pair], answers: list[TwoAnswers]
) -> dict[str, Any]:
    """The content of the judge's file, except the cost."""
    rows = [_judged(pair, two, backend) for pair, two in zip(pairs, answers, strict=True)]
    parsed = [i for i, row in enumerate(rows) if row["outcome"] in OUTCOMES]
    outcomes = [OUTCOMES[rows[i]["outcome"]] for i in parsed]
    ratios = [rows[i]["log_length_ratio"] for i in parsed]
    count = {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in (*OUTCOMES, "unparsable")}
    given = [answer for two in answers for answer in two if answer is not None]
    refused = [answer["refused"] for answer in given if "refused" in answer]
    firsts = [label == "A" for row in rows for label in row.get("votes", []) if label in ("A", "B")]
    agreed = {key: agreement(outcomes, [pairs[i].scores[key] for i in parsed]) for key in ("score", "held_out")}
    return {
        "a": names[0],
        "b": names[1],
        "backend": settings.backend,
        "model": settings.model,
        "where": backend.identity.get("where"),
        "criterion": settings.criterion if backend.labels else None,
        "prompts": len(pairs),
        "wins": count["win"],
        "losses": count["loss"],
        "ties": count["tie"],
        "unparsable": count["unparsable"],
        "refused": len(refused),
        "inconsistent": count["inconsistent"],
        **win_rate(outcomes),
        "length_controlled": length_controlled_win_rate(outcomes, ratios),
        "by_length": win_rate_by_length(outcomes, ratios),
        "first_share": sum(firsts) / len(firsts) if firsts else None,
        "cut": sum(answer.get("cut", False) for answer in given),
        "agreement": agreed["score"] and {"with": "score"} | agreed["score"],
        "held_out_agreement": agreed["held_out"] and {"with": "held_out"} | agreed["held_out"],
        "why_refused": refused[0] if refused else None,
        "pairs": rows,
    }


def _judged(pair: Pair, answers: TwoAnswers, backend: Backend) -> dict[str, Any]:
    row: dict[str, Any] = {"log_length_ratio": log_length_ratio(as_text(pair.a), as_text(pair.b))}
    first, second = answers
    if first is None or second is None:
        return row | {"outcome": "tie"}
    if not backend.labels:
        a, b = first["score"], second["score"]
        return row | {"outcome": "win" if a > b else "loss" if a < b else "tie", "scores": [a, b]}
    votes = [vote(first), vote(second)]
    return row | {"outcome": outcome_of_orders(*votes), "votes": votes, "answers": [first["text"], second["text"]]}


def cost_of(settings: Judge, answers: list[Answer], asked: int) -> dict[str, Any]:
    """Tokens and price of all answers in the result, whenever they were asked for.

    Args:
        asked: Number of answers that this command asked for.
    """
    totals = {}
    for key in ("input_tokens", "output_tokens"):
        counts = [answer[key] for answer in answers if answer.get(key) is not None]
        # Some endpoints do not say how many tokens they used.
        totals[key] = sum(counts) if counts and len(counts) == len(answers) else None
    return {"answers": len(answers), "asked": asked, **totals, "price": price_of(settings, *totals.values())}


def price_of(settings: Judge, tokens_in: int | None, tokens_out: int | None) -> float | None:
    prices = settings.price_per_million_tokens
    if prices is None or tokens_in is None or tokens_out is None:
        return None
    return (tokens_in * prices[0] + tokens_out * prices[1]) / 1e6


def print_result(found: dict[str, Any]) -> None:
    say()
    if found["win_rate"] is None:
        say(f"no win rate: of {found['prompts']} prompts, no answer could be parsed")
    else:
        controlled = found["length_controlled"]
        note = "  (no pair of equal lengths: extrapolated)" if controlled["extrapolated"] else ""
        say(f"win rate of {found['a']}       {_percent(found)}")
        say(f"  at equal lengths  {_percent(controlled)}{note}")
    keys = ("wins", "losses", "ties", "inconsistent", "unparsable")
    say("prompts             " + ", ".join(f"{found[key]} {key}" for key in keys))
    for key, what in (("agreement", "the training's score"), ("held_out_agreement", "eval's held_out_funcs")):
        if found[key] is not None:
            say(f"agrees with {what}: {_percent(found[key], 'share')} of {found[key]['pairs']} decided prompts")
    if found["first_share"] is not None:
        say(f"prefers the first completion it reads: {found['first_share']:.1%} of its choices")
    if found["refused"]:
        say(f"note: {found['refused']} requests were refused; the first: {found['why_refused']}")
    if found["cut"]:
        say(f"note: {found['cut']} answers were cut off at judge.max_new_tokens; set it higher.")
    if found["cost"]["price"] is not None:
        say(f"cost of all answers: {found['cost']['price']:.2f}")


def _percent(numbers: dict[str, Any], key: str = "win_rate") -> str:
    interval = numbers["interval"]
    return f"{numbers[key]:.1%}" + ("" if interval is None else f"  [{interval[0]:.1%}, {interval[1]:.1%}]")
