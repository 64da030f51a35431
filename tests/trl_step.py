"""One step of TRL's own trainers, for a machine without halos_nb: loss and gradients.

`trl_step.py jobs.json OUT` runs in an environment with trl 1.16. Each job names a method, the
folders of its models, TRL's settings, and rows of token ids; OUT/NAME.safetensors gets the
gradient of every parameter, OUT/NAME.json the loss and the numbers on its way.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer

# nothing but the step: float32 on the CPU, no log, no checkpoint
PLAIN = dict(
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
    gradient_accumulation_steps=1,
)


def model_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def kto(job, folder):
    """The mismatched answers are the job's; TRL's collator pads them and TRL computes the
    rest.
    """
    trainer = KTOTrainer(
        model=model_of(job["policy"]),
        ref_model=model_of(job["reference"]),
        args=KTOConfig(
            output_dir=folder,
            per_device_train_batch_size=len(job["rows"]),
            **PLAIN | job["settings"],
        ),
        train_dataset=Dataset.from_list(
            [dict(prompt="a", completion="b", label=True)] * len(job["rows"])
        ),
        processing_class=AutoTokenizer.from_pretrained(job["policy"]),
    )
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer.data_collator(job["rows"])
    loss = trainer.training_step(trainer.model, batch)
    return trainer, loss, dict(KL=trainer._metrics["train"]["kl"])


def grpo(job, folder):
    """Rows in order of their groups. TRL computes old log-probs, reference and advantages.

    With an old policy it takes a step there first, whose gradient is thrown away, and then
    goes on with the same samples at the policy, as it does with num_iterations.
    """
    rows, settings = job["rows"], job["settings"]

    def rollout(prompts, trainer):
        return {
            "prompt_ids": [row["prompt_ids"] for row in rows],
            "completion_ids": [row["completion_ids"] for row in rows],
            "logprobs": [row["sampler_logps"] for row in rows],
        }

    def given(prompts, completions, score, **_):
        return score

    samples = [dict(prompt=f"prompt {row['prompt']}", score=row["score"]) for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(job["old"])
    trainer = GRPOTrainer(
        model=model_of(job["old"]),
        reward_funcs=[given],
        args=GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=len(rows),
            num_iterations=2,
            **PLAIN | settings,
        ),
        train_dataset=Dataset.from_list(samples),
        processing_class=tokenizer,
        rollout_func=rollout,
    )
    trainer.current_gradient_accumulation_steps = 1
    # no engine is started: the rollout gives what it would have said
    trainer.use_vllm = job["corrects"]
    trainer._last_loaded_step = trainer.state.global_step
    if trainer.ref_model is not None:
        trainer.ref_model.load_state_dict(model_of(job["reference"]).state_dict())
    trainer.training_step(trainer.model, samples, None)
    trainer.model.zero_grad()
    trainer.model.load_state_dict(model_of(job["policy"]).state_dict())
    loss = trainer.training_step(trainer.model, samples, None)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return trainer, loss, dict(advantages=list(trainer._logs["advantages"]), metrics=metrics)


def main(jobs, out):
    for job in json.loads(Path(jobs).read_text()):
        with tempfile.TemporaryDirectory() as folder:
            trainer, loss, more = dict(kto=kto, grpo=grpo)[job["method"]](job, folder)
        grads = {}
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None:
                grads[name] = parameter.grad.contiguous()
        save_file(grads, out / f"{job['name']}.safetensors")
        found = dict(loss=float(loss)) | more
        (out / f"{job['name']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
