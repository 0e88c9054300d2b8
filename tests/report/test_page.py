"""The page: what is in it and what is not, that nothing gets out or in, and that any legal trace gives one."""

from __future__ import annotations

import functools
import hashlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from offramp.policy import Policy
from offramp.report.report import Evidence, findings_from_evidence, html_from_findings
from tests.policies import random_policies
from tests.report.evidence import certificate, evidence, small_trace, with_retention

NASTY = "<script>alert('1')</script> \x00\x1b[31m $x^2$ & \u202egnp.exe https://example.org/x.js ＜ 猫 ‮"


def page(made: Evidence | None = None) -> str:
    return html_from_findings(findings_from_evidence(made)).decode() if made else usual_page()


@functools.cache
def usual_page() -> str:
    return page(evidence())


class Elements(HTMLParser):
    """Every tag with its attributes; raises when tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def check_self_contained(text: str) -> None:
    """No script, no style sheet or picture from elsewhere, no handler, no id twice, no dead reference."""
    found = Elements(text)
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "form", "base", "foreignobject", "image"}
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in found.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "srcset", "data", "poster", "action")
            if name == "href":
                assert value is not None
                assert value.startswith("#")
                assert value[1:] in ids
            if name == "aria-labelledby":
                assert value in ids
            for reference in re.findall(r"url\((.*?)\)", value or ""):
                assert reference.startswith("#")
                assert reference[1:] in ids
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style


def figures(text: str) -> list[ElementTree.Element]:
    """Every SVG of the page, parsed as XML."""
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def section_ids(text: str) -> list[str]:
    return re.findall(r'<section [^>]*id="([\w-]+)"', text)


ALWAYS = ["certificate", "frontier", "leaving", "survivors", "waterfall", "risk-path", "reliability", "agreement"]
ALWAYS += ["confusion", "overthinking"]


def test_every_section_with_reading_caption_and_numbers() -> None:
    text = page(evidence(with_retention(small_trace(uncut_ms=9.0))))
    assert section_ids(text) == [*ALWAYS, "retention", "examples", "provenance"]
    for key in [*ALWAYS[1:], "retention"]:
        section = text[text.index(f'id="{key}"') :].partition("</section>")[0]
        assert len(re.findall(r'<p class="reading">[^<]{20,}</p>', section)) == 1
        assert len(re.findall(r'<p class="caption">[^<]*\d[^<]* rows[^<]*</p>', section)) == 1
        assert "<svg" in section
        assert "<details>" in section
        assert section.count("<tr") >= 3
    check_self_contained(text)


def test_figures_are_xml_with_a_title_and_the_colours_of_the_page() -> None:
    found = figures(page(evidence(with_retention(small_trace()))))
    assert len(found) == 10 + 3  # one reliability diagram per exit
    for svg in found:
        title = svg.find("title")
        assert title is not None
        assert title.text
        assert svg.get("role") == "img"
        assert svg.get("aria-labelledby") == title.get("id")
        text = ElementTree.tostring(svg, encoding="unicode")
        assert "#0" not in re.sub(r'(?:href="|url\()#', "", text), "a sentinel colour was left"
        assert "var(--" in text
        assert "font-family" not in text
        assert "<style" not in text


def test_without_labels_sections_say_what_adds_them() -> None:
    text = page(evidence(small_trace(labelled=False)))
    assert section_ids(text) == [*ALWAYS, "examples", "provenance"]
    for key in ("reliability", "overthinking"):
        section = text[text.index(f'id="{key}"') :].partition("</section>")[0]
        assert "no labels" in section
        assert "<code>offramp trace my/bundle --data" in section
        assert "<svg" not in section
    assert "same answer as full depth, %" in text
    assert "accuracy, %" not in text


def test_certificate_is_there_or_is_said_not_to_be() -> None:
    policy = Policy.thresholds("max_prob", [0.7] * 3)
    trace = small_trace()
    signed = page(evidence(trace, policy, certificate=certificate(trace, policy)))
    assert "It holds as long as" in signed
    assert "It does not say" in signed
    assert 'class="sign"' in signed
    assert "no certificate" not in signed.lower()
    for text in (page(), page(evidence(trace, policy, certificate=certificate(trace, policy, precision="int8")))):
        assert "<h2>No certificate" in text
        assert "It holds as long as" not in text
        assert 'class="sign"' not in text
        assert "offramp calibrate my/bundle --max-risk" in text


def test_what_is_missing_is_named_with_its_command() -> None:
    todo = page().partition("What would make this report more complete")[2]
    assert re.findall(r"<code>(offramp \w+)", todo) == [
        "offramp trace",
        "offramp place",
        "offramp bench",
        "offramp report",
    ]


def test_texts_stay_out_unless_asked_for_and_come_in_escaped() -> None:
    texts = (NASTY,) * 120
    without = page(evidence(labels=("a", "b", "c")))
    assert "Texts are left out" in without
    text = page(evidence(labels=("a", NASTY, "$c$"), texts=texts, name=NASTY))
    check_self_contained(text)
    assert "&lt;script&gt;alert(" in text
    assert "alert(&#39;1&#39;)" in text
    assert not set(text) & set("\x00\x1b\u202e")
    assert len(figures(text)) == 9 + 3
    assert "Texts are left out" not in text


def test_bytes_are_the_same_every_time() -> None:
    assert page(evidence()) == page()
    code = "from tests.report.test_page import *; print(hashlib.sha256(page().encode()).hexdigest())"
    elsewhere = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert elsewhere.strip() == hashlib.sha256(page().encode()).hexdigest()


def test_size_does_not_grow_with_rows() -> None:
    few, many = (len(page(evidence(small_trace(num_rows=num_rows)))) for num_rows in (500, 20_000))
    assert abs(many - few) < 0.1 * few


@st.composite
def legal_evidence(draw: st.DrawFn) -> Evidence:
    """Any legal trace: few rows, exits and classes of any number, a class that never comes, with labels or without."""
    num_exits, num_classes = draw(st.integers(2, 12)), draw(st.integers(2, 22))
    num_rows = draw(st.sampled_from([1, 2, 40]))
    trace = small_trace(num_rows, num_exits, num_classes, draw(st.integers(0, 9)), labelled=draw(st.booleans()))
    if draw(st.booleans()):
        trace = with_retention(trace)
    if draw(st.booleans()):
        trace.labels[trace.labels == 0] = 1
        trace.logits[:, :, 0] = -20
    if draw(st.booleans()):
        trace.predictions[:] = trace.predictions[:, :1]  # every exit says the same
    labels = draw(st.just(()) | st.lists(st.text(max_size=30), min_size=num_classes, max_size=num_classes).map(tuple))
    texts = draw(st.just(()) | st.lists(st.text(max_size=40), min_size=num_rows, max_size=num_rows).map(tuple))
    return evidence(trace, draw(random_policies(num_exits)), labels=labels, texts=texts)


# A page takes a second or two: few examples, and no shrinking, which would take minutes.
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow], phases=[Phase.generate])
@given(legal_evidence())
def test_any_legal_trace_gives_a_page(made: Evidence) -> None:
    text = page(made)
    check_self_contained(text)
    assert section_ids(text)[: len(ALWAYS)] == ALWAYS
    assert all(np.isfinite(float(number)) for svg in figures(text) for number in (svg.get("viewBox") or "").split())
    if not made.manifest.labels and not made.texts:
        assert not re.findall(r"\b(?:nan|inf|None)\b", text[text.index("<main") :])


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_its_packages_the_error_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    from offramp.errors import BackendError

    with pytest.raises(BackendError, match=r"pip install 'offramp\[report\]'"):
        page(evidence())
