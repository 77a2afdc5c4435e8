"""The process of one reward function with a timeout, which `timed.TimedReward` starts with a file descriptor."""

import functools
import pickle
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from rlhf_recipes.launch.start import end_with_parent
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.recipe.user_code import running_user_code
from rlhf_recipes.rewards.apart import RewardStreams
from rlhf_recipes.rewards.calls import call_all
from rlhf_recipes.rewards.checked import AsyncReward, SyncReward, Values, checked
from rlhf_recipes.rewards.registry import bind_named


def main() -> None:
    end_with_parent(signal.SIGKILL)  # a function may handle SIGTERM
    connection = Connection(int(sys.argv[1]))
    function = None
    while True:
        try:
            asked = pickle.loads(connection.recv_bytes())
        except EOFError:  # the process that asks has ended
            return
        error = answer = None
        try:
            if function is None:
                function = _set_up(*asked)
            else:
                answer = _call(function, *asked)
        except RecipeError as raised:
            error = str(raised), traceback.format_exc()
        connection.send_bytes(pickle.dumps((error, answer)))


def _set_up(source: tuple[str, Any], name: str, may_skip: bool) -> SyncReward | AsyncReward:
    kind, what = source
    with (
        RewardStreams().swapped_in(),
        running_user_code(f"reward function {name!r} cannot be set up in its own process"),
    ):
        return checked(bind_named(*what) if kind == "recipe" else pickle.loads(what), name, may_skip)


def _call(
    function: SyncReward | AsyncReward, call: dict[str, Any], logs: list[str], seed: int, state: dict[str, Any]
) -> tuple[Values, dict[str, Any], list[tuple], float]:
    """Values, state of the random streams, calls of the functions named in `logs`, and seconds."""
    streams, logged, started = RewardStreams(seed), [], time.monotonic()
    streams.load({"": state})

    def note(name: str, *arguments: Any, **keywords: Any) -> None:
        logged.append((name, arguments, keywords))

    call |= {name: functools.partial(note, name) for name in logs}
    (values,) = call_all([function], streams, **call)
    return values, streams.of("")[1], logged, time.monotonic() - started


if __name__ == "__main__":
    main()
