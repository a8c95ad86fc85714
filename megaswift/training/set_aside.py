"""Making room on a device for those who write completions: the trainer's memory goes to the host and comes back.

Every tensor keeps its place in its storage, whose bytes are moved: views of a storage, as parameters are of Megatron's buffers, need not
be known.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from megaswift.config.run import RunConfig
from megaswift.training.engine import Engine


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
        if key not in self._host or self._host[key].numel() != storage.nbytes():
            on_device = storage.device.type == "cuda"
            self._host[key] = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=on_device)
        self._host[key].copy_(_bytes(storage))

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


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    """Return the memory of plain tensors by its address among storages; those whose memory is not torch's own stay."""
    plain = (
        one.data for one in tensors if type(one.data) is torch.Tensor
    )  # FP8 weights are of a class of their own
    storages = (one.untyped_storage() for one in plain)
    return {one._cdata: one for one in storages if one.nbytes() and one.resizable()}


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
