"""A judge's job without the stage around it: `python tests/ask_judge.py CONFIG`.

`make soak` kills this, so that its kills come while questions are asked, and not while a stage
imports.
"""

import json
import sys
from pathlib import Path

from halos_nb.configs import LabelConfig, make_config
from halos_nb.judge import JudgeJob, question, run_job
from halos_nb.records import read_records

if __name__ == "__main__":
    cfg = make_config(LabelConfig, **json.loads(Path(sys.argv[1]).read_text()))
    questions = [question(sample) for sample in read_records(cfg.samples_file)]
    run_job(JudgeJob(cfg, questions, Path(cfg.output_file).with_suffix(".labels.jsonl")))
