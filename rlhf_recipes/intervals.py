"""Intervals of means: by bootstrap over many values, by Student's t over few."""

from collections.abc import Callable, Sequence
from statistics import fmean

LEVEL = 0.95

RESAMPLES = 2000


def bootstrap_interval(
    *columns: Sequence[float], statistic: Callable[..., float] = fmean, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """Percentile bootstrap 95 % interval; the same values give the same interval.

    Of a handful of values it is too narrow: three that are all above 0 never give an interval with 0 in it, which
    happens by chance one time in eight. Use `student_interval` where something is decided by few seeds.

    Source: Efron 1979; scipy.stats.bootstrap.

    Args:
        columns: Values; several columns are drawn together, row by row.
        statistic: Number of one drawn sample; takes as many sequences as there are columns.
        resamples: Samples to draw.

    Returns:
        Low and high; None for fewer than two rows.
    """
    import numpy
    from scipy.stats import bootstrap

    if len(columns[0]) < 2:
        return None
    found = bootstrap(
        columns,
        statistic,
        n_resamples=resamples,
        vectorized=False,
        paired=len(columns) > 1,
        confidence_level=LEVEL,
        method="percentile",
        rng=numpy.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def student_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of a mean, mean +- t * s / sqrt(n) with n - 1 degrees of freedom; None for fewer than two values.

    Source: Student 1908. Exact for normal values, at any number of them.
    """
    import numpy
    from scipy.stats import t

    if len(values) < 2:
        return None
    error = float(numpy.std(values, ddof=1)) / len(values) ** 0.5
    reach = float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
    return fmean(values) - reach, fmean(values) + reach
