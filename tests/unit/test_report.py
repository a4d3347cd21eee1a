"""The comparison's page: whole, closed to the outside, harmless whatever a title says, and true to the report."""

from __future__ import annotations

import base64
import copy
import hashlib
import html
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from comparison_parts import World, six_runs
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError
from report_sample import NASTY, sample_report

from tasks.report import page, plots
from tasks.titles.comparison_report import report as report_of

VOID = {"meta", "input", "br", "hr", "img", "link"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CSS = (Path(page.__file__).parent / "page.css").read_text(encoding="utf-8")


class Walk(HTMLParser):
    """What a page is made of; a tag that closes what is not open fails at once."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute stands twice in {tag}: {attrs}"
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()} closes another tag"

    def handle_data(self, data: str) -> None:
        for tag in dict.fromkeys(self.open):
            self.texts[tag][-1] += data

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for _, attrs in self.tags if attribute in attrs]


@pytest.fixture(scope="module")
def rendered() -> str:
    return page.render(sample_report())


@pytest.fixture(scope="module")
def walk(rendered: str) -> Walk:
    return Walk(rendered)


def words(text: str) -> str:
    """Return `text` with single spaces."""
    return " ".join(text.split())


def section(rendered: str, name: str) -> str:
    """Return the words of one section, without tags."""
    found = re.search(rf'<section aria-labelledby="{name}">.*?</section>', rendered, re.DOTALL)
    assert found
    return words(html.unescape(re.sub(r"<[^>]+>", " ", found[0])))


def changed(**values: Any) -> dict[str, Any]:
    return copy.deepcopy(sample_report()) | values


def test_the_page_needs_nothing_from_outside(walk: Walk, rendered: str) -> None:
    ids = walk.values("id")
    assert len(ids) == len(set(ids))
    links = walk.values("href")
    assert links and {link.removeprefix("#") for link in links} <= set(ids)
    assert {name for name in walk.values("aria-labelledby")} <= set(ids)
    assert not walk.values("src") and not walk.values("style")
    assert not [name for _, attrs in walk.tags for name in attrs if name.startswith("on")]
    assert not {tag for tag, _ in walk.tags} & {"link", "iframe", "object", "embed", "img", "base"}
    assert not re.search(r"url\(|@import|https?:|innerHTML", CSS + walk.texts["script"][0])


def test_the_policy_allows_this_style_and_this_script_and_nothing_else(walk: Walk) -> None:
    policy = [attrs["content"] for tag, attrs in walk.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert len(policy) == len(walk.texts["script"]) == len(walk.texts["style"]) == 1
    hashes = {
        name: base64.b64encode(hashlib.sha256(walk.texts[name][0].encode()).digest()).decode()
        for name in ("style", "script")
    }
    assert policy[0] == (
        f"default-src 'none'; style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}'; "
        "base-uri 'none'; form-action 'none'"
    )


@pytest.mark.parametrize("title", [title for title in NASTY if title])
def test_a_nasty_title_is_text_and_nothing_more(walk: Walk, title: str) -> None:
    assert title.replace("\ud83d", "?") in walk.texts["bdi"]


def test_the_same_report_gives_the_same_page(rendered: str) -> None:
    assert page.render(sample_report()) == rendered
    assert rendered.encode("utf-8")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("results", "TRL best sampled · step 60, 50, 60 3.05 2.94 to 3.15"),
        ("results", "first sentence 1.92 1.81 to 2.02"),
        ("results", "600 0"),
        ("differences", "Reward: 4 of 5 differences are real"),
        ("differences", "ART best minus TRL best +0.09 -0.03 to +0.20 1.03 0.98 to 1.07 53%"),
        ("differences", "too close ART best against TRL best, reward: too close to tell."),
        ("curves", "base model: 2.21"),
        ("curves", "against device time"),
        ("time", "ART: 4.30 s a step"),
        ("guards", "▲ 17.0%"),
        ("runs", "trl-2 2 60 50 step 55 216 216 0.0072 2,880 14 58,200 2,711 1.87 0.72 0.97 0.04 dapo trl20f3c2b1a"),
        ("runs", "art-3 3 60 60 - 264 264 0.0088 2,880 21 59,400 -"),
        ("settings", "cispo : The clipped ratio, held constant"),
        ("settings", "0.003"),
        ("settings", "hn-titles compare --profile starter --seeds 1,2,3"),
        ("titles", "not judged: validator: ServiceUnavailable: no answer in 30 s"),
        ("alarms", "the held-out one does not (0.01 [-0.05, 0.08])."),
        ("warnings", "TRL best (sampled): 17% of its titles are all in capitals, 2% of the base model's."),
    ],
)
def test_the_figures_stand_where_they_belong(rendered: str, name: str, text: str) -> None:
    marked = rendered.replace(' class="box alarm"', "").replace(' class="box warning"', "")
    assert text in section(marked, name)


def test_every_conclusion_and_every_title_is_there(walk: Walk, rendered: str) -> None:
    report = sample_report()
    for sentence in [*report["conclusions"], *(row["sentence"] for row in report["differences"])]:
        assert html.escape(sentence).replace("&#x27;", "&#39;") in rendered
    shown = [attrs for _, attrs in walk.tags if attrs.get("class") == "title"]
    assert len(shown) == sum(len(story["titles"]) for story in report["stories"])
    assert {attrs["data-seed"] for attrs in shown if "data-seed" in attrs and "hidden" not in attrs} == {"1"}


def test_plots_say_in_words_what_they_show(walk: Walk) -> None:
    labels = [attrs["aria-label"] or "" for tag, attrs in walk.tags if tag == "svg" and attrs.get("role") == "img"]
    assert len(labels) == 4 + 6 + 1
    told = next(label for label in labels if label.startswith("Reward against wall clock."))
    assert "ART's validation reward goes from 2.2" in told and "seconds of wall clock. TRL's" in told
    assert "base model, best of 6: 3.02 on the test stories." in told
    assert any("ART 4.30" not in label and "write 2.24 s, judge 0.86 s" in label for label in labels)


def keys(value: Any) -> Any:
    """Return the keys of JSON values, of lists those of the first item: what a template relies on."""
    if isinstance(value, dict):
        return {key: keys(inner) for key, inner in value.items()}
    return [keys(value[0])] if isinstance(value, list) and value else None


def test_a_computed_report_has_a_page_and_the_shape_of_the_sample() -> None:
    sample = sample_report()
    computed = report_of(
        World(1, art=0.9, trl=0.9).comparison(six_runs()),
        **{key: sample[key] for key in ("device", "command", "created")},
        versions={engine: settings["version"] for engine, settings in sample["engines"].items()},
    )
    for part in ("engines", "runs", "methods", "guards", "stories", "titles_per_story"):
        assert keys(sample[part]) == keys(computed[part])
    assert sample.keys() == computed.keys()
    assert sample["differences"][0].keys() == computed["differences"][0].keys()
    text = Walk(page.render(computed)).texts
    assert words(text["h1"][0]) == "ART and TRL, one ruler"
    assert len(text["bdi"]) > len(computed["stories"])
    assert {words(item) for item in text["li"]} >= {words(sentence) for sentence in computed["conclusions"]}


def test_without_a_price_no_plot_against_money() -> None:
    report = changed()
    for run in report["runs"]:
        run["cost"] = None
        for entry in run["curve"]:
            entry["cost"] = None
    text = page.render(report)
    assert "against money" not in text and "against device time" in text


def test_without_alarms_there_is_no_box() -> None:
    report = changed(alarms=[])
    for guard in report["guards"]:
        guard["warnings"] = []
    text = page.render(report)
    assert 'class="box alarm"' not in text and 'class="box warning"' not in text
    assert "No alarms, no warnings." in text and "▲" not in text


def test_a_figure_that_was_not_measured_is_a_dash_and_not_a_zero() -> None:
    report = changed()
    for method in report["methods"]:
        for figures in method["modes"].values():
            figures["heldout_score"] = None
    for difference in report["differences"]:
        if difference["measure"] == "heldout_score":
            difference |= {"difference": None, "real": False}
    text = page.render(report)
    assert "3.02 2.91 to 3.12 3.02 2.91 to 3.12 - 0.91" in section(text, "results")
    assert "Held-out: 0 of 5 differences are real" in text


def test_a_report_without_a_key_is_refused_by_name() -> None:
    report = changed()
    del report["runs"][0]["trajectories_dropped"]
    with pytest.raises(UndefinedError, match="trajectories_dropped"):
        page.render(report)


def test_the_mean_over_seeds_leaves_out_steps_that_a_seed_lacks() -> None:
    first: list[dict[str, Any]] = [{"step": step, "seconds": 1.0 * step, "reward": 2.0} for step in range(3)]
    second: list[dict[str, Any]] = [
        {"step": 0, "seconds": 0.0, "reward": 4.0},
        {"step": 1, "seconds": 3.0, "reward": None},
    ]
    assert plots.mean_points([first, second], "seconds", "reward") == [(0.0, 3.0)]
    second[1]["reward"] = 6.0
    assert plots.mean_points([first, second], "seconds", "reward") == [(0.0, 3.0), (2.0, 4.0)]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(3, 8))
def test_ticks_are_round_and_inside(low: float, width: float, most: int) -> None:
    found = plots.ticks(low, low + width, most)
    slack = 1e-6 * width
    assert 1 <= len(found) <= most + 1
    assert low - slack <= found[0] and found[-1] <= low + width + slack
    steps = {f"{after - before:.2e}" for before, after in itertools.pairwise(found)}
    assert all(step[0] in "125" for step in steps)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.002, "0.002"), (2.5, "2.5"), (1500, "1,500"), (20_000, "20k"), (1.2e6, "1.2M")]
)
def test_ticks_are_written_short(value: float, text: str) -> None:
    assert plots.compact(value) == text


def colours(scheme: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", scheme))


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", range(3), ids=["light", "dark", "print"])
@pytest.mark.parametrize("letters", ["text", "muted", "art", "trl", "good", "alarm", "alarm-back", "warning"])
def test_text_stands_out_from_what_is_behind_it(scheme: int, letters: str) -> None:
    found = [colours(block) for block in re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)]
    assert len(found) == 3
    for back in ("back", "panel", f"{letters}-back"):
        if letters.endswith("-back"):
            letters = "text"
        if back in found[scheme]:
            light, dark = sorted((luminance(found[scheme][letters]), luminance(found[scheme][back])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{letters} on {back}"


def dump(text: str, folder: Path) -> str:
    """Return the page as Chromium has it after its scripts ran."""
    assert CHROMIUM
    file = folder / "report.html"
    file.write_text(text, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}"]
    command = [CHROMIUM, *options, "--virtual-time-budget=3000", "--dump-dom", file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def shows_a_queue(story: dict[str, Any]) -> bool:
    """Whether the text that the probe looks for is shown for seed 2: in the story or a sampled title."""
    shown = [
        title["title"] or ""
        for title in story["titles"]
        if title["method"] not in page.FOLDED and title["seed"] in (None, 2) and title["mode"] != "greedy"
    ]
    return any("queue stopped" in text for text in (*shown, story["human_title"], story["excerpt"]))


PROBE = """
<script>
// Does what a reader would do, and tells the frame around the page what they would see.
const table = document.getElementById("titles-table");
const rows = [...table.tBodies[0].rows];
const head = (method) => table.querySelector(`thead [data-method=${method}]`);
const press = (method) => head(method).querySelector("button").click();
const rewards = (method) =>
  [...table.tBodies[0].rows].map((row) => row.querySelector(`[data-method=${method}]`).dataset.value);
const set = (name, value) => {
  const field = document.forms.controls.elements.namedItem(name);
  field.value = value;
  field.dispatchEvent(new Event("input", { bubbles: true }));
};
const count = () => document.getElementById("count").textContent;
const root = document.documentElement;
const seen = { title: document.title, window: innerWidth, room: root.clientWidth, width: root.scrollWidth };
press("art_best");
seen.descending = rewards("art_best");
seen.sort = head("art_best").ariaSort;
press("art_best");
seen.ascending = rewards("art_best");
press("base");
seen.base = rewards("base");
set("seed", "2");
seen.other_seed = rewards("art_best");
seen.seeds = [...new Set([...table.querySelectorAll(".title:not([hidden])")].map((title) => title.dataset.seed))];
set("text", "QUEUE STOPPED");
seen.text = count();
set("text", "");
set("method", "base");
set("verdict", "unjudged");
seen.unjudged = count();
set("verdict", "");
seen.all = count();
const result = parent.document.createElement("output");
result.textContent = JSON.stringify(seen);
parent.document.body.append(result);
</script>
</body>"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_in_a_browser_the_policy_lets_the_script_run_and_no_title_does(rendered: str, tmp_path: Path) -> None:
    dom = dump(rendered, tmp_path)
    assert "<title>ART and TRL, one ruler: starter</title>" in dom
    assert 'aria-sort="none"' in dom and 'id="controls" hidden' not in dom


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_in_a_browser_titles_sort_and_filter_and_nothing_is_too_wide(rendered: str, tmp_path: Path) -> None:
    # Without the policy, so that the probe may run: what keeps titles from running here is their escaping alone.
    without_policy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", rendered)
    phone = html.escape(without_policy.replace("</body>", PROBE))
    dom = dump(f'<meta charset="utf-8"><body><iframe width="360" height="800" srcdoc="{phone}"></iframe>', tmp_path)
    found = re.search(r"<output>(.*?)</output></body>", dom, re.DOTALL)
    assert found, dom[-2000:]
    seen = json.loads(found[1])
    assert seen["title"] == "ART and TRL, one ruler: starter"
    assert seen["window"] == 360 and seen["width"] <= seen["room"]
    descending = [float(value) for value in seen["descending"]]
    assert seen["sort"] == "descending" and descending == sorted(descending, reverse=True)
    assert [float(value) for value in seen["ascending"]] == sorted(descending)
    # One story's titles were never judged: it has no figure, and stands last.
    assert seen["base"][-1] == "" and "" not in seen["base"][:-1]
    assert seen["seeds"] == [None, "2"] and set(seen["other_seed"]).isdisjoint(seen["ascending"])
    assert seen["text"] == f"{sum(map(shows_a_queue, sample_report()['stories']))} of 14 stories" != seen["all"]
    assert (seen["unjudged"], seen["all"]) == ("1 of 14 stories", "14 of 14 stories")
