"""Hunyuan V1, dense and mixtures of experts: norms of q and k after the rotary positions."""

from dataclasses import replace
from typing import Any

from megaswift.metadata.config_reader import ConfigReader
from megaswift.metadata.facts import ATTENTION_BIAS, DECODER, Fact, every_layer, key, moe
from megaswift.metadata.family import Family
from megaswift.metadata.meta import RopeScaling
from megaswift.metadata.rope import ROPE, rope_parameters, scaling_of

# Keys of yarn that the released files hold beside alpha; the class does not look at them.
_IGNORED_BY_ALPHA = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def _scaling(config: ConfigReader) -> RopeScaling | None:
    """type=dynamic with an alpha means a fixed, larger base."""
    parameters: dict[str, Any] = dict(rope_parameters(config))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "dynamic" and parameters.get("alpha"):
        parameters.pop("type", None)
        return scaling_of({**parameters, "rope_type": "ntk_alpha"}, config, understood=_IGNORED_BY_ALPHA)
    return scaling_of(parameters, config)


HUNYUAN_V1_DENSE = Family(
    name="hunyuan_v1_dense",
    architecture="HunYuanDenseV1ForCausalLM",
    defaults={
        "vocab_size": 290943,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": None,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
    },
    aliases={"attention_head_dim": "head_dim"},
    facts={
        **DECODER,
        **ROPE,
        **ATTENTION_BIAS,
        "rope_scaling": _scaling,
        "qk_norm": "head",
        "qk_norm_after_rope": True,
    },
    harmless_values={
        "mlp_bias": (False,),
        "norm_type": ("rms",),
        "position_embedding_xdrope": (False,),
        "use_cla": (False,),
        "use_qk_norm": (True,),
        "use_rotary_pos_emb": (True,),
        "add_classification_head": (False,),
        "class_num": (0,),
    },
    harmless_keys=(
        *(
            "eod_token_id",
            "pad_id",
            "im_start_id",
            "im_end_id",
            "im_newline_id",
            "image_token_id",
            "text_start_id",
        ),
        *(
            "text_end_id",
            "video_start_id",
            "video_end_id",
            "mask_init_id",
            "org_vocab_size",
            "num_media_embeds",
        ),
        *("cla_share_factor", "dense_list", "pool_type", "anyres_pooling_size", "anyres_vit_max_image_size"),
    ),
    supported=True,
)


def _same_everywhere(name: str) -> Fact:
    """A number, or a list of equal numbers with one entry a layer."""

    def read(config: ConfigReader) -> int:
        value = config.values.get(name, config.defaults[name])
        entries: set[Any] = set(value) if isinstance(value, list) else {value}
        if len(entries) != 1 or not all(isinstance(one, int) for one in entries):
            raise config.fail(name, "Layers that differ in it are not supported.")
        return int(entries.pop())

    return read


HUNYUAN_V1_MOE = replace(
    HUNYUAN_V1_DENSE,
    name="hunyuan_v1_moe",
    architecture="HunYuanMoEV1ForCausalLM",
    defaults={**HUNYUAN_V1_DENSE.defaults, "num_experts": 1, "moe_topk": 1},
    aliases={
        **HUNYUAN_V1_DENSE.aliases,
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "moe_topk",
    },
    facts={
        **HUNYUAN_V1_DENSE.facts,
        "moe": moe(
            num_experts=_same_everywhere("num_experts"),
            topk=_same_everywhere("moe_topk"),
            ffn_hidden_size=key("intermediate_size"),
            layer_is_moe=every_layer,
            shared_ffn_hidden_size=key("intermediate_size"),
        ),
    },
    harmless_values={
        **HUNYUAN_V1_DENSE.harmless_values,
        "group_limited_greedy": (False,),
        "kv_lora_rank": (None,),
        "moe_layer_num_skipped": (0,),
        "n_group": (None,),
        "norm_topk_prob": (True,),
        "q_lora_rank": (None,),
        "qk_nope_head_dim": (None,),
        "qk_rope_head_dim": (None,),
        "routed_scaling_factor": (False, 1.0),
        "topk_group": (None,),
        "use_mixed_mlp_moe": (True,),
        "use_mla": (False,),
        "v_head_dim": (None,),
    },
    harmless_keys=(
        *HUNYUAN_V1_DENSE.harmless_keys,
        *(
            "moe_drop_tokens",
            "moe_random_routing_dropped_token",
            "moe_intermediate_size",
            "num_shared_expert",
        ),
    ),
    supported=True,
)
