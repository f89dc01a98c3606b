"""The report as data, its way through JSON, and the closing table."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from vcompress.spec.errors import InputError
from vcompress.validate.report import (
    build_stage,
    closing_notes,
    closing_table,
    from_json,
    to_json,
)
from vcompress.validate.report_types import Report


def test_round_trip(report: Report) -> None:
    text = to_json(report)
    assert from_json(text) == report
    assert to_json(from_json(text)) == text
    assert json.loads(text)["schema"] == 1


def test_numpy_and_infinities_become_plain_data(report: Report) -> None:
    stage = report["stages"][0] | {"metrics": {"sqnr_db": np.float32("inf"), "n": np.int64(3)}}
    data = json.loads(to_json(report | {"stages": [stage]}))
    assert data["stages"][0]["metrics"] == {"sqnr_db": None, "n": 3}
    with pytest.raises(InputError, match="plain data, got object"):
        to_json(report | {"device": {"cpu": object()}})


def test_identical_outputs_are_null_with_a_flag(report: Report) -> None:
    baseline = json.loads(to_json(report))["stages"][0]["metrics"]
    assert baseline["sqnr_db"] is None
    assert baseline["identical"] is True


def test_a_missing_number_needs_a_reason(report: Report) -> None:
    text = to_json(report)
    silent = json.loads(text)
    silent["stages"][0]["latency_reason"] = None
    with pytest.raises(InputError, match="baseline needs either latency or latency_reason"):
        from_json(json.dumps(silent))
    double = json.loads(text)
    double["stages"][0]["metrics_reason"] = "no clips"
    with pytest.raises(InputError, match="got both"):
        from_json(json.dumps(double))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"schema": 2}, "schema must be 1, got 2"),
        ({"result_stage": "ONNX"}, "result_stage must be one of the stages"),
        ({"verdct": {}}, "unknown key 'verdct'; did you mean 'verdict'"),
        ({"sizes": {}}, "sizes: missing key"),
        ({"layers": [{"name": "a"}]}, r"layers\[0\]: missing key"),
        ({"engines": {}}, "engines must be a list"),
        ({"verdict": {"outcome": "pass"}}, "verdict: missing key"),
    ],
)
def test_what_is_no_report_is_refused(
    report: Report, change: dict[str, object], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        from_json(json.dumps({**json.loads(to_json(report)), **change}))


def test_stage_names_must_differ(report: Report, report_maker: Callable[..., Report]) -> None:
    data = json.loads(to_json(report))
    data["stages"].append(data["stages"][0])
    with pytest.raises(InputError, match="different names"):
        from_json(json.dumps(data))


def test_closing_table_has_units_counts_and_changes(report: Report) -> None:
    rows = {row[0]: row[1:] for row in closing_table(report)}
    after = report["sizes"]["result_weights_mib"]
    assert rows["weights (MiB)"] == ("83.72", f"{after:.2f}", f"{100 * after / 83.72 - 100:+.1f} %")
    assert rows["effective bits"] == ("32.00", "5.41", "scales counted")
    # 1 - 608 / 1568 = 61.2 %.
    assert rows["tokens"] == ("1568", "608", "-61.2 %")
    metrics = report["stages"][3]["metrics"]
    assert metrics is not None
    baseline, result, change = rows["top-1 (%, 1500 clips)"]
    assert baseline == f"{metrics['baseline_top1_percent']:.2f}"
    assert result == f"{metrics['top1_percent']:.2f}"
    assert change == f"{-metrics['top1_drop_points']:.2f} pt  gate 2.00 pt: pass"
    latency = report["stages"][3]["latency"]
    assert latency is not None
    assert f"{latency['speed']['speed_ratio']:.2f}x" in rows["latency p50 (ms, B=1)"][2]
    assert "120 runs after 3 warm-up" in rows["latency p50 (ms, B=1)"][2]
    assert all(cell.isascii() for row in closing_table(report) for cell in row)


def test_closing_table_says_why_a_number_is_missing(report: Report) -> None:
    data = {**report, "result_stage": "planned"}
    rows = {row[0]: row[1:] for row in closing_table(data)}  # type: ignore[arg-type]
    assert rows["latency p50 (ms)"][1:] == (
        "n/a",
        "simulated: the formats are computed in float32",
    )
    data["result_stage"] = "TensorRT-RTX engine"
    rows = {row[0]: row[1:] for row in closing_table(data)}  # type: ignore[arg-type]
    assert rows["quality"] == ("n/a", "n/a", "built, not run: this machine has no GPU")


def test_slower_is_called_slower(report: Report) -> None:
    data = json.loads(to_json(report))
    data["stages"][3]["latency"]["speed"] |= {
        "speed_ratio": 0.8, "speed_ratio_lower": 0.75, "speed_ratio_upper": 0.9
    }  # fmt: skip
    row = next(row for row in closing_table(data) if row[0].startswith("latency p50"))
    assert row[3].startswith("0.80x (slower) [0.75, 0.90]")


def test_notes_name_formats_engines_skips_and_the_verdict(report: Report) -> None:
    notes = closing_notes(report)
    words = [word for word, _ in notes]
    assert words == ["layers", "tokens", "engine", "engine", "clips", "warning", "verdict"]
    text = dict(notes)
    assert "nvfp4" in text["layers"]
    assert "1 keep" in text["layers"]
    assert text["verdict"].startswith("pass. ")
    assert text["clips"] == "1 skipped, first: clips/broken.mp4 (truncated after 3 frames)"
    assert [note for word, note in notes if word == "engine"] == [
        "TensorRT-RTX SM120 built",
        "TensorRT not built: needs a GPU; build it where the engine will run",
    ]


def test_without_labels_the_table_shows_agreement(report_maker: Callable[..., Report]) -> None:
    unlabelled = report_maker(labelled=False, num_clips=200, tokens=False)
    labels = [row[0] for row in closing_table(unlabelled)]
    assert "agreement (%, 200 clips)" in labels
    assert not any("top-1" in label or label == "tokens" for label in labels)


def test_build_stage_keeps_parts_apart() -> None:
    metrics: dict[str, float | int | None] = {"num_clips": 1}
    stage = build_stage("a", about="", metrics=metrics, latency_reason="no clock")
    metrics["num_clips"] = 2
    assert stage["metrics"] == {"num_clips": 1}
