"""Who writes completions: a model in shards, through an engine that is handed its weights.

A generation: the engine (rollout/engine.py) gets the weights out of the shards (training/sender.py) and answers prompts; ranks
that ask it may judge the answers at once, and then every rank has all of them. With the model itself as engine, or servers, one
rank of each copy of the model does so, also of copies that share out sequences in training; with vLLM in the ranks all do.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megaswift.checkpoint.store import Checkpoint
from megaswift.config.run import RunConfig
from megaswift.config.vllm_rules import server_urls
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.agreement import agree
from megaswift.parallel.layout import Layout
from megaswift.rollout.engine import Answer, Prompt, RolloutEngine, Sampling, Seat, Weights
from megaswift.rollout.generate import EmbeddedEngine
from megaswift.rollout.vllm_colocated import ColocatedEngine
from megaswift.rollout.vllm_server import ServedEngine
from megaswift.training.reporters import JsonLines
from megaswift.training.sender import Sender, rank_of_adapters

T = TypeVar("T")
Complete = Callable[[Sequence[Prompt], Sampling], list[Answer]]
# (places among all prompts, their prompts, what completes prompts, how) -> an answer for each
Lead = Callable[[Sequence[int], Sequence[Prompt], Complete, Sampling], Sequence[Any]]
COMPLETIONS = "completions.jsonl"  # below the run's folder


def complete_once(
    places: Sequence[int], prompts: Sequence[Prompt], complete: Complete, sampling: Sampling
) -> list[Answer]:
    """Return what is written for prompts that are not talked about any further."""
    return complete(prompts, sampling)


class Author:
    """Writes completions of prompts; every rank of the world calls it alike."""

    def __init__(
        self,
        run: RunConfig,
        meta: ModelMeta,
        layout: Layout,
        chunks: Sequence[Any],
        *,
        stop_ids: tuple[int, ...],
        pad_id: int,
        group: Any,
        aside: Callable[[], AbstractContextManager[None]] = nullcontext,
        served: RolloutEngine | None = None,
    ) -> None:
        """`chunks` are this rank's part of the model that writes, `meta` its facts; `group` holds all ranks and is patient.

        `aside` holds as long as completions are written, once the engine has the weights. Is `served` given, it writes, with
        weights of its own; one rank of each copy of `chunks` asks it.
        """
        self._aside = aside
        self._run, self._meta, self._layout, self._chunks, self._group = run, meta, layout, chunks, group
        chosen = run.rollout
        self.sampling = Sampling(
            temperature=chosen.temperature,
            top_p=chosen.top_p,
            top_k=chosen.top_k,
            max_tokens=chosen.max_completion_length,
            stop_ids=stop_ids,
            repetition_penalty=chosen.repetition_penalty,
        )
        self._pad_id = pad_id
        self._holders: Any = None
        if served is None:
            self.seat, self._holders = _place(run, layout)
        else:
            self.seat = _seat_of_copy(layout)
        self._engine = agree(self._start_engine, group=group) if served is None else served
        # Rank 0 has a hold of each engine that adapts, and every rank takes part in what it is sent.
        adapts = [served is None and self._engine.adapts]
        dist.broadcast_object_list(adapts, group=group)
        self._sender = Sender(
            run, meta, layout, chunks, holders=self._holders, keeps=self.seat.loads, adapts=adapts[0]
        )

    def _start_engine(self) -> RolloutEngine:
        """Return this rank's hold of an engine; every rank calls it, as some engines span ranks."""
        run, sampler, trust = self._run, self._run.sampler, self._run.model.trust_remote_code
        tells = run.rollout.router_replay_mode == "R3"
        lora_rank = rank_of_adapters(run, self._meta, self._layout, self._chunks)
        if sampler.use_vllm and sampler.vllm_mode == "server" and self.seat.answers:
            return ServedEngine(
                server_urls(sampler),
                timeout_s=sampler.vllm_server_timeout,
                room=run.data.max_length,
                weights_port=sampler.vllm_server_group_port,
                lora_rank=lora_rank,
            )
        if sampler.use_vllm and sampler.vllm_mode == "colocate":
            with torch.random.fork_rng(devices=self._devices):
                return ColocatedEngine(
                    self._meta,
                    run.vllm,
                    sampler,
                    dtype=str(run.model.torch_dtype or self._meta.dtype),
                    local_rank=self._device.index or 0,
                    trust_remote_code=trust,
                    tells_experts=tells,
                    lora_rank=lora_rank,
                )
        return EmbeddedEngine(self._meta, pad_id=self._pad_id, trust_remote_code=trust, tells_experts=tells)

    def write(
        self,
        prompts: Sequence[Prompt],
        judge: Callable[[Sequence[int], Sequence[Any]], list[T]],
        *,
        together: int = 1,
        lead: Lead = complete_once,
    ) -> list[T]:
        """Return what `judge` makes of the completions, one for each prompt and in their order. Raises UserError.

        `judge` gets places among the prompts and what was written for them, once on some rank for every place; prompts come to
        it in whole groups of `together` that follow each other. `lead` asks the engine, on every rank that does so, maybe several
        times for a place.
        """
        for adapter, weights in self._sender.parcels():
            agree(partial(self._load, weights, adapter), group=self._group)
        places = [
            place
            for first in range(self.seat.number * together, len(prompts), self.seat.of * together)
            for place in range(first, first + together)
        ]
        with self._aside():
            mine = agree(lambda: self._share(prompts, places, judge, lead), group=self._group)
        shares: list[list[tuple[int, T]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(shares, mine, group=self._group)
        found = dict(one for share in shares for one in share)
        return [found[place] for place in range(len(prompts))]

    def _load(self, weights: Weights, adapter: str | None) -> None:
        try:
            if self.seat.loads:
                with torch.random.fork_rng(devices=self._devices):  # dropout must stay alike on all tp ranks
                    self._engine.load(weights, adapter)
        finally:
            for _ in weights:  # the other ranks of the group send and listen too
                pass

    def _share(
        self,
        prompts: Sequence[Prompt],
        places: list[int],
        judge: Callable[[Sequence[int], Sequence[Any]], list[T]],
        lead: Lead,
    ) -> list[tuple[int, T]]:
        if not self.seat.answers:
            return []
        answers: Sequence[Any] = []
        with torch.random.fork_rng(devices=self._devices):
            if places:
                own = [prompts[place] for place in places]
                answers = lead(places, own, self._engine.complete, self.sampling)
            self._engine.rest()
        if not self.seat.reports or not places:
            return []
        return list(zip(places, judge(places, answers), strict=True))

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self._chunks[0].parameters()).device
        return device

    @property
    def _devices(self) -> list[torch.device]:
        """Those with a random state beside the CPU's."""
        return [self._device] if self._device.type == "cuda" else []


def _place(run: RunConfig, layout: Layout) -> tuple[Seat, Any]:
    """Return what this rank does when completions are generated, and the group that gathers weights with it, if one does."""
    # Experts may lie on ranks of other data-parallel copies: then all ranks send, and every copy listens.
    spread = layout.ep * layout.etp > 1
    holders = dist.group.WORLD if spread else parallel_state.get_model_parallel_group()
    seat = _seat_of_copy(layout)
    rank, size = dist.get_rank(), run.vllm.vllm_tensor_parallel_size
    if not run.sampler.use_vllm:
        return replace(seat, loads=seat.answers), holders
    if (
        run.sampler.vllm_mode == "server"
    ):  # rank 0 sends weights to all servers; a rank of each copy asks them
        return replace(seat, loads=rank == 0), holders if 0 in dist.get_process_group_ranks(holders) else None
    number, engines = rank // size, layout.world // size
    return Seat(number=number, of=engines, loads=True, answers=True, reports=rank % size == 0), holders


def _seat_of_copy(layout: Layout) -> Seat:
    """Return what this rank does where one rank of each copy of the model asks an engine that has its weights."""
    first = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    ) == (0, 0)
    copy, copies = parallel_state.get_data_parallel_rank(with_context_parallel=True), layout.dp * layout.cp
    return Seat(number=copy, of=copies, loads=False, answers=first, reports=first)


def completions_table(run: RunConfig, checkpoint: Checkpoint | None) -> JsonLines | None:
    """Return where completions are written: nowhere unless asked, and on rank 0 alone."""
    if not run.rollout.log_completions or dist.get_rank() != 0:
        return None
    done = 0 if checkpoint is None else checkpoint.manifest.step
    return JsonLines(Path(run.checkpoint.output_dir), resumed_step=done, name=COMPLETIONS)


def stop_ids_of(meta: ModelMeta, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens at which a completion ends."""
    eos = tokenizer.eos_token_id
    return tuple(sorted({*meta.eos_token_ids, *([] if eos is None else [eos])}))
