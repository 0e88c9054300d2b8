"""One matplotlib figure as SVG that lives in a page: its colours are the page's, its text is text, its ids are its own.

matplotlib writes fixed colours. Figures are drawn in sentinel colours, which become CSS variables here, so that the
same drawing follows light, dark and print. The bytes are the same every time.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from offramp.errors import BackendError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, RULE, CARD = "#010101", "#020202", "#030303", "#040404"
ACCENT, WARN, INFO, SOFT = "#050505", "#060606", "#070707", "#080808"
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    CARD: "card",
    ACCENT: "accent",
    WARN: "warn",
    INFO: "info",
    SOFT: "soft",
}
_MOST_ENLARGED = 1.38  # text of a figure next to the text of the page
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
# Control characters, overrides of the writing direction, halves of pairs, and what is no character at all.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be read out, searched and set in the page's own font
    "svg.hashsalt": "offramp",
    "text.parse_math": False,  # class names may hold a $
    "axes.unicode_minus": True,
    "font.size": 11,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 10.5,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "lines.solid_capstyle": "round",
}


def drawing(name: str, size: tuple[float, float], title: str, draw: Callable[[Figure], None]) -> str:
    """What `draw` puts on a figure of `size` (width and height in points), as markup for an HTML page.

    `name` is unique on the page; `title` says in words what is drawn. Raises BackendError without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise BackendError(f"drawing the report needs matplotlib: {exc}; run `pip install 'offramp[report]'`") from exc
    stream = io.StringIO()
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # only widths are taken from it
        figure = Figure((size[0] / 72, size[1] / 72), dpi=72, layout="constrained")
        draw(figure)
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(stream.getvalue(), name, title)


def printable(text: str) -> str:
    """`text` without what XML forbids and what reorders other text; each such character becomes U+FFFD."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def _inline(document: str, name: str, title: str) -> str:
    """matplotlib's document as an element for HTML: no namespaces, no styles of its own, no ids but those it needs."""
    root = ElementTree.fromstring(document)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key in [key for key in element.attrib if key.startswith("{")]:
            element.set(key.rpartition("}")[2], element.attrib.pop(key))
    for definitions in root.findall("defs"):
        for style in definitions.findall("style"):
            definitions.remove(style)  # it would hold for the whole page
    _rename_ids(root, name)
    for element in root.iter():
        _restyle(element)
    view = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update({"viewBox": view, "role": "img", "aria-labelledby": f"{name}-title", "class": "figure"})
    root.set("style", f"max-width: {_MOST_ENLARGED * float(view.split()[2]):.0f}px")
    heading = ElementTree.Element("title", {"id": f"{name}-title"})
    heading.text = printable(title)
    root.insert(0, heading)
    _drop_empty(root)
    return ElementTree.tostring(root, encoding="unicode")


def _rename_ids(root: ElementTree.Element, name: str) -> None:
    """Ids that something refers to become this figure's own, in order of appearance; the others go."""
    text = ElementTree.tostring(root, encoding="unicode")
    wanted = set(re.findall(r'(?:url\(#|href="#)([\w.-]+)', text))
    renamed: dict[str, str] = {}
    for element in root.iter():
        old = element.attrib.pop("id", "")
        if old in wanted:
            renamed.setdefault(old, f"{name}-{len(renamed)}")
            element.set("id", renamed[old])
    for element in root.iter():
        if (target := element.get("href", "")).startswith("#"):
            element.set("href", f"#{renamed[target[1:]]}")
        if clip := re.fullmatch(r"url\(#(.+)\)", element.get("clip-path", "")):
            element.set("clip-path", f"url(#{renamed[clip[1]]})")


def _restyle(element: ElementTree.Element) -> None:
    """Colours become the page's variables; fonts are the page's."""
    if path := element.get("d"):
        element.set("d", _shortened(path))
    style = element.attrib.pop("style", "")
    kept = [part.strip() for part in style.split(";") if part.strip() and not part.strip().startswith("font-family")]
    restyled = _COLOUR.sub(_variable, "; ".join(kept))
    if restyled:
        element.set("style", restyled)
    if (turned := element.get("transform", "")).startswith("rotate(-0 "):
        del element.attrib["transform"]
    elif turned:
        element.set("transform", _shortened(turned))
    if element.tag in ("text", "use"):
        for key in ("x", "y"):
            if value := element.get(key):
                element.set(key, _shortened(value))
    element.tail = "\n"


def _variable(match: re.Match[str]) -> str:
    assert match[0] in _VARIABLES, f"a figure was drawn in {match[0]}, which is no colour of the page"
    return f"var(--{_VARIABLES[match[0]]})"


def _shortened(numbers: str) -> str:
    """Two decimals are a seventieth of a millimetre."""
    rounded = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), numbers)
    return " ".join(rounded.split())


def _drop_empty(root: ElementTree.Element) -> None:
    """Remove groups and definitions that hold nothing, and the invisible boxes behind figures and axes."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == "path" and child.get("style") == "fill: none" and "id" not in child.attrib:
                parent.remove(child)
    for _ in range(4):  # groups nest: figure, axes, axis, tick
        for parent in list(root.iter()):
            for child in list(parent):
                if child.tag in ("g", "defs") and not len(child):
                    parent.remove(child)
