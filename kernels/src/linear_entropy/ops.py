"""The entropy of the distribution of an output layer; chunks of tokens pass through, full logits never exist. No gradients.

Letters: T tokens, C tokens of one chunk, D model size, V vocabulary rows of this rank (the vocabulary / tp).
"""

import torch
import torch.distributed as dist

from megaswift.kernels.linear_divergence.ops import OutputLayer, logits_of, logsumexp

CHUNK_TOKENS = 512  # as linear_cross_entropy


@torch.no_grad()
def linear_entropy(
    layer: OutputLayer,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> torch.Tensor:
    """Return -sum_v p_v log p_v of every token [T], in nats; every rank of `group` calls it alike.

    Rows of the vocabulary from `vocab_size` on are padding. Logits and sums are float32, or float64 where the hidden states
    are. What moves: 3 numbers per token over `group`.
    """
    rank, rows = (0 if group is None else dist.get_rank(group)), layer.weight.shape[0]
    real_VD = layer.weight[: min(max(vocab_size - rank * rows, 0), rows)]
    wide = torch.float64 if layer.hidden.dtype == torch.float64 else torch.float32
    found_T = torch.empty(len(layer.hidden), dtype=wide, device=layer.hidden.device)
    for start in range(0, len(found_T), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        logits_CV, _ = logits_of(layer.hidden[chunk], real_VD, layer.softcap, wide)
        log_p_CV = logits_CV - logsumexp(logits_CV, group)[:, None]
        sums_C = (log_p_CV.exp() * log_p_CV).sum(1)
        if group is not None:
            dist.all_reduce(sums_C, group=group)
        found_T[chunk] = -sums_C
    return found_T
