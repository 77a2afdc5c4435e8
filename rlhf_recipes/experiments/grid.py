"""The grid of a sweep: its keys and their values, as arguments, as labels of a table, and as parts of paths."""

import hashlib
import re
from dataclasses import dataclass

from rlhf_recipes.recipe.schema import RecipeError

ONE_VALUE = {
    "seed": "use --seeds 42,43,44",
    "name": "every run has its own folder anyway",
    "runs_dir": "every run has its own folder anyway",
}
"""Key that cannot be swept -> the reason, or what to do instead."""

QUOTED = re.compile(r""""(\\.|[^"\\])*"|'(''|[^'])*'""", re.DOTALL)


@dataclass(frozen=True)
class Axis:
    """Keys that change together: all of them take the same value."""

    keys: tuple[str, ...]
    values: tuple[str, ...]
    """Values as text, as the user wrote them."""

    def is_in(self, sections: set[str]) -> bool:
        """Whether one of the keys belongs to one of these parts of a recipe."""
        return any(key.split(".")[0] in sections for key in self.keys)


def split_values(text: str) -> list[str]:
    """Splits at commas outside brackets, braces and quotes, and strips blanks around values."""
    values, start, depth, i = [], 0, 0, 0
    before = ","  # the last character that is not a blank: in YAML, only some characters may precede a quote
    while i < len(text):
        quoted = QUOTED.match(text, i) if before in ",:[{" else None
        if quoted:
            i, before = quoted.end(), text[i]
            continue
        if text[i] in "[{":
            depth += 1
        elif text[i] in "]}":
            depth = max(depth - 1, 0)
        elif text[i] == "," and depth == 0:
            values.append(text[start:i].strip())
            start = i + 1
        before = before if text[i].isspace() else text[i]
        i += 1
    return [*values, text[start:].strip()]


def parse_grid(overrides: list[str]) -> tuple[list[Axis], list[str]]:
    """Separates keys with several values from plain overrides.

    Args:
        overrides: `key=value`, `key=value,value` or `key,key=value,value` each.

    Returns:
        The axes of the grid in the given order, and the overrides of all runs.

    Raises:
        RecipeError: Every finding: a key that cannot be swept, an empty value, a repeated key or value.
    """
    axes, plain, findings = [], [], []
    for override in overrides:
        left, equals, right = override.partition("=")
        keys, values = [key.strip() for key in left.split(",")], split_values(right)
        if not equals:
            plain.append(override)  # load_recipe refuses it
            continue
        if len(values) == 1:
            plain += [f"{key}={right}" for key in keys]
            continue
        findings += [f"{left}: several values, but {ONE_VALUE[key]}." for key in keys if key in ONE_VALUE]
        if "" in values:
            findings.append(f"{left}: a value of {right!r} is empty; null removes a key.")
        findings += [f"{left}: the value {v} is given twice." for v in sorted(set(values)) if v and values.count(v) > 1]
        axes.append(Axis(tuple(keys), tuple(values)))
    keys = [key for axis in axes for key in axis.keys] + [override.partition("=")[0] for override in plain]
    swept = {key for axis in axes for key in axis.keys}
    twice = sorted(key for key in swept if keys.count(key) > 1)
    findings += [f"{key}: is set twice; give all its values at once: {key}=1,2." for key in twice]
    if findings:
        raise RecipeError("\n".join(findings))
    return axes, plain


def parse_seeds(text: str, first: int) -> list[int]:
    """`3`: three seeds, from the recipe's seed on; `42,43,44`: these seeds."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]+", part) for part in parts) or len(set(map(int, parts))) < len(parts):
        raise RecipeError(f"--seeds {text}: write how many (3), or which (42,43,44), each once.")
    seeds = [int(part) for part in parts]
    if seeds == [0]:
        raise RecipeError("--seeds 0: at least one seed is needed.")
    return seeds if len(seeds) > 1 else [first + i for i in range(seeds[0])]


def labels(axes: list[Axis], sections: set[str]) -> dict[Axis, str]:
    """Name of each axis in a row: the last parts of its keys in these sections, or the whole keys if not unique."""
    keys = {axis: [key for key in axis.keys if key.split(".")[0] in sections] for axis in axes}
    short = {axis: "+".join(dict.fromkeys(key.split(".")[-1] for key in keys[axis])) for axis in axes}
    if len(set(short.values())) == len(axes):
        return short
    return {axis: "+".join(map(without_trainer, keys[axis])) for axis in axes}


def without_trainer(key: str) -> str:
    return key.replace(".trainer.", ".")


def path_parts(settings: dict[str, str]) -> list[str]:
    """Parts of a path for the settings of a row; sorted, so that the command's order does not matter."""
    return sorted(f"{in_path(label.replace('+', '_'))}_{in_path(value)}" for label, value in settings.items())


def in_path(text: str) -> str:
    """A text as a part of a file name: unchanged if it is short and plain, otherwise shortened with a hash."""
    if re.fullmatch(r"[A-Za-z0-9._]{1,40}|-?[0-9.]+(e-?[0-9]+)?", text):
        return text
    short = re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_")[:24]
    return f"{short}.{short_hash(text)}"


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
