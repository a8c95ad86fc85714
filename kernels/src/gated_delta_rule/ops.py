"""The gated delta rule in chunks, on packed documents: flash-linear-attention's kernel on a GPU that has it, else torch.

Within a chunk all updates of the state are one triangular system, so that only chunks follow one another
(Yang et al. 2024, 2412.06464, section 3.3).

Letters: B batch, S sequence, H heads, K key head size, U value head size, N chunks, C tokens of a chunk.
"""

import importlib.util

import torch
import torch.nn.functional as F

CHUNK = 64  # tokens: the triangular system's cost grows with it, the number of steps shrinks


def gated_delta_rule(
    query_BSHK: torch.Tensor,
    key_BSHK: torch.Tensor,
    value_BSHU: torch.Tensor,
    decay_BSH: torch.Tensor,
    beta_BSH: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return [B, S, H, U] of value's dtype; reference.py says what it is.

    `decay` is the logarithm of the state's factor, float32, not positive. `cu_seqlens` int32 [documents + 1] are the
    bounds of documents that lie end to end in a batch of one; without it every row of the batch is one document.
    """
    inputs = (query_BSHK, key_BSHK, value_BSHU, decay_BSH, beta_BSH)
    if value_BSHU.is_cuda and importlib.util.find_spec("fla") is not None:
        return _fla(*inputs, cu_seqlens=cu_seqlens)
    documents_BS = document_ids(cu_seqlens, value_BSHU.shape[0], value_BSHU.shape[1], value_BSHU.device)
    return in_chunks(*(one.float() for one in inputs), documents_BS=documents_BS).to(value_BSHU.dtype)


def document_ids(
    cu_seqlens: torch.Tensor | None, batch: int, length: int, device: torch.device
) -> torch.Tensor:
    """Return the number of each token's document, int64 [B, S]."""
    if cu_seqlens is None:
        return torch.zeros(batch, length, dtype=torch.int64, device=device)
    positions = torch.arange(length, device=device)
    return torch.bucketize(positions, cu_seqlens[1:].to(positions), right=True)[None]


def _fla(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, *,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # here, because it may be absent

    bounds = None if cu_seqlens is None else cu_seqlens.to(torch.int64)
    output, _ = chunk_gated_delta_rule(query, key, value, g=decay, beta=beta, scale=1.0, cu_seqlens=bounds)
    return output


def in_chunks(
    query_BSHK: torch.Tensor,
    key_BSHK: torch.Tensor,
    value_BSHU: torch.Tensor,
    decay_BSH: torch.Tensor,
    beta_BSH: torch.Tensor,
    *,
    documents_BS: torch.Tensor,
) -> torch.Tensor:
    """Return [B, S, H, U], everything float32."""
    length = value_BSHU.shape[1]
    query, key, value, decay, beta = (
        _chunks(x) for x in (query_BSHK, key_BSHK, value_BSHU, decay_BSH, beta_BSH)
    )  # [B, H, N, C, ...]; the padding at the end changes nothing: its beta is zero
    documents = _chunks(documents_BS[:, :, None], mode="replicate")  # [B, 1, N, C]
    total = decay.double().cumsum(-1)  # differences of large sums are taken below
    is_near = (documents[..., :, None] == documents[..., None, :]).tril()
    # What is left at token i of what token j wrote; documents do not see each other.
    left = (total[..., :, None] - total[..., None, :]).masked_fill(~is_near, float("-inf")).exp().float()
    # And of the state from before the chunk, if its document goes on.
    before = torch.cat([documents[:, :, :1, :1], documents[:, :, :-1, -1:]], dim=2)
    entering = (total.exp().float() * (documents == before))[..., None]
    # updates + strictly_lower(beta * left * key key^T) updates = beta * (value - entering * key state)
    system = (beta[..., None] * left * (key @ key.transpose(-1, -2))).tril(-1)
    targets = beta[..., None] * torch.cat([value, entering * key], dim=-1)
    solved = torch.linalg.solve_triangular(system, targets, upper=False, unitriangular=True)
    fresh, corrected = solved.split([value.shape[-1], key.shape[-1]], dim=-1)
    scores = left * (query @ key.transpose(-1, -2))
    leaving = left[..., -1, :, None] * key
    state = torch.zeros_like(key[:, :, 0].transpose(-1, -2) @ value[:, :, 0])
    outputs = []
    for chunk in range(value.shape[2]):
        updates = fresh[:, :, chunk] - corrected[:, :, chunk] @ state
        reads = (entering * query)[:, :, chunk] @ state
        outputs.append(reads + scores[:, :, chunk] @ updates)
        state = entering[:, :, chunk, -1:] * state + leaving[:, :, chunk].transpose(-1, -2) @ updates
    return torch.cat(outputs, dim=2)[:, :, :length].transpose(1, 2)


def _chunks(x_BSH: torch.Tensor, *, mode: str = "constant") -> torch.Tensor:
    """Return [B, S, H, ...] as [B, H, N, C, ...], padded with zeros, or with copies of the last token."""
    missing = -x_BSH.shape[1] % CHUNK
    if missing and mode == "constant":
        x_BSH = F.pad(x_BSH, (0, 0) * (x_BSH.dim() - 2) + (0, missing))
    elif missing:
        x_BSH = torch.cat([x_BSH, x_BSH[:, -1:].expand(-1, missing, *x_BSH.shape[2:])], dim=1)
    return x_BSH.unflatten(1, (-1, CHUNK)).movedim(3, 1)
