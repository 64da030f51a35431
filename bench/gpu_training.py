"""Training of ours and of TRL on the same pairs, weights and steps; the first steps, in which
kernels are compiled, do not count.

Both hold float32 weights and compute in bfloat16 by autocast on a GPU. Ours tries several
token budgets; TRL several batch sizes, with Liger's kernels where they are installed, and
checkpointed layers where memory ends.
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


class Span(NamedTuple):
    "Some steps of a run."

    seconds: float
    peak_mb: float | None
    positions: int  # that entered the models
    needed: int  # of them; 0: not known
    operations: int  # that these need


def measured_run(trainer: Any, place: Place, tokens: list[int], work: Work | None) -> Span:
    "`trainer.train()`; what its steps behind the warm ones took."
    from transformers import TrainerCallback

    marks = []

    def mark():
        counted = [work.positions, work.operations] if work else [0, 0]
        marks.append([now(place), tokens[0], *counted, peak(place)])

    class Marks(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == place.size.warm:
                peak_from_here(place)
                mark()
            elif state.global_step == place.size.warm + place.size.steps:
                mark()

    trainer.add_callback(Marks())
    trainer.train()
    first, last = marks
    seconds, positions, needed, operations = [b - a for a, b in zip(first[:4], last[:4])]
    return Span(seconds, last[4], positions, needed, operations)


def tell_run(
    place: Place, case: str, side: str, variant: str, span: Span, trainer: Any, **more
):
    "Its line."
    pairs = STEP * place.size.steps
    last = [h for h in trainer.state.log_history if "loss" in h][-1]
    said = {name: value for name, value in span._asdict().items() if value}
    place.tell(
        case,
        side,
        variant=variant,
        unit="pairs",
        n=pairs,
        per_s=pairs / span.seconds,
        loss=round(float(last["loss"]), 4),
        **said,
        **more,
    )


# ---- ours


def our_model(job: str, kind: str, tokenizer: Any, place: Place) -> Any:
    "Policy or reward model."
    from transformers import AutoModelForCausalLM

    from halos_nb.models import AutoModelForBradleyTerry, TreePolicy, mix_in

    config = config_of(kind, tokenizer, place.size)
    if job == "rm":
        return fresh(AutoModelForBradleyTerry, config, place.device)
    return mix_in(fresh(AutoModelForCausalLM, config, place.device), TreePolicy)


def our_trainer(cfg: Any, model: Any, reference: Any, tokenizer: Any, layout: Any) -> Any:
    "As halos_nb.train makes it, but for the weights, which no file holds."
    from halos_nb.processes import start_processes
    from halos_nb.reference import FrozenModel
    from halos_nb.train import TRAINERS, make_loaders, metrics_path, set_layout, work_of

    accelerator = start_processes(precision=cfg.precision, cpu=model.device.type == "cpu")
    loaders = make_loaders(cfg, tokenizer, accelerator)
    set_layout(loaders, layout.name, work_of(model))
    frozen = FrozenModel(reference, model, cfg.precision) if reference is not None else None
    return TRAINERS[cfg.loss](
        model, cfg, loaders.train, None, frozen, layout, metrics_path(cfg), tokenizer
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
    models = [model]
    if job == "dpo":
        models.append(copy.deepcopy(model).eval().requires_grad_(False))
    tokens, work = count_tokens(*models), Work(*models)
    way = layout.name
    if way == "tree":
        way += ", pieces" if flex_fault(place.device) else ", flex"
    for budget in place.size.budgets:
        variant = f"budget {budget:,}, {way}"
        if place.is_late():
            return
        with told(place, case, "halos_nb", variant=variant):
            reference = models[1] if job == "dpo" else None
            cfg = our_config(job, budget, place)
            trainer = our_trainer(cfg, model, reference, tokenizer, layout)
            paused_check(trainer, work)
            span = measured_run(trainer, place, tokens, work)
            why = layout.reason
            tell_run(place, case, "halos_nb", variant, span, trainer, reason=why)
        trainer = None
        model.zero_grad(set_to_none=True)
        empty(place)


# ---- TRL


class Variant(NamedTuple):
    "A setting of TRL's."

    rows: int  # pairs in one forward pass
    liger: bool = False  # Liger's kernels in the layers
    checkpointing: bool = False  # layers are computed again in the backward pass

    def __str__(self) -> str:
        more = ["Liger"] * self.liger + ["checkpointing"] * self.checkpointing
        return ", ".join([f"{self.rows} pairs", *more])


def variants(place: Place) -> list[Variant]:
    "The likeliest first; Liger's kernels change the model, so they come last."
    from importlib.util import find_spec

    found = [Variant(rows) for rows in place.size.rows]
    found.append(Variant(place.size.rows[0], checkpointing=True))
    if place.cuda and find_spec("liger_kernel"):
        found.insert(2, Variant(place.size.rows[0], liger=True))
    return found


def trl_settings(variant: Variant, place: Place) -> dict[str, Any]:
    size = place.size
    return dict(
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


def trl_models(job: str, kind: str, tokenizer: Any, place: Place) -> list[Any]:
    "The model and, of DPO, its reference."
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = config_of(kind, tokenizer, place.size)
    if job == "rm":
        config.num_labels = 1
        return [fresh(AutoModelForSequenceClassification, config, place.device)]
    model = fresh(AutoModelForCausalLM, config, place.device)
    return [model, copy.deepcopy(model)]


def trl_trainer(job: str, models: list[Any], tokenizer: Any, rows: Any, settings: dict) -> Any:
    import trl

    if job == "rm":
        return trl.RewardTrainer(
            model=models[0],
            args=trl.RewardConfig(**settings),
            train_dataset=rows,
            processing_class=tokenizer,
        )
    return trl.DPOTrainer(
        model=models[0],
        ref_model=models[1],
        args=trl.DPOConfig(**settings),
        train_dataset=rows,
        processing_class=tokenizer,
    )


def theirs(job: str, kind: str, place: Place):
    from datasets import Dataset
    from transformers import AutoTokenizer

    case = f"{job} {kind}"
    tokenizer = AutoTokenizer.from_pretrained(place.inputs)
    data = Dataset.from_list(trl_rows(place, tokenizer))
    todo = variants(place)
    while todo and not place.is_late():
        variant = todo.pop(0)
        models = trl_models(job, kind, tokenizer, place)  # anew: a trainer patches its models
        tokens = count_tokens(*models)
        with told(place, case, "TRL", variant=str(variant)):
            settings = trl_settings(variant, place)
            trainer = trl_trainer(job, models, tokenizer, data, settings)
            span = measured_run(trainer, place, tokens, None)
            tell_run(place, case, "TRL", str(variant), span, trainer)
        models = trainer = None
        empty(place)
    for variant in todo:
        place.tell(case, "TRL", variant=str(variant), error="no time was left")
