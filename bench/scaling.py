"""How a training pass (forward and backward over one batch of log-probabilities) costs, against
everything that makes it dear: `python bench/scaling.py`.

One thing is varied at a time around a pair of answers of 256 tokens to a prompt of 128. `tree`
shares the prompt, `plain` is one padded row per answer.
Two processes: the DPO run of dpo.py with one and with two, wall seconds; on cores that others
use this says little.
"""

import argparse, json, os, random, subprocess, sys, time
from pathlib import Path

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


def processes(inputs: Path, n: int) -> list[tuple[int, float]]:
    "(processes, pairs per second of wall time) of a DPO run."
    out = []
    for world in (1, 2):
        job = [
            str(HERE / "dpo.py"),
            "--model",
            inputs / "small",
            "--pairs",
            inputs / "pairs.jsonl",
            "--n",
            str(n),
            "--token-budget",
            "1024",
        ]
        launch = (
            [sys.executable]
            if world == 1
            else [
                sys.executable,
                "-m",
                "accelerate.commands.launch",
                "--multi_gpu",
                "--num_processes",
                str(world),
                "--num_machines",
                "1",
                "--mixed_precision",
                "no",
                "--dynamo_backend",
                "no",
                "--num_cpu_threads_per_process",
                "1",
                "--main_process_port",
                "0",
            ]
        )
        done = subprocess.run(
            [*launch, *job],
            capture_output=True,
            text=True,
            env=os.environ
            | dict(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES=""),
        )
        lines = [x for x in done.stdout.splitlines() if '"per_s"' in x]
        if not lines:
            raise SystemExit(f"{world} processes: {done.stderr[-800:]}")
        out.append((world, json.loads(lines[-1])["per_s"]))
    return out


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
        default=16,
        help="pairs of the run with one and two processes; 0: left out",
    )
    p.add_argument("--out", type=Path, default=HERE.parent / "build/bench")
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in sweep(a.repeats):
        rows.append(row)
        print("{}={}: tree {:.3f} s, plain {:.3f} s".format(*row), file=sys.stderr, flush=True)
    text = (
        "| varied | value | tree, CPU s | plain, CPU s | plain / tree "
        "|\n|---|---|---|---|---|\n"
    ) + "".join(f"| {x} | {v} | {t:.3f} | {q:.3f} | {q / t:.2f} |\n" for x, v, t, q in rows)
    if a.n:
        if not (a.out / "inputs/source.txt").exists():
            subprocess.run([sys.executable, HERE / "inputs.py", a.out / "inputs"], check=True)
        text += "\n| processes | pairs per second |\n|---|---|\n" + "".join(
            f"| {w} | {s:.3f} |\n" for w, s in processes(a.out / "inputs", a.n)
        )
    (a.out / "scaling.md").write_text(text)
    draw(rows, a.out / "scaling.png")
    print(text)


if __name__ == "__main__":
    main()
