"""The page in a real browser: nothing sticks out on a phone or a desk, dark is dark, and it prints.

What is measured is measured in the browser, by a script that only a copy of the page has: the page itself has none, and
forbids them.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offramp.policy import Policy
from offramp.report.report import findings_from_evidence, html_from_findings
from tests.report.browser import dumped_dom, find_chromium, print_to_pdf, screenshot
from tests.report.evidence import certificate, evidence, small_trace, with_retention

pytestmark = pytest.mark.skipif(
    find_chromium() is None,
    reason=(
        "no chromium here: not shown that the report fits a phone, follows dark mode and prints (apt-get "
        "install chromium)"
    ),
)
Image = pytest.importorskip("PIL.Image", reason="pillow comes with matplotlib")

PHONE, TABLET, DESKTOP = 390, 820, 1280
LONG = "a-very-long-name-without-a-single-space-that-cannot-be-broken-anywhere-but-must-be-somehow"
# What sticks out to the right of the page, unless it may be scrolled; the narrowest text of a figure; what was drawn.
MEASURE = """<script>
const page = document.documentElement, out = [];
for (const e of document.querySelectorAll('body *')) {
  if (e.closest('.scroll') || e.closest('title')) continue;
  const box = e.getBoundingClientRect();
  if (box.width && (box.right > page.clientWidth + 1 || box.left < -1)) {
    out.push(e.tagName + ' ' + e.textContent.slice(0, 40));
  }
}
const sizes = [...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height);
parent.document.body.textContent = JSON.stringify({
  client: page.clientWidth, scroll: page.scrollWidth, out: out, smallest: Math.min(...sizes),
});
</script>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small page with everything on it, and one of 12 exits and 20 classes with awkward names."""
    folder = tmp_path_factory.mktemp("pages")
    policy, trace = Policy.thresholds("max_prob", [0.7] * 3), with_retention(small_trace(uncut_ms=9.0))
    texts = tuple(f"{'a word or two ' * (row % 9)}{LONG}" for row in range(120))
    whole = evidence(trace, policy, certificate=certificate(trace, policy), texts=texts, labels=("no", "maybe", "yes"))
    wide = evidence(small_trace(200, 12, 20), labels=tuple(f"{LONG}-{c}" for c in range(20)), name=LONG)
    for name, made in {"whole": whole, "wide": wide}.items():
        (folder / f"{name}.html").write_bytes(html_from_findings(findings_from_evidence(made)))
    return {name: folder / f"{name}.html" for name in ("whole", "wide")}


def measured(page: Path, width: int) -> dict[str, Any]:
    """What MEASURE finds on a copy of the page that is allowed to run it, with all numbers unfolded."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    text = text.replace("<details>", "<details open>").replace("</body>", f"{MEASURE}</body>")
    copy = page.with_name(f"measured-{page.name}")
    # a window has at least 500 pixels, a frame any number
    frame = f'<iframe style="border: 0; width: {width}px; height: 900px" srcdoc="{html.escape(text)}"></iframe>'
    copy.write_text(f"<!doctype html><html><body>{frame}</body></html>")
    found = re.search(r"<body>(\{.*\})", dumped_dom(copy), re.DOTALL)
    assert found
    document: dict[str, Any] = json.loads(html.unescape(found[1]))
    return document


@pytest.mark.parametrize("name", ["whole", "wide"])
@pytest.mark.parametrize("width", [PHONE, TABLET, DESKTOP])
def test_nothing_sticks_out(pages: dict[str, Path], name: str, width: int) -> None:
    found = measured(pages[name], width)
    assert found["client"] == width
    assert found["out"] == []
    assert found["scroll"] <= found["client"]
    if name == "whole":
        assert found["smallest"] >= 9, "a figure's text is too small to read"


def pixels(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_light_and_dark(pages: dict[str, Path], width: int, tmp_path: Path) -> None:
    shown = {}
    for scheme in ("light", "dark"):
        screenshot(pages["whole"], tmp_path / f"{scheme}.png", (width, 2400), scheme)  # type: ignore[arg-type]
        shown[scheme] = pixels(tmp_path / f"{scheme}.png")
        assert shown[scheme].shape == (2400, width, 3)
        colours = shown[scheme].astype(np.int64) @ [65536, 256, 1]
        assert len(np.unique(colours)) > 100, "the picture is empty"
    light, dark = (np.median(shown[scheme].reshape(-1, 3), axis=0).mean() for scheme in ("light", "dark"))
    assert light > 225
    assert dark < 45
    # figures follow: hardly a pixel of the dark page is as bright as the light page's background
    assert (shown["dark"].min(axis=2) > 240).mean() < 0.01
    assert (shown["light"].max(axis=2) < 20).mean() < 0.01


def test_it_prints_on_paper(pages: dict[str, Path], tmp_path: Path) -> None:
    print_to_pdf(pages["whole"], tmp_path / "page.pdf")
    content = (tmp_path / "page.pdf").read_bytes()
    assert content.startswith(b"%PDF-")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 12


def test_the_page_itself_runs_no_script(pages: dict[str, Path], tmp_path: Path) -> None:
    """Were a script to get in, the page's own policy would stop it."""
    text = pages["whole"].read_text().replace("</body>", "<script>document.body.textContent = 'it ran'</script></body>")
    (tmp_path / "page.html").write_text(text)
    dom = dumped_dom(tmp_path / "page.html")
    assert "It holds as long as" in dom
    assert "<body>it ran" not in dom
