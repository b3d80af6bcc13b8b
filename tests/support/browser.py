"""Headless Chromium: what a page looks like, how it is laid out, and what it complains about."""

import json
import os
import shutil
import subprocess
import tempfile
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest


NAMES = ("chromium", "google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--enable-logging=stderr"),
]
DARK = "--blink-settings=preferredColorScheme=0"

# Runs in the page and leaves its findings in an element of the page around it.
MEASURE = """
<script>addEventListener("load", () => {
  const box = element => {
    const b = element.getBoundingClientRect();
    return [b.left + scrollX, b.top + scrollY, b.width, b.height];
  };
  const figures = [...document.querySelectorAll("figure svg")].map(svg => {
    // A figure that scrolls sideways may be wider than what it scrolls in; all others may not.
    const scroller = svg.closest(".scroll"), own = box(svg);
    const texts = [...svg.querySelectorAll("text")].map(t => ({ box: box(t), text: t.textContent }));
    const scale = svg.getScreenCTM().a;
    const sizes = [...svg.querySelectorAll("text")].map(t => parseFloat(getComputedStyle(t).fontSize) * scale);
    const cut = texts.filter(({ box: [x, y, w, h] }) =>
      x < own[0] - 1 || y < own[1] - 1 || x + w > own[0] + own[2] + 1 || y + h > own[1] + own[3] + 1);
    return { label: svg.getAttribute("aria-label"), box: own, scrolls: scroller !== null,
             smallest: Math.min(...sizes), cut: cut.map(({ text }) => text) };
  });
  const page = document.documentElement;
  const result = { figures, width: page.scrollWidth, height: page.scrollHeight, window: innerWidth,
                   requests: performance.getEntriesByType("resource").map(r => r.name),
                   ink: getComputedStyle(document.body).color };
  const element = document.createElement("pre");
  element.id = "measured"; element.textContent = JSON.stringify(result); parent.document.body.append(element);
})</script>
"""


def chromium() -> str:
    """The browser; without one the test is skipped on a user's machine, and fails in continuous integration."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        message = "no Chromium; install the Debian package chromium"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return found


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [chromium(), *FLAGS, f"--user-data-dir={profile}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)


def measure(page: Path, width: int, *flags: str) -> dict[str, Any]:
    """The layout of a page in a window of this width, and under `console` what it wrote to the console."""
    # In a frame, since a window has a least width of 500 pixels.
    inner = escape(page.read_text(encoding="utf-8") + MEASURE)
    frame = f'<iframe style="border:0;width:{width}px;height:1000px" srcdoc="{inner}"></iframe>'
    outer = page.with_name(f"frame-{page.name}")
    outer.write_text(f'<!doctype html><link rel="icon" href="data:,">{frame}', encoding="utf-8")
    result = _run(*flags, "--dump-dom", outer.as_uri())
    found = result.stdout.rpartition('<pre id="measured">')[2].partition("</pre>")[0]
    console = [line for line in result.stderr.splitlines() if ":CONSOLE" in line]
    return {**json.loads(unescape(found)), "console": console}


def screenshot(page: Path, width: int, height: int, picture: Path, *flags: str) -> None:
    """Takes a picture of a page, the whole of it if `height` is its height."""
    _run(*flags, f"--window-size={width},{height}", f"--screenshot={picture}", page.as_uri())
