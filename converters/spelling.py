"""How Megatron's layer specs spell the same parameter: Transformer Engine fuses norms and groups experts."""

import re

# Transformer Engine's spelling (gpt_layer_specs.py and experts.py TEGroupedMLP, 0.16.1) -> the local spec's
_LOCAL_SPELLING = (
    (
        re.compile(r"(decoder\.layers\.\d+\.)self_attention\.linear_qkv\.layer_norm_(weight|bias)"),
        r"\1input_layernorm.\2",
    ),
    (
        re.compile(r"(decoder\.layers\.\d+\.)mlp\.linear_fc1\.layer_norm_(weight|bias)"),
        r"\1pre_mlp_layernorm.\2",
    ),
    (re.compile(r"(.*\.mlp\.experts)\.(linear_fc[12])\.weight(\d+)"), r"\1.local_experts.\3.\2.weight"),
)

LORA_SUFFIXES = (".lora_a.weight", ".lora_b.weight", ".lora_magnitude.weight")


def local_spelling(name: str) -> str:
    """Return the local spec's name for a parameter of either spec."""
    for pattern, replacement in _LOCAL_SPELLING:
        if match := pattern.fullmatch(name):
            return match.expand(replacement)
    return name


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to a LoRA adapter rather than to the base model."""
    return name.endswith(LORA_SUFFIXES)
