"""Reduction inside the attention of video diffusion transformers, on tiny ones of diffusers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vcompress.compress.tokens.attention_only import (
    AttentionReduction,
    ReducedAttention,
    reduce_attention,
    remove_reduction,
)
from vcompress.compress.tokens.intercept import Intercept, Merging
from vcompress.compress.tokens.windows import Box, GridWindows
from vcompress.spec.errors import InputError

TEXT = 7


class Denoiser(nn.Module):
    """A transformer with everything but the latent held fixed: one tensor in, one out."""

    def __init__(self, transformer: nn.Module, text_width: int, **keywords: Any) -> None:
        super().__init__()
        self.transformer, self.keywords = transformer.eval(), keywords
        self.register_buffer("text", torch.randn(1, TEXT, text_width))

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        count = latent.shape[0]
        (output,) = self.transformer(
            hidden_states=latent,
            encoder_hidden_states=self.text.expand(count, -1, -1),
            timestep=torch.full((count,), 500),
            return_dict=False,
            **self.keywords,
        )
        return output


@dataclass
class Case:
    model: Denoiser
    latent: torch.Tensor
    grid: Box
    is_joint: bool

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def reduce(self, **settings: Any) -> ReducedAttention:
        return reduce_attention(self.model.transformer, self.grid, AttentionReduction(**settings))

    def run(self, latent: torch.Tensor | None = None) -> torch.Tensor:
        with torch.no_grad():
            return self.model(self.latent if latent is None else latent)


def wan() -> Case:
    module = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=3, rope_max_seq_len=32,
    )  # fmt: skip
    return Case(Denoiser(module, 16), torch.randn(1, 4, 2, 12, 10), (2, 6, 5), False)


def cogvideox() -> Case:
    module = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=16, num_layers=3, sample_width=8, sample_height=8,
        sample_frames=9, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    rotary = get_3d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), 3)
    model = Denoiser(module, 16, image_rotary_emb=rotary)
    return Case(model, torch.randn(1, 3, 4, 8, 8), (3, 4, 4), True)


def ltx() -> Case:
    module = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=3, caption_channels=16,
    )  # fmt: skip
    model = Denoiser(
        module, 16, encoder_attention_mask=torch.ones(1, TEXT), num_frames=2, height=4, width=6
    )
    return Case(model, torch.randn(1, 48, 4), (2, 4, 6), False)


FAMILIES: dict[str, Callable[[], Case]] = {"wan": wan, "cogvideox": cogvideox, "ltx": ltx}


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return FAMILIES[request.param]()


class Calls(TorchFunctionMode):
    """Keeps query, key and value of every attention that is really computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.Tensor, ...]] = []

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            named = [kwargs[name] for name in ("query", "key", "value") if name in kwargs]
            self.seen.append(tuple(part.clone() for part in (*args[:3], *named)))
        return func(*args, **kwargs)


def attentions_of(case: Case) -> list[tuple[torch.Tensor, ...]]:
    with Calls() as calls:
        case.run()
    return calls.seen


def hooks_in(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) for part in module.modules())


def test_keeping_everything_installs_nothing(case: Case) -> None:
    expected, names = case.run(), [name for name, _ in case.model.named_modules()]
    result = case.reduce(keep_queries=1.0, keep_keys=1.0)
    assert result.blocks == ()
    assert result.num_queries == result.num_keys == case.num_tokens
    assert [name for name, _ in case.model.named_modules()] == names
    assert hooks_in(case.model) == 0
    assert not any("forward" in part.__dict__ for part in case.model.modules())
    assert torch.equal(case.run(), expected)


def test_chosen_blocks_attend_over_fewer_tokens(case: Case) -> None:
    expected, dense = case.run(), attentions_of(case)
    result = case.reduce(attention="plain")
    reduced = attentions_of(case)
    assert len(result.blocks) == 1
    assert result.blocks[0].endswith("blocks.1")
    assert 0.65 * case.num_tokens < result.num_queries < 0.75 * case.num_tokens
    assert 0.45 * case.num_tokens < result.num_keys < 0.55 * case.num_tokens
    text = TEXT if case.is_joint else 0
    lengths = [(query.shape[-2], key.shape[-2]) for query, key, _ in reduced]
    full = (case.num_tokens + text, case.num_tokens + text)
    fewer = (result.num_queries + text, result.num_keys + text)
    cross = [] if case.is_joint else [(case.num_tokens, TEXT)]
    # The first and the last block stay as they are, and so does attention to text.
    assert lengths == [full, *cross, fewer, *cross, full, *cross]
    assert [part.shape for part in dense[0]] == [part.shape for part in reduced[0]]
    assert all(torch.equal(*pair) for pair in zip(dense[0], reduced[0], strict=True))
    output = case.run()
    assert output.shape == expected.shape
    error = float((output - expected).norm() / expected.norm())
    assert 1e-5 < error < 0.1


def test_text_enters_the_attention_as_it_was() -> None:
    torch.manual_seed(0)
    case = cogvideox()
    dense = attentions_of(case)[1]
    case.reduce(attention="plain")
    reduced = attentions_of(case)[1]
    for before, after in zip(dense, reduced, strict=True):
        assert torch.equal(before[:, :, :TEXT], after[:, :, :TEXT])
        assert after.shape[2] < before.shape[2]


def test_queries_and_keys_are_reduced_apart(case: Case) -> None:
    self_attention = 1 if case.is_joint else 2
    text = TEXT if case.is_joint else 0
    for settings, index in (({"keep_keys": 1.0}, 0), ({"keep_queries": 1.0}, 1)):
        result = case.reduce(**settings, attention="plain")
        shapes = [part.shape[-2] - text for part in attentions_of(case)[self_attention]]
        assert shapes[index] == (result.num_queries, result.num_keys)[index] < case.num_tokens
        assert shapes[1 - index] == case.num_tokens
        remove_reduction(case.model.transformer)


def test_weighing_by_size_brings_the_output_closer(case: Case) -> None:
    expected = case.run()
    errors = {}
    for attention in ("plain", "proportional", "proportional_fused"):
        case.reduce(keep_queries=1.0, keep_keys=0.4, attention=attention)
        errors[attention] = float((case.run() - expected).norm())
        remove_reduction(case.model.transformer)
    assert errors["proportional"] == pytest.approx(errors["proportional_fused"], rel=1e-3)
    assert errors["proportional"] < errors["plain"]


def test_removal_leaves_no_trace(case: Case) -> None:
    expected, names = case.run(), [name for name, _ in case.model.named_modules()]
    state = set(case.model.state_dict())
    case.reduce()
    assert set(case.model.state_dict()) == state
    assert not torch.equal(case.run(), expected)
    remove_reduction(case.model.transformer)
    assert [name for name, _ in case.model.named_modules()] == names
    assert hooks_in(case.model) == 0
    assert torch.equal(case.run(), expected)
    remove_reduction(case.model.transformer)


def test_copies_are_independent(case: Case) -> None:
    dense = case.run()
    case.reduce()
    reduced = case.run()
    twin = copy.deepcopy(case)
    remove_reduction(case.model.transformer)
    assert torch.equal(case.run(), dense)
    assert torch.equal(twin.run(), reduced)
    with torch.no_grad():
        twin.model.transformer.get_parameter("proj_out.weight").zero_()
    assert not torch.equal(twin.run(), reduced)
    assert torch.equal(case.run(), dense)
    remove_reduction(twin.model.transformer)
    assert hooks_in(twin.model) == 0


def test_ranges_of_blocks_are_treated_one_by_one() -> None:
    torch.manual_seed(0)
    case = wan()
    first = case.reduce(first_block=0, last_block=1, keep_keys=0.7)
    second = case.reduce(first_block=1, last_block=None)
    assert (first.blocks, second.blocks) == (("blocks.0",), ("blocks.1", "blocks.2"))
    keys = [key.shape[-2] for _, key, _ in attentions_of(case)[::2]]
    assert keys == [first.num_keys, second.num_keys, second.num_keys]
    with pytest.raises(InputError, match=r"already reduced: blocks\.2\.attn1"):
        case.reduce(first_block=2, last_block=None)


def uniform(grid: Box, window: Box, *, text: int) -> tuple[torch.Tensor, ...]:
    """Query, key, value `[2, 3, text + N, 8]` that are equal inside each window."""
    windows = GridWindows(grid, window, window)
    count = windows.num_tokens
    parts = []
    for _ in range(3):
        of_window = torch.cat([
            torch.randn(2, 3, group.num_windows, 8).repeat_interleave(group.size, 2)
            for group in windows.groups
        ], 2)  # fmt: skip
        parts.append(torch.cat([torch.randn(2, 3, text, 8), windows.rearrange(of_window)], 2))
    assert parts[0].shape == (2, 3, text + count, 8)
    return tuple(parts)


@pytest.mark.parametrize("attention", ["proportional", "proportional_fused"])
@pytest.mark.parametrize("text", [0, 5])
def test_equal_tokens_of_a_window_merge_without_loss(attention: str, text: int) -> None:
    torch.manual_seed(0)
    # Windows of several sizes, so that weighing matters.
    grid, window = (3, 5, 6), (2, 4, 4)
    query, key, value = uniform(grid, window, text=text)
    merging = Merging(keep_queries=0.4, keep_keys=0.3, distance="euclidean", attention=attention)
    expected = functional.scaled_dot_product_attention(query, key, value, scale=0.7)
    windows = GridWindows(grid, window, (1, 2, 2))
    with Intercept("attention", windows, merging, text or None) as intercept:
        # Joined here as a processor does, which shows the order.
        parts = [torch.cat([part[:, :, :text], part[:, :, text:]], 2) for part in (query, key)]
        output = functional.scaled_dot_product_attention(*parts, value, scale=0.7)
    assert intercept.reduced
    assert torch.allclose(output, expected, atol=1e-6)


def test_text_after_the_video_is_found_too() -> None:
    torch.manual_seed(0)
    windows = GridWindows((2, 4, 4), (2, 4, 4), (1, 2, 2))
    merging = Merging(keep_queries=0.5, keep_keys=0.5, distance="euclidean", attention="plain")
    text, video = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 32, 8)
    outputs = []
    for parts in ([text, video], [video, text]):
        with Intercept("attention", windows, merging, 5):
            joined = torch.cat(parts, 2)
            outputs.append(functional.scaled_dot_product_attention(joined, joined, joined))
    assert torch.allclose(outputs[0][:, :, 5:], outputs[1][:, :, :32], atol=1e-6)
    assert torch.allclose(outputs[0][:, :, :5], outputs[1][:, :, 32:], atol=1e-6)
    joined = torch.cat([text, video], 2)
    with (
        Intercept("attention", windows, merging, 5),
        pytest.raises(InputError, match="where the 5 tokens of text stand among the 37"),
    ):
        functional.scaled_dot_product_attention(joined, joined, joined)


@pytest.mark.parametrize(
    ("keywords", "reason"),
    [
        ({"attn_mask": torch.zeros(32, 32)}, "has a mask"),
        ({"is_causal": True}, "is causal"),
        ({"dropout_p": 0.1}, "at random"),
    ],
)
def test_what_merged_tokens_cannot_obey_is_refused(keywords: dict[str, Any], reason: str) -> None:
    windows = GridWindows((2, 4, 4), (2, 4, 4), (1, 2, 2))
    merging = Merging(keep_queries=0.5, keep_keys=0.5, distance="euclidean", attention="plain")
    tokens = torch.randn(1, 2, 32, 8)
    with (
        Intercept("blocks.3.attn1", windows, merging, None),
        pytest.raises(InputError, match=rf"blocks\.3\.attn1 cannot be reduced: .*{reason}"),
    ):
        functional.scaled_dot_product_attention(tokens, tokens, tokens, **keywords)


def test_a_grid_that_does_not_fit_is_refused(case: Case) -> None:
    case.grid = (case.grid[0] + 1, *case.grid[1:])
    case.reduce()
    seen = 48 + TEXT if case.is_joint else case.num_tokens * (case.grid[0] - 1) // case.grid[0]
    with pytest.raises(InputError, match=rf"attends from {seen} over {seen} tokens, but the grid"):
        case.run()


def softmax_processor(
    attention: Any, hidden_states: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    """Attention without the fused function."""
    query, key = attention.to_q(hidden_states), attention.to_k(hidden_states)
    weights = (query @ key.transpose(1, 2)).softmax(-1)
    return attention.to_out[0](weights @ attention.to_v(hidden_states))


def test_attention_that_cannot_be_seen_is_refused() -> None:
    torch.manual_seed(0)
    case = wan()
    case.model.transformer.blocks[1].attn1.processor = softmax_processor
    case.run()
    case.reduce()
    with pytest.raises(InputError, match=r"blocks\.1\.attn1 \(WanAttention\) does not call scaled"):
        case.run()


class CrossAttending(nn.Module):
    """Blocks that read text alone."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4) for _ in range(3)
        )

    def forward(self, tokens: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            tokens = tokens + block(tokens, encoder_hidden_states=text)
        return tokens


def test_models_whose_attention_was_never_reduced_are_refused() -> None:
    module = CrossAttending()
    reduce_attention(module, (2, 4, 4), AttentionReduction())
    with pytest.raises(InputError, match=r"no self-attention over video tokens ran in blocks\.1;"):
        module(torch.randn(1, 32, 8), torch.randn(1, 5, 6))
    with pytest.raises(InputError, match="Sequential has no list of blocks with attention modules"):
        reduce_attention(nn.Sequential(nn.Linear(3, 3)), (2, 4, 4), AttentionReduction())


def test_attention_over_space_and_time_in_turn_is_refused() -> None:
    module = diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=3,
        cross_attention_dim=16, caption_channels=16, sample_size=8, patch_size=2, video_length=3,
        norm_type="ada_norm_single",
    ).eval()  # fmt: skip
    latent = torch.randn(1, 4, 3, 8, 8)
    text = torch.randn(1, TEXT, 16)
    reduce_attention(module, (3, 4, 4), AttentionReduction())
    with pytest.raises(InputError, match=r"from 16 over 16 tokens, .* space and time in turn"):
        module(latent, timestep=torch.tensor([5]), encoder_hidden_states=text)


def test_a_forward_that_was_covered_since_is_not_torn_out() -> None:
    torch.manual_seed(0)
    case = wan()
    case.reduce()
    attention = case.model.transformer.blocks[1].attn1
    reduced = attention.forward
    attention.forward = lambda *inputs, **keywords: reduced(*inputs, **keywords)
    expected = case.run()
    with pytest.raises(InputError, match=r"forward of blocks\.1\.attn1 was replaced after"):
        remove_reduction(case.model.transformer)
    assert torch.equal(case.run(), expected)
    attention.forward = reduced
    remove_reduction(case.model.transformer)


def test_what_covered_a_forward_before_comes_back() -> None:
    torch.manual_seed(0)
    case = wan()
    attention, count = case.model.transformer.blocks[1].attn1, []
    original = attention.forward

    def counting(*inputs: Any, **keywords: Any) -> Any:
        count.append(1)
        return original(*inputs, **keywords)

    attention.forward = counting
    dense = case.run()
    case.reduce()
    assert not torch.equal(case.run(), dense)
    assert len(count) == 2
    remove_reduction(case.model.transformer)
    assert attention.forward is counting


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"keep_keys": 0.2}, r"keep_keys must be from 0\.25, one token of each cell"),
        ({"keep_queries": 1.2}, "keep_queries must be from"),
        ({"keep_queries": float("nan")}, "keep_queries must be from"),
        ({"window": (2, 4)}, "window must be three numbers"),
        ({"cell": (1, 0, 2)}, "cell must be three numbers"),
        ({"cell": (4, 1, 1)}, r"cell must fit into window \(2, 4, 4\)"),
        ({"distance": "manhattan"}, "distance must be one of euclidean, cosine"),
        ({"attention": "fast"}, "attention must be one of plain,"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        AttentionReduction(**settings)


def test_settings_that_do_nothing_are_refused() -> None:
    torch.manual_seed(0)
    case = wan()
    # 0.9 of the four tokens of a window are rounded to all of them.
    with pytest.raises(InputError, match=r"keep_keys=0\.9 keeps all tokens of a window"):
        case.reduce(keep_keys=0.9, keep_queries=1.0, window=(1, 2, 2))
    with pytest.raises(InputError, match=r"blocks\[2:-1\] of 3 blocks are none"):
        case.reduce(first_block=2)
    with pytest.raises(InputError, match="grid must be three numbers"):
        reduce_attention(case.model.transformer, (6, 5), AttentionReduction())  # type: ignore[arg-type]
    assert hooks_in(case.model) == 0


def test_reduced_transformers_export_match_and_build(
    case: Case, tmp_path: Path, builds_in_tensorrt: Callable[..., None]
) -> None:
    import onnx

    from vcompress.export.graph import export_onnx
    from vcompress.export.runtime import open_session

    dense = copy.deepcopy(case)
    # Windows that divide the raster of LTX and cut those of the others unequally.
    case.reduce()
    path = tmp_path / "reduced.onnx"
    export_onnx(case.model, case.latent, path, dialect="portable", dynamic_batch=False)
    session = open_session(path)
    for seed in (1, 2):
        latent = torch.randn(case.latent.shape, generator=torch.Generator().manual_seed(seed))
        expected = case.run(latent)
        assert np.allclose(session.run(latent.numpy()), expected.numpy(), atol=1e-5)
        # Were the reduction lost on the way, this would be the difference.
        assert float((dense.run(latent) - expected).abs().max()) > 1e-3
    # Processors write their rotary positions in place, which scatters; nothing is added up so.
    builds_in_tensorrt(path, also=())
    # All attentions share one pair of index tensors.
    names = [tensor.name for tensor in onnx.load(path).graph.initializer]
    assert sum("attention_windows.order" in name for name in names) == 1


def test_compiled_transformers_step_around_it() -> None:
    torch.manual_seed(0)
    case = wan()
    case.reduce()
    expected = case.run()
    case.model.transformer.blocks[1].compile(backend="eager")
    assert torch.allclose(case.run(), expected, atol=1e-6)
