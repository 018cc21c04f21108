"""Tiny random models of every family that the driver serves."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Windows of 8 tokens, far shorter than the sequences of the tests: masks differ by layer.
FAMILIES = {
    "llama": ("llama", {}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama 1": ("llama", {"num_key_value_heads": 4}),
    "mistral": ("mistral", {"sliding_window": 8, "head_dim": 16}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "phi3": ("phi3", {"sliding_window": 8, "rope_scaling": None}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "opt projected": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
}

# Mixtures of experts: by model type.
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
MLA = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
EXPERTS = {
    "mixtral": MOE,
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_hidden_layers": 2},
    "gpt_oss": MOE | {"head_dim": 16, "sliding_window": 8},
    "deepseek_v3": ROUTED | MLA
    | {"moe_intermediate_size": 64, "first_k_dense_replace": 0, "num_key_value_heads": 4, "num_hidden_layers": 2},
    "llama4_text": MOE | {"intermediate_size_mlp": 96, "head_dim": 16, "interleave_moe_layer_step": 1},
    "longcat_flash": ROUTED | MLA
    | {"expert_ffn_hidden_size": 64, "ffn_hidden_size": 96, "zero_expert_num": 2, "moe_topk": 2, "num_layers": 2,
       "num_key_value_heads": 4, "head_dim": 16},
    "jetmoe": MOE | {"kv_channels": 16},
}  # fmt: skip


def model(family: str = "llama", dtype: torch.dtype = torch.float32, **changes):
    """A random model, the same for the same arguments, in evaluation mode."""
    model_type, options = FAMILIES.get(family, (family, EXPERTS.get(family, {})))
    config = AutoConfig.for_model(model_type, **(COMMON | options | changes))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def ids(samples: int = 5, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 128, (samples, length), generator=torch.Generator().manual_seed(0))


def weights(of) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in of.named_parameters()}
