"""A plan as the flags of `megaswift sft`."""

from megaswift.planner.job import Job, recompute_modules
from megaswift.planner.plan import Plan
from megaswift.planner.work import CAST

RECIPES = {"fp8": "tensorwise", "mxfp8": "mxfp8", "nvfp4": "nvfp4"}  # Megatron-Core's names


def flags_of(plan: Plan, job: Job) -> dict[str, str]:
    """Return flag -> value of everything that the plan chooses."""
    candidate, layout, meta = plan.candidate, plan.candidate.layout, job.meta
    flags: dict[str, object] = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "context_parallel_size": layout.cp,
    }
    if layout.vpp > 1:
        flags["virtual_pipeline_model_parallel_size"] = layout.vpp
    if layout.pp_first is not None and layout.pp_last is not None:
        flags["decoder_first_pipeline_num_layers"] = layout.pp_first
        flags["decoder_last_pipeline_num_layers"] = layout.pp_last
    if meta.moe is not None:
        flags["expert_model_parallel_size"] = layout.ep
        flags["expert_tensor_parallel_size"] = layout.etp
    if layout.sequence_parallel:
        flags["sequence_parallel"] = "true"
    if layout.cp > 1:
        flags["cp_comm_type"] = candidate.cp_comm
    flags["micro_batch_size"] = candidate.micro_batch
    flags["global_batch_size"] = job.global_batch
    if candidate.recompute == "selective":
        flags["recompute_granularity"] = "selective"
        flags["recompute_modules"] = " ".join(recompute_modules(job))
    if candidate.recompute == "full":
        flags["recompute_granularity"] = "full"
        flags["recompute_method"] = "uniform" if candidate.recompute_layers is None else "block"
        flags["recompute_num_layers"] = candidate.recompute_layers or 1
    if candidate.precision in CAST:
        flags["fp8_format"] = "hybrid" if candidate.precision == "fp8" else "e4m3"
        flags["fp8_recipe"] = RECIPES[candidate.precision]
    if candidate.offload_optimizer:
        flags["optimizer_cpu_offload"] = "true"
    if candidate.four_bits:
        flags["quant_method"], flags["quant_bits"] = "bnb", 4
    if layout.dp > 1:
        flags["overlap_grad_reduce"] = "true"
        flags["overlap_param_gather"] = "true"
    return {name: str(value) for name, value in flags.items()}
