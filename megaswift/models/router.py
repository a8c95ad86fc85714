"""A router for the choices of experts that Megatron's does not make.

Letters: T tokens, E experts, N groups of experts, K experts of a token.
"""

from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import (
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megaswift.mcore.specs import submodules_of
from megaswift.metadata.meta import MoEMeta
from megaswift.models.norm import RMSNorm, shared_parameter


def place_router(layer: ModuleSpec, moe: MoEMeta) -> None:
    """Give the spec of a layer with experts the router that its model needs."""
    if not megatron_routes(moe):
        submodules_of(layer.submodules.mlp).router = partial(Router, moe=moe)


def megatron_routes(moe: MoEMeta) -> bool:
    """Whether Megatron's own router makes the choice (moe_utils.py, 0.16.1, topk_routing_with_score_function).

    It has a bias for sigmoid scores alone, normalises them unless one expert is chosen, and scores a group of experts
    by its best topk / topk_groups.
    """
    if moe.router_norm or moe.expert_scale:
        return False
    if moe.score_function == "softmax":
        chooses = not moe.router_bias and not (moe.norm_topk_prob and (moe.topk == 1 or moe.num_groups))
    else:
        chooses = moe.norm_topk_prob == (moe.topk > 1)
    if moe.topk_groups is None:
        return chooses
    return chooses and moe.topk // moe.topk_groups == _best_of_group(moe)


class Router(TopKRouter):
    """Megatron's router with the model's own input and choice of experts; its balancing losses are Megatron's."""

    def __init__(self, config: TransformerConfig, *args: Any, moe: MoEMeta, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.moe = moe
        self.norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon) if moe.router_norm else None
        self.expert_scale = None
        if moe.expert_scale:
            ones_E = torch.ones(moe.num_experts, dtype=config.params_dtype)
            self.expert_scale = shared_parameter(ones_E, config)
        if moe.router_bias:
            del self.expert_bias  # the attribute that stands for "no bias"
            bias_E = torch.zeros(moe.num_experts, dtype=torch.float32, device=torch.cuda.current_device())
            self.register_buffer("expert_bias", bias_E)

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Return the logits [S, B, E] of what the layer gives to its router [S, B, D]."""
        if self.norm is not None:
            input = (
                self.norm(input) * input.shape[-1] ** -0.5
            )  # Gemma 4 (transformers 5.23, modeling_gemma4.py)
        return super().gating(input)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights and choice, both [T, E], of logits [S, B, E]."""
        seq_len, batch_size = logits.shape[:2]
        logits_TE = logits.flatten(0, 1)
        mask_T = None if padding_mask is None else padding_mask.flatten()
        logits_TE = self.apply_z_loss(logits_TE, padding_mask=mask_T)
        weights_TE, chosen_TE = choose_experts(
            logits_TE, self.moe, bias_E=self.expert_bias, replay=self.router_replay
        )
        if self.expert_scale is not None:
            weights_TE = weights_TE * self.expert_scale.to(weights_TE)
        if self.config.moe_expert_capacity_factor is not None:
            weights_TE, chosen_TE = apply_router_token_dropping(
                weights_TE,
                chosen_TE,
                router_topk=self.topk,
                capacity_factor=self.config.moe_expert_capacity_factor,
                drop_policy=self.config.moe_token_drop_policy,
                pad_to_capacity=self.config.moe_pad_expert_input_to_capacity,
            )
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            balanced_TE, scores_TE = compute_routing_scores_for_aux_loss(
                logits_TE, self.topk, self.score_function, padding_mask=mask_T
            )
            masked = {"with_padding_mask": mask_T is not None}
            weights_TE = self._apply_aux_loss(weights_TE, scores_TE, balanced_TE, **masked)
            weights_TE = self._apply_seq_aux_loss(
                weights_TE, scores_TE, balanced_TE, seq_len, batch_size, **masked
            )
            weights_TE = self._apply_global_aux_loss(weights_TE, scores_TE, balanced_TE, **masked)
        return weights_TE, chosen_TE


def choose_experts(
    logits_TE: torch.Tensor, moe: MoEMeta, *, bias_E: torch.Tensor | None, replay: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights of the chosen experts [T, E], zero elsewhere, and which are chosen [T, E].

    The bias has a say in the choice alone (DeepSeek-V3, 2412.19437, eq. 16; ERNIE 4.5: the same for softmax). A
    `replay` (models/replay.py) may know the experts already.
    """
    scores_TE = logits_TE.float()
    scores_TE = scores_TE.sigmoid() if moe.score_function == "sigmoid" else scores_TE.softmax(dim=-1)
    wanted_TE = scores_TE if bias_E is None else scores_TE + bias_E
    best = partial(_best_experts, moe=moe)
    choose = best if replay is None else partial(replay.get_replay_topk, default_compute_topk=best)
    chosen = choose(wanted_TE, moe.topk, moe.num_groups, moe.topk_groups)[1]
    weights = scores_TE.gather(1, chosen)
    if moe.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    weights = (weights * moe.routed_scaling_factor).type_as(logits_TE)
    nothing_TE = torch.zeros_like(logits_TE)
    return nothing_TE.scatter(1, chosen, weights), nothing_TE.bool().scatter(1, chosen, True)


def _best_experts(
    scores_TE: torch.Tensor, topk: int, num_groups: int | None, topk_groups: int | None, *, moe: MoEMeta
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's best scores and experts, both [T, K]; the signature is that of Megatron's function for it."""
    if num_groups is not None:
        scores_TE = _in_best_groups(scores_TE, moe)
    return scores_TE.topk(topk, dim=-1)


def _in_best_groups(scores_TE: torch.Tensor, moe: MoEMeta) -> torch.Tensor:
    """Return the scores with minus infinity outside each token's best groups (DeepSeek-V2, 2405.04434, 2.2.2)."""
    assert moe.num_groups is not None and moe.topk_groups is not None, "groups come with how many are chosen"
    grouped = scores_TE.unflatten(1, (moe.num_groups, -1))  # [T, N, E/N]
    group_scores = grouped.topk(_best_of_group(moe), dim=-1).values.sum(dim=-1)
    best = group_scores.topk(moe.topk_groups, dim=-1).indices
    is_best = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, best, True)
    return grouped.masked_fill(~is_best[:, :, None], float("-inf")).flatten(1)


def _best_of_group(moe: MoEMeta) -> int:
    """Return how many of a group's experts make its score."""
    return {"top2": 2, "max": 1}[moe.group_score]
