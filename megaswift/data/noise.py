"""What the noise on the embeddings of a token follows from: NEFTune, Jain et al. 2023 (arXiv 2310.05914).

Letters: B rows of a micro batch, S tokens of a row.
"""

from dataclasses import replace

import numpy as np
import torch
import xxhash

from megaswift.data.batches import MicroBatch


def with_noise(batch: MicroBatch, *, alpha: float, key: tuple[int, int]) -> MicroBatch:
    """Return the micro batch with a key and a scale of noise for each token; padding has a scale of zero.

    A document's key is a hash of `key` and its own tokens, so that neither the layout nor the documents beside it matter;
    its scale is alpha / sqrt(its tokens), which the model divides by the square root of its width (algorithm 1).
    """
    rows, width = batch.input_ids.shape
    ids, seq_keys = batch.input_ids.numpy().ravel(), np.zeros(rows * width, np.int64)
    scales = np.zeros(rows * width, np.float32)
    starts = range(0, rows * width, width) if batch.cu_seqlens is None else batch.cu_seqlens.tolist()
    for start, length in zip(starts, batch.lengths, strict=False):
        document = slice(start, start + length)
        digest = xxhash.xxh3_64_digest(np.array([*key, *ids[document]], "<i8").tobytes())
        seq_keys[document] = np.frombuffer(digest, "<i8")[0]
        scales[document] = alpha / np.sqrt(length)
    return replace(
        batch,
        noise_keys=torch.from_numpy(seq_keys).view(rows, width),
        noise_scales=torch.from_numpy(scales).view(rows, width),
    )
