"""StarCoder2: layer norms with biases, biases everywhere, a feed-forward part without a gate."""

from megaswift.metadata.facts import ATTENTION_TARGETS, DECODER, key, window_everywhere
from megaswift.metadata.family import Family
from megaswift.metadata.meta import NormMeta
from megaswift.metadata.rope import ROPE

STARCODER2 = Family(
    name="starcoder2",
    architecture="Starcoder2ForCausalLM",
    defaults={
        "vocab_size": 49152,
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "head_dim": None,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "initializer_range": 0.018042,
        "norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "rope_parameters": None,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "use_bias": True,
    },
    facts={
        **DECODER,
        **ROPE,
        "norm_eps": key("norm_epsilon"),
        "norm": NormMeta(kind="layernorm", bias=True),
        "gated_mlp": False,
        "qkv_bias": key("use_bias"),
        "attention_out_bias": key("use_bias"),
        "mlp_bias": key("use_bias"),
        "residual_dropout": key("residual_dropout"),
        "sliding_window": window_everywhere,
        "target_modules": (*ATTENTION_TARGETS, "c_fc", "c_proj"),
    },
    harmless_values={"mlp_type": ("default",), "norm_type": ("layer_norm",)},
    supported=True,
)
