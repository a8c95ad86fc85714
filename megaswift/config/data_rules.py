"""Rules between the settings that say which rows come in which order."""

from math import isclose

from megaswift.config.data import DataConfig
from megaswift.config.loss_scale import split_loss_scale
from megaswift.config.rollout_rules import distils_completions, generates
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError


def the_loss_scale_is_known(run: RunConfig) -> None:
    """Every word of it says something."""
    split_loss_scale(run.data.loss_scale)


def every_set_has_its_share(run: RunConfig) -> None:
    """Interleaving draws each row from one of the sets, by shares that add up to 1."""
    data = run.data
    if not data.interleave_prob:
        if data.stopping_strategy != DataConfig().stopping_strategy:
            raise ConfigError(
                f"stopping_strategy={data.stopping_strategy} needs --interleave_prob: without it sets follow each other."
            )
        return
    text = " ".join(data.interleave_prob)
    try:
        shares = [float(word) for word in data.interleave_prob]
    except ValueError:
        raise ConfigError(
            f"interleave_prob={text} is not a list of numbers. Write --interleave_prob 0.7 0.3."
        ) from None
    if len(shares) != len(data.dataset):
        raise ConfigError(
            f"interleave_prob={text} has {len(shares)} shares for {len(data.dataset)} sets. Give one for each --dataset."
        )
    if not all(share > 0 for share in shares) or not isclose(sum(shares), 1, abs_tol=1e-6):
        raise ConfigError(
            f"interleave_prob={text} adds up to {sum(shares):g}. Give shares above 0 that add up to 1."
        )


def a_model_has_a_name_in_two_languages(run: RunConfig) -> None:
    """Self-cognition rows are Chinese or English."""
    for flag in ("model_name", "model_author"):
        names = getattr(run.data, flag)
        if len(names) > 2:
            raise ConfigError(
                f"{flag}={' '.join(names)} are {len(names)} names. Give one, or a Chinese and an English one; quote one that has blanks."
            )


def lengths_are_known_where_rows_are_grouped(run: RunConfig) -> None:
    """Rows that are packed fill rows of one length, and those of a stream are not known ahead."""
    for asked, what in ((run.data.packing, "packing=true"), (run.data.streaming, "streaming=true")):
        if run.data.group_by_length and asked:
            raise ConfigError(f"group_by_length=true has nothing to sort with {what}. Leave one of them out.")


def streams_have_an_end(run: RunConfig) -> None:
    """A stream of rows is read once, in order, and nobody knows how long it is."""
    data = run.data
    if data.shuffle_buffer_size < 1:
        raise ConfigError(f"shuffle_buffer_size={data.shuffle_buffer_size} is too small. Give 1 or more.")
    if not data.streaming:
        return
    if run.training.train_iters is None:
        raise ConfigError(
            "streaming=true needs --train_iters (--max_steps): the length of a stream is not known."
        )
    if data.split_dataset_ratio:
        raise ConfigError(
            f"split_dataset_ratio={data.split_dataset_ratio} needs all rows at once, which streaming=true does not have. Give "
            "--val_dataset."
        )
    if data.prepared_dir is not None:
        raise ConfigError(
            "prepared_dir is for sets that are read at once, not for streaming=true. Leave one out."
        )
    if run.task != "rlhf":
        return
    if generates(run):
        raise ConfigError(
            f"streaming=true does not give the prompts of rlhf_type={run.preference.rlhf_type}. Leave it out."
        )
    if distils_completions(run):
        raise ConfigError(
            "streaming=true gives no prompts to complete. Give --lmbda 0 and leave --seq_kd out, or leave it out."
        )
    if run.preference.precompute_ref_log_probs:
        raise ConfigError(
            "precompute_ref_log_probs needs all rows at once. Leave it out with streaming=true."
        )
    if run.preference.rlhf_type == "kto" and run.preference.calculate_kl:
        raise ConfigError(
            "rlhf_type=kto compares each answer with one of half the set away, and streaming=true has no whole set. Give "
            "--calculate_KL false or leave --streaming out."
        )
