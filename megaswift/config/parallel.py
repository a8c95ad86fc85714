"""Settings: how the model and the batch are spread over ranks."""

from dataclasses import dataclass

from megaswift.config.field import setting


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the process axes and what overlaps with what."""

    tp: int = setting(
        1,
        "ranks that share every weight matrix",
        flag="tensor_model_parallel_size",
        aliases=("tp", "tensor_parallel_size"),
    )
    pp: int = setting(
        1, "pipeline stages", flag="pipeline_model_parallel_size", aliases=("pp", "pipeline_parallel_size")
    )
    vpp: int | None = setting(
        None,
        "model chunks on a pipeline stage",
        flag="virtual_pipeline_model_parallel_size",
        aliases=("vpp",),
    )
    cp: int = setting(1, "ranks that share one sequence", flag="context_parallel_size", aliases=("cp",))
    ep: int = setting(
        1,
        "ranks that share the experts",
        flag="expert_model_parallel_size",
        aliases=("ep", "expert_parallel_size"),
    )
    etp: int | None = setting(
        None,
        "tensor parallel size inside an expert; default 1",
        flag="expert_tensor_parallel_size",
        aliases=("etp",),
    )
    sequence_parallel: bool = setting(
        False, "shard activations along the sequence between tensor-parallel regions; on for MoE with tp > 1"
    )
    pp_first: int | None = setting(
        None, "layers on the first pipeline stage", flag="decoder_first_pipeline_num_layers"
    )
    pp_last: int | None = setting(
        None, "layers on the last pipeline stage", flag="decoder_last_pipeline_num_layers"
    )
    cp_comm_type: str = setting(
        "auto",
        "how attention crosses the ranks of a sequence: keys in a ring (p2p) or gathered, heads exchanged (a2a), "
        "or heads within a node and a ring across; auto takes the fastest by links, heads and document lengths",
        choices=("auto", "p2p", "a2a", "all_gather", "a2a+p2p"),
    )
    use_distributed_optimizer: bool = setting(True, "shard optimizer state over data-parallel ranks (ZeRO-1)")
    overlap_grad_reduce: bool = setting(False, "reduce gradients while the backward pass runs")
    overlap_param_gather: bool = setting(False, "gather parameters while the forward pass runs")
    ddp_timeout_min: float = setting(
        10.0, "minutes after which a stuck collective fails", flag="ddp_timeout_minutes"
    )
