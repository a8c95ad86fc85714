"""Rotary positions with every kind of scaling that config.json can name.

Letters: S positions, R rotary size of a head.
"""

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megaswift.errors import ModelError
from megaswift.metadata.meta import ModelMeta, RopeScaling
from megaswift.models.context import SpreadDocuments


class RotaryPositions(RotaryEmbedding):
    """Megatron's rotary embedding with the frequencies of the model, which may depend on the length."""

    def __init__(self, meta: ModelMeta, device: torch.device, **kwargs: Any) -> None:
        super().__init__(
            kv_channels=meta.head_dim,
            rotary_percent=meta.rotary_fraction,
            rotary_interleaved=meta.rope.interleaved,
            rotary_base=meta.rope_theta,
            **kwargs,
        )
        self.metas, _ = rope_tables(meta)
        self.device = device

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> Any:
        """Return what `forward` makes a table of: a length, or the documents that are spread over ranks."""
        documents = next((one for one in (*args, *kwargs.values()) if isinstance(one, SpreadDocuments)), None)
        return super().get_rotary_seq_len(*args, **kwargs) if documents is None else documents

    def forward(self, rows: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the angles [S, tables, 1, R] of positions 0 to S - 1, or those of a rank's own tokens."""
        if isinstance(rows, SpreadDocuments):
            return self.get_emb(rows.longest)[rows.position_ids_T]
        return super().forward(rows, *args, **kwargs)

    def get_emb(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """Return the angles [S, tables, 1, R], float32, in the order of `rope_tables`; short ones end in zeros."""
        positions = torch.arange(offset, offset + max_seq_len, device=self.device, dtype=torch.float32)
        tables = []
        for meta in self.metas:
            frequencies = inverse_frequencies(meta, length=offset + max_seq_len).to(self.device)
            angles = torch.outer(positions, frequencies)
            tables.append(
                angles.repeat_interleave(2, dim=-1) if self.rotary_interleaved else angles.repeat(1, 2)
            )
        widest = max(table.shape[1] for table in tables)
        return torch.stack([F.pad(table, (0, widest - table.shape[1])) for table in tables], dim=1)[
            :, :, None
        ]


def rope_tables(meta: ModelMeta) -> tuple[list[ModelMeta], list[int]]:
    """Return the kinds of rotary positions that layers have, each as a model that has it everywhere, and each layer's kind."""
    kinds: list[tuple[int, float, RopeScaling | None]] = []
    models, of_layers = [], []
    for layer in range(meta.num_layers):
        one = meta.of_layer(layer)
        slides = bool(meta.sliding_window) and meta.sliding_window[layer] is not None
        if slides and meta.rope.local_theta is not None:
            one = replace(one, rope_theta=meta.rope.local_theta, rope_scaling=None)
        kind = one.head_dim, one.rope_theta, one.rope_scaling
        if kind not in kinds:
            kinds.append(kind)
            models.append(one)
        of_layers.append(kinds.index(kind))
    return models, of_layers


def rotary_dim(meta: ModelMeta) -> int:
    """Return how much of a head turns."""
    return int(meta.head_dim * meta.rotary_fraction)


def inverse_frequencies(meta: ModelMeta, *, length: int = 0) -> torch.Tensor:
    """Return the rotary frequencies [R / 2], float32, as transformers computes them (modeling_rope_utils.py, 5.23).

    `length` is that of the longest document at hand: some kinds of scaling begin beyond the original context only.
    """
    dim = rotary_dim(meta)
    scaling = meta.rope_scaling
    kind = scaling.kind if scaling else "default"
    if scaling is None:
        return _frequencies(meta.rope_theta, dim)
    if kind == "linear":
        return _frequencies(meta.rope_theta, dim) / scaling.factor
    if kind == "llama3":
        return _llama3(_frequencies(meta.rope_theta, dim), scaling)
    if kind == "yarn":
        return _yarn(meta.rope_theta, dim, scaling)
    if kind == "longrope":
        return _longrope(_frequencies(meta.rope_theta, dim), scaling, length=length)
    if kind == "dynamic":
        stretch = scaling.factor * max(length, meta.max_length) / meta.max_length - (scaling.factor - 1)
        return _frequencies(meta.rope_theta * stretch ** (dim / (dim - 2)), dim)
    if kind == "ntk_alpha":
        assert scaling.alpha is not None, "ntk_alpha scaling names its alpha"
        return _frequencies(meta.rope_theta * scaling.alpha ** (dim / (dim - 2)), dim)
    if kind == "proportional":
        return _proportional(_frequencies(meta.rope_theta, dim), scaling)
    raise ModelError(f"rope_type={kind} of {meta.model_type} is not supported.")


def _frequencies(theta: float, dim: int) -> torch.Tensor:
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Divide long wavelengths by the factor, keep short ones, blend between (Llama 3.1's model card and reference code)."""
    assert scaling.original_max_position is not None, "llama3 scaling names its original context"
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position / wavelengths  # over the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    scaled = frequencies / scaling.factor
    blended = (1 - blend) * scaled + blend * frequencies
    return torch.where(
        turns < scaling.low_freq_factor,
        scaled,
        torch.where(turns > scaling.high_freq_factor, frequencies, blended),
    )


def _yarn(theta: float, dim: int, scaling: RopeScaling) -> torch.Tensor:
    """Divide the frequencies of slow dimensions by the factor, keep fast ones, a ramp between (Peng et al. 2023, 3.2)."""
    original = scaling.original_max_position
    assert original is not None, "yarn scaling has an original context"
    low, high = (
        dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001  # transformers' guard against a step
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    frequencies = _frequencies(theta, dim)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)


def _longrope(frequencies: torch.Tensor, scaling: RopeScaling, *, length: int) -> torch.Tensor:
    """Divide each frequency by its own factor; there is a list for short and one for long input (Ding et al. 2024)."""
    assert scaling.original_max_position is not None, "longrope scaling has an original context"
    is_long = length > scaling.original_max_position
    return frequencies / torch.tensor(scaling.long_factor if is_long else scaling.short_factor)


def _proportional(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Keep the fastest part of the frequencies and let the rest of the head stand still."""
    turning = int(
        scaling.proportion * 2 * len(frequencies) // 2
    )  # rounded as transformers does, from the head's size
    return F.pad(frequencies[:turning], (0, len(frequencies) - turning)) / scaling.factor
