"""The layout of a run that names none."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megaswift.config.parse import Parsed, parse
from megaswift.config.rules import resolve
from megaswift.errors import LaunchError
from megaswift.launch.layout import check_memory, choose_layout
from megaswift.launch.profile import profile_here, profile_of_name
from megaswift.metadata.count import count_parameters
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.layout import Layout
from megaswift.planner.ask import Question, ask, software_on
from megaswift.planner.costs import Costs
from megaswift.planner.job import Candidate, Job
from megaswift.planner.machine import Machine
from megaswift.planner.plan import evaluate
from tests.harness.planning import CONFIGS, golden_meta


def parsed(*words: str) -> Parsed:
    return parse("sft", ["--model", "m", "--dataset", "rows.jsonl", *words])


@pytest.fixture(scope="module")
def llama() -> ModelMeta:
    return golden_meta("llama-3.1-8b")


@pytest.fixture(scope="module")
def node() -> Machine:
    return profile_of_name("H100", num_gpus=8).machine


def test_a_run_without_parallel_flags_gets_the_planners_layout(llama: ModelMeta, node: Machine) -> None:
    asked = parsed("--max_length", "4096")
    chosen = choose_layout(asked.config, llama, node)
    assert chosen is not None and "dp=4 tp=2" in chosen.note
    run = chosen.adopt(asked.config, asked.given)
    assert (run.parallel.tp, run.training.global_batch_size, run.training.micro_batch_size) == (2, 16, 1)
    typed = parsed("--max_length", "4096", *chosen.words(asked.given)).config
    assert typed == run and not run.launch.auto_layout
    assert choose_layout(run, llama, node) is None


def test_what_the_user_gave_is_kept(llama: ModelMeta, node: Machine) -> None:
    batch = (
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 4 --overlap_grad_reduce true".split()
    )
    asked = parsed(*batch)
    chosen = choose_layout(asked.config, llama, node)
    assert chosen is not None
    run = parsed(*batch, *chosen.words(asked.given)).config
    assert (run.training.micro_batch_size, run.training.gradient_accumulation_steps) == (2, 4)
    assert run.training.global_batch_size is None and run.parallel.overlap_grad_reduce


def test_a_flag_that_says_no_stays_no(llama: ModelMeta, node: Machine) -> None:
    asked = parsed("--max_length", "4096", "--overlap_param_gather", "false")
    chosen = choose_layout(asked.config, llama, node)
    assert chosen is not None and chosen.flags["overlap_param_gather"] == "true"
    words = ["--max_length", "4096", "--overlap_param_gather", "false", *chosen.words(asked.given)]
    for run in (chosen.adopt(asked.config, asked.given), parsed(*words).config):
        assert run.parallel.overlap_grad_reduce and not run.parallel.overlap_param_gather


@pytest.mark.parametrize("size", [3, 6, 16])
def test_any_micro_batch_gets_a_layout(llama: ModelMeta, node: Machine, size: int) -> None:
    for batch in ("", "--gradient_accumulation_steps 2"):
        words = f"--micro_batch_size {size} --max_length 256 --tuner_type lora {batch}".split()
        asked = parsed(*words)
        chosen = choose_layout(asked.config, llama, node)
        assert chosen is not None and "dp=8" in chosen.note
        assert resolve(chosen.adopt(asked.config, asked.given), llama, 8, "cuda").layout.dp == 8


def test_a_batch_that_does_not_divide_is_not_taken_for_a_lack_of_memory(
    llama: ModelMeta, node: Machine
) -> None:
    asked = parsed("--micro_batch_size", "3", "--global_batch_size", "16", "--tuner_type", "lora")
    with pytest.raises(LaunchError, match=r"micro_batch=3 leaves no layout .* with global_batch_size=16"):
        choose_layout(asked.config, llama, node)


@pytest.mark.parametrize(("gpus", "batch"), [(3, 18), (5, 20), (6, 18), (7, 21)])
def test_any_number_of_gpus_can_be_replicas(gpus: int, batch: int) -> None:
    asked = parsed("--max_length", "1024", "--tuner_type", "lora")
    machine = profile_of_name("H100", num_gpus=gpus).machine
    chosen = choose_layout(asked.config, golden_meta("qwen3-0.6b"), machine)
    assert chosen is not None and f"layout: dp={gpus}, " in chosen.note
    assert chosen.flags["global_batch_size"] == str(batch) and f"in steps of {batch}" in chosen.note


def test_a_layout_that_the_runs_own_settings_forbid_is_not_chosen(llama: ModelMeta, node: Machine) -> None:
    words = ["--max_length", "32768"]
    plain = choose_layout(parsed(*words).config, llama, node)
    assert plain is not None and plain.flags["context_parallel_size"] != "1"
    asked = parsed(*words, "--attention_dropout", "0.1")
    chosen = choose_layout(asked.config, llama, node)
    assert chosen is not None
    assert resolve(chosen.adopt(asked.config, asked.given), llama, 8, "cuda").layout.cp == 1


def test_a_model_whose_best_layouts_cannot_run_gets_one_that_can() -> None:
    meta, machine = golden_meta("qwen3-next-80b-a3b"), profile_of_name("H100", num_gpus=32).machine
    asked = parsed("--max_length", "131072", "--tuner_type", "lora")
    chosen = choose_layout(asked.config, meta, machine)
    assert chosen is not None and chosen.flags["context_parallel_size"] == "1"


def test_where_no_layout_that_fits_can_run_the_reason_is_told() -> None:
    meta, machine = golden_meta("qwen3-next-80b-a3b"), profile_of_name("H100", num_gpus=32).machine
    with pytest.raises(
        LaunchError, match=r"layouts fit 32 x H100-80G and none of them can run.*linear attention"
    ):
        choose_layout(
            parsed("--max_length", "262144", "--tuner_type", "lora", "--micro_batch_size", "4").config,
            meta,
            machine,
        )


@pytest.mark.parametrize("words", ["--tp 1", "--pp 2", "--recompute_granularity full"])
def test_one_parallel_flag_makes_the_layout_the_users(llama: ModelMeta, node: Machine, words: str) -> None:
    assert choose_layout(parsed(*words.split()).config, llama, node) is None


def test_a_model_that_cannot_fit_is_refused_with_what_would_work(node: Machine) -> None:
    with pytest.raises(LaunchError, match=r"8 x H100-80G does not fit.*What would work: 128 devices"):
        choose_layout(parsed().config, golden_meta("llama-3.1-405b"), node)


def test_ranks_of_a_processor_replicate_a_small_model() -> None:
    machine = profile_here(ranks=2, gpus=()).machine
    chosen = choose_layout(parsed("--max_length", "64").config, golden_meta("qwen3-0.6b"), machine)
    assert chosen is not None and "overlap_grad_reduce" not in chosen.flags


def test_a_layout_that_needs_more_memory_than_there_is_is_refused(llama: ModelMeta, node: Machine) -> None:
    run = parsed("--max_length", "4096", "--torch_dtype", "bfloat16").config
    check_memory(run, Layout(world=8, tp=4, sequence_parallel=True), llama, node)
    with pytest.raises(LaunchError, match=r"needs about \d+ GiB on its fullest rank and H100-80G has 79 GiB"):
        check_memory(run, Layout(world=1), llama, profile_of_name("H100", num_gpus=1).machine)


def test_muon_is_planned_with_its_own_state_and_not_in_host_memory(llama: ModelMeta, node: Machine) -> None:
    for name, last_resort in (("muon", False), ("dist_muon", False), ("adamw", True)):
        run = parsed("--optimizer", name).config
        asked = ask(run, llama, node, given=frozenset(), precision="auto", document_len=None, offload=True)
        assert (asked.job.optimizer, asked.space.last_resort) == (name, last_resort)


def test_preference_training_counts_its_reference_and_both_answers(llama: ModelMeta, node: Machine) -> None:
    def question(*words: str) -> Question:
        run = parse(
            "rlhf", ["--model", "m", "--dataset", "rows.jsonl", "--max_length", "2048", *words]
        ).config
        return ask(run, llama, node, given=frozenset(), precision="auto", document_len=None, offload=False)

    def weights(job: Job) -> float:
        costs = Costs(job, node, software_on(node.device))
        candidate = Candidate(layout=Layout(world=8, tp=4))
        return costs.memory(candidate, costs.stages(candidate.layout)).weights

    plain, dpo = question("--rlhf_type", "orpo").job, question("--rlhf_type", "dpo").job
    assert (dpo.seq_len, dpo.document_len, dpo.max_length) == (4096, 2048, 2048)
    assert question("--rlhf_type", "kto").job.seq_len == 2048
    assert not plain.beside and dpo.beside == (None,)
    assert weights(dpo) == 2 * weights(plain)
    for words in ("--precompute_ref_log_probs true", "--reference_free true", "--tuner_type lora"):
        assert not question("--rlhf_type", "dpo", *words.split()).job.beside
    assert question("--rlhf_type", "dpo", "--tuner_type", "lora", "--ref_model", "other").job.beside
    taught = question("--rlhf_type", "grpo", "--teacher_model", "m").job
    assert taught.beside == (None, None) and weights(taught) == 3 * weights(replace(taught, beside=()))


@pytest.mark.parametrize(
    ("words", "share"),
    [
        ("--use_vllm true", 0.3),
        ("--use_vllm true --vllm_gpu_memory_utilization 0.5", 0.5),
        ("--use_vllm true --sleep_level 1", 0.0),
        ("--use_vllm true --vllm_mode server", 0.0),
        ("", 0.0),
    ],
)
def test_what_vllm_keeps_of_a_device_is_not_the_trainers(
    llama: ModelMeta, node: Machine, words: str, share: float
) -> None:
    line = "--model m --dataset rows.jsonl --rlhf_type grpo --reward_funcs format --max_length 4096"
    asked = parse("rlhf", [*line.split(), "--torch_dtype", "bfloat16", *words.split()])
    chosen = choose_layout(asked.config, llama, node)
    assert chosen is not None
    filled = float(re.search(r"with ([\d.]+) of", chosen.note).group(1))  # type: ignore[union-attr]
    assert filled < (1 - share) * node.device.memory_gib
    # 53 GiB a rank with tp=2: beside 30 % of 79 GiB there is room for that, beside half there is not.
    layout = Layout(world=8, tp=2, sequence_parallel=True)
    if share < 0.5:
        check_memory(asked.config, layout, llama, node)
    else:
        with pytest.raises(LaunchError, match=r"has 79 GiB, of which vLLM keeps 40 without --sleep_level"):
            check_memory(asked.config, layout, llama, node)


@pytest.mark.parametrize(
    ("words", "adapts_mlp"),
    [
        ("", True),
        ("--target_modules q_proj k_proj v_proj", False),
        ("--target_modules o_proj down_proj", True),
    ],
)
def test_adapters_are_planned_where_the_targets_are(
    llama: ModelMeta, node: Machine, words: str, adapts_mlp: bool
) -> None:
    run = parsed("--tuner_type", "lora", *words.split()).config
    asked = ask(run, llama, node, given=frozenset(), precision="auto", document_len=None, offload=False)
    assert asked.job.adapts_mlp == adapts_mlp


def test_a_teacher_in_memory_is_counted_by_its_own_size(
    llama: ModelMeta, node: Machine, tmp_path: Path
) -> None:
    small = json.loads((CONFIGS / "qwen3-0.6b.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(small.get("config", small)), encoding="utf-8")

    def costs(*words: str) -> Costs:
        line = "--model m --dataset rows.jsonl --max_length 2048 --rlhf_type"
        run = parse("rlhf", [*line.split(), *words]).config
        job = ask(run, llama, node, given=frozenset(), precision="auto", document_len=None, offload=False).job
        return Costs(job, node, software_on(node.device))

    def weights(costs: Costs, layout: Layout) -> list[float]:
        memories = [costs.memory(Candidate(layout=layout), (stage,)) for stage in costs.stages(layout)]
        return [memory.weights for memory in memories]

    alone, nowhere = costs("orpo"), costs("gkd", "--teacher_model", str(tmp_path / "missing"))
    meta = golden_meta("qwen3-0.6b")
    teacher = count_parameters(meta).total
    for words in (("gkd", "--teacher_model"), ("dpo", "--ref_model")):
        known = costs(*words, str(tmp_path))
        whole, pieces = Layout(), Layout(world=4, pp=4)
        assert weights(known, whole)[0] - weights(alone, whole)[0] == 2 * teacher
        beside = sum(weights(known, pieces)) - sum(weights(alone, pieces))
        assert beside == 2 * (
            teacher + meta.vocab_size * meta.hidden_size
        )  # the last stage has a copy: it is the head too
        assert weights(nowhere, whole)[0] == 2 * weights(alone, whole)[0]


def test_layers_that_are_drawn_need_the_room_of_those_alone(llama: ModelMeta) -> None:
    """Full training of 8 billion parameters does not fit one device, two layers at a time do."""
    machine = profile_of_name("H100", num_gpus=1).machine
    with pytest.raises(LaunchError, match="does not fit"):
        choose_layout(parsed("--max_length", "4096").config, llama, machine)
    drawn = parsed("--max_length", "4096", "--lisa_activated_layers", "2").config
    assert choose_layout(drawn, llama, machine) is not None

    def step_s(*words: str) -> float:
        run = parsed("--max_length", "4096", *words).config
        node = profile_of_name("H100", num_gpus=8).machine
        asked = ask(run, llama, node, given=frozenset(), precision="bf16", document_len=None, offload=False)
        costs = Costs(asked.job, node, software_on(node.device))
        return evaluate(costs, Candidate(layout=Layout(world=8, tp=2))).time.total

    full, some = step_s(), step_s("--lisa_activated_layers", "2")
    adapters = step_s("--tuner_type", "lora")
    assert adapters < some < full and some - adapters < 0.3 * (full - adapters)
