"""Debian's chromium without a window: pictures of a page, its DOM, and the page as a PDF."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Literal

Scheme = Literal["light", "dark"]
_PREFERRED = {"dark": 0, "light": 1}  # blink's PreferredColorScheme
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def find_chromium() -> str | None:
    """Where chromium is, if anywhere."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def screenshot(page: Path, output: Path, size: tuple[int, int], scheme: Scheme) -> None:
    """A PNG of the first `size` (width, height) pixels of `page`."""
    width, height = size
    _chromium(page, f"--screenshot={output}", f"--window-size={width},{height}", scheme=scheme)


def print_to_pdf(page: Path, output: Path) -> None:
    """`page` as it is printed, by someone whose screen is dark."""
    _chromium(page, f"--print-to-pdf={output}", "--no-pdf-header-footer", scheme="dark")


def dumped_dom(page: Path) -> str:
    """The DOM after the page and its scripts are done."""
    return _chromium(page, "--dump-dom", "--window-size=1400,1000")


def _chromium(page: Path, *options: str, scheme: Scheme = "light") -> str:
    chromium = find_chromium()
    assert chromium, "chromium is not installed"
    setting = f"--blink-settings=preferredColorScheme={_PREFERRED[scheme]}"
    with tempfile.TemporaryDirectory() as profile:
        command = [chromium, *_FLAGS, setting, f"--user-data-dir={profile}", *options, page.absolute().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
