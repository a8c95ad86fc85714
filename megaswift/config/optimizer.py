"""Settings: optimizer and learning-rate schedule."""

from dataclasses import dataclass

from megaswift.config.field import setting


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam, AdamW, SGD or Muon, and how its learning rate moves."""

    optimizer: str = setting(
        "adamw",
        "adamw decouples the weight decay, adam adds it to the gradient; muon makes the momentum of the layers' matrices orthogonal "
        "and steps the rest with AdamW (arXiv 2502.16982), dist_muon shares out the matrices over data-parallel ranks",
        choices=("adamw", "adam", "sgd", "muon", "dist_muon"),
    )
    lr: float | None = setting(
        None,
        "peak learning rate; default 1e-5 for full and 1e-4 for LoRA training",
        aliases=("learning_rate",),
    )
    min_lr: float = setting(0.0, "learning rate at the end of the decay")
    lr_decay_style: str = setting(
        "cosine",
        "shape of the decay",
        choices=("cosine", "linear", "constant", "WSD", "inverse-square-root"),
    )
    lr_decay_iters: int | None = setting(None, "steps over which the rate decays; default: the run")
    lr_warmup_iters: int = setting(0, "steps of linear warm-up")
    lr_warmup_fraction: float | None = setting(
        None, "warm-up as a share of the decay steps", aliases=("warmup_ratio",)
    )
    lr_warmup_init: float = setting(0.0, "learning rate at step 0 of the warm-up")
    lr_wsd_decay_style: str = setting(
        "exponential", "shape of WSD's last phase", choices=("linear", "exponential", "cosine", "minus_sqrt")
    )
    lr_wsd_decay_iters: int | None = setting(None, "steps of WSD's last phase")
    weight_decay: float = setting(0.1, "weight decay of matrices; biases and norms have none")
    clip_grad: float = setting(
        1.0, "largest global gradient norm; 0 turns clipping off", aliases=("max_grad_norm",)
    )
    adam_beta1: float = setting(0.9, "first-moment decay")
    adam_beta2: float = setting(0.95, "second-moment decay")
    adam_eps: float = setting(1e-8, "added to the root of the second moment", aliases=("adam_epsilon",))
    sgd_momentum: float = setting(0.9, "momentum of SGD")
    use_galore: bool = setting(
        False,
        "keep AdamW's moments of the layers' matrices in a subspace of their gradient (GaLore, arXiv 2403.03507)",
    )
    galore_rank: int = setting(128, "dimensions of the subspace")
    galore_update_proj_gap: int = setting(50, "steps between two choices of the subspace")
    galore_scale: float = setting(1.0, "factor of the step in the subspace; the paper's alpha")
    galore_proj_type: str = setting(
        "std",
        "side of a matrix that is projected: std its shorter one, reverse_std its longer one, left its rows, right its columns",
        choices=("std", "reverse_std", "left", "right", "full"),
    )
    galore_quantization: bool = setting(
        False, "keep the projections in four bits (Q-GaLore, arXiv 2407.08296); needs bitsandbytes"
    )
    optimizer_cpu_offload: bool = setting(
        False, "keep AdamW's state and the master weights in host memory, and step there"
    )
    optimizer_offload_fraction: float = setting(1.0, "share of the weights whose state is kept there")

    @property
    def is_muon(self) -> bool:
        """Say whether the layers' matrices are stepped by Muon."""
        return self.optimizer in ("muon", "dist_muon")
