"""Prompts with answers that were given to other prompts: from them KTO estimates how far the policy has moved.

Ethayarajh et al. 2024 (arXiv 2402.01306, section 4.1): z0 is estimated from mismatched pairs (x, y') of the batch. Here
the partner of a row depends on the set alone, so that it is the same under every layout and batch size.
"""

import numpy as np

from megaswift.data.encode import EncodedSet
from megaswift.errors import DataError


def mismatched_answers(encoded: EncodedSet, *, max_length: int | None) -> EncodedSet:
    """Return every prompt followed by the answer of the row half the set away, cut to `max_length` tokens.

    The answer begins at the first token that carries loss. Half the set, because neighbours often share a prompt. Raises
    DataError for a set of one row.
    """
    rows = len(encoded)
    if rows < 2:
        raise DataError(
            "kto estimates a divergence from answers to other prompts, and there is one row. Give more rows, or "
            "--calculate_KL false."
        )
    ids, weights = [], []
    for row in range(rows):
        partner = (row + rows // 2) % rows
        prompt, answer = _halves(encoded, row)[0], _halves(encoded, partner)[1]
        joined = slice(0, max_length)
        ids.append(np.concatenate([encoded.input_ids[prompt], encoded.input_ids[answer]])[joined])
        zeros = np.zeros(prompt.stop - prompt.start, encoded.loss_weights.dtype)
        weights.append(np.concatenate([zeros, encoded.loss_weights[answer]])[joined])
    lengths = [len(one) for one in ids]
    return EncodedSet(
        input_ids=np.concatenate(ids),
        loss_weights=np.concatenate(weights),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        samples=encoded.samples,
    )


def _halves(encoded: EncodedSet, row: int) -> tuple[slice, slice]:
    """Return where the prompt and the answer of a row lie in the flat arrays."""
    first, last = int(encoded.starts[row]), int(encoded.starts[row + 1])
    border = first + int(np.flatnonzero(encoded.loss_weights[first:last])[0])
    return slice(first, border), slice(border, last)
