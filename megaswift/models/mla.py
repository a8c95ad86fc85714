"""Multi-head latent attention with Megatron's module: keys and values come from a small latent (DeepSeek-V2, 2405.04434, 2.1).

Letters: S sequence, B batch, C size of the latent, P size of the key part with rotary positions, which all heads share.
"""

from dataclasses import replace
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from megaswift.metadata.meta import ModelMeta, RopeMeta
from megaswift.models.context import SpreadDocuments
from megaswift.models.rope import RotaryPositions


class LatentAttention(MLASelfAttention):
    """Megatron's latent attention with the model's rotary positions and a whole gradient of the shared key part."""

    def __init__(self, *args: Any, meta: ModelMeta, norm: ModuleSpec, **kwargs: Any) -> None:
        """`norm` is the spec of the norms of both latents."""
        super().__init__(*args, **kwargs)
        mla = meta.mla
        assert mla is not None, "latent attention has latents"
        self.rotary_pos_emb = LatentPositions(meta, cp_group=self.pg_collection.cp)
        # The norms are placed here and not by the spec: 0.19 builds those of a spec only under qk_layernorm, which asks for
        # Transformer Engine where queries have no latent, and sums the gradient of q_layernorm over tp though it is whole.
        for name, size in (("q_layernorm", mla.q_rank), ("kv_layernorm", mla.kv_rank)):
            if size is not None:
                built = build_module(norm, hidden_size=size, config=self.config, eps=mla.latent_norm_eps)
                setattr(self, name, built)
        self.shared_key_size = mla.rope_head_dim
        self.linear_kv_down_proj.register_forward_hook(self._whole_latent)

    def _whole_latent(
        self, module: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, torch.Tensor | None]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gather the columns [S, B, (C+P)/tp] so that the gradient of the last P is summed over the heads of all ranks.

        Megatron gathers them itself otherwise, and each rank then keeps the gradient of its own heads alone (0.16.1,
        multi_latent_attention.py, get_query_key_value_tensors). Every rank of tp calls it.
        """
        columns, bias = output
        if self.tp_group.size() == 1:
            return output
        latent = gather_from_tensor_model_parallel_region(columns, group=self.tp_group)
        if self.config.sequence_parallel:
            # Megatron gathers the shared part along the sequence again, which sums its gradient.
            return scatter_to_sequence_parallel_region(latent, group=self.tp_group), bias
        return _SumSharedGradient.apply(latent, self.shared_key_size, self.tp_group), bias


class _SumSharedGradient(torch.autograd.Function):
    """Nothing forwards; backwards the gradient of the last P columns is summed over the ranks of tp.

    Megatron's own sum forgets its result where the gradient is not contiguous, as that of a slice (mappings.py, _reduce, 0.16.1).
    """

    @staticmethod
    def forward(ctx: Any, latent: torch.Tensor, shared_size: int, group: Any) -> torch.Tensor:
        ctx.shared_size, ctx.group = shared_size, group
        return latent.view_as(latent)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        shared = grad[..., -ctx.shared_size :].contiguous()
        torch.distributed.all_reduce(shared, group=ctx.group)
        return torch.cat([grad[..., : -ctx.shared_size], shared], dim=-1), None, None


class LatentPositions(RotaryPositions):
    """The angles of the key part with rotary positions, and the number that multiplies their cosines and sines."""

    def __init__(self, meta: ModelMeta, **kwargs: Any) -> None:
        assert meta.mla is not None, "latent attention has latents"
        # Megatron's latent attention parts neighbouring pairs into halves before it turns them (rope_utils.py, 0.16.1).
        halves = replace(meta, head_dim=meta.mla.rope_head_dim, rope=RopeMeta())
        super().__init__(halves, torch.device(torch.cuda.current_device()), **kwargs)
        self.amplitude = 1.0 if meta.rope_scaling is None else meta.rope_scaling.amplitude

    def forward(self, rows: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, float]:  # type: ignore[override]  # as Megatron's yarn
        """Return the angles [S, 1, 1, P], float32, and the amplitude; of spread documents [T, 1, P], as the keys have no batch."""
        angles = super().forward(rows, *args, **kwargs)
        return angles.squeeze(1) if isinstance(rows, SpreadDocuments) else angles, self.amplitude
