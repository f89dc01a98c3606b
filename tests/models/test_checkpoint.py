"""Loading: every way in, and everything that must be refused."""

from __future__ import annotations

import json
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vcompress.models.checkpoint import metadata_of, read_checkpoint
from vcompress.models.load import LoadOptions, load_model
from vcompress.spec.errors import InputError

CONFIG: dict[str, Any] = {
    "image_size": 16, "patch_size": 8, "num_channels": 3, "num_frames": 4, "tubelet_size": 2,
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "id2label": {"0": "a", "1": "b", "2": "c"},
}  # fmt: skip


def tiny_state() -> dict[str, torch.Tensor]:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    torch.manual_seed(0)
    return dict(VideoMAEForVideoClassification(VideoMAEConfig(**CONFIG)).state_dict())


def save_pt(path: Path, **changes: Any) -> Path:
    torch.save({"family": "videomae", "config": CONFIG, "state_dict": tiny_state()} | changes, path)
    return path


def test_a_checkpoint_becomes_a_described_model(tmp_path: Path) -> None:
    model = load_model(str(save_pt(tmp_path / "m.pt")))
    assert model.family == "videomae"
    assert model.labels == ("a", "b", "c")
    assert model.blocks == ("videomae.encoder.layer.0", "videomae.encoder.layer.1")
    assert model.token_grid is not None
    assert model.token_grid.num_patches == 2 * 2 * 2
    kinds = [facts.kind for facts in model.layers.values()]
    assert kinds.count("conv3d") == 1
    assert kinds.count("linear") == 2 * 6 + 1
    assert model(model.example(2)).shape == (2, 3)


def test_safetensors_with_metadata_equals_pt(tmp_path: Path) -> None:
    first = load_model(str(save_pt(tmp_path / "m.pt")))
    stored = read_checkpoint(tmp_path / "m.pt")
    save_file(dict(stored.state_dict), tmp_path / "m.safetensors", metadata_of(stored))
    second = load_model(str(tmp_path / "m.safetensors"))
    assert second.weights_sha256 == first.weights_sha256
    assert torch.equal(first(first.example()), second(second.example()))


@pytest.mark.parametrize("family", ["videomae", "vivit"])
def test_a_transformers_directory_loads(tmp_path: Path, family: str) -> None:
    import transformers

    torch.manual_seed(0)
    if family == "videomae":
        module: Any = transformers.VideoMAEForVideoClassification(
            transformers.VideoMAEConfig(**CONFIG)
        )
    else:
        config = {key: value for key, value in CONFIG.items() if key != "tubelet_size"}
        config["tubelet_size"] = [2, 8, 8]
        module = transformers.VivitForVideoClassification(transformers.VivitConfig(**config))
    module.eval().save_pretrained(tmp_path / "dir")
    (tmp_path / "dir/preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3], "do_rescale": False})
    )
    model = load_model(str(tmp_path / "dir"))
    assert model.family == family
    assert model.clip.mean == (0.1, 0.2, 0.3)
    assert model.clip.rescale == 1.0
    assert model.token_grid is not None
    assert model.token_grid.special == (1 if family == "vivit" else 0)
    example = model.example()
    with torch.no_grad():
        assert torch.equal(model(example), module(example).logits)


def test_a_diffusers_transformer_directory_loads(tmp_path: Path) -> None:
    import diffusers

    from vcompress.models.directory import read_directory

    module = diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2,
        sample_size=8, patch_size=2, caption_channels=16, video_length=4, cross_attention_dim=16,
        norm_type="ada_norm_single", num_embeds_ada_norm=10,
    )  # fmt: skip
    module.save_pretrained(tmp_path / "transformer")
    loaded, family, _ = read_directory(tmp_path / "transformer")
    assert family == "LatteTransformer3DModel"
    state = module.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    model = load_model(str(tmp_path / "transformer"))
    assert (model.task, len(model.blocks)) == ("denoise", 4)


class Research(nn.Module):
    """Somebody's own network: a Conv3d stem, two like blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 16, (2, 4, 4), stride=(2, 4, 4))
        self.stages = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
            for _ in range(2)
        )
        self.head = nn.Linear(16, 5)
        self.unused = nn.Linear(16, 16)

    def forward(self, clips: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens = self.stem(clips).flatten(2).transpose(1, 2)
        for stage in self.stages:
            tokens = tokens + stage(tokens)
        return {"scores": self.head(tokens.mean(1))}


@pytest.fixture
def arch(monkeypatch: pytest.MonkeyPatch) -> str:
    """`module:callable` of `Research`, importable by name."""
    module = type(sys)("research_module")
    module.Research = Research  # type: ignore[attr-defined]
    module.broken = lambda: 1 / 0  # type: ignore[attr-defined]
    module.number = lambda: 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "research_module", module)
    return "research_module:Research"


SPEC = "NCTHW:float32:1x3x4x8x8"


def test_a_callable_may_be_a_file_of_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "from torch import nn\ndef load(): return nn.Sequential(nn.Flatten(), nn.Linear(48, 3))\n"
    )
    (tmp_path / "network_of_this_folder.py").write_text(code)
    (tmp_path / "json.py").write_text("raise RuntimeError('in place of the library')")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    options = LoadOptions(input_spec="NCTHW:float32:1x3x1x4x4")
    assert list(load_model("network_of_this_folder:load", options).layers) == ["1"]
    assert sys.path[-1] == str(tmp_path)
    with pytest.raises(InputError, match="a file of this folder"):
        load_model("no_such_network:load", options)


def test_a_research_model_is_understood_by_running_it(tmp_path: Path, arch: str) -> None:
    torch.manual_seed(1)
    torch.save(Research().state_dict(), tmp_path / "r.pt")
    model = load_model(str(tmp_path / "r.pt"), LoadOptions(arch=arch, input_spec=SPEC))
    assert list(model.layers) == [
        "stem", "stages.0.1", "stages.0.3", "stages.1.1", "stages.1.3", "head",
    ]  # fmt: skip
    assert model.blocks == ("stages.0", "stages.1")
    assert model.block_of("stages.1.3") == "stages.1"
    assert model.block_of("stem") is None
    options = LoadOptions(arch=arch, input_spec=SPEC, mean=(0.5,), std=(0.1, 0.2, 0.3))
    assert load_model(str(tmp_path / "r.pt"), options).clip.std == (0.1, 0.2, 0.3)
    assert model(model.example()).shape == (1, 5)


def refused(source: str, options: LoadOptions | None = None) -> str:
    with pytest.raises(InputError) as caught:
        load_model(source, options)
    return str(caught.value)


def test_a_pickled_module_needs_trust(tmp_path: Path) -> None:
    torch.save(Research(), tmp_path / "whole.pt")
    message = refused(str(tmp_path / "whole.pt"))
    assert "can run any code" in message
    assert "--trust-pickle" in message
    options = LoadOptions(trust_pickle=True, input_spec=SPEC)
    assert load_model(str(tmp_path / "whole.pt"), options).blocks == ("stages.0", "stages.1")


def test_a_hostile_pickle_never_runs(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (marker,))

    for name in ("evil.pt", "evil.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Hostile()))
        assert refused(str(tmp_path / name))
    torch.save({"state_dict": Hostile()}, tmp_path / "zip.pt")
    assert refused(str(tmp_path / "zip.pt"))
    assert not marker.exists()


def test_truncation_at_any_point_is_refused(tmp_path: Path) -> None:
    save_pt(tmp_path / "m.pt")
    stored = read_checkpoint(tmp_path / "m.pt")
    save_file(dict(stored.state_dict), tmp_path / "m.safetensors", metadata_of(stored))
    for name in ("m.pt", "m.safetensors"):
        content = (tmp_path / name).read_bytes()
        for sixteenth in range(16):
            cut = tmp_path / f"cut-{name}"
            cut.write_bytes(content[: len(content) * sixteenth // 16])
            assert str(cut) in refused(str(cut))


def test_a_safetensors_header_that_names_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f'{{"a":{entry},"a":{entry}}}'.encode()
    path = tmp_path / "twice.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    assert "given twice: a" in refused(str(path))


def test_differences_to_the_architecture_are_listed(tmp_path: Path) -> None:
    state = tiny_state()
    state["classifier.weight"] = torch.zeros(4, 32)
    state["videomae.extra"] = state.pop("classifier.bias")
    message = refused(str(save_pt(tmp_path / "m.pt", state_dict=state)))
    assert "missing classifier.bias" in message
    assert "unexpected videomae.extra" in message
    assert "classifier.weight has shape (4, 32), the model has (3, 32)" in message


def test_nan_weights_are_named(tmp_path: Path) -> None:
    state = tiny_state()
    state["classifier.weight"][0, 0] = float("nan")
    assert "the first is classifier.weight" in refused(
        str(save_pt(tmp_path / "m.pt", state_dict=state))
    )


def test_what_is_missing_is_asked_for(tmp_path: Path, arch: str) -> None:
    torch.save(Research().state_dict(), tmp_path / "r.pt")
    path = str(tmp_path / "r.pt")
    assert "--arch module:callable" in refused(path)
    assert "--input-spec" in refused(path, LoadOptions(arch=arch))
    assert "got 'NCTHW:float32:3x4'" in refused(
        path, LoadOptions(arch=arch, input_spec="NCTHW:float32:3x4")
    )
    assert "does not run on an input of shape (1, 1, 4, 8, 8)" in refused(
        path, LoadOptions(arch=arch, input_spec="NCTHW:float32:1x1x4x8x8")
    )
    assert "ZeroDivisionError" in refused(path, LoadOptions(arch="research_module:broken"))
    assert "must return a torch.nn.Module, got int" in refused(
        path, LoadOptions(arch="research_module:number")
    )
    assert "No module named 'nowhere'" in refused(path, LoadOptions(arch="nowhere:Model"))
    assert "no such file" in refused(str(tmp_path / "absent.pt"))
    assert "no config.json" in refused(str(tmp_path))
    assert "did you mean 'videomae'" in refused(str(save_pt(tmp_path / "f.pt", family="videomea")))
    assert "did you mean 'penvideo20'" in refused("reference:penvideo")
