"""Gated DeltaNet in the place of attention (Qwen3-Next, Qwen3.5), cut over tp by key heads.

Megatron's own module (0.16.1, ssm/gated_delta_net.py) needs a GPU package and refuses packed documents. In this one the rows
of a key head lie together, so that every layout cuts the same way.

Letters: S sequence, B batch, D model size, N key heads of this rank, P key head size, R value heads a key head,
X = N*R value heads of this rank, Y value head size, T length of the convolution.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    get_cuda_rng_tracker,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megaswift.errors import ModelError
from megaswift.kernels.gated_delta_rule.ops import document_ids, gated_delta_rule
from megaswift.metadata.meta import ModelMeta
from megaswift.models.gathered import gathered

NORM_EPS = 1e-6  # of the length of q and k (transformers 5.23, modeling_qwen3_next.py, l2norm)
SLOWEST, FASTEST = 0.01, 16.0  # decays of a new model (the same file, _init_weights)


class GatedDeltaNet(MegatronModule):
    """A short convolution over q, k and v, the gated delta rule, a gated norm, and the projections around them."""

    def __init__(self, config: TransformerConfig, layer_number: int, *, meta: ModelMeta, **_: Any) -> None:
        super().__init__(config)
        sizes = meta.linear_attention
        assert sizes is not None, "the model has such layers"
        self.group = parallel_state.get_tensor_model_parallel_group()
        tp = self.group.size()
        if sizes.num_key_heads % tp:
            raise ModelError(
                f"tp={tp} does not divide linear_num_key_heads={sizes.num_key_heads} ({meta.model_type}). Choose a tp that does."
            )
        self.layer_number = layer_number
        self.key_heads = sizes.num_key_heads // tp
        self.ratio = sizes.num_value_heads // sizes.num_key_heads
        self.key_size, self.value_size = sizes.key_head_dim, sizes.value_head_dim
        self.values = self.ratio * self.value_size  # of one key head
        self.eps = config.layernorm_epsilon
        rows = 2 * self.key_size + 2 * self.values
        self.in_proj_qkvz = self._column_parallel(sizes.num_key_heads * rows)
        self.in_proj_ba = self._column_parallel(sizes.num_key_heads * 2 * self.ratio)
        self.conv1d = _Weight(self.key_heads * (rows - self.values), 1, sizes.conv_kernel, config=config)
        value_heads = self.key_heads * self.ratio
        self.A_log = _cut_parameter(value_heads, config=config)
        self.dt_bias = _cut_parameter(value_heads, config=config)
        self.out_norm = _Weight(self.value_size, config=config, is_cut=False)
        self.out_proj = RowParallelLinear(
            sizes.num_value_heads * self.value_size,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=self.group,
        )
        self._initialise()

    def _column_parallel(self, rows: int) -> ColumnParallelLinear:
        return ColumnParallelLinear(
            self.config.hidden_size,
            rows,
            config=self.config,
            init_method=self.config.init_method,
            bias=False,
            gather_output=False,
            tp_group=self.group,
        )

    @torch.no_grad()
    def _initialise(self) -> None:
        self.out_norm.weight.fill_(1.0)
        self.dt_bias.fill_(1.0)
        with get_cuda_rng_tracker().fork():
            bound = self.conv1d.weight.shape[-1] ** -0.5  # as torch.nn.Conv1d
            self.conv1d.weight.uniform_(-bound, bound)
            self.A_log.uniform_(SLOWEST, FASTEST).log_()

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return ([S, B, D], None); with sequence parallelism both are cut along S. Every rank of tp calls it.

        Packed documents do not see each other: neither the convolution nor the state reaches over a border.
        """
        qkvz = self.in_proj_qkvz(hidden_states)[0].transpose(0, 1).unflatten(-1, (self.key_heads, -1))
        ba = self.in_proj_ba(hidden_states)[0].transpose(0, 1).unflatten(-1, (self.key_heads, 2, self.ratio))
        batch, length = qkvz.shape[:2]
        cu_seqlens = None if packed_seq_params is None else packed_seq_params.cu_seqlens_q
        documents_BS = document_ids(cu_seqlens, batch, length, qkvz.device)
        qkv, z = qkvz.split([2 * self.key_size + self.values, self.values], dim=-1)
        mixed = F.silu(causal_convolution(qkv.flatten(2), gathered(self.conv1d).weight[:, 0], documents_BS))
        query, key, value = mixed.unflatten(-1, (self.key_heads, -1)).split(
            [self.key_size, self.key_size, self.values], dim=-1
        )
        beta, rate = (one.flatten(2) for one in ba.unbind(3))  # [B, S, X]
        output = gated_delta_rule(
            self._per_value_head(query) * self.key_size**-0.5,
            self._per_value_head(key),
            value.reshape(batch, length, -1, self.value_size),
            -self.A_log.float().exp() * F.softplus(rate.float() + self.dt_bias.float()),
            beta.sigmoid(),
            cu_seqlens=cu_seqlens,
        )
        gated = self._gated_norm(output, z.reshape(output.shape))
        return self.out_proj(gated.flatten(2).transpose(0, 1).contiguous())

    def _per_value_head(self, x_BSNP: torch.Tensor) -> torch.Tensor:
        """Return q or k of unit length for every value head [B, S, X, P]."""
        x32 = x_BSNP.float()
        unit = x32 * torch.rsqrt(x32.square().sum(-1, keepdim=True) + NORM_EPS)
        return unit.to(x_BSNP.dtype).repeat_interleave(self.ratio, dim=2)

    def _gated_norm(self, x_BSXY: torch.Tensor, z_BSXY: torch.Tensor) -> torch.Tensor:
        """Return the root-mean-square norm of each value head, scaled by silu(z)."""
        # Each rank sees its own heads only: the gradient of the weight is summed over tp.
        weight = copy_to_tensor_model_parallel_region(gathered(self.out_norm).weight, group=self.group)
        x32 = x_BSXY.float()
        normal = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (weight * normal.to(x_BSXY.dtype) * F.silu(z_BSXY.float())).to(x_BSXY.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None, **_: Any
    ) -> Any:
        """Return Megatron's sharded state: everything but the norm is cut along the heads."""
        own = {
            "A_log": self.A_log,
            "dt_bias": self.dt_bias,
            "conv1d.weight": self.conv1d.weight,
            "out_norm.weight": self.out_norm.weight,
        }
        state = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            {"A_log": 0, "dt_bias": 0, "conv1d.weight": 0},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=(metadata or {}).get("dp_cp_group")
            or parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
        for name in ("in_proj_qkvz", "in_proj_ba", "out_proj"):
            linear = getattr(self, name)
            state.update(linear.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata))
        return state


def causal_convolution(
    x_BSC: torch.Tensor, weight_CT: torch.Tensor, documents_BS: torch.Tensor
) -> torch.Tensor:
    """Return [B, S, C]: every channel's sum over its last T tokens, those of the same document."""
    length, taps = x_BSC.shape[1], weight_CT.shape[1]
    total = x_BSC * weight_CT[:, -1]
    for back in range(1, min(taps, length)):
        is_same = documents_BS[:, back:] == documents_BS[:, :-back]
        earlier = x_BSC[:, :-back] * is_same[..., None]
        total = total + F.pad(earlier * weight_CT[:, -1 - back], (0, 0, back, 0))
    return total


class _Weight(torch.nn.Module):
    """A weight by itself, of the name that the file gives it."""

    def __init__(self, *shape: int, config: TransformerConfig, is_cut: bool = True) -> None:
        super().__init__()
        self.weight = _cut_parameter(*shape, config=config, is_cut=is_cut)


def _cut_parameter(*shape: int, config: TransformerConfig, is_cut: bool = True) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(
        torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device())
    )
    if is_cut:
        set_tensor_model_parallel_attributes(parameter, True, 0, 1)
    return parameter
