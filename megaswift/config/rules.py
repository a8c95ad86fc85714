"""The rules between settings, in the order in which they are applied; each is a function of one of the *_rules.py."""

from dataclasses import dataclass
from math import lcm

from megaswift.config import context_rules as context
from megaswift.config import data_rules as data
from megaswift.config import environment_rules as environment
from megaswift.config import head_rules as head
from megaswift.config import layout_rules as layout
from megaswift.config import muon_rules as muon
from megaswift.config import policy_rules as policy
from megaswift.config import precision_rules as precision
from megaswift.config import preference_rules as preference
from megaswift.config import report_rules as report
from megaswift.config import reward_rules as reward
from megaswift.config import rollout_rules as rollout
from megaswift.config import teacher_rules as teacher
from megaswift.config import training_rules as training
from megaswift.config import tuner_rules as tuner
from megaswift.config import vllm_rules as vllm
from megaswift.config import weight_rules as weights
from megaswift.config.case import Case, Rule
from megaswift.config.run import RunConfig
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.layout import Layout

# What needs neither the model nor the ranks.
REQUEST_RULES = (
    training.a_model_is_named,
    training.rows_are_named,
    training.sizes_are_positive,
    report.validations_have_a_time,
    report.an_early_end_follows_from_validations,
    report.the_best_checkpoint_follows_from_validations,
    report.reports_are_known,
    report.callbacks_are_named,
    report.metrics_belong_to_the_task,
    report.answers_are_generated_for_held_back_rows,
    data.the_loss_scale_is_known,
    data.every_set_has_its_share,
    data.a_model_has_a_name_in_two_languages,
    data.lengths_are_known_where_rows_are_grouped,
    data.streams_have_an_end,
    training.random_weights_are_for_pre_training,
    muon.muon_settings_belong_to_muon,
    weights.weights_have_one_source,
    weights.new_tokens_have_rows_everywhere,
    tuner.parts_of_the_model_train_in_full,
    tuner.layers_are_drawn_in_full_training,
    head.heads_are_for_fine_tuning,
    head.labels_are_counted,
    head.embeddings_have_a_loss,
    head.rerankers_have_a_loss,
    head.judges_are_asked_and_answer,
    head.token_losses_are_of_answers,
    head.noise_is_on_given_answers,
    layout.dropped_tokens_have_a_limit,
    preference.preferences_are_for_rlhf,
    preference.preference_settings_belong_to_the_loss,
    preference.the_loss_type_is_known,
    preference.preference_numbers_are_in_range,
    preference.a_reference_that_follows_is_in_memory,
    teacher.there_is_one_teacher,
    teacher.distillation_has_a_teacher,
    teacher.each_of_several_teachers_has_rows,
    teacher.a_teacher_has_a_say_in_every_token,
    rollout.completions_are_for_grpo_and_gkd,
    reward.rewards_are_named,
    reward.rewards_are_compared,
    reward.held_back_prompts_are_rewarded,
    reward.reward_numbers_are_in_range,
    environment.environments_are_named,
    rollout.turns_have_a_scheduler,
    policy.policy_settings_belong_to_the_loss,
    rollout.rollout_numbers_are_in_range,
    policy.policy_numbers_are_in_range,
    policy.advantages_have_one_scale,
    rollout.what_rollouts_do_not_reach,
    rollout.what_distilled_completions_do_not_reach,
    vllm.vllm_is_for_completions,
    vllm.vllm_is_asked_for,
    vllm.vllm_numbers_are_in_range,
)

RULES: tuple[Rule, ...] = (
    layout.axes_are_positive,
    context.spread_attention_has_what_the_model_needs,
    context.attention_kernels_of_gpus_take_the_heads,
    layout.expert_axes_need_experts,
    layout.expert_settings_need_experts,
    layout.tp_divides_the_feed_forward_part,
    layout.tp_shares_out_the_heads,
    layout.linear_attention_is_cut_by_heads,
    context.the_heads_allow_the_way_across_ranks,
    layout.pipeline_divides_the_layers,
    layout.layers_that_hand_on_stay_together,
    layout.experts_divide,
    layout.world_holds_whole_copies,
    layout.world_holds_whole_copies_of_experts,
    layout.sequence_parallel_follows_tp,
    layout.interleaved_stages_send_one_by_one,
    layout.overlap_needs_the_distributed_optimizer,
    layout.timeouts_are_in_order,
    training.dtype_fits_the_platform,
    training.fused_kernels_need_a_gpu,
    precision.fp8_settings_belong_together,
    precision.fp8_weights_are_gathered_from_shards,
    precision.fp8_products_have_whole_blocks,
    training.batches_divide,
    training.interleaved_stages_need_full_rounds,
    training.the_run_has_one_end,
    training.recomputation_is_complete,
    training.the_learning_rate_has_a_default,
    training.the_schedule_is_complete,
    training.host_memory_holds_adamw_shards,
    training.subspaces_are_of_whole_matrices,
    muon.muon_steps_whole_matrices,
    vllm.engines_share_out_the_ranks,
    vllm.samples_fit_the_engine,
    vllm.vllm_can_hold_the_adapter,
    training.lengths_fit_the_model,
    training.packs_are_free_of_padding,
    training.text_is_split_for_pre_training_only,
    tuner.adapters_need_lora,
    tuner.as_many_layers_are_drawn_as_there_are,
    report.reports_have_a_place_and_a_time,
    training.what_is_saved_in_the_background_is_there,
    training.a_run_without_optimizer_state_does_not_resume,
    training.router_losses_have_a_kind,
    weights.adapters_name_a_base_without_these_weights,
    weights.layers_that_go_through_are_in_the_folder,
    preference.preference_settings_have_defaults,
    preference.the_reference_is_not_the_adapted_model,
    teacher.the_answers_of_distillation_have_authors,
    teacher.served_teachers_have_a_temperature_of_their_own,
    head.rows_are_whole_documents,
    head.parts_of_embeddings_exist,
    rollout.replayed_experts_are_known,
    rollout.groups_are_whole,
    rollout.generations_are_whole_steps,
    rollout.completions_may_be_of_another_policy,
    rollout.completions_have_room,
    policy.policy_settings_have_defaults,
    reward.reward_settings_have_defaults,
)


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """A run whose settings agree with each other, the model and the world, and its layout.

    Settings whose default depends on the model, the platform or the world are filled. What is left to Megatron-Core or
    to the length of the data stays None: gradient_accumulation_fusion on a GPU, lr_decay_iters, train_iters or
    num_train_epochs (one of them).
    """

    config: RunConfig
    layout: Layout
    notes: tuple[str, ...] = ()  # what was decided for the user; rank 0 logs them


def check_request(run: RunConfig) -> None:
    """Check what needs neither the model nor the ranks; raises ConfigError."""
    for rule in REQUEST_RULES:
        rule(run)


def resolve(run: RunConfig, meta: ModelMeta, world_size: int, platform_name: str) -> ResolvedRun:
    """Return `run` with its defaults filled, and its layout; raises ConfigError for the first broken rule.

    `platform_name` is "cuda" or "cpu". The result is the same on every rank.
    """
    check_request(run)
    case = Case(run=run, meta=meta, world=world_size, platform=platform_name)
    for rule in RULES:
        case = rule(case) or case
    return ResolvedRun(config=case.run, layout=case.layout, notes=case.notes)


def minimal_world(run: RunConfig) -> int:
    """Return the fewest ranks that hold one copy of the model and of its experts."""
    parallel = run.parallel
    return parallel.pp * lcm(parallel.tp * parallel.cp, parallel.ep * (parallel.etp or 1))
