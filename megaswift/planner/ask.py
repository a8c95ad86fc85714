"""From settings of a run to a job and a search space: what the user fixed, and what is left to choose."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from megaswift.config.reference import has_teacher_here, needs_reference
from megaswift.config.rows import texts_of_a_row
from megaswift.config.run import RunConfig
from megaswift.config.training_rules import DEFAULT_GLOBAL_BATCH
from megaswift.config.vllm_rules import share_beside_the_trainer
from megaswift.converters.selection import Elements, elements_of, saved_tensors, trained_elements
from megaswift.errors import ConfigError, ModelError
from megaswift.metadata.meta import ModelMeta
from megaswift.metadata.read import get_model_meta
from megaswift.planner.job import Job, job_of
from megaswift.planner.machine import Device, Machine
from megaswift.planner.parts import Parts, parts_of
from megaswift.planner.search import Space
from megaswift.planner.software import Software

# flag of `megaswift sft` -> axis of the search
AXIS_OF = {
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "virtual_pipeline_model_parallel_size": "vpp",
    "context_parallel_size": "cp",
    "expert_model_parallel_size": "ep",
    "expert_tensor_parallel_size": "etp",
    "micro_batch_size": "micro_batch",
    "recompute_granularity": "recompute",
    "cp_comm_type": "cp_comm",
}
# --target_modules without the feed-forward part (models/lora.py has them all)
ATTENTION = frozenset("linear_qkv linear_proj q_proj k_proj v_proj qkv_proj o_proj dense".split())
RUNS_IN = (
    "fp8",
    "mxfp8",
)  # of those with casts; nvfp4, which is planned where it is named, has no recipe (config/precision.py)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the planner is asked, and what was assumed because nobody said it."""

    job: Job
    space: Space
    assumed: tuple[str, ...]


def beside_vllm(run: RunConfig, machine: Machine) -> Machine:
    """Return the machine as the trainer finds it, with vLLM on the same devices or without."""
    return replace(machine, kept_share=share_beside_the_trainer(run))


def trained_of(run: RunConfig, meta: ModelMeta) -> Elements | None:
    """Return how much of the model trains, beside adapters where there are some; None: all of it, or the adapters alone.

    Names of a head that the task puts in place of the language model's are not known here: all is taken to train.
    """
    scores = run.task == "rlhf" and run.preference.rlhf_type == "rm"
    if run.model.task_type != "causal_lm" or scores:
        return None
    if run.tuner.modules_to_save:
        return elements_of(meta, saved_tensors(meta, run.tuner.modules_to_save))
    return trained_elements(meta, run.freeze) if run.freeze.chooses else None


def ask(
    run: RunConfig,
    meta: ModelMeta,
    machine: Machine,
    *,
    given: frozenset[str],
    precision: str,
    document_len: int | None,
    offload: bool,
) -> Question:
    """Return the question that a run poses; `given` are the flags that the user wrote. Raises ConfigError."""
    assumed = []
    length = run.data.packing_length or run.data.max_length
    if length is None:
        length = meta.max_length
        assumed.append(f"max_length={length}: the model's context length")
    if length < 1:
        raise ConfigError(f"max_length={length} is not a length. Give 1 or more.")
    texts = texts_of_a_row(run) if run.data.packing_length is None else 1
    if texts > 1:
        document_len = document_len or length
    batch, micro_batch = run.training.global_batch_size, run.training.micro_batch_size
    if micro_batch < 1:
        raise ConfigError(f"micro_batch_size={micro_batch} is not a size. Give 1 or more.")
    if batch is None:
        # As config/training_rules.py rounds it up; here so that all devices may be replicas.
        once = machine.num_devices * (micro_batch if "micro_batch_size" in given else 1)
        batch = once * ceil(DEFAULT_GLOBAL_BATCH / once)
        assumed.append(f"global_batch_size={batch}")
    if batch < 1:
        raise ConfigError(f"global_batch_size={batch} is not a size. Give 1 or more.")
    if document_len is None and run.data.packing:
        assumed.append("every pack holds one sample (--document_length says otherwise)")
    job = job_of(
        meta,
        seq_len=length * texts,
        global_batch=batch,
        trained=run.tuner.tuner_type,
        lora_rank=run.tuner.lora_rank,
        adapts_mlp=not ATTENTION.issuperset(run.tuner.target_modules),
        lora_dropout=run.tuner.lora_dropout > 0,
        use_dora=run.tuner.use_dora,
        four_bits=run.tuner.quant_bits is not None,
        document_len=document_len,
        beside=tuple(_parts_beside(run)),
        answers=texts,
        optimizer=run.optimizer.optimizer,
        drawn_layers=run.lisa.lisa_activated_layers or None,
        trained_elements=trained_of(run, meta),
    )
    fixed = _fixed(run, given)
    if "cp_comm" in fixed and fixed["cp_comm"] == "auto":
        del fixed["cp_comm"]
    # The state of Muon and of drawn layers does not go to host memory.
    last_resort = offload and (job.frozen or not (job.is_muon or job.drawn_layers))
    space = Space(precisions=_precisions(machine.device, precision), last_resort=last_resort, fixed=fixed)
    return Question(job=job, space=space, assumed=tuple(assumed))


def _parts_beside(run: RunConfig) -> Iterator[Parts | None]:
    """Yield the parts of the reference and the teacher that are in memory; None: a copy of the model."""
    if needs_reference(run):
        yield _parts_of_model(run, run.preference.ref_model)
    if has_teacher_here(run):
        yield _parts_of_model(run, run.preference.teacher_model)


def _parts_of_model(run: RunConfig, name: str | None) -> Parts | None:
    """Return the parts of a model; None for the trained one itself, which one that cannot be read here is taken for."""
    model = run.model
    if name in (None, model.model):
        return None
    try:
        return parts_of(
            get_model_meta(
                str(name),
                use_hf=model.use_hf,
                trust_remote_code=model.trust_remote_code,
                token=model.hub_token,
            )
        )
    except ModelError:
        return None


def _fixed(run: RunConfig, given: frozenset[str]) -> dict[str, object]:
    parallel, training = run.parallel, run.training
    values: dict[str, object] = {
        "tp": parallel.tp,
        "pp": parallel.pp,
        "vpp": parallel.vpp or 1,
        "cp": parallel.cp,
        "ep": parallel.ep,
        "etp": parallel.etp or 1,
        "micro_batch": training.micro_batch_size,
        "recompute": training.recompute_granularity,
        "cp_comm": parallel.cp_comm_type,
    }
    return {AXIS_OF[flag]: values[AXIS_OF[flag]] for flag in given & AXIS_OF.keys()}


def _precisions(device: Device, asked: str) -> tuple[str, ...]:
    """Return the precisions to search: 16 bits where the device has them, all that runs are made in for "best"."""
    plain = next(
        name
        for name in ("bf16", "fp16", "fp32")
        if (name in device.peak_flops and device.generation != "cpu") or name == "fp32"
    )
    if asked == "auto":
        return (plain,)
    if asked == "best":
        return (plain, *(name for name in RUNS_IN if name in device.peak_flops))
    device.peak(asked)
    return (asked,)


def software_on(device: Device) -> Software:
    """Return the software of a run on a device: fused kernels on GPUs, plain torch on a CPU."""
    if device.generation != "cpu":
        return Software()
    return Software(
        fused_norm=True,  # models/norm.py keeps its input and one number a row
        fused_elementwise=False,
        wgrad_fusion=False,
        overlap_data=False,
        tensor_engine=False,
        local_layers=True,
        loss_bytes=4.0,
    )
