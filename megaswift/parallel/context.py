"""How attention crosses the ranks that share a sequence: what each way costs, which one to take. No torch.

Letters: R ring ranks, U ranks that exchange heads, cp = R * U.
"""

from dataclasses import dataclass

from megaswift.errors import ConfigError
from megaswift.kernels.context_attention.volume import Heads, sent_groups, volume
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.layout import padded_kv_heads

_BYTES = 2  # bf16


@dataclass(frozen=True, kw_only=True)
class Links:
    """What joins the ranks, and how fast they compute."""

    ranks_per_node: int
    node_bytes_per_s: float  # one rank to another of its node
    network_bytes_per_s: float  # one rank to another node
    attention_flops_per_s: float
    message_s: float = 20e-6  # launch and latency of one message: NCCL's order of magnitude for small ones


@dataclass(frozen=True, kw_only=True)
class ContextMode:
    """A way for attention to cross cp ranks."""

    kind: str  # p2p, all_gather, a2a, a2a+p2p
    ring: int
    inner: int
    reason: str


def heads_of(meta: ModelMeta, *, tp: int) -> Heads:
    """Return the attention heads of one tp rank as core attention sees them: latent attention has as many keys as queries.

    Where layers differ, those of the layers with the fewest keys, which are the hardest to exchange.
    """
    if meta.layer_variation is not None:
        meta = meta.of_layer(meta.layer_variation.num_kv_heads.index(meta.kv_head_counts[0]))
    if meta.mla is not None:
        own = meta.num_heads // tp
        key_size = meta.mla.nope_head_dim + meta.mla.rope_head_dim
        return Heads(query=own, groups=own, key_size=key_size, value_size=meta.mla.v_head_dim)
    groups = padded_kv_heads(meta.num_heads, meta.num_kv_heads, tp=tp)
    query = groups * (meta.num_heads // meta.num_kv_heads)
    return Heads(
        query=query // tp, groups=max(1, groups // tp), key_size=meta.head_dim, value_size=meta.head_dim
    )


def context_mode(
    kind: str,
    *,
    cp: int,
    tp: int,
    heads: Heads,
    links: Links,
    rank_tokens: int,
    keys_per_query: float,
    window: int | None = None,
) -> ContextMode:
    """Return the mode for `kind` as given by the user, with the reason in one line where it is "auto".

    heads: of one tp rank; rank_tokens: tokens of one cp rank; keys_per_query: mean keys that a query sees,
    half the length of one causal document, sum(len^2) / 2 / sum(len) of a pack. Raises ConfigError where
    heads or ranks do not allow `kind`.
    """
    if cp == 1:
        return ContextMode(kind="p2p", ring=1, inner=1, reason="one rank has the whole sequence")
    if kind != "auto":
        ring, inner = context_shape(kind, cp=cp, tp=tp, heads=heads, ranks_per_node=links.ranks_per_node)
        return ContextMode(kind=kind, ring=ring, inner=inner, reason="as asked")
    costs: dict[str, float] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for candidate in ("p2p", "all_gather", "a2a", "a2a+p2p"):
        if candidate.endswith("p2p") and window is not None:
            continue  # most of what a ring sends lies outside the window of every query
        try:
            shapes[candidate] = context_shape(
                candidate, cp=cp, tp=tp, heads=heads, ranks_per_node=links.ranks_per_node
            )
        except ConfigError:
            continue
        costs[candidate] = exposed_s(
            candidate,
            *shapes[candidate],
            tp=tp,
            heads=heads,
            links=links,
            rank_tokens=rank_tokens,
            keys_per_query=keys_per_query,
        )
    best = min(costs, key=lambda candidate: costs[candidate])
    others = ", ".join(f"{other} {cost * 1e3:.2f}" for other, cost in costs.items() if other != best)
    reason = f"{costs[best] * 1e3:.2f} ms a layer that compute does not hide; {others}"
    return ContextMode(kind=best, ring=shapes[best][0], inner=shapes[best][1], reason=reason)


def exposed_s(
    kind: str,
    ring: int,
    inner: int,
    *,
    tp: int,
    heads: Heads,
    links: Links,
    rank_tokens: int,
    keys_per_query: float,
) -> float:
    """Return the seconds of one layer's forward and backward in which a rank waits for messages.

    A ring's messages travel under attention's own arithmetic; all others are waited for.
    """
    to_ring = volume(heads, tokens=rank_tokens, ring=ring, inner=inner)
    to_inner = volume(heads, tokens=rank_tokens, ring=1, inner=inner)
    ring_bytes = to_ring.bytes(_BYTES) - to_inner.bytes(_BYTES)
    inner_s = to_inner.bytes(_BYTES) / _speed(tp * inner, links) + (4 * links.message_s if inner > 1 else 0.0)
    ring_s = ring_bytes / _speed(tp * inner * ring, links)
    if kind == "all_gather":
        return inner_s + ring_s + 3 * links.message_s  # keys twice, gradients once
    # Forward two products, backward 2.5 times that (FlashAttention-2, arXiv 2307.08691, 4.1).
    attention_s = (
        3.5
        * 2
        * heads.query
        * (heads.key_size + heads.value_size)
        * rank_tokens
        * keys_per_query
        / links.attention_flops_per_s
    )
    return inner_s + max(0.0, ring_s - attention_s) + 3 * (ring - 1) * links.message_s


def _speed(ranks: int, links: Links) -> float:
    """Return bytes per second within a group that `ranks` neighbouring ranks hold."""
    return links.node_bytes_per_s if ranks <= links.ranks_per_node else links.network_bytes_per_s


def context_shape(kind: str, *, cp: int, tp: int, heads: Heads, ranks_per_node: int) -> tuple[int, int]:
    """Return (R, U) of a kind; raises ConfigError where heads or ranks do not allow it."""
    if kind in ("p2p", "all_gather"):
        return cp, 1
    exchangeable = [
        inner
        for inner in range(2, cp + 1)
        if cp % inner == 0 and heads.query % sent_groups(heads, inner) == 0
    ]
    if kind == "a2a":
        if cp not in exchangeable:
            fitting = ", ".join(map(str, exchangeable)) or "none"
            raise ConfigError(
                f"cp_comm_type=a2a cannot exchange {heads.query} query and {heads.groups} key/value heads of a tp "
                f"rank among context_parallel_size={cp} ranks. "
                f"Ranks must divide the heads (of the divisors of {cp}: {fitting}). "
                "Choose p2p, all_gather or auto."
            )
        return 1, cp
    in_node = [inner for inner in exchangeable if inner < cp and tp * inner <= ranks_per_node]
    if kind != "a2a+p2p" or not in_node:
        raise ConfigError(
            f"cp_comm_type={kind} needs a divisor of context_parallel_size={cp} that is smaller than it, divides "
            f"the heads of a tp rank ({heads.query} query, {heads.groups} key/value) and fits in a node of "
            f"{ranks_per_node} ranks. "
            "There is none. Choose p2p, all_gather or auto."
        )
    inner = max(in_node)
    return cp // inner, inner


def pad_multiple(*, cp: int, tp: int, sequence_parallel: bool) -> int:
    """Return what the tokens of a pack must divide by: all cp ranks hold as many, and tp ranks share them."""
    return cp * tp if sequence_parallel else cp
