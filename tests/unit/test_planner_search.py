"""The search: everything it emits divides and fits, and what it says about the others is true."""

import pytest

from megaswift.errors import LaunchError
from megaswift.planner.ask import software_on
from megaswift.planner.costs import Costs
from megaswift.planner.explain import reasons
from megaswift.planner.flags import flags_of
from megaswift.planner.plan import evaluate, memory_limit
from megaswift.planner.rescue import nothing_fits
from megaswift.planner.search import Space, axis_values
from megaswift.planner.splits import pipeline_splits
from megaswift.planner.stages import stages_of
from tests.harness.planning import MODELS, devices, found_for, golden_job

CLUSTERS = [("H100", 8), ("A100-40G", 16), ("H100", 128), ("RTX4090", 8), ("GB200", 72), ("H200", 24)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("gpu", "count"), CLUSTERS)
def test_every_plan_divides_fits_and_is_ranked(name: str, gpu: str, count: int) -> None:
    job = golden_job(name, global_batch=count * 4)
    machine = devices(gpu, count)
    found = found_for(job, machine)
    costs = [plan.cost for plan in found.plans]
    assert costs == sorted(costs)
    for plan in found.plans:
        layout = plan.candidate.layout
        assert layout.tp * layout.pp * layout.cp * layout.dp == count
        assert layout.etp * layout.ep * layout.edp * layout.pp == count
        assert layout.dp * plan.candidate.micro_batch * plan.candidate.micro_batches(job) == job.global_batch
        assert plan.memory.total <= memory_limit(machine)
        assert sum(stage.layers for stage in stages_of(job.parts, layout)) == job.meta.num_layers
        if layout.vpp > 1:
            assert plan.candidate.micro_batches(job) % layout.pp == 0


@pytest.mark.parametrize("name", ["llama-3.1-405b", "qwen3-235b-a22b", "deepseek-v3", "glm-4.7"])
def test_a_thousand_gpus_hold_the_largest_models(name: str) -> None:
    assert found_for(golden_job(name, global_batch=1024), devices("H100", 1024)).plans


@pytest.mark.parametrize(("trained", "flag"), [("lora", "quant_bits"), ("full", "optimizer_cpu_offload")])
def test_where_nothing_fits_the_last_resort_is_taken_and_nowhere_else(trained: str, flag: str) -> None:
    name = "mixtral-8x7b" if trained == "lora" else "llama-3.1-8b"
    job = golden_job(name, seq_len=2048, global_batch=8, trained=trained)
    for gpus, taken in ((1, True), (8, False)):
        found = found_for(job, devices("H100", gpus))
        assert [flag in flags_of(plan, job) for plan in found.plans] == [taken] * len(found.plans)
        assert found.plans
    assert not found_for(job, devices("H100", 1), last_resort=False).plans


def test_layers_that_do_not_divide_get_lighter_ends() -> None:
    # GLM-4.5-Air: 46 layers.
    from megaswift.parallel.layout import Layout

    for pp in (4, 8, 16):
        splits = list(pipeline_splits(46, Layout(world=pp, pp=pp)))
        assert splits
        for split in splits:
            assert split.pp_first is not None and split.pp_last is not None
            middle, rest = divmod(46 - split.pp_first - split.pp_last, pp - 2)
            assert rest == 0 and max(split.pp_first, split.pp_last) <= middle


def test_an_even_split_is_offered_where_it_exists_and_two_stages_can_differ() -> None:
    from megaswift.parallel.layout import Layout

    even = [split for split in pipeline_splits(32, Layout(world=4, pp=4)) if split.pp_first is None]
    assert {split.vpp for split in even} == {1, 2, 4, 8}
    two = {(split.pp_first, split.pp_last) for split in pipeline_splits(33, Layout(world=2, pp=2))}
    assert (17, 16) in two and (None, None) not in two


def test_a_fixed_axis_is_kept_and_the_rest_is_searched() -> None:
    job, machine = golden_job("llama-3.1-8b"), devices("H100", 16)
    found = found_for(job, machine, fixed={"tp": 4, "micro_batch": 2})
    assert found.plans
    assert all(plan.candidate.layout.tp == 4 and plan.candidate.micro_batch == 2 for plan in found.plans)


def test_more_memory_is_never_worse() -> None:
    job = golden_job("llama-3.1-405b", global_batch=128)
    times = [found_for(job, devices(gpu, 128)).plans[0].time.total for gpu in ("H100-80G", "H200-141G")]
    assert times[1] <= times[0]


def test_reasons_name_every_other_value_and_are_true() -> None:
    job, machine = golden_job("qwen3-235b-a22b"), devices("H100", 128)
    found = found_for(job, machine)
    chosen = axis_values(found.plans[0].candidate)
    told = {(reason.axis, reason.value): reason.text for reason in reasons(found, machine)}
    assert told.keys() == {key for key in found.by_axis if chosen[key[0]] != key[1]}
    costs = Costs(job, machine, software_on(machine.device))
    for key, text in told.items():
        plan = evaluate(costs, found.by_axis[key].candidate)
        assert axis_values(plan.candidate)[key[0]] == key[1]
        assert ("does not fit" in text) == (not plan.fits)


def test_what_does_not_fit_says_what_would() -> None:
    job = golden_job("llama-3.1-8b", seq_len=2048, global_batch=16)
    machine, software = devices("RTX4090", 1), software_on(devices("RTX4090", 1).device)
    found = found_for(job, machine)
    assert not found.plans
    error = nothing_fits(job, machine, found, software=software, space=Space())
    assert isinstance(error, LaunchError)
    assert "does not fit" in str(error) and "--train_type lora" in str(error) and "4 devices" in str(error)
    lora = golden_job("llama-3.1-8b", seq_len=2048, global_batch=16, trained="lora")
    assert found_for(lora, machine).plans


def test_too_long_sequences_are_answered_with_a_length_that_fits() -> None:
    job = golden_job("llama-3.1-8b", seq_len=1 << 20, global_batch=8)
    machine = devices("A100-40G", 8)
    found = found_for(job, machine)
    assert not found.plans
    error = nothing_fits(job, machine, found, software=software_on(machine.device), space=Space())
    assert "--max_length" in str(error)


def test_a_size_that_cannot_divide_is_named_with_those_that_do() -> None:
    job, machine = golden_job("llama-3.1-8b"), devices("H100", 8)
    space = Space(fixed={"tp": 3})
    found = found_for(job, machine, fixed=space.fixed)
    error = nothing_fits(job, machine, found, software=software_on(machine.device), space=space)
    assert "tp=3" in str(error) and "1, 2, 4, 8" in str(error)


def test_flags_name_every_axis_in_use() -> None:
    job, machine = golden_job("qwen3-235b-a22b"), devices("H100", 128)
    for plan in found_for(job, machine).plans:
        flags, layout = flags_of(plan, job), plan.candidate.layout
        assert flags["tensor_model_parallel_size"] == str(layout.tp)
        assert flags["expert_model_parallel_size"] == str(layout.ep)
        assert ("virtual_pipeline_model_parallel_size" in flags) == (layout.vpp > 1)
        assert ("sequence_parallel" in flags) == (layout.tp > 1)
        assert ("recompute_granularity" in flags) == (plan.candidate.recompute != "none")
