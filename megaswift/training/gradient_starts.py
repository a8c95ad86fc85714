"""Adapters that start from the gradient of the loss: LoRA-GA (Wang et al. 2024, arXiv 2407.05000).

G = U S V^T is the gradient of the loss of the first global batch by a linear's weight W. A_0 takes R of its first 2 R right singular
vectors, B_0 R others of the left ones (section 3.2; the names of directions and scales are those of the authors' code, and of
ms-swift). What is trained is W - s B_0 A_0 + s B A, as in models/weight_starts.py.

G is not formed. Adapters give its products with thin matrices: with B = 0 their gradient of B is s G A^T, and with A = 0 that of A is
s B^T G. From these alone power iterations find its first vectors (Halko et al. 2009, algorithm 4.4, as torch.svd_lowrank does), so
that the memory, the messages and the loss are those of training under any layout.

Letters: D input size, F output size, R adapter rank, K columns of the sketch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker

from megaswift.config.run import RunConfig
from megaswift.config.tuner import TunerConfig
from megaswift.converters.peft_folder import fused_modules
from megaswift.converters.plan import file_tensors
from megaswift.data.batches import MicroBatch
from megaswift.errors import ConfigError
from megaswift.metadata.meta import ModelMeta
from megaswift.models.lora import FUSED, AdaptedLinear, adapted_linears, generator_of, renew_matrices
from megaswift.models.weight_starts import gathered, is_first, keep_as_start, share
from megaswift.tasks.task import Task
from megaswift.training.engine import Engine
from megaswift.training.optimizer import wrap_chunks

# Of the authors' code and of peft 0.21 (tuners/lora/layer.py, lora_ga_init): vectors of the sketch over the rank, and power iterations.
SKETCH, ITERATIONS = 4, 4
# Where float32 sums stop telling singular values from zero, relative to the first.
SMALLEST = 1e-4


@dataclass(frozen=True, kw_only=True)
class _Linear:
    """An adapted linear of this rank, with the sizes and the random sketch of the whole matrix."""

    module: Any
    outputs: int  # of the file's matrices, padded heads left out
    sketch_KD: torch.Tensor


def start_from_gradients(
    chunks: Sequence[Any],
    run: RunConfig,
    meta: ModelMeta,
    batches: list[MicroBatch],
    *,
    task: Task,
    share_of_context: Callable[[MicroBatch], MicroBatch] | None,
) -> None:
    """Fill A, B and their starts before the first step; every rank of the world calls it with its micro batches.

    `share_of_context` is that of Engine. Raises ConfigError where a matrix has no 2 R singular vectors.
    """
    linears = _linears_of(chunks, run, meta)
    plain = replace(
        run.parallel, use_distributed_optimizer=False, overlap_grad_reduce=False, overlap_param_gather=False
    )
    for linear in linears:
        renew_matrices(linear.module, linear.sketch_KD.to(linear.module.lora_a.weight.dtype))
    with _only_adapters(chunks, linears):
        wrapped = wrap_chunks(list(chunks), replace(run, parallel=plain))
        chunks[0].config.finalize_model_grads_func = finalize_model_grads
        engine = Engine(wrapped, None, None, task, measure=lambda batch: (0, 0.0), share=share_of_context)
        for iteration in range(ITERATIONS + 1):
            engine.differentiate(batches)
            for linear in linears:
                _take_columns(linear)
            engine.differentiate(batches)
            if iteration < ITERATIONS:
                for linear in linears:
                    _take_rows(linear)
    for linear in linears:
        _start(linear, run.tuner)
    for one in wrapped:
        vars(one).clear()  # buffers of gradients, which a cycle through autograd's hooks would keep
    clear_aux_losses_tracker()


def _linears_of(chunks: Sequence[Any], run: RunConfig, meta: ModelMeta) -> list[_Linear]:
    shapes, tensors, rank = file_tensors(meta), fused_modules(meta), run.tuner.lora_rank
    found = []
    for chunk in chunks:
        for name, module in adapted_linears(chunk, tuple(FUSED), with_experts=True):
            if not isinstance(module, AdaptedLinear):
                continue
            outputs, inputs = sum(shapes[one][0] for one in tensors[name]), shapes[tensors[name][0]][1]
            if 2 * rank > min(outputs, inputs):
                raise ConfigError(
                    f"init_weights=lora-ga takes twice lora_rank={rank} singular vectors, and a linear has {min(outputs, inputs)}. "
                    "Choose a smaller --lora_rank."
                )
            generator = generator_of(name, seed=run.training.seed)
            sketch_KD = torch.randn(SKETCH * rank, inputs, generator=generator)
            found.append(_Linear(module=module, outputs=outputs, sketch_KD=F.normalize(sketch_KD)))
    return found


@contextmanager
def _only_adapters(chunks: Sequence[Any], linears: Sequence[_Linear]) -> Iterator[None]:
    """Let nothing but A and B have gradients, and no input of theirs be dropped."""
    own = {id(one.weight) for linear in linears for one in (linear.module.lora_a, linear.module.lora_b)}
    others = [
        one for chunk in chunks for one in chunk.parameters() if one.requires_grad and id(one) not in own
    ]
    dropouts = [linear.module.lora_dropout for linear in linears]
    for parameter in others:
        parameter.requires_grad_(False)
    for linear in linears:
        linear.module.lora_dropout = 0.0
    yield
    for parameter in others:
        parameter.requires_grad_(True)
    for linear, dropout in zip(linears, dropouts, strict=True):
        linear.module.lora_dropout = dropout


@torch.no_grad()
def _take_columns(linear: _Linear) -> None:
    """Let B be an orthonormal basis of the columns of G A^T, and A zero."""
    module = linear.module
    product_FK = module.lora_b.weight.main_grad
    if not module.lora_is_row:
        product_FK = gathered(module, product_FK, dim=0)
    a_KD = torch.zeros_like(linear.sketch_KD, device=product_FK.device)
    share(module, _padded(module, a_KD), _basis(product_FK))


@torch.no_grad()
def _take_rows(linear: _Linear) -> None:
    """Let A be an orthonormal basis of the rows of B^T G, and B zero."""
    module = linear.module
    product_KD = _rows(module)
    b_FK = module.lora_b.weight
    zeros_FK = torch.zeros_like(b_FK, dtype=torch.float32)
    if not module.lora_is_row:
        zeros_FK = gathered(module, zeros_FK, dim=0)
    share(module, _basis(product_KD.t()).t().contiguous(), zeros_FK)


def _rows(module: Any) -> torch.Tensor:
    """Return s B^T G [K, D], whole, in float32."""
    product_KD: torch.Tensor = module.lora_a.weight.main_grad
    return gathered(module, product_KD, dim=1) if module.lora_is_row else product_KD


def _padded(module: Any, a_KD: torch.Tensor) -> torch.Tensor:
    """Return A with columns for padded heads, as many as the ranks of a row-parallel linear hold together."""
    held = module.lora_a.weight.shape[1] * (module.lora_group.size() if module.lora_is_row else 1)
    return F.pad(a_KD, (0, held - a_KD.shape[1]))


def _basis(product_NK: torch.Tensor) -> torch.Tensor:
    """Return orthonormal columns [N, K] that span those of the product; zeros where there are no more, and in rows without a number."""
    q = torch.linalg.qr(product_NK)[0] * product_NK.any(1, keepdim=True)
    return F.pad(q, (0, product_NK.shape[1] - q.shape[1])).contiguous()


@torch.no_grad()
def _start(linear: _Linear, tuner: TunerConfig) -> None:
    """Let A and B be singular vectors of G, given its columns' basis B and B^T G, and keep them as what the adapter starts from."""
    module, rank = linear.module, tuner.lora_rank
    rows_KD, b_FK = _rows(module), module.lora_b.weight.detach().float()
    if not module.lora_is_row:
        b_FK = gathered(module, b_FK, dim=0)
    device, dtype = b_FK.device, module.lora_a.weight.dtype
    sketch_KD = _padded(module, linear.sketch_KD.to(device))
    a_RD, b_FR = b_FK.new_zeros(rank, rows_KD.shape[1]), b_FK.new_zeros(b_FK.shape[0], rank)
    if is_first(module):
        u_KK, s_K, vt_KD = torch.linalg.svd(rows_KD, full_matrices=False)
        count = len(s_K)
        # A pair of singular vectors has no sign of its own, and A_0 and B_0 take vectors of different pairs: both must have one.
        signs_K = torch.where((vt_KD * sketch_KD[:count]).sum(1) < 0, -1.0, 1.0)
        u_KK, vt_KD = u_KK * signs_K, vt_KD * signs_K[:, None]
        of_a, of_b = {
            "ArB2r": (slice(0, rank), slice(rank, 2 * rank)),
            "A2rBr": (slice(rank, 2 * rank), slice(0, rank)),
            "ArBr": (slice(1, 2 * rank, 2), slice(0, 2 * rank, 2)),
        }[tuner.lora_ga_direction]
        # Vectors of a singular value of zero are any, and differ from layout to layout: an expert may have seen no token.
        is_there_K = s_K > SMALLEST * s_K[0]
        scale = {
            "stable": linear.outputs**0.25 / tuner.lora_ga_stable_gamma**0.5,
            "gd": 1 / module.lora_scale,
            "unit": 1.0,
        }[tuner.lora_ga_scale]
        a_RD.copy_(torch.where(is_there_K[:, None], vt_KD, sketch_KD[:count])[of_a] * scale)
        b_FR.copy_((b_FK @ (u_KK * is_there_K))[:, of_b] * scale)
    renew_matrices(module, a_RD[:, : linear.sketch_KD.shape[1]].to(dtype))
    module.lora_a.keep_start(dim=0)
    module.lora_b.keep_start(dim=1)
    share(module, a_RD, b_FR)
    keep_as_start(module)
