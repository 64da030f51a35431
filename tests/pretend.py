"""Sample, label and train without a model, for the tests of the loop: 40 prompts, a score per
sample, weights that depend on all that came before.
"""

import json, sys
from pathlib import Path

from halos_nb.feedback import convert_to_pairwise_feedback

cfg = json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
if "num_skip" in cfg:
    ids = range(40)[cfg["num_skip"] :][: cfg["num_prompts"]]
    rows = [
        dict(
            prompt_id=f"p{i}",
            sample_id=k,
            prompt=[dict(role="user", content=f"{i}?")],
            output=f"{'x' * k} {cfg['seed']}",
            type="sample",
            policy_logps=-3.0,
            reference_logps=-3.5,
        )
        for i in ids
        for k in range(cfg["num_samples_per_prompt"])
    ]
    out = Path(cfg["output_file"])
    out.write_text(json.dumps(rows))
    out.with_name("samples.counts.json").write_text(
        json.dumps(dict(prompts=len(ids), prompts_left=40 - cfg["num_skip"] - len(ids)))
    )
elif "samples_file" in cfg:
    rows = [
        r | dict(reward=float(r["sample_id"]))
        for r in json.loads(Path(cfg["samples_file"]).read_text())
    ]
    out = Path(cfg["output_file"])
    made = (
        convert_to_pairwise_feedback(rows, cfg["seed"], threshold=cfg["threshold"])
        if cfg["feedback_type"] == "pairwise"
        else rows
    )
    if not made:
        raise ValueError("no pairs; lower `threshold`")
    out.write_text(json.dumps(made))
    out.with_name("feedback.counts.json").write_text(
        json.dumps(
            dict(
                samples=len(rows),
                unscored=0,
                prompts=len({r["prompt_id"] for r in rows}),
                ties=0,
                records=len(made),
            )
        )
    )
    out.with_name("feedback.labels.jsonl").write_text(
        "".join(
            json.dumps({k: r[k] for k in ("prompt_id", "sample_id")} | dict(score=r["reward"]))
            + "\n"
            for r in rows
        )
    )
else:
    final, before = (
        Path(cfg["cache_dir"]) / "policy/FINAL",
        cfg["from_checkpoint"] or cfg["load_from"],
    )
    final.mkdir(parents=True)
    (final / "weights").write_text(f"{(Path(before) / 'weights').read_text()} {cfg['seed']}")
    (final.parent / "counts.json").write_text("{}")
    Path(cfg["metrics_file"]).write_text(
        json.dumps({"step": 1, "loss": 0.5, "rewards_train/accuracies": 1.0}) + "\n"
    )
