"""What a person or a program sees of a profile."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vcompress.pipeline.profile_artifact import ProfilePair
    from vcompress.validate.profile import Profile

__all__ = ["print_profile", "print_profile_pair"]

_NAME = 44


def print_profile(found: Profile, *, num_layers: int, as_json: bool) -> None:
    """Classes, the longest layers, and what techniques could do."""
    if as_json:
        print(json.dumps(found.as_dict(), allow_nan=False))
        return
    total = found.profiled_seconds
    print(
        f"{found.model}: {1e3 * found.measured_seconds:.2f} ms a call of {found.batch_size}, "
        f"{found.threads} threads, {found.runtime}, {found.device['cpu']}"
    )
    watched = total / found.measured_seconds - 1
    print(f"{1e3 * total:.2f} ms while watched ({watched:+.1%}), of which\n")
    for name, seconds in found.classes.items():
        print(f"  {name:<22}{1e3 * seconds:>10.2f} ms {seconds / total:>7.1%}")
    rest = ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in found.operators.items())
    print(f"\nthe rest: {rest}")
    if num_layers:
        print(
            f"\n{'layer':<{_NAME}}{'class':<20}{'tokens':>8}{'GFLOP':>9}{'FLOP/byte':>11}{'ms':>9}"
        )
    for layer in sorted(found.layers, key=lambda each: -each.seconds)[:num_layers]:
        # The end of a name says more than its beginning.
        name = layer.name if len(layer.name) < _NAME else f"...{layer.name[4 - _NAME :]}"
        print(
            f"{name or '(the model itself)':<{_NAME}}{layer.kind:<20}{layer.tokens:>8}"
            f"{layer.operations / 1e9:>9.3f}{layer.intensity:>11.1f}{1e3 * layer.seconds:>9.2f}"
        )
    print(f"\n{'technique':<36}{'acts on':>8}{'up to':>8}{'limit':>8}  where")
    for each in found.ceilings:
        limit = f"{each.limit:.1f}x" if each.limit < 1000 else "-"
        print(
            f"{each.technique:<36}{each.share:>8.1%}{each.speedup:>7.2f}x{limit:>8}  {each.assumed}"
        )


def print_profile_pair(found: ProfilePair, *, as_json: bool) -> None:
    """Classes before and after, and what each gained."""
    if as_json:
        print(json.dumps(found.as_dict(), allow_nan=False))
        return
    totals = sum(found.before.values()), sum(found.after.values())
    print(
        f"{found.artifact}: {1e3 * found.measured_after:.2f} ms a call of {found.batch_size}, "
        f"{1e3 * found.measured_before:.2f} ms before ({found.speed_ratio:.2f}x), "
        f"{found.threads} threads, {found.runtime}, {found.device['cpu']}\n"
        f"while watched, kernel by kernel, {1e3 * totals[1]:.2f} ms and {1e3 * totals[0]:.2f} ms "
        "before, of which\n"
    )
    print(f"  {'':<20}{'before ms':>11}{'share':>8}{'after ms':>11}{'share':>8}{'saved ms':>11}")
    for name, before in found.before.items():
        after = found.after[name]
        if before or after:
            print(
                f"  {name:<20}{1e3 * before:>11.2f}{before / totals[0]:>8.1%}{1e3 * after:>11.2f}"
                f"{after / totals[1]:>8.1%}{1e3 * (before - after):>11.2f}"
            )
