"""Group relative policy optimisation and its kin: each prompt is answered G times, and better answers than the others' gain.

With A the advantage of a completion o (tasks/advantages.py) and r_t = pi(o_t|..)/pi_old(o_t|..) the ratio of a token, or of the
completion with GSPO, the loss of a token is one of tasks/policy_terms.py, and besides:
reference      + beta * k3_t, k3 = pi_ref/pi - log(pi_ref/pi) - 1, the unbiased estimate of KL(pi || pi_ref): Shao et al. 2024
               (arXiv 2402.03300), eq. 3 and 4
mask           the policy loss of a completion is 0 where A < 0 and mean_t log(pi_drawn/pi) > --off_policy_sequence_mask_delta:
               DeepSeek-AI 2025, DeepSeek-V3.2 (arXiv 2512.02556), off-policy sequence masking; pi_drawn is q of the sampler, or
               else pi_old. The divergence from the reference stays, as in TRL 1.16 and unlike ms-swift 4.6
entropy        the policy loss of a token is 0 unless its entropy is among the highest --top_entropy_quantile of the global batch:
               Wang et al. 2025 (arXiv 2506.01939); a micro batch, in which ms-swift looks, is a matter of the layout here
--loss_type    how token losses become one: grpo and sapo, the mean over each completion, then over completions (Shao et al., eq.
               3); dapo, bnpo, cispo and fipo, the mean over the tokens of the global batch (Yu et al. 2025, DAPO, arXiv 2503.14476,
               eq. 8, as is e_high apart; a micro batch, by which TRL's bnpo divides, is a matter of the layout here); dr_grpo, the
               sum over completions / (completions * max_completion_length) (Liu et al. 2025, Dr. GRPO, 2503.20783, section 3); real
               has no token losses but those of the reference, as grpo: tasks/labels.py
teacher        A of a token is that of its completion, 0 without rewards, + --teacher_kl_coef * log(pi_teacher/pi_old): ms-swift 4.6
               (rl_core/advantage.py). Without rewards the gradient is, in the mean over what the model may write next, that of
               KL(pi || pi_teacher) of the next token
sampler        Where another engine drew the completions, with probability q, token losses that compare with pi_old are weighted by
               w = pi_old/q, held to a threshold C: min(w, C) (truncated importance sampling: Yao et al. 2025, "Your efficient RL
               framework secretly brings you off-policy RL training"), or w where w <= C and 0 elsewhere. For a sequence w is the
               geometric mean over its tokens, as in GSPO and in ms-swift 4.6.

Letters: B batch, S sequence, C rows of values, N completions of a micro batch, T their tokens end to end.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from megaswift.config.policy import PolicyConfig
from megaswift.config.preference import PreferenceConfig
from megaswift.config.rollout import RolloutConfig
from megaswift.config.vllm import SamplerConfig
from megaswift.data.batches import MicroBatch
from megaswift.metadata.meta import ModelMeta
from megaswift.tasks.answers import Outcome, document_sums, whole_rows
from megaswift.tasks.entropy import entropies_of, quantile_of_all_ranks
from megaswift.tasks.labels import Peers, label_losses, peers_of_batches
from megaswift.tasks.policy_terms import (
    clipped_losses,
    future_weights,
    gated_losses,
    log_ratios,
    means_of,
    sums_of,
    weighted_losses,
)
from megaswift.tasks.preference import rows_loss
from megaswift.tasks.task import Loss, RunModel, run_model

METRICS = (
    "kl",
    "teacher_kl",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "cispo_clip_ratio",
    "fipo/future_kl_mean",
    "fipo/influence_weight_mean",
    "fipo/safety_keep_ratio",
    "off_policy/masked",
    "entropy/mean",
    "entropy/max",
    "entropy/threshold",
    "sampling/kl",
    "sampling/sampling_logp_difference/mean",
    "sampling/importance_sampling_ratio/mean",
    "sampling/importance_sampling_ratio/max",
)
# Nats by which a token may be below the quantile: the first tokens of a group's completions are equally unsure but for rounding.
ROUNDING = 1e-4
BY_TOKENS = ("dapo", "bnpo", "cispo", "fipo")  # losses that are divided by tokens, not by completions


@dataclass(frozen=True, kw_only=True)
class Completions:
    """What the loss is computed from; float64 but for the lengths."""

    logps_T: torch.Tensor  # log pi of every token, the only one that carries gradients
    lengths_N: torch.Tensor  # int64, tokens of each completion
    advantages_N: torch.Tensor
    old_T: torch.Tensor | None = None  # log pi_old; None: pi is what it was when it generated
    references_T: torch.Tensor | None = None  # log pi_ref
    sampler_T: torch.Tensor | None = None  # log q; None: pi itself drew them
    teacher_T: torch.Tensor | None = None  # log pi_teacher
    entropies_T: torch.Tensor | None = None  # of pi
    peers: Peers | None = None  # of REAL


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """What is found of a micro batch before the step."""

    entropies_BS: torch.Tensor | None = None
    peers: Peers | None = None


class Grpo:
    """The task of `megaswift rlhf --rlhf_type grpo`; the completions come with the batches (training/rollout_feed.py)."""

    metrics: Sequence[str] = METRICS

    def __init__(
        self,
        settings: PreferenceConfig,
        rollout: RolloutConfig,
        sampler: SamplerConfig,
        policy: PolicyConfig,
        *,
        run: RunModel = run_model,
    ) -> None:
        self._settings, self._rollout, self._sampler, self._run = settings, rollout, sampler, run
        self._policy = policy
        self._least_entropy = 0.0

    def prepare(self, batches: list[MicroBatch], chunks: Sequence[Any]) -> list[MicroBatch]:
        """Return the batches with the entropies of completions, and the peers, where the loss or the log needs them."""
        chosen, empty = self._rollout, [None] * len(batches)
        entropies: Sequence[torch.Tensor | None] = empty
        peers: Sequence[Peers | None] = empty
        if chosen.top_entropy_quantile < 1 or chosen.log_entropy:
            found = entropies_of(batches, chunks, run=self._run)
            if found and chosen.top_entropy_quantile < 1:
                self._least_entropy = quantile_of_all_ranks(batches, found, 1 - chosen.top_entropy_quantile)
            entropies = found or empty
        if self._settings.loss_type == "real":
            tau, group = self._policy.real_tau, chosen.num_generations
            peers = peers_of_batches(batches, chunks, temperature=tau, group=group, run=self._run) or empty
        return [
            replace(batch, prepared=_Prepared(entropies_BS=values, peers=others))
            for batch, values, others in zip(batches, entropies, peers, strict=True)
        ]

    def forward_step(self, data_iterator: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Any]:
        """Run one micro batch of prompts with their completions."""
        batch = next(data_iterator)
        return self._run(batch, model), partial(self._loss, batch)

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Return the means as they are."""
        return means

    def _loss(self, batch: MicroBatch, losses_BS: torch.Tensor) -> Loss:
        completions = completions_of(batch, losses_BS)
        outcome = grpo_loss(
            completions,
            self._settings,
            self._rollout,
            self._sampler,
            self._policy,
            least_entropy=self._least_entropy,
        )
        tokens = completions.lengths_N.sum()
        return rows_loss(
            outcome, loss_tokens=tokens.double(), by_tokens=self._settings.loss_type in BY_TOKENS
        )


def completions_of(batch: MicroBatch, losses_BS: torch.Tensor) -> Completions:
    """Return the completions of a micro batch, given each token's cross-entropy on the last pipeline stage.

    Every cp rank calls it alike and gets whole completions, of which its own tokens carry gradients.
    """
    device = losses_BS.device
    chosen_BS = (batch.loss_mask != 0).to(device, non_blocking=True)
    prepared = batch.prepared if isinstance(batch.prepared, _Prepared) else _Prepared()
    given = {
        "old_T": batch.old_logps,
        "references_T": batch.reference_logps,
        "sampler_T": batch.sampler_logps,
        "teacher_T": batch.teacher_logps,
        "entropies_T": prepared.entropies_BS,
    }
    found = {
        name: values_BS.to(device, non_blocking=True)
        for name, values_BS in given.items()
        if values_BS is not None
    }
    values_CS = torch.cat([chosen_BS, -losses_BS, *found.values()]).double()
    row_CS = whole_rows(values_CS, batch)
    logps_T, *others = row_CS[1:, row_CS[0] != 0]
    assert batch.targets is not None, "completions come with advantages"
    return Completions(
        logps_T=logps_T,
        lengths_N=document_sums(chosen_BS, batch).long(),
        advantages_N=batch.targets.to(device, torch.float64, non_blocking=True),
        peers=prepared.peers,
        **dict(zip(found, others, strict=True)),
    )


def grpo_loss(
    completions: Completions,
    settings: PreferenceConfig,
    rollout: RolloutConfig,
    sampler: SamplerConfig,
    policy: PolicyConfig,
    *,
    least_entropy: float = 0.0,
) -> Outcome:
    """Return the loss of every completion: to be summed, and divided by completions or by tokens (BY_TOKENS).

    Tokens of less than `least_entropy` have no policy loss.
    """
    logps_T, lengths_N, form = completions.logps_T, completions.lengths_N, settings.loss_type
    assert settings.beta is not None, "resolved"
    old_T = logps_T.detach() if completions.old_T is None else completions.old_T
    advantages_T, metrics = completions.advantages_N.repeat_interleave(lengths_N), {}
    if completions.teacher_T is not None:
        lead_T = completions.teacher_T - old_T
        advantages_T = advantages_T + settings.teacher_kl_coef * lead_T
        metrics["teacher_kl"] = k3(lead_T)
    losses_T, more = policy_losses(completions, old_T, advantages_T, form, rollout, policy)
    metrics |= more
    if rollout.off_policy_sequence_mask_delta is not None:
        is_left_N = left_behind(completions, old_T, most=rollout.off_policy_sequence_mask_delta)
        losses_T = losses_T.masked_fill(is_left_N.repeat_interleave(lengths_N), 0.0)
        metrics["off_policy/masked"] = is_left_N.double()
    if completions.entropies_T is not None:
        losses_T = losses_T.masked_fill(completions.entropies_T < least_entropy - ROUNDING, 0.0)
        metrics |= _uncertainty(completions, least_entropy, rollout)
    if completions.sampler_T is not None:
        log_weight_T = old_T - completions.sampler_T
        losses_T = losses_T * sampler_weights(log_weight_T, lengths_N, sampler)
        metrics |= _mismatch(log_weight_T)
    if completions.references_T is not None:
        divergence_T = k3(completions.references_T - logps_T)
        metrics["kl"] = divergence_T.detach()
        if not rollout.kl_in_reward:
            losses_T = losses_T + settings.beta * divergence_T
    losses_N = sums_of(losses_T, lengths_N)
    if form == "dr_grpo":
        losses_N = losses_N / rollout.max_completion_length
    elif form not in BY_TOKENS:
        losses_N = losses_N / lengths_N.clamp(min=1)
    if form == "real":
        assert completions.peers is not None, "found before the step"
        scores_N, group = means_of(logps_T - old_T, lengths_N), rollout.num_generations
        losses_N = losses_N + label_losses(
            scores_N, completions.peers, temperature=policy.real_tau, group=group
        )
    return Outcome(losses_R=losses_N, metrics=metrics)


def policy_losses(
    completions: Completions,
    old_T: torch.Tensor,
    advantages_T: torch.Tensor,
    form: str | None,
    rollout: RolloutConfig,
    policy: PolicyConfig,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return what each token adds to the loss for the sake of the rewards [T], and what is logged of it."""
    logps_T, lengths_N = completions.logps_T, completions.lengths_N
    if form == "real":
        return torch.zeros_like(logps_T), {}
    ratio_T = log_ratios(logps_T, old_T, lengths_N, rollout.importance_sampling_level).exp()
    if form == "cispo":
        assert rollout.epsilon_high is not None, "resolved"
        return weighted_losses(ratio_T, advantages_T, logps_T, most=rollout.epsilon_high)
    if form == "sapo":
        return gated_losses(ratio_T, advantages_T, policy), {}
    losses_T, metrics = clipped_losses(ratio_T, advantages_T, rollout)
    if form == "fipo":
        weights_T, more = future_weights(
            logps_T - old_T, ratio_T, advantages_T, lengths_N, policy, delta=rollout.delta
        )
        losses_T, metrics = losses_T * weights_T, metrics | more
    return losses_T, metrics


def left_behind(completions: Completions, old_T: torch.Tensor, *, most: float) -> torch.Tensor:
    """Return which completions are worse than others and no longer the model's own, bool [N]."""
    drawn_T = old_T if completions.sampler_T is None else completions.sampler_T
    lead_T, lengths_N = drawn_T - completions.logps_T.detach(), completions.lengths_N
    return (means_of(lead_T, lengths_N) > most) & (completions.advantages_N < 0)


def sampler_weights(
    log_weight_T: torch.Tensor, lengths_N: torch.Tensor, sampler: SamplerConfig
) -> torch.Tensor:
    """Return what the loss of each token is multiplied by, given log pi_old/q."""
    mode = sampler.rollout_importance_sampling_mode
    assert mode is not None, "resolved"
    level, _, limit = mode.partition("_")
    if level == "none":
        return torch.ones_like(log_weight_T)
    if level == "sequence":
        log_weight_T = means_of(log_weight_T, lengths_N).repeat_interleave(lengths_N)
    weight_T, most = log_weight_T.exp(), sampler.rollout_importance_sampling_threshold
    return weight_T.clamp(max=most) if limit == "truncate" else weight_T.where(weight_T <= most, 0.0)


def k3(log_ratio_T: torch.Tensor) -> torch.Tensor:
    """Return an unbiased estimate of KL(p || q) for tokens that p drew, which is never negative, given log q/p."""
    return log_ratio_T.exp() - log_ratio_T - 1


def _uncertainty(
    completions: Completions, least_entropy: float, rollout: RolloutConfig
) -> dict[str, torch.Tensor]:
    """Return what is logged of entropies, under ms-swift's names: of the means over completions, and the quantile."""
    assert completions.entropies_T is not None
    lengths_N = completions.lengths_N
    means_N = sums_of(completions.entropies_T, lengths_N)[lengths_N > 0] / lengths_N[lengths_N > 0]
    metrics = {"entropy/mean": means_N, "entropy/max": means_N} if rollout.log_entropy else {}
    if rollout.top_entropy_quantile < 1:
        metrics["entropy/threshold"] = torch.full_like(means_N, least_entropy)
    return metrics


def _mismatch(log_weight_T: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return how far the model is from the engine that drew: the KL divergence as in k3, and TRL's figures of tokens."""
    weight_T = log_weight_T.exp()
    return {
        "sampling/kl": k3(log_weight_T),
        "sampling/sampling_logp_difference/mean": log_weight_T.abs(),
        "sampling/importance_sampling_ratio/mean": weight_T,
        "sampling/importance_sampling_ratio/max": weight_T,
    }


def at_temperature(meta: ModelMeta, temperature: float) -> ModelMeta:
    """Return the facts of the model whose logits are divided by `temperature`: log-probabilities are then those of its samples.

    A soft cap is c * tanh(x / c) of logits x; divided by t it is (c/t) * tanh((x/t) / (c/t)).
    """
    logits, cap = meta.multipliers.logits, meta.multipliers.logits_softcap
    cooled = replace(
        meta.multipliers,
        logits=logits / temperature,
        logits_softcap=None if cap is None else cap / temperature,
    )
    return replace(meta, multipliers=cooled)
