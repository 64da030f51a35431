"""How a training pass (forward and backward over one batch of log-probabilities) costs, against
everything that makes it dear: `python bench/scaling.py`.

One thing is varied at a time around a pair of answers of 256 tokens to a prompt of 128. `tree`
shares the prompt, `plain` is one padded row per answer.
Two processes: the DPO run of dpo.py with one and with two, beside two jobs of one process at
once (what two cores can do at most) and beside TRL, alternated, wall seconds; on cores that
others use this says little.
"""

import argparse, json, os, random, statistics, subprocess, sys, time
from pathlib import Path

from jobs import known_peer, ours

HERE = Path(__file__).resolve().parent
BASE = dict(answer=256, prompt=128, k=2, vocabulary=8192, trees=1)
AXES = dict(
    answer=(64, 256, 512, 1024),
    prompt=(0, 128, 256, 768),
    k=(1, 2, 4, 8),
    vocabulary=(8192, 32768, 131072),
    trees=(1, 2, 4, 8),
)


def seconds(
    model, layout: str, answer, prompt, k, vocabulary, trees, repeats: int = 3
) -> float:
    """CPU seconds of one pass over answers whose lengths differ by up to a half; the best of a
    few.
    """
    from halos_nb.trees import Tree, make_batch

    rng = random.Random(0)
    ids = lambda n: [rng.randrange(5, vocabulary) for _ in range(n)]
    batch, best = (
        make_batch(
            [
                Tree(
                    ids(prompt + 1),
                    [ids(int(answer * rng.uniform(0.75, 1.25))) for _ in range(k)],
                    ["sample"] * k,
                    [0] * k,
                )
                for _ in range(trees)
            ],
            layout,
        ),
        float("inf"),
    )
    for _ in range(repeats + 1):
        start = time.process_time()
        model(tree=batch).logps.sum().backward()
        best = min(best, time.process_time() - start)
    return best


def policy(vocabulary: int):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from halos_nb.models import TreePolicy, mix_in

    torch.manual_seed(0)
    return mix_in(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=256,
                intermediate_size=768,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=8192,
            )
        ),
        TreePolicy,
    )


def sweep(repeats: int):
    "(what is varied, its value, CPU seconds shared, CPU seconds plain) of each point."
    import torch

    torch.set_num_threads(1)
    for axis, values in AXES.items():
        for v in values:
            point = BASE | {axis: v}
            model = policy(point["vocabulary"])
            yield (
                axis,
                v,
                *(
                    seconds(model, layout, **point, repeats=repeats)
                    for layout in ("tree", "plain")
                ),
            )


LAUNCH = (
    "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
    "--mixed_precision no --dynamo_backend no --num_cpu_threads_per_process 1 "
    "--main_process_port 0"
).split()


def dpo(inputs: Path, n: int, trl: str, world: int) -> list[str]:
    "The command of a DPO run of `n` pairs, 16 a step: of ours, or of TRL with this Python."
    words = [sys.executable, *ours("dpo", model=inputs / "small", pairs="PAIRS", n=n).split()]
    if trl:
        job = known_peer(
            "dpo",
            "best_fp32",
            model=inputs / "small",
            pairs="PAIRS",
            n=n,
            batch=16 // world,
        )
        words = [trl, *job.split()]
    words[words.index("PAIRS")] = str(inputs / "pairs.jsonl")
    return words if world == 1 else [words[0], *LAUNCH, *words[1:]]


def run_together(commands: list[list[str]]) -> float:
    "Items per second of wall time of jobs that are started at once, all together."
    env = dict(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    jobs = [subprocess.Popen(c, env=os.environ | env, **pipes) for c in commands]
    total = 0.0
    for said, errors in [job.communicate() for job in jobs]:
        lines = [line for line in said.splitlines() if '"per_s"' in line]
        if not lines:
            raise SystemExit(f"{' '.join(commands[0][1:4])}: {errors[-800:]}")
        total += json.loads(lines[-1])["per_s"]
    return total


def processes(inputs: Path, n: int, rounds: int, trl: str) -> list[tuple[str, float, str]]:
    """(case, median pairs per second of wall time, times one process) of DPO runs, alternated.

    Two jobs that know nothing of each other, at once, are what two cores can do at most.
    """
    one = dpo(inputs, n, "", 1)
    cases = {
        "one process": [one],
        "two processes": [dpo(inputs, n, "", 2)],
        "two jobs of one process at once": [one, one],
    }
    if Path(trl).exists():
        cases |= {f"TRL, {w}": [dpo(inputs, n, trl, i)] for i, w in ((1, "one"), (2, "two"))}
    found = {name: [] for name in cases}
    for r in range(rounds):
        for name in list(cases)[:: -1 if r % 2 else 1]:
            found[name].append(run_together(cases[name]))
            print(f"{name}: {found[name][-1]:.3f} pairs/s", file=sys.stderr, flush=True)
    rows = []
    for name, speeds in found.items():
        alone = found["TRL, one" if name.startswith("TRL") else "one process"]
        ratios = sorted(a / b for a, b in zip(speeds, alone))
        over = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        rows.append((name, statistics.median(speeds), over))
    return rows


def draw(rows, file: Path):
    from plotly.subplots import make_subplots

    fig = make_subplots(1, len(AXES), subplot_titles=list(AXES))
    for i, axis in enumerate(AXES, 1):
        own = [r for r in rows if r[0] == axis]
        for j, (name, color) in enumerate(dict(tree="#3b6fb6", plain="#c0392b").items(), 2):
            fig.add_scatter(
                x=[r[1] for r in own],
                y=[r[j] for r in own],
                name=name,
                line_color=color,
                showlegend=i == 1,
                row=1,
                col=i,
            )
        fig.update_xaxes(type="log" if axis == "vocabulary" else "linear", row=1, col=i)
    fig.update_yaxes(rangemode="tozero").update_layout(
        title="CPU seconds of one forward and backward pass",
        template="plotly_white",
        width=1300,
        height=340,
    )
    fig.write_html(file.with_suffix(".html"), include_plotlyjs="cdn")
    try:
        fig.write_image(file, scale=2)
    except Exception as e:
        print(f"no PNG ({type(e).__name__}), only {file.with_suffix('.html')}", file=sys.stderr)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument(
        "--n",
        type=int,
        default=64,
        help="pairs of the run with one and two processes; 0: left out",
    )
    p.add_argument("--rounds", type=int, default=3, help="of the runs with two processes")
    p.add_argument("--no-sweep", action="store_true", help="only one and two processes")
    p.add_argument("--trl", default=str(HERE.parent / "build/trl-venv/bin/python"))
    p.add_argument("--out", type=Path, default=HERE.parent / "build/bench")
    a = p.parse_args()
    a.out = a.out.resolve()
    a.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in [] if a.no_sweep else sweep(a.repeats):
        rows.append(row)
        print("{}={}: tree {:.3f} s, plain {:.3f} s".format(*row), file=sys.stderr, flush=True)
    text = (
        "| varied | value | tree, CPU s | plain, CPU s | plain / tree "
        "|\n|---|---|---|---|---|\n"
    ) + "".join(f"| {x} | {v} | {t:.3f} | {q:.3f} | {q / t:.2f} |\n" for x, v, t, q in rows)
    if a.n:
        if not (a.out / "inputs/source.txt").exists():
            subprocess.run([sys.executable, HERE / "inputs.py", a.out / "inputs"], check=True)
        text += "\n| DPO | pairs per second | times one process |\n|---|---|---|\n" + "".join(
            f"| {name} | {s:.3f} | {over} |\n"
            for name, s, over in processes(a.out / "inputs", a.n, a.rounds, a.trl)
        )
    (a.out / "scaling.md").write_text(text)
    if rows:
        draw(rows, a.out / "scaling.png")
    print(text)


if __name__ == "__main__":
    main()
