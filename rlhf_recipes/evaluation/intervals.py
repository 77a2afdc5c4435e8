"""Intervals of means: by bootstrap for many values, by Student's t for few."""

from collections.abc import Callable, Sequence
from statistics import fmean

LEVEL = 0.95

RESAMPLES = 2000


def bootstrap_interval(
    *columns: Sequence[float],
    statistic: Callable[..., float] = fmean,
    paired: bool = True,
    resamples: int = RESAMPLES,
) -> tuple[float, float] | None:
    """Percentile bootstrap 95 % interval; the same values give the same interval.

    For a handful of values it is too narrow: three values above 0 never give an interval that contains 0, although
    chance gives three such values one time in eight. Use `student_interval` where a few seeds decide something.

    Source: Efron 1979; scipy.stats.bootstrap.

    Args:
        statistic: Number of one drawn sample; takes as many sequences as there are columns.
        paired: Draw the columns together, row by row, instead of each on its own.
        resamples: Samples to draw.

    Returns:
        Low and high; None for a column of fewer than two values.
    """
    import numpy
    from scipy.stats import bootstrap

    if min(map(len, columns)) < 2:
        return None
    found = bootstrap(
        columns,
        statistic,
        n_resamples=resamples,
        vectorized=False,
        paired=paired and len(columns) > 1,
        confidence_level=LEVEL,
        method="percentile",
        rng=numpy.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def student_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of a mean, mean +- t * s / sqrt(n) with n - 1 degrees of freedom; None for fewer than two values.

    Exact for any number of normal values. Source: Student 1908.
    """
    import numpy
    from scipy.stats import t

    if len(values) < 2:
        return None
    error = float(numpy.std(values, ddof=1)) / len(values) ** 0.5
    reach = float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
    return fmean(values) - reach, fmean(values) + reach


def welch_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the difference of two means, for values of unequal spread; None for fewer than two of either.

    Source: Welch 1947; degrees of freedom by Satterthwaite 1946.
    """
    import numpy
    from scipy.stats import t

    if len(first) < 2 or len(second) < 2:
        return None
    x, y = (float(numpy.var(side, ddof=1)) / len(side) for side in (first, second))
    difference, reach = fmean(first) - fmean(second), 0.0
    if x + y > 0:
        share = x / (x + y)
        freedom = 1 / (share**2 / (len(first) - 1) + (1 - share) ** 2 / (len(second) - 1))
        reach = float(t.ppf((1 + LEVEL) / 2, freedom)) * (x + y) ** 0.5
    return difference - reach, difference + reach


def bootstrap_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float] | None:
    """Percentile bootstrap 95 % interval of the difference of two means, each side drawn on its own."""
    return bootstrap_interval(first, second, statistic=lambda x, y: fmean(x) - fmean(y), paired=False)


def bootstrap_band(rows: Sequence[Sequence[float]]) -> tuple[list[float], list[float]] | None:
    """Percentile bootstrap 95 % interval of the mean of some curves: low and high at every point.

    Args:
        rows: Curves of equal length, which are drawn whole.

    Returns:
        None for fewer than two curves.
    """
    import numpy

    if len(rows) < 2:
        return None
    drawn = numpy.random.default_rng(0).integers(len(rows), size=(RESAMPLES, len(rows)))
    shares = numpy.stack([(drawn == i).mean(1) for i in range(len(rows))], axis=1)
    low, high = numpy.quantile(shares @ numpy.asarray(rows), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low.tolist(), high.tolist()
