"""Texts, pairs and prompts made of rows."""

import pytest
from conftest import REVIEWS, bpe_tokenizer, word_tokenizer
from datasets import Dataset

from rlhf_recipes.config import Data, RecipeError
from rlhf_recipes.shapes import pairs, prompts, texts


def error(function, *args, **more) -> str:
    with pytest.raises(RecipeError) as caught:
        function(*args, **more)
    return str(caught.value)


def test_pairs_have_equal_lengths_and_use_no_text_twice():
    rows = Dataset.from_list(
        [{"text": " ".join(["w"] * n) + f" {i}", "label": i % 2} for i, n in enumerate([3, 3, 5, 4, 9, 2, 7, 7, 1, 6])]
    )
    made = pairs(Data(path="x"), rows, None, None, 0)
    assert len(made) == 5
    for pair in made:
        assert len(pair["chosen"].split()) == len(pair["rejected"].split())
    assert len({pair["chosen"] for pair in made}) == 5


def test_pairs_choose_the_positive_text_and_own_pairs_are_kept():
    by_text = {row["text"]: row["label"] for row in REVIEWS}
    made = pairs(Data(path="x"), Dataset.from_list(REVIEWS), None, 5, 0)
    assert len(made) == 5
    assert all(by_text[pair["chosen"]] == 1 and by_text[pair["rejected"]] == 0 for pair in made)
    own = Dataset.from_list([{"prompt": "p", "chosen": "c", "rejected": "r", "other": 1}])
    assert pairs(Data(path="x"), own, None, None, 0)[0] == {"prompt": "p", "chosen": "c", "rejected": "r"}


def test_pairs_need_both_labels_and_known_ones():
    assert "0 negative" in error(pairs, Data(path="x"), Dataset.from_list([{"text": "a", "label": 1}]), None, None, 0)
    assert "'maybe'" in error(
        pairs, Data(path="x"), Dataset.from_list([{"text": "a", "label": "maybe"}]), None, None, 0
    )
    assert "no column label" in error(pairs, Data(path="x"), Dataset.from_list([{"text": "a"}]), None, None, 0)


@pytest.mark.parametrize("tokenizer", [word_tokenizer(), bpe_tokenizer()])
def test_prompts_are_the_first_tokens_of_texts(tokenizer):
    made = prompts(Data(path="x", prompt_tokens=[2, 4]), Dataset.from_list(REVIEWS), tokenizer, 0)
    lengths = {len(tokenizer(prompt)["input_ids"]) for prompt in made["prompt"]}
    assert lengths == {2, 3, 4}
    assert all(any(row["text"].startswith(prompt) for row in REVIEWS) for prompt in made["prompt"])
    assert "label" in made.column_names  # reward functions may want it


@pytest.mark.parametrize("own", ["the film", [{"role": "user", "content": "hi"}]])
def test_own_prompts_are_kept_text_or_chat(own):
    made = prompts(Data(path="x"), Dataset.from_dict({"prompt": [own], "completion": ["x"]}), word_tokenizer(), 0)
    assert made[0] == {"prompt": own, "reference": "x"}


def test_texts_too_short_for_a_prompt():
    rows = Dataset.from_dict({"text": ["the", "a"]})
    assert "2 to 8 tokens" in error(prompts, Data(path="x"), rows, word_tokenizer(), 0)
    assert "2 to 3 words" in error(prompts, Data(path="x", prompt_words=[2, 3]), rows, word_tokenizer(), 0)


def test_texts_for_sft():
    assert texts(Data(path="x"), Dataset.from_list(REVIEWS), None, labels=[1]).num_rows == 15
    both = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "text": ["c"]})
    assert set(texts(Data(path="x"), both, None).column_names) == {"prompt", "completion"}
    assert "data.columns.text=NAME" in error(texts, Data(path="x"), Dataset.from_dict({"body": ["a"]}), None)
    assert "no row" in error(texts, Data(path="x"), Dataset.from_dict({"text": ["a"], "label": [0]}), None, [1])
