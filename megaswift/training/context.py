"""How the sequences of a run cross its cp ranks: chosen once, from the links and the documents there are."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state

from megaswift.config.run import RunConfig
from megaswift.data.batches import MicroBatch
from megaswift.data.context import spread
from megaswift.launch.environment import rank_env
from megaswift.launch.profile import profile_here
from megaswift.logs import get_logger
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.context import Links, context_mode, context_shape, heads_of
from megaswift.parallel.layout import Layout
from megaswift.platforms.platform import Platform

logger = get_logger(__name__)

# Of the dense peak, in causal attention: FlashAttention-2 and -3, forward and backward (arXiv 2307.08691, 2407.08608).
ATTENTION_EFFICIENCY = 0.4


def place_context(
    run: RunConfig,
    meta: ModelMeta,
    layout: Layout,
    platform: Platform,
    *,
    lengths: np.ndarray,
    rows: int,
    ranks_per_node: int,
) -> Layout:
    """Return `layout` with the way in which attention crosses its cp ranks, and say which and why.

    `lengths` are the tokens of every document of the training set, which lie in `rows` items (samples or packs). Raises
    ConfigError where the heads or the nodes do not allow what the run asks for.
    """
    if layout.cp == 1:
        return layout
    kind, heads, per_node = run.parallel.cp_comm_type, heads_of(meta, tp=layout.tp), ranks_per_node
    if kind != "auto":
        _, inner = context_shape(kind, cp=layout.cp, tp=layout.tp, heads=heads, ranks_per_node=per_node)
        return replace(layout, cp_inner=inner, cp_comm_type=kind)
    tokens = int(lengths.sum())
    mode = context_mode(
        kind,
        cp=layout.cp,
        tp=layout.tp,
        heads=heads,
        links=_links(platform, per_node),
        rank_tokens=max(1, tokens // rows * run.training.micro_batch_size // layout.cp),
        keys_per_query=float((lengths.astype(np.float64) ** 2).sum()) / 2 / tokens,
        window=next((window for window in meta.sliding_window if window is not None), None),
    )
    logger.info("cp_comm_type=auto: %s (%s)", mode.kind, mode.reason)
    return replace(layout, cp_inner=mode.inner, cp_comm_type=mode.kind)


def ranks_of_this_node() -> int:
    """Return how many ranks run beside this one, itself included."""
    here = rank_env(os.environ)
    return dist.get_world_size() if here is None else here.local_world_size


def _links(platform: Platform, per_node: int) -> Links:
    """Return what joins the ranks of this world, by this node's profile; raises LaunchError for a GPU not in the catalogue."""
    device = profile_here(ranks=per_node, gpus=() if platform.name == "cpu" else None).device
    precision = "bf16" if "bf16" in device.peak_flops else "fp16" if "fp16" in device.peak_flops else "fp32"
    return Links(
        ranks_per_node=per_node,
        node_bytes_per_s=device.link_bytes_s,
        network_bytes_per_s=device.network_bytes_s,
        attention_flops_per_s=device.peak(precision) * ATTENTION_EFFICIENCY,
    )


def context_share(layout: Layout) -> Callable[[MicroBatch], MicroBatch] | None:
    """Return what cuts this rank's part out of a micro batch; None where sequences are whole."""
    if layout.cp == 1:
        return None
    rank = parallel_state.get_context_parallel_rank()
    return partial(spread, rank=rank, ring=layout.cp_ring, inner=layout.cp_inner)
