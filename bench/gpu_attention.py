"""flex_attention beside attention in pieces, over one row of trees: forward and backward."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

from gpu_meter import Place, ceiling, now, peak, peak_from_here, seconds_of, told
from gpu_models import SMOKE
from work import Attention, seen_keys


class Setting(NamedTuple):
    "A layer's attention."

    name: str
    heads: int
    key_heads: int
    width: int  # of a head
    window: int | None = None
    cap: float | None = None
    sinks: bool = False


# head sizes of the two models, and of gpt-oss, which has sinks; the most used come first
SETTINGS = (
    Setting("Llama, all", 32, 8, 64),
    Setting("Gemma 3, window 512", 4, 1, 256, window=512),
    Setting("Gemma 3, all", 4, 1, 256),
    Setting("gpt-oss, window 128 and sinks", 64, 8, 64, window=128, sinks=True),
    Setting("gpt-oss, all and sinks", 64, 8, 64, sinks=True),
    Setting("Gemma 2, window 1024 and cap", 8, 4, 256, window=1024, cap=50.0),
)


def row_of_trees(place: Place) -> list[Any]:
    "Trees with a prompt and three branches each."
    from halos_nb.trees import Tree

    unit = place.size.longest // 8
    ids = list(range(5, 5 + place.size.longest))
    trees = []
    for i in range(place.size.trees):
        branches = [ids[: unit * k + 3 * i] for k in (2, 3, 4)]
        trees.append(Tree(ids[: 4 * unit - i], branches, ["sample"] * 3, [0] * 3))
    return trees


class Inputs(NamedTuple):
    "What attention is called with."

    tensors: tuple[Any, ...]  # query, key, value
    sinks: Any  # None: no sinks


def draw(setting: Setting, tokens: int, place: Place, dtype: Any, learn: bool) -> Inputs:
    "The same numbers in any type."
    import torch

    torch.manual_seed(0)
    heads = (setting.heads, setting.key_heads, setting.key_heads)
    tensors = []
    for n in heads:
        x = torch.randn(1, n, tokens, setting.width, device=place.device)
        tensors.append(x.to(dtype).requires_grad_(learn))
    sinks = torch.linspace(-1, 2, setting.heads, device=place.device)
    return Inputs(tuple(tensors), sinks.requires_grad_(learn) if setting.sinks else None)


def way(name: str, setting: Setting, segments: list, place: Place) -> Callable:
    "Attention of these inputs, by flex or in pieces."
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    from halos_nb.attention import Reach, Scoring, TreeRow, by_flex, by_pieces

    reach = Reach(setting.window)
    row = TreeRow(segments, torch.device(place.device))
    layer = SimpleNamespace(num_key_value_groups=setting.heads // setting.key_heads)

    def attend(x: Inputs) -> Any:
        how = Scoring(None, 0.0, setting.cap, x.sinks)
        if name == "pieces":
            return by_pieces(layer, *x.tensors, segments, reach, how)
        mask = row.block_mask(reach)
        return by_flex(*x.tensors, mask, how, None if place.cuda else flex_attention)

    return attend


def mask_seconds(setting: Setting, segments: list, place: Place) -> float:
    "What a micro-batch needs for one block mask; all layers of a kind share it."
    import torch

    from halos_nb.attention import Reach, make_block_mask

    device = torch.device(place.device)
    make = lambda: make_block_mask(segments, device, Reach(setting.window))
    return seconds_of(make, place)


def outcome(attend: Callable, x: Inputs) -> list[Any]:
    "What comes out and, where something learns, all gradients."
    import torch

    out = attend(x)
    if not x.tensors[0].requires_grad:
        return [out]
    leaves = [*x.tensors] + ([] if x.sinks is None else [x.sinks])
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]


def off(found: list[Any], truth: list[Any]) -> float:
    "The largest distance, each tensor's relative to its length."
    shares = []
    for x, true in zip(found, truth, strict=True):
        shares.append(float((x.float() - true.float()).norm() / true.float().norm()))
    return max(shares)


def measure(setting: Setting, place: Place):
    "One setting: both ways in the computing type, beside pieces in float32."
    import torch

    from halos_nb.trees import make_batch

    trees = row_of_trees(place)
    segments = make_batch(trees).segments
    tokens = sum(tree.tokens for tree in trees)
    learn = place.cuda  # flex_attention has no backward pass on a CPU
    layer = Attention(setting.heads * setting.width, setting.window, True)
    keys = sum(seen_keys(tree, layer) for tree in trees)
    pieces = way("pieces", setting, segments, place)
    case = f"attention: {setting.name}"
    truth = None
    with told(place, case, "pieces in float32"):
        truth = outcome(pieces, draw(setting, tokens, place, torch.float32, learn))
    x = draw(setting, tokens, place, getattr(torch, place.half), learn)
    for name in ("flex", "pieces"):
        with told(place, case, name):
            attend = way(name, setting, segments, place)
            begun = now(place)
            found = outcome(attend, x)
            first = now(place) - begun
            peak_from_here(place)
            seconds = seconds_of(lambda attend=attend: outcome(attend, x), place)
            place.tell(
                case,
                name,
                variant="forward and backward" if learn else "forward",
                unit="tokens",
                n=tokens,
                seconds=seconds,
                per_s=tokens / seconds,
                peak_mb=peak(place),
                operations=4 * layer.width * keys * (3 if learn else 1),
                off=off(found, truth) if truth else None,
                first_s=round(first, 2),
                mask_s=mask_seconds(setting, segments, place) if name == "flex" else None,
            )


def main(place: Place):
    from halos_nb.attention import flex_fault

    rate = ceiling(place)
    place.tell("ceiling", place.half, per_s=rate, unit="operations", n=place.size.gemm)
    fault = flex_fault(place.device)
    place.tell("flex_attention", "halos_nb", variant=fault or "is used")
    for setting in SETTINGS[:: 3 if place.size is SMOKE else 1]:
        if place.is_late():
            place.tell(f"attention: {setting.name}", "flex", error="no time was left")
            continue
        measure(setting, place)
