"""What the planner knows about the training software: facts that change memory and time, none of them fitted."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Software:
    """How layers are executed; the defaults describe Megatron-Core with Transformer Engine as this project runs it."""

    attention: str = (
        "flash"  # "flash" (best for the device), "flash2", "flash1", "scores_fused", "scores" (in memory)
    )
    fused_norm: bool = True  # a norm is one kernel that keeps its input only
    fused_elementwise: bool = True  # rotary positions, activation and residual additions are one kernel each
    dropout: bool = False  # residual dropout masks; attention dropout where the scores are in memory
    loss_tokens: int | None = (
        512  # tokens whose logits exist at one time (kernels/linear_cross_entropy); None: all
    )
    loss_bytes: float = (
        2.0  # of one logit while the loss is computed; 6 for bf16 and the copy that becomes the softmax
    )
    gathered_loss: bool = False  # every tp rank computes the loss of the whole vocabulary
    gradient_bytes: int = 4  # of an accumulated gradient element
    wgrad_fusion: bool = True  # the weight gradient's GEMM accumulates into the gradient buffer
    overlap_data: bool = True  # gradient reduction and parameter gathering run beside the passes
    overlap_tensor: bool = False  # tensor-parallel communication in chunks beside GEMMs
    overlap_experts: bool = False  # expert all-to-all beside another micro batch's compute
    deduplicated_dispatch: bool = False  # a token goes once to a rank and once to a node, not once an expert
    cuda_graphs: bool = False  # layers are replayed without their host time
    expandable_segments: bool = True  # the allocator grows blocks in place (PYTORCH_CUDA_ALLOC_CONF)
    tensor_engine: bool = True  # Transformer Engine; without it layers are plain torch
    # Megatron-Core's own layers beside F.scaled_dot_product_attention, as they run on CPUs: rotary positions make new q and k
    # while the joint projection stays for v, the output is copied for its projection, and the gated half is offset (copied).
    local_layers: bool = False
