"""Settings: batch sizes, length of the run, recompute, precision."""

from dataclasses import dataclass

from megaswift.config.field import setting


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long to train and with which batches."""

    micro_batch_size: int = setting(
        1,
        "samples (or packs) in one forward pass of a data-parallel rank",
        aliases=("per_device_train_batch_size",),
    )
    global_batch_size: int | None = setting(None, "samples (or packs) in one optimizer step; default 16")
    gradient_accumulation_steps: int | None = setting(
        None, "micro batches in a step; another way to say --global_batch_size"
    )
    train_iters: int | None = setting(None, "optimizer steps")
    num_train_epochs: float | None = setting(
        None, "passes over the data; default 1 when --train_iters is not given", aliases=("max_epochs",)
    )
    seed: int = setting(42, "seed of dropout, initialisation and data order")
    recompute_granularity: str = setting(
        "none", "what the backward pass computes again", choices=("none", "selective", "full")
    )
    recompute_method: str | None = setting(
        None, "with full: uniform chunks, or the first layers (block)", choices=("uniform", "block")
    )
    recompute_num_layers: int | None = setting(None, "with full: layers in a chunk, or layers to recompute")
    recompute_modules: list[str] = setting(
        [], "with selective: core_attn moe mlp layernorm moe_act mla_up_proj shared_experts"
    )
    calculate_per_token_loss: bool = setting(
        True, "divide the loss by the tokens of the global batch; false: mean of micro batches"
    )
    enable_dft_loss: bool = setting(
        False, "weigh each token's loss by the probability that the model gives it (dynamic fine-tuning)"
    )
    enable_channel_loss: bool = setting(
        False,
        "log the loss of each channel, too: a column `channel` names the part of the data that a row is of",
    )
    neftune_noise_alpha: float | None = setting(
        None,
        "add noise of up to this over sqrt(tokens x model size) to embeddings in training (NEFTune, arXiv 2310.05914)",
    )
    spike_factor: float | None = setting(
        None,
        "stop when ten steps in a row have a loss above this many times the median of the last hundred; default: never",
    )
    attention_dropout: float = setting(0.0, "dropout on attention weights")
    hidden_dropout: float = setting(0.0, "dropout on residual branches")
    gradient_accumulation_fusion: bool | None = setting(
        None,
        "accumulate weight gradients inside the GEMM; default: on where apex or Transformer Engine has it",
    )
    deterministic: bool = setting(False, "ask for deterministic kernels on a GPU", flag="deterministic_mode")
