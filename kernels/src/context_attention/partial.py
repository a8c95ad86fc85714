"""What is carried from step to step of spread attention.

Letters: T local queries, N keys at hand, H query heads, G key/value heads, K head size, L head size of
values, M the larger of both, F features of a key and its value.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Queries of this rank and the keys and values at hand; one head size for all three."""

    query_THK: torch.Tensor
    key_NGK: torch.Tensor
    value_NGK: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Partial:
    """Attention over the keys seen so far, changed in place."""

    out_THK: torch.Tensor  # float32
    lse_TH: torch.Tensor  # float32, natural; -inf before the first key

    @staticmethod
    def empty(query_THK: torch.Tensor) -> "Partial":
        """Return attention over no key."""
        out_THK = torch.zeros(query_THK.shape, dtype=torch.float32, device=query_THK.device)
        return Partial(out_THK=out_THK, lse_TH=torch.full_like(out_THK[..., 0], float("-inf")))


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Sums of gradients, float32, changed in place."""

    query_THK: torch.Tensor
    key_NGK: torch.Tensor
    value_NGK: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class HeadSizes:
    """How keys and values lie in one row of F features, and what the kernels make of them: heads of one size."""

    groups: int
    key: int
    value: int

    def pad(self, x_THK: torch.Tensor) -> torch.Tensor:
        """Return x with zeros up to the larger head size: they change no score and no output."""
        return F.pad(x_THK, (0, max(self.key, self.value) - x_THK.shape[-1]))

    def split(self, row_NF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys [N, G, K] and values [N, G, L]."""
        key_NF, value_NF = row_NF.split([self.groups * self.key, self.groups * self.value], dim=1)
        return key_NF.unflatten(1, (self.groups, self.key)), value_NF.unflatten(1, (self.groups, self.value))

    def join(self, grads: Gradients) -> torch.Tensor:
        """Return the gradients of keys and values as rows [N, F]."""
        return torch.cat(
            [grads.key_NGK[..., : self.key].flatten(1), grads.value_NGK[..., : self.value].flatten(1)], dim=1
        )

    def inputs(self, query_THM: torch.Tensor, row_NF: torch.Tensor) -> Inputs:
        """Return padded queries, keys and values."""
        key_NGK, value_NGL = self.split(row_NF)
        return Inputs(query_THK=query_THM, key_NGK=self.pad(key_NGK), value_NGK=self.pad(value_NGL))

    def gradients(self, grad_query_THM: torch.Tensor, inputs: Inputs) -> Gradients:
        """Return zeros for keys and values beside the sum for queries."""
        zeros = (
            torch.zeros(x.shape, dtype=torch.float32, device=x.device)
            for x in (inputs.key_NGK, inputs.value_NGK)
        )
        key_NGM, value_NGM = zeros
        return Gradients(query_THK=grad_query_THM, key_NGK=key_NGM, value_NGK=value_NGM)
