"""Rank arithmetic: which rank holds which part of the model and of the batch. No torch.

The order of axes is Megatron-Core's default "tp-cp-ep-dp-pp" (parallel_state.RankGenerator, 0.16.1):
tp moves fastest, pp slowest. Expert layers see the same ranks as etp-ep-edp-pp.
"""

from dataclasses import dataclass

from megaswift.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the process axes."""

    world: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    cp_inner: int = 1  # of the cp ranks, those that exchange heads for tokens; the others exchange keys
    cp_comm_type: str = "p2p"  # how, see parallel/context.py
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = False
    pp_first: int | None = None  # layers on the first stage
    pp_last: int | None = None  # layers on the last stage

    @property
    def dp(self) -> int:
        """Ranks that see different samples."""
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def cp_ring(self) -> int:
        """Parts of a sequence between which keys travel."""
        return self.cp // self.cp_inner

    @property
    def edp(self) -> int:
        """Copies of every expert."""
        return self.world // (self.etp * self.ep * self.pp)


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Where one rank stands on every axis."""

    rank: int
    tp: int
    pp: int
    dp: int
    cp: int
    ep: int
    etp: int
    edp: int


def coordinates(layout: Layout, rank: int) -> Coordinates:
    """Return the coordinates of `rank`."""
    stage_ranks = layout.world // layout.pp
    within = rank % stage_ranks
    return Coordinates(
        rank=rank,
        tp=within % layout.tp,
        cp=within // layout.tp % layout.cp,
        dp=within // (layout.tp * layout.cp),
        pp=rank // stage_ranks,
        etp=within % layout.etp,
        ep=within // layout.etp % layout.ep,
        edp=within // (layout.etp * layout.ep),
    )


def chunk_layers(layout: Layout, num_layers: int, *, pp_rank: int, vp_rank: int = 0) -> range:
    """Return the global indices of the decoder layers in one model chunk.

    With vpp the model is cut into pp * vpp chunks that go round the stages (Megatron's interleaved schedule).
    Raises ConfigError where the layers do not divide.
    """
    first, last = layout.pp_first, layout.pp_last
    if first is None and last is None:
        chunks = layout.pp * layout.vpp
        if num_layers % chunks:
            raise ConfigError(
                f"pp={layout.pp} x vpp={layout.vpp} does not divide num_layers={num_layers}. Choose sizes that divide it, "
                "or give --decoder_first_pipeline_num_layers / --decoder_last_pipeline_num_layers."
            )
        size = num_layers // chunks
        start = (vp_rank * layout.pp + pp_rank) * size
        return range(start, start + size)
    sizes = _uneven_stage_sizes(layout, num_layers)
    if any(size % layout.vpp for size in sizes):
        raise ConfigError(
            f"vpp={layout.vpp} does not divide the layers of every stage, {sizes}. Choose a vpp that does."
        )
    # Megatron-Core 0.16.1 (get_transformer_layer_offset): chunk v of every stage precedes chunk v + 1 of any.
    per_chunk = [size // layout.vpp for size in sizes]
    start = vp_rank * sum(per_chunk) + sum(per_chunk[:pp_rank])
    return range(start, start + per_chunk[pp_rank])


def _uneven_stage_sizes(layout: Layout, num_layers: int) -> list[int]:
    first, last, middle = layout.pp_first, layout.pp_last, layout.pp
    rest = num_layers
    for given in (first, last):
        if given is not None:
            rest -= given
            middle -= 1
    if middle < 0 or rest < 0 or (middle == 0 and rest) or (middle and rest % middle):
        raise ConfigError(
            f"decoder_first_pipeline_num_layers={first} and decoder_last_pipeline_num_layers={last} leave {rest} of "
            f"num_layers={num_layers} for {middle} stages, which does not divide. Choose other sizes."
        )
    sizes = [rest // middle if middle else 0] * layout.pp
    if first is not None:
        sizes[0] = first
    if last is not None:
        sizes[-1] = last
    return sizes


def padded_vocab_size(vocab_size: int, *, tp: int) -> int:
    """Return the rows of the embedding once every tp rank holds the same number."""
    return -(-vocab_size // tp) * tp


def padded_kv_heads(num_heads: int, num_kv_heads: int, *, tp: int) -> int:
    """Return the key/value heads of the sharded model: more than the file has where tp does not divide them.

    A padded group has zero weights on both sides of the attention, so its output and every gradient of its weights are
    exactly zero: training and the exported model are those of the unpadded one. Query heads grow in proportion.
    Where tp is a multiple of the groups and divides the query heads, Megatron-Core replicates groups itself (attention.py).
    """
    replicated = tp % num_kv_heads == 0 and num_heads % tp == 0
    return num_kv_heads if replicated else -(-num_kv_heads // tp) * tp
