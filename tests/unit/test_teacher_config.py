"""Teachers in settings: who has one, where it is, and what a teacher does not go with."""

import pytest

from megaswift.config.reference import beside, has_teacher_here, is_taught
from megaswift.config.rules import ResolvedRun, resolve
from megaswift.data.forms import form_of
from megaswift.errors import ConfigError
from tests.unit.test_config_rules import dense, moe, resolved

SERVED = "--teacher_model_server http://a:1"
SEVERAL = (
    '--teacher_model_server [{"url":"http://a:1","tags":["rows.jsonl"]},{"url":"http://b:1","tags":["y"]}]'
)


def taught(words: str) -> ResolvedRun:
    return resolved(f"--rlhf_type grpo {words}", dense(), task="rlhf")


@pytest.mark.parametrize("words", ["--teacher_model t --offload_teacher_model true", SERVED])
def test_a_policy_may_learn_from_a_teacher_alone_or_beside_rewards(words: str) -> None:
    alone = taught(f"{words} --num_generations 1").config
    assert is_taught(alone) and has_teacher_here(alone) is (words != SERVED)
    beside = taught(f"{words} --reward_funcs format --teacher_kl_coef 0.5").config
    assert beside.preference.teacher_kl_coef == 0.5


def test_what_is_resolved_resolves_to_itself() -> None:
    run = taught("--teacher_model t").config
    assert resolve(run, dense(), 1, "cpu").config == run


def test_a_teacher_is_built_without_what_is_said_of_training() -> None:
    """Of 8 layers without experts, beside a model with experts and 3 layers drawn at a time."""
    words = "--teacher_model t --router_replay_mode R2 --moe_aux_loss_coeff 0.1 --recompute_granularity full --recompute_method block"
    run = resolved(f"--rlhf_type grpo {words} --recompute_num_layers 8", moe(), task="rlhf").config
    settings = beside(run, has_experts=False)
    assert resolve(settings, dense(num_layers=4), 1, "cpu").config.rollout.router_replay_mode == "disabled"
    assert beside(run, has_experts=True).moe == run.moe


def test_prompts_are_shared_out_by_tags() -> None:
    with_tags = form_of(taught(f"{SEVERAL} --teacher_tag_key c").config)
    assert with_tags.asks and "teachers" in with_tags.name


def test_temperatures_that_differ_are_told() -> None:
    assert any("at temperature 1, and the model's are at 0.9" in note for note in taught(SERVED).notes)
    for words in (f"{SERVED} --temperature 1", "--teacher_model t"):
        assert not any("temperature" in note for note in taught(words).notes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "reward_funcs is not set.*or a --teacher_model"),
        ("--teacher_model t --val_dataset v.jsonl", "Held-back prompts are for rewards, and this run has none"),
        ("--reward_funcs format --teacher_kl_coef 2", "teacher_kl_coef=2 needs a teacher"),
        ("--reward_funcs format --offload_teacher_model true", "offload_teacher_model=true moves --teacher_model"),
        (f"{SERVED} --offload_teacher_model true", "offload_teacher_model=true moves --teacher_model"),
        ("--teacher_model t --offload_teacher_model true --fp8_format hybrid --fp8_param_gather true", "moves no weights that are kept in FP8"),
        (f"{SERVED} --teacher_model t", "are two teachers. Give one"),
        ("--teacher_model t --teacher_kl_coef 0", "teacher_kl_coef=0 is too small"),
        ("--teacher_model t --num_generations 1 --reward_funcs format", "num_generations=1 leaves nothing to compare"),
        ("--teacher_model t --loss_type real", "loss_type=real weighs completions as a whole, and a teacher judges each token"),
        ("--teacher_model t --loss_type fipo", "loss_type=fipo weighs completions as a whole"),
        ("--teacher_model t --off_policy_sequence_mask_delta 1 --num_iterations 2", "off_policy_sequence_mask_delta=1.0 weighs"),
        ("--teacher_model t --dynamic_sample true", "dynamic_sample=True is said of rewards, and there are none. Give --reward_funcs"),
        ("--teacher_model t --kl_in_reward true", "kl_in_reward=True is said of rewards"),
        ("--teacher_model t --advantage_estimator rloo", "advantage_estimator=rloo is said of rewards"),
        ("--teacher_model t --lmbda 0.1", "lmbda=0.1 is for rlhf_type gkd, not grpo"),
        ("--teacher_model t --gkd_logits_topk 4", "gkd_logits_topk=4 is for rlhf_type gkd, not grpo"),
        (SEVERAL, "teacher_model_server: no --dataset is y"),
    ],
)  # fmt: skip
def test_what_a_teacher_does_not_go_with_is_refused(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        taught(words)


@pytest.mark.parametrize("kind", ["dpo", "gkd --teacher_model t"])
def test_coefficients_are_of_policies(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"teacher_kl_coef=2\.0 is for rlhf_type grpo"):
        resolved(f"--rlhf_type {kind} --teacher_kl_coef 2", dense(), task="rlhf")
