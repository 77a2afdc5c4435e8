"""The page in a real browser: it draws, obeys its controls, fits every screen, and runs nothing that a model wrote."""

import io
import itertools
import os
import re
import shutil

import pytest
from matplotlib import image

from rlhf_recipes.pages.html import write_page
from support.report_fixture import CASES, make_comparison, nothing_known, poison

CHROMIUM = next(
    filter(None, map(shutil.which, (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome"))),
    None,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install one, or name it in the variable CHROMIUM"),
]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Where a usual comparison's page is."""
    file = tmp_path_factory.mktemp("report") / "report.html"
    write_page(file, make_comparison())
    return file


@pytest.fixture
def opened(browser):
    """Opens a page and, when the test is over, fails if it complained, asked for something, or opened a dialog."""
    contexts, complaints, requests = [], [], []

    def open_page(file, width=1280, script=True, **settings):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, java_script_enabled=script, reduced_motion="reduce", **settings
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: request.url == file.as_uri() or requests.append(request.url))
        page.goto(file.as_uri())
        if script:
            page.wait_for_selector("html[data-ready]", timeout=60_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == [] and requests == []


def traces(page, plot="plot-curves"):
    """Named lines of a plot: name, x and y."""
    return page.evaluate(
        "id => document.getElementById(id).data.filter(t => t.meta).map(t => [t.meta, t.x, t.y])", plot
    )


def prompts(page):
    return page.locator("#sample-list .prompt").all_text_contents()


def scores(page):
    """Mean score of each shown sample's shown completions."""
    return page.evaluate(
        """() => [...document.querySelectorAll('.sample')].map(sample => {
            const found = [...sample.querySelectorAll('small')].map(s => s.textContent.match(/score\\s(−?[\\d.]+)/)?.[1]);
            const known = found.filter(Boolean).map(text => Number(text.replace('−', '-')));
            return known.reduce((sum, one) => sum + one, 0) / known.length;
        })"""
    )


def test_every_plot_is_drawn(opened, report):
    page = opened(report)
    names = [name for name, _, _ in traces(page)]
    assert len(names) == 8 and names[-2:] == ["ppo, mean of 3", "rloo, mean of 3"]
    # Six runs, and for each algorithm two edges of its band and its mean.
    for plot in ("plot-curves", "plot-kl", "plot-entropy", "plot-length_mean"):
        assert page.locator(f"#{plot} .scatterlayer .trace").count() == 12
    assert page.locator("#plot-curves path.js-fill").count() == 2
    assert [name for name, _, _ in traces(page, "plot-lengths")] == ["sft", "ppo", "rloo"]
    assert len(traces(page, "plot-frontier")) == 12 and len(traces(page, "plot-audit-held_out")) == 6
    assert "ppo, mean" not in page.locator("#plot-curves").get_attribute("aria-label")
    assert "score (mean of a rollout) over episodes: ppo ends at" in page.locator("#plot-curves").get_attribute(
        "aria-label"
    )


def test_controls_change_what_is_drawn(opened, report):
    page = opened(report)
    before = traces(page)
    page.get_by_text("tokens", exact=True).first.click()
    over_tokens = traces(page)
    assert [x[-1] for _, x, _ in before] == [3840] * 8 and [x[-1] for _, x, _ in over_tokens] == [42_000] * 8
    page.locator("[name=metric]").select_option("kl")
    assert traces(page)[-1][2][-1] > 4 > over_tokens[-1][2][-1]
    page.locator("[name=metric]").select_option("value_loss")  # no band, and only PPO has it
    assert {name for name, _, _ in traces(page)} >= {"ppo seed 42"} and "mean" not in traces(page)[0][0]
    page.locator("[name=metric]").select_option("score_mean")
    page.locator("[name=show]").select_option("seed 43")
    assert [name for name, _, _ in traces(page)] == ["ppo seed 43", "rloo seed 43"]
    page.locator("[name=smoothing]").select_option("0")
    raw = make_comparison()["runs"][1]["curves"]["score_mean"]
    assert traces(page)[0][2] == pytest.approx(raw, rel=1e-4)
    page.get_by_label("rloo seed 43", exact=True).first.uncheck()
    assert [name for name, _, _ in traces(page)] == ["ppo seed 43"]
    page.locator("details[data-of=plot-curves] summary").click()
    assert page.locator("details[data-of=plot-curves] tbody tr").first.text_content().startswith("ppo seed 43")


def test_samples_are_searched_filtered_sorted_and_turned(opened, report):
    page = opened(report)
    assert len(prompts(page)) == 10 and page.locator("#found").text_content() == "24 of 24 prompts, page 1 of 3"
    first = prompts(page)
    page.get_by_role("button", name="Next").first.click()
    assert len(prompts(page)) == 10 and prompts(page) != first
    page.locator("[name=sort]").select_option("score-down")
    assert scores(page) == sorted(scores(page), reverse=True) and "page 1" in page.locator("#found").text_content()
    page.locator("[name=sort]").select_option("score-up")
    assert scores(page) == sorted(scores(page))
    page.locator("[name=sort]").select_option("")
    page.locator("[name=model]").select_option("ppo-seed_42")
    page.locator("[name=low]").fill("0.5")
    wanted = [s["prompt"] for s in make_comparison()["samples"] if s["models"]["ppo-seed_42"]["score"] >= 0.5]
    assert prompts(page) == wanted[:10] and wanted
    page.locator("[name=finished]").select_option("false")
    assert len(prompts(page)) < len(wanted)
    page.locator("[name=finished]").select_option("")
    page.locator("[name=low]").fill("")
    page.locator("[name=query]").fill("AWFUL")
    marks = page.locator("#sample-list mark").all_text_contents()
    assert marks and {mark.lower() for mark in marks} == {"awful"}
    page.locator("[name=query]").fill("no such words")
    assert prompts(page) == [] and page.locator("#found").text_content().startswith("0 of 24")
    page.locator("[name=query]").fill("(.*")  # text, not a pattern
    assert prompts(page) == []


def test_nothing_that_a_stranger_wrote_runs(opened, tmp_path):
    comparison = poison(make_comparison())
    comparison["samples"][0]["models"] = {
        name: found | {"completion": '<a href="javascript:window.hacked=1">javascript:window.hacked=1</a>'}
        for name, found in comparison["samples"][0]["models"].items()
    }
    write_page(tmp_path / "report.html", comparison)
    page = opened(tmp_path / "report.html")
    page.locator("[name=query]").fill("<script>")
    page.locator("[name=show]").select_option("runs")
    page.evaluate("Plotly.Fx.hover('plot-curves', [{curveNumber: 0, pointNumber: 3}])")
    hover = page.locator("#plot-curves .hoverlayer")
    assert "ppo seed 42</script>" in hover.text_content() and hover.locator("a").count() == 0
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("window.hacked") is None
    assert page.locator("script").count() == 4 and page.locator("img, iframe, object, main a").count() == 0
    assert "<img" in page.locator("#sample-list mark ~ *, #sample-list").first.text_content()
    assert page.locator("svg a").count() == 0


NAMES = ("constructor", "__proto__", "toString", "<a href='https://a.example'>b</a>")
"""What every JavaScript object has, and what Plotly would take for a link."""


def test_names_are_only_names(opened, tmp_path):
    comparison = make_comparison()
    evaluation, samples = comparison["evaluation"], comparison["samples"]
    for name in NAMES:
        for i, run in enumerate(comparison["runs"]):
            run["curves"] |= {name: [1e-6 * (i + 1)] * 60} if i else {}  # one run does not have it
        evaluation["models"][name] = evaluation["models"]["sft"]
        evaluation["length_histograms"]["counts"][name] = [1] * 19
        samples[0]["models"][name] = samples[0]["models"]["sft"]
    write_page(tmp_path / "report.html", comparison)
    page = opened(tmp_path / "report.html")
    assert {name for name, _, _ in traces(page, "plot-lengths")} == {"sft", "ppo", "rloo", *NAMES}
    assert set(page.locator(".sample").first.locator("h3").all_text_contents()) >= set(NAMES)
    for name in NAMES:
        page.locator("[name=metric]").select_option(name)
        assert len(traces(page)) == 5 and page.locator("svg a").count() == 0
        label = page.locator("#plot-curves").get_attribute("aria-label")
        assert label.startswith(f"{name} over episodes: ppo seed 43 ends at 2.00e-6")
        assert page.locator("#plot-curves .g-ytitle").text_content() == name
        assert "μ" not in "".join(page.locator("#plot-curves .ytick").all_text_contents())


def test_were_it_markup_the_policy_would_not_run_it(browser, report):
    page = browser.new_page()
    page.goto(report.as_uri())
    for attack in ("<img src=x onerror='window.hacked=1'>", "<button id=attack onclick='window.hacked=1'>t</button>"):
        page.evaluate("html => document.body.insertAdjacentHTML('beforeend', html)", attack)
    page.evaluate("document.getElementById('attack').click()")
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.hacked=1'}))")
    assert page.evaluate("window.hacked") is None
    page.close()


@pytest.mark.parametrize("case", CASES)
def test_every_comparison_fits_a_phone(case, opened, tmp_path):
    comparison = CASES[case]()
    comparison["title"] = "averyveryverylongwordwithoutanyblankinit" * 4
    for sample in comparison["samples"]:
        sample["prompt"] += " " + "x" * 300
    for difference in comparison["differences"]:
        difference["key"] += ".and_more" * 30
    write_page(tmp_path / "report.html", comparison)
    page = opened(tmp_path / "report.html", width=800)
    for width in (800, 360, 320):
        page.set_viewport_size({"width": width, "height": 900})
        # Closed details have no width: open, they must fit as well.
        page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
        wide = page.evaluate(
            """() => [...document.querySelectorAll('body *')].filter(e => !e.closest('.wide table, nav, .plot, .skip'))
                .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 100))"""
        )
        assert wide == [] and page.evaluate("document.documentElement.scrollWidth") <= width


def test_long_and_odd_texts(opened, tmp_path):
    comparison = nothing_known(make_comparison(prompts=2))
    needle = "needle in the middle"
    models = comparison["samples"][0]["models"]
    models["sft"]["completion"] = "👍🏽" * 20_000 + needle + "x" * 20_000
    models["ppo-seed_42"]["completion"] = "שלום עולם"
    models["rloo-seed_42"]["completion"] = "left \u202e right"
    write_page(tmp_path / "report.html", comparison)
    page = opened(tmp_path / "report.html")
    card = page.locator(".completion").first
    assert len(card.text_content()) < 2000 and "Show all 100,020 characters" in card.text_content()
    page.locator("[name=query]").fill(needle)
    assert page.locator(".completion mark").text_content() == needle
    card.get_by_role("button").click()
    assert card.locator("p").text_content() == models["sft"]["completion"]
    page.locator("[name=query]").fill("")
    assert page.evaluate("getComputedStyle(document.querySelectorAll('.completion p')[1]).direction") == "rtl"
    assert "left ⟨U+202E⟩ right" in page.locator("#sample-list").text_content()


def test_by_keyboard_alone(opened, report):
    page = opened(report)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    reached = []
    for _ in range(80):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => { const e = document.activeElement;
                const seen = e.type === 'radio' ? e.nextElementSibling : e;
                return [e.id || e.name || e.textContent.trim(), getComputedStyle(seen).outlineStyle]; }"""
        )
        assert outline != "none", name
        reached.append(name)
        if name == "theme":
            page.keyboard.press("Enter")
            assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        if name == "axis":
            page.keyboard.press("ArrowRight")
            assert traces(page)[0][1][-1] == 42_000
        if name == "run" and reached.count("run") == 1:
            page.keyboard.press("Space")
            assert len(traces(page)) == 7
        if name == "Numbers as a table" and reached.count(name) == 1:
            page.keyboard.press("Enter")
            page.locator("details[data-of=plot-curves] tbody tr").nth(10).wait_for()
        if name == "query":
            page.keyboard.type("awful")
            assert page.locator("mark").count() > 0
        if name == "Next":
            break
    assert {"theme", "axis", "metric", "show", "smoothing", "run", "query", "model", "sort", "shown", "Next"} <= set(
        reached
    )


def contrast(page, selector):
    """WCAG's contrast ratio of a text and the page behind it."""
    colours = page.evaluate(
        "s => [getComputedStyle(document.querySelector(s)).color, getComputedStyle(document.body).backgroundColor]",
        selector,
    )

    def luminance(colour):
        parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


def test_light_and_dark(opened, report):
    backgrounds, inks = set(), set()
    for scheme in ("light", "dark"):
        page = opened(report, color_scheme=scheme)
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        inks.add(page.evaluate("document.querySelector('#plot-curves .xtick text').style.fill"))
        for selector in (".sentence", ".hint", "small", ".sides .ppo", ".sides .rloo", ".completion.sft h3", ".cut"):
            assert contrast(page, selector) >= 4.5, (scheme, selector)
    assert len(backgrounds) == len(inks) == 2
    page.get_by_role("button", name="Dark").click()  # shown dark, so that this turns on the light
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") in backgrounds
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"


def test_on_paper(opened, report):
    page = opened(report, width=700, color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    page.locator("details:not([open]):not(.plot-data)").first.wait_for(state="detached")
    shown = "selector => [...document.querySelectorAll(selector)].filter(e => e.checkVisibility()).length"
    for hidden in ("header", "form", "button", ".plot-data"):
        assert page.evaluate(shown, hidden) == 0, hidden
    assert page.evaluate(shown, "section") == 11 and page.evaluate(shown, ".sample") == 10
    assert page.evaluate("document.querySelectorAll('details:not([open]):not(.plot-data)').length") == 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
    width = page.evaluate("document.querySelector('#plot-curves .main-svg').getBoundingClientRect().width")
    assert width == page.evaluate("document.querySelector('main').clientWidth")
    page.emulate_media(media="screen")
    page.locator("details:not([open]):not(.plot-data)").first.wait_for()
    assert page.evaluate(shown, "form") == 2


def test_every_table_and_region_has_a_name(opened, report):
    page = opened(report)
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    page.locator("details[data-of=plot-audit-held_out] tbody tr").nth(10).wait_for()
    assert page.locator("th").filter(has_text=re.compile(r"^\s*$")).count() == 0
    names = page.evaluate("[...document.querySelectorAll('[role=region]')].map(region => region.ariaLabel)")
    names += page.locator("h2").all_text_contents()
    assert len(names) > 15 and len(names) == len(set(names))
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1]))")
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels))


def test_with_colours_forced_intervals_and_choices_show(opened, report):
    page = opened(report, forced_colors="active")
    background = "selector => getComputedStyle(document.querySelector(selector)).backgroundColor"
    behind = page.evaluate(background, "body")
    for selector in (".interval", ".dot", ".bar", ".stacked .ppo", ".segments input:checked + span"):
        assert page.evaluate(background, selector) != behind, selector


def test_an_old_browser_says_so(browser, report):
    page = browser.new_page()
    page.add_init_script("delete window.DecompressionStream")
    page.goto(report.as_uri())
    assert "this browser is too old" in page.locator("#failure").text_content()
    page.close()


def test_without_javascript_the_numbers_are_there(opened, report):
    page = opened(report, script=False)
    text = page.locator("body").inner_text()
    for wanted in ("PPO better", "+0.050", "need JavaScript", "distinct-1", "peak memory", "rloo.baseline"):
        assert wanted in text
    assert "Search" not in text and not page.locator("#plot-curves").is_visible()
    # No heading, and no link to one, stands over nothing.
    assert page.locator("h2:visible").all_text_contents() == [
        "Held-out prompts",
        "Cost",
        "Judge",
        "Reward hacking",
        "Settings",
        "Words",
    ]
    assert page.locator("nav a:visible").count() == 6


def test_a_picture_of_it(opened, report, tmp_path):
    page = opened(report, width=1000)
    page.screenshot(path=tmp_path / "report.png")
    pixels = image.imread(io.BytesIO((tmp_path / "report.png").read_bytes()))[..., :3]
    assert pixels.shape[:2] == (900, 1000) and 0.02 < (pixels.min(axis=-1) < 0.7).mean() < 0.5
