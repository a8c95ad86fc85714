"""LoRA as a property of Megatron's parallel linears: names and sharding of the base weight stay as they are.

W x + scale * B A x (Hu et al. 2021, eq. 3). On a column-parallel linear A is whole and B is cut like the weight; on a
row-parallel one A is cut like the weight and B is whole.

Letters: D input size, F output size, R adapter rank.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megaswift.config.tuner import TunerConfig
from megaswift.errors import ConfigError, nearest
from megaswift.metadata.meta import ModelMeta
from megaswift.models.add_product import AddProduct
from megaswift.models.causal_lm import CausalLM
from megaswift.models.first_gradient import let_gradients_begin
from megaswift.models.nf4 import whole_weight

COLUMN_PARALLEL = ("linear_qkv", "linear_fc1")
ROW_PARALLEL = ("linear_proj", "linear_fc2")
# Megatron fuses matrices: the names in the file that together are one module here.
FUSED: dict[str, tuple[frozenset[str], ...]] = {
    "linear_qkv": (frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"qkv_proj"})),
    "linear_proj": (frozenset({"o_proj"}), frozenset({"dense"})),
    "linear_fc1": (
        frozenset({"gate_proj", "up_proj"}),
        frozenset({"w1", "w3"}),
        frozenset({"gate_up_proj"}),
        frozenset({"c_fc"}),
    ),
    "linear_fc2": (frozenset({"down_proj"}), frozenset({"w2"}), frozenset({"c_proj"})),
}


def resolve_targets(names: list[str]) -> tuple[str, ...]:
    """Return the Megatron modules that `names` mean: Hugging Face names, Megatron names, or all-linear.

    Raises ConfigError for an unknown name, or for a part of a fused module without its other parts.
    """
    asked = set(names)
    if "all-linear" in asked:
        return tuple(FUSED)
    known = {name for groups in FUSED.values() for group in groups for name in group} | set(FUSED)
    for name in sorted(asked - known):
        raise ConfigError(
            f"target_modules={name} is not a linear module of a decoder.{nearest(name, known | {'all-linear'})}"
        )
    targets = []
    for module, groups in FUSED.items():
        for group in groups:
            if group & asked and not group <= asked:
                raise ConfigError(
                    f"target_modules={', '.join(sorted(group & asked))} without {', '.join(sorted(group - asked))}: Megatron keeps "
                    f"them in one matrix. Name all of {', '.join(sorted(group))}, or {module}."
                )
        if module in asked or any(group <= asked for group in groups):
            targets.append(module)
    return tuple(targets)


def adapted_linears(
    chunk: torch.nn.Module, targets: tuple[str, ...], *, with_experts: bool
) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield (global name, module) of every linear in `targets`: layers and experts are counted over all ranks."""
    for layer in chunk.decoder.layers:  # type: ignore[union-attr]  # an nn.ModuleList behind nn.Module's attribute
        for path, module in list(layer.named_modules()):
            parts = path.split(".")
            is_expert = "local_experts" in parts
            if parts[-1] not in targets or (is_expert and not with_experts):
                continue
            if is_expert:
                index = parts.index("local_experts") + 1
                local = len(layer.get_submodule(".".join(parts[:index])))
                parts[index] = str(
                    int(parts[index]) + local * parallel_state.get_expert_model_parallel_rank()
                )
            yield f"decoder.layers.{layer.layer_number - 1}.{'.'.join(parts)}", module


def apply_lora(
    chunks: list[CausalLM],
    tuner: TunerConfig,
    meta: ModelMeta,
    *,
    seed: int,
    ranks: Mapping[str, int] | None = None,
    modules: Collection[str] | None = None,
) -> None:
    """Freeze the model but for a head of scores, which is new, and give every target linear an adapter with B = 0.

    `modules` are the targets by global name where --target_modules does not name them. `ranks` overrides --lora_rank for
    modules by global name (a PEFT adapter with several A matrices needs a larger one).
    A depends on the seed and the module's global name alone, so it is the same under every layout.
    """
    _check_adaptable(meta)
    targets = resolve_targets(tuner.target_modules)
    for chunk in chunks:
        chunk.requires_grad_(False)
        chunk.all_trains, chunk.layers_alike = False, modules is None
        if chunk.scores and chunk.post_process:
            chunk.output_layer.requires_grad_(True)  # nothing, for embeddings
        with_experts = meta.moe is not None and not meta.moe.only_packed
        for name, module in adapted_linears(chunk, targets, with_experts=with_experts):
            if modules is not None and name not in modules:
                continue
            rank = (ranks or {}).get(name, tuner.lora_rank)
            # The scale belongs to the rank the user named; a larger block only holds several adapters of that rank.
            scale = tuner.lora_alpha / (math.sqrt(tuner.lora_rank) if tuner.use_rslora else tuner.lora_rank)
            a_RD = _initial_a(tuner, rank, _inputs(name, module, meta), generator_of(name, seed=seed))
            is_expert = ".experts." in name
            if tuner.use_dora and is_expert:
                raise ConfigError(
                    "use_dora=true is not built for experts: peft has no file for it. Leave it out, or the experts' modules."
                )
            _adapt(module, a_RD, scale=scale, dropout=tuner.lora_dropout, is_expert=is_expert)
            if tuner.use_dora:
                _add_magnitude(module)
            if tuner.subtracts_start:
                module.lora_a.keep_start(dim=0)
                module.lora_b.keep_start(dim=1)
        if chunk.pre_process and chunk.config.recompute_granularity is not None:
            let_gradients_begin(chunk)


@torch.no_grad()
def start_magnitudes(chunks: Sequence[torch.nn.Module]) -> None:
    """Let DoRA's magnitudes be the norms of the rows, so that nothing is changed; call it on every rank once the weights are there."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, AdaptedLinear) and module.lora_magnitude is not None:
                magnitude_F = module.lora_magnitude.weight
                magnitude_F.copy_(module.row_norms())


@contextmanager
def adapters_off(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Let the model compute what it did before it was adapted; without adapters nothing changes."""
    adapted = [module for chunk in chunks for module in chunk.modules() if isinstance(module, AdaptedLinear)]
    for module in adapted:
        module.lora_off = True
    yield
    for module in adapted:
        module.lora_off = False


def _check_adaptable(meta: ModelMeta) -> None:
    """Raise ConfigError for a model whose files know linears that no adapter can be written for."""
    written = {name for groups in FUSED.values() for group in groups for name in group}
    if meta.moe is not None:
        written -= {"gate_up_proj"}  # one tensor for all experts
    strange = [name for name in meta.target_modules if name not in written]
    if strange and (meta.moe is not None or meta.mla is not None or meta.linear_attention is not None):
        raise ConfigError(
            f"tuner_type=lora is not built for {', '.join(strange)} of {meta.model_type}. Use tuner_type=full."
        )


def generator_of(name: str, *, seed: int) -> torch.Generator:
    """Return what draws the numbers of one linear, by its global name: the same ones on every rank and under every layout."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _is_row_parallel(module: Any) -> bool:
    return isinstance(module, RowParallelLinear) or type(module).__name__.startswith("TERowParallel")


def _group_of(module: Any) -> Any:
    """Return the ranks that a linear is cut over: Transformer Engine's wrappers give their own to nobody where experts talk for them."""
    return getattr(module, "_tp_group", None) or module.tp_group


def _inputs(name: str, module: Any, meta: ModelMeta) -> int:
    """Return the input size of the file's matrix: padded heads are not in it."""
    if name.endswith("self_attention.linear_proj"):
        return meta.num_heads * meta.of_layer(int(name.split(".")[2])).head_dim
    return int(module.weight.shape[1]) * (_group_of(module).size() if _is_row_parallel(module) else 1)


def _initial_a(tuner: TunerConfig, rank: int, inputs: int, generator: torch.Generator) -> torch.Tensor:
    """Return A [R, D] as PEFT draws it (LoraLayer.reset_lora_parameters).

    Uniform in +-1/sqrt(D), kaiming_uniform with a = sqrt(5) that is; "gaussian" is normal with a standard deviation of 1/R.
    """
    if tuner.init_weights == "gaussian":
        return torch.randn(rank, inputs, generator=generator) / tuner.lora_rank
    return (torch.rand(rank, inputs, generator=generator) * 2 - 1) / math.sqrt(inputs)


def _adapt(module: Any, a_RD: torch.Tensor, *, scale: float, dropout: float, is_expert: bool) -> None:
    """Turn `module` into the same linear with an adapter: its class gains AdaptedLinear in front; `a_RD` is the whole A."""
    module.__class__ = type(f"LoRA{type(module).__name__}", (AdaptedLinear, type(module)), {})
    module.lora_group, module.lora_is_row = _group_of(module), _is_row_parallel(module)
    module.lora_is_expert = is_expert
    module.lora_scale, module.lora_dropout, module.lora_magnitude = scale, dropout, None
    renew_matrices(module, a_RD.to(module.weight.dtype))


def renew_matrices(module: Any, a_RD: torch.Tensor) -> None:
    """Give an adapted linear its part of the whole A, and B = 0, in the dtype of `a_RD`.

    Columns that only padded heads feed are absent from A, and become zero.
    """
    weight, group, is_row, is_expert = (
        module.weight,
        module.lora_group,
        module.lora_is_row,
        module.lora_is_expert,
    )
    out_features, in_features = whole_weight(module).shape
    rank = a_RD.shape[0]
    # False: reduced over the expert data-parallel group. Codes of four bits (models/nf4.py) do not say so any more.
    reduced_by_all = getattr(module.lora_a.weight if hasattr(module, "lora_a") else weight, "allreduce", True)
    if is_row:
        a_RD = F.pad(a_RD, (0, in_features * group.size() - a_RD.shape[1])).chunk(group.size(), dim=1)[
            group.rank()
        ]
    module.lora_a = _Matrix(a_RD.to(weight.device).clone())
    module.lora_b = _Matrix(torch.zeros(out_features, rank, dtype=a_RD.dtype, device=weight.device))
    cut, whole = (
        (module.lora_a.weight, module.lora_b.weight)
        if is_row
        else (module.lora_b.weight, module.lora_a.weight)
    )
    # Which copies the gradient norm counts: every cut matrix, and of a whole one that of tp rank 0. The tp ranks of an
    # expert's group hold other experts, or copies, so there it is the group's own first rank that counts.
    set_tensor_model_parallel_attributes(cut, group.size() > 1 or is_expert, 1 if is_row else 0, 1)
    set_tensor_model_parallel_attributes(whole, is_expert and group.rank() == 0, -1, 1)
    # The matrix that is whole sees one rank's part of the sequence: Megatron then sums its gradient over tp.
    whole.sequence_parallel = bool(module.config.sequence_parallel) and not is_expert
    for parameter in (cut, whole):
        parameter.allreduce = reduced_by_all


def _add_magnitude(module: Any) -> None:
    """Give an adapted linear the norms of its rows, which start_magnitudes fills: cut over tp like the rows of B."""
    like_FR = module.lora_b.weight
    module.lora_magnitude = _Matrix(torch.zeros_like(like_FR[:, 0]))
    magnitude_F = module.lora_magnitude.weight
    set_tensor_model_parallel_attributes(magnitude_F, like_FR.tensor_model_parallel, like_FR.partition_dim, 1)
    magnitude_F.sequence_parallel = getattr(like_FR, "sequence_parallel", False)
    magnitude_F.allreduce = like_FR.allreduce


class _Matrix(torch.nn.Module):
    """One matrix or vector of an adapter, so that its name ends in .weight as PEFT's does.

    An adapter that does not start at zero has what it started from beside it (models/weight_starts.py): [A; A_0] and [B, -B_0] give
    B A - B_0 A_0, and the base weight stays what it is.
    """

    start: torch.Tensor  # A_0, or -B_0

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.register_buffer("start", None)
        self.dim = 0

    def keep_start(self, *, dim: int) -> None:
        """Make room for the start, which is joined to the matrix along `dim`."""
        self.start, self.dim = torch.zeros_like(self.weight), dim

    def forward(self) -> torch.Tensor:
        """Return the matrix: a call, so that Megatron's hook has gathered it first (overlap_param_gather)."""
        return self.weight if self.start is None else torch.cat([self.weight, self.start], dim=self.dim)


class AdaptedLinear:
    """A mixin in front of one of Megatron's parallel linears; see _adapt."""

    lora_group: Any  # over which the linear is cut
    lora_is_row: bool
    lora_is_expert: bool
    lora_scale: float
    lora_dropout: float
    lora_a: _Matrix
    lora_b: _Matrix
    lora_magnitude: _Matrix | None  # of DoRA
    lora_off = False  # the linear is then what it was without its adapter

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return (output, bias) as the base linear does, with the adapter's part added to the output."""
        output, bias = super().forward(x, *args, **kwargs)  # type: ignore[misc]  # of the linear behind this mixin
        if self.lora_off:
            return output, bias
        x = self._multiplied(x)
        low, b_FR = self._row_delta(x) if self.lora_is_row else self._column_delta(x)
        if (
            output._is_view()
        ):  # so a reduction over one rank returns its input, and autograd forbids changing that
            output = output.clone()
        output = AddProduct.apply(output, low, b_FR, self.lora_scale)
        return (output if self.lora_magnitude is None else self._rescaled(output, bias)), bias

    def _multiplied(self: Any, x: torch.Tensor) -> torch.Tensor:
        """Return what the base weight multiplies: Transformer Engine's linears may hold the norm before them (layernorm_linear.py)."""
        scale = getattr(self, "layer_norm_weight", None)
        if scale is None:
            return x
        scale = scale.float() + 1 if self.zero_centered_gamma else scale.float()
        if self.normalization == "RMSNorm":
            return F.rms_norm(x.float(), scale.shape, scale, self.eps).to(x.dtype)
        return F.layer_norm(x.float(), scale.shape, scale, self.layer_norm_bias.float(), self.eps).to(x.dtype)

    def _rescaled(self: Any, output: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return what rows with the trained norms give: m / |W + s B A| times the output (DoRA, eq. 5; the norm has no gradient, eq. 11).

        Dropout changes the adapter's input only; peft drops the base weight's input too while it trains.
        """
        ratio_F = self.row_factors().to(output.dtype)
        own_F = self.bias if bias is None else None  # in the output already
        if own_F is None or not own_F.numel():
            return output * ratio_F
        return (output - own_F) * ratio_F + own_F

    def row_factors(self: Any) -> torch.Tensor:
        """Return what DoRA multiplies this rank's rows of W + s B A by, float32 [F]; every rank of the tp group calls it."""
        tiny = torch.finfo(torch.float32).tiny  # zeros stay zeros: padded heads have no norm
        factors_F: torch.Tensor = self.lora_magnitude() / self.row_norms().clamp_min(tiny)
        return factors_F

    @torch.no_grad()
    def row_norms(self: Any) -> torch.Tensor:
        """Return the norms of this rank's rows of W + s B A, over all their columns, float32 [F]; every rank of the tp group calls it."""
        adapted_FD = torch.addmm(
            whole_weight(self).float(), self.lora_b().float(), self.lora_a().float(), alpha=self.lora_scale
        )
        squares_F = adapted_FD.square().sum(1)
        if self.lora_is_row and self.lora_group.size() > 1:
            dist.all_reduce(squares_F, group=self.lora_group)
        return squares_F.sqrt()

    def _column_delta(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A x [..., R], and B."""
        sharded = self.config.sequence_parallel and not self.lora_is_expert
        x = self._drop(x, per_rank=sharded)
        if self.lora_is_expert:  # the dispatcher sums the input's gradient over etp, but not that of A
            a_RD = copy_to_tensor_model_parallel_region(self.lora_a(), group=self.lora_group)
            return F.linear(x, a_RD), self.lora_b()
        low = F.linear(x, self.lora_a())
        if sharded:
            low = gather_from_sequence_parallel_region(
                low, tensor_parallel_output_grad=True, group=self.lora_group
            )
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self.lora_group)
        return low, self.lora_b()

    def _row_delta(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low = F.linear(self._drop(x, per_rank=True), self.lora_a())
        if (
            self.lora_is_expert
        ):  # the output is partial and the dispatcher sums it over etp; B's gradient is partial too
            return low, copy_to_tensor_model_parallel_region(self.lora_b(), group=self.lora_group)
        reduce: Callable[..., torch.Tensor] = reduce_from_tensor_model_parallel_region
        if self.config.sequence_parallel:
            reduce = reduce_scatter_to_sequence_parallel_region
        return reduce(low, group=self.lora_group), self.lora_b()

    def _drop(self: Any, x: torch.Tensor, *, per_rank: bool) -> torch.Tensor:
        if not (self.training and self.lora_dropout):
            return x
        if not per_rank:
            return F.dropout(x, self.lora_dropout)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            return F.dropout(x, self.lora_dropout)

    def sharded_state_dict(
        self: Any, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """Return Megatron's sharded state; the base class would call the adapter's cut matrix whole."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]  # as above
        names = (
            ("lora_a", "lora_b") if self.lora_magnitude is None else ("lora_a", "lora_b", "lora_magnitude")
        )
        matrices = {f"{name}.weight": getattr(self, name).weight for name in names}
        of_rows = {f"{name}.weight": 0 for name in names[1:]}
        of_columns = {"lora_a.weight": 1}
        if self.lora_a.start is not None:
            matrices |= {"lora_a.start": self.lora_a.start, "lora_b.start": self.lora_b.start}
            of_rows, of_columns = {**of_rows, "lora_b.start": 0}, {**of_columns, "lora_a.start": 1}
        axes = of_columns if self.lora_is_row else of_rows
        adapter = make_sharded_tensors_for_checkpoint(
            matrices,
            prefix,
            axes,
            sharded_offsets,
            tp_group=self.lora_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group")
            or parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
        if prefix.endswith("linear_fc1.") and self.config.gated_linear_unit:
            # Each rank holds [gate; up] halves of its own: they are two tensors to any other layout.
            for name in of_rows:
                key = f"{prefix}{name}"
                adapter[key] = apply_swiglu_sharded_factory(adapter[key], sharded_offsets)
        return {**state, **adapter}
