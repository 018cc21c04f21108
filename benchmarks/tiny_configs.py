"""A tiny configuration of every family of transformers' mappings: fields by their names, exceptions by family.

Configurations call the same thing by many names, and the same name means the same nearly everywhere: ``SIZES`` has a
value for each. ``FIXES`` has what a family wants otherwise, by the ``model_type`` that a field's own configuration has:
a fix for ``gemma3_text`` holds inside every model that has such a decoder.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

KINDS: dict[str, dict[str, str]] = {  # model_type -> class
    "causal": dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "image-text": dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
}
VOCABULARY = 256
SPECIAL = range(240, 252)  # ids that configurations keep for images and the like; no calibration token is one of them

# The families that people use most.
USED_MOST = (
    "llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gemma4_text", "phi", "phi3",
    "glm", "glm4", "olmo2", "olmo3", "smollm3", "granite", "cohere2", "falcon", "ernie4_5", "hunyuan_v1_dense",
    "exaone4", "starcoder2", "stablelm", "opt", "gpt_neo", "gptj", "bloom", "mpt", "arcee", "seed_oss", "apertus",
    "llama4", "llama4_text", "mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "gpt_oss", "deepseek_v2", "deepseek_v3",
    "glm4_moe", "granitemoe", "ernie4_5_moe", "minimax", "dots1", "qwen3_next", "qwen3_5", "qwen3_5_moe", "falcon_h1",
    "mamba2", "nemotron_h", "jamba", "bamba", "lfm2", "gemma3n_text", "gpt2",
)  # fmt: skip

_BY_SIZE = {
    VOCABULARY: "vocab_size output_vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input "
    "max_position_embeddings n_positions max_seq_len n_ctx context_length max_target_positions "
    "original_max_position_embeddings",
    # 64: the least that a packed layer can have.
    64: "hidden_size n_embd d_model emb_dim embedding_size embedding_dim word_embed_proj_dim input_embedding_size "
    "output_embedding_size attention_hidden_size lru_width hidden_dim dim embed_dim out_hidden_size projection_dim "
    "output_dim d_embed projector_hidden_size projection_hidden_size vision_hidden_size image_text_hidden_size "
    "teacher_dim text_hidden_size moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size "
    "shared_intermediate_size shared_experts_intermediate_size moe_shared_expert_intermediate_size moe_hidden_size "
    "kv_lora_rank q_lora_rank audio_vocab_size max_2d_position_embeddings max_source_positions "
    "pronunciation_vocab_size shape_vocab_size pronunciation_embed_dim shape_embed_dim encoder_hash_byte_group_vocab "
    "dim_model_base hidden_size_global backbone_hidden_size decoder_hidden_size image_token_embed_dim adapter_in_dim "
    "adapter_out_dim adapter_input_size num_embeddings base_channels latent_channels ngram_vocab_size_base",
    128: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size d_ff d_inner dff dim_ff "
    "feed_forward_size intermediate_size_mlp dense_intermediate_size mlp_dim prefix_dense_intermediate_size "
    "alignment_intermediate_size mamba_d_ssm",
    32: "router_hidden_size qk_head_dim image_size block_multiple_of",
    # Windows and chunks that are shorter than the calibration sequences, so that masks differ by layer.
    16: "head_dim d_head dim_head kv_channels d_kv global_head_dim attention_head_dim swa_head_dim "
    "attention_head_size swa_v_head_dim hidden_size_per_layer_input sliding_window local_attention "
    "attention_window_size window_size attention_chunk_size sliding_window_size local_attention_window_len "
    "rel_extent o_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim gated_norm_rank index_head_dim "
    "linear_key_head_dim linear_value_head_dim linear_head_dim laurel_rank adapter_rank hc_lowrank loop_gate_rank "
    "mamba_d_head mamba_d_state mamba_chunk_size mamba_head_dim mamba_headdim state_size ssm_state_size chunk_size "
    "block_size query_pre_attn_scalar num_mel_bins max_patches indexer_head_dim indexer_budget",
    8: "mamba_n_heads mamba_num_heads time_step_rank mamba_dt_rank rotary_dim patch_size d_rel canvas_length "
    "index_topk index_block_size",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_blocks num_decoder_layers "
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads encoder_num_attention_heads swa_num_attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads linear_num_heads "
    "num_query_tokens indexer_compress_ratio split_ngram_parts",
    3: "num_channels",
    2: "encoder_layers depth num_encoder_layers num_layers_per_stack num_kv_shared_layers num_key_value_heads "
    "num_kv_heads swa_num_key_value_heads num_global_key_value_heads max_window_layers num_experts_per_tok moe_k "
    "moe_topk top_k_experts zero_expert_num interleave_moe_layer_step o_groups index_n_heads index_topk_blocks "
    "linear_num_key_heads attn_layer_period expert_layer_period n_mamba_heads n_groups num_codebooks sep_token_id "
    "eos_token_id layer_group_size global_attn_every_n_layers indexer_n_heads",
    1: "num_dense_layers moe_num_shared_experts n_group topk_group first_k_dense_replace moe_layer_start_index "
    "attn_layer_offset expert_layer_offset bos_token_id decoder_start_token_id cls_token_id indexer_kv_heads",
    0: "num_nextn_predict_layers num_mtp_layers pad_token_id mem_len",
}  # fmt: skip
SIZES: dict[str, Any] = {name: size for size, names in _BY_SIZE.items() for name in names.split()}
SIZES |= {"dropout": 0.0, "attention_dropout": 0.0, "boi_token_index": 251, "eoi_token_index": 252}
# Fields whose None says that the family has none of it.
NONE_STAYS = {"n_group", "topk_group", "moe_latent_size", "shared_expert_intermediate_size", "zero_expert_num"}

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = ROPE | {"mrope_section": [2, 3, 3]}  # rows of time, height and width: half of a head of 16
CONVOLUTIONS = {"layer_types": ["conv", "conv", "full_attention", "conv"]}

# In place of towers of a package that transformers does not require.
VISION: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
}
IMAGE_WORDS = {"<image>": 251, "<|extra_200|>": 250}

# Where a field has a configuration of its own, a fix for it is a dictionary.
FIXES: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "audio_config": {"codebook_dim": 64, "codebook_size": 16},
        "vision_config": {"codebook_size": 16},
        "image_token_offset": 200,
        "audio_token_offset": 216,
    },
    "bert": {"is_decoder": True},
    "chameleon": {"vocabulary_map": IMAGE_WORDS},
    "cohere_compass_text": {"rope_parameters": {"full_attention": MROPE, "sliding_attention": MROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "head_dim": 32,
        "per_layer_config": {3: {"kv_lora_rank": 32}},
        "layer_types": ["indexed_attention"] * 3 + ["sliding_attention"],
    },
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense"] * 4},
    "emu3": {"vocabulary_map": IMAGE_WORDS},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [64, 64],
        "rope_parameters": ROPE | {"mrope_section": [3, 3, 2]},
    },
    "fast_vlm": {"vision_config": VISION},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "multi_query": False},
    "florence_vision": {"patch_size": [7, 3, 3, 3], "embed_dim": [16, 32, 32, 64], "num_heads": [2] * 4},
    "gemma4_assistant": {
        "text_config": {
            **dict.fromkeys(("vocab_size_per_layer_input", "hidden_size_per_layer_input"), 0),
            **dict.fromkeys(("num_kv_shared_layers", "num_hidden_layers", "num_attention_heads"), 4),
            "hidden_size": 64,
            "intermediate_size": 128,
            "vocab_size": VOCABULARY,
        },
    },
    "glm4v_moe_text": {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
    "glm5_next_text": {"num_key_value_heads": 4, "index_kpool": 8, "qk_rope_head_dim": 0},
    "gpt_bigcode": {"num_key_value_heads": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite4_vision": {"deepstack_layer_map": [[-2, 0]], "downsample_rate": "1/2"},
    "lfm2": CONVOLUTIONS,
    "lfm2_moe": CONVOLUTIONS,
    "mamba2": {"num_heads": 8},
    "molmo2_adapter": {"vision_feature_layer": [3, 1]},
    "molmo2_vision": {"image_size": [32, 32]},
    "mpt": {"attn_config": {}, "expansion_ratio": 2},
    "muse_spark_audio": {"hidden_sizes": [32, 32, 64, 64]},
    "perception_lm": {"vision_config": VISION | {"model_args": {"embed_dim": 64}}},
    "qwen2": {"use_sliding_window": True},
    "qwen2_moe": {"use_sliding_window": True},
    "reformer": {
        "num_hidden_layers": None,
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [32, 32],
        "is_decoder": True,
        "num_buckets": 4,
    },
    "smollm3": {"no_rope_layer_interval": 4},
    "xlnet": {"mem_len": None},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
_SAME: dict[str, tuple[dict[str, Any], str]] = {
    "encoders that can be decoders": (
        {"is_decoder": True},
        "big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta roberta-prelayernorm roc_bert "
        "roformer xlm-roberta xlm-roberta-xl xmod bert-generation",
    ),
    "as many keys as queries, which latent attention makes of one": (
        {"num_key_value_heads": 4},
        "axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa kimi_linear "
        "longcat_flash minicpm3 youtu sarvam_mla mistral4 mistral_large4_text",
    ),
    "positions in three directions": (
        {"rope_parameters": MROPE},
        "qwen2_vl_text qwen2_5_vl_text qwen2_5_omni_text paddleocr_vl_text qwen3_omni_moe_text qwen3_vl_text "
        "qwen3_vl_moe_text glm4v_text glm_ocr_text hunyuan_vl_text",
    ),
    "shared keys and values in the last two of two kinds": (
        {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
        "gemma4_text gemma4_unified_text",
    ),
}
for _fields, _families in _SAME.values():
    for _family in _families.split():
        FIXES[_family] = FIXES.get(_family, {}) | _fields


def tiny_config(family: str) -> PretrainedConfig:
    """The configuration of a small model of a family, the same in every process.

    Args:
        family: a ``model_type`` of transformers.

    Raises:
        KeyError: transformers does not know the family. And whatever its configuration raises.
    """
    kind = CONFIG_MAPPING[family]
    return _tiny(kind, family, _default(kind), {})


def _tiny(
    kind: type[PretrainedConfig], family: str, default: PretrainedConfig | None, wanted: dict[str, Any]
) -> PretrainedConfig:
    """``default``: what the configuration is without our doing. ``wanted``: what it is inside of wants of it."""
    fields = _common_fields(kind, default)
    fixes = copy.deepcopy(FIXES.get(family, {})) | wanted
    if default is not None:
        positions = getattr(default, "rope_parameters", None)
        if "mrope_section" in str(positions):
            fields["rope_parameters"] = _shrink_sections(positions, fields.get("head_dim", 16) // 2)
    for name in getattr(kind, "sub_configs", None) or {}:
        part = getattr(default, name, None)
        if isinstance(part, PretrainedConfig):
            if "model_type" in fixes.get(name, {}):  # another kind of part
                fields[name] = CONFIG_MAPPING[fixes[name]["model_type"]](**fixes.pop(name))
            else:
                fields[name] = _tiny(type(part), part.model_type, part, _told(part) | fixes.pop(name, {}))
    fields |= fixes
    if fields.get("num_hidden_layers", 0) is None:
        del fields["num_hidden_layers"]
    return kind(**fields)


def _default(kind: type[PretrainedConfig]) -> PretrainedConfig | None:
    """None: the configuration has fields without a default."""
    try:
        return kind()
    except Exception:  # noqa: BLE001 -- whatever a constructor raises: the fields' names are enough then
        return None


def _value(config: PretrainedConfig | None, name: str) -> Any:
    """A field's value; ``...`` where it differs by layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return ...


def _told(part: PretrainedConfig) -> dict[str, Any]:
    """What the configuration around ``part`` has told it to be: numbers and names that are not its own defaults."""
    own = _default(type(part))
    return {
        name: value
        for field in dataclasses.fields(part)
        if isinstance(value := _value(part, name := field.name), bool | int | float | str)
        and name not in SIZES
        and value != _value(own, name)
    }


def _common_fields(kind: type[PretrainedConfig], default: PretrainedConfig | None) -> dict[str, Any]:
    """What ``SIZES`` has for the fields of a configuration; special tokens inside the vocabulary."""
    found: dict[str, Any] = {}
    special = iter(SPECIAL)
    for field in dataclasses.fields(kind):
        name = field.name
        value = _value(default, name)
        if name in SIZES:
            if not (name in NONE_STAYS and value is None):
                found[name] = SIZES[name]
        elif name.endswith(("token_id", "token_index", "_token")) and isinstance(value, int) and value >= VOCABULARY:
            found[name] = next(special)
    return found


def _shrink_sections(positions: Any, half: int) -> Any:
    """``mrope_section`` for heads of ``2 * half``, also where it differs by kind of layer."""
    if not isinstance(positions, dict):
        return positions
    found = {key: _shrink_sections(value, half) for key, value in positions.items()}
    sections = found.get("mrope_section")
    if isinstance(sections, list | tuple):
        total, count = int(half * (found.get("partial_rotary_factor") or 1.0)), len(sections)
        found["mrope_section"] = [total // count + (index >= count - total % count) for index in range(count)]
    return found
