"The lines of `bench/gpu.py` as a table: of each case and side the fastest setting."

import json
from pathlib import Path
from typing import Any

from tables import line

Line = dict[str, Any]
COLUMNS = (
    "case",
    "who",
    "setting (fastest of those tried)",
    "per second",
    "ours is faster by",
    "peak MB",
    "ours of it",
    "positions (of needed)",
    "of the ceiling",
    "off by",
)
OURS = ("halos_nb", "flex")  # the side that is compared with the others


def by_case(lines: list[Line]) -> dict[str, dict[str, list[Line]]]:
    "Lines of each side of each case, in the order they came."
    found: dict[str, dict[str, list[Line]]] = {}
    for one in lines:
        if one["side"]:
            found.setdefault(one["case"], {}).setdefault(one["side"], []).append(one)
    return found


def best(lines: list[Line]) -> Line:
    "The fastest, or the first error."
    good = [one for one in lines if "per_s" in one]
    return max(good, key=lambda one: one["per_s"]) if good else lines[0]


def share(own: Line, other: Line, ceiling: float | None) -> str:
    "Operations that the units need, by ours' count, over what the device can do."
    if not ceiling or "operations" not in own:
        return ""
    return f"{own['operations'] / own['n'] * other['per_s'] / ceiling:.0%}"


def positions(own: Line, other: Line) -> str:
    if not other.get("positions"):
        return ""
    needed = own.get("needed", 0) / own["n"] * other["n"]
    told = f" ({other['positions'] / needed:.2f})" if needed else ""
    return f"{other['positions']:,}{told}"


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def cells(case: str, own: Line, other: Line, tried: int, ceiling: float | None) -> list[str]:
    "One row."
    start = [case if other is own else "", other["side"]]
    if "error" in other:
        said = " ".join(other["error"].split())[:160]
        return [*start, f"failed: {said}", *[""] * (len(COLUMNS) - 3)]
    setting = (
        f"{other.get('variant', '')} (of {tried})" if tried > 1 else other.get("variant", "")
    )
    compared = other is not own and "per_s" in own and "per_s" in other
    faster = f"**{own['per_s'] / other['per_s']:.2f}**" if compared else ""
    memory = ""
    if compared and own.get("peak_mb") and other.get("peak_mb"):
        memory = f"{own['peak_mb'] / other['peak_mb']:.2f}"
    counted = "per_s" in other
    return [
        *start,
        setting,
        f"{other['per_s']:,.1f} {other['unit']}" if counted else "",
        faster,
        number(other.get("peak_mb"), ",.0f"),
        memory,
        positions(own, other) if "n" in own else "",
        share(own, other, ceiling) if counted and "n" in own else "",
        number(other.get("off"), ".1e"),
    ]


def rows(lines: list[Line]) -> list[list[str]]:
    "Of all cases; the ceiling first."
    ceiling = next((one["per_s"] for one in lines if one["case"] == "ceiling"), None)
    found = []
    for case, sides in by_case(lines).items():
        order = sorted(sides, key=lambda side: side not in OURS)
        own = best(sides[order[0]])
        for side in order:
            other = own if side == order[0] else best(sides[side])
            found.append(cells(case, own, other, len(sides[side]), ceiling))
    return found


def not_whole(lines: list[Line]) -> list[str]:
    "What went wrong with a process, and what was not begun."
    found = []
    for one in lines:
        if not one["side"] and "error" in one:
            found.append(f"- {one['case']}: {' '.join(one['error'].split())[-300:]}")
    return found


def write_table(results: Path, file: Path, about: str):
    "What is known by now."
    lines = [json.loads(text) for text in results.read_text().splitlines()]
    text = [about, "", line(COLUMNS), "|---" * len(COLUMNS) + "|"]
    text += [line(row) for row in rows(lines)]
    wrong = not_whole(lines)
    text += ["", "Not whole:", "", *wrong] if wrong else []
    file.write_text("\n".join(text) + "\n")
