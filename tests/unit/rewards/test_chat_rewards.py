"""The reward functions of smol_chat by hand, and its 200 prompts: different, checkable, and possible to satisfy."""

import json
import re

import pytest

from rlhf_recipes.data.rows import load_rows
from rlhf_recipes.recipe.load import load_recipe, shipped_recipes
from rlhf_recipes.recipe.user_code import find_function
from rlhf_recipes.rewards.calls import score_all
from rlhf_recipes.rewards.registry import build_reward_funcs

ROWS = [json.loads(line) for line in (shipped_recipes() / "smol_chat.jsonl").read_text(encoding="utf-8").splitlines()]


def values(function: str, *answers: str, **columns) -> list[float | None]:
    completions = [[{"role": "assistant", "content": answer}] for answer in answers]
    return find_function(f"chat_rewards.py:{function}", "reward function")(completions=completions, **columns)


def test_length_asked_is_1_up_to_the_most_words_and_falls_by_a_fifth_for_every_word_more():
    found = values("length_asked", "one", "one two", "one two three", "", "word " * 30, max_words=[2] * 5)
    assert found == pytest.approx([1, 1, 0.8, 1, 0])


def test_a_required_word_is_a_whole_word_in_any_case():
    assert values("required_word", "Honey!", "the honey", "honeycomb", "wax", must_include=["honey"] * 4) == [
        1,
        1,
        0,
        0,
    ]


def test_one_sentence_is_a_line_of_three_words_or_more_with_its_only_mark_at_its_end():
    kept = ["Bees make honey.", " do they fly? ", "so they do!"]
    broken = ["Bees make honey", "They fly. They hum.", "Bees make\nhoney.", "so they do...", "Honey here.", "", "."]
    assert values("one_sentence", *kept, *broken) == [1] * len(kept) + [0] * len(broken)


@pytest.mark.parametrize(
    ("style", "kept", "broken"),
    [
        ("lower case", ["bees make honey.", "3 bees", "été"], ["Bees make honey.", "bees make Honey", " ", ""]),
        ("no comma", ["Bees and honey.", "bees"], ["Bees, and honey.", ""]),
        (None, [], []),
    ],
)
def test_the_system_prompt_is_kept_only_where_there_is_one(style, kept, broken):
    found = values("system_kept", *kept, *broken, style=[style] * len(kept + broken))
    assert found == [1] * len(kept) + [0] * len(broken)
    assert values("system_kept", "Bees, wax", style=[None]) == [None]


def test_two_neighbouring_words_may_not_occur_again():
    assert values("no_repetition", "so it is, so it goes", "so it is so", "a a a", "a, A a", "") == [0, 1, 0, 0, 1]


def test_an_answer_satisfies_its_prompt_if_it_does_all_that_is_asked():
    answers = {
        "bees make honey.": True,
        "bees make much honey.": False,  # too long
        "bees make wax.": False,
        "bees make honey": False,  # no sentence
        "Bees make honey.": False,  # not the system message's style
    }
    row = {"max_words": 3, "must_include": "honey", "style": "lower case"}

    def found(row: dict, *answers: str, finished: bool = True) -> list[float | None]:
        columns = {name: [value] * len(answers) for name, value in row.items()}
        return values("satisfied", *answers, finished=[finished] * len(answers), **columns)

    assert found(row, *answers) == list(answers.values())
    assert found(row, "bees make honey.", finished=False) == [0]
    assert found(row | {"style": None}, "Bees make honey.") == [1]
    assert found(row | {"max_words": 9}, "honey bees and honey bees.") == [0]


def test_the_data_has_200_prompts_that_state_their_own_instructions():
    questions = set()
    states = {"lower case": "lower case|capital letters", "no comma": "comma"}
    for row in ROWS:
        assert list(row) == ["prompt", "max_words", "must_include", "style"]
        *system, user = row["prompt"]
        question, asked = re.fullmatch(r"(.+?[.?]) (.+)", user["content"]).groups()
        questions.add(question.lower())
        assert user["role"] == "user" and "one" in asked and "sentence" in asked
        assert re.findall(r"\d+", asked) == [str(row["max_words"])] and f"the word {row['must_include']}" in asked
        assert [message["role"] for message in system] == ([] if row["style"] is None else ["system"])
        assert row["style"] is None or re.search(states[row["style"]], system[0]["content"].lower())
    assert len(ROWS) == len(questions) == 200
    assert sum(len(row["prompt"]) == 2 for row in ROWS) == 100


def test_every_prompt_can_be_satisfied_and_then_has_the_highest_score():
    """A tiny oracle: one sentence with the word asked for, in the style asked for."""
    recipe = load_recipe("smol_chat")
    call = {name: [row[name] for row in ROWS] for name in ROWS[0] if name != "prompt"}
    answers = [f"This is about {word}." for word in call["must_include"]]
    answers = [
        answer.lower() if style == "lower case" else answer
        for answer, style in zip(answers, call["style"], strict=True)
    ]
    call |= {
        "prompts": [row["prompt"] for row in ROWS],
        "completions": [[{"role": "assistant", "content": answer}] for answer in answers],
        "completion_ids": [[5, 2]] * len(ROWS),
        "finished": [True] * len(ROWS),
    }
    satisfied, by_func = score_all(
        recipe.eval.held_out_funcs, build_reward_funcs(recipe, recipe.eval.held_out_funcs), 0, **call
    )
    assert satisfied == [1.0] * len(ROWS)
    assert by_func["system_kept"].count(1.0) == by_func["system_kept"].count(None) == 100
    _, parts = score_all(recipe.reward_funcs, build_reward_funcs(recipe, recipe.reward_funcs), 0, **call)
    assert all(value in (1.0, None) for part in parts.values() for value in part)


def test_held_out_prompts_ask_other_questions_than_training(tmp_path, monkeypatch):
    """The recipe finds its data from any folder, and holds out rows of every style."""
    monkeypatch.chdir(tmp_path)
    train, held_out = load_rows(load_recipe("smol_chat").data, 0)
    assert len(train) + len(held_out) == len(ROWS) and len(held_out) >= 60
    assert set(held_out["style"]) == {"lower case", "no comma", None}
    asked = [
        {re.split(r"(?<=[.?]) ", prompt[-1]["content"])[0] for prompt in part["prompt"]} for part in (train, held_out)
    ]
    assert not asked[0] & asked[1]
