"""The memory model against counts by hand and against the shape that physics gives it."""

from dataclasses import replace

import pytest

from megaswift.parallel.layout import Layout
from megaswift.planner.calibration import MEMORY
from megaswift.planner.job import Candidate, Job
from megaswift.planner.machine import GIB
from megaswift.planner.memory import Memory, memory_of, saved
from megaswift.planner.software import Software
from megaswift.planner.stages import stage_params, stages_of
from tests.harness.planning import golden_job

MEGATRON = Software(loss_tokens=None, loss_bytes=6.0)


def memory(job: Job, candidate: Candidate, stage: int = 0, software: Software = MEGATRON) -> Memory:
    """Return the memory of one stage."""
    return memory_of(job, candidate, stages_of(job.parts, candidate.layout)[stage], software=software)


def test_a_dense_layer_keeps_what_its_modules_save() -> None:
    job = golden_job("llama-3.1-8b", seq_len=4096)
    meta = job.meta
    candidate = Candidate(layout=Layout())
    one = saved(job, candidate, job.parts.kinds[0], MEGATRON, MEMORY)
    # bf16: two norm inputs and outputs, q, k, v, the output, gate, up and their product; fp32: the log-sum-exp.
    widths = 4 * meta.hidden_size + 2 * meta.num_heads * meta.head_dim + 2 * meta.num_kv_heads * meta.head_dim
    expected = 4096 * (2 * (widths + 3 * meta.ffn_hidden_size) + 4 * meta.num_heads)
    assert one.dense == expected
    assert one.routed == 0


def test_tensor_parallelism_with_sequence_parallelism_divides_every_activation() -> None:
    job = golden_job("llama-3.1-8b")
    kind = job.parts.kinds[0]
    whole = saved(job, Candidate(layout=Layout()), kind, MEGATRON, MEMORY)
    for tp in (2, 4, 8):
        layout = Layout(world=tp, tp=tp, sequence_parallel=True)
        part = saved(job, Candidate(layout=layout), kind, MEGATRON, MEMORY)
        assert part.dense == pytest.approx(whole.dense / tp)


def test_weights_gradients_and_optimizer_take_eighteen_bytes_on_one_rank() -> None:
    job = golden_job("llama-3.1-8b")
    found = memory(job, Candidate(layout=Layout()))
    assert found.weights + found.gradients + found.optimizer == 18 * job.parts.total
    spread = memory(job, Candidate(layout=Layout(world=8)))
    assert spread.optimizer == pytest.approx(found.optimizer / 8)
    offloaded = memory(job, Candidate(layout=Layout(), offload_optimizer=True))
    assert offloaded.optimizer == 0


def test_muon_keeps_masters_and_one_moment_of_matrices_on_every_rank_and_shares_out_momenta() -> None:
    adamw = golden_job("llama-3.1-8b")
    muon, dealt = (golden_job("llama-3.1-8b", optimizer=name) for name in ("muon", "dist_muon"))
    ends = adamw.parts.embedding + adamw.parts.head
    layers = adamw.parts.total - ends
    for candidate in (Candidate(layout=Layout()), Candidate(layout=Layout(world=8))):
        assert memory(muon, candidate).optimizer == pytest.approx(12 * ends + 8 * layers)
        shards = candidate.layout.world
        assert memory(dealt, candidate).optimizer == pytest.approx(12 * ends + (4 + 4 / shards) * layers)
    fp32 = memory(muon, Candidate(layout=Layout(), precision="fp32"))
    assert fp32.optimizer == pytest.approx(8 * ends + 4 * layers)
    experts = golden_job("qwen3-235b-a22b", optimizer="dist_muon")
    spread = memory(experts, Candidate(layout=Layout(world=8, ep=8)))
    stage = stage_params(experts, Layout(world=8, ep=8), stages_of(experts.parts, Layout())[0])
    own = (stage.trained - stage.trained_ends) / 8 + stage.trained_experts
    trained = stage.trained + stage.trained_experts
    assert spread.optimizer == pytest.approx(4 * trained + 4 * own + 8 * stage.trained_ends)


def test_lora_has_gradients_and_optimizer_state_of_adapters_only() -> None:
    full, lora = golden_job("llama-3.1-8b"), golden_job("llama-3.1-8b", trained="lora")
    candidate = Candidate(layout=Layout())
    found = memory(lora, candidate)
    # r (in + out) over seven linears of 32 layers: 20 971 520 adapters at r = 8.
    assert found.gradients + found.optimizer == 16 * 20_971_520
    assert found.total < 0.4 * memory(full, candidate).total


def test_four_bits_leave_embedding_head_and_norms_as_they_are() -> None:
    lora, small = (golden_job("llama-3.1-8b", trained="lora", four_bits=on) for on in (False, True))
    candidate = Candidate(layout=Layout())
    saved_bytes = memory(lora, candidate).weights - memory(small, candidate).weights
    matrices = 32 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336)
    assert saved_bytes == pytest.approx((2 - 0.5 - 1 / 64) * matrices)
    assert memory(small, candidate).total == memory(lora, replace(candidate, four_bits=True)).total


def test_recomputation_keeps_less_the_more_it_repeats() -> None:
    job = golden_job("llama-3.1-8b")
    candidate = Candidate(layout=Layout())
    none, selective, full = (
        memory(job, replace(candidate, recompute=kind)).activations for kind in ("none", "selective", "full")
    )
    assert full < selective < none
    assert full == 32 * 2 * 4096 * job.meta.hidden_size
    partly = [
        memory(job, replace(candidate, recompute="full", recompute_layers=layers)).activations
        for layers in (1, 8, 16, 32)
    ]
    assert partly == sorted(partly, reverse=True)
    assert partly[-1] == full


def test_the_first_stage_holds_most_micro_batches_and_the_last_the_logits() -> None:
    job = golden_job("llama-3.1-405b", seq_len=8192, global_batch=64)
    layout = Layout(world=128, tp=8, pp=2, sequence_parallel=True, pp_first=63, pp_last=63)
    first, last = (memory(job, Candidate(layout=layout), stage) for stage in (0, 1))
    assert first.activations == pytest.approx(2 * last.activations)
    assert last.logits > 0 == first.logits


def test_logits_in_pieces_do_not_grow_with_the_sequence() -> None:
    pieces = Software()
    sizes = [
        memory(golden_job("llama-3.1-8b", seq_len=length), Candidate(layout=Layout()), software=pieces).logits
        for length in (2048, 4096)
    ]
    assert sizes[0] == sizes[1] < 0.3 * GIB


def test_routed_tokens_grow_with_topk_and_shrink_with_recomputation() -> None:
    job = golden_job("qwen3-235b-a22b")
    layout = Layout(world=64, pp=2, ep=32, pp_first=47, pp_last=47)
    candidate = Candidate(layout=layout)
    found = memory(job, candidate)
    moe = job.meta.moe
    assert moe is not None
    per_layer = 2 * 4096 * moe.topk * (job.meta.hidden_size + 3 * moe.ffn_hidden_size)
    assert found.expert_tokens == pytest.approx(2 * 47 * per_layer)
    assert memory(job, replace(candidate, recompute="selective")).expert_tokens < found.expert_tokens


def test_eight_bit_recipes_keep_copies_of_the_weights() -> None:
    job = golden_job("llama-3.1-8b")
    plain, narrow = (memory(job, Candidate(layout=Layout(), precision=name)) for name in ("bf16", "fp8"))
    matrices = sum(job.parts.kinds[kind].attention + job.parts.kinds[kind].mlp for kind in job.parts.layers)
    assert narrow.weights - plain.weights == 2 * matrices
