"""Adapters of linears that hold the norm before them, as Transformer Engine's do."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megaswift.models.lora import _adapt

NORMS = [("RMSNorm", False), ("RMSNorm", True), ("LayerNorm", False)]


class OneRank:
    """A group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


class TELayerNormColumnParallelLinear(torch.nn.Module):
    """What an adapter sees of Megatron's wrapper: the norm, the weight, and a group that only the wrapper knows."""

    def __init__(self, normalization: str, zero_centered: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.normalization, self.zero_centered_gamma, self.eps = normalization, zero_centered, 1e-5
        self.layer_norm_weight = torch.nn.Parameter(torch.rand(6, generator=generator))
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.rand(6, generator=generator))
        self.weight = torch.nn.Parameter(torch.randn(5, 6, generator=generator))
        self.tp_group, self._tp_group = None, OneRank()
        self.config = SimpleNamespace(sequence_parallel=False)

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.layer_norm_weight + self.zero_centered_gamma
        if self.normalization == "LayerNorm":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * scale
        return x if self.layer_norm_bias is None else x + self.layer_norm_bias

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.normed(x) @ self.weight.T, None


@pytest.mark.parametrize(("normalization", "zero_centered"), NORMS)
def test_an_adapter_multiplies_what_the_weight_multiplies(normalization: str, zero_centered: bool) -> None:
    linear: Any = TELayerNormColumnParallelLinear(normalization, zero_centered)
    a_RD = torch.randn(2, 6, generator=torch.Generator().manual_seed(2))
    _adapt(linear, a_RD, scale=0.5, dropout=0.0, is_expert=False)
    with torch.no_grad():
        linear.lora_b.weight.normal_(generator=torch.Generator().manual_seed(3))
    x = 10 * torch.randn(4, 6, generator=torch.Generator().manual_seed(4)) + 3
    merged = linear.weight + 0.5 * linear.lora_b.weight @ a_RD
    torch.testing.assert_close(linear(x)[0], linear.normed(x) @ merged.T, rtol=1e-5, atol=1e-5)
