"""Files that are no recipe: too large, too deep, multiplied by aliases, in another encoding. Each is refused at once."""

import time

import pytest

from rlhf_recipes.launch.configs import find_config, read_config
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.schema import RecipeError

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k: 1, l: 2}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
BROKEN = {
    "bomb": (BOMB, "more than 20,000 values"),
    "merged": (MERGES, "more than 20,000 values"),
    "itself": ("a: &a [*a]\n", "contains itself"),
    "itself_in_a_mapping": ("a: &a {b: *a}\n", "contains itself"),
    "brackets": ("a: " + "[" * 3000, "deeper than 50 levels"),
    "braces": ("{a: " * 3000, "deeper than 50 levels"),
    "list": ("- " * 3000, "deeper than 50 levels"),
    "indented": ("".join(" " * i + "a:\n" for i in range(400)), "deeper than 50 levels"),
    "large": ("a: 1\n" * 2_000_000, "more than 100,000 characters"),
    "latin": ("description: \u00e9\n".encode("latin-1"), "not UTF-8"),
    "utf16": ("description: x\n".encode("utf-16"), "not UTF-8"),
    "zeros": (b"description: \0\0\n", "special characters are not allowed"),
    "no_date": ("description: 2026-99-99\n", "month must be"),
    "digits": ("seed: " + "9" * 5000 + "\n", "digits"),
    "python": ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
    "empty": ("", "NoneType"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize(
    "read", [load_recipe, lambda path: read_config(find_config(path))], ids=["recipe", "accelerate"]
)
def test_a_file_that_would_take_long_or_is_no_text_is_refused_at_once(name, read, tmp_path):
    content, expected = BROKEN[name]
    file = tmp_path / f"{name}.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = time.process_time()
    with pytest.raises(RecipeError) as caught:
        read(str(file))
    assert str(caught.value).startswith(str(file)) and expected in str(caught.value)
    assert time.process_time() - before < 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [("&a [*a]", "contains itself"), ("[" * 3000, "deeper"), ("x" * 200_000, "characters"), ("[2026-01-01]", "date")],
)
def test_values_of_overrides_have_the_same_limits(value, expected):
    with pytest.raises(RecipeError, match=f"ppo.trainer.beta.*{expected}"):
        load_recipe("imdb_tiny", [f"ppo.trainer.beta={value}"])
    with pytest.raises(RecipeError, match="a: unknown key"):
        load_recipe("imdb_tiny", [f"{'.'.join('a' * 3000)}=1"])


def test_a_value_that_yaml_alone_makes_is_refused(tmp_path):
    """A date or bytes; no setting takes them, and no manifest can hold them."""
    for value, kind in (("2026-01-01", "date"), ("!!binary aGk=", "bytes"), ("!!set {a, b}", "set")):
        file = tmp_path / "r.yaml"
        file.write_text(f"extends: imdb_tiny\nreward_funcs: [{{name: length, args: {{unit: {value}}}}}]\n")
        with pytest.raises(RecipeError, match=rf"^{file}: .*unit.* as a {kind}"):
            load_recipe(str(file))


@pytest.mark.parametrize(
    "key",
    [
        "data.path",
        "sft.model",
        "reward_funcs.0.name",
        "data.transform",
        "runs_dir",
        "name",
        "eval.models.x",
        "ppo.policy",
    ],
)
@pytest.mark.parametrize("text", ["n" * 300, "n" * 300 + ".py:f", "~nobody/x", "/" + "n" * 300 + "/m"])
def test_long_names_are_no_tracebacks(key, text, tmp_path):
    from rlhf_recipes.rewards.registry import check_functions
    from rlhf_recipes.runs.folder import Run
    from rlhf_recipes.runs.inputs import check_references

    try:
        recipe = load_recipe("imdb_tiny", [f"runs_dir={tmp_path}", f"{key}={text}"])
        if findings := check_functions(recipe):
            raise RecipeError(findings[0])
        for stage in recipe.stages():
            Run(recipe, stage)
            check_references(recipe, stage)
    except RecipeError as error:
        assert str(error)


def test_long_file_names(tmp_path):
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe("n" * 300 + ".yaml")
    (tmp_path / "r.yaml").write_text(f"extends: {'n' * 300}\n")
    with pytest.raises(RecipeError, match="there is no recipe"):
        load_recipe(str(tmp_path / "r.yaml"))
