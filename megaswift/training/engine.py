"""One optimizer step: Megatron's schedule over the micro batches, then its optimizer."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.moe.moe_utils import track_moe_metrics

from megaswift.data.batches import MicroBatch
from megaswift.tasks.task import MAXIMUM, Task, run_schedule

ROUTER_LOSSES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step was; the same on every rank."""

    loss: float  # mean over the loss tokens of the global batch, or over its rows for a loss of whole answers
    grad_norm: float | None  # before clipping; None where float16 overflowed
    lr: float  # that the step used
    updated: bool  # False where float16 overflowed and the optimizer skipped the step
    tokens: int  # of the global batch, without padding
    loss_tokens: int
    flop: float  # model FLOPs of the global batch (training/flops.py)
    interrupted: bool  # some rank was told to stop
    router: dict[str, float] = field(default_factory=dict)  # auxiliary losses of a mixture of experts
    metrics: dict[str, float] = field(default_factory=dict)  # what the task logs beside its loss


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a validation found; the same on every rank."""

    loss: float
    metrics: dict[str, float]  # what the task logs beside its loss


class Engine:
    """The model, its optimizer and its schedule on this rank."""

    def __init__(
        self,
        chunks: list[DistributedDataParallel],
        optimizer: MegatronOptimizer | None,
        schedule: OptimizerParamScheduler | None,
        task: Task,
        *,
        measure: Callable[[MicroBatch], tuple[int, float]],
        share: Callable[[MicroBatch], MicroBatch] | None = None,
        teach: Callable[[list[MicroBatch]], list[MicroBatch]] | None = None,
    ) -> None:
        """`measure` returns a micro batch's tokens without padding, and its model FLOPs; `share` this cp rank's part of one;
        `teach`, which every rank calls alike, whole ones with what teachers elsewhere say of them. Without optimizer and schedule it
        differentiates alone."""
        self.chunks = chunks
        self.optimizer: Any = optimizer
        self.schedule: Any = schedule
        self.config: Any = chunks[0].module.config
        self._task = task
        self._measure, self._share, self._teach = measure, share, teach
        self._per_token = bool(self.config.calculate_per_token_loss)
        self._device = next(chunks[0].parameters()).device

    def train_step(
        self, batches: list[MicroBatch], *, interrupted: Callable[[], bool] = lambda: False
    ) -> StepResult:
        """Run one optimizer step on this data-parallel rank's micro batches; every rank of the world calls it.

        What `interrupted` says on any rank, once gradients are there, reaches all of them. The update is not undone where the loss is
        not finite: the caller stops before it saves.
        """
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.zero_grad()
        outputs = self.differentiate(batches)
        totals = self._totals(outputs, batches, interrupted=interrupted())
        updated, grad_norm, _ = self.optimizer.step()
        if updated:
            self.schedule.step(1)
        return StepResult(
            loss=totals.loss,
            grad_norm=None if grad_norm is None else float(grad_norm),
            lr=lr,
            updated=bool(updated),
            tokens=totals.tokens,
            loss_tokens=totals.loss_tokens,
            flop=totals.flop,
            interrupted=totals.interrupted,
            router=self._router_losses(len(batches)),
            metrics=totals.metrics,
        )

    def differentiate(self, batches: list[MicroBatch]) -> list[dict[str, torch.Tensor]]:
        """Leave the gradients of the global batch in the chunks' buffers; every rank of the world calls it.

        Returns what the last stage makes of each micro batch, and [] elsewhere.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        return self._run(self._task.prepare(self._shared(batches), self.chunks), forward_only=False)

    @torch.no_grad()
    def evaluate(self, global_batches: Iterable[list[MicroBatch]]) -> Evaluation:
        """Return the loss over all batches, weighted by tokens or rows; every rank of the world calls it."""
        outputs, seen = [], 0
        with self.settled_parameters():
            for chunk in self.chunks:
                chunk.eval()
            for batches in global_batches:
                prepared = self._task.prepare(self._shared(batches), self.chunks)
                outputs += self._run(prepared, forward_only=True)
                seen += 1
            for chunk in self.chunks:
                chunk.train()
        assert seen, "a validation needs at least one global batch"
        totals = self._totals(outputs, [], interrupted=False)
        return Evaluation(loss=totals.loss, metrics=totals.metrics)

    @contextmanager
    def settled_parameters(self) -> Iterator[None]:
        """Hold the parameters whole and still, also where their gathering overlaps with the forward pass."""
        hooked = [chunk for chunk in self.chunks if chunk.use_forward_hook]
        for chunk in hooked:
            chunk.disable_forward_pre_hook()
        yield
        for chunk in hooked:
            chunk.enable_forward_pre_hook()

    def go_on_with(self, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
        """Take other wrappings of the same model and another optimizer; the schedule goes on."""
        self.chunks, self.optimizer = chunks, optimizer
        self.schedule.optimizer = optimizer
        self.schedule.step(0)

    def _shared(self, batches: list[MicroBatch]) -> list[MicroBatch]:
        """Return this cp rank's part of every micro batch, and of what is said of it."""
        if self._teach is not None:
            batches = self._teach(batches)
        return batches if self._share is None else [self._share(batch) for batch in batches]

    def _run(self, batches: list[MicroBatch], *, forward_only: bool) -> list[dict[str, torch.Tensor]]:
        return run_schedule(
            self.chunks,
            batches,
            self._task.forward_step if self._per_token else self._forward_with_mean,
            forward_only=forward_only,
        )

    def _forward_with_mean(self, data_iterator: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Any]:
        """Run a micro batch whose loss is a mean over its own tokens: those of all cp ranks, each of which has a part.

        Megatron divides by what this rank counted, and averages gradients over the cp ranks (schedules.py, 0.16.1).
        """
        output, loss_function = self._task.forward_step(data_iterator, model)
        group = parallel_state.get_context_parallel_group()

        def loss_over_ranks(
            output: torch.Tensor,
        ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            loss_sum, num_tokens, log = loss_function(output)
            dist.all_reduce(num_tokens, group=group)
            return loss_sum * group.size(), num_tokens, {**log, "mean_of": num_tokens}

        return output, loss_over_ranks

    def _totals(
        self, outputs: list[dict[str, torch.Tensor]], batches: list[MicroBatch], *, interrupted: bool
    ) -> "_Totals":
        """Sum over the world what the last pipeline stage knows; an all-reduce of a few float64, another where maxima are logged."""
        names = self._task.metrics
        values = torch.zeros(6 + 2 * len(names), dtype=torch.float64, device=self._device)
        values[5] = float(interrupted)
        greatest = torch.zeros(len(names), dtype=torch.float64, device=self._device)
        if parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0:
            sums = torch.stack([output["loss"] for output in outputs])  # [micro batches, (loss sum, number)]
            values[2] = sum(output.get("loss_tokens", output["loss"])[1] for output in outputs)
            if self._per_token:
                values[:2] = sums.sum(0)
            else:
                tokens_of_means = torch.stack([output["mean_of"] for output in outputs])
                values[0] = (sums[:, 0] / tokens_of_means.clamp(min=1)).sum()
                # The last global batch of a validation is filled up with micro batches without a token.
                values[1] = (tokens_of_means > 0).sum() / parallel_state.get_context_parallel_world_size()
            for number, name in enumerate(names):
                found = [output[name] for output in outputs if name in output]
                if found:
                    values[6 + 2 * number : 8 + 2 * number] = torch.stack(found).sum(0)
                    greatest[number] = torch.stack(found)[:, 0].amax()
            if parallel_state.get_context_parallel_rank() == 0:
                for batch in batches:
                    values[3:5] += torch.tensor(
                        self._measure(batch), dtype=torch.float64, device=self._device
                    )
        dist.all_reduce(values)
        if any(name.endswith(MAXIMUM) for name in names):
            dist.all_reduce(greatest, op=dist.ReduceOp.MAX)
        loss_sum, weight, loss_tokens, tokens, flop, interrupts, *rest = values.tolist()
        means = {
            name: highest if name.endswith(MAXIMUM) else total / number
            for name, total, number, highest in zip(
                names, rest[0::2], rest[1::2], greatest.tolist(), strict=True
            )
            if number
        }
        return _Totals(
            loss=loss_sum / max(weight, 1.0),
            loss_tokens=int(loss_tokens),
            tokens=int(tokens),
            flop=flop,
            interrupted=interrupts > 0,
            metrics=self._task.summary(means),
        )

    def _router_losses(self, num_micro_batches: int) -> dict[str, float]:
        """Return the auxiliary losses, a mean over layers and micro batches; every rank of the world calls it."""
        name = ROUTER_LOSSES.get(self.config.moe_router_load_balancing_type)
        names = [name] if name else []
        if self.config.moe_z_loss_coeff is not None:
            names.append("z_loss")
        if self.config.num_moe_experts is None or not names:
            return {}
        losses: dict[str, torch.Tensor] = {}
        track_moe_metrics(
            1 / num_micro_batches,
            0,
            total_loss_dict=losses,
            force_initialize=True,
            track_names=names,
            num_layers=self.config.num_layers,
            moe_layer_freq=self.config.moe_layer_freq,
        )
        return {name: float(value) for name, value in losses.items()}


@dataclass(frozen=True, kw_only=True)
class _Totals:
    loss: float
    loss_tokens: int
    tokens: int
    flop: float
    interrupted: bool
    metrics: dict[str, float]
