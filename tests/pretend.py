"""Sample, label and train without a model, for the tests of the loop: 40 prompts, a score per
sample. Prompts of a file named heldout are others than those of any other file.
"""

import json
import os
import sys
import time
from pathlib import Path

from stay_engine import ask

from halos_nb.feedback import convert_to_pairwise_feedback

PROMPTS = 40


def weights(path):
    "The weights in a folder."
    file = Path(path or "") / "weights"
    return file.read_text() if file.exists() else ""


def breaking(cfg, i, k):
    "What an answer of a policy that is breaking has in place of a good one's."
    policy = weights(cfg["model"])
    is_check = Path(cfg["output_file"]).stem != "samples"
    if "broken" in policy or ("late" in policy and not is_check):
        return dict(output="la " * (40 + k))
    if "some" in policy and i % 5 == 0:  # two prompts of ten
        return dict(output="")
    if "fooled" in policy:
        return dict(output=f"Best answer {k}!")
    if "noise" in weights(cfg["reference"]):
        return dict(output_ids=[1, 2], reference_logps=-60.0)
    return {}


# what a training does to the policy, by what stands behind the point of beta; the digit before
# it says in which round
BREAKS = {0: "broken", 3: "some", 5: "late", 7: "fooled"}


def asked_engine(cfg):
    "Which Python draws; the engine that stays, if there is one, is waited for."
    while cfg["base_url"]:
        try:
            ask(cfg["base_url"], "/health")
            break
        except OSError:
            time.sleep(0.05)
    return dict(sampling=os.environ.get("SAMPLING"))


def sample(cfg):
    "Answers that depend on the seed only."
    kind = "h" if Path(cfg["datasets"][0]).stem == "heldout" else "p"
    numbers = range(PROMPTS)[cfg["num_skip"] :][: cfg["num_prompts"]]
    rows = []
    for i in numbers:
        for k in range(cfg["num_samples_per_prompt"]):
            row = dict(prompt_id=f"{kind}{i}", sample_id=k, type="sample")
            row |= dict(prompt=[dict(role="user", content=f"{i}?")])
            row |= dict(output=f"{'x' * (k % 8)} {cfg['seed']}")
            row |= dict(policy_logps=-3.0, reference_logps=-3.5)
            row |= dict(trained=len(weights(cfg["model"]).split()) - 1)
            rows.append(row | breaking(cfg, i, k))
    out = Path(cfg["output_file"])
    out.write_text(json.dumps(rows))
    left = PROMPTS - cfg["num_skip"] - len(numbers)
    counts = dict(prompts=len(numbers), prompts_left=left)
    if cfg["backend"] == "vllm" or cfg["drawn"]:
        counts |= asked_engine(cfg)
    out.with_suffix(".counts.json").write_text(json.dumps(counts))


def label(cfg):
    "A sample's score is its number."
    rows = json.loads(Path(cfg["samples_file"]).read_text())
    for row in rows:
        row["reward"] = float(row["sample_id"]) + 99 * row["output"].startswith("Best")
    made = rows
    if cfg["feedback_type"] == "pairwise":
        made = convert_to_pairwise_feedback(rows, cfg["seed"], threshold=cfg["threshold"])
    if not made:
        raise ValueError("no pairs; lower `threshold`")
    out = Path(cfg["output_file"])
    out.write_text(json.dumps(made))
    prompts = len({row["prompt_id"] for row in rows})
    counts = dict(samples=len(rows), unscored=0, prompts=prompts, ties=0, records=len(made))
    out.with_suffix(".counts.json").write_text(json.dumps(counts))
    with open(out.with_suffix(".labels.jsonl"), "w") as f:
        for row in rows:
            ids = dict(prompt_id=row["prompt_id"], sample_id=row["sample_id"])
            said = dict(labeller="function:pretend", score=row["reward"], reason="")
            f.write(json.dumps(ids | said) + "\n")


def contrary(prompt, output):
    "A rule for the loop's function: likes x, and in every other prompt dislikes it."
    even = int(prompt[-1]["content"].rstrip("?")) % 2 == 0
    return output.count("x") * (1 if even else -1)


def train(cfg):
    "Weights that depend on all that came before."
    if os.environ.get("PRETEND_SLOW") == "train":
        time.sleep(3)
    final = Path(cfg["cache_dir"]) / "policy/FINAL"
    final.mkdir(parents=True)
    before = Path(cfg["from_checkpoint"] or cfg["load_from"])
    words = [weights(before), str(cfg["seed"])]
    rounds, kind = divmod(round(10 * (cfg["beta"] or 0)), 10)
    if rounds == len(words[0].split()):
        words.append(BREAKS[kind])
    (final / "weights").write_text(" ".join(words))
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


def evaluate(cfg):
    "A policy is best after two rounds."
    rows = json.loads(Path(cfg["samples_file"]).read_text())
    value = 1 - abs(rows[0]["trained"] - 2) / 8
    said = dict(score=[value, value - 0.1, value + 0.1], unscored=0, against={})
    found = dict(prompts=len({row["prompt_id"] for row in rows}), answers=len(rows))
    found |= dict(seen_prompts=0, kl=[0.5, 0.4, 0.6], characters=[9.0, 8.0, 10.0], cut=0)
    found |= dict(labellers=dict(rm=said), best_of_n={})
    found["decides"] = dict(by="rm", what="mean score by rm", value=said["score"])
    Path(cfg["output_file"]).write_text(json.dumps(found))


def do(cfg):
    "What the config is for."
    if "num_skip" in cfg:
        sample(cfg)
    elif "num_examples" in cfg:
        audit(cfg)
    elif "decides" in cfg:
        evaluate(cfg)
    elif "samples_file" in cfg:
        label(cfg)
    else:
        train(cfg)


def main():
    "Do what the config in a file is for."
    do(json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text()))


if __name__ == "__main__":
    main()
    # without destructors, as a real stage ends: those of a copy of a server would take longer
    # than its work
    sys.stdout.flush()
    os._exit(0)
