"""Which patches were merged: as a command on an artifact, and as numbers."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vcompress
from vcompress import cli
from vcompress.calib.clips import Clips
from vcompress.calib.sources import open_clips
from vcompress.compress.tokens.catalog import TECHNIQUES
from vcompress.compress.tokens.fitting import fit_sites
from vcompress.compress.tokens.rules import problems_of
from vcompress.export.graph import GraphFacts
from vcompress.export.manifest import build_manifest
from vcompress.export.publish import write_manifest
from vcompress.models.checkpoint import Checkpoint
from vcompress.models.load import ADAPTERS, LoadOptions, from_checkpoint, load_model
from vcompress.models.video import VideoModel
from vcompress.pipeline.planning import make_plan, save_plan
from vcompress.pipeline.record import file_role
from vcompress.pipeline.tokens_view import follow_tokens, view_tokens
from vcompress.spec.errors import InputError
from vcompress.spec.plan import CompressionPlan
from vcompress.spec.token_section import TokenSection, TokenSite

SOURCE = "reference:penvideo20"
SHARED: dict[str, Any] = {
    "image_size": 32, "patch_size": 4, "num_frames": 4, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
CUBES = {**SHARED, "tubelet_size": [1, 4, 4]}
PRISM = {**CUBES, "num_spatial_layers": 2, "num_temporal_layers": 2, "num_auxiliary_layers": 2}
# By arrangement: the family, its configuration, a technique that it takes.
ARRANGED: dict[str, tuple[str, dict[str, Any], str]] = {
    "joint": ("vivit", CUBES, "bipartite"),
    "joint, places first": (
        "timesformer", {**SHARED, "attention_type": "joint_space_time"}, "bipartite",
    ),
    "divided": ("timesformer", SHARED, "places"),
    "frames": ("clip_vision_model", SHARED, "bipartite"),
    "tubes": ("videoprism_vision_model", PRISM, "places"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return load_model(SOURCE)


@pytest.fixture(scope="module")
def clips(model: VideoModel) -> Clips:
    return open_clips(SOURCE, model.clip, part="test", limit=2, seed=0, labels=model.labels)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, model: VideoModel) -> Path:
    """An artifact with all that the picture needs: the plan and the manifest, without graphs."""
    folder = tmp_path_factory.mktemp("view") / "out"
    folder.mkdir()
    options = vcompress.Options(target="int8", calib=SOURCE, tokens=0.7, algorithm="max")
    calibration = open_clips(
        SOURCE, model.clip, part="calibration", limit=8, seed=0, labels=model.labels
    )
    plan = save_plan(*make_plan(model, calibration, options), folder / "plan.json")
    graph = GraphFacts(
        files=(), dialect="portable", opset=23, input_shape=("batch", *model.clip.input_shape),
        output_shape=("batch", len(model.labels)), static_reason=None, num_nodes=0,
        own_operators=(), num_bytes=0,
    )  # fmt: skip
    manifest = build_manifest(
        model, plan, graph, created="2026-01-01T00:00:00+00:00", effective_bits=8.0, quality={},
        performance=[], requires={}, notes=[],
    )  # fmt: skip
    write_manifest(
        folder, manifest, roles={path.name: file_role(path.name) for path in folder.iterdir()}
    )
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["vcompress", "inspect", *map(str, arguments)])
    code, message = cli._run()
    return code, message or ""


def edited(path: Path, target: Path, **changes: Any) -> Path:
    """A copy of a JSON file with other values."""
    target.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return target


def test_the_command_draws_what_the_artifact_does(
    monkeypatch: pytest.MonkeyPatch, artifact: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    picture = tmp_path / "merged.png"
    code, message = run(monkeypatch, artifact, "--tokens", SOURCE, "-o", picture, "--json", "-q")
    assert code == 0, message
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = json.loads(capsys.readouterr().out)
    assert printed["path"] == str(picture)
    plan = json.loads((artifact / "plan.json").read_text())
    assert [site["block"] for site in printed["sites"]] == list(plan["tokens"]["sites"])
    before = np.arange(128).reshape(8, 4, 4)
    for site in printed["sites"]:
        origin = np.array(site["origin"])
        assert origin.shape == (8, 4, 4)
        assert np.array_equal(np.unique(origin), np.arange(site["keep"]))
        assert site["num_merged_tokens"] + site["num_single_tokens"] == site["keep"]
        # What was one token before is one token still.
        assert all(len(np.unique(origin[before == group])) == 1 for group in np.unique(before))
        before = origin


def test_it_prints_a_table_and_writes_tokens_png_by_default(
    monkeypatch: pytest.MonkeyPatch, artifact: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, message = run(monkeypatch, artifact / "plan.json", "--tokens", SOURCE, "--model", SOURCE)
    assert code == 0, message
    printed = capsys.readouterr().out
    assert "128 patch tokens" in printed
    assert "wrote    tokens.png" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.png"]


def test_the_first_clip_of_an_archive_is_drawn(
    artifact: Path, model: VideoModel, clips: Clips, tmp_path: Path
) -> None:
    np.savez(tmp_path / "clips.npz", clips=clips.data)
    torch.save(torch.from_numpy(next(clips.batches(2))), tmp_path / "inputs.pt")
    section = CompressionPlan.load(artifact / "plan.json").tokens
    assert section is not None
    expected = follow_tokens(model, section, clips).sites[-1].origin
    for name in ("clips.npz", "inputs.pt"):
        view = view_tokens(artifact, str(tmp_path / name), tmp_path / "tokens.png")
        assert np.array_equal(view.sites[-1].origin, expected)
        assert view.clip == "clip[0]"


def test_what_is_missing_or_does_not_fit_is_said(
    monkeypatch: pytest.MonkeyPatch, artifact: Path, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = artifact / "plan.json"
    tokens = json.loads(plan.read_text())["tokens"]
    without = edited(plan, tmp_path / "without.json", tokens=None)
    idle = edited(plan, tmp_path / "idle.json", tokens={**tokens, "sites": {}})
    foreign = edited(
        plan, tmp_path / "foreign.json",
        model={**json.loads(plan.read_text())["model"], "weights_sha256": "0" * 64},
    )  # fmt: skip
    (tmp_path / "model.onnx").touch()
    there = {path.name for path in tmp_path.iterdir()}
    with_model = ("--tokens", SOURCE, "--model", SOURCE)
    for arguments, expected in (
        ((artifact, "--model", SOURCE), "add --tokens CLIP"),
        ((artifact, "-o", "a.png"), "add --tokens CLIP"),
        ((plan, "--tokens", SOURCE), "name it with --model"),
        ((without, *with_model), "reduces no tokens"),
        ((idle, *with_model), "keeps every token"),
        ((foreign, *with_model), "name that model with --model"),
        ((artifact, "--tokens", "absent.mp4"), "absent.mp4"),
        ((artifact, "--tokens", tmp_path), "is a folder; --tokens takes one video"),
        ((artifact, "--tokens", SOURCE, "-o", "absent/a.png"), "choose another --output"),
        ((tmp_path / "model.onnx", *with_model), "not an artifact directory or a plan.json"),
        (("absent", *with_model), "absent: no such file"),
    ):
        # With --json a usage error is handed back too, rather than printed.
        code, message = run(monkeypatch, *arguments, "-q", "--json")
        assert code == 2, message
        assert expected in message
    assert {path.name for path in tmp_path.iterdir()} == there


@pytest.mark.parametrize("source", ["gone/model.pt", "os:getcwd", ""])
def test_a_model_that_was_moved_is_asked_for(artifact: Path, tmp_path: Path, source: str) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(artifact, moved)
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["source"]["id"] = source
    (moved / "manifest.json").write_text(json.dumps(manifest))
    picture = tmp_path / "tokens.png"
    with pytest.raises(InputError, match="name the model with --model"):
        view_tokens(moved, SOURCE, picture)
    assert not picture.exists()
    assert view_tokens(moved, SOURCE, picture, source=SOURCE).model == "penvideo20"
    assert picture.exists()


@pytest.mark.parametrize("technique", list(TECHNIQUES))
def test_every_technique_can_be_followed(model: VideoModel, clips: Clips, technique: str) -> None:
    block = model.token_blocks[1]
    section = TokenSection(
        attention="plain", num_patches=128,
        sites={block: TokenSite(technique=technique, keep=64)},
    )  # fmt: skip
    assert not problems_of(model, section)
    tensors = fit_sites(model, section, [model.example(8)], seed=0)
    (site,) = follow_tokens(model, section, clips, tensors).sites
    numbers = np.unique(site.origin[site.origin >= 0])
    assert len(numbers) <= 64
    assert numbers.max() < 64
    if TECHNIQUES[technique].conserves:
        assert (site.origin >= 0).all()
    if technique.startswith("drop"):
        assert (site.origin < 0).sum() == 64


def test_following_leaves_the_model_alone(model: VideoModel, clips: Clips) -> None:
    batch = torch.from_numpy(clips[0][None])
    before = model(batch)
    section = TokenSection(
        attention="plain", num_patches=128,
        sites={model.token_blocks[0]: TokenSite(technique="bipartite", keep=32)},
    )  # fmt: skip
    follow_tokens(model, section, clips)
    assert torch.equal(model(batch), before)
    with pytest.raises(InputError, match="does not fit the model"):
        follow_tokens(model, replace(section, num_patches=64), clips)


@pytest.mark.parametrize("arrangement", ARRANGED)
def test_the_map_lies_on_the_frames_as_the_patches_do(arrangement: str) -> None:
    family, config, technique = ARRANGED[arrangement]
    torch.manual_seed(0)
    (adapter,) = [adapter for adapter in ADAPTERS if adapter.family == family]
    state = adapter.build(config).state_dict()
    for name, tensor in state.items():
        if "embeddings" in name and tensor.ndim >= 4:
            # What a patch shows shall count for more than its place.
            tensor.mul_(40)
    stored = Checkpoint(family=family, config=config, state_dict=state)
    model = from_checkpoint(stored, name=family, source="", options=LoadOptions())
    frames = np.random.default_rng(0).integers(0, 256, (1, 4, 32, 32, 3), np.uint8)
    frames[:, :, :, :16] = 200  # half of the columns, in all frames
    section = TokenSection(
        attention="plain", num_patches=256,
        sites={model.token_blocks[0]: TokenSite(technique=technique, keep=192)},
    )  # fmt: skip
    view = follow_tokens(model, section, Clips.from_frames(frames, model.clip))
    origin = view.sites[0].origin
    numbers, counts = np.unique(origin, return_counts=True)
    merged = np.isin(origin, numbers[counts > 1])
    assert len(numbers) == 192
    assert not merged[:, :, 4:].any()
    assert merged[:, :, :4].any(axis=(1, 2)).all()
    if arrangement in ("frames", "divided", "tubes"):
        assert all(
            len({*origin[t].flat} & {*origin[u].flat}) == 0 for t in range(4) for u in range(t)
        )
