"""Signs of a collapse that stays finite, and bounds at which training ends early."""

from types import SimpleNamespace

import pytest

from rlhf_recipes.recipe.stages import StopWhen
from rlhf_recipes.trainers.collapse import signs_of_collapse
from rlhf_recipes.trainers.stop_early import StopEarly

HEALTHY = {"entropy": 2.0, "kl": 8.0}
TEXTS = [{"completion": "a"}, {"completion": "b"}]


@pytest.mark.parametrize(
    ("scores", "last", "completions", "said"),
    [
        ([0.1, 0.2] * 10, HEALTHY, TEXTS, ""),
        ([0.1] * 3, {}, TEXTS, ""),  # too short to judge, and without a reference
        ([0.1] * 20, HEALTHY | {"entropy": 0.01}, TEXTS, "the entropy is 0.010 nats per token"),
        ([0.1] * 20, HEALTHY | {"kl": 80.0}, TEXTS, "the KL to the reference is 80 nats per completion, above 50"),
        ([0.1] * 20, HEALTHY, [{"completion": "a"}] * 8, "all 8 sampled completions of the last rollout are equal"),
        ([0.1] * 20, HEALTHY, [{"completion": [{"content": "a"}]}] * 2, "all 2 sampled completions"),
        ([0.9, 0.8] * 5 + [0.1, 0.2] * 5, HEALTHY, TEXTS, "the score ends below where it began: 0.85 -> 0.15"),
        ([0.9, -0.9] * 5 + [0.8, -0.9] * 5, HEALTHY, TEXTS, ""),  # within noise
    ],
)
def test_signs_of_collapse(scores, last, completions, said):
    assert said in (found := " ".join(signs_of_collapse(scores, last, completions))) and bool(found) == bool(said)


def stopped_after(callback, lines):
    """The number of lines after which a callback asks to stop; None: never."""
    state = SimpleNamespace(global_step=0, log_history=[])
    control = SimpleNamespace(should_training_stop=False)
    for i, line in enumerate(lines, 1):
        state.global_step = i
        state.log_history.append(line)
        callback.on_log(None, state, control, logs=line)
        if any(key.startswith("eval_") for key in line):
            callback.on_evaluate(None, state, control)
        if control.should_training_stop:
            return i
    return None


def test_training_ends_above_a_kl():
    stop = StopEarly(StopWhen(kl_above=30))
    assert stopped_after(stop, [{"kl": 5.0}, {"loss": 1.0}, {"kl": 30.0}, {"kl": 31.5}, {"kl": 2.0}]) == 4
    assert stop.reason == "at step 4 the KL to the reference is 31.5 nats per completion, above 30"


def test_training_ends_after_so_many_falls_of_the_held_out_score_in_a_row():
    def held_out(*means):
        return [{"eval_held_out_mean": mean} for mean in means]

    stop = StopEarly(StopWhen(held_out_falls=2))
    assert stopped_after(stop, held_out(0.5, 0.4, 0.45, 0.44, 0.43, 0.9)) == 5
    assert "fell 2 times in a row, 0.450 -> 0.440 -> 0.430" in stop.reason
    assert stopped_after(StopEarly(StopWhen(held_out_falls=2)), held_out(0.5, 0.4, 0.4, 0.3)) is None
    assert stopped_after(StopEarly(StopWhen()), [{"kl": 1e9}, *held_out(3, 2, 1, 0)]) is None
