"""The page: complete, self-contained, safe against hostile names, small."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from vcompress.validate.html import render_html
from vcompress.validate.report import to_json
from vcompress.validate.report_types import Layer, Report

HOSTILE = "</script><img src=x onerror=alert(1)>\"'{{ 7 * 7 }}\u202eevil\x00"
SECTIONS = (
    "verdict", "warnings", "stages", "layers", "sensitivity", "sizes", "latency", "tokens",
    "engines", "unmeasured", "reproduce", "table",
)  # fmt: skip
VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects tags, attributes, ids and text, and checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, key: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == key]


def check_self_contained(text: str) -> Page:
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert page.values("src") == []
    assert page.values("href") == ["data:,"]
    assert not re.search(r"url\(|@import", text)
    assert len(text.encode()) <= 300_000
    return page


def test_page_is_complete_and_self_contained(report: Report) -> None:
    page = check_self_contained(render_html(report))
    assert set(SECTIONS) <= set(page.values("id"))
    assert not re.search(r"https?://|//[a-z]", render_html(report))
    policy = next(value for value in page.values("content") if "default-src" in value)
    assert policy.startswith("default-src 'none'")
    ids = page.values("id")
    assert ids.index("verdict") == 0


def test_page_shows_the_numbers_of_the_report(report: Report) -> None:
    text = Page(render_html(report)).text
    metrics = report["stages"][3]["metrics"]
    assert metrics is not None
    for shown in (
        "Pass",
        report["verdict"]["reason"],
        f"{metrics['top1_percent']:.2f}",
        "truncated after 3 frames",
        "simulated: the formats are computed in float32",
        report["command"],
        report["model"]["weights_sha256"],
        "trtexec --onnx=model.onnx --saveEngine=model.engine",
        "95 % interval",
    ):
        assert shown in text
    assert all(layer["name"] in text for layer in report["layers"])


def test_every_place_where_tokens_go_has_its_row(report: Report) -> None:
    text = Page(render_html(report)).text
    # Ten of twelve blocks are reduced: a row and a bar each, and the line above them.
    assert text.count("bipartite") == 21
    assert "1,568 \N{RIGHTWARDS ARROW} 1,472" in text
    assert "704 \N{RIGHTWARDS ARROW} 608" in text


def test_equal_reports_give_equal_bytes(report: Report) -> None:
    assert render_html(report) == render_html(report)


def hostile(report: Report) -> Report:
    """The report with every free text replaced, and 2,000 layers of it."""
    names = [f"{HOSTILE * 20}.{index}" for index in range(2000)]
    layers = [
        Layer(name=name, format=("nvfp4", "int8", "keep")[index % 3], reason=HOSTILE * 50,
              score=None if index % 5 else 0.1, weight_kib=1.0)
        for index, name in enumerate(names)
    ]  # fmt: skip
    changed = {
        **report,
        "layers": layers,
        "command": HOSTILE,
        "target": HOSTILE,
        "warnings": [HOSTILE],
        "model": {**report["model"], "name": HOSTILE},
        "device": {HOSTILE: HOSTILE},
        "versions": {HOSTILE: HOSTILE},
        "clips": {**report["clips"], "skipped": [{"name": HOSTILE, "reason": HOSTILE}] * 500},
        "engines": [{**report["engines"][1], "runtime": HOSTILE, "reason": HOSTILE}],
        "verdict": {**report["verdict"], "reason": HOSTILE},
    }
    return changed  # type: ignore[return-value]


def test_hostile_names_are_text(report: Report) -> None:
    bad = hostile(report)
    html = render_html(bad)
    page = check_self_contained(html)
    assert "&lt;img src=x onerror=alert(1)&gt;" in html
    # Neither evaluated as a template nor able to turn the text around.
    assert "{{ 7 * 7 }}" in page.text
    assert "\u202e" not in html
    assert "\x00" not in html
    assert "are in report.json" in page.text
    assert to_json(bad)


def test_two_thousand_ordinary_layers(report: Report) -> None:
    layers = [
        Layer(name=f"model.stages.{i // 100}.blocks.{i // 10}.mlp.{i % 10}.weight_holder",
              format="nvfp4" if i % 7 else "int8", score=0.001 * (i % 50),
              reason="within the budget", weight_kib=128.0)
        for i in range(2000)
    ]  # fmt: skip
    page = check_self_contained(render_html({**report, "layers": layers}))
    assert "2000 candidate layers" in page.text
    assert "the other 1680 are in report.json" in page.text


def test_a_report_without_numbers_renders(report: Report) -> None:
    stages = [
        {**stage, "metrics": None, "metrics_reason": "no clips", "latency": None,
         "latency_reason": "not asked for", "parity": None, "metrics_versus_previous": None}
        for stage in report["stages"]
    ]  # fmt: skip
    verdict = dict.fromkeys(report["verdict"]) | {
        "outcome": "not judged", "reason": "No clips were compared."
    }  # fmt: skip
    empty = {
        **report, "stages": stages, "verdict": verdict, "layers": [], "engines": [],
        "tokens": None, "warnings": [],
        "device": dict.fromkeys(report["device"]),
        "clips": {**report["clips"], "calibration": None, "skipped": []},
    }  # fmt: skip
    page = check_self_contained(render_html(empty))  # type: ignore[arg-type]
    assert "Not judged" in page.text
    assert "no clips" in page.text
    assert "not asked for" in page.text
    assert "None" not in page.text


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"noise": 1.2, "max_drop": 1.0}, "Fail"),
        ({"noise": 0.05, "max_drop": 1.0, "num_clips": 60}, "Inconclusive"),
        ({"noise": 0.3, "max_drop": None}, "Not judged"),
        ({"noise": 0.0, "max_drop": 1.0}, "Pass"),
    ],
)
def test_every_outcome_renders(
    report_maker: Callable[..., Report], arguments: dict[str, float], word: str
) -> None:
    page = check_self_contained(render_html(report_maker(**arguments)))
    assert f" nvfp4: {word}" in page.text


def test_outputs_without_classes_show_sqnr(report: Report) -> None:
    classes = ("top", "agreement", "kl", "num_disagreements", "num_right", "num_wrong", "baseline")
    stages = []
    for stage in report["stages"]:
        metrics = stage["metrics"] and {
            key: value for key, value in stage["metrics"].items() if not key.startswith(classes)
        }
        stages.append({**stage, "metrics": metrics})
    page = check_self_contained(render_html({**report, "stages": stages}))  # type: ignore[typeddict-item]
    assert "Relative L2" in page.text
    assert "Agreement" not in page.text


@pytest.mark.parametrize("scores", [[0.0, 0.0], [None, None], [1.0, 1.0], [0.0, 1e-12], [3.0]])
def test_sensitivity_renders_for_any_scores(report: Report, scores: list[float | None]) -> None:
    layers = [
        Layer(name=f"b.{i}.fc", format="keep", score=score, reason="", weight_kib=0.0)
        for i, score in enumerate(scores)
    ]
    page = check_self_contained(render_html({**report, "layers": layers}))
    assert "nan" not in page.text
    assert ("No layer was scored." in page.text) == (scores == [None, None])


def test_dots_stand_at_the_logarithm_of_the_score(report: Report) -> None:
    # Axis from 0.001 (bottom, 100) to 1 (top, 0): 0.1 is a third of the way down, 0.001 at the end.
    layers = [
        Layer(name=f"b.{i}.fc", format="int8", score=score, reason="", weight_kib=1.0)
        for i, score in enumerate((1.0, 0.1, 0.001))
    ]
    assert 'd="M0 0.0h0M1 33.3h0M2 100.0h0"' in render_html({**report, "layers": layers})
