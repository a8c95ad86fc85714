"""What the shards of a model say of rollouts: the log-probability of every token, and the experts that were chosen for it.

Letters: S tokens of a micro batch's row, T tokens of a rollout, L layers with experts of the model, K experts of a token.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model

from megaswift.data.batches import BatchSettings, MicroBatch
from megaswift.metadata.meta import ModelMeta
from megaswift.models.replay import tokens_of_rank
from megaswift.parallel.layout import Layout
from megaswift.rollout.chosen_experts import expert_dtype
from megaswift.rollout.rollout import Rollout
from megaswift.tasks.answers import whole_rows
from megaswift.tasks.task import RunModel, look
from megaswift.training.context import context_share

NO_TOKEN = -1  # stands on padding


class LogProbs:
    """Looks at rollouts as training does, in the same micro batches; every rank of the world calls it alike."""

    def __init__(
        self, settings: BatchSettings, meta: ModelMeta, layout: Layout, *, pad_id: int, run_model: RunModel
    ) -> None:
        """`settings` are those of the batches of a step, `meta` the facts of the models."""
        self._settings, self._moe, self._layout = settings, meta.moe, layout
        self._pad_id, self._run_model, self._share = pad_id, run_model, context_share(layout)

    def of(self, rollout: Rollout, chunks: Sequence[Any]) -> np.ndarray:
        """Return the log-probability of every completion's tokens, float32 [T]; what the rollout holds of experts is replayed."""
        parts = rollout.parts(self._settings.global_batch_size)
        return np.concatenate([self._of_a_step(part, chunks) for part in parts])

    def with_experts(self, rollout: Rollout, chunks: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Return the log-probabilities, and the experts that the routers chose, uint8 or int16 [T, L, K]."""
        logps, experts = [], []
        for part in rollout.parts(self._settings.global_batch_size):
            seen: dict[int, list[torch.Tensor]] = {}
            with ExitStack() as stack:
                for chunk in chunks:
                    seen |= stack.enter_context(unwrap_model(chunk).replay.recording())
                logps.append(self._of_a_step(part, chunks))
            experts.append(self._experts_of_a_step(part, chunks, seen))
        return np.concatenate(logps), np.concatenate(experts)

    def _of_a_step(self, rollout: Rollout, chunks: Sequence[Any]) -> np.ndarray:
        batches = self._batches(rollout, pad_id=self._pad_id)
        table_T = torch.zeros(len(rollout.input_ids), device=next(chunks[0].parameters()).device)
        counts = (
            parallel_state.get_tensor_model_parallel_rank() == 0
            and parallel_state.get_context_parallel_rank() == 0
        )
        for batch, logps_S in look(chunks, batches, _row_of_logps, run=self._run_model):
            for number, begin in zip(
                batch.sample_ids if counts else (), batch.cu_seqlens.tolist(), strict=False
            ):
                first, last = rollout.starts[number] + 1, rollout.starts[number + 1]
                table_T[first:last] = logps_S[begin : begin + last - first]
        dist.all_reduce(table_T)
        return table_T.cpu().numpy()

    def _experts_of_a_step(
        self, rollout: Rollout, chunks: Sequence[Any], seen: dict[int, list[torch.Tensor]]
    ) -> np.ndarray:
        """Return what the routers of all ranks chose [T, L, K], given what those of this rank did, by layer and micro batch.

        What moves: the experts of one layer after the other, once around the world.
        """
        assert self._moe is not None, "checked by config/rollout_rules.py"
        device = next(chunks[0].parameters()).device
        numbered = replace(rollout, input_ids=np.arange(len(rollout.input_ids)))
        parallel = self._layout.sequence_parallel
        places = [
            tokens_of_rank(batch.input_ids, sequence_parallel=parallel).to(device)
            for batch in self._batches(numbered, pad_id=NO_TOKEN)
        ]
        shape = (len(rollout.input_ids), sum(self._moe.layer_is_moe), self._moe.topk)
        found_TLK = np.empty(shape, expert_dtype(self._moe))
        for layer in range(found_TLK.shape[1]):
            table_TK = torch.zeros(found_TLK[:, 0].shape, dtype=torch.int32, device=device)
            if layer in seen:
                for places_T, chosen_TK in zip(places, seen[layer], strict=True):
                    is_text_T = places_T != NO_TOKEN
                    table_TK[places_T[is_text_T]] = chosen_TK[is_text_T].int()
            # The tp ranks without sequence parallelism all know the same.
            dist.all_reduce(table_TK, op=dist.ReduceOp.MAX)
            found_TLK[:, layer] = table_TK.cpu().numpy()
        return found_TLK

    def _batches(self, rollout: Rollout, *, pad_id: int) -> list[MicroBatch]:
        dp_rank = parallel_state.get_data_parallel_rank()
        whole = rollout.micro_batches(self._settings, dp_rank=dp_rank, dp=self._layout.dp, pad_id=pad_id)
        return list(whole if self._share is None else map(self._share, whole))


def _row_of_logps(batch: MicroBatch, losses_1S: torch.Tensor) -> tuple[MicroBatch, torch.Tensor]:
    return batch, whole_rows(-losses_1S, batch)[0]
