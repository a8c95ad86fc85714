"""Settings: mixture-of-experts routing."""

from dataclasses import dataclass

from megaswift.config.field import setting


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Routing and expert execution; everything else comes from config.json."""

    moe_router_load_balancing_type: str | None = setting(
        None,
        "default: none while fine-tuning",
        choices=("aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none"),
    )
    moe_aux_loss_coeff: float = setting(
        0.0, "weight of the load-balancing loss", aliases=("router_aux_loss_coef",)
    )
    moe_z_loss_coeff: float | None = setting(None, "weight of the router z-loss")
    moe_router_dtype: str = setting("fp32", "dtype of the router's softmax", choices=("fp32", "fp64"))
    moe_token_dispatcher_type: str = setting(
        "alltoall", "how tokens reach their experts", choices=("alltoall", "allgather", "flex")
    )
    moe_grouped_gemm: bool = setting(
        True, "one grouped GEMM for a rank's experts (Transformer Engine); a CPU runs them one by one"
    )
    moe_expert_capacity_factor: float | None = setting(
        None,
        "tokens of a rank's micro batch that an expert takes, times an even spread's; it drops the others (GShard, "
        "arXiv 2006.16668); default: it takes all",
    )
    moe_pad_expert_input_to_capacity: bool = setting(False, "every expert takes as many tokens as it may")
    moe_token_drop_policy: str = setting(
        "probs",
        "what a full expert drops: the least probable tokens, or the last",
        choices=("probs", "position"),
    )
    moe_permute_fusion: bool = setting(False, "fused token permutation (Transformer Engine)")
