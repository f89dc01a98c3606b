"""Precision that changes from step to step: inputs of four bits where a block is predicted calm."""

from vcompress.compress.dynamic.executor import DynamicPrecision, apply_dynamic
from vcompress.compress.dynamic.tally import PrecisionReport
from vcompress.spec.dynamic_section import DynamicSection, ErrorLine

__all__ = ["DynamicPrecision", "DynamicSection", "ErrorLine", "PrecisionReport", "apply_dynamic"]
