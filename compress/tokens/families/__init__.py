"""What some families need beyond hooks and an exchanged attention, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from vcompress.compress.tokens.families import attention_pooling, divided, rotary
from vcompress.compress.tokens.families.base import Family

__all__ = ["FAMILIES", "Family"]

FAMILIES: Mapping[str, Family] = MappingProxyType({
    "siglip_vision_model": attention_pooling.SIGLIP,
    "timesformer": divided.TIMESFORMER,
    "vjepa2": rotary.VJEPA2,
})  # fmt: skip
