"""Elements that one rank sends for one layer of spread attention. No tensors.

Sources: ring and gathered keys, Llama 3 (arXiv 2407.21783, 3.3.2); exchanged heads, DeepSpeed-Ulysses (arXiv
2309.14509, 3.2). The tests hold these against the bytes counted on gloo.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Heads of one tensor-parallel rank."""

    query: int
    groups: int  # of keys and values
    key_size: int
    value_size: int


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Elements sent by one rank."""

    forward: int  # in the inputs' type
    backward: int  # in the inputs' type
    backward_float32: int  # sums of gradients

    def bytes(self, element_size: int) -> int:
        """Return bytes of forward and backward for inputs of `element_size` bytes."""
        return (self.forward + self.backward) * element_size + self.backward_float32 * 4


def volume(heads: Heads, *, tokens: int, ring: int, inner: int) -> Volume:
    """Return what a rank with `tokens` tokens sends: keys to ring ranks (gathered or not), heads to inner ones."""
    per_token = heads.key_size + heads.value_size
    groups = sent_groups(heads, inner)
    # Within a ring a rank works for the tokens of its inner ranks with its part of the heads.
    to_ring = (ring - 1) * tokens * inner * (groups // inner) * per_token
    features = heads.query * per_token + groups * per_token
    to_inner = (inner - 1) * tokens * features // inner
    return Volume(forward=to_ring + to_inner, backward=to_ring + to_inner, backward_float32=to_ring)


def sent_groups(heads: Heads, inner: int) -> int:
    """Return the key/value heads exchanged: some more than once where the inner ranks do not divide them."""
    return heads.groups if inner == 1 else math.lcm(heads.groups, inner)
