"""The grid of a sweep: which keys take which values, and how that is written in tables and paths. Nothing runs here."""

import hashlib
import re
from dataclasses import dataclass

from rlhf_recipes.recipe.schema import RecipeError

ONE_VALUE = {
    "seed": "use --seeds 42,43,44",
    "name": "every run gets a folder of its own anyway",
    "runs_dir": "every run gets a folder of its own anyway",
}
"""Keys that cannot be swept -> what to do instead."""

QUOTED = re.compile(r""""(\\.|[^"\\])*"|'(''|[^'])*'""", re.DOTALL)


@dataclass(frozen=True)
class Axis:
    """Keys that take the same values together, one after another."""

    keys: tuple[str, ...]
    values: tuple[str, ...]
    """As they were written."""

    def is_in(self, sections: set[str]) -> bool:
        """Whether one of the keys belongs to one of these parts of a recipe."""
        return any(key.split(".")[0] in sections for key in self.keys)


def split_values(text: str) -> list[str]:
    """Split at commas outside of brackets, braces and quotes; blanks around a value do not belong to it."""
    values, start, depth, i = [], 0, 0, 0
    before = ","  # the last character that is no blank: YAML lets quotes open only behind some
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
    """Separate keys with several values from plain overrides.

    Args:
        overrides: `key=value`, `key=value,value` or `key,key=value,value` each.

    Returns:
        The axes of the grid in the order given, and overrides that hold for all runs.

    Raises:
        RecipeError: A key cannot be swept, is there twice, or a value is empty or there twice; every finding.
    """
    axes, plain, findings = [], [], []
    for override in overrides:
        left, equals, right = override.partition("=")
        keys, values = [key.strip() for key in left.split(",")], split_values(right)
        if not equals:
            plain.append(override)  # which load_recipe refuses
            continue
        if len(values) == 1:
            plain += [f"{key}={right}" for key in keys]
            continue
        findings += [f"{left}: several values, but {ONE_VALUE[key]}." for key in keys if key in ONE_VALUE]
        if "" in values:
            findings.append(f"{left}: there is nothing between two commas of {right!r}; null takes a key away.")
        findings += [f"{left}: the value {v} is there twice." for v in sorted(set(values)) if v and values.count(v) > 1]
        axes.append(Axis(tuple(keys), tuple(values)))
    keys = [key for axis in axes for key in axis.keys] + [override.partition("=")[0] for override in plain]
    swept = {key for axis in axes for key in axis.keys}
    twice = sorted(key for key in swept if keys.count(key) > 1)
    findings += [f"{key}: is set twice; give all of its values at once, as {key}=1,2." for key in twice]
    if findings:
        raise RecipeError("\n".join(findings))
    return axes, plain


def parse_seeds(text: str, first: int) -> list[int]:
    """`3`: three seeds from the recipe's on; `42,43,44`: these."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]+", part) for part in parts) or len(set(map(int, parts))) < len(parts):
        raise RecipeError(f"--seeds {text}: write how many (3), or which (42,43,44), each once.")
    seeds = [int(part) for part in parts]
    if seeds == [0]:
        raise RecipeError("--seeds 0: at least one seed is needed.")
    return seeds if len(seeds) > 1 else [first + i for i in range(seeds[0])]


def labels(axes: list[Axis], sections: set[str]) -> dict[Axis, str]:
    """How a row names an axis: by the last part of those keys that matter, by more where that is not unique."""
    keys = {axis: [key for key in axis.keys if key.split(".")[0] in sections] for axis in axes}
    short = {axis: "+".join(dict.fromkeys(key.split(".")[-1] for key in keys[axis])) for axis in axes}
    if len(set(short.values())) == len(axes):
        return short
    return {axis: "+".join(map(without_trainer, keys[axis])) for axis in axes}


def without_trainer(key: str) -> str:
    return key.replace(".trainer.", ".")


def path_parts(settings: dict[str, str]) -> list[str]:
    """How a path names the settings of a row, in an order that is not the command's."""
    return sorted(f"{in_path(label.replace('+', '_'))}_{in_path(value)}" for label, value in settings.items())


def in_path(text: str) -> str:
    """A text as a part of a file's name: as it is, where it can stand there; otherwise shortened, with a hash."""
    if re.fullmatch(r"[A-Za-z0-9._]{1,40}|-?[0-9.]+(e-?[0-9]+)?", text):
        return text
    short = re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_")[:24]
    return f"{short}.{short_hash(text)}"


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
