"""Diversity, repetition, lengths and ROUGE of samples; accuracy and calibration of a reward model."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any


def distinct_n(rows: Sequence[Sequence], n: int) -> float:
    """Different n-grams over all n-grams of a set of completions, 0..1; 0 without n-grams.

    It falls with the number of completions: compare only sets of the same size.

    Source: Li et al. 2016 (1510.03055), section 5.
    """
    ngrams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def unique_token_ratio(rows: Sequence[Sequence]) -> float | None:
    """Different tokens over all tokens of a completion, 0..1, mean over completions with tokens; None without any.

    It falls with a completion's length, in human text too: common words occur again.
    """
    ratios = [len(set(row)) / len(row) for row in rows if row]
    return fmean(ratios) if ratios else None


def repeated_share(row: Sequence, n: int) -> float:
    """Share of a completion's n-grams, of words or tokens, that occurred in it before, 0..1; 0 without n-grams.

    Source: seq-rep-n of Welleck et al. 2020 (1908.04319).
    """
    ngrams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def ngram_repetition(rows: Sequence[Sequence], n: int = 4) -> float:
    """Mean of `repeated_share` over completions, 0..1.

    Four tokens in the same order hardly ever occur twice in human text, however long it is: unlike
    `unique_token_ratio` this tells loops from common words.
    """
    return fmean(repeated_share(row, n) for row in rows)


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and (population) standard deviation."""
    return fmean(values), pstdev(values)


def perplexity(logps: Sequence[float], tokens: int) -> float | None:
    """exp(-mean log-probability of a token); None where that overflows or there is no token.

    Args:
        logps: Log-probability of each whole text, in nats.
        tokens: Number of tokens in all texts together.
    """
    if not tokens or not all(map(math.isfinite, logps)) or -math.fsum(logps) / tokens > 700:  # where exp overflows
        return None
    return math.exp(-math.fsum(logps) / tokens)


def length_histograms(lengths: Mapping[str, Sequence[int]], longest: int, bins: int = 20) -> dict[str, Any]:
    """Numbers of completions by length, in the same bins for every model.

    Args:
        lengths: Name of each model -> lengths of its completions, in tokens.
        longest: No length is above it.
        bins: At most so many, all of the same width, a whole number of tokens.

    Returns:
        `edges` and, by name, `counts`: bin i holds lengths from edges[i] to edges[i + 1] - 1.
    """
    import numpy

    width = math.ceil((longest + 1) / bins)
    edges = list(range(0, longest + 1 + width, width))
    return {"edges": edges, "counts": {name: numpy.histogram(row, edges)[0].tolist() for name, row in lengths.items()}}


def rouge(completions: Sequence[str], gold: Sequence[str]) -> dict[str, float]:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L over completions, 0..1, by the library rouge-score.

    Without stemming, like Huang et al. 2024 (2403.17031), who use the defaults of `evaluate`'s rouge. ROUGE-L takes a
    text as one sequence, with or without line breaks.

    Source: Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries.
    """
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, use_stemmer=False)
    scores = [scorer.score(target=g, prediction=c) for c, g in zip(completions, gold, strict=True)]
    return {kind: fmean(score[kind].fmeasure for score in scores) for kind in kinds}


def equal_parts(items: list, most: int) -> list[list]:
    """Items in at most so many parts of (nearly) the same number, none empty unless there are no items."""
    parts = max(1, min(most, len(items)))
    return [items[len(items) * i // parts : len(items) * (i + 1) // parts] for i in range(parts)]


def pair_accuracy(margins: Sequence[float]) -> float:
    """Share of pairs whose chosen text scores above the rejected one; a tie is wrong, as in TRL's RewardTrainer.

    Args:
        margins: Score of the chosen text minus score of the rejected one, for every pair.
    """
    return fmean(margin > 0 for margin in margins)


def pair_loss(scores: Sequence[tuple[float, float]], least: Sequence[float], coefficient: float) -> float:
    """Mean of -log sigmoid(c - r - least) + coefficient * (c + r)^2 over a pair's scores c and r, as TRL trains."""
    lacks = [m + r - c for (c, r), m in zip(scores, least, strict=True)]
    of_margins = fmean(max(x, 0.0) + math.log1p(math.exp(-abs(x))) for x in lacks)  # log(1 + e^x)
    return of_margins + coefficient * fmean((c + r) ** 2 for c, r in scores)


def accuracy_by_margin(margins: Sequence[float], bins: int = 5) -> list[dict[str, float]]:
    """Accuracy by how clear the model finds a pair.

    Args:
        margins: As in `pair_accuracy`.
        bins: At most so many parts of (nearly) the same number of pairs, split by |margin|.

    Returns:
        From the smallest margins to the largest: `from` and `to` of |margin|, number of `pairs`, `accuracy`.
    """
    return [
        {"from": abs(part[0]), "to": abs(part[-1]), "pairs": len(part), "accuracy": pair_accuracy(part)}
        for part in equal_parts(sorted(margins, key=abs), bins)
    ]


def calibration(margins: Sequence[float], bins: int = 10) -> dict[str, Any]:
    """Whether a reward model is right as often as its probabilities say.

    In the Bradley-Terry model the chosen text is the better one with probability p = sigmoid(margin). The model's
    answer is the text with the higher score, with confidence sigmoid(|margin|), 0.5..1. Expected calibration error: sum
    over bins of (pairs in it / all pairs) * |accuracy - mean confidence|, in bins of equal width. Brier score: mean of
    (1 - p)^2, 0.25 for a model that knows nothing.

    Source: Guo et al. 2017 (1706.04599), equation 3; Brier 1950.

    Args:
        margins: As in `pair_accuracy`; a tie is wrong here too.
        bins: Number of bins over 0.5..1.

    Returns:
        `ece`, `brier` and `bins` that hold a pair: `from` and `to` of the confidence, number of `pairs`, mean
        `confidence`, `accuracy`.
    """
    inside: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for margin in margins:
        confidence = 1 / (1 + math.exp(-abs(margin)))
        inside[min(int((confidence - 0.5) * 2 * bins), bins - 1)].append((confidence, margin))
    found = [
        {
            "from": 0.5 + i / (2 * bins),
            "to": 0.5 + (i + 1) / (2 * bins),
            "pairs": len(part),
            "confidence": fmean(confidence for confidence, _ in part),
            "accuracy": pair_accuracy([margin for _, margin in part]),
        }
        for i, part in enumerate(inside)
        if part
    ]
    return {
        "ece": sum(b["pairs"] * abs(b["accuracy"] - b["confidence"]) for b in found) / len(margins),
        "brier": fmean((1 - c) ** 2 if margin > 0 else c**2 for part in inside for c, margin in part),
        "bins": found,
    }
