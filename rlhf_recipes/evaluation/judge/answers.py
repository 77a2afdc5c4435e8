"""Answers of a judge on disk, so that nothing is asked twice."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from rlhf_recipes.evaluation.judge.parse import Answer, Question
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.system.files import read_log


class Answers:
    """Finds answers by the question, the backend and its settings.

    Args:
        path: A jsonl file, which only grows. Lines that hold no answer, such as one that was cut off in its middle, are
            left out: their questions are asked again.
        identity: Of the backend.

    Raises:
        RecipeError: The file cannot be read.
    """

    def __init__(self, path: Path, identity: dict[str, Any]):
        self.path, self.identity = path, identity
        try:
            entries = read_log(path, needed=("key",))
            self._is_torn = path.exists() and not path.read_bytes().endswith(b"\n")
        except OSError as error:
            raise RecipeError(f"{path}: cannot be read: {error.strerror}; make it readable, or remove it.") from error
        self._known: dict[str, Answer] = {entry.pop("key"): entry for entry in entries if _is_answer(entry)}

    def key(self, question: Question) -> str:
        return hashlib.sha256(json.dumps([self.identity, question], sort_keys=True).encode()).hexdigest()

    def __contains__(self, question: Question) -> bool:
        return self.key(question) in self._known

    def get(self, question: Question) -> Answer | None:
        return self._known.get(self.key(question))

    def add(self, question: Question, answer: Answer) -> None:
        """Keep an answer; it is on the disk when this returns."""
        line = json.dumps({"key": self.key(question)} | answer)  # in ASCII: an endpoint may send half a character
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(("\n" if self._is_torn else "") + line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._is_torn = False
        self._known[self.key(question)] = answer


def _is_answer(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("key"), str):
        return False
    has_text = isinstance(entry.get("text"), str) and isinstance(entry.get("cut"), bool)
    return has_text or isinstance(entry.get("score"), (int, float))
