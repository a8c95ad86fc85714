"""What the noise on the embeddings of a token follows from: NEFTune, Jain et al. 2023 (arXiv 2310.05914)."""

from dataclasses import replace

import numpy as np
import torch
import xxhash

from megaswift.data.batches import MicroBatch, places_of


def with_noise(batch: MicroBatch, *, alpha: float, key: tuple[int, int]) -> MicroBatch:
    """Return the micro batch with a key and a scale of noise for each token; padding has a scale of zero.

    A document's key is a hash of `key` and its own tokens, so that neither the layout nor the documents beside it matter;
    its scale is alpha / sqrt(its tokens), which the model divides by the square root of its width (algorithm 1).
    """
    ids = batch.input_ids.numpy().ravel()
    keys, scales = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.float32)
    for document in places_of(batch):
        digest = xxhash.xxh3_64_digest(np.array([*key, *ids[document]], "<i8").tobytes())
        keys[document] = np.frombuffer(digest, "<i8")[0]
        scales[document] = alpha / np.sqrt(len(ids[document]))
    return replace(
        batch,
        noise_keys=torch.from_numpy(keys).view_as(batch.input_ids),
        noise_scales=torch.from_numpy(scales).view_as(batch.input_ids),
    )
