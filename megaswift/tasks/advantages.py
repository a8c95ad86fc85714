"""Advantages of completions: how much better each is than what it is compared with.

With r the reward of a completion, or what --reward_weights make of several, "mean" and "std" over the G completions of its prompt:
grpo         (r - mean) / std             Shao et al. 2024 (arXiv 2402.03300), section 4.1.2; --scale_rewards none, without the
             division: Liu et al. 2025, Dr. GRPO (2503.20783); batch: by the std of all rewards, as in TRL and ms-swift
rloo         r - mean of the others       Ahmadian et al. 2024 (arXiv 2402.14740)
reinforce_plus_plus   a = r - mean, then (a - mean of all a) / std of all a; the mean of all a is 0. Hu et al. 2025, REINFORCE++
             (arXiv 2501.03262), the variant with a baseline, as ms-swift 4.6 has it
gdpo         each reward function f by itself, a_f = (r_f - mean) / std, then s = sum of w_f a_f, then (s - mean of all s) / std
             of all s. Liu et al. 2026, GDPO (arXiv 2601.05242); as "normalize_then_sum" in TRL 1.16
kl_in_reward is taken from r before: beta log(pi_old/pi_ref), summed over the completion (Ahmadian et al., section 3.1).

Letters: P prompts, G completions of a prompt, F reward functions.
"""

from collections.abc import Sequence

import torch

from megaswift.config.rollout import RolloutConfig

TINY = 1e-4  # beside a standard deviation, as in TRL 1.16


def advantages(rewards_PG: torch.Tensor, rollout: RolloutConfig) -> torch.Tensor:
    """Return the advantage of every completion over its group [P, G], float64."""
    size = rewards_PG.shape[1]
    found_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    # What batch scales by; a group's own mean changes none of its deviations.
    spread_PG = found_PG if rollout.advantage_estimator == "reinforce_plus_plus" else rewards_PG
    if rollout.advantage_estimator == "rloo":
        found_PG = found_PG * (size / (size - 1))  # a mean without the completion itself
    if rollout.scale_rewards == "group":
        return found_PG / (rewards_PG.std(1, keepdim=True) + TINY)
    return found_PG / (spread_PG.std() + TINY) if rollout.scale_rewards == "batch" else found_PG


def decoupled_advantages(rewards_PGF: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Return the advantages of GDPO [P, G], float64: every reward function is scaled before they are added up."""
    centred_PGF = rewards_PGF - rewards_PGF.mean(1, keepdim=True)
    scaled_PGF = centred_PGF / (rewards_PGF.std(1, keepdim=True) + TINY)
    sums_PG = scaled_PGF @ torch.tensor(weights, dtype=scaled_PGF.dtype)
    return (sums_PG - sums_PG.mean()) / (sums_PG.std() + TINY)
