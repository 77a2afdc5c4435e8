"""Pure numbers about samples: diversity, repetition, lengths."""

from collections.abc import Sequence
from statistics import fmean, pstdev


def distinct_n(rows: Sequence[Sequence], n: int) -> float:
    """Different n-grams over all n-grams of a set of completions, 0..1; 0 without any.

    It falls with the number of completions: compare only sets of the same size.

    Source: Li et al. 2016 (1510.03055), section 5.
    """
    ngrams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def repetition_rate(rows: Sequence[Sequence]) -> float:
    """Mean share of tokens that occurred before in the same completion, 0..1; empty completions repeat nothing."""
    return fmean(1 - len(set(row)) / len(row) if row else 0.0 for row in rows)


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and (population) standard deviation."""
    return fmean(values), pstdev(values)
