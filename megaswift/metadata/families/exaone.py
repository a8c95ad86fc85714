"""EXAONE 4: norms after each branch, and no rotary positions in the layers with full attention."""

from megaswift.metadata.config_reader import ConfigReader
from megaswift.metadata.facts import DECODER, alternating, group, layer_kinds, windows_where_sliding
from megaswift.metadata.family import Family
from megaswift.metadata.meta import NormMeta, RopeMeta
from megaswift.metadata.rope import ROPE


def _kinds(config: ConfigReader) -> list[str]:
    """Layers slide, but for every sliding_window_pattern-th, unless layer_types says otherwise."""
    if config.nullable("sliding_window", int) is None:
        return ["full_attention"] * config.get("num_hidden_layers")
    pattern = config.values.get("sliding_window_pattern", config.defaults["sliding_window_pattern"])
    period = (
        len(pattern) if isinstance(pattern, str) else pattern
    )  # "LLLG" in the released files, which name layer_types
    default = alternating(config, period, "sliding_attention", "full_attention")
    return layer_kinds(config, default, "sliding_attention", "full_attention")


def _windows(config: ConfigReader) -> tuple[int | None, ...]:
    """The window of the sliding layers."""
    return windows_where_sliding(config, _kinds(config), config.nullable("sliding_window", int))


def _rope_layers(config: ConfigReader) -> tuple[bool, ...]:
    """Only sliding layers turn; without a window all of them do."""
    if config.nullable("sliding_window", int) is None:
        return ()
    return tuple(kind == "sliding_attention" for kind in _kinds(config))


EXAONE4 = Family(
    name="exaone4",
    architecture="Exaone4ForCausalLM",
    defaults={
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": None,
        "rope_theta": 10000.0,
        "attention_dropout": 0.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "layer_types": None,
    },
    facts={
        **DECODER,
        **ROPE,
        "rope": group(RopeMeta, layers=_rope_layers),
        "norm": NormMeta(placement="post"),
        "qk_norm": "head",
        "sliding_window": _windows,
    },
    supported=True,
)
