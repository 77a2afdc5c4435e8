"""Texts, pairs and prompts made of rows."""

import re

import pytest
from datasets import Dataset

from rlhf_recipes.data.filters import warn_of_copies
from rlhf_recipes.data.pairs import pairs
from rlhf_recipes.data.shapes import corpus, prompts, texts, warn_of_known_prompts
from rlhf_recipes.data.tokenizer import token_ids
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.recipe.sections import Data
from support.texts import REVIEWS
from support.tiny_models import bpe_tokenizer, word_tokenizer


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
    tokenizer = word_tokenizer(chat_template="{{ messages }}")
    made = prompts(Data(path="x"), Dataset.from_dict({"prompt": [own], "completion": [own]}), tokenizer, 0)
    assert made[0] == {"prompt": own, "gold": own}


def test_texts_too_short_for_a_prompt():
    rows = Dataset.from_dict({"text": ["the", "a"]})
    assert "2 to 8 tokens" in error(prompts, Data(path="x"), rows, word_tokenizer(), 0)
    assert "2 to 3 words" in error(prompts, Data(path="x", prompt_words=[2, 3]), rows, word_tokenizer(), 0)


def test_texts_for_sft():
    assert texts(Data(path="x"), Dataset.from_list(REVIEWS), None, labels=[1]).num_rows == 15
    both = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "text": ["c"]})
    assert set(texts(Data(path="x"), both, None).column_names) == {"prompt", "completion"}
    assert "data.columns.text=NAME" in error(texts, Data(path="x"), Dataset.from_dict({"body": ["a"]}), None)
    assert "sft.labels: no training row" in error(
        texts, Data(path="x"), Dataset.from_dict({"text": ["a"], "label": [0]}), None, [1]
    )


def test_which_label_is_chosen():
    by_text = {row["text"]: row["label"] for row in REVIEWS}
    for label in (0, 1):
        made = pairs(Data(path="x"), Dataset.from_list(REVIEWS), None, None, 0, chosen_label=label)
        assert {by_text[text] for text in made["chosen"]} == {label}
        assert {by_text[text] for text in made["rejected"]} == {1 - label}


def test_texts_that_come_twice_make_one_pair_and_held_out_ones_none():
    rows = Dataset.from_list(
        [{"text": f"w{i} is {'good' if label else 'bad'}", "label": label} for i in range(6) for label in (0, 1)] * 2
    )
    made = pairs(Data(path="x"), rows, None, None, 0)
    used = [text for pair in made for text in pair.values()]
    assert len(made) == 6 and len(set(used)) == 12
    held_out = Dataset.from_list(
        [*rows.select(range(8)), {"text": "new good", "label": 1}, {"text": "new bad", "label": 0}]
    )
    assert list(pairs(Data(path="x"), held_out, None, None, 0, apart_from=rows)) == [
        {"chosen": "new good", "rejected": "new bad"}
    ]


TEMPLATE = "TITLE: {title}\nPOST: {post}\nTL;DR:"


def test_templates_fill_columns_whose_braces_are_data():
    data = Data(path="x", prompt_template=TEMPLATE + " {{sic}}", completion_prefix=" ")
    rows = Dataset.from_list([{"title": "a {post} {", "post": "b {title}", "completion": "c"}])
    prompt = "TITLE: a {post} {\nPOST: b {title}\nTL;DR: {sic}"
    assert texts(data, rows, None)[0] == {"prompt": prompt, "completion": " c"}
    assert prompts(data, rows, None, 0)[0]["prompt"] == prompt
    assert prompts(data, rows, None, 0)[0]["gold"] == " c"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"prompt_template": "{headline}"}, "no column headline"),
        ({"prompt_template": "{headline}"}, "it has: title, completion, summary"),
        ({"prompt_template": "{}"}, "no column ''"),
        ({"prompt_template": "{title"}, "data.prompt_template: "),
        ({"prompt_template": "{title} {completion}"}, "{completion} is the answer"),
        ({"prompt_template": "{title:d}"}, "{title} must have no format ('d')"),
        ({"prompt_template": "{title!r}"}, "{title} must have no format ('r')"),
        ({"prompt_template": "{t}", "columns": {"t": "summary", "completion": "summary"}}, "{t} is the answer"),
        ({"prompt_template": "{all}", "columns": {"completion": "all.answer"}}, "{all} is the answer"),
        ({"prompt_template": "{summary}", "columns": {"completion": "summary"}}, "{summary} is the answer"),
        ({"prompt_template": "{title}", "max_prompt_tokens": 5, "truncate": "post"}, "data.truncate: post"),
        ({"prompt_template": "{title}", "truncate": "title"}, "data.max_prompt_tokens"),
    ],
)
def test_templates_that_do_not_fit(settings, expected):
    rows = Dataset.from_list([{"title": "a", "completion": "c", "summary": "c"}])
    for field in ("t", "all"):  # as `data.columns` makes them
        rows = rows.add_column(field, ["c"]) if f"{{{field}}}" in settings["prompt_template"] else rows
    assert expected in error(texts, Data(path="x", **settings), rows, None)


def test_a_prompt_loses_paragraphs_until_it_fits(caplog):
    # In words, which are the tokens here: 4 of the template and title, 3 + 2 + 4 of the paragraphs.
    post = "the film was\n\ngreat fun\na movie i liked"
    rows = Dataset.from_list([{"title": "film", "post": post, "completion": "c"}])

    def cut(limit: int) -> str:
        data = Data(path="x", prompt_template=TEMPLATE, max_prompt_tokens=limit, truncate="post")
        return prompts(data, rows, word_tokenizer(), 0)[0]["prompt"].removeprefix("TITLE: film\nPOST: ")

    assert cut(13) == post + "\nTL;DR:"
    assert cut(12) == cut(9) == "the film was\n\ngreat fun\nTL;DR:"
    assert cut(8) == cut(7) == "the film was\n\nTL;DR:"
    assert cut(6) == "the film \nTL;DR:"  # of the last paragraph, characters
    assert not caplog.records
    assert "1 of 1 prompts have more than 4 tokens" in error(cut, 4)


@pytest.mark.parametrize("tokenizer", [word_tokenizer(), bpe_tokenizer()])
def test_a_prompt_loses_no_more_than_it_must(tokenizer, monkeypatch):
    """The result is that of cutting one paragraph or character at a time, in far fewer steps."""
    asked = []
    monkeypatch.setattr("rlhf_recipes.data.filters.token_ids", lambda *args: asked.append(0) or token_ids(*args))
    many = 0
    for post in ("the film was great 😀 ünï\n\nfun " * 6, "the plot\n" * 30 + "x" * 50, "a great movie " * 40):
        for limit in (9, 14, 33):
            data = Data(path="x", prompt_template="{post} end", max_prompt_tokens=limit, truncate="post")
            wanted = post
            while len(tokenizer(f"{wanted} end")["input_ids"]) > limit:
                wanted, many = wanted.rpartition("\n")[0] or wanted[:-1], many + 1
            rows = Dataset.from_dict({"post": [post], "completion": ["c"]})
            assert prompts(data, rows, tokenizer, 0)[0]["prompt"] == f"{wanted} end"
    assert len(asked) < 0.7 * many


@pytest.mark.parametrize("shape", ["texts", "pairs", "prompts"])
def test_prompts_that_are_too_long_are_left_out_and_counted(shape, caplog):
    data = Data(path="x", max_prompt_tokens=2)
    rows = Dataset.from_dict(
        {"prompt": ["the film", "the film was", "a"], "completion": ["a", "b", "c"], "chosen": ["a", "b", "c"]}
        | {"rejected": ["d", "e", "f"]}
    )
    made = {
        "texts": lambda: texts(data, rows, word_tokenizer()),
        "pairs": lambda: pairs(data, rows, word_tokenizer(), None, 0),
        "prompts": lambda: prompts(data, rows, word_tokenizer(), 0),
    }[shape]()
    assert made["prompt"][:] == ["the film", "a"]
    assert "1 of 3 prompts have more than 2 tokens and are left out" in caplog.text


def test_chat_prompts_are_measured_through_the_template(caplog):
    tokenizer = word_tokenizer(chat_template="{% for m in messages %}the {{ m.content }} . {% endfor %}a")
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in ("film", "great film")]})
    # One message of one word has four tokens with the template's own three.
    assert len(prompts(Data(path="x", max_prompt_tokens=4), rows, tokenizer, 0)) == 1
    assert len(prompts(Data(path="x", max_prompt_tokens=5), rows, tokenizer, 0)) == 2


@pytest.mark.parametrize("shortest", [2, 3])
def test_prompts_are_the_first_words_of_texts(shortest):
    data = Data(path="x", prompt_words=[shortest, 3], prompt_tokens=[1, 1])
    made = prompts(data, Dataset.from_list(REVIEWS), bpe_tokenizer(), 0)
    assert len(made) == len(REVIEWS) and "text" not in made.column_names
    assert {len(prompt.split()) for prompt in made["prompt"]} == set(range(shortest, 4))
    assert all(row["text"].startswith(p + " ") for row, p in zip(REVIEWS, made["prompt"], strict=True))


def test_fixed_and_whole_prompts():
    fixed = prompts(Data(path="x", prompt_tokens=[3, 3]), Dataset.from_list(REVIEWS), word_tokenizer(), 0)
    assert {len(prompt.split()) for prompt in fixed["prompt"]} == {3}
    rows = Dataset.from_list([row | {"prompt": row["text"]} for row in REVIEWS])
    assert prompts(Data(path="x"), rows, word_tokenizer(), 0)["prompt"][:] == rows["text"][:]


def test_nothing_of_an_answer_stays_but_the_gold():
    rows = Dataset.from_list(
        [{"prompt": "p", "completion": "c", "chosen": "c", "rejected": "r", "completion_0": "c", "completion_1": "r"}]
    )
    rows = rows.add_column("choice", [0]).add_column("label", [1])
    assert prompts(Data(path="x"), rows, None, 0)[0] == {"prompt": "p", "label": 1, "gold": "c"}


def test_the_choice_decides_which_completion_is_chosen():
    rows = Dataset.from_dict({"completion_0": ["a", "b"], "completion_1": ["c", "d"], "choice": [0, 1]})
    expected = [{"chosen": " a", "rejected": " c"}, {"chosen": " d", "rejected": " b"}]
    assert list(pairs(Data(path="x", completion_prefix=" "), rows, None, None, 0)) == expected
    for other in (2, None, "0"):
        rows = Dataset.from_dict({"completion_0": ["a"], "completion_1": ["c"], "choice": [other]})
        assert f"holds {other!r}; it must be 0 or 1" in error(pairs, Data(path="x"), rows, None, None, 0)


CHOSEN = ["good", "same", " ", "good", None]
REJECTED = ["bad", "same", "bad", "", "bad"]


def test_pairs_that_cannot_be_used_are_refused_or_dropped(caplog):
    rows = Dataset.from_dict({"prompt": ["p"] * 5, "chosen": CHOSEN, "rejected": REJECTED})
    found = error(pairs, Data(path="x.jsonl"), rows, None, None, 0, key="reward.data")
    for part in (
        "reward.data: 4 of 5 rows of x.jsonl",
        "1 with equal chosen and rejected",
        "2 with an empty chosen",
        "1 with an empty rejected",
        "row 2 of these: prompt 'p', chosen 'same', rejected 'same'",
        "reward.data.invalid_rows: drop",
    ):
        assert part in found
    # A prefix does not fill an empty completion, and does not make equal texts differ.
    made = pairs(Data(path="x", invalid_rows="drop", completion_prefix=" "), rows, None, None, 0)
    assert list(made) == [{"prompt": "p", "chosen": " good", "rejected": " bad"}]
    assert "4 of 5 rows" in caplog.text and "left out" in caplog.text


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({"prompt": ["a", "b"], "completion": ["c", ""]}, "1 with an empty completion"),
        ({"prompt": ["a", " "], "completion": ["c", "d"]}, "1 with an empty prompt"),
        ({"text": ["a", "\n"]}, "1 with an empty text"),
        ({"messages": [[{"role": "user", "content": "a"}], []]}, "1 with an empty messages"),
    ],
)
def test_texts_that_cannot_be_used(rows, expected):
    rows, tokenizer = Dataset.from_dict(rows), word_tokenizer(chat_template="{{ messages }}")
    assert expected in error(texts, Data(path="x"), rows, tokenizer)
    assert len(texts(Data(path="x", invalid_rows="drop"), rows, tokenizer)) == 1


def test_empty_prompts_and_what_is_left_of_them():
    rows = Dataset.from_dict({"prompt": ["", "a", None]})
    assert "2 with an empty prompt" in error(prompts, Data(path="x"), rows, None, 0)
    drop = Data(path="x", invalid_rows="drop")
    assert prompts(drop, rows, None, 0)["prompt"][:] == ["a"]
    assert "2 of 2 rows" in error(prompts, drop, rows.select([0, 2]), None, 0)


def test_the_corpus_is_all_that_is_trained_on():
    rows = Dataset.from_dict({"title": ["a", "b"], "post": ["c", "d"], "completion": ["e", "f"], "label": [1, 0]})
    data = Data(path="x", prompt_template="{title}: {post} =", completion_prefix=" ", max_prompt_tokens=1)
    assert corpus(data, rows) == ["a: c = e", "b: d = f"]
    assert corpus(data, rows, labels=[0]) == ["b: d = f"]
    assert corpus(Data(path="x"), Dataset.from_dict({"text": ["g"]})) == ["g"]
    chat = [[{"role": "user", "content": "h"}, {"role": "assistant", "content": "i"}]]
    assert corpus(Data(path="x"), Dataset.from_dict({"messages": chat})) == ["h\ni"]


def test_held_out_texts_that_are_all_in_training():
    rows = Dataset.from_list(REVIEWS)
    found = error(pairs, Data(path="x"), rows, None, None, 0, apart_from=rows)
    assert "0 positive and 0 negative held-out texts that are no training texts" in found


def chat(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({"prompt": ["a"], "completion": [5]}, "the column completion of x holds 5"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": ["b"]}, "the column prompt of x holds {'role'"),
        ({"prompt": [["a"]], "completion": ["b"]}, "the column prompt of x holds ['a'], but must hold text or a list"),
        ({"prompt": [[{"from": "human", "value": "a"}]], "completion": [chat("b")]}, "a list of {role, content}"),
        ({"prompt": ["a"], "completion": [chat("b")]}, "x mixes prompt text, completion chat messages"),
        ({"text": [chat("a")]}, "must hold text; convert it with data.transform"),
        ({"messages": ["a"]}, "the column messages of x holds 'a', but must hold a list of {role, content}"),
    ],
)
def test_what_is_neither_text_nor_chat_messages(rows, expected):
    assert expected in error(texts, Data(path="x", invalid_rows="drop"), Dataset.from_dict(rows), None)
    if "prompt" in rows:
        answers = {"chosen": rows["completion"], "rejected": rows["completion"]}
        assert "reward.data" in error(
            pairs, Data(path="x"), Dataset.from_dict(rows | answers), None, 1, 0, key="reward.data"
        )


def test_chat_messages_need_a_template():
    answers = {name: [chat(name)] for name in ("completion", "chosen", "rejected")}
    rows = Dataset.from_dict({"prompt": [chat("a")], **answers})
    for made in (
        error(texts, Data(path="x"), rows, word_tokenizer()),
        error(texts, Data(path="x"), Dataset.from_dict({"messages": [chat("a")]}), word_tokenizer()),
        error(pairs, Data(path="x"), rows, word_tokenizer(), None, 0),
        error(pairs, Data(path="x"), rows.remove_columns("prompt"), word_tokenizer(), None, 0),
        error(prompts, Data(path="x", max_prompt_tokens=5), rows, word_tokenizer(), 0),
    ):
        assert "data: x has chat messages, but the model's tokenizer has no chat template" in made


def test_a_template_without_columns_looks_at_none():
    rows = Dataset.from_dict({"completion": ["a", "b"], "other": [None, "c"]})
    assert prompts(Data(path="x", prompt_template="Go:"), rows, None, 0)["prompt"][:] == ["Go:", "Go:"]


def test_labels_in_any_case_and_others():
    rows = [row | {"label": "Positive" if row["label"] else "NEG"} for row in REVIEWS]
    assert len(pairs(Data(path="x"), Dataset.from_list(rows), None, None, 0)) == 15
    for label in ("LABEL_1", 2, [1], None):
        rows = Dataset.from_dict({"text": ["a"], "label": [label]})
        found = error(pairs, Data(path="x"), rows, None, None, 0)
        assert f"holds {label!r}; known: 1, '1', 'pos'" in found and "data.transform" in found


def test_pairs_of_one_label_only():
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [1, 1]})
    assert "2 positive and 0 negative texts" in error(pairs, Data(path="x"), rows, None, None, 0)
    others = Dataset.from_dict({"text": ["c"], "label": [0]})
    assert "data.eval_fraction" in error(pairs, Data(path="x"), rows, None, None, 0, apart_from=others)
    found = error(pairs, Data(path="x"), Dataset.from_dict({"chosen": ["a"]}), None, None, 0)
    assert "no column text (or chosen and rejected, or" in found


def test_held_out_rows_that_are_training_rows_are_counted(caplog):
    train = Dataset.from_dict({"prompt": ["a", "a", "b"], "completion": ["c", "d", "e"]})
    held_out = Dataset.from_dict({"completion": ["d", "d", "c"], "prompt": ["a", "b", "a"]})
    warn_of_copies(train, held_out.select([1]), "data")
    assert not caplog.records
    warn_of_copies(train, held_out, "reward.data")
    assert "reward.data: 2 of 3 held-out rows are training rows too" in caplog.text


def test_prompts_of_rows_without_a_completion_or_a_text(caplog):
    rows = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["c", None]})
    assert "1 of 2 rows of x cannot be used (1 with an empty completion)" in error(
        prompts, Data(path="x"), rows, None, 0
    )
    assert prompts(Data(path="x", invalid_rows="drop"), rows, None, 0)["gold"][:] == ["c"]
    rows = Dataset.from_dict({"text": ["the film was", None]})
    assert "1 with an empty text" in error(prompts, Data(path="x"), rows, word_tokenizer(), 0)
    found = prompts(Data(path="x", invalid_rows="drop", prompt_tokens=[2, 2]), rows, word_tokenizer(), 0)
    assert found["prompt"][:] == ["the film"]
    assert "holds 5" in error(prompts, Data(path="x"), Dataset.from_dict({"text": [5]}), word_tokenizer(), 0)


def test_a_margin_of_a_pair_reaches_the_loss():
    rows = Dataset.from_dict({"chosen": ["a", "b"], "rejected": ["c", "d"], "margin": [3, None]})
    assert pairs(Data(path="x"), rows, None, None, 0)["margin"][:] == [3.0, 0.0]
    wrong = rows.remove_columns("margin").add_column("margin", ["much", None])
    assert "the margin column of x holds 'much', which is no finite number" in error(
        pairs, Data(path="x"), wrong, None, None, 0
    )


@pytest.mark.parametrize("name", ["finished", "completion_ids", "trainer_state", "log_metric", "gold"])
def test_a_column_that_would_hide_something_from_reward_functions_is_refused(name):
    """Before, the user's own column was overwritten without a word."""
    rows = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], name: ["KEY"], "reference": ["KEY"]})
    assert f"data: x has a column {name}, the name of" in error(prompts, Data(path="x"), rows, None, 0)
    assert prompts(Data(path="x"), rows.remove_columns(name), None, 0)["reference"][:] == ["KEY"]


@pytest.mark.parametrize("columns", [{}, {"text": "chosen"}])
def test_pairs_without_a_prompt_are_no_prompts(columns):
    """Before, the advice was columns.text, with which a prompt was the beginning of "Human: is"."""
    both = {"chosen": ["Human: is it? Assistant: yes"], "rejected": ["Human: is it? Assistant: no"]}
    rows = Dataset.from_dict(both | {ours: both[theirs] for ours, theirs in columns.items()})
    found = error(prompts, Data(path="x", columns=columns), rows, word_tokenizer(), 0)
    assert "no prompt: it is their common beginning" in found and "data.transform" in found


REFUSES_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ m['content'] }}{% endfor %}"
)
KNOWS_USER = (
    "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "role", "expected"),
    [
        (
            REFUSES_SYSTEM,
            "system",
            "row 2 of x: the chat template of .* refuses the messages .system, .*: System role not",
        ),
        (
            KNOWS_USER,
            "system",
            "data: the chat template of .* leaves out the messages of the role system, as in row 2 of x",
        ),
        (
            KNOWS_USER,
            "human",
            "messages of the role human, which chat templates do not know: make it user with data.trans",
        ),
    ],
)
def test_messages_that_a_template_refuses_or_leaves_out(template, role, expected):
    tokenizer, user = word_tokenizer(chat_template=template), {"role": "user", "content": "the film"}
    other, answer = {"role": role, "content": "be kind"}, [{"role": "assistant", "content": "good"}]
    both = [[user], [other, user]]
    for make, rows in (
        (lambda rows: prompts(Data(path="x"), rows, tokenizer, 0), {"prompt": both}),
        (lambda rows: texts(Data(path="x"), rows, tokenizer), {"messages": [p + answer for p in both]}),
        (lambda rows: texts(Data(path="x"), rows, tokenizer), {"prompt": both, "completion": [answer] * 2}),
        (lambda rows: pairs(Data(path="x"), rows, tokenizer, None, 0),
         {"prompt": both, "chosen": [answer] * 2, "rejected": [[answer[0] | {"content": "bad"}]] * 2}),
    ):  # fmt: skip
        assert re.search(expected, error(make, Dataset.from_dict(rows)))
    assert len(prompts(Data(path="x"), Dataset.from_dict({"prompt": both[:1]}), tokenizer, 0)) == 1


def test_held_out_prompts_that_are_training_prompts_are_counted(caplog):
    train = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["1", "2"]})
    held_out = Dataset.from_dict({"prompt": ["a", "c"], "completion": ["3", "4"]})
    warn_of_known_prompts(Data(path="x"), train, held_out)
    assert "data: 1 of 2 held-out prompts are training prompts too" in caplog.text
    caplog.clear()
    warn_of_known_prompts(Data(path="x"), *[Dataset.from_dict({"text": ["it was good"]})] * 2)  # cut beginnings repeat
    assert not caplog.records
