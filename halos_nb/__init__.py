"""Align language models online: sample, label, train, round by round.

    from halos_nb import LoopConfig, load_settings, run_rounds

    cfg = LoopConfig(run_name="mine", sft_checkpoint="models/sft",
                     reward_checkpoint="models/rm", prompts="ultrafeedback_armorm", lr=5e-7)
    for round in run_rounds(cfg, load_settings()):
        print(round)

    halos_nb.RunMonitor("runs/mine").show()    # a run as it happens
    halos_nb.browse_pairs("runs/mine")         # its pairs, to look through
    halos_nb.compare_runs("runs").show()       # runs side by side
    halos_nb.report("runs/mine")               # a run as one offline page
    halos_nb.pdf("runs/mine")                  # its page, or an executed notebook, as PDF
    halos_nb.load_data(["hh"], "test")         # named sets and files, as examples
    halos_nb.plan(cfg)                         # what each stage will need: does it fit?
    halos_nb.model_card("runs/mine")           # a card beside its model
    halos_nb.push("runs/mine", "me/mine")      # model and card to the hub

`python -m halos_nb` lists the commands. Each module is a notebook under nbs/; docs/rooms.md
is the map. Nothing is imported before it is used.
"""

from difflib import get_close_matches
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# name at the prompt -> the room and the name it has there
_NAMES = {
    "LoopConfig": ("configs", "LoopConfig"),
    "load_settings": ("settings", "load_settings"),
    "run_rounds": ("loop", "run_rounds"),
    "load_data": ("hub_sets", "load_data"),
    "RunMonitor": ("monitor", "RunMonitor"),
    "browse_pairs": ("widgets", "browse_pairs"),
    "compare_runs": ("compare", "RunComparer"),
    "report": ("page", "report"),
    "pdf": ("printing", "pdf"),
    "plan": ("plan", "plan"),
    "model_card": ("handover", "model_card"),
    "push": ("handover", "push"),
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    "A name of `__all__`, imported on first use."
    if name not in _NAMES:
        near = get_close_matches(name, _NAMES, 1)
        meant = f"; did you mean `{near[0]}`?" if near else ""
        raise AttributeError(f"module 'halos_nb' has no attribute {name!r}{meant}")
    room, inner = _NAMES[name]
    value = getattr(import_module(f"halos_nb.{room}"), inner)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
