"""What precisions and token schedules are searched under."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Budget", "BudgetKind"]

BudgetKind = Literal[
    "effective_bits", "weight_bytes", "flop_share", "latency_share", "drop_points", "sqnr_db"
]


@dataclass(frozen=True)
class Budget:
    """A limit: of cost, under which the loss is made small, or of quality, under which the size is.

    Attributes:
        kind: "effective_bits" a weight, on average over the layers that are decided;
            "weight_bytes" of the whole model; "flop_share", operations as a share of those without
            token reduction; "latency_share", time as a share of the float model's, both by a
            latency table; "drop_points" of top-1; "sqnr_db" of the outputs, at least.
        limit: in the unit that the kind names.
    """

    kind: BudgetKind
    limit: float
