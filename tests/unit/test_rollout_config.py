"""Settings of `megaswift rlhf --rlhf_type grpo`: defaults, and what does not belong together."""

from dataclasses import replace

import pytest

from megaswift.config.dump import dump_run
from megaswift.config.parse import parse_saved
from megaswift.config.reward_rules import reward_names, reward_weights
from megaswift.config.rules import ResolvedRun
from megaswift.config.vllm_rules import room_for_rank, server_urls
from megaswift.errors import ConfigError
from megaswift.metadata.meta import ModelMeta
from tests.unit.test_config_rules import dense, handing_on, moe, resolved

GRPO = "--rlhf_type grpo --reward_funcs accuracy "


def shared_values() -> ModelMeta:
    meta = handing_on()
    assert meta.layer_variation is not None
    return replace(meta, layer_variation=replace(meta.layer_variation, value_is_key=(True,) * 8))


def moe_that_scales_inputs() -> ModelMeta:
    meta = moe()
    assert meta.moe is not None
    return replace(meta, moe=replace(meta.moe, scale_input=True))


ADAPTED = "--use_vllm true --train_type lora --vllm_enable_lora true"


def grpo(words: str = "", *, world: int = 1) -> ResolvedRun:
    return resolved(GRPO + words, dense(), task="rlhf", world=world)


@pytest.mark.parametrize(
    ("words", "loss_type", "beta", "scale"),
    [
        ("", "grpo", 0.04, "group"),
        ("--loss_type dapo --beta 0", "dapo", 0.0, "group"),
        ("--loss_type dr_grpo", "dr_grpo", 0.04, "none"),
        ("--advantage_estimator rloo", "grpo", 0.04, "none"),
        ("--advantage_estimator rloo --scale_rewards batch", "grpo", 0.04, "batch"),
    ],
)
def test_each_form_has_its_defaults(words: str, loss_type: str, beta: float, scale: str) -> None:
    run = grpo(words).config
    assert (run.preference.loss_type, run.preference.beta, run.rollout.scale_rewards) == (
        loss_type,
        beta,
        scale,
    )


def test_lengths_and_clips_follow_each_other() -> None:
    run = grpo("--max_completion_length 100 --epsilon 0.1").config
    assert run.rollout.epsilon_high == 0.1
    lengths = run.reward.soft_max_length, run.reward.soft_cache_length, run.reward.cosine_max_len
    assert lengths == (100, 20, 100)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--vllm_mode server", "vllm_mode=server needs use_vllm=true"),
        ("--vllm_max_num_seqs 4", "vllm_max_num_seqs=4 needs use_vllm=true"),
        ("--use_vllm true --vllm_server_port 8001", "vllm_server_port=8001 is for vllm_mode=server"),
        ("--use_vllm true --vllm_mode server --sleep_level 1", "sleep_level=1 is for vllm_mode=colocate"),
        ("--use_vllm true --vllm_mode server --vllm_tensor_parallel_size 2", "vllm_tensor_parallel_size=2 belongs to the server"),
        ("--use_vllm true --vllm_mode server --vllm_server_host a b --vllm_server_port 1 2 3", "vllm_server_host names 2 machines and vllm_server_port 3"),
        ("--use_vllm true --vllm_mode server --vllm_server_port x", "vllm_server_port=x is not a number"),
        ("--use_vllm true --vllm_tensor_parallel_size 2", "vllm_tensor_parallel_size=2 does not divide the 1 ranks"),
        ("--use_vllm true --vllm_gpu_memory_utilization 2", "vllm_gpu_memory_utilization=2 is not above 0 and up to 1"),
        ("--use_vllm true --vllm_mode server --offload_model true", "offload_model=True makes room on devices that are shared"),
        ("--use_vllm true --sleep_level 3", "sleep_level=3 is not 0, 1 or 2"),
        ("--use_vllm true --rollout_importance_sampling_threshold 0", "rollout_importance_sampling_threshold=0 is too small"),
        ("--use_vllm true --rollout_importance_sampling_mode token", "rollout_importance_sampling_mode=token is not one of"),
        ("--vllm_enable_lora true", "vllm_enable_lora=True needs use_vllm=true"),
        ("--use_vllm true --vllm_enable_lora true", "vllm_enable_lora=true does not go with tuner_type=full"),
        (f"{ADAPTED} --use_dora true", "vllm_enable_lora=true does not go with use_dora=true"),
        (f"{ADAPTED} --modules_to_save lm_head", "vllm_enable_lora=true does not go with modules_to_save"),
        (f"{ADAPTED} --sleep_level 2", "sleep_level=2, which drops the base model that is sent once. Choose 1"),
        (f"{ADAPTED} --vllm_max_lora_rank 8", "vllm_max_lora_rank=8 is for `megaswift rollout`"),
        ("--use_vllm true --vllm_max_lora_rank 8", "vllm_max_lora_rank=8 needs vllm_enable_lora=true"),
        ("--use_vllm true --vllm_mode server --vllm_enable_lora true", "vllm_enable_lora=True belongs to the server"),
        ("--use_vllm true --max_length 1000 --vllm_max_model_len 900", "max_length=1000 is more than vllm_max_model_len=900"),
        ("--steps_per_generation 0", "steps_per_generation=0 is too small"),
        ("--global_batch_size 16 --generation_batch_size 40", "generation_batch_size=40 is not global_batch_size=16 x steps_per_generation=2. Give 32,"),
        ("--global_batch_size 16 --generation_batch_size 32 --steps_per_generation 3", "steps_per_generation=3. Give 48,"),
        ("--delta 1.2", "delta=1.2 is not above 1 + epsilon_high, which is 1.2"),
        ("--top_entropy_quantile 0", "top_entropy_quantile=0 is not above 0"),
        ("--repetition_penalty 0", "repetition_penalty=0 is too small"),
        ("--off_policy_sequence_mask_delta 0", "off_policy_sequence_mask_delta=0 is too small"),
        ("--off_policy_sequence_mask_delta 0.1", "masks nothing where every completion is used at once"),
        ("--multi_turn_scheduler x", "multi_turn_scheduler=x is neither FILE.py:NAME nor an entry point of megaswift.multi_turn"),
        ("--multi_turn_scheduler x.py:y --max_turns 0", "max_turns=0 is too small"),
        ("--multi_turn_scheduler x.py:y --use_chat_template false", "multi_turn_scheduler needs a chat template"),
        ("--max_turns 2", "max_turns=2 needs --multi_turn_scheduler or --gym_env"),
        ("--gym_env lake", "gym_env=lake is neither FILE.py:CLASS nor an entry point of megaswift.environments"),
        ("--use_gym_env true", "use_gym_env=true names no environment"),
        ("--gym_env e.py:E --use_gym_env false", "use_gym_env=false contradicts gym_env=e.py:E"),
        ("--multi_turn_scheduler gym_scheduler", "multi_turn_scheduler=gym_scheduler asks environments. Give --gym_env"),
        ("--gym_env e.py:E --multi_turn_scheduler x.py:y", "multi_turn_scheduler=x.py:y would answer the model beside an environment"),
        ("--gym_env e.py:E --max_turns 0", "max_turns=0 is too small"),
        ("--gym_env e.py:E --use_vllm true --vllm_tensor_parallel_size 2", "every rank of such an engine would have environments of its own"),
        ("--gym_env e.py:E --use_chat_template false", "gym_env needs a chat template"),
        ("--gym_env e.py:E --reward_model m --reward_weights 1", "reward_weights has 1 numbers for 3 rewards: accuracy reward_model gym_reward"),
        ("--reward_funcs acuracy", "reward_funcs=acuracy is neither built in nor an entry point of megaswift.rewards. Did you mean accuracy"),
        ("--reward_funcs format format", "names a function twice"),
        ("--reward_weights 1 2", "reward_weights has 2 numbers for 1 rewards: accuracy. Give one each"),
        ("--reward_model a b --reward_weights 1 2", "reward_weights has 2 numbers for 3 rewards: accuracy reward_model_1 reward_model_2"),
        ("--reward_weights much", "reward_weights=much are not numbers"),
        ("--num_generations 1", "num_generations=1 leaves nothing to compare a reward with. Give 2"),
        ("--num_generations 0", "num_generations=0 is too small"),
        ("--max_resample_times 0", "max_resample_times=0 is too small"),
        ("--cosine_max_len 0", "cosine_max_len=0 is too small"),
        ("--code_timeout 0", "code_timeout=0 is too small"),
        ("--code_memory_gib -1", "code_memory_gib=-1 is too small"),
        ("--repetition_max_penalty 1", "repetition_max_penalty=1 is a reward"),
        ("--temperature 0", "temperature=0 is too small"),
        ("--top_p 0", "top_p=0 is not above 0"),
        ("--top_k -2", "top_k=-2 is not 1 or more"),
        ("--epsilon 1", "epsilon=1 is not between"),
        ("--global_batch_size 12", "global_batch_size=12 counts completions and is not a multiple of num_generations=8. Choose 8,"),
        ("--max_length 512", "max_completion_length=512 leaves no room for a prompt in max_length=512"),
        ("--padding_free false", "padding_free=false is not built"),
        ("--num_generations_eval 2", "num_generations_eval=2 is of held-back prompts. Give --val_dataset"),
        ("--num_generations_eval 0 --val_dataset v.jsonl", "num_generations_eval=0 is too small"),
        ("--truncation_strategy left", "truncation_strategy=left is not built"),
        ("--precompute_ref_log_probs", "precompute_ref_log_probs=True is for rlhf_type dpo and kto, not grpo"),
        ("--kl_in_reward --beta 0", "kl_in_reward=true needs beta above 0"),
        ("--rpo_alpha 1", "rpo_alpha=1.0 is for rlhf_type dpo, not grpo"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(words: str, message: str) -> None:
    given = words if words.startswith("--reward_funcs") else f"--reward_funcs accuracy {words}"
    with pytest.raises(ConfigError) as caught:
        resolved(f"--rlhf_type grpo {given}", dense(), task="rlhf", world=2 if "context" in words else 1)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", (1, 16)),
        ("--steps_per_generation 3", (3, 48)),
        ("--generation_batch_size 32", (2, 32)),
        ("--generation_batch_size 32 --steps_per_generation 2", (2, 32)),
        ("--generation_batch_size 32 --off_policy_sequence_mask_delta 0.1", (2, 32)),
    ],
)
def test_a_generation_is_shared_out_by_whole_steps(words: str, expected: tuple[int, int]) -> None:
    chosen = grpo(f"--global_batch_size 16 {words}").config.rollout
    assert (chosen.steps_per_generation, chosen.generation_batch_size) == expected


def test_a_reward_model_is_enough() -> None:
    run = resolved("--rlhf_type grpo --reward_model m --reward_weights 2", dense(), task="rlhf").config
    assert (reward_names(run.reward), reward_weights(run.reward)) == (["reward_model"], [2.0])


def test_rewards_must_be_named() -> None:
    for words in ("", " --use_gym_env false"):
        with pytest.raises(ConfigError, match="reward_funcs is not set"):
            resolved(f"--rlhf_type grpo{words}", dense(), task="rlhf")


@pytest.mark.parametrize(
    "words",
    [
        "--gym_env e.py:E",
        "--gym_env frozen_lake --external_plugins p.py --use_gym_env true --multi_turn_scheduler gym_scheduler --max_turns 10",
        "--use_gym_env true --external_plugins p.py",
    ],
)
def test_environments_are_enough_and_their_weight_is_the_last(words: str) -> None:
    run = resolved(f"--rlhf_type grpo {words}", dense(), task="rlhf").config
    assert (reward_names(run.reward), reward_weights(run.reward)) == (["gym_reward"], [1.0])
    more = grpo(f"{words} --reward_model m --reward_weights 1 2 3").config.reward
    assert list(zip(reward_names(more), reward_weights(more), strict=True))[1:] == [
        ("reward_model", 2.0),
        ("gym_reward", 3.0),
    ]


@pytest.mark.parametrize(
    ("words", "meta", "message"),
    [
        ("R2", dense(), "router_replay_mode=R2 is set but llama has no experts. Leave it out."),
        ("R4", moe(), "router_replay_mode=R4 is not one of the choices. Choose from R2, R3, disabled."),
        ("R2 --moe_router_load_balancing_type sinkhorn", moe(), "does not go with moe_router_load_balancing_type=sinkhorn"),
        ("R3", moe_that_scales_inputs(), "router_replay_mode=R3 is not built for llama, whose experts transformers does not tell"),
    ],
)  # fmt: skip
def test_experts_that_nobody_knows_are_not_replayed(words: str, meta: ModelMeta, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(f"{GRPO}--router_replay_mode {words}", meta, task="rlhf")
    assert message in str(caught.value)


@pytest.mark.parametrize("words", ["disabled", "R2", "R3", "R3 --use_vllm true --vllm_mode server"])
def test_experts_are_replayed_where_they_are_known(words: str) -> None:
    run = resolved(f"{GRPO}--router_replay_mode {words}", moe(), task="rlhf").config
    assert run.rollout.router_replay_mode == words.split()[0]


@pytest.mark.parametrize(
    ("task", "words"),
    [("sft", ""), ("rlhf", "--rlhf_type dpo "), ("rlhf", "--rlhf_type gkd --teacher_model t ")],
)
def test_experts_are_replayed_for_rewards_alone(task: str, words: str) -> None:
    with pytest.raises(ConfigError, match="router_replay_mode=R2 is for `megaswift rlhf --rlhf_type grpo`"):
        resolved(f"{words}--router_replay_mode R2", moe(), task=task)


@pytest.mark.parametrize(("task", "words"), [("sft", ""), ("rlhf", "--rlhf_type dpo ")])
def test_other_tasks_have_no_completions(task: str, words: str) -> None:
    for flag in ("num_generations=4", "use_gym_env=True", "gym_env=e.py:E"):
        with pytest.raises(ConfigError, match=f"{flag} is for `megaswift rlhf --rlhf_type grpo`"):
            resolved(f"{words}--{flag.replace('=', ' ')}", dense(), task=task)


def test_vllm_holds_adapters_of_models_without_experts() -> None:
    assert grpo(f"{ADAPTED} --sleep_level 1").config.vllm.vllm_enable_lora
    for meta, what in (
        (moe(), "the experts of"),
        (shared_values(), "values that are keys, which"),
        (replace(dense(), model_type="glm4"), "glm4, whose modules vLLM knows by other names"),
    ):
        with pytest.raises(ConfigError, match=f"does not go with {what}"):
            resolved(GRPO + ADAPTED, meta, task="rlhf")


@pytest.mark.parametrize(("rank", "room"), [(1, 8), (8, 8), (9, 16), (65, 128), (512, 512)])
def test_vllm_has_room_for_the_next_rank_that_it_knows(rank: int, room: int) -> None:
    assert room_for_rank(rank) == room


def test_a_rank_that_vllm_has_no_room_for_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank 512 at most, not 513"):
        room_for_rank(513)


def test_vllm_is_for_completions() -> None:
    with pytest.raises(ConfigError, match="use_vllm=True is for `megaswift rlhf --rlhf_type grpo`"):
        resolved("--use_vllm true", dense(), task="sft")


def test_a_student_may_write_by_vllm_and_a_teacher_may_not() -> None:
    words = "--rlhf_type gkd --teacher_model t --use_vllm true --lmbda"
    assert resolved(f"{words} 0.5", dense(), task="rlhf").config.sampler.use_vllm
    for more in ("0.5 --seq_kd true", "0"):
        with pytest.raises(ConfigError, match="use_vllm=True is for"):
            resolved(f"{words} {more}", dense(), task="rlhf")
    elsewhere = words.replace("--teacher_model t", "--teacher_model_server http://a:1 --gkd_logits_topk 4")
    assert resolved(f"{elsewhere} 0.5 --seq_kd true", dense(), task="rlhf").config.sampler.use_vllm
    with pytest.raises(ConfigError, match="use_vllm=True is for"):
        resolved(f"{elsewhere} 0 --seq_kd true", dense(), task="rlhf")


@pytest.mark.parametrize(
    ("words", "lengths"),
    [
        ("--max_length 900", (900, 900)),
        ("--vllm_max_model_len 900", (900, 900)),
        ("--max_length 900 --vllm_max_model_len 1000", (900, 1000)),
    ],
)
def test_samples_and_engine_have_the_same_room(words: str, lengths: tuple[int, int]) -> None:
    run = grpo(f"--use_vllm true {words}").config
    assert (run.data.max_length, run.vllm.vllm_max_model_len) == lengths


def test_servers_have_addresses() -> None:
    words = "--use_vllm true --vllm_mode server "
    chosen = grpo(f"{words} --vllm_server_host a b --vllm_server_port 1 2").config.sampler
    assert server_urls(chosen) == ["http://a:1", "http://b:2"]
    assert server_urls(grpo(f"{words} --vllm_server_port 1 2").config.sampler)[1] == "http://127.0.0.1:2"
    assert server_urls(grpo(f"{words} --vllm_server_base_url https://a/").config.sampler) == ["https://a"]


def test_other_losses_still_need_a_strength() -> None:
    with pytest.raises(ConfigError, match="beta=0 is too small"):
        resolved("--rlhf_type dpo --beta 0", dense(), task="rlhf")


def test_saved_settings_resolve_to_themselves(tmp_path) -> None:
    run = grpo("--reward_weights 0.5 --epsilon_high 0.28 --max_length 1000").config
    (tmp_path / "run.yaml").write_text(dump_run(run))
    again = resolved(f"--config {tmp_path / 'run.yaml'}", dense(), task="rlhf").config
    for saved in (parse_saved(tmp_path / "run.yaml"), again):
        assert (saved.rollout, saved.reward) == (run.rollout, run.reward)
