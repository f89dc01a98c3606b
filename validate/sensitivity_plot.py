"""A picture of what each layer costs in each format."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from vcompress.spec.errors import MissingCapabilityError

__all__ = ["plot_sensitivities"]

_INCHES_PER_LAYER = 0.18
_LABEL_CHARACTERS = 48
_UNITS = {
    "kl_nats": "loss with this layer alone in the format, KL in nats",
    "squared_relative_error": "loss with this layer alone in the format, squared relative error",
}


def plot_sensitivities(
    losses: Mapping[str, Mapping[str, float]], loss_name: str, title: str, path: Path
) -> None:
    """Draw `losses` (layer -> format -> loss) as lines over the layers into the PNG `path`.

    The most sensitive layers stand out to the right, on a logarithmic axis; layers are in the
    order of the model, from the top.

    Raises:
        MissingCapabilityError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "the plot needs matplotlib: pip install 'vcompress-ai[plots]'"
        raise MissingCapabilityError(message) from error
    names = list(losses)
    formats = list(dict.fromkeys(name for each in losses.values() for name in each))
    figure = Figure(figsize=(9, 1.6 + _INCHES_PER_LAYER * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for format_name in formats:
        points = [
            (losses[name][format_name], index)
            for index, name in enumerate(names)
            if losses[name].get(format_name, 0) > 0 and math.isfinite(losses[name][format_name])
        ]
        axes.plot(
            [x for x, _ in points], [y for _, y in points], marker="o", markersize=4,
            linewidth=0.8, label=format_name,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), [_shortened(name) for name in names], fontsize=7)
    axes.set_ylim(max(1, len(names)) - 0.5, -0.5)
    axes.grid(visible=True, axis="both", linewidth=0.3)
    axes.set_xlabel(_UNITS.get(loss_name, loss_name))
    axes.set_title(title)
    if formats:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, dpi=130, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _shortened(name: str) -> str:
    return name if len(name) <= _LABEL_CHARACTERS else f"...{name[3 - _LABEL_CHARACTERS :]}"
