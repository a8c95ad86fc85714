"""Rotary embedding, in plain torch.

Letters: A position axes, T packed tokens, H heads, K head size, R half of the rotary dimensions.
"""

import torch


def rotary_table(
    positions_AT: torch.Tensor, inverse_frequencies_R: torch.Tensor, axes_R: torch.Tensor, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines [T, R], float32, of position[axis of frequency] * frequency, times `scale`."""
    angles_TR = positions_AT.float()[axes_R].t() * inverse_frequencies_R.float()
    return angles_TR.cos() * scale, angles_TR.sin() * scale


def rotate(
    x_THK: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, *, interleaved: bool
) -> torch.Tensor:
    """Return x with its first 2R dimensions rotated: pairs (j, R + j), or (2j, 2j + 1) where interleaved."""
    half = cos_TR.shape[1]
    rotated, rest_THK = x_THK[..., : 2 * half].float(), x_THK[..., 2 * half :]
    cos_T1R, sin_T1R = cos_TR[:, None], sin_TR[:, None]
    pairs = rotated.unflatten(-1, (half, 2)).unbind(-1) if interleaved else rotated.split(half, dim=-1)
    # Products are added in place: on processors this is what is run, and every pass over memory counts.
    first = (pairs[0] * cos_T1R).addcmul_(pairs[1], sin_T1R, value=-1.0)
    second = (pairs[1] * cos_T1R).addcmul_(pairs[0], sin_T1R)
    if interleaved:
        joined = torch.stack([first, second], dim=-1).flatten(-2).to(x_THK.dtype)
        return torch.cat([joined, rest_THK], dim=-1)
    return torch.cat([first.to(x_THK.dtype), second.to(x_THK.dtype), rest_THK], dim=-1)
