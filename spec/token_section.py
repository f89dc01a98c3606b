"""The section `tokens` of a plan: in front of which blocks tokens are reduced, how, to how many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from vcompress.spec.errors import InputError
from vcompress.spec.strict_json import check_keys

__all__ = ["ATTENTIONS", "TokenSection", "TokenSite"]

# How attention treats a token that stands for several patches.
ATTENTIONS = MappingProxyType({
    "plain": "like any other",
    "proportional": "its score plus the logarithm of its size, as a mask",
    "proportional_fused": "the same through one more channel of query and key, without a mask",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TokenSite:
    """One reduction.

    Attributes:
        technique: a name in `compress.tokens.techniques.TECHNIQUES`.
        keep: patch tokens of a clip that are left, and that the block sees.
    """

    technique: str
    keep: int


@dataclass(frozen=True, kw_only=True)
class TokenSection:
    """Token reduction. Class tokens and registers are never touched and not counted here.

    Attributes:
        attention: a name in `ATTENTIONS`.
        num_patches: patch tokens of a clip that enter the first block.
        sites: by the full name of the block that sees the result.
        readout: full name of the last linear if it is refitted to the reduced features, with
            weights from the tensors file; None to leave it as it is.
    """

    attention: str
    num_patches: int
    sites: Mapping[str, TokenSite]
    readout: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "attention": self.attention,
            "num_patches": self.num_patches,
            "sites": {
                block: {"technique": site.technique, "keep": site.keep}
                for block, site in self.sites.items()
            },
            "readout": self.readout,
        }

    @classmethod
    def from_dict(cls, data: Any) -> TokenSection:
        """Read the section; everything that is wrong is an `InputError`."""
        check_keys(data, required=("attention", "num_patches", "sites", "readout"), where="tokens")
        if data["readout"] is not None and not isinstance(data["readout"], str):
            message = f"tokens.readout must be the name of a layer or null, got {data['readout']!r}"
            raise InputError(message)
        if data["attention"] not in ATTENTIONS:
            message = (
                f"tokens.attention must be one of {', '.join(ATTENTIONS)}, got "
                f"{data['attention']!r}"
            )
            raise InputError(message)
        if not isinstance(data["sites"], dict):
            message = "tokens.sites must be an object of block name -> {technique, keep}"
            raise InputError(message)
        num_patches = _count(data["num_patches"], "tokens.num_patches")
        sites = {}
        for block, site in data["sites"].items():
            where = f"tokens.sites.{block}"
            check_keys(site, required=("technique", "keep"), where=where)
            if not isinstance(site["technique"], str):
                message = f"{where}.technique must be a string, got {site['technique']!r}"
                raise InputError(message)
            keep = _count(site["keep"], f"{where}.keep")
            sites[block] = TokenSite(technique=site["technique"], keep=keep)
        return cls(
            attention=data["attention"], num_patches=num_patches, sites=sites,
            readout=data["readout"],
        )  # fmt: skip


def _count(value: Any, where: str) -> int:
    # JSON's true is an integer for Python.
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        message = f"{where} must be an integer >= 1, got {value!r}"
        raise InputError(message)
    return value
