"""The page, the pictures and the markdown of a comparison are complete, small enough, and safe against texts of models."""

import base64
import copy
import gzip
import json
import re
from html.parser import HTMLParser
from random import Random

import pytest
from matplotlib import image

from rlhf_recipes.pages.html import POINTS, _thin, write_page
from rlhf_recipes.pages.markdown import write_markdown
from rlhf_recipes.pages.plots import draw_comparison, slots
from rlhf_recipes.pages.rows import audit_rows, clean, finding_rows, number, signed, spread, view_rows
from support.report_fixture import CASES, make_comparison, poison, unequal


def page_of(comparison, folder):
    write_page(folder / "report.html", comparison)
    return (folder / "report.html").read_text(encoding="utf-8")


def unpacked(page, name):
    packed = re.search(rf'id="{name}">([^<]*)<', page)[1]
    return gzip.decompress(base64.b64decode(packed)).decode()


class Elements(HTMLParser):
    """The tags of a page with their attributes, in order."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


@pytest.mark.parametrize("case", CASES)
def test_every_comparison_becomes_page_and_markdown(case, tmp_path):
    comparison = CASES[case]()
    before = copy.deepcopy(comparison)
    page = page_of(comparison, tmp_path)
    write_markdown(comparison, tmp_path / "report.md")
    assert comparison == before
    assert clean(comparison["verdict"]["label"])[:10] in page
    assert comparison["verdict"]["label"][:10] in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_comparison_becomes_pictures(case, tmp_path):
    comparison = CASES[case]()
    draw_comparison(comparison, tmp_path)
    wanted = {"curves.png", "frontier.png"} | ({"lengths.png"} if comparison["evaluation"] else set())
    assert {file.name for file in tmp_path.glob("*.png")} == wanted


def test_strangers_text_adds_no_element(tmp_path):
    """Markup in names and texts adds no tag and no attribute to the page: all of it becomes text."""

    def tags(comparison):
        return [(tag, sorted(attributes)) for tag, attributes in Elements(page_of(comparison, tmp_path)).found]

    assert tags(poison(make_comparison())) == tags(make_comparison())


def test_the_page_names_its_scripts_and_asks_for_nothing(tmp_path):
    page = page_of(make_comparison(), tmp_path)
    found = Elements(page).found
    assert not [tag for tag, attributes in found if attributes.keys() & {"src", "action", "onclick", "onerror"}]
    assert all(attributes["href"].startswith("#") for _, attributes in found if "href" in attributes)
    policy = next(attributes["content"] for _, attributes in found if "Content-Security-Policy" in attributes.values())
    assert "default-src 'none'" in policy and policy.count("'sha256-") == 2 and "unsafe-eval" not in policy
    assert "unsafe-inline" not in policy.split("style-src")[0]


def test_samples_travel_whole(tmp_path):
    long = "日本 👍🏽 \u05e9\u05dc\u05d5\u05dd </script> " * 2500
    comparison = make_comparison(prompts=2)
    found = comparison["samples"][0]["models"]["sft"]
    found["completion"] = [{"role": "assistant", "content": long}]
    comparison["samples"][1]["prompt"] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "why?"},
    ]
    data = json.loads(unpacked(page_of(comparison, tmp_path), "data"))
    assert data["samples"][0]["models"]["sft"]["completion"] == long and len(long) > 50_000
    assert data["samples"][1]["prompt"] == "system: be brief\n\nuser: why?"
    assert data["samples"][0]["models"]["ppo-seed_42"]["algorithm"] == "ppo"


@pytest.mark.slow
def test_eight_long_runs_fit_into_five_megabytes(tmp_path):
    comparison = make_comparison(seeds=(1, 2, 3, 4), steps=2000, prompts=500, words=40, metrics=30)
    page = page_of(comparison, tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
    data = json.loads(unpacked(page, "data"))
    assert len(data["runs"]) == 8 and len(data["samples"]) == 500 and len(data["samples"][0]["models"]) == 9
    assert "Of 2,000 points a run" in page and "too large" not in page


@pytest.mark.slow
def test_samples_that_make_the_page_too_large_are_left_out_and_it_says_so(tmp_path):
    random = Random(0)
    comparison = make_comparison(prompts=200)
    for line in comparison["samples"]:
        for found in line["models"].values():
            found["completion"] = random.randbytes(4000).hex()
    page = page_of(comparison, tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
    shown = json.loads(unpacked(page, "data"))["samples"]
    assert 20 < len(shown) < 200 and f"The first {len(shown)} of 200 prompts" in page
    assert shown[0]["models"]["sft"]["completion"] == comparison["samples"][0]["models"]["sft"]["completion"]


def test_thinning_keeps_every_peak():
    values = [0.0] * 5000
    values[1234], values[4321] = 9.0, -9.0
    curves = _thin({"step": list(range(5000)), "kl": values, "gaps": [None] * 5000})
    assert max(curves["kl"]) == 9.0 and min(curves["kl"]) == -9.0
    assert {len(column) for column in curves.values()} == {POINTS}
    assert curves["step"][0] == 0 and curves["step"][-1] == 4999 and curves["step"] == sorted(curves["step"])
    place = curves["step"][curves["kl"].index(9.0)]
    assert abs(place - 1234) <= 10
    few = {"step": [1, 2], "kl": [None, 1.0]}
    assert _thin(few) is few


def test_what_no_reader_sees_is_spelled_out():
    assert clean("a\u202eb\x00\ud800\r\nc\td\u200d") == "a⟨U+202E⟩b⟨U+0000⟩⟨U+D800⟩\nc\td\u200d"
    assert clean({"a": [float("nan"), float("-inf"), 1.5]}) == {"a": [None, None, 1.5]}


def test_numbers_read_alike():
    assert [number(value) for value in (None, 0.12345, 40_000.0, 1e-5, 3)] == ["–", "0.123", "40,000", "1e-05", "3"]
    assert [signed(value) for value in (None, 0.05, -0.05, -12.34, 4321.0)] == [
        "–",
        "+0.050",
        "−0.050",
        "−12.3",
        "+4,321",
    ]
    assert [number(value, "{:.2f}") for value in (-0.06, -0.001, -0.0, 1e30)] == ["−0.06", "0.00", "0.00", "1e+30"]
    assert number(-1e-5) == "−1e-05" and number(-0.0) == "0" and number(-0.001, "{:.0%}") == "0%"
    assert [signed(value) for value in (0.0004, -0.00816, 0.0, -1e300)] == ["+0.0004", "−0.0082", "+0.000", "−1e+300"]
    assert spread({"mean": 1.0, "low": None, "high": None}) == ("1", "")
    assert spread({"mean": 1.0, "low": 0.5, "high": 1.5}) == ("1", "0.5 to 1.5") and spread(None) == ("–", "")
    rows = view_rows(make_comparison())
    assert [row["heading"] for row in rows][1:] == ["score at equal episodes (3,840)", "score at equal time (54 s)"]
    assert rows[0]["range"] == "+0.020 to +0.080"


def test_the_interval_stands_where_its_numbers_are(tmp_path):
    """The largest end is 0.08, so that the track ends at 0.088: 0.05 lies at 50 + 50 * 0.05 / 0.088 percent."""
    page = page_of(make_comparison(), tmp_path)
    assert 'style="left:78.41%"' in page and 'style="left:61.36%;width:34.09%"' in page


def test_markdown_tables_hold_together(tmp_path):
    """All rows of a table have the same number of cells, for any names."""
    named = make_comparison()
    named["notes"] = ["costs $1$ and ~~more~~"]
    write_markdown(named, tmp_path / "report.md")
    assert "\n- costs \\$1\\$ and \\~\\~more\\~\\~\n" in (tmp_path / "report.md").read_text(encoding="utf-8")
    for comparison in (make_comparison(), poison(make_comparison()), unequal()):
        write_markdown(comparison, tmp_path / "report.md")
        text = (tmp_path / "report.md").read_text(encoding="utf-8")
        tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
        assert len(tables) >= 4 and "<script" not in text
        for table in tables:
            assert re.fullmatch(r"\|(-+:?\|)+", table[1])
            assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table}) == 1, table
    assert "| data.path | data, **not comparable** | a.csv (ppo seed 42); b.csv (rloo seed 42) |" in text
    write_markdown(make_comparison(), tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| score on held-out prompts | 0.640 | 0.590 | +0.050 | +0.020 to +0.080 |" in text
    assert all(f"]({name}.png)" in text for name in ("curves", "frontier", "lengths"))


def test_an_audit_of_many_runs_says_each_thing_once(tmp_path):
    comparison = make_comparison()
    audits = list(comparison["audit"].values())
    for found in audits[1:]:
        found |= {"signs": 0, "findings": ["nothing found"], "peak": None}
    audits[2]["peak"] = {"step": 60, "checkpoint": "final", "held_out": 0.3, "by": "checkpoints", "above_end": False}
    assert [(row["sign"], len(row["runs"])) for row in finding_rows(comparison)] == [(True, 1), (False, 5)]
    assert [row["signs"] for row in audit_rows(comparison)] == [1, 0, 0, 0, 0, 0]
    assert [row["peak"] for row in audit_rows(comparison)][:3] == [
        "about step 30 of the log (0.25), within noise of the end",
        "–",
        "at final (0.30)",
    ]
    assert page_of(comparison, tmp_path).count("nothing found") == 1
    write_markdown(comparison, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "nothing found" not in text and "| ppo seed 42 | 1 | about step 30 of the log (0.25)" in text
    assert text.count("- the trained score rose") == 1


def test_a_judge_s_disagreeing_orders_are_counted(tmp_path):
    """Inconsistent pairs count in the bar, beside pairs that are won, lost and tied."""
    comparison = make_comparison()
    judged = comparison["judge"][0]
    judged |= {"wins": 40, "losses": 20, "ties": 8, "inconsistent": 30, "unparsable": 2}
    judged |= {"length_controlled": dict.fromkeys(("win_rate", "interval", "slope", "extrapolated"))}
    judged |= {"held_out_agreement": {"with": "held_out", "share": 0.8, "pairs": 50, "interval": None}}
    judged["by_length"][0]["prompts"] = 12.5
    page = page_of(comparison, tmp_path)
    assert 'class="ppo" style="width:40.82%"' in page and 'class="ties" style="width:38.78%"' in page
    assert "ppo won 40, rloo won 20, neither 38" in page and "<td>12.5</td>" in page
    assert "the score of training on 70%" in page and "the held-out functions of eval on 80%" in page
    assert "At equal length" not in page
    write_markdown(comparison, tmp_path / "report.md")
    assert "| 40 | 8 | 30 | 20 | 2 | 100 |" in (tmp_path / "report.md").read_text(encoding="utf-8")
    comparison["judge"][0] |= {"win_rate": None, "interval": None, "agreement": None, "unparsable": 100}
    comparison["judge"][0] |= dict.fromkeys(("wins", "losses", "ties", "inconsistent"), 0) | {"by_length": []}
    assert "no answer" in page_of(comparison, tmp_path)


def test_models_of_no_algorithm_are_told_apart(tmp_path):
    comparison = make_comparison()
    evaluation = comparison["evaluation"]
    evaluation["models"]["base"] = evaluation["models"]["sft"]
    evaluation["length_histograms"]["counts"]["base"] = [1] * 19
    data = json.loads(unpacked(page_of(comparison, tmp_path), "data"))
    assert [data["slots"][name] for name in ("ppo", "ppo-seed_42", "sft", "base")] == ["ppo", "ppo", "sft", "other-0"]


def test_what_voids_a_comparison_stands_out(tmp_path):
    found = Elements(page_of(unequal(), tmp_path)).found
    assert [attributes for tag, attributes in found if tag == "tr" and attributes] == [{"class": "refuses"}]


def test_the_label_is_said_once(tmp_path):
    comparison = make_comparison()
    comparison["verdict"] = {"winner": None, "label": "inconclusive", "sentence": "inconclusive: it holds 0."}
    assert page_of(comparison, tmp_path).count("inconclusive: ") == 0


def test_pictures_show_something(tmp_path):
    draw_comparison(make_comparison(), tmp_path)
    for name in ("curves", "frontier", "lengths"):
        pixels = image.imread(tmp_path / f"{name}.png")[..., :3]
        assert 0.01 < (pixels.min(axis=-1) < 0.8).mean() < 0.6, name


def test_every_algorithm_has_a_look_of_its_own():
    assert slots(["ppo", "rloo", "grpo", "dpo"]) == {"ppo": "ppo", "rloo": "rloo", "grpo": "other-0", "dpo": "other-1"}
