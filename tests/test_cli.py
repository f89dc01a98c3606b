"""The command line as a user meets it: what it prints where, and how it ends."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vcompress import cli


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    """Exit code and error message of `vcompress ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["vcompress", *map(str, arguments)])
    code, message = cli._run()
    return code, message or ""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of the small reference model, int8."""
    from vcompress import pipeline

    output = tmp_path_factory.mktemp("cli") / "out"
    source = "reference:penvideo20"
    options = pipeline.Options(
        target="int8", calib=source, output=output, num_clips=16, num_test_clips=48
    )
    pipeline.quantize(source, options=options)
    return output


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['vcompress', '--help']\n"
        "from vcompress import cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'onnx', 'transformers', 'rich', 'av'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    seconds = []
    for _ in range(3):
        # Processor time: the wall clock depends on what else the machine does.
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        after = os.times()
        seconds.append(
            after.children_user + after.children_system
            - before.children_user - before.children_system
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "vcompress quantize model.pt --target nvfp4" in done.stdout
    assert min(seconds) < 0.5


def test_a_path_with_nothing_at_it_is_told_before_torch_is_imported() -> None:
    code = (
        "import sys; sys.argv = ['vcompress', 'quantize', 'absent.pt', '--target', 'int8']\n"
        "from vcompress import cli\n"
        "print(cli._run(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("(2, 'absent.pt: no such file or folder; give a .pt,")
    assert done.stdout.strip().endswith("False")


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["quantize", "m.pt", "--target", "fp4"], 2, ""),
        (["quantize", "m.pt"], 2, ""),
        (["quantize", "absent.pt", "--target", "int8", "--calib", "x"], 2, "no such file"),
        (["quantize", "reference:penvideo20", "--target", "int8"], 2, "add --calib"),
        (
            ["quantize", "reference:penvideo20", "--target", "int8", "--calib", "absent/"],
            2, "absent/: no such file or folder; give a folder of videos",
        ),
        (
            ["quantize", "reference:penvideo20", "--target", "int8", "--calib",
             "reference:penvideo20", "--tokens", "1.5"],
            2, "--tokens must be above 0 and at most 1",
        ),
        (["inspect", "absent"], 2, "absent does not exist"),
        (["validate", "."], 2, "is not an artifact"),
        (["apply", "absent.json", "m.pt"], 2, "cannot read absent.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_wrong_input_ends_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], code: int, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    actual, message = run(monkeypatch, *arguments)
    assert actual == code
    assert expected in message
    assert "Traceback" not in message
    assert list(tmp_path.iterdir()) == []


def test_bad_files_leave_one_line_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "corrupt.pt").write_bytes(b"not a checkpoint")
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "wrong.npz", clips=np.zeros((4, 16, 8, 8, 1), np.uint8))
    reference = ["quantize", "reference:penvideo20", "--target", "int8", "-o", tmp_path / "out"]
    for arguments, expected in (
        (
            [
                *reference[:1],
                tmp_path / "corrupt.pt",
                *reference[2:],
                "--calib",
                tmp_path / "empty",
            ],
            "corrupt.pt",
        ),
        ([*reference, "--calib", tmp_path / "empty"], "empty"),
        ([*reference, "--calib", tmp_path / "wrong.npz"], "16, 8, 8, 1"),
    ):
        code, message = run(monkeypatch, *arguments)
        assert code == 2, message
        assert expected in message
    assert not (tmp_path / "out").exists()


def test_a_read_only_place_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # /proc takes no directories from anybody, whatever the user's rights are.
    source = "reference:penvideo20"
    code, message = run(
        monkeypatch, "quantize", source, "--target", "int8", "--calib", source, "-o", "/proc/out"
    )
    assert code == 2
    assert "/proc" in message
    # Not even the model was loaded.
    assert capsys.readouterr().err == ""


def test_quantize_prints_one_json_object(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "reference:penvideo20"
    code, _ = run(
        monkeypatch, "quantize", source, "--target", "int8", "--calib", source, "--num-clips", 16,
        "--num-test-clips", 32, "--no-engine", "-o", tmp_path / "out", "--json", "--quiet",
    )  # fmt: skip
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert code == 0
    assert result["exit_code"] == 0
    assert result["report"]["engines"][0]["status"] == "not built"
    assert Path(result["artifact"]) == tmp_path / "out"


def test_a_missed_bar_is_exit_code_3_and_keeps_the_artifact_aside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = "reference:penvideo20"
    code, message = run(
        monkeypatch, "quantize", source, "--target", "nvfp4", "--calib", source, "--num-clips", 16,
        "--num-test-clips", 32, "--no-engine", "-o", tmp_path / "out", "--quiet",
        "--min-sqnr", 90,
    )  # fmt: skip
    assert code == 3
    assert "out.rejected" in message
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.rejected/manifest.json").is_file()


def test_validate_runs_the_proof_again(
    monkeypatch: pytest.MonkeyPatch, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = run(monkeypatch, "validate", artifact, "--json", "--quiet")
    assert code == 0, message
    result = json.loads(capsys.readouterr().out)
    report = json.loads((artifact / "report.json").read_text())
    stage = next(s for s in report["stages"] if s["name"] == report["result_stage"])
    assert result["metrics"]["top1_percent"] == stage["metrics"]["top1_percent"]
    assert result["golden_relative_l2"] < 1e-6


def test_validate_notices_a_swapped_file(
    monkeypatch: pytest.MonkeyPatch, artifact: Path, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    content = bytearray((copy / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "model.onnx").write_bytes(content)
    code, message = run(monkeypatch, "validate", copy)
    assert code == 2
    assert "model.onnx is not the file that the manifest describes" in message


def test_other_test_clips_are_not_judged_against_a_baseline_that_never_saw_them(
    monkeypatch: pytest.MonkeyPatch, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["validate", artifact, "--data", "reference:penvideo20", "--json", "--quiet"]
    code, message = run(monkeypatch, *other)
    assert code == 0, message
    result = json.loads(capsys.readouterr().out)
    assert set(result["metrics"]) == {"num_clips", "top1_percent"}
    assert result["verdict"]["outcome"] == "not judged"


def test_other_test_clips_are_judged_with_the_baseline_opened_again(
    monkeypatch: pytest.MonkeyPatch, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["validate", artifact, "--data", "reference:penvideo20", "--json", "--quiet"]
    code, message = run(monkeypatch, *other, "--max-drop", 50)
    assert code == 0, message
    result = json.loads(capsys.readouterr().out)
    report = json.loads((artifact / "report.json").read_text())
    stage = next(s for s in report["stages"] if s["name"] == report["result_stage"])
    assert result["metrics"] == pytest.approx(stage["metrics"])
    assert result["verdict"]["outcome"] == "pass"
    code, message = run(
        monkeypatch, *other, "--max-drop", 50, "--model", "reference:moving-fashion"
    )
    assert code == 2
    assert "name that model with --model" in message


def test_a_speed_up_of_a_simulated_format_cannot_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = "reference:penvideo20"
    code, message = run(
        monkeypatch, "quantize", source, "--target", "nvfp4", "--calib", source, "--num-clips", 8,
        "--algorithm", "max", "--min-speedup", 1.2, "-o", tmp_path / "out", "--quiet",
    )  # fmt: skip
    assert code == 5
    assert "--min-speedup 1.2 cannot be shown on this machine: simulated" in message
    assert not list(tmp_path.iterdir())


def test_a_plan_is_not_overwritten_and_options_are_checked_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = "reference:penvideo20"
    path = tmp_path / "plan.json"
    command = ["plan", source, "--target", "int8", "--calib", source, "--num-clips", 8]
    assert run(monkeypatch, *command, "-o", path, "--quiet")[0] == 0
    edited = path.read_text().replace('"seed": 0', '"seed": 1')
    path.write_text(edited)
    for arguments, expected in (
        ([*command, "-o", path], "may have been edited; add --force"),
        ([*command, "-o", tmp_path / "absent/plan.json"], "there is no folder"),
        ([*command, "-o", path, "--max-layer-error", "nan"], "--max-layer-error must lie between"),
        (["apply", path, source, "-o", tmp_path / "out"], "not the clips that the plan"),
        (["apply", path, source, "--max-drop", "500"], "--max-drop must lie between 0 and 100"),
    ):
        code, message = run(monkeypatch, *arguments)
        assert code == 2, message
        assert expected in message
    assert path.read_text() == edited


def test_a_usage_error_is_json_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["vcompress", "quantize", "m.pt", "--json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "--target" in json.loads(capsys.readouterr().out)["error"]


def test_inspect_shows_every_layer_and_its_reason(
    monkeypatch: pytest.MonkeyPatch, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (artifact, artifact / "plan.json"):
        assert run(monkeypatch, "inspect", path)[0] == 0
        printed = capsys.readouterr().out
        assert "videomae.encoder.layer.3.output.dense" in printed.replace("\n", "")
        assert "within" in printed
    assert run(monkeypatch, "inspect", artifact / "model.onnx")[0] == 0
    assert "int8" in capsys.readouterr().out


def test_the_profile_of_an_artifact_stands_beside_that_of_its_model(
    monkeypatch: pytest.MonkeyPatch, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "profile", artifact, "--json", "-q")[0] == 0
    found = json.loads(capsys.readouterr().out)
    before, after = found["before"], found["after"]
    assert before["rounding"] == 0.0 < after["rounding"]
    assert min(before["linear"], after["linear"], before["attention"], after["attention"]) > 0
    assert min(found[each] for each in ("speed_ratio", "measured_before", "measured_after")) > 0
    assert run(monkeypatch, "profile", artifact, "-q")[0] == 0
    printed = capsys.readouterr().out
    assert "saved ms" in printed
    assert "while watched" in printed
    # What it would ignore is refused.
    code, message = run(monkeypatch, "profile", artifact, "--std", "0.1")
    assert (code, "give it no option but these" in message + capsys.readouterr().err) == (2, True)


def test_an_unknown_target_of_a_plan_is_an_error(
    monkeypatch: pytest.MonkeyPatch, artifact: Path, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    plan = (artifact / "plan.json").read_text()
    path.write_text(plan.replace('"target": "int8"', '"target": "int7"', 1))
    code, message = run(monkeypatch, "inspect", path)
    assert code == 2
    assert "unknown target 'int7'; choose one of: nvfp4" in message


def test_an_artifact_is_read_with_the_standard_library_alone(artifact: Path) -> None:
    """By the program in docs/artifact.md; no package is on its path, not even this one."""
    page = (Path(__file__).parents[1] / "docs/artifact.md").read_text()
    program = page.split("```python\n", 1)[1].split("```", 1)[0]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, artifact], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads((artifact / "plan.json").read_text())
    report = json.loads((artifact / "report.json").read_text())
    for name, choice in plan["quantize"].items():
        assert f"{name}: {choice['format']}, {choice['reason']}" in done.stdout
    assert report["verdict"]["reason"] in done.stdout
    for stage in report["stages"]:
        assert stage["name"] in done.stdout
    assert "inputs.npy: '<f4' (2, 16, 1, 32, 32)" in done.stdout
    assert "outputs.npy: '<f4' (2, 20)" in done.stdout


def test_inspect_needs_neither_the_model_nor_what_runs_it(artifact: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'onnx', 'onnxruntime', 'transformers', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "from vcompress import cli\n"
        "sys.argv = ['vcompress', 'inspect', sys.argv[1]]\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, artifact], capture_output=True, text=True,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((artifact / "report.json").read_text())
    printed = " ".join(done.stdout.split())
    for shown in (report["verdict"]["reason"], report["model"]["weights_sha256"], "golden.npz"):
        assert shown in printed
    assert all(layer["name"] in printed for layer in report["layers"])


def test_the_report_of_an_artifact_has_the_published_schema(artifact: Path) -> None:
    from jsonschema import Draft202012Validator

    from vcompress.validate.report_schema import SCHEMA_FILE

    report = json.loads((artifact / "report.json").read_text())
    Draft202012Validator(json.loads(SCHEMA_FILE.read_text())).validate(report)
    result = next(s for s in report["stages"] if s["name"] == report["result_stage"])
    assert [mode["mode"] for mode in result["modes"]] == ["stream", "batch"]
    assert result["memory"]["peak_mib"] > result["memory"]["idle_mib"] > 0


def test_doctor_tells_what_this_machine_can_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "doctor", "--json")[0] == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["capabilities"]}
    assert any(torch.__version__.split("+")[0] in entry["detail"] for entry in found.values())
    assert {entry["status"] for entry in found.values()} <= {"works", "simulated", "missing"}


def test_a_bug_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        message = "boom"
        raise RuntimeError(message)

    monkeypatch.setattr("vcompress.terminal.inspection.print_inspection", fail)
    code, message = run(monkeypatch, "inspect", tmp_path)
    assert code == 1
    assert "a bug in vcompress: RuntimeError: boom" in message


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vcompress.terminal.inspection.print_inspection", interrupt)
    assert run(monkeypatch, "inspect", tmp_path)[0] == 130


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "temporary files in"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "out/model.onnx"), "out/model.onnx"),
        (MemoryError(), "an allocation failed"),
    ],
)
def test_what_the_machine_runs_out_of_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, expected: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("vcompress.terminal.inspection.print_inspection", fail)
    code, message = run(monkeypatch, "inspect", tmp_path)
    assert code == 5
    assert expected in message


def test_too_large_a_tensor_is_no_bug(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        "vcompress.terminal.inspection.print_inspection",
        lambda *_, **__: torch.empty(10**15),
    )
    code, message = run(monkeypatch, "inspect", tmp_path)
    assert code == 5
    assert "not enough memory" in message
    assert "--num-clips" in message
