"What was measured, as rows of a table and as a figure."

import statistics
import sys
from pathlib import Path
from typing import Any

from jobs import Case

Result = dict[str, Any]  # the JSON line of one command, or its error
Row = dict[str, Any]  # a case's medians
Table = dict[str, list[Row]]  # by job, ours first

COLUMNS = (
    "job",
    "case",
    "per CPU s",
    "per s",
    "ours is faster by",
    "asked",
    "CPU s",
    "wall s",
    "peak MB",
    "ours of it",
    "positions (of needed)",
    "of the ceiling",
)


# ---- medians


def middle(results: list[Result], key: str) -> float:
    "The median of what all rounds say."
    return statistics.median(result.get(key, float("nan")) for result in results)


def ratios(own: list[Result], other: list[Result], key: str) -> list[float]:
    "Ours over the other's, within each round."
    return [mine[key] / theirs[key] for mine, theirs in zip(own, other, strict=True)]


def needed_share(own: Result, other: Result, ceiling: float) -> float | None:
    """Operations that the job needs, per CPU second of this case, over what the machine can do.
    The job is the same for all cases: what ours counted, for as many units.
    """
    if not own.get("operations"):
        return None
    needed = own["operations"] / own["n"] * other["n"]
    return needed / other["cpu_s"] / ceiling


def summary(case: Case, own: list[Result], other: list[Result], ceilings: Result) -> Row:
    "A case's medians, and those of ours over it within the rounds."
    good = [i for i in range(len(own)) if "per_cpu_s" in own[i] and "per_cpu_s" in other[i]]
    if not good:
        return dict(label=case.label, error=other[-1].get("error", "ours failed"))
    own = [own[i] for i in good]
    other = [other[i] for i in good]
    faster = ratios(own, other, "per_cpu_s")
    ceiling = ceilings[case.precision]
    return dict(
        label=case.label,
        unit=other[0]["unit"],
        per_cpu_s=middle(other, "per_cpu_s"),
        per_s=middle(other, "per_s"),
        cpu_s=middle(other, "cpu_s"),
        wall_s=middle(other, "wall_s"),
        peak=middle(other, "peak_rss_mb"),
        memory=statistics.median(ratios(own, other, "peak_rss_mb")),
        tokens=other[0].get("tokens"),
        needed=own[0].get("needed"),
        share=needed_share(
            own[0], dict(n=other[0]["n"], cpu_s=middle(other, "cpu_s")), ceiling
        ),
        ratio=statistics.median(faster),
        low=min(faster),
        high=max(faster),
        least=case.least,
        most_memory=case.memory,
    )


def summaries(cases: list[Case], results: list[list[Result]], ceilings: Result) -> list[Row]:
    "A row for each case; results: of each round, one per case."
    rows = []
    own = [row[0] for row in results]
    for i, case in enumerate(cases):
        rows.append(summary(case, own, [row[i] for row in results], ceilings))
    return rows


# ---- as text


def positions(row: Row) -> str:
    if not row["tokens"]:
        return ""
    share = f" ({row['tokens'] / row['needed']:.2f})" if row["needed"] else ""
    return f"{row['tokens']:,}{share}"


def asked(row: Row) -> str:
    found = [f"{row['least']:g}"] if row["least"] else []
    if row["most_memory"]:
        found.append(f"memory {row['most_memory']:g}")
    return ", ".join(found)


def cells(job: str, row: Row, own: bool) -> list[str]:
    "One line of the table."
    name = job if own else ""
    if "error" in row:
        said = row["error"].strip().splitlines() or ["no output"]
        return [name, row["label"], f"failed: {said[-1][:80]}", *[""] * (len(COLUMNS) - 3)]
    faster = f"**{row['ratio']:.2f}** ({row['low']:.2f} to {row['high']:.2f})"
    return [
        name,
        row["label"],
        f"{row['per_cpu_s']:.2f} {row['unit']}",
        f"{row['per_s']:.2f}",
        "" if own else faster,
        "" if own else asked(row),
        f"{row['cpu_s']:.1f}",
        f"{row['wall_s']:.1f}",
        f"{row['peak']:.0f}",
        "" if own else f"{row['memory']:.2f}",
        positions(row),
        f"{row['share']:.0%}" if row["share"] else "",
    ]


def line(words: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(words)} |"


def markdown(table: Table) -> str:
    "One row per case."
    lines = [line(COLUMNS), "|---" * len(COLUMNS) + "|"]
    for job, rows in table.items():
        for row in rows:
            lines.append(line(cells(job, row, own=row is rows[0])))
    return "\n".join(lines) + "\n"


# ---- as a figure


def compared(table: Table) -> list[tuple[str, Row]]:
    "Every peer with a ratio, and its name."
    found = []
    for job, rows in table.items():
        found += [(f"{job}: {row['label']}", row) for row in rows[1:] if "ratio" in row]
    return found


def bars(named: list[tuple[str, Row]]):
    "A bar per case, with the range of its rounds."
    import plotly.graph_objects as go

    rows = [row for _, row in named]
    spread = dict(
        type="data",
        symmetric=False,
        array=[row["high"] - row["ratio"] for row in rows],
        arrayminus=[row["ratio"] - row["low"] for row in rows],
    )
    return go.Bar(
        x=[row["ratio"] for row in rows],
        y=[name for name, _ in named],
        orientation="h",
        text=[f"{row['ratio']:.2f}x" for row in rows],
        textposition="inside",
        insidetextanchor="start",
        marker_color="#3b6fb6",
        name="measured",
        error_x=spread,
    )


def draw(table: Table, file: Path):
    "How much faster ours is."
    import plotly.graph_objects as go

    named = compared(table)[::-1]
    wanted = [(name, row["least"]) for name, row in named if row["least"]]
    fig = go.Figure(bars(named))
    fig.add_scatter(
        x=[least for _, least in wanted],
        y=[name for name, _ in wanted],
        mode="markers",
        marker=dict(symbol="line-ns-open", size=22, color="#c0392b", line_width=2),
        name="asked",
    )
    fig.add_vline(x=1, line_dash="dot")
    fig.update_layout(
        title="halos_nb per CPU second, over each peer",
        xaxis_title="times faster",
        template="plotly_white",
        width=900,
        height=110 + 30 * len(named),
        margin=dict(l=10, r=20, t=50, b=45),
        yaxis_automargin=True,
        legend=dict(orientation="h", x=1, xanchor="right", y=1, yanchor="bottom"),
    )
    page = file.with_suffix(".html")
    fig.write_html(page, include_plotlyjs="cdn")
    try:
        fig.write_image(file, scale=2)
    except Exception as e:
        said = f"no PNG ({type(e).__name__}: a browser draws it), only {page}"
        print(said, file=sys.stderr)
