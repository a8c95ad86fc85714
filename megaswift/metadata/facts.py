"""The vocabulary of family declarations: functions of a config that give one field of ModelMeta each.

DECODER is what nearly all families read alike; a family adds to it or replaces parts.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from megaswift.metadata.config_reader import ConfigReader
from megaswift.metadata.meta import MoEMeta

Fact = Callable[[ConfigReader], Any]

ACTIVATIONS = {  # config's name -> ours
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "relu2": "relu2",
    "xielu": "xielu",
}

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED_TARGETS = (*ATTENTION_TARGETS, "gate_proj", "up_proj", "down_proj")
UNGATED_TARGETS = (*ATTENTION_TARGETS, "up_proj", "down_proj")


def key(name: str, kind: type | None = None) -> Fact:
    """The value of a config key; `kind` is its type where the default is None."""
    return lambda config: config.get(name, kind)


def key_or_none(name: str, kind: type) -> Fact:
    """The value of a config key that may be null whatever its default is."""
    return lambda config: config.nullable(name, kind)


def group(make: Callable[..., Any], **facts: Any) -> Fact:
    """One of meta.py's small dataclasses, whose fields are facts themselves."""
    return lambda config: make(
        **{name: fact(config) if callable(fact) else fact for name, fact in facts.items()}
    )


def required(name: str, kind: type) -> Fact:
    """The value of a config key that has no default."""

    def read(config: ConfigReader) -> Any:
        value = config.get(name, kind)
        if value is None:
            raise config.fail(name, "The family has no default for it; give a value.")
        return value

    return read


def without(facts: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return a copy of a declaration that lacks some of its entries."""
    return {name: fact for name, fact in facts.items() if name not in names}


def activation(name: str) -> Fact:
    """The activation of the feed-forward part."""

    def read(config: ConfigReader) -> str:
        value = config.get(name)
        if value not in ACTIVATIONS:
            raise config.fail(name, f"Known activations: {', '.join(ACTIVATIONS)}.")
        return ACTIVATIONS[value]

    return read


def num_kv_heads(config: ConfigReader) -> int:
    """Key-value groups; null means as many as query heads."""
    return config.nullable("num_key_value_heads", int) or config.get("num_attention_heads")


def head_dim(config: ConfigReader) -> int:
    """Size of one head; null, or no such key in the family, means hidden_size / num_attention_heads."""
    own = config.nullable("head_dim", int)
    return own or config.get("hidden_size") // config.get("num_attention_heads")


def derived_head_dim(config: ConfigReader) -> int:
    """hidden_size / num_attention_heads in families that have no key for it; a file that says otherwise is wrong."""
    size: int = config.get("hidden_size") // config.get("num_attention_heads")
    if config.get("head_dim", int) not in (None, size):
        raise config.fail("head_dim", f"This family takes hidden_size / num_attention_heads = {size}.")
    return size


def window_everywhere(config: ConfigReader) -> tuple[int | None, ...]:
    """`sliding_window` tokens in every layer, or nowhere when it is null."""
    window = config.nullable("sliding_window", int)
    return (window,) * config.get("num_hidden_layers") if window else ()


def layer_kinds(config: ConfigReader, default: list[str], *known: str) -> list[str]:
    """`layer_types`, one of `known` for every layer; `default` when the key is absent or null."""
    kinds = config.get("layer_types", list) or default
    if len(kinds) != len(default) or not set(kinds) <= set(known):
        raise config.fail("layer_types", f"It needs {len(default)} entries, each one of {', '.join(known)}.")
    return kinds


def windows_where_sliding(
    config: ConfigReader, kinds: list[str], window: int | None
) -> tuple[int | None, ...]:
    """The window of every layer: `window` where its kind is sliding_attention; () when no layer slides."""
    if "sliding_attention" not in kinds:
        return ()
    if not window:
        raise config.fail("sliding_window", "layer_types names sliding_attention, so a window is needed.")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def windows_except_every(period: int | str) -> Fact:
    """Layers slide, but for every `period`-th (or what that key says), unless layer_types says otherwise."""

    def read(config: ConfigReader) -> tuple[int | None, ...]:
        step = config.get(period) if isinstance(period, str) else period
        default = alternating(config, step, "sliding_attention", "full_attention")
        kinds = layer_kinds(config, default, "sliding_attention", "full_attention")
        return windows_where_sliding(config, kinds, config.nullable("sliding_window", int))

    return read


def windows_from(first: str, window: Fact) -> Fact:
    """Layers slide from the one that the key `first` names on, unless layer_types says otherwise."""

    def read(config: ConfigReader) -> tuple[int | None, ...]:
        size = window(config)
        slides = [layer >= config.get(first) for layer in range(config.get("num_hidden_layers"))]
        default = ["sliding_attention" if size and one else "full_attention" for one in slides]
        kinds = layer_kinds(config, default, "sliding_attention", "full_attention")
        return windows_where_sliding(config, kinds, size)

    return read


def rope_layers(config: ConfigReader) -> tuple[bool, ...]:
    """no_rope_layers holds 1 where a layer has rotary positions; else each no_rope_layer_interval-th has none."""
    given, interval = config.get("no_rope_layers", list), config.get("no_rope_layer_interval")
    count = config.get("num_hidden_layers")
    if not given:
        return tuple((layer + 1) % interval != 0 for layer in range(count))
    if len(given) != count:
        raise config.fail("no_rope_layers", f"It needs one entry for each of the {count} layers.")
    return tuple(bool(one) for one in given)


def alternating(config: ConfigReader, period: int, usual: str, last: str) -> list[str]:
    """A list with one entry a layer: `usual`, and `last` for every `period`-th layer."""
    return [last if (layer + 1) % period == 0 else usual for layer in range(config.get("num_hidden_layers"))]


def every_layer(config: ConfigReader) -> tuple[bool, ...]:
    """All decoder layers."""
    return (True,) * config.get("num_hidden_layers")


def layers_from(name: str) -> Fact:
    """Decoder layers from the one that a key names on."""

    def read(config: ConfigReader) -> tuple[bool, ...]:
        first = config.get(name)
        return tuple(layer >= first for layer in range(config.get("num_hidden_layers")))

    return read


def sparse_step_layers(config: ConfigReader) -> tuple[bool, ...]:
    """Every decoder_sparse_step-th layer, but for those listed in mlp_only_layers."""
    step, dense = config.get("decoder_sparse_step"), config.get("mlp_only_layers", list) or []
    layers = range(config.get("num_hidden_layers"))
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in layers)


def product(*names: str) -> Fact:
    """The product of some keys, 0 where one of them is null: the width of several shared experts together."""
    return lambda config: math.prod(config.nullable(name, int) or 0 for name in names)


def if_grouped(name: str) -> Fact:
    """A key of group-limited routing; None where there is one group, which limits nothing."""

    def read(config: ConfigReader) -> int | None:
        value: int | None = config.nullable(name, int)
        return value if (config.nullable("n_group", int) or 1) > 1 else None

    return read


def moe(**facts: Any) -> Fact:
    """A MoEMeta whose fields are facts."""
    return group(MoEMeta, **facts)


DECODER: dict[str, Any] = {
    "num_layers": key("num_hidden_layers"),
    "hidden_size": key("hidden_size"),
    "ffn_hidden_size": key("intermediate_size"),
    "num_heads": key("num_attention_heads"),
    "num_kv_heads": num_kv_heads,
    "head_dim": head_dim,
    "vocab_size": key("vocab_size"),
    "max_length": key("max_position_embeddings"),
    "norm_eps": key("rms_norm_eps"),
    "activation": activation("hidden_act"),
    "tied_embeddings": key("tie_word_embeddings"),
    "attention_dropout": key("attention_dropout"),
    "initializer_range": key("initializer_range"),
    "target_modules": GATED_TARGETS,
}

ATTENTION_BIAS: dict[str, Any] = {
    "qkv_bias": key("attention_bias"),
    "attention_out_bias": key("attention_bias"),
}
