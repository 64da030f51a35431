"""Every job of ours beside its peers in one run, alternated; a table and a figure for the
README: `make bench`, or `python bench/run.py --only dpo --n 32`.

Each case is a process of its own. Rounds go forwards and backwards through a job's cases, and a
ratio is taken within a round, per CPU second of one thread,
so that what else the machine does at that time falls out. Peers run in an environment with trl
(--trl), with the scripts of ../shared/peers where they are
present and with bench/peers.py elsewhere. What was asked for stands beside each ratio.
"""

import argparse, json, os, shlex, statistics, subprocess, sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1] / "shared/peers"


class Case(NamedTuple):
    "One command; `peer` commands run in TRL's environment."

    label: str
    command: str
    peer: bool = False
    least: float | None = None  # times this case ours should be at least


def ours(script: str, token_budget: int = 1024, **options) -> str:
    "A command of ours; a CPU is fastest with about a thousand tokens per forward pass."
    if token_budget:
        options["token_budget"] = token_budget
    return f"{HERE / script}.py " + " ".join(
        f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in options.items()
    )


def peer(job: str, preset: str, model: str, data: str, n: int) -> str:
    "A peer's command: the shared script, or our own."
    file = f"--samples {data}" if job == "label" else f"--pairs {data}"
    if not SHARED.is_dir():
        return (
            f"{HERE / 'peers.py'} --job {job} --preset {preset} --model {model} {file} --n {n}"
        )
    return (
        f"{SHARED / ('label_transformers' if job == 'label' else f'trl_{job}')}.py --model "
        f"{model} {file} --n {n} {'--mode' if job == 'label' else '--preset'} {preset}"
    )


def jobs(inputs: Path, n: int) -> dict[str, list[Case]]:
    "Ours is the first case of each job; what the others are compared with."
    P, S, LP, LS, small, big, rm1, rm2 = (
        inputs / x
        for x in (
            "pairs.jsonl",
            "samples.json",
            "long_pairs.jsonl",
            "long_samples.json",
            "small",
            "big",
            "rm1",
            "rm2",
        )
    )
    trl = lambda job, model, least_best, least_default, n=n: [
        Case("TRL best settings", peer(job, "best_fp32", model, P, n), True, least_best),
        Case("TRL defaults (bf16)", peer(job, "default", model, P, n), True, least_default),
    ]
    lone = dict(no_share=True)
    return {
        "reward model": [
            Case("halos_nb", ours("reward_model", model=rm2, pairs=P, n=n)),
            *trl("rm", rm1, 1.5, 2.5),
        ],
        "reward model bf16": [
            Case(
                "halos_nb", ours("reward_model", model=rm2, pairs=P, n=n, precision="bfloat16")
            ),
            Case("TRL best settings", peer("rm", "best_bf16", rm1, P, n), True, 1.5),
            Case("TRL defaults (bf16)", peer("rm", "default", rm1, P, n), True, 2.5),
        ],
        "DPO": [
            Case("halos_nb", ours("dpo", model=small, pairs=P, n=n)),
            *trl("dpo", small, 2.4, 4.5),
        ],
        "DPO bf16": [
            Case("halos_nb", ours("dpo", model=small, pairs=P, n=n, precision="bfloat16")),
            Case("TRL best settings", peer("dpo", "best_bf16", small, P, n), True, 2.4),
            Case("TRL defaults (bf16)", peer("dpo", "default", small, P, n), True, 4.5),
        ],
        "DPO 64k vocabulary": [
            Case("halos_nb", ours("dpo", model=big, pairs=P, n=n // 2, batch=8)),
            Case("TRL best settings", peer("dpo", "best_fp32", big, P, n // 2), True, 3.0),
        ],
        "labelling": [
            Case("halos_nb", ours("label", token_budget=0, model=rm2, samples=S, n=8 * n)),
            Case("padded batch of 16", peer("label", "batch", rm1, S, 8 * n), True, 2.8),
            Case("TRL predict", peer("label", "trl_predict", rm1, S, 8 * n), True, 1.8),
        ],
        "sampling": [
            Case("halos_nb", ours("sample", token_budget=0, model=small, pairs=P, n=n)),
            Case(
                "transformers generate",
                ours("sample", token_budget=0, model=small, pairs=P, n=n, way="transformers"),
            ),
        ],
        "reward model long prompts": [
            Case(
                "halos_nb",
                ours("reward_model", model=rm2, pairs=LP, n=n, max_prompt_length=800),
            ),
            Case(
                "prompt not shared",
                ours("reward_model", model=rm2, pairs=LP, n=n, max_prompt_length=800, **lone),
                least=1.4,
            ),
        ],
        "labelling long prompts": [
            Case("halos_nb", ours("label", token_budget=0, model=rm2, samples=LS, n=4 * n)),
            Case(
                "prompt not shared",
                ours("label", token_budget=0, model=rm2, samples=LS, n=4 * n, **lone),
                least=2.0,
            ),
        ],
    }


def measure(case: Case, trl: str, timeout: int) -> dict:
    "The JSON line of a case, or its error."
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        p = subprocess.run(
            [trl if case.peer else sys.executable, *shlex.split(case.command)],
            env=env,
            cwd=HERE.parent,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return dict(error=f"no result in {timeout} s")
    lines = [x for x in p.stdout.splitlines() if x.startswith("{") and '"per_cpu_s"' in x]
    return json.loads(lines[-1]) if lines else dict(error=(p.stderr or p.stdout)[-600:])


def alternate(
    cases: list[Case], rounds: int, trl: str, timeout: int, out: Path, job: str
) -> list[list[dict]]:
    "Results of each round, one per case."
    results = []
    for r in range(rounds):
        row = {}
        for case in cases[::-1] if r % 2 else cases:
            row[case.label] = got = measure(case, trl, timeout)
            with open(out, "a") as f:
                f.write(
                    json.dumps(
                        dict(job=job, label=case.label, round=r, load=os.getloadavg()[0]) | got
                    )
                    + "\n"
                )
            print(
                f"  {job}: {case.label}, round {r + 1}: "
                + (
                    f"{got['per_cpu_s']:.2f} {got['unit']} per CPU second"
                    if "per_cpu_s" in got
                    else got["error"]
                ),
                file=sys.stderr,
                flush=True,
            )
        results.append([row[c.label] for c in cases])
    return results


def summary(cases: list[Case], results: list[list[dict]]) -> list[dict]:
    "Medians of each case, and of ours over it within the rounds."
    rows = []
    for i, case in enumerate(cases):
        good = [r for r in results if "per_cpu_s" in r[0] and "per_cpu_s" in r[i]]
        middle = lambda key, i=i, good=good: statistics.median(
            r[i].get(key, float("nan")) for r in good
        )
        if not good:
            rows.append(
                dict(label=case.label, error=results[-1][i].get("error", "ours failed"))
            )
            continue
        ratios = [r[0]["per_cpu_s"] / r[i]["per_cpu_s"] for r in good]
        rows.append(
            dict(
                label=case.label,
                unit=good[0][i]["unit"],
                per_cpu_s=middle("per_cpu_s"),
                per_s=middle("per_s"),
                cpu_s=middle("cpu_s"),
                wall_s=middle("wall_s"),
                peak=middle("peak_rss_mb"),
                tokens=good[0][i].get("tokens"),
                needed=good[0][0].get("needed"),
                ratio=statistics.median(ratios),
                low=min(ratios),
                high=max(ratios),
                least=case.least,
            )
        )
    return rows


def markdown(table: dict[str, list[dict]]) -> str:
    "One row per case."
    head = (
        "| job | case | per CPU s | per s | ours is faster by | asked | CPU s | wall s | "
        "peak MB | positions computed (of needed) "
        "|\n|---|---|---|---|---|---|---|---|---|---|\n"
    )

    def row(job, r):
        if "error" in r:
            said = r["error"].strip().splitlines() or ["no output"]
            return f"| {job} | {r['label']} | failed: {said[-1][:80]} | | | | | | | |"
        own, tokens = (
            r is table[job][0],
            f"{r['tokens']:,}" + (f" ({r['tokens'] / r['needed']:.2f})" if r["needed"] else "")
            if r["tokens"]
            else "",
        )
        return (
            (
                f"| {job if own else ''} | {r['label']} | {r['per_cpu_s']:.2f} {r['unit']} | "
                f"{r['per_s']:.2f} | "
            )
            + ("" if own else f"**{r['ratio']:.2f}** ({r['low']:.2f} to {r['high']:.2f})")
            + (
                f" | {'' if not r['least'] else r['least']} | {r['cpu_s']:.1f} | "
                f"{r['wall_s']:.1f} | {r['peak']:.0f} | {tokens} |"
            )
        )

    return head + "\n".join(row(job, r) for job, rows in table.items() for r in rows) + "\n"


def draw(table: dict[str, list[dict]], file: Path):
    "A bar per case: how much faster ours is."
    import plotly.graph_objects as go

    rows = [
        (f"{job}: {r['label']}", r) for job, rs in table.items() for r in rs[1:] if "ratio" in r
    ][::-1]
    names, ratios = [n for n, _ in rows], [r["ratio"] for _, r in rows]
    fig = go.Figure(
        go.Bar(
            x=ratios,
            y=names,
            orientation="h",
            text=[f"{x:.2f}x" for x in ratios],
            textposition="inside",
            insidetextanchor="start",
            marker_color="#3b6fb6",
            name="measured",
            error_x=dict(
                type="data",
                symmetric=False,
                array=[r["high"] - r["ratio"] for _, r in rows],
                arrayminus=[r["ratio"] - r["low"] for _, r in rows],
            ),
        )
    )
    asked = [(n, r["least"]) for n, r in rows if r["least"]]
    fig.add_scatter(
        x=[x for _, x in asked],
        y=[n for n, _ in asked],
        mode="markers",
        marker=dict(symbol="line-ns-open", size=22, color="#c0392b", line_width=2),
        name="asked",
    )
    fig.add_vline(x=1, line_dash="dot").update_layout(
        title="halos_nb per CPU second, over each peer",
        xaxis_title="times faster",
        template="plotly_white",
        width=900,
        height=110 + 30 * len(rows),
        margin=dict(l=10, r=20, t=50, b=45),
        yaxis_automargin=True,
        legend=dict(orientation="h", x=1, xanchor="right", y=1, yanchor="bottom"),
    )
    fig.write_html(file.with_suffix(".html"), include_plotlyjs="cdn")
    try:
        fig.write_image(file, scale=2)
    except Exception as e:
        print(
            (
                f"no PNG ({type(e).__name__}: a browser draws it), only "
                f"{file.with_suffix('.html')}"
            ),
            file=sys.stderr,
        )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--n", type=int, default=32, help="pairs; labelling takes 8 times as many samples"
    )
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument(
        "--only",
        default="",
        help="jobs whose name begins with one of these, set apart by commas",
    )
    p.add_argument(
        "--trl",
        default=str(HERE.parent / "build/trl-venv/bin/python"),
        help="Python of an environment with trl",
    )
    p.add_argument("--out", type=Path, default=HERE.parent / "build/bench")
    p.add_argument("--timeout", type=int, default=1800, help="seconds for one case")
    a = p.parse_args()
    inputs, a.out = a.out / "inputs", a.out.resolve()
    if not (inputs / "source.txt").exists():
        subprocess.run([sys.executable, HERE / "inputs.py", inputs], check=True)
    if not Path(a.trl).exists():
        print(
            (
                f"no TRL at {a.trl}: `make build/trl-venv/installed` makes it; until then "
                "ours is measured alone"
            ),
            file=sys.stderr,
        )
    chosen, table = (
        {
            j: cs
            for j, cs in jobs(inputs.resolve(), a.n).items()
            if not a.only or j.startswith(tuple(a.only.split(",")))
        },
        {},
    )
    if not chosen:
        raise SystemExit(
            f"--only {a.only}: no such job; there are {', '.join(jobs(inputs, a.n))}"
        )
    for job, cases in chosen.items():
        cases = [c for c in cases if not c.peer or Path(a.trl).exists()]
        table[job] = summary(
            cases, alternate(cases, a.rounds, a.trl, a.timeout, a.out / "results.jsonl", job)
        )
        (a.out / "table.md").write_text(
            f"Texts: {(inputs / 'source.txt').read_text()}; {a.n} pairs, medians of "
            f"{a.rounds} rounds, one thread, {os.cpu_count()} CPUs.\n\n{markdown(table)}"
        )
        (a.out / "table.json").write_text(json.dumps(table))
    draw(table, a.out / "bench.png")
    print((a.out / "table.md").read_text())


if __name__ == "__main__":
    main()
