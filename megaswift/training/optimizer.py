"""Data-parallel wrapping and the optimizer: Megatron's own, configured from the run."""

from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from megaswift.checkpoint.state import RENEWED_EVERY
from megaswift.config.run import RunConfig
from megaswift.mcore.configs import DTYPES
from megaswift.models.causal_lm import CausalLM
from megaswift.training.galore import GaLoreAdamW, projected_matrices
from megaswift.training.muon import MuonAdamW, layer_matrices

DRAWN = "is_drawn"  # of parameters that train now and then: training/lisa.py


def shards_optimizer(run: RunConfig) -> bool:
    """Say whether the optimizer's state is cut over data-parallel ranks: Megatron does so for Adam alone (0.16.1)."""
    return run.parallel.use_distributed_optimizer and run.optimizer.optimizer != "sgd"


def wrap_chunks(chunks: list[CausalLM], run: RunConfig) -> list[DistributedDataParallel]:
    """Give every chunk its gradient buffers, reduced in float32; only parameters that train have one.

    Every rank of the data-parallel groups calls it.
    """
    for chunk in chunks:
        _reduce_experts_over_their_own_group(chunk)
    distributed = shards_optimizer(run)
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=run.parallel.overlap_grad_reduce,
        overlap_param_gather=run.parallel.overlap_param_gather and distributed,
        use_distributed_optimizer=distributed,
        fp8_param_gather=run.precision.fp8_param_gather,
        check_for_nan_in_grad=False,  # the loop stops at a loss or a gradient norm that is not finite
    )
    return [
        # Gradients of later chunks are ready while earlier ones still compute: one bucket is enough for them.
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def unwrap_chunks(chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> list[CausalLM]:
    """Free gradients and optimizer state, whoever holds the wrappings or the optimizer, and return what was wrapped.

    Every rank calls it: parameters may still have to be gathered.
    """
    modules = [chunk.module for chunk in chunks]
    for chunk in chunks:
        if chunk.use_forward_hook:
            chunk.disable_forward_pre_hook()
        vars(chunk).clear()
        # The graph of the last step may live on, and with it hooks of this wrapping: they find nothing to do.
        vars(chunk)["param_to_bucket_group"] = {}
    for one in (*optimizer.chained_optimizers, optimizer):
        vars(one).clear()
    for module in modules:
        for parameter in module.parameters():
            parameter.grad = None
            for name in ("main_grad", "main_param"):
                vars(parameter).pop(name, None)
            if parameter.requires_grad:
                parameter.data = parameter.data.clone()  # else it would keep the whole buffer that it lies in
    return modules


def _reduce_experts_over_their_own_group(chunk: CausalLM) -> None:
    # Megatron (0.16-0.19) does so for ep > 1 only. With ep = 1 and etp < tp, tp ranks hold copies of an expert that see
    # different tokens, and the dense group leaves their gradients apart: the copies drift, and no error says so.
    config = chunk.config
    if (
        config.expert_model_parallel_size > 1
        or config.expert_tensor_parallel_size == config.tensor_model_parallel_size
    ):
        return
    for name, parameter in chunk.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False


def build_optimizer(chunks: list[DistributedDataParallel], run: RunConfig) -> MegatronOptimizer:
    """Return Megatron's optimizer for the parameters that train, and tell the schedule how to use it.

    Master weights are float32. Without apex or Transformer Engine it steps with torch.optim. Every rank calls it.
    """
    settings = _optimizer_config(run)
    optimizer = get_megatron_optimizer(settings, chunks, _overrides(settings, run))
    if run.optimizer.use_galore:
        matrices = projected_matrices(chunks, rank=run.optimizer.galore_rank)
        for part in optimizer.chained_optimizers:
            if part.optimizer is not None:
                part.optimizer = GaLoreAdamW(part.optimizer.param_groups, matrices, run.optimizer)
    if run.optimizer.is_muon:
        whole = layer_matrices([chunk.module for chunk in chunks], split_qkv=run.muon.muon_split_qkv)
        deals = run.optimizer.optimizer == "dist_muon"
        for part in optimizer.chained_optimizers:
            if part.optimizer is not None:
                part.optimizer = MuonAdamW(part.optimizer.param_groups, whole, run.muon, deals=deals)
    _step_with_one_kernel(optimizer)
    config = chunks[0].module.config
    config.finalize_model_grads_func = finalize_model_grads
    if config.fp16:
        config.grad_scale_func = optimizer.scale_loss
    if run.parallel.overlap_grad_reduce:
        sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = sync if len(chunks) > 1 else sync[0]
    return optimizer


def _optimizer_config(run: RunConfig) -> OptimizerConfig:
    chosen = run.optimizer
    dtype = run.model.torch_dtype
    distributed = shards_optimizer(run)
    return OptimizerConfig(
        optimizer="sgd" if chosen.optimizer == "sgd" else "adam",
        decoupled_weight_decay=chosen.optimizer == "adamw" or chosen.is_muon,
        lr=chosen.lr,
        min_lr=chosen.min_lr,
        weight_decay=chosen.weight_decay,
        adam_beta1=chosen.adam_beta1,
        adam_beta2=chosen.adam_beta2,
        adam_eps=chosen.adam_eps,
        sgd_momentum=chosen.sgd_momentum,
        clip_grad=chosen.clip_grad,
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        params_dtype=DTYPES[str(dtype)],
        use_distributed_optimizer=distributed,
        overlap_param_gather=run.parallel.overlap_param_gather and distributed,
        optimizer_cpu_offload=chosen.optimizer_cpu_offload,
        optimizer_offload_fraction=chosen.optimizer_offload_fraction,
        use_precision_aware_optimizer=chosen.optimizer_cpu_offload,  # master weights belong to the state
        overlap_cpu_optimizer_d2h_h2d=True,
        pin_cpu_grads=torch.cuda.is_available(),
    )


def _overrides(settings: OptimizerConfig, run: RunConfig) -> dict[ParamKey, Any]:
    """Return what differs for some parameters: Megatron's own exceptions, LoRA+'s learning rate of B, and LISA's counts."""
    overrides: dict[ParamKey, Any] = dict(get_standard_config_overrides(settings))
    b_ratio = run.tuner.lorap_lr_ratio
    if b_ratio is not None:
        rates = ParamGroupOverride(max_lr=settings.lr * b_ratio, min_lr=settings.min_lr * b_ratio)
        overrides[ParamKey(name="*.lora_b.weight")] = rates
    if run.lisa.lisa_activated_layers:
        # Some optimizers count steps by group: checkpoint/state.py, allocate_states().
        overrides[ParamKey(attr=DRAWN)] = {RENEWED_EVERY: run.lisa.lisa_step_interval}
    return overrides


def torch_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Return the optimizers that Megatron's `optimizer` steps: one for dense and one for expert parameters."""
    return [part.optimizer for part in optimizer.chained_optimizers if part.optimizer is not None]


def _step_with_one_kernel(optimizer: Any) -> None:
    # Where Megatron falls back to torch.optim it does not ask for `fused`: ten passes over the state on a CPU, not one.
    for inner in torch_optimizers(optimizer):
        for group in inner.param_groups:
            if "fused" in group:
                group["fused"], group["foreach"] = True, False
