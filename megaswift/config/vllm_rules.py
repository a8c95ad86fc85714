"""Rules of completions by vLLM: which settings belong together, and what they are when not given."""

from megaswift.config.case import Case
from megaswift.config.rollout_rules import distils_completions, generates
from megaswift.config.run import RunConfig
from megaswift.config.vllm import SamplerConfig, VllmConfig
from megaswift.errors import ConfigError
from megaswift.metadata.meta import ModelMeta

BESIDE_THE_TRAINER = 0.3  # of the device's memory: the default of TRL 1.16, vllm_gpu_memory_utilization
IN_A_SERVER = 0.9  # vLLM 0.32's own, gpu_memory_utilization
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM 0.32 makes room for these alone (config/lora.py, MaxLoRARanks), or for 1
SERVER_LORA_RANK = 16  # vLLM's own, max_lora_rank

OF_SERVERS = (
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_base_url",
    "vllm_server_timeout",
    "vllm_server_group_port",
)
ROOM = ("offload_model", "offload_optimizer")  # for any engine on the trainer's devices


def share_beside_the_trainer(run: RunConfig) -> float:
    """Return the share of a device's memory that vLLM keeps while the trainer trains: none where it sleeps meanwhile."""
    sampler, share = run.sampler, run.vllm.vllm_gpu_memory_utilization
    if not sampler.use_vllm or sampler.vllm_mode != "colocate" or sampler.sleep_level > 0:
        return 0.0
    return BESIDE_THE_TRAINER if share is None else share


def vllm_is_for_completions(run: RunConfig) -> None:
    """Settings of vLLM mean nothing to tasks without completions, nor to a teacher in memory who writes some."""
    chosen = run.preference
    by_student = distils_completions(run) and chosen.lmbda > 0
    if generates(run) or (by_student and not (chosen.seq_kd and chosen.teacher_model_server is None)):
        return
    why = "is for `megaswift rlhf --rlhf_type grpo`, or gkd with --lmbda above 0 and without --seq_kd. Leave it out."
    _refuse(run.sampler, _without_patience(run), why)
    _refuse(run.vllm, (*vars(run.vllm),), why)


def vllm_is_asked_for(run: RunConfig) -> None:
    """Settings of vLLM mean nothing without it, and settings of one mode nothing in the other."""
    chosen = run.sampler
    if not chosen.use_vllm:
        of_vllm = tuple(name for name in _without_patience(run) if name not in ROOM)
        _refuse(chosen, of_vllm, "needs use_vllm=true. Add it, or leave this out.")
        _refuse(run.vllm, (*vars(run.vllm),), "needs use_vllm=true. Add it, or leave this out.")
    elif chosen.vllm_mode == "colocate":
        _refuse(
            chosen,
            tuple(name for name in OF_SERVERS if name in _without_patience(run)),
            "is for vllm_mode=server. Leave it out.",
        )
    else:
        _refuse(chosen, ("sleep_level",), "is for vllm_mode=colocate. Leave it out.")
        _refuse(
            chosen, ROOM, "makes room on devices that are shared, and servers have their own. Leave it out."
        )
        _refuse(
            run.vllm, (*vars(run.vllm),), "belongs to the server: give it to `megaswift rollout`, not here."
        )


def _without_patience(run: RunConfig) -> tuple[str, ...]:
    """Return the names of the sampler's settings, without the one that a teacher's server reads too if there is one."""
    read = {"vllm_server_timeout"} if run.preference.teacher_model_server is not None else set()
    return tuple(name for name in vars(run.sampler) if name not in read)


def _refuse(section: SamplerConfig | VllmConfig, names: tuple[str, ...], why: str) -> None:
    blank = type(section)()
    for name in names:
        value = getattr(section, name)
        if value != getattr(blank, name):
            text = " ".join(value) if isinstance(value, list) else value
            raise ConfigError(f"{name}={text} {why}")


def vllm_numbers_are_in_range(run: RunConfig) -> None:
    """Shares are shares, and levels are levels."""
    chosen = run.sampler
    if chosen.sleep_level not in (0, 1, 2):
        raise ConfigError(f"sleep_level={chosen.sleep_level} is not 0, 1 or 2.")
    if chosen.rollout_importance_sampling_threshold <= 0:
        threshold = chosen.rollout_importance_sampling_threshold
        raise ConfigError(
            f"rollout_importance_sampling_threshold={threshold:g} is too small. Give more than 0."
        )
    check_engine(run.vllm)
    server_urls(chosen)


def check_engine(chosen: VllmConfig) -> None:
    """Check the settings of an engine by themselves; raises ConfigError."""
    share = chosen.vllm_gpu_memory_utilization
    if share is not None and not 0 < share <= 1:
        raise ConfigError(f"vllm_gpu_memory_utilization={share:g} is not above 0 and up to 1.")
    for name, value in (
        ("vllm_tensor_parallel_size", chosen.vllm_tensor_parallel_size),
        ("vllm_max_num_seqs", chosen.vllm_max_num_seqs),
        ("vllm_max_model_len", chosen.vllm_max_model_len),
        ("vllm_max_lora_rank", chosen.vllm_max_lora_rank),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} is too small. Give 1 or more.")
    if chosen.vllm_max_lora_rank is not None:
        if not chosen.vllm_enable_lora:
            raise ConfigError(
                f"vllm_max_lora_rank={chosen.vllm_max_lora_rank} needs vllm_enable_lora=true. Add it, or leave this out."
            )
        room_for_rank(chosen.vllm_max_lora_rank)


def room_for_rank(rank: int) -> int:
    """Return the rank that vLLM must make room for, so that an adapter of `rank` fits. Raises ConfigError."""
    found = next((room for room in LORA_RANKS if room >= rank), None)
    if found is None:
        raise ConfigError(
            f"vLLM takes adapters of rank {LORA_RANKS[-1]} at most, not {rank}. Choose a smaller rank, or leave out --vllm_enable_lora."
        )
    return found


def check_adapter(run: RunConfig, meta: ModelMeta) -> None:
    """Raise ConfigError where vLLM cannot answer with the adapter beside the base model."""
    why = what_vllm_does_not_adapt(run, meta)
    if why is not None:
        raise ConfigError(
            f"vllm_enable_lora=true does not go with {why}. Leave it out, and vLLM gets merged weights."
        )


def what_vllm_does_not_adapt(run: RunConfig, meta: ModelMeta) -> str | None:
    """Return what keeps vLLM 0.32 from answering with the adapter beside the base model, if something does."""
    tuner, varied = run.tuner, meta.layer_variation
    for held, what in (
        (tuner.tuner_type == "full", "tuner_type=full"),
        (tuner.use_dora, "use_dora=true"),
        (bool(tuner.modules_to_save), "modules_to_save"),
        (meta.moe is not None, f"the experts of {meta.model_type}"),
        # It gives the adapter of k to k alone, and the weight of k to v too (model_executor/models/gemma4.py).
        (varied is not None and any(varied.value_is_key), f"values that are keys, which {meta.model_type} has"),
        # It adapts gate_proj and up_proj, and the file has them in one (model_executor/models/glm4.py).
        (meta.model_type == "glm4", f"{meta.model_type}, whose modules vLLM knows by other names"),
    ):
        if held:
            return what
    return None


def vllm_can_hold_the_adapter(case: Case) -> None:
    """An adapter that vLLM keeps beside the base model is one that it knows how to apply, and the base stays where it is."""
    run = case.run
    if not run.vllm.vllm_enable_lora:
        return
    check_adapter(run, case.meta)
    if run.sampler.sleep_level == 2:
        raise ConfigError(
            "vllm_enable_lora=true does not go with sleep_level=2, which drops the base model that is sent once. Choose 1."
        )
    if run.vllm.vllm_max_lora_rank is not None:
        raise ConfigError(
            f"vllm_max_lora_rank={run.vllm.vllm_max_lora_rank} is for `megaswift rollout`: beside the trainer it is the adapter's own. "
            "Leave it out."
        )


def server_urls(chosen: SamplerConfig) -> list[str]:
    """Return the address of every server; raises ConfigError where hosts and ports are not as many."""
    if chosen.vllm_server_base_url:
        return [url.rstrip("/") for url in chosen.vllm_server_base_url]
    hosts, ports = chosen.vllm_server_host, chosen.vllm_server_port
    if len(hosts) == 1:
        hosts = hosts * len(ports)
    if len(hosts) != len(ports):
        raise ConfigError(
            f"vllm_server_host names {len(hosts)} machines and vllm_server_port {len(ports)} ports. Give a port for each, or one "
            "machine for all."
        )
    for port in ports:
        if not port.isdecimal():
            raise ConfigError(f"vllm_server_port={port} is not a number.")
    return [f"http://{host}:{port}" for host, port in zip(hosts, ports, strict=True)]


def engines_share_out_the_ranks(case: Case) -> None:
    """Every rank belongs to an engine beside it."""
    chosen, size = case.run.sampler, case.run.vllm.vllm_tensor_parallel_size
    if chosen.use_vllm and chosen.vllm_mode == "colocate" and case.world % size:
        raise ConfigError(f"vllm_tensor_parallel_size={size} does not divide the {case.world} ranks.")


def samples_fit_the_engine(case: Case) -> Case | None:
    """A prompt with its completion is no longer than what vLLM has room for."""
    run = case.run
    if not run.sampler.use_vllm or run.sampler.vllm_mode == "server":
        return None
    room, longest = run.vllm.vllm_max_model_len, run.data.max_length
    if room is None:
        return None if longest is None else case.change("vllm", vllm_max_model_len=longest)
    if longest is None:
        return case.change("data", max_length=room)
    if longest > room:
        raise ConfigError(
            f"max_length={longest} is more than vllm_max_model_len={room}. Lower it, or raise the other."
        )
    return None
