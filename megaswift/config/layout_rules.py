"""Rules between the process axes, the model's sizes and the ranks there are."""

from math import gcd, lcm

from megaswift.config.case import Case
from megaswift.config.field import declared
from megaswift.config.moe import MoEConfig
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError
from megaswift.parallel.layout import chunk_layers, padded_kv_heads


def axes_are_positive(case: Case) -> None:
    """Every axis has at least one rank."""
    parallel = case.run.parallel
    for name, size in (
        ("tensor_model_parallel_size", parallel.tp),
        ("pipeline_model_parallel_size", parallel.pp),
        ("virtual_pipeline_model_parallel_size", parallel.vpp),
        ("context_parallel_size", parallel.cp),
        ("expert_model_parallel_size", parallel.ep),
        ("expert_tensor_parallel_size", parallel.etp),
        ("decoder_first_pipeline_num_layers", parallel.pp_first),
        ("decoder_last_pipeline_num_layers", parallel.pp_last),
    ):
        if size is not None and size < 1:
            raise ConfigError(f"{name}={size} is not a size. Give 1 or more.")


def expert_axes_need_experts(case: Case) -> Case | None:
    """ep and etp are for mixture-of-experts models; etp is 1 unless asked for."""
    parallel = case.run.parallel
    if case.meta.moe is None:
        for name, size in (
            ("expert_model_parallel_size", parallel.ep),
            ("expert_tensor_parallel_size", parallel.etp or 1),
        ):
            if size > 1:
                raise ConfigError(f"{name}={size} but {case.model_name} has no experts. Leave it out.")
    return case.change("parallel", etp=1) if parallel.etp is None else None


def expert_settings_need_experts(case: Case) -> None:
    """Settings of the router mean nothing to a dense model."""
    if case.meta.moe is not None:
        return
    for setting in declared(RunConfig).values():
        if setting.section == "moe" and getattr(case.run.moe, setting.name) != setting.default:
            raise ConfigError(f"{setting.flag} is set but {case.model_name} has no experts. Leave it out.")


def dropped_tokens_have_a_limit(run: RunConfig) -> None:
    """An expert drops tokens beyond a number of them."""
    moe = run.moe
    factor = moe.moe_expert_capacity_factor
    if factor is None:
        for name in ("moe_pad_expert_input_to_capacity", "moe_token_drop_policy"):
            if getattr(moe, name) != getattr(MoEConfig(), name):
                raise ConfigError(f"{name} needs moe_expert_capacity_factor. Give it, or leave {name} out.")
        return
    if factor <= 0:
        raise ConfigError(
            f"moe_expert_capacity_factor={factor} is too small. Give more than 0, such as 2, or leave it out."
        )
    if moe.moe_router_load_balancing_type == "sinkhorn":
        raise ConfigError(
            "moe_expert_capacity_factor does not go with moe_router_load_balancing_type=sinkhorn. Choose aux_loss, "
            "seq_aux_loss, global_aux_loss or none."
        )


def world_holds_whole_copies(case: Case) -> None:
    """The ranks divide into copies of the model."""
    parallel = case.run.parallel
    copy = parallel.tp * parallel.pp * parallel.cp
    if case.world % copy:
        raise ConfigError(
            f"world_size={case.world} is not a multiple of tp={parallel.tp} x pp={parallel.pp} x cp={parallel.cp} = {copy}. "
            f"Start a multiple of {copy} ranks, or choose smaller axes."
        )


def world_holds_whole_copies_of_experts(case: Case) -> None:
    """The ranks of a pipeline stage divide into copies of the experts."""
    parallel = case.run.parallel
    ep, etp = parallel.ep, parallel.etp or 1
    if case.world % (ep * etp * parallel.pp):
        smallest = parallel.pp * lcm(parallel.tp * parallel.cp, ep * etp)
        raise ConfigError(
            f"world_size={case.world} is not a multiple of ep={ep} x etp={etp} x pp={parallel.pp} = {ep * etp * parallel.pp}. "
            f"This layout needs a multiple of {smallest} ranks."
        )


def tp_divides_the_feed_forward_part(case: Case) -> None:
    """Every feed-forward matrix is cut into tp equal parts."""
    meta, tp = case.meta, case.run.parallel.tp
    sizes = {}
    if meta.moe is None or meta.moe.beside_dense or not all(meta.moe.layer_is_moe):
        sizes["ffn_hidden_size"] = meta.ffn_hidden_size
    if meta.moe is not None and meta.moe.shared_ffn_hidden_size:
        sizes["shared_ffn_hidden_size"] = meta.moe.shared_ffn_hidden_size
    for name, size in sizes.items():
        if size % tp:
            choices = [one for one in _divisors(gcd(*sizes.values())) if one <= meta.num_heads]
            raise ConfigError(
                f"tp={tp} does not divide {name}={size} ({case.model_name}). Choose tp from {_listed(choices)}."
            )


def tp_shares_out_the_heads(case: Case) -> Case | None:
    """Every rank of tp has at least one attention head; where they do not divide, heads of zeros make up the number."""
    meta, tp = case.meta, case.run.parallel.tp
    if tp > meta.num_heads:
        choices = [one for one in _divisors(meta.num_heads) if meta.ffn_hidden_size % one == 0]
        raise ConfigError(
            f"tp={tp} is above num_heads={meta.num_heads} ({case.model_name}). Choose tp from {_listed(choices)}."
        )
    for kv_heads in meta.kv_head_counts:
        groups = padded_kv_heads(meta.num_heads, kv_heads, tp=tp)
        if groups != kv_heads:
            per_group = meta.num_heads // kv_heads
            note = (
                f"tp={tp} does not divide num_heads={meta.num_heads} and num_kv_heads={kv_heads}: {groups * per_group} and "
                f"{groups} are computed, those above being zero. Results and the exported model are the same."
            )
            return case.change("parallel", note)
    return None


def linear_attention_is_cut_by_heads(case: Case) -> None:
    """Gated DeltaNet is cut over tp by key heads; the gates of attention go with key/value heads.

    With more ranks than key/value heads Megatron-Core 0.16.1 cuts the queries and forgets the gates (attention.py).
    """
    meta, parallel = case.meta, case.run.parallel
    linear = meta.linear_attention
    if linear is not None and linear.num_key_heads % parallel.tp:
        raise ConfigError(
            f"tp={parallel.tp} does not divide linear_num_key_heads={linear.num_key_heads} ({case.model_name}). "
            f"Choose tp from {_listed(_divisors(linear.num_key_heads))}."
        )
    if meta.attention.output_gate and parallel.tp > meta.num_kv_heads:
        raise ConfigError(
            f"tp={parallel.tp} is above num_kv_heads={meta.num_kv_heads} ({case.model_name}), whose attention is gated. "
            f"Choose tp from {_listed(_divisors(meta.num_kv_heads))}."
        )


def pipeline_divides_the_layers(case: Case) -> None:
    """Every stage and every chunk of it has the layers it is due."""
    parallel, layout = case.run.parallel, case.layout
    if parallel.vpp is not None and parallel.vpp > 1 and parallel.pp == 1:
        raise ConfigError(
            f"vpp={parallel.vpp} needs pipeline stages. Set --pipeline_model_parallel_size, or leave it out."
        )
    if parallel.pp == 1 and (parallel.pp_first is not None or parallel.pp_last is not None):
        raise ConfigError(
            "decoder_first_pipeline_num_layers and decoder_last_pipeline_num_layers need pipeline stages. "
            "Set --pipeline_model_parallel_size, or leave them out."
        )
    chunk_layers(layout, case.meta.num_layers, pp_rank=0)


def layers_that_hand_on_stay_together(case: Case) -> None:
    """Layers that read an earlier layer's keys, or inputs made from the tokens, are on its stage and keep what they got."""
    meta, run = case.meta, case.run
    varied = meta.layer_variation
    shares = varied is not None and any(layer is not None for layer in varied.kv_from_layer)
    if not shares and meta.layer_inputs is None:
        return
    what = "keys of earlier layers" if shares else "inputs of each layer"
    if run.parallel.pp > 1:
        raise ConfigError(
            f"pipeline_model_parallel_size={run.parallel.pp} parts layers of {case.model_name} that hand on {what}. Choose "
            "tensor, context or data parallelism."
        )
    if run.training.recompute_granularity == "full":
        raise ConfigError(
            f"recompute_granularity=full computes layers of {case.model_name} again without their {what}. Choose selective."
        )


def experts_divide(case: Case) -> None:
    """Every rank of ep has the same number of experts, every rank of etp the same part of one."""
    moe, parallel = case.meta.moe, case.run.parallel
    if moe is None:
        return
    for name, size, of, rows in (
        ("ep", parallel.ep, "num_experts", moe.num_experts),
        ("etp", parallel.etp or 1, "the expert's ffn_hidden_size", moe.ffn_hidden_size),
    ):
        if rows % size:
            raise ConfigError(
                f"{name}={size} does not divide {of}={rows} ({case.model_name}). Choose {name} from {_listed(_divisors(rows))}."
            )


def sequence_parallel_follows_tp(case: Case) -> Case | None:
    """Sequence parallelism lives on the tp axis; a mixture of experts with tp > 1 needs it."""
    parallel = case.run.parallel
    if parallel.sequence_parallel and parallel.tp == 1:
        return case.change("parallel", "sequence_parallel is off: it needs tp > 1.", sequence_parallel=False)
    if not parallel.sequence_parallel and parallel.tp > 1 and case.meta.moe is not None:
        return case.change(
            "parallel", "sequence_parallel is on: experts with tp > 1 need it.", sequence_parallel=True
        )
    return None


def interleaved_stages_send_one_by_one(case: Case) -> Case | None:
    """Tell that the interleaved schedule runs with the message settings that are right (mcore/configs.py sets them)."""
    vpp = case.run.parallel.vpp
    if vpp is None or vpp == 1:
        return None
    return case.change(
        "parallel",
        f"vpp={vpp}: overlap_p2p_comm is on and batch_p2p_comm off; the reverse mixes gradients up.",
    )


def overlap_needs_the_distributed_optimizer(case: Case) -> None:
    """Parameters are gathered during the forward pass only where the optimizer has scattered them."""
    parallel = case.run.parallel
    if parallel.overlap_param_gather and not (
        parallel.use_distributed_optimizer and parallel.overlap_grad_reduce
    ):
        raise ConfigError(
            "overlap_param_gather=true needs --use_distributed_optimizer true and --overlap_grad_reduce true."
        )


def timeouts_are_in_order(case: Case) -> Case | None:
    """A collective has some time to finish, and a stalled run is reported before its collectives fail."""
    if case.run.parallel.ddp_timeout_min <= 0:
        raise ConfigError(
            f"ddp_timeout_minutes={case.run.parallel.ddp_timeout_min} is not a time. Give minutes above 0."
        )
    timeout_s, hang_s = 60 * case.run.parallel.ddp_timeout_min, case.run.launch.hang_timeout_seconds
    if hang_s is None:
        return case.change("launch", hang_timeout_seconds=timeout_s / 2)
    if not 0 <= hang_s < timeout_s:
        raise ConfigError(
            f"hang_timeout_seconds={hang_s:g} is not below ddp_timeout_minutes={case.run.parallel.ddp_timeout_min:g}. Choose "
            f"less than {timeout_s:g}, or 0 for never."
        )
    return None


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
