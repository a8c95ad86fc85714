"""What teachers behind HTTP find likeliest, for the micro batches of one step, or what they think of completions.

Of micro batches the ranks of a last pipeline stage that hold the same batch (tp x cp) deal its documents out, each asks about its
own over HTTP, and a sum brings them together: a document is asked about once for each time that it is learnt from. cp ranks take
their parts of what was said as of everything else (data/context.py).

Letters: B batch, S sequence, K likeliest tokens.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megaswift.config.run import RunConfig
from megaswift.config.teachers import teacher_servers
from megaswift.data.batches import MicroBatch, places_of
from megaswift.data.tokenizer import load_tokenizer
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.agreement import agree
from megaswift.rollout.rollout import Completions
from megaswift.rollout.vllm_teacher import READ_AT_ONCE, LikeliestTokens, ServedTeacher


@dataclass(frozen=True, kw_only=True)
class _Document:
    batch: int  # number of its micro batch
    begin: int  # of its tokens among those of all rows
    ids: np.ndarray
    teacher: int


class Teachers:
    """Teachers who are asked by number; every rank of the world calls it alike."""

    def __init__(
        self, servers: Sequence[ServedTeacher], *, top_k: int | None, device: torch.device, group: Any
    ) -> None:
        """`group` holds all ranks and is patient; what ranks tell each other of answers goes over their own groups, by `device`."""
        self.servers = list(servers)
        self._top_k, self._device, self._patient = top_k, device, group

    def teach(self, batches: list[MicroBatch]) -> list[MicroBatch]:
        """Return whole micro batches with what the teachers say, on the last stage. Raises UserError."""
        listens = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        group = parallel_state.get_tensor_and_context_parallel_group()
        documents = [] if not listens else list(_documents(batches))[dist.get_rank(group) :: group.size()]
        told = agree(partial(self._ask, documents), group=self._patient)
        if not listens:
            return batches
        assert self._top_k is not None, "config/teacher_rules.py"
        tables = [
            (
                torch.zeros(*batch.input_ids.shape, self._top_k, dtype=torch.int32),
                torch.zeros(*batch.input_ids.shape, self._top_k),
            )
            for batch in batches
        ]
        for document, said in zip(documents, told, strict=True):
            for table, values in zip(tables[document.batch], (said.ids, said.logps), strict=True):
                table.flatten(0, 1)[document.begin : document.begin + len(values)] = torch.from_numpy(values)
        return [
            replace(batch, teacher_ids=self._sum(ids, group), teacher_logps=self._sum(logps, group))
            for batch, (ids, logps) in zip(batches, tables, strict=True)
        ]

    def logps(self, completions: Completions) -> np.ndarray:
        """Return the log-probability of every completion's tokens, float32 [T], 0 in prompts. Raises UserError."""
        starts, mine = completions.starts, range(dist.get_rank(), len(completions), dist.get_world_size())

        def read(number: int) -> np.ndarray:
            teacher = 0 if completions.targets is None else int(completions.targets[number])
            return self.servers[teacher].read(completions.input_ids[starts[number] : starts[number + 1]])

        def ask() -> list[np.ndarray]:
            with ThreadPoolExecutor(READ_AT_ONCE) as pool:
                return list(pool.map(read, mine))

        table_T = torch.zeros(len(completions.input_ids))
        for number, told in zip(mine, agree(ask, group=self._patient), strict=True):
            first, last = starts[number] + completions.prompt_lengths[number], starts[number + 1]
            table_T[first:last] = torch.from_numpy(told[len(told) - (last - first) :])
        dist.all_reduce(table_T, group=self._patient)
        return table_T.numpy()

    def _ask(self, documents: list[_Document]) -> list[LikeliestTokens]:
        with ThreadPoolExecutor(READ_AT_ONCE) as pool:
            return list(pool.map(lambda one: self.servers[one.teacher].likeliest(one.ids), documents))

    def _sum(self, table_BSK: torch.Tensor, group: Any) -> torch.Tensor:
        if group.size() == 1:
            return table_BSK
        table_BSK = table_BSK.to(self._device)
        dist.all_reduce(table_BSK, group=group)
        return table_BSK.cpu()


def _documents(batches: Sequence[MicroBatch]) -> Iterator[_Document]:
    """Yield the documents that carry loss."""
    for number, batch in enumerate(batches):
        ids, carries_loss = batch.input_ids.flatten().numpy(), batch.loss_mask.flatten().numpy() != 0
        for place, whole in enumerate(places_of(batch)):
            if carries_loss[whole].any():
                teacher = 0 if batch.targets is None else int(batch.targets[place])
                yield _Document(batch=number, begin=whole.start, ids=ids[whole], teacher=teacher)


def start_teachers(run: RunConfig, meta: ModelMeta, *, device: torch.device, group: Any) -> Teachers | None:
    """Return the teachers of a resolved run once they are up, if they are behind HTTP. Every rank calls it; raises UserError."""
    chosen = run.preference
    servers = teacher_servers(chosen)
    if not servers:
        return None
    top_k = None if chosen.gkd_logits_topk is None else min(chosen.gkd_logits_topk, meta.vocab_size)

    def wait() -> list[ServedTeacher]:
        tokenizer = load_tokenizer(str(meta.folder), trust_remote_code=run.model.trust_remote_code)
        return [
            ServedTeacher(
                server.url,
                top_k=top_k,
                vocab_size=meta.vocab_size,
                decode=tokenizer.decode,
                room=run.data.max_length,
                timeout_s=run.sampler.vllm_server_timeout,
            )
            for server in servers
        ]

    return Teachers(agree(wait, group=group), top_k=top_k, device=device, group=group)
