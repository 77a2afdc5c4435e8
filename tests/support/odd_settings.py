"""Settings that nobody means, drawn by hypothesis from the keys of the schema and those of TRL that matter."""

from hypothesis import HealthCheck, Phase, given, seed, settings, strategies

from support.faults import ODD_VALUES, OF_PPO, OTHER_KEYS, SANE_VALUES, Bench, odd_settings


@strategies.composite
def drawn_settings(draw) -> tuple[str, dict]:
    """A stage, and values of one to three keys; about two thirds of the values are sane."""
    stage, found = draw(strategies.sampled_from(("ppo", "rloo"))), {}
    sane = [key for key in SANE_VALUES if stage == "ppo" or key not in OF_PPO]
    for _ in range(draw(strategies.integers(1, 3))):
        key = draw(strategies.sampled_from(sane * 4 + OTHER_KEYS))
        if key in SANE_VALUES and draw(strategies.integers(0, 5)):
            found[key] = draw(strategies.sampled_from(SANE_VALUES[key]))
        else:
            numbers = strategies.one_of(strategies.integers(-3, 9), strategies.floats())
            found[key] = draw(strategies.one_of(strategies.sampled_from(ODD_VALUES), numbers))
    return stage, found


def try_settings(bench: Bench, first: int, most: int) -> list[tuple[str, str]]:
    """Outcomes and cases of trials with drawn settings; `first` is hypothesis's seed."""
    outcomes = []  # hypothesis draws the simplest settings first, in every call

    @seed(first)
    @settings(
        max_examples=most,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn_settings())
    def trial(drawn) -> None:
        if str(drawn) not in bench.drawn:
            bench.drawn.add(str(drawn))
            outcomes.append(odd_settings(bench, *drawn))

    trial()
    return outcomes
