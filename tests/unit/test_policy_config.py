"""Settings of the kin of GRPO: what each form reads, and what it is when not given."""

import pytest

from megaswift.config.dump import dump_run
from megaswift.config.parse import parse_saved
from megaswift.errors import ConfigError
from tests.unit.test_config_rules import dense, resolved
from tests.unit.test_rollout_config import grpo


@pytest.mark.parametrize(
    ("words", "high", "scale", "in_reward", "mode"),
    [
        ("", 0.2, "group", False, None),
        ("--loss_type cispo", 5.0, "group", False, None),
        ("--loss_type cispo --epsilon_high 4", 4.0, "group", False, None),
        ("--loss_type sapo --use_vllm true --epsilon 0.2 --epsilon_high 0.2", 0.2, "group", False, "token_truncate"),
        ("--loss_type real --use_vllm true", 0.2, "none", False, "none"),
        ("--loss_type real --use_vllm true --scale_rewards none", 0.2, "none", False, "none"),
        ("--advantage_estimator reinforce_plus_plus", 0.2, "batch", True, None),
        ("--advantage_estimator reinforce_plus_plus --beta 0 --scale_rewards group", 0.2, "group", False, None),
        ("--advantage_estimator reinforce_plus_plus --kl_in_reward false", 0.2, "batch", False, None),
        ("--scale_rewards gdpo", 0.2, "gdpo", False, None),
    ],
)  # fmt: skip
def test_each_form_has_its_defaults(
    words: str, high: float, scale: str, in_reward: bool, mode: str | None
) -> None:
    run = grpo(words).config
    chosen = run.rollout
    assert (chosen.epsilon_high, chosen.scale_rewards, chosen.kl_in_reward) == (high, scale, in_reward)
    assert run.sampler.rollout_importance_sampling_mode == mode


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--loss_type sapoo", "loss_type=sapoo is not built for rlhf_type=grpo. Did you mean sapo"),
        ("--tau_pos 2", "tau_pos=2 is for loss_type sapo, not loss_type=grpo. Leave it out."),
        ("--loss_type cispo --tau_neg 2", "tau_neg=2 is for loss_type sapo, not loss_type=cispo"),
        ("--loss_type sapo --real_tau 1", "real_tau=1 is for loss_type real, not loss_type=sapo"),
        ("--loss_type dapo --fipo_decay_rate 8", "fipo_decay_rate=8 is for loss_type fipo, not loss_type=dapo"),
        ("--fipo_clip_high_only false", "fipo_clip_high_only=false is for loss_type fipo"),
        ("--fipo_safety_threshold none", "fipo_safety_threshold=none is for loss_type fipo"),
        ("--loss_type sapo --epsilon 0.1", "epsilon=0.1 is for loss_type grpo or bnpo or dr_grpo or dapo or fipo, not loss_type=sapo"),
        ("--loss_type sapo --epsilon_high 0.3", "epsilon_high=0.3 is for loss_type"),
        ("--loss_type cispo --delta 10", "delta=10 is for loss_type"),
        ("--loss_type cispo --epsilon_high 0.28", "epsilon_high=0.28 is the greatest weight of a token for loss_type=cispo"),
        ("--loss_type real --importance_sampling_level sequence", "importance_sampling_level=sequence is for forms other than real"),
        ("--loss_type real --scale_rewards group", "scale_rewards=group is for forms other than real"),
        ("--loss_type real --advantage_estimator rloo", "advantage_estimator=rloo is for forms other than real"),
        ("--loss_type real --kl_in_reward true", "kl_in_reward=true is for forms other than real"),
        ("--loss_type real --top_entropy_quantile 0.5", "top_entropy_quantile=0.5 is for forms other than real"),
        ("--loss_type real --use_vllm true --rollout_importance_sampling_mode token_mask", "rollout_importance_sampling_mode=token_mask is for forms other than real"),
        ("--loss_type real --real_tau 0", "real_tau=0 is too small"),
        ("--loss_type fipo --fipo_clip_range -1", "fipo_clip_range=-1 is not from 0"),
        ("--loss_type fipo --fipo_clip_range 1 --fipo_clip_high_only false", "fipo_clip_range=1 is not from 0 to below 1"),
        ("--loss_type fipo --delta 1.1", "delta=1.1 is not above 1 + epsilon_high"),
        ("--scale_rewards gdpo --advantage_estimator rloo", "scale_rewards=gdpo is an estimator of its own and advantage_estimator=rloo another"),
        ("--scale_rewards gdpo --kl_in_reward true", "scale_rewards=gdpo scales reward functions, and kl_in_reward=true is none of them"),
        ("--importance_sampling_level tokens", "importance_sampling_level=tokens is not one of"),
    ],
)  # fmt: skip
def test_settings_of_one_form_given_with_another_are_refused(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        grpo(words)
    assert message in str(caught.value)


def test_other_tasks_have_no_forms() -> None:
    with pytest.raises(ConfigError, match=r"tau_pos=2\.0 is for `megaswift rlhf --rlhf_type grpo`"):
        resolved("--rlhf_type dpo --tau_pos 2", dense(), task="rlhf")


@pytest.mark.parametrize(
    "words",
    [
        "--loss_type sapo --tau_neg 1.1",
        "--loss_type cispo",
        "--loss_type fipo --fipo_clip_range none --fipo_safety_threshold none --delta 10",
        "--loss_type real --real_tau 0.3 --use_vllm true --vllm_max_model_len 900",
        "--advantage_estimator reinforce_plus_plus --importance_sampling_level sequence_token",
        "--scale_rewards gdpo",
    ],
)
def test_saved_settings_resolve_to_themselves(words: str, tmp_path) -> None:
    run = grpo(f"--max_length 900 {words}").config
    (tmp_path / "run.yaml").write_text(dump_run(run))
    again = resolved(f"--config {tmp_path / 'run.yaml'}", dense(), task="rlhf").config
    for saved in (parse_saved(tmp_path / "run.yaml"), again):
        assert (saved.rollout, saved.policy, saved.sampler) == (run.rollout, run.policy, run.sampler)
