"""Takes the pictures of the README: the demo's report in light, in dark and on a phone.

Needs chromium, and demo/bundle (`make demo`), or the bundle named as its argument, with a trace beside it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from offramp.commands.reporting import ReportRequest, report_bundle  # noqa: E402
from tests.report.browser import Scheme, screenshot  # noqa: E402

HERE = Path(__file__).parent
MOST_BYTES = 250_000
PICTURES: tuple[tuple[str, tuple[int, int], Scheme], ...] = (
    ("report-light", (1180, 1640), "light"),
    ("report-dark", (1180, 1640), "dark"),
    ("report-phone", (390, 1640), "light"),
)


def main() -> None:
    bundle = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "demo" / "bundle"
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        report_bundle(bundle, ReportRequest(), page)
        for name, size, scheme in PICTURES:
            screenshot(page, Path(folder) / f"{name}.png", size, scheme)
            taken = Image.open(Path(folder) / f"{name}.png").convert("RGB")
            output = HERE / f"{name}.png"
            taken.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(output, optimize=True)
            print(f"{output.relative_to(ROOT)}: {output.stat().st_size} bytes")
            assert output.stat().st_size < MOST_BYTES


if __name__ == "__main__":
    main()
