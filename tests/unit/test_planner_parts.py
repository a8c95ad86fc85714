"""Parameters by part, and the counts that memory and time are made of."""

from dataclasses import replace

import pytest

from megaswift.metadata.count import count_parameters
from megaswift.parallel.layout import Layout
from megaswift.planner.job import Candidate
from megaswift.planner.parts import parts_of
from megaswift.planner.stages import StageParams, in_flight, stage_params, stages_of
from megaswift.planner.timeline import _order
from megaswift.planner.work import model_flops
from tests.harness.planning import MODELS, golden_job, golden_meta

# GFLOP per trained token, causal, published rates divided by tokens per second (tests/golden/published_runs and the
# sources' own tables); Kimi-K2, DeepSeek-V3 and GPT-OSS without multi-token prediction.
GFLOP_PER_TOKEN = {
    ("llama-3.1-8b", 8192): 51.5,
    ("llama-3.1-405b", 8192): 2524.0,
    ("qwen3-235b-a22b", 4096): 148.0,
    ("deepseek-v3", 4096): 249.8,
    ("kimi-k2", 4096): 204.5,
    ("gpt-oss-120b", 4096): 32.6,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_of_a_model_add_up_to_its_parameters(name: str) -> None:
    meta = golden_meta(name)
    parts = parts_of(meta)
    assert parts.total == count_parameters(meta).total
    assert 0 <= parts.other <= 0.001 * parts.total, "a part is missing from the formulas"


@pytest.mark.parametrize(
    ("name", "tp", "pp", "ep"),
    [
        ("llama-3.1-8b", 1, 1, 1),
        ("llama-3.1-8b", 4, 2, 1),
        ("qwen3-0.6b", 2, 4, 1),
        ("qwen3-235b-a22b", 2, 2, 8),
        ("deepseek-v3", 4, 1, 16),
        ("qwen3-next-80b-a3b", 2, 3, 4),
    ],
)
def test_the_ranks_of_a_layout_hold_every_parameter_once(name: str, tp: int, pp: int, ep: int) -> None:
    job = golden_job(name)
    layout = Layout(world=tp * pp * ep, tp=tp, pp=pp, ep=ep)
    whole = 0.0
    for stage in stages_of(job.parts, layout):
        params = stage_params(job, layout, stage)
        kinds = [(job.parts.kinds[kind], count) for kind, count in stage.kinds]
        copied = sum(count * (kind.replicated + kind.attention_replicated) for kind, count in kinds)
        copied += job.parts.final_norm if stage.last else 0
        copied += job.parts.other if stage.first else 0
        whole += (params.dense - copied) * tp + copied + params.experts * ep
    copies = job.parts.embedding if job.parts.head == 0 and pp > 1 else 0
    assert whole == pytest.approx(job.parts.total + copies)


@pytest.mark.parametrize(("name", "seq_len"), GFLOP_PER_TOKEN)
def test_model_flops_are_those_of_published_rates(name: str, seq_len: int) -> None:
    job = golden_job(name, seq_len=seq_len)
    assert model_flops(job) / job.tokens / 1e9 == pytest.approx(GFLOP_PER_TOKEN[name, seq_len], rel=0.01)


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), *((pp, vpp) for pp in (2, 3, 4, 8) for vpp in (1, 2, 3))])
def test_micro_batches_in_flight_are_those_of_the_schedule(pp: int, vpp: int) -> None:
    for rounds in (1, 2, 5):
        count = rounds * pp
        for stage in range(pp):
            alive = most = 0
            for forward, _, _ in _order(pp, vpp, stage, count):
                alive += 1 if forward else -1
                most = max(most, alive)
            layout = Layout(world=pp, pp=pp, vpp=vpp)
            assert in_flight(layout, stage, count) == pytest.approx(most / vpp)
            assert alive == 0


def test_a_window_shortens_attention_and_a_pack_of_documents_too() -> None:
    windowed, whole = golden_job("gpt-oss-20b"), golden_job("llama-3.1-8b")
    assert {kind.span for kind in windowed.parts.kinds} == {128, None}
    assert {kind.span for kind in whole.parts.kinds} == {None}
    longer = golden_job("llama-3.1-8b", seq_len=32768, global_batch=32)
    assert model_flops(longer) > 1.2 * model_flops(whole)


def test_a_candidate_counts_tokens_and_micro_batches() -> None:
    job = golden_job("qwen3-235b-a22b", seq_len=4096, global_batch=64)
    layout = Layout(world=32, tp=2, cp=2, ep=4, sequence_parallel=True)
    candidate = Candidate(layout=layout, micro_batch=2)
    assert candidate.tokens(job) == 4096
    assert candidate.micro_batches(job) == 4
    assert candidate.routed_tokens(job) == 4096 / 2 * 8


def test_every_expert_has_adapters_of_its_own() -> None:
    job = golden_job("qwen3-235b-a22b", trained="lora")
    meta, moe = job.meta, job.meta.moe
    assert moe is not None

    def held(**job_settings: bool) -> StageParams:
        asked = replace(job, **job_settings)  # type: ignore[arg-type]
        return stage_params(asked, layout, stages_of(asked.parts, layout)[0])

    layout = Layout(world=16, ep=8, etp=2, tp=2)
    query, key = meta.num_heads * meta.head_dim, meta.num_kv_heads * meta.head_dim
    attention = meta.num_layers * 8 * (4 * meta.hidden_size + 2 * query + 2 * key) / 2
    experts = meta.num_layers * moe.num_experts * 8 * 3 * (meta.hidden_size + moe.ffn_hidden_size) / 16
    both = held()
    assert (both.trained, both.trained_experts, both.adapters) == (attention, experts, attention + experts)
    assert held(adapts_mlp=False).adapters == attention
