"""Sample, label and train without a model, for the tests of the loop: 40 prompts, a score per
sample. Prompts of a file named heldout are others than those of any other file.
"""

import json
import sys
from pathlib import Path

from halos_nb.feedback import convert_to_pairwise_feedback

PROMPTS = 40


def sample(cfg):
    "Answers that depend on the seed only."
    kind = "h" if Path(cfg["datasets"][0]).stem == "heldout" else "p"
    numbers = range(PROMPTS)[cfg["num_skip"] :][: cfg["num_prompts"]]
    rows = []
    for i in numbers:
        for k in range(cfg["num_samples_per_prompt"]):
            row = dict(prompt_id=f"{kind}{i}", sample_id=k, type="sample")
            row |= dict(prompt=[dict(role="user", content=f"{i}?")])
            row |= dict(output=f"{'x' * k} {cfg['seed']}")
            row |= dict(policy_logps=-3.0, reference_logps=-3.5)
            rows.append(row)
    out = Path(cfg["output_file"])
    out.write_text(json.dumps(rows))
    left = PROMPTS - cfg["num_skip"] - len(numbers)
    counts = dict(prompts=len(numbers), prompts_left=left)
    out.with_name("samples.counts.json").write_text(json.dumps(counts))


def label(cfg):
    "A sample's score is its number."
    rows = json.loads(Path(cfg["samples_file"]).read_text())
    for row in rows:
        row["reward"] = float(row["sample_id"])
    made = rows
    if cfg["feedback_type"] == "pairwise":
        made = convert_to_pairwise_feedback(rows, cfg["seed"], threshold=cfg["threshold"])
    if not made:
        raise ValueError("no pairs; lower `threshold`")
    out = Path(cfg["output_file"])
    out.write_text(json.dumps(made))
    prompts = len({row["prompt_id"] for row in rows})
    counts = dict(samples=len(rows), unscored=0, prompts=prompts, ties=0, records=len(made))
    out.with_name("feedback.counts.json").write_text(json.dumps(counts))
    with open(out.with_name("feedback.labels.jsonl"), "w") as f:
        for row in rows:
            ids = dict(prompt_id=row["prompt_id"], sample_id=row["sample_id"])
            f.write(json.dumps(ids | dict(score=row["reward"])) + "\n")


def train(cfg):
    "Weights that depend on all that came before."
    final = Path(cfg["cache_dir"]) / "policy/FINAL"
    final.mkdir(parents=True)
    before = Path(cfg["from_checkpoint"] or cfg["load_from"])
    weights = (before / "weights").read_text()
    (final / "weights").write_text(f"{weights} {cfg['seed']}")
    (final.parent / "counts.json").write_text("{}")
    row = {"step": 1, "loss": 0.5, "rewards_train/accuracies": 1.0}
    Path(cfg["metrics_file"]).write_text(json.dumps(row) + "\n")


def audit(cfg):
    "What is wrong, if the policy's folder says so."
    said = Path(cfg["model"]) / "wrong"
    detail = said.read_text() if said.exists() else "as it should be"
    verdict = "wrong" if said.exists() else "ok"
    check = dict(name="bos", verdict=verdict, detail=detail)
    example = dict(prompt=[[5, "Is it?"]], target=[[6, " <b>yes</b>"]], end=[[2, "<|end|>"]])
    Path(cfg["json"]).write_text(json.dumps(dict(checks=[check], examples=[example])))


def main():
    "Do what the config is for."
    cfg = json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
    if "num_skip" in cfg:
        sample(cfg)
    elif "num_examples" in cfg:
        audit(cfg)
    elif "samples_file" in cfg:
        label(cfg)
    else:
        train(cfg)


if __name__ == "__main__":
    main()
