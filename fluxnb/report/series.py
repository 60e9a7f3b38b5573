"""Rows as lines: settings that differ in their family's dial alone belong together, what sets more stands apart."""

from __future__ import annotations

import json

from fluxnb import families
from fluxnb.families import Family
from fluxnb.study.row import Row

OTHERS = "other settings"
_OF_THE_SUBJECT = ("dtype", "inputs")  # settings that no technique has


def dial(row: Row) -> float | None:
    """Where a row stands on its family's dial: the setting that is turned, or its steps; None without one."""
    name = families.named(row.family).dial
    return row.steps if name == "steps" else row.setting(name) if name else None


def beside(row: Row) -> dict[str, str]:
    """What a row sets besides its family's dial, each value as text."""
    left_out = (families.named(row.family).dial, *_OF_THE_SUBJECT)
    return {k: json.dumps(v, sort_keys=True).strip('"') for k, v in row.settings.items() if k not in left_out}


def lines(rows: list[Row]) -> dict[tuple[Family, str], list[Row]]:
    """(family, what is set besides the dial) -> its rows along the dial; each family's plain line, "", comes first.

    What all rows of a family share distinguishes none of them, so a solver is part of its family's plain line. A family
    without a dial has one entry with all its rows, from the most computed steps to the fewest.
    """
    found: dict[tuple[Family, str], list[Row]] = {}
    for family in dict.fromkeys(families.named(r.family) for r in rows):
        own = [r for r in rows if r.family == family.name]
        shared = set.intersection(*(set(beside(r).items()) for r in own))
        groups: dict[str, list[Row]] = {}
        for row in own:
            more = sorted(set(beside(row).items()) - shared) if family.dial else []
            groups.setdefault(", ".join(_words(*item) for item in more), []).append(row)
        for words in sorted(groups):
            found[family, words] = sorted(groups[words], key=_place)
    return found


def _words(name: str, value: str) -> str:
    name = name.replace("_", " ")
    return value if name in value else f"{name} {value}"


def _place(row: Row) -> tuple:
    return (dial(row) is None, dial(row) or 0, -(row.computed_steps or 0))
