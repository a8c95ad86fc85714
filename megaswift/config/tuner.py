"""Settings: which parameters train."""

import re
from dataclasses import dataclass

from megaswift.config.field import setting


@dataclass(frozen=True, kw_only=True)
class TunerConfig:
    """Full training or LoRA."""

    tuner_type: str = setting(
        "full",
        "all parameters, or low-rank adapters",
        choices=("full", "lora"),
        aliases=("train_type", "sft_type"),
    )
    target_modules: list[str] = setting(
        ["all-linear"],
        "modules that get an adapter: Hugging Face or Megatron names, or all-linear",
        aliases=("lora_target_modules",),
    )
    target_regex: str | None = setting(
        None,
        "in place of target_modules: modules whose whole name this expression matches, such as model.layers.3.mlp.up_proj",
    )
    modules_to_save: list[str] = setting(
        [],
        "modules that train whole beside the adapters and lie whole in their folder, by the end of their name, such as "
        "embed_tokens lm_head",
    )
    lora_rank: int = setting(8, "rank r of the adapters")
    lora_alpha: int = setting(32, "the update is scaled by alpha / r")
    lora_dropout: float = setting(0.05, "dropout on the adapter's input")
    use_rslora: bool = setting(False, "scale by alpha / sqrt(r)")
    use_dora: bool = setting(
        False, "train the norm of each row of a weight apart from its direction (DoRA, arXiv 2402.09353)"
    )
    init_weights: str = setting(
        "true",
        "start of the adapters: true (A uniform, B zero), gaussian (A normal), pissa and pissa_niter_N (arXiv 2404.02948; the "
        "principal part of the weight, exact or in N iterations), olora (arXiv 2406.01775; the first part of its QR "
        "decomposition), loftq (arXiv 2310.08659; the principal part of what --quant_bits 4 loses of the weight), lora-ga "
        "(arXiv 2407.05000; directions of the gradient of the first global batch)",
        aliases=("init_lora_weights",),
    )
    lora_ga_direction: str = setting(
        "ArB2r",
        "of lora-ga: which 2 r singular vectors of the gradient A and B take: the first r and the next (ArB2r), the other way round "
        "(A2rBr), or in turns (ArBr)",
        choices=("ArB2r", "A2rBr", "ArBr"),
    )
    lora_ga_scale: str = setting(
        "stable",
        "of lora-ga: multiply the vectors by outputs^(1/4) / sqrt(gamma) (stable), by one over the scale of B A (gd), or by one (unit)",
        choices=("stable", "gd", "unit"),
    )
    lora_ga_stable_gamma: int = setting(16, "of lora_ga_scale=stable: gamma")
    lorap_lr_ratio: float | None = setting(
        None, "learning rate of B over that of A (LoRA+, arXiv 2402.12354); default: the same"
    )
    quant_method: str | None = setting(None, "what quantises the frozen base", choices=("bnb",))
    quant_bits: int | None = setting(
        None, "bits of the frozen base's matrices: 4 (QLoRA, arXiv 2305.14314); default: not quantised"
    )
    bnb_4bit_quant_type: str = setting("nf4", "numbers that four bits stand for", choices=("nf4", "fp4"))
    bnb_4bit_use_double_quant: bool = setting(True, "quantise the scales of the blocks too")
    adapters: list[str] = setting([], "PEFT adapter folder to start from", aliases=("adapter_load",))
    merge_lora: bool = setting(False, "export the merged model as well as the adapter")

    @property
    def starts_from_weights(self) -> bool:
        """Say whether adapters start from a part of their weight."""
        return re.fullmatch(r"olora|loftq|pissa(_niter_[1-9]\d*)?", self.init_weights) is not None

    @property
    def subtracts_start(self) -> bool:
        """Say whether what adapters start from is taken off the base, which LoftQ's quantising has done."""
        return self.starts_from_gradients or (self.starts_from_weights and self.init_weights != "loftq")

    @property
    def starts_from_gradients(self) -> bool:
        """Say whether adapters start from the gradient of a global batch."""
        return self.init_weights == "lora-ga"

    @property
    def pissa_iterations(self) -> int | None:
        """Return the iterations of the approximate decomposition; None: an exact one."""
        return int(self.init_weights.rpartition("_")[2]) if "niter" in self.init_weights else None
