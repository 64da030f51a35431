"""A tiny random model of any family that transformers can build from a config.

What a config calls its sizes differs from family to family; here are the words for them.
"""

import copy

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

LARGEST = 8_000_000  # parameters of what counts as tiny
VOCABULARY = 300

SIZES = {
    32: "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim "
    "hidden_dim input_embedding_size lru_width dim_model intermediate_size ffn_dim d_ff "
    "d_inner n_inner "
    "ffn_hidden_size dim_ff decoder_ffn_dim encoder_ffn_dim moe_intermediate_size "
    "shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
    "attention_hidden_size dense_intermediate_size intermediate_size_mlp emb_dim "
    "shared_transformer_intermediate_size cross_attention_hidden_size mamba_d_ssm "
    "prefix_dense_intermediate_size moe_shared_expert_intermediate_size text_hidden_size "
    "encoder_hidden_size projection_dim mamba_hidden_dim hidden_size_per_layer_input "
    "moe_latent_size true_hidden_size altup_active_idx_size qk_dim v_dim gate_dim d_embed "
    "adapter_hidden_size intermediate_size_per_layer",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
    "num_decoder_layers num_encoder_layers num_key_value_heads num_experts_per_tok moe_topk "
    "num_kv_heads multi_query_group_num num_hidden_layers_per_stack top_k_experts moe_top_k "
    "num_hidden_groups inner_group_num num_blocks num_key_value_groups experts_per_token "
    "swa_num_key_value_heads top_k num_global_key_value_heads linear_num_key_heads "
    "entity_emb_layers",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
    "encoder_attention_heads num_experts n_routed_experts num_local_experts num_moe_experts "
    "moe_num_experts num_linear_heads linear_num_value_heads mamba_n_heads "
    "swa_num_attention_heads num_lin_heads num_attention_head n_shared_heads "
    "lru_heads index_n_heads mamba_num_heads",
    8: "chunk_size mamba_chunk_size head_dim kv_channels qk_nope_head_dim qk_rope_head_dim "
    "v_head_dim d_kv "
    "linear_key_head_dim linear_value_head_dim attention_head_dim d_head dim_head "
    "swa_head_dim swa_v_head_dim global_head_dim index_head_dim mamba_d_state "
    "attention_head_size mamba_head_dim qk_head_dim",
    16: "q_lora_rank kv_lora_rank state_size mamba_d_head ssm_state_size time_step_rank "
    "mamba_dt_rank o_lora_rank index_topk",
    1: "n_group topk_group num_expert_group n_shared_experts first_k_dense_replace "
    "num_shared_experts moe_num_shared_experts num_fused_layers",
    128: "max_position_embeddings n_positions n_ctx max_seq_len context_length "
    "max_source_positions max_target_positions max_sequence_length",
    VOCABULARY: "vocab_size decoder_vocab_size vocab_size_per_layer_input",
}
NAMES = {name: size for size, names in SIZES.items() for name in names.split()}
MARKS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, unk_token_id=3)
BUILD = {"causal": AutoModelForCausalLM, "scorer": AutoModelForSequenceClassification}


def sizes_of(kind):
    "Small sizes, no dropout, small nested configs, under the names that this config has."
    default = kind()
    small = {}
    for name, value in default.to_dict().items():
        if name in NAMES and type(value) in (int, type(None)):
            small[name] = NAMES[name] if value is not None or "vocab" in name else None
        elif "drop" in name and type(value) is float:
            small[name] = 0.0
        elif name in MARKS:
            small[name] = MARKS[name]
        elif name == "initializer_range":
            small[name] = 0.2
    for short, long in kind.attribute_map.items():
        if short in NAMES and type(getattr(default, long, None)) is int:
            small[long] = NAMES[short]
    return {name: value for name, value in small.items() if value is not None}


def tiny_config(kind, **more):
    "A small config of this class."
    given = sizes_of(kind)
    default = kind()
    for name in getattr(kind, "sub_configs", {}):
        inner = getattr(default, name, None)
        if isinstance(inner, PreTrainedConfig):
            own = FAMILIES.get(inner.model_type, {}) | more.pop(name, {})
            given[name] = tiny_config(type(inner), **own).to_dict()
    return kind(**given | more)


# What a family needs beside the general sizes.
HEADS_EQUAL = dict(num_key_value_heads=4)
LINEAR = dict(num_hidden_layers=4)  # enough layers for one of each kind
FAMILIES = {
    **dict.fromkeys(
        "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa minicpm3 "
        "youtu dots3_note_text esmc".split(),
        HEADS_EQUAL,
    ),
    **dict.fromkeys("qwen3_5_text qwen3_5_moe_text qwen3_next qwen4_exp_text".split(), LINEAR),
    "bailing_hybrid": dict(num_hidden_layers=4, layer_group_size=2, num_key_value_heads=4),
    "bamba": dict(attn_layer_indices=[1], mamba_d_head=16, mamba_n_heads=4),
    "codegen": dict(rotary_dim=4),
    "gptj": dict(rotary_dim=4),
    "falcon_h1": dict(mamba_d_ssm=64, mamba_d_head=16, mamba_n_heads=4),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=5),
    "granitemoehybrid": dict(
        layer_types=["mamba", "attention"], mamba_d_head=16, mamba_n_heads=4
    ),
    "hunyuan_v1_dense": dict(head_dim=8),
    "hunyuan_v1_moe": dict(head_dim=8),
    "ministral": dict(head_dim=8),
    "jamba": dict(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1),
    "kimi_linear": dict(
        layer_types=["linear_attention", "full_attention"] * 2,
        num_hidden_layers=4,
        num_key_value_heads=4,
        mlp_layer_types=["dense"] + ["sparse"] * 3,
    ),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "lfm3": dict(num_hidden_layers=4),
    "longcat_flash": dict(num_key_value_heads=4, qk_head_dim=16, zero_expert_num=2),
    "mamba2": dict(num_heads=8, head_dim=8, n_groups=2),
    "nemotron": dict(num_key_value_heads=2),
    "nemotron_h": dict(n_groups=2, mamba_num_heads=8, mamba_head_dim=8),
    "recurrent_gemma": dict(num_hidden_layers=3, attention_window_size=8),
    "reformer": dict(
        is_decoder=True,
        axial_pos_shape=[8, 16],
        axial_pos_embds_dim=[16, 16],
        attn_layers=["local", "lsh"],
    ),
    "roc_bert": dict(
        pronunciation_vocab_size=30,
        shape_vocab_size=30,
        pronunciation_embed_dim=8,
        shape_embed_dim=8,
    ),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid"] * 2,
        attention_hidden_size=64,
        attention_head_dim=16,
        num_key_value_heads=4,
    ),
    "zaya": dict(num_experts_per_tok=1),
    "mobilebert": dict(true_hidden_size=32, intra_bottleneck_size=32),
    "luke": dict(entity_vocab_size=30, entity_emb_size=32),
    "perceiver": dict(num_latents=8, d_latents=32),
    "lilt": dict(max_2d_position_embeddings=64),
    "layoutlmv3": dict(coordinate_size=4, shape_size=8),
    "t5": dict(decoder_start_token_id=0),
    "deepseek_v2": HEADS_EQUAL | dict(num_experts_per_tok=2),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2),
    "cohere_compass_text": dict(
        rope_parameters=dict.fromkeys(
            ("full_attention", "sliding_attention"), dict(rope_type="default", rope_theta=1e4)
        ),
    ),
    "dots3_note": dict(per_layer_config={}),
    "gemma3n_text": dict(num_kv_shared_layers=0),
    "zamba2": dict(
        layers_block_type=["mamba", "hybrid"],
        hybrid_layer_ids=[1],
        mamba_headdim=16,
        n_mamba_heads=4,
        attention_hidden_size=64,
        attention_head_dim=16,
        num_key_value_heads=4,
    ),
    "blt": dict(encoder_hash_byte_group_vocab=50),
}


def enliven(model, seed=1):
    "Weights that have something to say: none of them nearly zero."
    rng = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if not p.is_floating_point():
            continue
        noise = torch.randn(p.shape, generator=rng)
        if p.ndim >= 2 and p.std() < 0.1:
            p.data = 0.2 * noise.to(p.dtype)
        elif p.ndim == 1 and not p.data.any():
            p.data = 0.05 * noise.to(p.dtype)
    return model


def tiny_model(task, family, **more):
    "A random model in evaluation mode; an error if there is none so small."
    kind = CONFIG_MAPPING[family]
    given = FAMILIES.get(family, {}) | more
    if task == "causal" and hasattr(kind(), "is_decoder"):
        given = dict(is_decoder=True) | given  # else BERT and its like look ahead
    config = tiny_config(kind, **given)
    auto = BUILD[task]
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    return enliven(auto.from_config(config)).float().eval()
