"""What the measuring scripts share: seconds, memory and tokens of one job in a process of its
own, as one JSON line.
"""

import argparse
import json
import os
import resource
import sys
import time


def arguments(doc: str, **defaults):
    "The command line: what every job takes, and this job's own."
    p = argparse.ArgumentParser(description=doc)
    p.add_argument("--model", required=True, help="folder of the model")
    p.add_argument("--n", type=int, default=32, help="pairs or samples")
    p.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    p.add_argument(
        "--threads",
        type=int,
        default=1,
        help="OpenMP threads; more than idle cores is far slower than one",
    )
    p.add_argument("--profile", action="store_true", help="where the time goes, on stderr")
    for name, value in defaults.items():
        flag = (
            dict(action="store_true")
            if value is False
            else dict(type=type(value), default=value)
        )
        p.add_argument(f"--{name.replace('_', '-')}", **flag)
    a = p.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(a.threads)
    os.environ |= {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HALOS_NB_PROGRESS": os.devnull,
    }
    import torch

    torch.set_num_threads(a.threads)
    return a


class Meter:
    "Wall and CPU seconds, between `start` and `stop` or inside `with`."

    def start(self):
        self.wall, self.cpu = -time.perf_counter(), -time.process_time()
        return self

    def stop(self):
        self.wall += time.perf_counter()
        self.cpu += time.process_time()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()


def count_tokens(*models) -> list[int]:
    "A list of one number that grows by every position that enters a model, padding included."
    tokens = [0]

    def add(module, args, out):
        tokens[0] += args[0].numel()

    for m in models:
        m.get_input_embeddings().register_forward_hook(add)
    return tokens


def warm(model):
    "One tiny pass, for the costs of a first call."
    import torch

    ids = torch.randint(5, 1000, (2, 64))
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    out.logits.float().sum().backward()
    model.zero_grad(set_to_none=True)


def run_trainer(trainer, profile: bool = False) -> Meter:
    """`trainer.train()` of a transformers Trainer, with what its callbacks do before the first
    step and after the last.
    """
    from transformers import TrainerCallback

    meter = Meter()

    class Start(TrainerCallback):
        def on_train_begin(self, *_, **kw):
            meter.start()

    class Stop(TrainerCallback):
        def on_train_end(self, *_, **kw):
            meter.stop()

    trainer.callback_handler.callbacks.insert(0, Start())
    trainer.add_callback(Stop())
    profiled(trainer.train, profile)
    return meter


def profiled(run, yes: bool):
    "What `run()` returns; if asked, torch's profile of it on stderr."
    if not yes:
        return run()
    from torch.profiler import profile

    with profile() as p:
        out = run()
    print(
        p.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=32, max_name_column_width=44
        ),
        file=sys.stderr,
    )
    return out


def report(case: str, unit: str, n: int, meter: Meter, **more):
    "The JSON line."
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps(
            dict(
                case=case,
                unit=unit,
                n=n,
                wall_s=round(meter.wall, 3),
                cpu_s=round(meter.cpu, 3),
                per_s=round(n / meter.wall, 4),
                per_cpu_s=round(n / meter.cpu, 4),
                peak_rss_mb=round(peak, 1),
                **more,
            )
        ),
        flush=True,
    )
