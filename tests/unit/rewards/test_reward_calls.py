"""Reward functions that fail, hang or are slow: the errors, which functions run side by side, and copies of arguments."""

import asyncio
import functools
import random
import signal
import threading
import time

import numpy as np
import pytest
import torch
from trl.trainer.utils import get_callable_name, is_async_callable

from rlhf_recipes.rewards.calls import call_all
from rlhf_recipes.rewards.checked import RewardError, checked
from support.places import ROOT
from support.processes import run_python

TEXTS = [" was good .", " was bad"]
SOON = 0.05
"""Seconds: the timeout of functions that never answer."""


def call(**columns) -> dict:
    return {
        "prompts": ["the film", "it"],
        "completions": list(TEXTS),
        "completion_ids": [[5, 6, 1], [5, 5]],
        "finished": [True, False],
    } | columns


def said(function, may_skip: bool = False, timeout: float | None = None, **columns) -> list:
    """The values of one function."""
    return call_all([checked(function, "f", may_skip, timeout)], **call(**columns))[0]


def all_values(functions: list, **arguments) -> list[list]:
    return call_all([checked(f, get_callable_name(f), may_skip=len(functions) > 1) for f in functions], **arguments)


class Wait:
    """Waits until a test sets `go`, so that no test depends on time."""

    def __init__(self):
        self.go = threading.Event()

    def __call__(self, completions):
        assert self.go.wait(60)
        return [1.0] * len(completions)


@pytest.fixture
def wait():
    waiting = Wait()
    yield waiting
    waiting.go.set()


async def forever(completions):
    await asyncio.sleep(3600)


@pytest.mark.parametrize(
    "answer",
    [
        [1, 0.5],
        (1.0, 0.5),
        [True, 0.5],
        torch.tensor([1.0, 0.5], requires_grad=True),
        torch.tensor([1.0, 0.5], dtype=torch.bfloat16),
        np.array([1.0, 0.5]),
        [torch.tensor(1.0), np.float32(0.5)],
        [np.bool_(True), 0.5],
    ],
)
def test_numbers_of_any_type_are_accepted(answer):
    values = said(lambda completions: answer)
    assert values == [1.0, 0.5] and {type(value) for value in values} == {float}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ([1.0], "returned 1 values for 2 completions"),
        ([], "returned 0 values for 2"),
        ([0.0, float("nan")], "returned nan for sample 1: ' was bad'; a score is finite"),
        ([0.0, -2e18], "returned -2e+18 for sample 1: ' was bad'; a score is finite, and at most 1e+18 in size"),
        ([float("-inf"), 0.0], "returned -inf for sample 0: ' was good .'"),
        ([0, 10**400], "for sample 1: ' was bad'; a score is finite"),
        ([0.0, None], "returned None for sample 1: ' was bad'; only one of several functions may return None"),
        (["1.0", "2.0"], "returned '1.0' for sample 0: ' was good .'; a score is one number"),
        ([[1.0], [2.0]], "returned [1.0] for sample 0: ' was good .'; a score is one number"),
        ([1j, 0.0], "returned 1j for sample 0"),
        ("ab", "returned str, not a list of numbers"),
        ({"a": 1, "b": 2}, "returned dict, not a list of numbers"),
        (None, "returned NoneType, not a list"),
        (1.0, "returned float, not a list"),
        ((value for value in (1.0, 2.0)), "returned generator, not a list"),
        (torch.tensor(1.0), "returned a Tensor of shape (), not (2,)"),
        (torch.ones(2, 1), "returned a Tensor of shape (2, 1), not (2,)"),
        (np.ones((1, 2)), "returned a ndarray of shape (1, 2), not (2,)"),
        (torch.tensor([0.0, float("nan")]), "returned nan for sample 1"),
    ],
)
@pytest.mark.parametrize("kind", ["sync", "async", "in a thread"])
def test_any_other_return_value_is_an_error(answer, expected, kind):
    async def later(completions):
        return answer

    with pytest.raises(RewardError) as raised:
        said(later if kind == "async" else lambda completions: answer, timeout=60 if kind == "in a thread" else None)
    assert str(raised.value).startswith("reward function 'f' ") and expected in str(raised.value)


def test_none_is_accepted_if_another_function_makes_the_score():
    assert said(lambda completions: [None, 1], may_skip=True) == [None, 1.0]
    with pytest.raises(RewardError, match="returned nan"):
        said(lambda completions: [float("nan"), 1], may_skip=True)


@pytest.mark.parametrize(
    "error",
    [KeyError("oops"), SystemExit(0), TimeoutError("oops"), asyncio.CancelledError("oops"), BaseException("oops")],
)
@pytest.mark.parametrize("kind", ["sync", "async", "in a thread"])
def test_exceptions_of_any_kind_name_the_function_and_the_sample(error, kind):
    async def later(completions):
        raise error

    def now(completions):
        raise error

    expected = f"'f' raised {type(error).__name__}: .*on 2 completions, the first: ' was good .'"
    with pytest.raises(RewardError, match=expected):
        said(later if kind == "async" else now, timeout=60 if kind == "in a thread" else None)
    assert said(lambda completions: [1, 2]) == [1, 2]  # and the next call works


def test_a_coroutine_from_a_sync_function_is_an_error():
    async def later(completions):
        return [1.0, 2.0]

    with pytest.raises(RewardError, match="returned a coroutine: make it `async def`"):
        said(lambda completions: later(completions))  # noqa: PLW0108 - a plain function that returns a coroutine


def test_partials_and_callable_objects_may_be_async():
    class Later:
        async def __call__(self, completions, scale=1.0, **columns):
            return [scale] * len(completions)

    async def later(completions, scale=1.0, **columns):
        return [scale] * len(completions)

    for function in (later, Later(), functools.partial(later, scale=2.0), functools.partial(Later(), scale=2.0)):
        assert is_async_callable(function) and is_async_callable(checked(function, "f", False))
        scale = 2.0 if isinstance(function, functools.partial) else 1.0
        assert said(function) == said(function, timeout=60) == [scale] * 2
    assert not is_async_callable(checked(lambda completions: [], "f", False))


def test_checking_twice_is_checking_once():
    once = checked(lambda completions: [1, None], "f", may_skip=True, timeout=60)
    assert checked(once, "g", may_skip=False) is once and once.__name__ == "f"


def test_functions_get_what_they_take():
    def positional(completions, /, *, label):
        return [len(completions) * x for x in label]

    def any_keyword(prompts, /, **rest):
        assert set(rest) == {"completions", "completion_ids", "finished", "label"}
        return [1, 2]

    def own_default(completions, something=3.0):
        return [something] * len(completions)

    assert said(positional, label=[1, 2]) == [2, 4]
    assert said(any_keyword, label=[1, 2]) == [1, 2]
    assert said(own_default, label=[1, 2]) == [3, 3]
    with pytest.raises(RewardError, match="'f' needs label, which is no column of the data; there is: .*completions"):
        said(positional)


def test_a_bound_argument_is_not_replaced_by_a_column_of_that_name():
    def scaled(completions, scale, **columns):
        return [scale] * len(completions)

    assert said(functools.partial(scaled, scale=2.0), scale=[7.0, 7.0]) == [2.0, 2.0]


def test_a_function_cannot_change_the_arguments_of_others():
    def spoil(prompts, completions, completion_ids, finished, label):
        completions[0][0]["content"] = "spoilt"
        completion_ids[0].clear()
        for column in (prompts, completions, finished, label):
            column.clear()
        return [1.0, 2.0]

    def report(prompts, completions, completion_ids, finished, label):
        assert completions[0][0]["content"] == "good" and completion_ids == [[5, 6, 1], [5, 5]]
        assert len(prompts) == len(completions) == len(finished) == len(label) == 2
        return [1.0, 2.0]

    chats = [[{"role": "assistant", "content": "good"}], [{"role": "assistant", "content": "bad"}]]
    arguments = call(completions=chats, label=[1, 0])
    all_values([spoil, report, spoil], **arguments)
    assert arguments == call(completions=chats, label=[1, 0]) and chats[0][0]["content"] == "good"


def test_slow_functions_run_beside_each_other_and_beside_the_others():
    """Each waits for the others. If they ran one after another, none could ever answer."""
    met = threading.Barrier(2)
    there = [threading.Event() for _ in range(3)]

    def meet(i):
        async def later(completions):
            there[i].set()
            while not all(event.is_set() for event in there):
                await asyncio.sleep(0.001)
            return [i] * len(completions)

        return later

    def here(completions):
        assert threading.current_thread() is threading.main_thread()
        there[2].set()
        assert there[0].wait(30) and there[1].wait(30)
        return [2] * len(completions)

    def aside(completions):
        assert threading.current_thread() is not threading.main_thread()
        met.wait(30)
        return [3] * len(completions)

    threads = [checked(aside, "aside", False, timeout=60) for _ in range(2)]
    found = all_values([meet(0), threads[0], here, meet(1), threads[1]], **call())
    assert found == [[0, 0], [3, 3], [2, 2], [1, 1], [3, 3]]


def test_functions_of_this_thread_run_in_order():
    """So functions that draw random numbers are reproducible, and signals work in them."""
    order = []

    def draw(name):
        def function(completions):
            previous = signal.signal(signal.SIGALRM, signal.SIG_DFL)  # raises outside of the main thread
            signal.signal(signal.SIGALRM, previous)
            order.append(name)
            return [random.random() for _ in completions]

        return function

    functions = [draw("a"), draw("b"), draw("c")]
    first = all_values(functions, **call())
    assert all_values(functions, **call()) == first and order == ["a", "b", "c"] * 2


def test_all_async_calls_share_one_loop():
    """A client that a function keeps between calls belongs to the loop in which it was made."""
    loops = []

    async def remember(completions):
        loops.append(asyncio.get_running_loop())
        return [1.0] * len(completions)

    for _ in range(2):
        all_values([remember, checked(remember, "with", False, timeout=60)], **call())
    assert len(set(map(id, loops))) == 1 and len(loops) == 4


def test_the_error_of_the_first_function_is_raised(wait):
    async def late_error(completions):
        await asyncio.sleep(SOON)
        raise ValueError("the first")

    def error(completions):
        raise ValueError("the second")

    async def never(completions):
        await asyncio.sleep(3600)

    called = []
    with pytest.raises(RewardError, match="'late_error' raised ValueError: the first"):
        all_values([late_error, error, lambda completions: called.append(1)], **call())
    assert not called
    with pytest.raises(RewardError, match="the second"):  # nobody waits for the function that hangs
        all_values([error, never, late_error], **call())


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_call_that_hangs_is_an_error_with_its_name(kind, wait):
    function = checked(wait if kind == "sync" else forever, "remote", False, timeout=SOON)
    expected = "'remote' did not answer within 0.05 s .on 2 completions, the first: ' was good .'"
    with pytest.raises(RewardError, match=expected):
        all_values([function], **call())


def test_an_async_function_that_hangs_is_cancelled():
    ended = threading.Event()

    async def hang(completions):
        try:
            await asyncio.sleep(3600)
        finally:
            ended.set()

    with pytest.raises(RewardError, match="did not answer"):
        said(hang, timeout=SOON)
    assert ended.wait(10)


def test_an_async_function_that_blocks_the_loop_is_an_error_and_the_next_call_works(wait):
    async def block(completions):
        return wait(completions)

    with pytest.raises(RewardError, match="'f' did not answer within 0.05 s"):
        said(block, timeout=SOON)

    async def fine(completions):
        return [1.0, 2.0]

    assert said(fine, timeout=20) == [1.0, 2.0]  # before the other one stops waiting


def test_a_function_in_time_is_not_disturbed_by_its_timeout(wait):
    wait.go.set()
    assert said(wait, timeout=60) == [1.0, 1.0]


@pytest.mark.slow
def test_the_interpreter_exits_while_a_call_hangs(tmp_path):
    (tmp_path / "hang.py").write_text(
        """
import asyncio, time
from rlhf_recipes.rewards.calls import call_all
from rlhf_recipes.rewards.checked import checked
def hang(completions):
    time.sleep(3600)
async def block(completions):
    time.sleep(3600)
for function in (hang, block):
    try:
        call_all([checked(function, "f", False, timeout=0.1)], prompts=["a"], completions=["b"], completion_ids=[[1]], finished=[True])
    except ValueError as error:
        print(error)
"""
    )
    root = str(ROOT)
    started = time.monotonic()
    done = run_python("hang.py", cwd=tmp_path, timeout=120, PYTHONPATH=root)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.count("did not answer within 0.1 s") == 2 and time.monotonic() - started < 100
