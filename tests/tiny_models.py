"Models of two blocks for the tests, one per architecture, and what is done to them."

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from halos_nb.models import load_actor_critic, load_policy, load_reward_model
from halos_nb.trees import Tree, make_batch

SHAPE = dict(
    vocab_size=259,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=2,
)
CONFIGS = {
    "llama": lambda **kw: LlamaConfig(**SHAPE, num_key_value_heads=2, **kw),
    "qwen2": lambda **kw: Qwen2Config(**SHAPE, num_key_value_heads=2, **kw),
    "gpt_neox": lambda **kw: GPTNeoXConfig(**SHAPE, **kw),
    "mistral": lambda **kw: MistralConfig(**SHAPE, num_key_value_heads=2, **kw),
    # learnt positions, transposed linear layers, tied embeddings
    "gpt2": lambda **kw: GPT2Config(**SHAPE, **kw),
}
ARCHS = pytest.mark.parametrize("arch", CONFIGS)
# a prompt with three answers, a pair, one with a mismatched third, one whose branches begin
# inside the prompt
TREES = [
    Tree([9, 8, 7, 6], [[20, 21, 22], [30, 31], [40]], ["sample"] * 3, [0] * 3),
    Tree([5, 4], [[50, 51], [60]], ["chosen", "rejected"], [0, 0]),
    Tree([11, 12, 13], [[70, 71, 72, 73, 74], [20, 21]], ["chosen", "KL"], [0, 0]),
    Tree([14], [[15, 80, 81], [16, 82]], ["chosen", "rejected"], [1, 1]),
]


def save_small(arch, folder, seed=1, **more):
    "A model of two blocks with fresh weights of this architecture, as a folder."
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(CONFIGS[arch](**more)).save_pretrained(folder)
    return str(folder)


def with_random_critic(path):
    model = load_actor_critic(path)
    torch.manual_seed(3)
    for p in model.value_head.parameters():
        torch.nn.init.normal_(p)
    return model


def with_random_score(path):
    torch.manual_seed(4)
    return load_reward_model(path)


KINDS = {
    "policy": load_policy,
    "actor-critic": with_random_critic,
    "bradley-terry": with_random_score,
}
kinds = pytest.mark.parametrize("kind", KINDS)


def outputs(model, layout="tree", trees=TREES):
    with torch.no_grad():
        return model(tree=make_batch(trees, layout))


def perturb(model, seed=5):
    "Give a fresh adapter and its heads something to say."
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=g) * 0.2
    return model


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


LORA = dict(r=4, alpha=8, dropout=0.0)
