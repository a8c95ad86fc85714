"""Rules of sequences that are spread over ranks: what the model and its heads allow."""

from megaswift.config.case import Case
from megaswift.errors import ConfigError
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.context import context_shape, heads_of


def spread_attention_has_what_the_model_needs(case: Case) -> None:
    """Attention over a spread sequence is causal, perhaps with a window and sinks; other kinds stay on one rank."""
    if case.run.parallel.cp == 1:
        return
    missing = _needs_whole_sequences(case.meta)
    if missing:
        raise ConfigError(
            f"context_parallel_size={case.run.parallel.cp} but {case.model_name} has {missing}, which needs whole sequences "
            "on one rank. Use --tensor_model_parallel_size with --sequence_parallel true for long sequences."
        )
    if case.run.training.attention_dropout:
        raise ConfigError(
            f"attention_dropout={case.run.training.attention_dropout} does not go with context_parallel_size="
            f"{case.run.parallel.cp}: the ranks of a sequence would have to drop the same weights. Leave one of them out."
        )


def attention_kernels_of_gpus_take_the_heads(case: Case) -> None:
    """torch's flash attention, which spread attention is made of on GPUs, has limits (flash_attn/flash_api.cpp, torch 2.13)."""
    if case.run.parallel.cp == 1 or case.platform != "cuda":
        return
    asked = f"context_parallel_size={case.run.parallel.cp}"
    if case.run.model.torch_dtype == "float32":
        raise ConfigError(
            f"{asked} and torch_dtype=float32 do not go together on GPUs, whose kernels take 16 bits. Use --torch_dtype bfloat16."
        )
    sizes = {case.meta.of_layer(layer).head_dim for layer in range(case.meta.num_layers)}
    strange = sorted(size for size in sizes if size > 256 or size % 8)
    if strange:
        raise ConfigError(
            f"{asked}: {case.model_name} has heads of {strange[0]}, and kernels on GPUs take multiples of 8 up to 256. "
            "Use --tensor_model_parallel_size with --sequence_parallel true for long sequences."
        )


def _needs_whole_sequences(meta: ModelMeta) -> str | None:
    """Return what of a model spread attention lacks."""
    if meta.linear_attention is not None:
        return "linear attention"
    if any(meta.attention.chunk):
        return "chunked attention"
    if meta.attention.softcap is not None:
        return "soft-capped scores"
    return None


def the_heads_allow_the_way_across_ranks(case: Case) -> None:
    """Heads that are exchanged divide over the ranks; on a GPU a window and a ring of keys do not go together."""
    parallel, kind = case.run.parallel, case.run.parallel.cp_comm_type
    if parallel.cp == 1 or kind == "auto":
        return
    heads = heads_of(case.meta, tp=parallel.tp)
    context_shape(kind, cp=parallel.cp, tp=parallel.tp, heads=heads, ranks_per_node=case.world)
    window = next((size for size in case.meta.sliding_window if size is not None), None)
    if window is not None and kind.endswith("p2p") and case.platform == "cuda":
        raise ConfigError(
            f"cp_comm_type={kind} cannot carry the sliding window of {window} tokens of {case.model_name}: attention kernels "
            "on GPUs align a window with the end of the keys, which a ring's blocks are not. Choose all_gather, a2a or auto."
        )
