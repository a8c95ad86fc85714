"""What vLLM's workers learn from this project: to take all weights anew (vLLM's argument worker_extension_cls).

vLLM imports this file where its workers are and adds the methods to its own worker class; they are called by name.
"""

import socket
from collections.abc import Iterator
from typing import Any

import torch

from megaswift.rollout.engine import Weights
from megaswift.rollout.weight_stream import receive_bytes, receive_entries, tensors_of

PATIENCE_S = 600.0  # of a worker, for the next parcel: the trainer gathers shards in between


class WeightReceiver:
    """Methods of a worker; `self` is vLLM's own."""

    model_config: Any
    device: Any

    def megaswift_state(self: Any) -> dict[str, Any]:
        """Return what the trainer must know of this engine."""
        config = self.model_config
        return {"logprobs_mode": config.logprobs_mode, "max_model_len": config.max_model_len}

    def megaswift_take(self: Any, weights: Weights) -> None:
        """Replace all weights by these."""
        self.reload_weights(weights_iterator=weights)
        if self.device.type == "cpu":
            _pack_heads(self.get_model())

    def megaswift_fetch(self: Any, host: str, port: str, token: str) -> None:
        """Replace all weights by those that the trainer offers there."""
        from vllm.distributed.parallel_state import get_world_group  # this module is read where vLLM is not

        self.megaswift_take(arriving(host, int(port), token, get_world_group(), self.device))


def _pack_heads(model: torch.nn.Module) -> None:
    """Pack output layers for the CPU once more: vLLM 0.32 forgets those that share the embedding's weight when it reloads.

    (model_executor/model_loader/reload/layerwise.py puts back what it had for a layer that the weights do not name.)
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def arriving(host: str, port: int, token: str, group: Any, device: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors as they come: the first worker of an engine reads them and tells the others, which all call it alike."""
    first, alone = group.rank_in_group == 0, group.world_size == 1
    connection = None
    if first:
        connection = socket.create_connection((host, port), timeout=PATIENCE_S)
        connection.sendall(token.encode())
    while True:
        failure: Exception | None = None
        entries: Any = None
        data = torch.empty(0, dtype=torch.uint8)
        if connection is not None:
            try:
                entries = receive_entries(connection)
                data = receive_bytes(connection, entries)
            except (OSError, KeyError, ValueError) as error:
                failure, entries = error, None
        if not alone:
            entries = group.broadcast_object(entries, src=0)
        if entries is None:
            raise failure or ConnectionError("the first worker has lost the trainer")
        if not entries:
            break
        data = data.to(device) if first else torch.empty(_size(entries), dtype=torch.uint8, device=device)
        if not alone:
            data = group.broadcast(data, src=0)
        yield from tensors_of(entries, data)
    if connection is not None:
        connection.close()


def _size(entries: Any) -> int:
    return sum(one.size for one in entries)
