"""Memory and time of one DPO step of a pair with long branches, on a small model:
`python bench/long.py --kind gemma2 --lengths 8000 16000 32000`.

Each length is a process of its own. Layers are checkpointed; the chosen branch has so many
tokens, the rejected one half of them. Peak memory is what the step adds to the loaded model.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

SHAPE = dict(
    vocab_size=4096,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
    max_position_embeddings=40_000,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)


def small_config(kind: str):
    "Of a Llama, or of a Gemma with windows of 512 (gemma2: with capped scores, too)."
    from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig

    if kind == "llama":
        return LlamaConfig(**SHAPE)
    layers = ["sliding_attention"] * 3 + ["full_attention"]
    window = dict(sliding_window=512, layer_types=layers)
    return (Gemma2Config if kind == "gemma2" else Gemma3TextConfig)(**SHAPE, **window)


def long_pair(n: int):
    "A batch of one pair."
    import torch

    from halos_nb.trees import Tree, make_batch

    rng = torch.Generator().manual_seed(0)

    def tokens(k: int) -> list[int]:
        return torch.randint(5, 4000, (k,), generator=rng).tolist()

    pair = Tree(tokens(100), [tokens(n), tokens(n // 2)], ["chosen", "rejected"], [0, 0])
    return make_batch([pair])


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one_step(kind: str, n: int) -> dict:
    "Forward and backward of the pair's loss, without a reference."
    import torch
    from transformers import AutoModelForCausalLM

    from halos_nb.head import embedding_in_place, gradients_in_place
    from halos_nb.models import TreePolicy, mix_in

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = mix_in(AutoModelForCausalLM.from_config(small_config(kind)), TreePolicy).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = long_pair(n)
    assert model.head_form and model.tree_way == "pieces"
    before, start = peak_mb(), time.process_time()
    with gradients_in_place(), embedding_in_place(model.get_input_embeddings()):
        chosen, rejected = model(tree=batch).logps.sum(1)
        torch.nn.functional.softplus(0.1 * (rejected - chosen)).backward()
    seconds = time.process_time() - start
    return dict(kind=kind, n=n, peak_mb=round(peak_mb() - before), cpu_s=round(seconds, 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", default="llama", choices=["llama", "gemma2", "gemma3"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8000, 16_000, 32_000])
    a = parser.parse_args()
    if len(a.lengths) == 1:
        print(json.dumps(one_step(a.kind, a.lengths[0])), flush=True)
        return
    for n in a.lengths:
        own = [sys.executable, __file__, "--kind", a.kind, "--lengths", str(n)]
        subprocess.run(own, check=True)


if __name__ == "__main__":
    main()
