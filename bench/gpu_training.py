"""Training of ours and of TRL on the same pairs, weights and steps; the first steps, in which
kernels are compiled, do not count.

Both hold float32 weights and compute in bfloat16 by autocast on a GPU. A reference is asked
about all pairs before the first step and let go, or in every step; either way what it takes is
counted. Ours tries several token budgets; TRL several batch sizes, both ways with its
reference, Liger's kernels where they are installed, and checkpointed layers.
"""

import copy
import tempfile
from typing import Any, NamedTuple

from gpu_meter import Place, empty, now, peak, peak_from_here, told
from gpu_models import STEP, config_of, fresh, read_lines
from meter import count_tokens
from work import Work

LOSSES = dict(dpo="dpo", rm="bradley-terry")


# ---- what is measured of a run of either side


class Marks:
    "Seconds, positions and needed work at some moments, and memory between them."

    def __init__(self, place: Place, tokens: list[int], work: Work | None):
        self.place = place
        self.tokens = tokens  # positions that entered the models
        self.work = work  # that ours needs; None: not known
        self.sums = [0.0, 0.0, 0.0, 0.0]
        self.peak = 0.0

    def counted(self) -> list[float]:
        work = self.work
        needed = [work.positions, work.operations] if work else [0, 0]
        return [now(self.place), self.tokens[0], *needed]

    def begin(self):
        peak_from_here(self.place)
        self.start = self.counted()

    def end(self, share: float = 1.0):
        "This share of what was done since `begin` counts."
        for i, (a, b) in enumerate(zip(self.start, self.counted())):
            self.sums[i] += (b - a) * share
        self.peak = max(self.peak, peak(self.place) or 0)

    def told(self) -> dict[str, Any]:
        seconds, *counts = self.sums
        names = ("positions", "needed", "operations")
        more = {name: round(value) for name, value in zip(names, counts) if value}
        return dict(seconds=seconds, peak_mb=self.peak or None) | more


def measured_share(place: Place) -> float:
    "Of all steps."
    return place.size.steps / (place.size.warm + place.size.steps)


def run_measured(trainer: Any, place: Place, marks: Marks):
    "`trainer.train()`; its steps behind the warm ones count."
    from transformers import TrainerCallback

    last = place.size.warm + place.size.steps

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == place.size.warm:
                marks.begin()
            elif state.global_step == last:
                marks.end()

    trainer.add_callback(Steps())
    trainer.train()
    if trainer.state.global_step != last:
        raise RuntimeError(f"{trainer.state.global_step} steps were taken and not {last}")


def tell_run(
    place: Place, case: str, side: str, variant: str, trainer: Any, marks: Marks, **more
):
    "Its line."
    pairs = STEP * place.size.steps
    last = [h for h in trainer.state.log_history if "loss" in h][-1]
    said = marks.told()
    loss = round(float(last["loss"]), 4)
    per_s = pairs / said["seconds"]
    more |= said | dict(unit="pairs", n=pairs, per_s=per_s, loss=loss)
    place.tell(case, side, variant=variant, **more)


# ---- ours


def our_model(job: str, kind: str, tokenizer: Any, place: Place) -> Any:
    "Policy or reward model."
    from transformers import AutoModelForCausalLM

    from halos_nb.models import AutoModelForBradleyTerry, TreePolicy, mix_in

    config = config_of(kind, tokenizer, place.size)
    if job == "rm":
        return fresh(AutoModelForBradleyTerry, config, place.device)
    return mix_in(fresh(AutoModelForCausalLM, config, place.device), TreePolicy)


def our_reference(
    cfg: Any,
    model: Any,
    loaders: Any,
    tokenizer: Any,
    layout: str,
    accelerator: Any,
    marks: Marks,
) -> Any:
    "As halos_nb.train has it: asked about all pairs before the first step, and let go."
    from halos_nb.reference import FrozenModel
    from halos_nb.train import LazyReference, fill_reference_logps, planned_passes

    frozen = FrozenModel(copy.deepcopy(model), model, cfg.precision)
    trees = loaders.train.keep(1)
    passes = planned_passes(cfg, loaders.train)

    def ask():
        known = tokenizer, accelerator, passes
        fill_reference_logps(cfg, trees, lambda: frozen, layout, *known)

    ask()  # kernels are compiled
    marks.begin()
    ask()
    marks.end(measured_share(marks.place))

    def gone():
        raise RuntimeError("all was asked before")

    return LazyReference(gone)


def our_trainer(cfg: Any, model: Any, tokenizer: Any, layout: Any, marks: Marks) -> Any:
    "As halos_nb.train makes it, but for the weights, which no file holds."
    from halos_nb.processes import start_processes
    from halos_nb.train import TRAINERS, make_loaders, metrics_path, set_layout, work_of

    accelerator = start_processes(precision=cfg.precision, cpu=model.device.type == "cpu")
    loaders = make_loaders(cfg, tokenizer, accelerator)
    set_layout(loaders, layout.name, work_of(model))
    kind, reference = TRAINERS[cfg.loss], None
    if kind.use_reference_model:
        known = loaders, tokenizer, layout.name, accelerator
        reference = our_reference(cfg, model, *known, marks)
    return kind(
        model, cfg, loaders.train, None, reference, layout, metrics_path(cfg), tokenizer
    )


def our_config(job: str, budget: int, place: Place) -> Any:
    "Of a run with this token budget."
    from halos_nb.configs import TrainConfig

    home = tempfile.mkdtemp()
    size = place.size
    return TrainConfig(
        loss=LOSSES[job],
        model=str(place.inputs),
        train_datasets=[str(place.inputs / "pairs.jsonl")],
        n_examples=STEP * (size.warm + size.steps),
        batch_size=STEP,
        max_length=size.longest,
        max_prompt_length=size.longest // 2,
        token_budget=budget,
        lr=1e-6,
        precision=place.half,
        cache_dir=home,
    )


def paused_check(trainer: Any, work: Work):
    "What a run asks its model to see that it moved is not needed."
    ask = trainer.said_exactly

    def said_exactly(batch):
        with work.paused():
            return ask(batch)

    trainer.said_exactly = said_exactly


def ours(job: str, kind: str, place: Place):
    from halos_nb.attention import flex_fault
    from halos_nb.layouts import choose_layout
    from halos_nb.train import make_tokenizer

    case = f"{job} {kind}"
    tokenizer = make_tokenizer(our_config(job, 4096, place))
    model = our_model(job, kind, tokenizer, place)
    layout = choose_layout(model, "auto", place.size.longest)
    tokens, work = count_tokens(model), Work(model)  # a copy is counted, too
    way = layout.name
    if way == "tree":
        way += ", pieces" if flex_fault(place.device) else ", flex"
    for budget in place.size.budgets:
        variant = f"budget {budget:,}, {way}"
        if place.is_late():
            place.tell(case, "halos_nb", variant=variant, error="no time was left")
            return
        with told(place, case, "halos_nb", variant=variant):
            marks = Marks(place, tokens, work)
            cfg = our_config(job, budget, place)
            trainer = our_trainer(cfg, model, tokenizer, layout, marks)
            paused_check(trainer, work)
            run_measured(trainer, place, marks)
            why = layout.reason
            tell_run(place, case, "halos_nb", variant, trainer, marks, reason=why)
        trainer = None
        model.zero_grad(set_to_none=True)
        empty(place)


# ---- TRL


class Variant(NamedTuple):
    "A setting of TRL's."

    rows: int  # pairs in one forward pass
    first: bool = False  # the reference is asked before the first step, and let go
    liger: bool = False  # Liger's kernels in the layers
    checkpointing: bool = False  # layers are computed again in the backward pass

    def __str__(self) -> str:
        more = ["reference first"] * self.first + ["Liger"] * self.liger
        more += ["checkpointing"] * self.checkpointing
        return ", ".join([f"{self.rows} pairs", *more])


def variants(job: str, place: Place) -> list[Variant]:
    "The likeliest first."
    from importlib.util import find_spec

    first = job == "dpo"
    best, *others = place.size.rows
    found = [Variant(best, first)]
    if place.cuda and find_spec("liger_kernel"):
        found.append(Variant(best, first, liger=True))
    found += [Variant(rows, first) for rows in others]
    if first:
        found.append(Variant(best))
    return [*found, Variant(best, first, checkpointing=True)]


def trl_settings(variant: Variant, place: Place) -> dict[str, Any]:
    size = place.size
    more = dict(precompute_ref_log_probs=True) if variant.first else {}
    return more | dict(
        output_dir=tempfile.mkdtemp(),
        max_length=size.longest,
        max_steps=size.warm + size.steps,
        per_device_train_batch_size=variant.rows,
        gradient_accumulation_steps=STEP // variant.rows,
        gradient_checkpointing=variant.checkpointing,
        use_liger_kernel=variant.liger,
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
        bf16=place.cuda,
        use_cpu=not place.cuda,
        learning_rate=1e-6,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )


def trl_rows(place: Place, tokenizer: Any) -> list[dict]:
    "Conversations with their lengths, by which rows are sorted."
    from peers import length, read_pairs

    file = place.inputs / "pairs.jsonl"
    rows = read_pairs(str(file), len(read_lines(file)))
    return [row | dict(length=length(tokenizer, row)) for row in rows]


def trl_models(job: str, kind: str, tokenizer: Any, variant: Variant, place: Place) -> list:
    "The model and, where it is asked in every step, its reference."
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = config_of(kind, tokenizer, place.size)
    if job == "rm":
        config.num_labels = 1
        return [fresh(AutoModelForSequenceClassification, config, place.device)]
    model = fresh(AutoModelForCausalLM, config, place.device)
    return [model] if variant.first else [model, copy.deepcopy(model)]


def trl_trainer(
    job: str, models: list, tokenizer: Any, rows: Any, settings: dict, marks: Marks
):
    "What a reference that is asked first takes is counted."
    import trl

    class DPOTrainer(trl.DPOTrainer):
        def _precompute_ref_logps(self, *args, **options):
            marks.begin()
            found = super()._precompute_ref_logps(*args, **options)
            marks.end(measured_share(marks.place))
            return found

    known = dict(model=models[0], train_dataset=rows, processing_class=tokenizer)
    if job == "rm":
        return trl.RewardTrainer(args=trl.RewardConfig(**settings), **known)
    reference = models[1] if len(models) > 1 else None
    return DPOTrainer(ref_model=reference, args=trl.DPOConfig(**settings), **known)


def theirs(job: str, kind: str, place: Place):
    from datasets import Dataset
    from transformers import AutoTokenizer

    case = f"{job} {kind}"
    tokenizer = AutoTokenizer.from_pretrained(place.inputs)
    data = Dataset.from_list(trl_rows(place, tokenizer))
    todo = variants(job, place)
    while todo and not place.is_late():
        variant = todo.pop(0)
        # anew: a trainer patches its models
        models = trl_models(job, kind, tokenizer, variant, place)
        marks = Marks(place, count_tokens(*models), None)
        with told(place, case, "TRL", variant=str(variant)):
            settings = trl_settings(variant, place)
            trainer = trl_trainer(job, models, tokenizer, data, settings, marks)
            run_measured(trainer, place, marks)
            tell_run(place, case, "TRL", str(variant), trainer, marks)
        models = trainer = None
        empty(place)
    for variant in todo:
        place.tell(case, "TRL", variant=str(variant), error="no time was left")
