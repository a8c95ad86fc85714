"""What GRPO and its kin make of the ratio of a token, r = pi/pi_old, and the advantage A of its completion.

Pure functions of float64 tensors, each named by its paper. Letters: N completions, T their tokens end to end.
"""

import torch

from megaswift.config.policy import PolicyConfig
from megaswift.config.rollout import RolloutConfig

# What weights of tokens of worse completions that the model has come to prefer are held to: the constants of ms-swift 4.6
# and of a public recipe for verl (compute_policy_loss_future_kl).
SAFE_LEAST, SAFE_MOST = 0.8, 1.0


def log_ratios(
    logps_T: torch.Tensor, old_T: torch.Tensor, lengths_N: torch.Tensor, level: str
) -> torch.Tensor:
    """Return log r [T] of tokens, or of their completions.

    sequence: log s = mean of log r over the completion, GSPO (Zheng et al. 2025, arXiv 2507.18071), eq. 7. sequence_token: the
    same number, with the gradient of log pi of the token, as GSPO-token in the same paper.
    """
    log_ratio_T = logps_T - old_T
    if level == "token":
        return log_ratio_T
    means_T = means_of(log_ratio_T, lengths_N).repeat_interleave(lengths_N)
    return means_T if level == "sequence" else means_T.detach() + logps_T - logps_T.detach()


def clipped_losses(
    ratio_T: torch.Tensor, advantages_T: torch.Tensor, rollout: RolloutConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return -min(r A, clip(r, 1-e, 1+e_high) A), PPO's objective as in GRPO (arXiv 2402.03300, eq. 3), and what was clipped.

    With --delta r A is min(r, delta) A, as it has no bound where A < 0 (INTELLECT-2, arXiv 2505.07291, two-sided clipping).
    """
    assert rollout.epsilon_high is not None, "resolved"
    least, most = 1 - rollout.epsilon, 1 + rollout.epsilon_high
    bounded_T = ratio_T if rollout.delta is None else ratio_T.clamp(max=rollout.delta)
    losses_T = -torch.minimum(bounded_T * advantages_T, ratio_T.clamp(least, most) * advantages_T)
    low_T, high_T = (ratio_T < least) & (advantages_T < 0), (ratio_T > most) & (advantages_T > 0)
    return losses_T, {"clip_ratio/low_mean": low_T.double(), "clip_ratio/high_mean": high_T.double()}


def weighted_losses(
    ratio_T: torch.Tensor, advantages_T: torch.Tensor, logps_T: torch.Tensor, *, most: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return CISPO's -sg(min(r, most)) A log pi, where every token keeps a gradient, and which weights were held.

    MiniMax 2025, MiniMax-M1 (arXiv 2506.13585); without a lower bound, as there. `most` is their 1 + e_high.
    """
    weights_T = ratio_T.detach().clamp(max=most)
    held_T = (ratio_T > most) & (advantages_T > 0)
    return -weights_T * advantages_T * logps_T, {"cispo_clip_ratio": held_T.double()}


def gated_losses(ratio_T: torch.Tensor, advantages_T: torch.Tensor, policy: PolicyConfig) -> torch.Tensor:
    """Return SAPO's -(4/tau) sigmoid(tau (r - 1)) A, tau by the sign of A: Gao et al. 2025 (arXiv 2511.20347)."""
    tau_T = torch.full_like(advantages_T, policy.tau_neg).masked_fill(advantages_T > 0, policy.tau_pos)
    return -(4 / tau_T) * torch.sigmoid(tau_T * (ratio_T - 1)) * advantages_T


def future_weights(
    log_ratio_T: torch.Tensor,
    ratio_T: torch.Tensor,
    advantages_T: torch.Tensor,
    lengths_N: torch.Tensor,
    policy: PolicyConfig,
    *,
    delta: float | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return FIPO's weight of each token [T], without gradient: how far the model has moved towards what follows it; and its log.

    exp(F_t), F_t = sum over k >= t of 2^(-(k-t)/rate) log r_k, held to 1 and clip_range more: Ma et al. 2026 (arXiv 2603.19835).
    Tokens of a ratio above `delta` are left out of the sum. Tokens of worse completions with a ratio above the safety threshold
    have SAFE_LEAST to SAFE_MOST. As in ms-swift 4.6; that recipe also drops completions with several tokens above delta.
    Tokens are counted as the model wrote them: what others say between its turns is no distance.
    """
    ratio_T, moved_T = ratio_T.detach(), log_ratio_T.detach()
    if delta is not None:
        moved_T = moved_T.masked_fill(ratio_T > delta, 0.0)
    future_T = discounted_sums(moved_T, lengths_N, 2 ** (-1 / policy.fipo_decay_rate))
    weights_T, spread = future_T.exp(), policy.fipo_clip_range
    if spread:
        weights_T = weights_T.clamp(1.0 if policy.fipo_clip_high_only else 1 - spread, 1 + spread)
    is_risky_T = torch.zeros_like(ratio_T, dtype=torch.bool)
    if policy.fipo_safety_threshold is not None:
        is_risky_T = (advantages_T < 0) & (ratio_T > policy.fipo_safety_threshold)
    weights_T = torch.where(is_risky_T, weights_T.clamp(SAFE_LEAST, SAFE_MOST), weights_T)
    return weights_T, {
        "fipo/future_kl_mean": future_T,
        "fipo/influence_weight_mean": weights_T,
        "fipo/safety_keep_ratio": 1 - is_risky_T.double(),
    }


def discounted_sums(values_T: torch.Tensor, lengths_N: torch.Tensor, discount: float) -> torch.Tensor:
    """Return the sum over k >= t of discount^(k-t) values_k within each completion [T].

    A sum over 2s tokens is one over s and, s further, another: as many steps as the longest completion has binary digits.
    """
    ends_T = lengths_N.cumsum(0).repeat_interleave(lengths_N)
    left_T = ends_T - torch.arange(len(values_T), device=values_T.device)  # tokens from here to the end
    reach, longest = 1, max(lengths_N.tolist(), default=0)
    while reach < longest:
        further_T = values_T.roll(-reach).where(left_T > reach, 0.0)
        values_T, reach = values_T + discount**reach * further_T, 2 * reach
    return values_T


def means_of(values_T: torch.Tensor, lengths_N: torch.Tensor) -> torch.Tensor:
    """Return the mean over each completion [N], 0 where it has no tokens."""
    return sums_of(values_T, lengths_N) / lengths_N.clamp(min=1)


def sums_of(values_T: torch.Tensor, lengths_N: torch.Tensor) -> torch.Tensor:
    """Return the sum over each completion [N]; piece by piece, so that a GPU adds in a fixed order."""
    pieces = values_T.split(lengths_N.tolist())
    return (
        torch.stack([piece.sum() for piece in pieces]) if pieces else values_T
    )  # nothing, which is differentiable
