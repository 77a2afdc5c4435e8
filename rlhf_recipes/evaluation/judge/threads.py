"""Requests from several threads: how many are under way at once, and how many begin in a minute."""

import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.pool import ThreadPool

from rlhf_recipes.evaluation.judge.parse import Answer, Question


class RateLimit:
    """Lets callers in any thread through at even intervals, `per_minute` of them; None: all at once."""

    def __init__(self, per_minute: float | None):
        self._interval = 60 / per_minute if per_minute else 0.0
        self._lock, self._next_turn = threading.Lock(), -float("inf")

    def wait(self) -> None:
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next_turn)
            self._next_turn = turn + self._interval
        if turn > now:
            time.sleep(turn - now)


def in_threads(
    work: Callable[[Question], Answer], questions: list[Question], workers: int
) -> Iterator[tuple[Question, Answer]]:
    """Pairs of a question and its answer, each as soon as it is there; the first error ends it.

    The pool's threads are daemons and leaving the pool does not wait for them, so neither an error nor Ctrl-C waits for
    requests under way, which may be in a long pause.
    """
    errors: list[Exception] = []

    def answer(question: Question) -> tuple[Question, Answer]:
        if errors:  # the same would happen to this question
            raise errors[0]
        try:
            return question, work(question)
        except Exception as error:
            errors.append(error)
            raise

    with ThreadPool(min(workers, len(questions))) as pool:
        try:
            yield from pool.imap_unordered(answer, questions)
        finally:
            errors.append(RuntimeError("nobody waits for further answers"))
