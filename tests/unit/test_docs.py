"""The documentation agrees with the code: files, functions, quoted lines, tests, defaults and numbers."""

import ast
import re
import runpy

import pytest
from ruamel.yaml import YAML

from rlhf_recipes import PPOConfig, RLOOTrainer
from support.places import ROOT
from support.tiny_models import causal_lm, word_tokenizer
from support.tiny_trainers import PROMPTS, make

PAGE = (ROOT / "docs" / "ppo_details.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
DIFFERENCES = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
REFERENCE = re.compile(r"`([\w/]+\.py): ([\w.]+)`(?: `([^`]+)`)?")


def section(title):
    return PAGE.split(f"\n## {title}")[1].split("\n## ")[0]


def table(title):
    """The cells of every row of a section's table, without the head."""
    rows = [line.strip("| ").split(" | ") for line in section(title).splitlines() if line.startswith("| ")]
    assert len({len(row) for row in rows}) == 1, "a row has another number of cells, or one holds a |"
    return rows[1:]


def source(file, name):
    """The source of a function, class, method or constant."""
    found = list((ROOT / "tests").rglob(file)) if file.startswith("test_") else [ROOT / "rlhf_recipes" / file]
    assert len(found) == 1 and found[0].is_file(), f"there is no {file}"
    (path,) = found
    text = path.read_text(encoding="utf-8")
    node = ast.parse(text)
    for part in name.split("."):
        node = next((child for child in node.body if part in names(child)), None)
        assert node is not None, f"{file} has no {name}"
    return ast.get_source_segment(text, node)


def names(node):
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [getattr(node, "name", None), *(target.id for target in targets if isinstance(target, ast.Name))]


def squeezed(text):
    return " ".join(text.split())


@pytest.mark.parametrize(("file", "name", "line"), sorted(set(REFERENCE.findall(PAGE + CONTRIBUTING))))
def test_what_is_referred_to_exists(file, name, line):
    assert squeezed(line) in squeezed(source(file, name)), f"{file}: {name} has no such line"


def test_make_docs_changes_nothing():
    for file, text in runpy.run_path(str(ROOT / "docs" / "build.py"))["documents"]().items():
        assert file.read_text(encoding="utf-8") == text, f"{file.name} is not what the code says: run `make docs`"


def test_every_key_of_a_recipe_has_a_meaning():
    keys = re.findall(r"^\| `.*$", (ROOT / "docs" / "recipe_keys.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(keys) > 60 and not [key for key in keys if key.endswith("|  |")]


def test_every_detail_of_ours_has_code_and_test():
    for title in ("PPO", "Text, tokens and the reward model", "Where ours differs from TRL 1.16's RLOO"):
        for *_, code, test in table(title):
            assert all(line for _, _, line in REFERENCE.findall(code)) and REFERENCE.match(code), code
            assert REFERENCE.match(test), test
            assert all(file.startswith("test_") for file, _, _ in REFERENCE.findall(test)), test


def test_details_are_numbered_without_gaps():
    titles = ("PPO", "Text, tokens and the reward model", "What is a recipe's matter, or TRL's, or no setting at all")
    numbers = [int(row[0]) for title in titles for row in table(title)]
    assert numbers == list(range(1, len(numbers) + 1))
    papers = {int(number) for title in titles for row in table(title) for number in re.findall(r"\d+", row[1])}
    assert papers == set(range(1, 26)) - {6, 17}  # the page says that it does not know these two


def test_every_difference_from_trl_has_a_reason():
    rows = table("Where ours differs from TRL 1.12.0's PPO, and why")
    given = [int(number) for row in rows for number in row[0].split(", ")]
    listed = [int(number) for number in re.findall(r"^(\d+)\. ", DIFFERENCES, flags=re.MULTILINE)]
    assert sorted(given) == listed == list(range(1, 21))
    assert all(row[1] and row[2] for row in rows)


def test_settings_of_the_paper_can_be_set_and_our_defaults_are_as_given():
    rows = {row[0].strip("`"): [YAML(typ="safe").load(cell) for cell in row[1:]] for row in table("Settings")}
    default = PPOConfig("x", use_cpu=True, bf16=False)
    for name, (_, ours) in rows.items():
        assert getattr(default, name) == ours, name
    paper = PPOConfig("x", use_cpu=True, bf16=False, **{name: value for name, (value, _) in rows.items()})
    assert (paper.adam_epsilon, paper.missing_eos["value"], paper.num_iterations) == (1e-5, -1, 4)


def test_prompts_come_in_another_order_in_every_epoch(tmp_path):
    """Each epoch has all prompts, in an order that does not depend on earlier epochs."""
    trainer = make(RLOOTrainer, causal_lm(word_tokenizer()), tmp_path, prompts=PROMPTS)
    sampler, orders = trainer._get_train_sampler(), []
    for epoch in (0, 1, 2, 1):
        trainer.state.epoch = epoch
        orders.append(list(sampler))
    assert orders[1] == orders[3] and len({tuple(order) for order in orders}) == 3
    assert all(set(order) == set(range(len(PROMPTS) * 4)) for order in orders)
