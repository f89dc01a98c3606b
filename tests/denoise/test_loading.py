"""Denoisers of diffusers: folders, pipelines, shards, and what they are called with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vcompress.models.calls import run_module
from vcompress.models.denoisers import EXAMPLES
from vcompress.models.load import LoadOptions, load_model
from vcompress.models.look import look
from vcompress.models.video import primary_output
from vcompress.spec.errors import InputError

# What diffusers itself says on a CPU.
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")

WAN = "WanTransformer3DModel"
MOCHI = "MochiTransformer3DModel"


def refused(source: Path, options: LoadOptions | None = None) -> str:
    with pytest.raises(InputError) as caught:
        load_model(str(source), options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_every_class_loads_and_computes_what_diffusers_does(zoo: Any, name: str) -> None:
    bare, model = load_model(str(zoo.folder(name))), zoo.load(name)
    # Found from the configuration alone, and from a recorded call.
    assert (bare.layers, bare.blocks) == (model.layers, model.blocks)
    assert (model.task, model.family, len(model.blocks) % 2) == ("denoise", name, 0)
    assert model.call is not None
    original, arguments = zoo.build(name), zoo.arguments(name, 1, 500.0)
    with torch.inference_mode():
        expected = original(**arguments, return_dict=False)[0]
        output = primary_output(model.module(**arguments))
        assert torch.equal(model(model.call), primary_output(run_module(original, model.call)))
    if name == MOCHI:
        # Its attention was exchanged; see the test below.
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(output, expected)


def test_masked_attention_of_mochi_is_the_original(zoo: Any) -> None:
    original, model = zoo.build(MOCHI), zoo.load(MOCHI)
    # Every sample has its own length of text.
    samples = [zoo.arguments(MOCHI, seed, 300.0 + seed) for seed in range(3)]
    joined = {key: torch.cat([each[key] for each in samples]) for key in samples[0]}
    with torch.inference_mode():
        expected = original(**joined, return_dict=False)[0]
        output = primary_output(model.module(**joined))
        one = primary_output(model.module(**samples[1]))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output[1:2], one, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(output[0], output[1])


def test_a_pipeline_names_its_transformers(zoo: Any, tmp_path: Path) -> None:
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", WAN], "vae": [None, None]}
    shutil.copytree(zoo.folder(WAN), tmp_path / "wan" / "transformer")
    file = tmp_path / "wan" / "model_index.json"
    file.write_text(json.dumps(index))
    assert load_model(str(tmp_path / "wan")).name == "wan"
    assert load_model(str(tmp_path / "wan" / "transformer")).name == "wan-transformer"
    (found,) = look(tmp_path / "wan")
    assert (found.family, len(found.blocks), found.layers["conv3d"]) == (WAN, 2, 1)
    assert found.num_parameters == sum(each.numel() for each in zoo.build(WAN).parameters())
    shutil.copytree(zoo.folder(WAN), tmp_path / "wan" / "transformer_2")
    file.write_text(json.dumps({**index, "transformer_2": ["diffusers", WAN]}))
    assert "wan/transformer and " in refused(tmp_path / "wan")
    assert [one.path[-13:] for one in look(tmp_path / "wan")] == ["n/transformer", "transformer_2"]
    file.write_text(json.dumps({"_class_name": "VAEPipeline", "vae": ["diffusers", "VAE"]}))
    assert "without a transformer" in refused(tmp_path / "wan")


def test_weights_in_several_files(zoo: Any, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    folder.mkdir()
    shutil.copy(zoo.folder(WAN) / "config.json", folder)
    weights = load_file(zoo.folder(WAN) / "diffusion_pytorch_model.safetensors")
    names = sorted(weights)
    shards = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, part in shards.items():
        save_file({name: weights[name].half() for name in part}, folder / file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    listed = {name: file for file, part in shards.items() for name in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    state = load_model(str(folder)).module.state_dict()
    assert all(torch.equal(state[name], weights[name].half().float()) for name in names)
    (folder / "b.safetensors").unlink()
    assert "b.safetensors is missing" in refused(folder)


def test_wrong_folders_are_refused_in_one_line(zoo: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(zoo.folder(WAN), folder)
    config = json.loads((folder / "config.json").read_text())
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = "blocks.0.attn1.to_q.weight"
    save_file({**weights, name: weights[name][:4].clone(), "blok": torch.ones(1)}, file)
    assert "has shape (4, 64), not (64, 64)" in (text := refused(folder))
    assert "blok is unknown" in text
    file.unlink()
    assert "safetensors is missing" in refused(folder)
    for wrong, text in (
        ({"_class_name": "WanTransformer9DModel"}, "no model class WanTransformer9DModel"),
        ({"_class_name": "WanPipeline"}, "no model class WanPipeline"),
        ({"num_layers": "two"}, "the configuration does not make a WanTransformer3DModel"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **wrong}))
        assert text in refused(folder)
    with pytest.raises(InputError, match="neither an artifact nor a folder"):
        look(tmp_path)


def test_calls_must_be_those_of_the_model(zoo: Any, tmp_path: Path) -> None:
    latte = LoadOptions(calls=zoo.calls("LatteTransformer3DModel"))
    text = refused(zoo.folder(WAN), latte)
    assert "calls of a LatteTransformer3DModel" in text
    assert "no clips" in refused(zoo.folder(WAN), LoadOptions(mean=(0.5,)))
    # A class of diffusers that no table knows needs calls.
    folder = tmp_path / "unknown"
    shutil.copytree(zoo.folder(WAN), folder)
    config = json.loads((folder / "config.json").read_text())
    other = {**config, "_class_name": "SkyReelsV2Transformer3DModel"}
    (folder / "config.json").write_text(json.dumps(other))
    assert "record some calls with vcompress.record_calls" in refused(folder)
