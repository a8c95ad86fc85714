"""The planner's fitted constants; tests/harness/fit_plan.py finds them on a named half of the published runs."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MemoryConstants:
    """What the allocator, the driver and unfused kernels add to the tensors that are counted."""

    context_gib: float  # CUDA context, NCCL and cuBLAS buffers outside the allocator
    rounding: float  # allocator rounding, share of activations, logits and buffers
    fragmentation: float  # share of the activations of several micro batches, without expandable segments
    eager_norm_bytes: float  # what an unfused norm keeps, bytes a hidden element
    scores_bytes: float  # attention scores in memory, bytes a head, query and key, with plain operations
    scores_fused_bytes: float  # and with one fused softmax


@dataclass(frozen=True, kw_only=True)
class TimeConstants:
    """How much of the peaks a run reaches, and what hides behind what."""

    gemm: dict[str, float]  # share of the peak of large GEMMs, by generation and precision
    attention: dict[str, float]  # share of the 16-bit peak of the best fused attention, by generation
    kernels: dict[str, float]  # speed of older attention kernels, of the best one's
    device: dict[str, float]  # arithmetic under sustained load against the generation's, where power differs
    gemm_traffic: float  # share of a GEMM's operand traffic that its arithmetic does not hide
    memory: float  # share of the memory bandwidth of element-wise kernels
    eager_traffic: float  # traffic of unfused element-wise operations, of the fused ones'
    eager_norm_traffic: float  # two unfused norms, bytes a hidden element, forward and backward
    scores_traffic: float  # attention scores in memory, bytes a score, forward and backward, plain operations
    scores_fused_traffic: float  # and with one fused softmax
    link: float  # share of a link's bandwidth that collectives reach
    network: float  # share of the network's
    link_latency_s: float  # of one collective inside a node
    network_latency_s: float  # and across nodes
    tensor_hidden: float  # share of tensor-parallel communication that overlap hides
    data_hidden: float  # share of gradient reduction and parameter gathering
    experts_hidden: float  # share of the all-to-all
    pipe_hidden: float  # share of transfers between stages, with the interleaved schedule
    host_layer_s: float  # host time of one dense layer, forward and backward
    host_moe_layer_s: float  # and of one layer with experts
    step_overhead_s: float  # of one optimizer step


MEMORY = MemoryConstants(
    context_gib=1.0,
    rounding=0.01,
    fragmentation=0.25,
    eager_norm_bytes=8.0,
    scores_bytes=6.0,
    scores_fused_bytes=4.0,
)

TIME = TimeConstants(
    gemm={
        "ampere 16": 0.765,
        "hopper 16": 0.699,
        "hopper fp8": 0.61,
        "blackwell 16": 0.649,
        "blackwell fp8": 0.567,
        "blackwell mxfp8": 0.495,
        "blackwell nvfp4": 0.452,
    },
    attention={"ampere": 0.538, "hopper": 0.457, "blackwell": 0.551},
    kernels={"ampere flash1": 0.575, "hopper flash2": 0.627},
    device={"GB300": 1.22, "GB300 nvfp4": 0.844, "H100-96G": 0.856, "B200 bf16": 0.679},
    gemm_traffic=0.502,
    memory=0.65,
    eager_traffic=3.14,
    eager_norm_traffic=170.0,
    scores_traffic=59.5,
    scores_fused_traffic=15.5,
    link=0.525,
    network=0.672,
    link_latency_s=2.25e-05,
    network_latency_s=3.99e-05,
    tensor_hidden=0.743,
    data_hidden=0.808,
    experts_hidden=0.52,
    pipe_hidden=0.734,
    host_layer_s=0.001,
    host_moe_layer_s=0.00703,
    step_overhead_s=0.0256,
)
