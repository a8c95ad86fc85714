"""AdamW whose moments of a matrix live in a subspace of its gradient (GaLore, Zhao et al. 2024, arXiv 2403.03507, algorithm 2).

P holds the first R singular vectors of the gradient, on its shorter side or the one that `galore_proj_type` says, and is renewed
every `gap` steps; Adam runs on P^T G (or G P), and its step is mapped back and multiplied by `scale`. A rank projects its own
shard of a matrix, as tensor parallelism cuts it. With `galore_quantization` P is kept in four bits (Q-GaLore, Zhang et al. 2024,
arXiv 2407.08296, section 3.3).

Letters: M rows, N columns of a matrix, K the side that is projected, R the rank.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.optim.adamw import adamw

from megaswift.config.optimizer import OptimizerConfig
from megaswift.models.nf4 import BLOCK, require_bitsandbytes
from megaswift.training.adamw import AdamWForTheRest


@dataclass(kw_only=True)
class LowRank:
    """What is kept of one matrix."""

    projector: Any = None  # P [K, R], or (codes, state) of bitsandbytes
    moments: tuple[torch.Tensor, torch.Tensor] | None = None
    step: torch.Tensor = field(default_factory=lambda: torch.tensor(0.0))


class GaLoreAdamW(AdamWForTheRest):
    """Steps Megatron's parameter groups; of the weights in `matrices` those that it has are kept in a subspace.

    Raises ConfigError where projections are to be in four bits and bitsandbytes is not installed.
    """

    def __init__(
        self, groups: list[dict[str, Any]], matrices: Iterable[torch.Tensor], chosen: OptimizerConfig
    ) -> None:
        if chosen.galore_quantization:
            require_bitsandbytes("galore_quantization=true")
        super().__init__(groups, matrices)
        self.chosen = chosen
        self.low_rank = {matrix: LowRank() for matrix in self.apart}

    def low_rank_states(self) -> list[dict[str, Any]]:
        """Return what is kept of every matrix, in the order of the parameters."""
        return [
            {"step": kept.step, "moments": kept.moments, "projector": self._as_tensors(kept.projector)}
            for kept in self.low_rank.values()
        ]

    def load_low_rank_states(self, states: list[dict[str, Any]]) -> None:
        """Take over what low_rank_states() returned."""
        for kept, state in zip(self.low_rank.values(), states, strict=True):
            kept.step, kept.moments = state["step"], state["moments"]
            kept.projector = self._from_tensors(state["projector"])

    def step_apart(self, pairs: list[tuple[dict[str, Any], torch.Tensor]]) -> None:
        """Step the projected matrices."""
        for group, matrix in pairs:
            assert matrix.grad is not None, "the base class chose those with one"
            self._step_low_rank(group, matrix, matrix.grad.float())

    def _step_low_rank(self, group: dict[str, Any], weight_MN: torch.Tensor, grad_MN: torch.Tensor) -> None:
        kept = self.low_rank[weight_MN]
        if int(kept.step) % self.chosen.galore_update_proj_gap == 0:
            kept.projector = self._packed(self._new_projector(group, grad_MN))
        p_KR = self._unpacked(kept.projector)
        from_left = is_projected_from_left(grad_MN.shape, self.chosen.galore_proj_type)
        low = p_KR.t() @ grad_MN if from_left else grad_MN @ p_KR
        if kept.moments is None:
            kept.moments = torch.zeros_like(low), torch.zeros_like(low)
        # AdamW of a weight of zeros is its step alone.
        delta = torch.zeros_like(low)
        adamw(
            [delta], [low], [kept.moments[0]], [kept.moments[1]], [], [kept.step],
            foreach=False, amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1],
            lr=group["lr"] * self.chosen.galore_scale, weight_decay=0.0, eps=group["eps"], maximize=False,
        )  # fmt: skip
        weight_MN.mul_(1 - group["lr"] * group["weight_decay"])
        weight_MN.add_(p_KR @ delta if from_left else delta @ p_KR.t())

    def _new_projector(self, group: dict[str, Any], grad_MN: torch.Tensor) -> torch.Tensor:
        """Return the first singular vectors; copies of a weight take those of one rank, whose last bits may differ."""
        u_MK, _, vt_KN = torch.linalg.svd(grad_MN, full_matrices=False)
        from_left = is_projected_from_left(grad_MN.shape, self.chosen.galore_proj_type)
        p_KR = (u_MK if from_left else vt_KN.t())[:, : self.chosen.galore_rank]
        # Singular vectors have no sign, and moments outlive a projector: the largest component is positive.
        p_KR = (p_KR * p_KR.gather(0, p_KR.abs().argmax(0, keepdim=True)).sign()).contiguous()
        copies = (
            parallel_state.get_expert_data_parallel_group()
            if group["is_expert_parallel"]
            else parallel_state.get_data_parallel_group(with_context_parallel=True)
        )
        dist.broadcast(p_KR, group=copies, group_src=0)
        return p_KR

    def _packed(self, p_KR: torch.Tensor) -> Any:
        if not self.chosen.galore_quantization:
            return p_KR
        from bitsandbytes.functional import quantize_4bit

        return quantize_4bit(p_KR, blocksize=BLOCK, quant_type="nf4")

    def _unpacked(self, projector: Any) -> torch.Tensor:
        if not self.chosen.galore_quantization:
            return torch.as_tensor(projector)
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(*projector)

    def _as_tensors(self, projector: Any) -> Any:
        if projector is None or not self.chosen.galore_quantization:
            return projector
        return projector[0], projector[1].as_dict(packed=True)

    def _from_tensors(self, stored: Any) -> Any:
        if stored is None or not self.chosen.galore_quantization:
            return stored
        from bitsandbytes.functional import QuantState

        codes, state = stored
        return codes, QuantState.from_dict(state, device=codes.device)


def is_projected_from_left(shape: Sequence[int], proj_type: str) -> bool:
    """Say whether the rows of a matrix are projected, else its columns (names: ms-swift 4.6, galore_projector.py)."""
    is_wide = shape[0] <= shape[1]
    return {"std": is_wide, "reverse_std": not is_wide, "left": True, "right": False}[proj_type]


def projected_matrices(chunks: Iterable[Any], *, rank: int) -> list[torch.Tensor]:
    """Return the linears' matrices of the decoders that have more than `rank` rows and columns, as the optimizer steps them."""
    found = []
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            is_linear = ".linear_" in name or "_proj." in name
            if (
                "decoder.layers." in name
                and is_linear
                and parameter.ndim == 2
                and min(parameter.shape) > rank
            ):
                found.append(getattr(parameter, "main_param", parameter))
    return found
