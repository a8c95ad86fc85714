"""Routing replay: routers take the experts that were chosen for a token before, and weigh them as they see them now.

Zheng et al. 2025 (arXiv 2512.01374) and Ma et al. 2025 (arXiv 2510.11370): the choice is fixed, the weights of the chosen follow from
the current logits and carry gradients. Megatron has a replay of its own (router_replay.py, 0.16.1), with one list of all routers of a
process, that must be told whether a pass is a first or a recomputed one; the place where a router asks it is used here.

Letters: B batch, S sequence of this cp rank, T tokens of this rank, E experts, L layers with experts, K experts of a token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.parallel_state import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from megatron.core.transformer.moe.router import TopKRouter

# As in Megatron: (scores [T, E], K, groups, groups of a token) -> scores [T, K] and experts [T, K]
Choose = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class Replay:
    """What the routers of one model chunk do beside choosing. Layers are numbered among those of the whole model that have experts."""

    def __init__(self, routers: dict[int, TopKRouter]) -> None:
        self.given_TLK: torch.Tensor | None = None  # of all layers of the model; None: routers choose
        self.seen: dict[int, list[torch.Tensor]] | None = None  # by layer, int16 [T, K] of each pass
        self._layers = tuple(routers)
        for layer, router in routers.items():
            router.router_replay = _LayerReplay(self, layer)

    def begin(
        self, experts_BSLK: torch.Tensor | None, device: torch.device, *, sequence_parallel: bool
    ) -> None:
        """Replay these experts from now on; None: let the routers choose."""
        self.given_TLK = None
        if experts_BSLK is not None:
            given_TLK = tokens_of_rank(experts_BSLK, sequence_parallel=sequence_parallel)
            self.given_TLK = given_TLK.to(device, non_blocking=True)

    def remember(self, output: torch.Tensor) -> None:
        """Replay the same experts again when the backward pass of `output` begins, as it may recompute what led there.

        Other micro batches pass forward in between (1F1B); the hook runs before anything else of the backward pass does.
        """
        given_TLK = self.given_TLK
        if given_TLK is not None and output.requires_grad:
            output.register_hook(lambda grad: setattr(self, "given_TLK", given_TLK))

    @contextmanager
    def recording(self) -> Iterator[dict[int, list[torch.Tensor]]]:
        """Yield what is filled as long as the context lasts: by layer, the experts that each pass chooses, int16 [T, K]."""
        self.seen = {layer: [] for layer in self._layers}
        try:
            yield self.seen
        finally:
            self.seen = None


class _LayerReplay:
    """What Megatron's router, and that of models/router.py, asks for experts."""

    def __init__(self, replay: Replay, layer: int) -> None:
        self._replay, self._layer = replay, layer

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Choose,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scores of the experts, and the experts, both [T, K], given all scores [T, E]; moe_utils.py calls it (0.16.1)."""
        given_TLK, seen = self._replay.given_TLK, self._replay.seen
        if given_TLK is not None:
            chosen_TK = given_TLK[:, self._layer].long()
            return scores.gather(1, chosen_TK), chosen_TK
        scores_TK, chosen_TK = default_compute_topk(scores, topk, num_groups, group_topk)
        if seen is not None:
            seen[self._layer].append(chosen_TK.to(torch.int16))
        return scores_TK, chosen_TK


def tokens_of_rank(values: torch.Tensor, *, sequence_parallel: bool) -> torch.Tensor:
    """Return what the layers of this tp rank see of values [B, S, ...]: [T, ...], T = B * S, or B * S/tp with sequence parallelism."""
    values = values.transpose(0, 1)
    if sequence_parallel:
        values = values.chunk(get_tensor_model_parallel_world_size())[get_tensor_model_parallel_rank()]
    return values.flatten(0, 1)


def place_replay(
    layers: Sequence[torch.nn.Module], numbers: Sequence[int], layer_is_moe: Sequence[bool]
) -> Replay:
    """Return the replay of decoder layers that have these numbers in the whole model."""
    return Replay(
        {
            sum(layer_is_moe[:number]): layer.mlp.router
            for layer, number in zip(layers, numbers, strict=True)
            if layer_is_moe[number]
        }
    )
