"""The gated delta rule token by token, in plain torch (Yang et al. 2024, 2412.06464, eq. 10).

Letters: B batch, S sequence, H heads, K key head size, U value head size.
"""

import torch


def gated_delta_rule(
    query_BSHK: torch.Tensor,
    key_BSHK: torch.Tensor,
    value_BSHU: torch.Tensor,
    decay_BSH: torch.Tensor,
    beta_BSH: torch.Tensor,
    documents_BS: torch.Tensor,
) -> torch.Tensor:
    """Return [B, S, H, U]: what each query reads from a state [K, U] that is empty at the start of every document.

    The state is multiplied by exp(decay); then what it holds for the key is moved towards the value by beta.
    """
    batch, length, heads, key_size = query_BSHK.shape
    state = query_BSHK.new_zeros(batch, heads, key_size, value_BSHU.shape[-1])
    outputs = []
    for token in range(length):
        if token:
            continues = documents_BS[:, token] == documents_BS[:, token - 1]
            state = state * continues[:, None, None, None]
        state = state * decay_BSH[:, token].exp()[..., None, None]
        key, value = key_BSHK[:, token], value_BSHU[:, token]
        held = (state * key[..., None]).sum(-2)
        update = beta_BSH[:, token, :, None] * (value - held)
        state = state + key[..., None] * update[..., None, :]
        outputs.append((state * query_BSHK[:, token, :, :, None]).sum(-2))
    return torch.stack(outputs, dim=1)
