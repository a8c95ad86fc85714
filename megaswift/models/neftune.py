"""Noise on the embeddings, each number of which follows from its token's key, its position and its place in the vector alone.

So it is the same under every layout, and after a resume: no generator has a state.

Letters: S tokens of this rank, B rows, D model size.
"""

from dataclasses import dataclass

import torch

from megaswift.data.batches import MicroBatch

CHUNK = 2**22  # numbers drawn at once: 32 MiB for each temporary
_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # as int64, like the constants below


@dataclass(frozen=True, kw_only=True)
class TokenNoise:
    """The noise on a micro batch, as data/noise.py lays it out; tensors [B, S] of all tensor-parallel ranks."""

    keys: torch.Tensor  # int64
    scales: torch.Tensor  # float32
    position_ids: torch.Tensor  # int64


def noise_of(batch: MicroBatch) -> TokenNoise | None:
    """Return the noise that a micro batch asks for."""
    if batch.noise_keys is None or batch.noise_scales is None:
        return None
    return TokenNoise(keys=batch.noise_keys, scales=batch.noise_scales, position_ids=batch.position_ids)


def with_token_noise(embeddings_SBD: torch.Tensor, noise: TokenNoise, *, rank: int = 0) -> torch.Tensor:
    """Return the embeddings plus noise, uniform from -1 to 1 times its token's scale / sqrt(D): arXiv 2310.05914, algorithm 1.

    With sequence parallelism `rank` of tp holds its part of the tokens.
    """
    num_tokens, _, width = embeddings_SBD.shape
    own = slice(rank * num_tokens, (rank + 1) * num_tokens)
    keys_SB, scales_SB, positions_SB = (
        values_BS.transpose(0, 1)[own].to(embeddings_SBD.device)
        for values_BS in (noise.keys, noise.scales, noise.position_ids)
    )
    keys_SB = _mixed(keys_SB + (positions_SB + 1) * _GAMMA)
    steps_D = torch.arange(1, width + 1, device=keys_SB.device) * _GAMMA
    scales_SB = scales_SB * width**-0.5
    chunk = max(1, CHUNK // (keys_SB.shape[1] * width))
    drawn = [
        (_mixed(keys[..., None] + steps_D) >> 40).float() * 2.0**-23 * scales[..., None]
        for keys, scales in zip(keys_SB.split(chunk), scales_SB.split(chunk), strict=True)
    ]
    return embeddings_SBD + torch.cat(drawn).to(embeddings_SBD.dtype)


def _mixed(state: torch.Tensor) -> torch.Tensor:
    """Return the numbers that SplitMix64 makes of its states, int64: Steele et al. 2014 (mix64variant13)."""
    state = (state ^ _shifted(state, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    state = (state ^ _shifted(state, 27)) * (0x94D049BB133111EB - 2**64)
    return state ^ _shifted(state, 31)


def _shifted(state: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right and fill with zeros, not with the sign."""
    return (state >> bits) & (2 ** (64 - bits) - 1)
