"""The pages as a browser shows them: quiet, complete, offline, and readable wherever they are read.

`penvideo20.json` and `moving-fashion.json` are the reports of real runs of few clips:

    vcompress quantize reference:penvideo20 --target int8 --calib reference:penvideo20 \\
        --num-clips 16 --num-test-clips 256
    vcompress quantize reference:moving-fashion --target int8 --calib reference:moving-fashion \\
        --num-clips 16 --num-test-clips 48 --tokens 0.8 --max-drop 100

The clips of the video transformer are generated here. With VCOMPRESS_SCREENSHOTS the pictures go
to that folder, to be looked at.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vcompress.compress.cache import CacheSection
from vcompress.pipeline.cache import CacheFound, measured
from vcompress.pipeline.cache_report import write_report
from vcompress.pipeline.cache_sampler import make_cases, open_sampler, read_prompts
from vcompress.pipeline.cache_search import Bar, Found
from vcompress.validate.html import render_html
from vcompress.validate.report import from_json

PAGES = ("penvideo20", "moving-fashion", "bouncing-garments")
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# A4 at 96 dots an inch.
PAPER = {"width": 794, "height": 1123, "paper": True}
LOOKS: dict[str, dict[str, Any]] = {
    "desktop": DESKTOP, "desktop-dark": {**DESKTOP, "dark": True},
    "phone": PHONE, "phone-dark": {**PHONE, "dark": True}, "paper": PAPER,
}  # fmt: skip
# Text that stands out too little from what is behind it: WCAG 2.2, 1.4.3, level AA.
FAINT = """
(() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = rgb => {
    const [r, g, b] = rgb.slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] > 0.5) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.body.querySelectorAll('*')) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest('svg title')) continue;
    const style = getComputedStyle(element);
    const ink = parse(element.closest('svg') ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(element))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push(`${element.textContent.trim().slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return found;
})()
"""
# What reaches beyond the window, apart from what scrolls by itself.
BEYOND = """
[...document.body.querySelectorAll('*')]
  .filter(each => !each.closest('.scroll, .scroll *') && !each.closest('svg')
    && each.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .map(each => each.className + ' ' + each.textContent.trim().slice(0, 40))
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    paths = {name: folder / f"{name}.html" for name in PAGES}
    for name in PAGES[:2]:
        stored = Path(__file__).with_name(f"{name}.json")
        paths[name].write_text(render_html(from_json(stored.read_text())), encoding="utf-8")
    write_report(generated(), paths[PAGES[2]])
    return paths


def generated() -> CacheFound:
    """A cache in the video transformer that ships, run on one clip."""
    sampler = open_sampler("reference:bouncing-garments", num_steps=8)
    _, cases = make_cases(read_prompts(None, sampler), 1, 0)
    section = CacheSection(policy="fixed", num_steps=8, protect_first=2)
    full, trial, speed = measured(sampler, section, cases, lambda _: None)
    return CacheFound(
        name=sampler.name, num_steps=8, bar=Bar("psnr_db", 20.0), section=section, reason="",
        calibration=trial, held_out=trial, speed=speed,
        families=(Found("fixed", trial, 1), Found("magcache", None, 1)), cases=tuple(cases),
        full=tuple(full),
    )  # fmt: skip


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_quiet_complete_and_readable(tab: Any, pages: dict[str, Path], name: str) -> None:
    page = pages[name]
    tab.look(**DESKTOP)
    tab.open(page)
    assert tab.requests == [page.resolve().as_uri()]
    pictures = tab.evaluate("[...document.images].map(i => i.complete && i.naturalWidth)")
    assert all(pictures)
    assert len(pictures) == (2 if name == "bouncing-garments" else 0)
    drawings = tab.evaluate("[...document.querySelectorAll('svg')].map(s => s.clientHeight)")
    assert len(drawings) > 1
    assert all(drawings)
    for look, settings in LOOKS.items():
        tab.look(**settings)
        assert tab.evaluate(BEYOND) == [], look
        assert tab.evaluate(FAINT) == [], look
        shot = tab.picture()
        keep(f"{name}-{look}.png", shot)
        picture = Image.open(io.BytesIO(shot)).convert("RGB")
        assert picture.width == settings["width"]
        assert picture.height > settings["height"]
        pixels = np.asarray(picture)[::3, ::3]
        # The paper of the page: dark in the dark, white in print.
        brightness = float(np.median(pixels))
        assert brightness < 40 if "dark" in look else brightness > 240
        assert len(np.unique(pixels @ (1, 256, 65536))) > 20
    assert tab.complaints == []


@pytest.mark.parametrize("name", PAGES)
def test_a_page_prints_with_what_is_folded(tab: Any, pages: dict[str, Path], name: str) -> None:
    tab.look(**PAPER)
    tab.open(pages[name])
    folded = tab.evaluate(
        "[...document.querySelectorAll('details > :not(summary)')].map(e => e.clientHeight)"
    )
    assert all(folded)
    assert bool(folded) == (name != "bouncing-garments")
    paper = tab.paper()
    keep(f"{name}.pdf", paper)
    assert paper.startswith(b"%PDF-")
    assert tab.complaints == []


def test_a_page_is_small(pages: dict[str, Path]) -> None:
    for page in pages.values():
        text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page.read_text(encoding="utf-8"))
        assert len(text.encode()) < 300_000
        assert not re.search(r"(?:src|href)=\"(?!data:)|url\(|@import|<script", text)


@pytest.mark.parametrize(
    "intrusion",
    [
        "document.body.append(Object.assign(new Image(), {src: 'https://example.org/a.png'}))",
        "document.body.append(Object.assign(document.createElement('script'), {text: '1'}))",
        "void fetch('https://example.org/').catch(() => 0)",
    ],
)
def test_the_policy_of_a_page_lets_nothing_in_or_out(
    tab: Any, pages: dict[str, Path], intrusion: str
) -> None:
    """And what the browser has to complain about is noticed."""
    page = pages["penvideo20"]
    tab.open(page)
    tab.evaluate(intrusion)
    tab.evaluate("new Promise(done => setTimeout(done, 50))")
    assert tab.requests == [page.resolve().as_uri()]
    assert any("Content Security Policy" in each for each in tab.complaints)


def keep(name: str, data: bytes) -> None:
    """Leave a picture for people, if asked to."""
    folder = os.environ.get("VCOMPRESS_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, name).write_bytes(data)
