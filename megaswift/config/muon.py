"""Settings: Muon, the optimizer that makes the momentum of matrices orthogonal."""

from dataclasses import dataclass

from megaswift.config.field import setting


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """How --optimizer muon steps the layers' matrices; AdamW's settings are those of all other weights.

    Defaults are ms-swift's (4.6.0.dev0) but for muon_tp_mode, whose blockwise gives other results for every tp.
    """

    muon_momentum: float = setting(0.9, "momentum of the matrices; 0.95 in both papers")
    muon_use_nesterov: bool = setting(False, "look ahead along the momentum, as both papers do")
    muon_split_qkv: bool = setting(
        True, "queries, keys and values are matrices of their own, though Megatron has them in one"
    )
    muon_scale_mode: str = setting(
        "spectral",
        "factor of an update of R rows and C columns: spectral is sqrt(max(R, C)) (arXiv 2502.16982), shape_scaling "
        "sqrt(max(1, R / C)) (Jordan et al. 2024), unit_rms_norm sqrt(R / C) (arXiv 2502.07529)",
        choices=("spectral", "unit_rms_norm", "shape_scaling"),
    )
    muon_extra_scale_factor: float = setting(
        1.0,
        "another factor; 0.2 makes spectral updates as large as AdamW's, so that its learning rates fit (arXiv 2502.16982)",
    )
    muon_coefficient_type: str = setting(
        "quintic",
        "coefficients of the Newton-Schulz iteration: simple has the same three in every step (Jordan et al. 2024), quintic "
        "three for each of five steps",
        choices=("quintic", "simple"),
    )
    muon_num_ns_steps: int = setting(5, "steps of the iteration; with quintic a multiple of five")
    muon_fp32_matmul_prec: str = setting(
        "medium",
        "its products on GPUs: medium is bfloat16, high TF32, highest float32; on a CPU always float32",
        choices=("medium", "high", "highest"),
    )
    muon_tp_mode: str = setting(
        "duplicated",
        "a matrix that tp cuts: duplicated gathers it and every rank computes the same, so that tp changes no result; blockwise "
        "takes each part for a matrix of its own, which is cheaper",
        choices=("duplicated", "blockwise"),
    )
