"""Making room on a device: memory of the trainer, or of a teacher, goes to the host and comes back.

Every tensor keeps its place in its storage, whose bytes are moved: views of a storage, as parameters are of Megatron's buffers, need not
be known.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from megaswift.config.reference import distils
from megaswift.config.run import RunConfig
from megaswift.training.engine import Engine


class CalledIn:
    """Keeps frozen chunks in host memory, on this rank, but for as long as the context lasts that a call returns."""

    def __init__(self, chunks: Sequence[Any], *, stay: Sequence[torch.Tensor] = ()) -> None:
        """`stay` are parameters that are not moved."""
        staying = _storages(stay)
        found = _storages(parameter for chunk in chunks for parameter in chunk.parameters())
        self._storages = [storage for key, storage in found.items() if key not in staying]
        self._host = [_on_host(storage) for storage in self._storages]
        for storage in self._storages:
            storage.resize_(0)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Have the weights on the device."""
        for storage, bytes_ in zip(self._storages, self._host, strict=True):
            storage.resize_(len(bytes_))
            _bytes(storage).copy_(bytes_, non_blocking=True)
        try:
            yield
        finally:
            for storage in self._storages:
                storage.resize_(0)


class SetAside:
    """Keeps the model, the optimizer's state or both in host memory for a while, on this rank."""

    def __init__(self, engine: Engine, others: Sequence[Any] = (), *, model: bool, optimizer: bool) -> None:
        """`others` are chunks of frozen models, which go with the model."""
        self._engine, self._others, self._model, self._optimizer = engine, others, model, optimizer
        self._host: dict[int, torch.Tensor] = {}  # pinned memory is slow to get: it is kept

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Free what is set aside as long as the context lasts; gradients, which nobody needs meanwhile, are zero afterwards."""
        weights = _storages(self._weights())
        grads = _storages(self._grads()) if self._model else {}
        kept = weights if self._model else {}
        if self._optimizer:  # its masters may lie in the model's own memory
            kept |= {key: one for key, one in _storages(self._state()).items() if key not in weights}
        sizes = {key: one.nbytes() for key, one in (kept | grads).items()}
        for key, storage in kept.items():
            self._to_host(key, storage)
        for storage in (kept | grads).values():
            storage.resize_(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the allocator keeps for itself is not there for others
        try:
            yield
        finally:
            for key, storage in (kept | grads).items():
                storage.resize_(sizes[key])
                bytes_ = _bytes(storage)
                if key in kept:
                    bytes_.copy_(self._host[key], non_blocking=True)
                else:
                    bytes_.zero_()

    def _to_host(self, key: int, storage: torch.UntypedStorage) -> None:
        if key in self._host and self._host[key].numel() == storage.nbytes():
            self._host[key].copy_(_bytes(storage))
        else:
            self._host[key] = _on_host(storage)

    def _weights(self) -> Iterator[torch.Tensor]:
        for chunk in (*self._engine.chunks, *self._others):
            yield from chunk.parameters()

    def _grads(self) -> Iterator[torch.Tensor]:
        for chunk in self._engine.chunks:
            yield from (one.grad_data for one in (*chunk.buffers, *chunk.expert_parallel_buffers))

    def _state(self) -> Iterator[torch.Tensor]:
        for one in getattr(self._engine.optimizer, "chained_optimizers", [self._engine.optimizer]):
            if one.optimizer is None:  # nothing of this kind trains on this rank
                continue
            yield from (parameter for group in one.optimizer.param_groups for parameter in group["params"])
            for state in one.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def room_for_authors(
    run: RunConfig, engine: Engine, frozen: Sequence[Any]
) -> Callable[[], AbstractContextManager[None]]:
    """Return what a run sets aside while completions are written: --offload_model, --offload_optimizer."""
    chosen = run.sampler
    if not (chosen.offload_model or chosen.offload_optimizer):
        return nullcontext
    return SetAside(engine, frozen, model=chosen.offload_model, optimizer=chosen.offload_optimizer)


def room_beside_a_teacher(
    run: RunConfig, teacher: Sequence[Any]
) -> Callable[[], AbstractContextManager[None]]:
    """Return what brings a teacher to the device: --offload_teacher_model; it stays there else."""
    if not run.preference.offload_teacher_model:
        return nullcontext
    last = teacher[-1]  # gkd forms its logits micro batch by micro batch
    return CalledIn(teacher, stay=[last.output_weight] if distils(run) and last.post_process else [])


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    """Return the memory of plain tensors by its address among storages; those whose memory is not torch's own stay."""
    plain = (
        one.data for one in tensors if type(one.data) is torch.Tensor
    )  # FP8 weights are of a class of their own
    storages = (one.untyped_storage() for one in plain)
    return {one._cdata: one for one in storages if one.nbytes() and one.resizable()}


def _on_host(storage: torch.UntypedStorage) -> torch.Tensor:
    """Return a copy of memory, from which a device can fetch it while it computes."""
    bytes_ = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
    return bytes_.copy_(_bytes(storage))


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
