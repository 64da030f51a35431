"""How much arithmetic a job needs, and how much this machine can do: `python bench/work.py`
prints its matmul ceiling.

A forward pass of a language model needs, in floating-point operations,

    2 x (weights of the linear layers in the blocks) x (positions)
  + 2 x hidden x vocabulary x (predicted tokens)
  + 4 x heads x head width x (keys that each position sees, summed over positions and layers)

A backward pass needs twice as much; only as much for a weight that is not trained, whose own
gradient nobody asks for. Positions are those that cannot be done without: a prompt once for
all its branches, no padding; with an encoder, whose prompt sees the answer, a row per answer.
A position sees itself and those before it in its own row, with a window only the last ones.
What is computed twice to save memory, and norms, softmax and optimiser, do not count.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

Tree = Any  # of halos_nb.trees


class Cost(NamedTuple):
    "Floating-point operations of a forward and of a backward pass."

    forward: int
    backward: int

    def plus(self, other: "Cost") -> "Cost":
        return Cost(self.forward + other.forward, self.backward + other.backward)

    def times(self, n: int) -> "Cost":
        return Cost(self.forward * n, self.backward * n)


# ---- what a model costs


def matmul(weight) -> Cost:
    "One position times a weight."
    forward = 2 * weight.numel()
    return Cost(forward, forward * (1 + weight.requires_grad))


def cost_of_position(model) -> Cost:
    "All linear layers but the one over the vocabulary."
    from torch.nn import Linear

    head = model.get_output_embeddings()
    cost = Cost(0, 0)
    for module in model.modules():
        if isinstance(module, Linear) and module is not head:
            cost = cost.plus(matmul(module.weight))
    return cost


def cost_of_prediction(model) -> Cost:
    "The layer over the vocabulary, if there is one."
    head = model.get_output_embeddings()
    return matmul(head.weight) if head is not None else Cost(0, 0)


class Attention(NamedTuple):
    "A layer's attention."

    width: int  # heads x head width
    window: int | None  # keys that a position sees at most
    causal: bool


def attention_layers(model) -> Iterator[Attention]:
    "One for each layer, read from the config."
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    causal = not is_encoder(model)
    layers = config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    for kind in kinds:
        slides = kind == "sliding_attention"
        yield Attention(heads * width, window if slides else None, causal)


def is_encoder(model) -> bool:
    "Whether a prompt sees the answer behind it."
    layers = [m for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    return bool(layers) and not any(layer.is_causal for layer in layers)


# ---- what trees need


def seen_until(end: int, window: int | None) -> int:
    "Keys that the first `end` positions of a row see, causally."
    if window is None or end <= window:
        return end * (end + 1) // 2
    return window * (window + 1) // 2 + (end - window) * window


def seen_keys(tree: Tree, layer: Attention) -> int:
    "Keys that a tree's positions see in a layer."
    prompt = len(tree.prompt_ids)
    ends = [prompt + len(branch) for branch in tree.branches]
    if not layer.causal:
        return sum(end * end for end in ends)
    before = seen_until(prompt, layer.window)
    return before + sum(seen_until(end, layer.window) - before for end in ends)


class Work:
    "Counts what every pass of these models over trees needs, from the moment it is made."

    def __init__(self, *models):
        self.positions = 0
        self.operations = 0
        self.counts = True
        for model in models:
            costs = Costs(model)

            def before(module, args, kwargs, costs=costs):
                if self.counts and kwargs.get("tree") is not None:
                    self.add(costs, kwargs["tree"].trees)

            model.register_forward_pre_hook(before, with_kwargs=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        "Inside, passes are not needed."
        self.counts = False
        try:
            yield
        finally:
            self.counts = True

    def add(self, costs: "Costs", trees: list[Tree]):
        "A pass over trees."
        import torch

        cost = Cost(0, 0)
        for tree in trees:
            self.positions += costs.positions(tree)
            cost = cost.plus(costs.tree(tree))
        self.operations += cost.forward + cost.backward * torch.is_grad_enabled()


class Costs:
    "What a model's passes cost."

    def __init__(self, model):
        self.position = cost_of_position(model)
        self.prediction = cost_of_prediction(model)
        self.layers = list(attention_layers(model))

    def positions(self, tree: Tree) -> int:
        "That cannot be done without."
        return tree.tokens if self.layers[0].causal else tree.plain_tokens

    def tree(self, tree: Tree) -> Cost:
        "Of one tree."
        attention = 4 * sum(layer.width * seen_keys(tree, layer) for layer in self.layers)
        body = self.position.times(self.positions(tree))
        head = self.prediction.times(tree.targets)
        return body.plus(head).plus(Cost(attention, 2 * attention))


# ---- what the machine can do

# rows, inner width and columns: a job's own sizes (hidden 256 and 640, 8k and 64k words), and
# a square that a library likes
SIZES = (
    (1024, 256, 768),
    (1024, 256, 8192),
    (512, 256, 65536),
    (1024, 640, 2048),
    (512, 640, 16384),
    (1024, 1024, 1024),
    (2048, 2048, 2048),
)


def rate(rows: int, inner: int, columns: int, dtype, seconds: float = 0.3) -> float:
    "Operations per CPU second of one matrix product, the best of several."
    import torch

    left = torch.randn(rows, inner).to(dtype)
    right = torch.randn(inner, columns).to(dtype)
    best, spent = float("inf"), 0.0
    while spent < seconds:
        start = time.process_time()
        left @ right
        took = time.process_time() - start
        best = min(best, took)
        spent += took
    return 2 * rows * inner * columns / best


def ceiling() -> dict[str, float]:
    "The best rate of one thread, operations per CPU second, by dtype."
    import torch

    torch.set_num_threads(1)
    found = dict(float32=max(rate(*size, torch.float32) for size in SIZES))
    # one look is enough where there are no products in bfloat16, and the rest takes minutes
    small = rate(*SIZES[-2], torch.bfloat16)
    sizes = SIZES if small > 0.2 * found["float32"] else SIZES[-2:-1]
    found["bfloat16"] = max(small, *(rate(*size, torch.bfloat16) for size in sizes))
    return found


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(json.dumps(ceiling()))
