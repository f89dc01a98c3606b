"""What the search for formats saw: predicted loss against bits, and where the plan stands on it."""

from __future__ import annotations

import math
from typing import Any

from vcompress.validate.report_types import Report
from vcompress.validate.wording import fixed, short

__all__ = ["search_view"]

_LOSSES = {
    "kl_nats": "KL divergence from the baseline, in nats",
    "squared_relative_error": "squared error over the output's energy",
}
_MOST_X_TICKS = 8
# As a multiple of those of the plan.
_MOST_BITS = 2


def search_view(report: Report) -> dict[str, Any] | None:
    """Positions in percent of the drawing; None where nothing was searched, or there is no choice.

    Losses are drawn by their logarithm; what loses nothing has none and is left out.
    """
    search = report.get("search")
    if search is None:
        return None
    # Layers in float take 32 bits and lose nothing: far from where plans are.
    last = _MOST_BITS * search["bits"]
    points = [(bits, loss) for bits, loss in search["points"] if loss > 0 and bits <= last]
    if len(points) < 2:
        return None
    chosen = (search["bits"], max(search["predicted_loss"], 1e-30))
    across = [bits for bits, _ in (*points, chosen)]
    left, right = min(across), max(across)
    low = math.floor(math.log10(min(loss for _, loss in (*points, chosen))))
    high = math.ceil(math.log10(max(loss for _, loss in (*points, chosen))))
    width, height = max(right - left, 1e-9), max(high - low, 1)

    def x(bits: float) -> float:
        return round(100 * (bits - left) / width, 2)

    def y(loss: float) -> float:
        return round(100 * (high - math.log10(loss)) / height, 2)

    step = max(1, math.ceil(width / _MOST_X_TICKS))
    bits = range(math.ceil(left), math.floor(right) + 1, step)
    measured = search["calibration_loss"]
    return {
        "loss": _LOSSES.get(search["loss"], search["loss"]),
        "path": "M" + "L".join(f"{x(bit)} {y(loss)}" for bit, loss in points),
        "chosen": f"M{x(chosen[0])} {y(chosen[1])}h0",
        "bits": fixed(chosen[0], 2),
        "predicted": short(chosen[1]),
        "measured": None if measured is None else short(measured),
        "rows": [{"at": y(10.0**power), "text": f"1e{power}"} for power in range(low, high + 1)],
        "columns": [{"at": x(tick), "text": str(tick)} for tick in bits],
    }
