import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from hasten.measure.comparison import Quality
from hasten.measure.report import RatioScale, render
from hasten.measure.statistics import Interval

VOID = {"meta", "link", "input", "line", "circle"}


class Page(HTMLParser):
    """Collects tags, links and text, and fails on tags that do not close."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_empty_store():
    html = render([])
    page = Page(html)
    assert "Nothing has been measured yet" in html
    assert "hasten bench" in html
    assert page.all("table") == []
    assert page.all("svg") == []


def test_every_comparison_has_a_row_and_a_point(another):
    found = [another(system="adamas"), another(system="hydragen", speedup=Interval(0.7, 0.6, 0.9, 6))]
    page = Page(render(found))
    rows = [a["id"] for a in page.all("tr") if "id" in a]
    assert rows == ["row-0", "row-1"]
    points = [a for a in page.all("a") if "aria-label" in a]
    assert [p["href"] for p in points] == ["#row-0", "#row-1"]
    assert "0.70x [0.60, 0.90]" in points[1]["aria-label"]
    assert all("badness 10 → 10.5" in p["aria-label"] for p in points)
    text = " ".join(page.text)
    assert "0.70x" in text
    assert "-5.00% worse" in text


def test_is_self_contained(measured):
    html = render([measured])
    page = Page(html)
    assert not re.search(r"https?://|@import|url\(", html)
    assert all("src" not in attributes for _, attributes in page.tags)


EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;{{ 7*7 }}"


def test_everything_is_escaped(another):
    record = another(
        system=EVIL,
        workload=EVIL,
        claim=EVIL,
        target=EVIL,
        model=EVIL,
        created=EVIL,
        commit=EVIL,
        unpublishable=(EVIL,),
        options={EVIL: EVIL},
        facts={"baseline": {EVIL: EVIL}, "candidate": {EVIL: [EVIL]}},
        quality=Quality(EVIL, 1.0, 2.0, "higher", EVIL),
        machine={
            "cpu": EVIL,
            "instruction_sets": [EVIL],
            "os": EVIL,
            "python": EVIL,
            "versions": {EVIL: EVIL},
        },
        plans={"baseline": {"label": EVIL, "dtype": EVIL}, "candidate": {"label": EVIL}},
    )
    html = render([record])
    page = Page(html)
    assert len(page.all("script")) == 2  # the page's own: data and behaviour
    assert page.all("img") == []
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert EVIL in "".join(page.text)
    data = re.search(r'id="records">(.*?)</script>', html, re.S).group(1)
    assert json.loads(data)[0]["system"] == EVIL


def test_quality_without_a_relative_change_is_in_the_table_but_not_drawn(another):
    html = render([another(quality=Quality("accuracy", 0.0, 0.5, "higher"))])
    page = Page(html)
    assert [a for a in page.all("a") if "aria-label" in a] == []
    assert "1 without a relative change of quality is not drawn" in html
    assert "accuracy" in html


def test_what_may_not_be_published_is_marked(another):
    html = render([another(unpublishable=("before the runs, cc1plus",))])
    assert "not publishable" in html
    assert 'class="doubtful"' in html


def test_many_rows_and_equal_points(another):
    page = Page(render([another(system=f"s{n}") for n in range(119)]))
    assert len([a for a in page.all("tr") if "id" in a]) == 119


@pytest.mark.parametrize(("low", "high"), [(0.9, 1.1), (0.01, 0.02), (1, 32), (0.2, 5000), (1, 1)])
def test_scale_holds_one_and_all_intervals(another, low, high):
    scale = RatioScale.of([another(speedup=Interval(low, low, high, 6))])
    for ratio in (low, high, 1.0):
        assert 0 <= scale.at(ratio) <= 1
    assert 1 in scale.ticks
    assert 2 <= len(scale.ticks) <= 8


@pytest.mark.parametrize("width", [390, 1280])
def test_page_does_not_scroll_sideways_in_a_browser(another, tmp_path, width):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Chromium")
    page = tmp_path / "report.html"
    measure = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth;</script>"
    html = render(
        [another(system="adamas", claim="up to 4.4x on self-attention " * 5), another(system="x" * 60)]
    )
    page.write_text(html.replace("</body>", measure + "</body>"))
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    done = subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    content, window = re.search(r"<title>(\d+) of (\d+)</title>", done.stdout).groups()
    assert int(content) <= int(window)
    assert 'type="button">System' in done.stdout  # the script ran
