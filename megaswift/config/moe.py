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
    moe_aux_loss_coeff: float = setting(0.0, "weight of the load-balancing loss")
    moe_z_loss_coeff: float | None = setting(None, "weight of the router z-loss")
    moe_router_dtype: str = setting("fp32", "dtype of the router's softmax", choices=("fp32", "fp64"))
    moe_token_dispatcher_type: str = setting(
        "alltoall", "how tokens reach their experts", choices=("alltoall", "allgather", "flex")
    )
    moe_grouped_gemm: bool = setting(
        True, "one grouped GEMM for a rank's experts (Transformer Engine); a CPU runs them one by one"
    )
    moe_permute_fusion: bool = setting(False, "fused token permutation (Transformer Engine)")
