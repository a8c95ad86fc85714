"""The time model: what must grow, what must shrink, and schedules that do not wait for themselves."""

from dataclasses import replace
from itertools import pairwise

import pytest

from megaswift.parallel.layout import Layout
from megaswift.planner.calibration import TIME
from megaswift.planner.collectives import exchange, gather, group_rate
from megaswift.planner.costs import Costs
from megaswift.planner.job import Candidate, Job
from megaswift.planner.machine import Machine
from megaswift.planner.plan import evaluate, rates
from megaswift.planner.software import Software
from megaswift.planner.steptime import StepTime
from megaswift.planner.timeline import timeline
from tests.harness.planning import devices, golden_job


def time_of(job: Job, candidate: Candidate, machine: Machine) -> StepTime:
    """Return the predicted time of a candidate."""
    return evaluate(Costs(job, machine, Software()), candidate).time


def test_a_step_grows_with_the_batch_and_shrinks_with_the_ranks() -> None:
    eight, sixteen = devices("H100", 8), devices("H100", 16)
    job = golden_job("llama-3.1-8b", global_batch=64)
    base = time_of(job, Candidate(layout=Layout(world=8)), eight)
    double = time_of(replace(job, global_batch=128), Candidate(layout=Layout(world=8)), eight)
    spread = time_of(job, Candidate(layout=Layout(world=16)), sixteen)
    assert double.compute == pytest.approx(2 * base.compute)
    assert spread.compute == pytest.approx(base.compute / 2)
    assert spread.total > base.total / 2


def test_the_bubble_shrinks_with_micro_batches_and_with_chunks() -> None:
    machine = devices("H100", 8)
    job = golden_job("llama-3.1-8b", global_batch=16)
    layout = Layout(world=8, pp=8)
    one = time_of(job, Candidate(layout=layout), machine)
    many = time_of(replace(job, global_batch=128), Candidate(layout=layout), machine)
    chunks = time_of(job, Candidate(layout=replace(layout, vpp=4)), machine)
    assert many.bubble == pytest.approx(one.bubble)
    assert many.bubble / many.total < one.bubble / one.total
    assert chunks.bubble == pytest.approx(one.bubble / 4)
    assert chunks.pipeline > one.pipeline


def test_full_recomputation_costs_a_forward_pass() -> None:
    machine = devices("A100", 8)
    job = golden_job("llama-3.1-8b", global_batch=64)
    candidate = Candidate(layout=Layout(world=8))
    none = time_of(job, candidate, machine).compute
    full = time_of(job, replace(candidate, recompute="full"), machine).compute
    half = time_of(job, replace(candidate, recompute="full", recompute_layers=16), machine).compute
    assert 1.25 < full / none < 1.36
    assert half == pytest.approx((none + full) / 2)


def test_frozen_weights_save_the_weight_gradients() -> None:
    machine = devices("H100", 8)
    candidate = Candidate(layout=Layout(world=8))
    full, lora = (
        time_of(golden_job("llama-3.1-8b", trained=trained), candidate, machine)
        for trained in ("full", "lora")
    )
    assert 0.6 < lora.compute / full.compute < 0.75
    assert lora.data < 0.01 * full.data


def test_fp8_helps_large_models_more() -> None:
    machine = devices("H100", 64)
    gains = []
    for name, layout in (
        ("llama-3.1-8b", Layout(world=64)),
        ("llama-3.1-405b", Layout(world=64, tp=8, pp=2, sequence_parallel=True)),
    ):
        job = golden_job(name, seq_len=8192, global_batch=64)
        plain, narrow = (
            time_of(job, Candidate(layout=layout, precision=precision), machine).total
            for precision in ("bf16", "fp8")
        )
        gains.append(plain / narrow)
    assert 1.1 < gains[0] < gains[1] < 2.0


def test_a_ring_of_keys_hides_behind_attention_on_nvlink_and_not_on_pcie() -> None:
    job = golden_job("llama-3.1-8b", seq_len=32768, global_batch=8)
    candidate = Candidate(layout=Layout(world=8, cp=8))
    assert time_of(job, candidate, devices("H100", 8)).context == 0
    assert time_of(job, candidate, devices("A100-PCIe-80G", 8)).context > 0


def test_groups_across_nodes_use_every_port_of_the_node() -> None:
    machine = devices("H100", 64)
    inside = group_rate(machine, 8, 1, TIME)
    assert inside == machine.device.link_bytes_s * TIME.link
    alone = group_rate(machine, 8, 8, TIME)
    assert alone == machine.device.network_bytes_s * TIME.network
    assert group_rate(machine, 16, 2, TIME) == pytest.approx(4 * alone)
    assert group_rate(machine, 64, 1, TIME) == min(inside, 8 * alone)


def test_an_exchange_sends_duplicates_once_where_it_is_told_so() -> None:
    machine = devices("H100", 16)
    plain = exchange(machine, 1e9, size=16, stride=1, constants=TIME)
    once = exchange(machine, 1e9, size=16, stride=1, link_copies=0.5, network_copies=0.25, constants=TIME)
    assert once < plain
    assert gather(machine, 1e9, size=1, stride=1, constants=TIME) == 0


def test_rates_are_tokens_and_flops_of_one_device() -> None:
    machine = devices("H100", 8)
    job = golden_job("llama-3.1-8b", seq_len=8192, global_batch=64)
    plan = evaluate(Costs(job, machine, Software()), Candidate(layout=Layout(world=8, cp=2)))
    found = rates(plan, job, machine)
    assert found.tokens_s_device == pytest.approx(64 * 8192 / plan.time.total / 8)
    assert 0.3 < found.mfu < 0.65
    assert found.model_tflops_device == pytest.approx(found.mfu * 989.4)


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (4, 1), (4, 2), (8, 4)])
def test_the_timeline_runs_every_pass_once_in_order(pp: int, vpp: int) -> None:
    machine = devices("H100", pp)
    job = golden_job("llama-3.1-8b", global_batch=16)
    candidate = Candidate(layout=Layout(world=pp, pp=pp, vpp=vpp))
    costs = Costs(job, machine, Software())
    slots = timeline(costs, candidate, costs.stages(candidate.layout), most=16)
    assert len(slots) == 2 * 16 * pp * vpp
    assert len({(slot.stage, slot.chunk, slot.micro_batch, slot.forward) for slot in slots}) == len(slots)
    for stage in range(pp):
        own = sorted((slot for slot in slots if slot.stage == stage), key=lambda slot: slot.start_s)
        assert all(one.end_s <= other.start_s + 1e-12 for one, other in pairwise(own))
    last = max(slot.end_s for slot in slots)
    predicted = evaluate(costs, candidate).time
    assert last == pytest.approx(predicted.compute + predicted.bubble, rel=0.12)


def test_recomputation_costs_as_much_beside_a_base_in_four_bits() -> None:
    machine = devices("H100", 8)
    extra = []
    for four_bits in (False, True):
        job = golden_job("llama-3.1-8b", trained="lora", four_bits=four_bits)
        costs = Costs(job, machine, Software())
        times = [
            costs.layers(Candidate(layout=Layout(world=8), recompute=kind))[0].compute
            for kind in ("none", "selective")
        ]
        extra.append(times[1] - times[0])
    assert extra[0] > 0 and extra[1] == pytest.approx(extra[0])
