"""Rules of teachers: of `megaswift rlhf --rlhf_type gkd`, and of grpo where one has a say in the advantages."""

from megaswift.config.case import Case
from megaswift.config.preference import PreferenceConfig
from megaswift.config.reference import is_taught
from megaswift.config.reward_rules import reward_names
from megaswift.config.rollout import RolloutConfig
from megaswift.config.rollout_rules import generates
from megaswift.config.run import RunConfig
from megaswift.config.teachers import BY_SET, shares_rows_out, tag_of_set, teachers_by_tag
from megaswift.errors import ConfigError, nearest


def there_is_one_teacher(run: RunConfig) -> None:
    """A teacher is in memory or behind HTTP, and nothing is said of one who is not there."""
    chosen, blank = run.preference, PreferenceConfig()
    if chosen.teacher_model is not None and chosen.teacher_model_server is not None:
        raise ConfigError(
            f"teacher_model={chosen.teacher_model} and teacher_model_server={chosen.teacher_model_server} are two teachers. Give one."
        )
    if chosen.offload_teacher_model and chosen.teacher_model is None:
        raise ConfigError("offload_teacher_model=true moves --teacher_model. Give one, or leave this out.")
    if chosen.offload_teacher_model and run.precision.fp8_param_gather:
        raise ConfigError(
            "offload_teacher_model=true moves no weights that are kept in FP8 (fp8_param_gather=true). Leave one of them out."
        )
    if chosen.teacher_kl_coef != blank.teacher_kl_coef and not is_taught(run):
        raise ConfigError(
            f"teacher_kl_coef={chosen.teacher_kl_coef:g} needs a teacher. Give --teacher_model or --teacher_model_server, or leave this "
            "out."
        )
    if chosen.teacher_kl_coef <= 0:
        raise ConfigError(f"teacher_kl_coef={chosen.teacher_kl_coef:g} is too small. Give more than 0.")


def a_teacher_has_a_say_in_every_token(run: RunConfig) -> None:
    """What looks at the advantage of a completion as a whole does not go with advantages of tokens, as in ms-swift 4.6."""
    if not generates(run) or not is_taught(run):
        return
    form, delta = run.preference.loss_type, run.rollout.off_policy_sequence_mask_delta
    for asked, what in (
        (form in ("real", "fipo"), f"loss_type={form}"),
        (delta is not None, f"off_policy_sequence_mask_delta={delta}"),
    ):
        if asked:
            raise ConfigError(
                f"{what} weighs completions as a whole, and a teacher judges each token. Leave one of them out."
            )
    blank = RolloutConfig()
    for name in ("dynamic_sample", "advantage_estimator", "kl_in_reward"):
        value = getattr(run.rollout, name)
        if value not in (getattr(blank, name), False) and not reward_names(run.reward):
            raise ConfigError(
                f"{name}={value} is said of rewards, and there are none. Give --reward_funcs, or leave it out."
            )


def distillation_has_a_teacher(run: RunConfig) -> None:
    """There is a model to learn from, in memory or behind HTTP."""
    chosen = run.preference
    if run.task != "rlhf" or chosen.rlhf_type != "gkd":
        return
    if chosen.teacher_model is None and chosen.teacher_model_server is None:
        raise ConfigError(
            "rlhf_type=gkd needs teacher_model or teacher_model_server. Give --teacher_model, a model with the same vocabulary, or "
            "the address of a server that has it."
        )
    if chosen.teacher_model_server is not None and chosen.gkd_logits_topk is None:
        raise ConfigError(
            "teacher_model_server tells the likeliest tokens of each place alone. Give their number as --gkd_logits_topk, such as 64."
        )


def each_of_several_teachers_has_rows(run: RunConfig) -> None:
    """Who shares rows out by their sets has a teacher for each, and a set for each tag."""
    chosen = run.preference
    if not shares_rows_out(chosen):
        if chosen.teacher_tag_key != PreferenceConfig().teacher_tag_key:
            raise ConfigError(
                f"teacher_tag_key={chosen.teacher_tag_key} chooses among several teachers. Name them in --teacher_model_server, or "
                "leave it out."
            )
        return
    if chosen.seq_kd:
        raise ConfigError(
            "seq_kd=true is not built for several teachers. Leave it out, or give one --teacher_model_server."
        )
    if chosen.teacher_tag_key != BY_SET:
        return
    tags = teachers_by_tag(chosen)
    sets = {tag_of_set(name): name for name in (*run.data.dataset, *run.data.val_dataset)}
    for tag, name in sets.items():
        if tag not in tags:
            raise ConfigError(
                f"dataset={name} has no teacher: the tags are {', '.join(tags)}. Give the tag {tag} to one in --teacher_model_server."
            )
    for tag in tags:
        if tag not in sets:
            raise ConfigError(f"teacher_model_server: no --dataset is {tag}.{nearest(tag, sets)}")


def the_answers_of_distillation_have_authors(case: Case) -> Case | None:
    """Say which answers the teacher is asked about."""
    chosen = case.run.preference
    if case.run.task != "rlhf" or chosen.rlhf_type != "gkd":
        return None
    others = "completions by the teacher" if chosen.seq_kd else "the rows' own answers"
    own = f"completions by the trained model in a share of {chosen.lmbda:g} of the steps"
    texts = {0.0: others, 1.0: "completions by the trained model"}.get(chosen.lmbda, f"{own}, else {others}")
    return case.change(
        "preference", f"rlhf_type=gkd: the teacher is learnt from on {texts} (lmbda={chosen.lmbda:g})."
    )


def served_teachers_have_a_temperature_of_their_own(case: Case) -> Case | None:
    """Say so where log-probabilities of different temperatures meet."""
    heat = case.run.rollout.temperature
    if not generates(case.run) or case.run.preference.teacher_model_server is None or heat == 1:
        return None
    return case.change(
        "preference",
        f"teacher_model_server: servers tell log-probabilities at temperature 1, and the model's are at {heat:g}.",
    )
