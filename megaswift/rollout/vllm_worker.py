"""What vLLM's workers learn from this project: to take all weights anew, or an adapter (vLLM's argument worker_extension_cls).

vLLM imports this file where its workers are and adds the methods to its own worker class; they are called by name.
"""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megaswift.rollout.engine import ADAPTER, Weights
from megaswift.rollout.weight_stream import receive_bytes, receive_entries, tensors_of

PATIENCE_S = 600.0  # of a worker, for the next parcel: the trainer gathers shards in between
MEMORY = "/dev/shm"


class WeightReceiver:
    """Methods of a worker; `self` is vLLM's own."""

    model_config: Any
    vllm_config: Any
    device: Any

    def megaswift_state(self: Any) -> dict[str, Any]:
        """Return what the trainer must know of this engine."""
        config, lora = self.model_config, self.vllm_config.lora_config
        return {
            "logprobs_mode": config.logprobs_mode,
            "max_model_len": config.max_model_len,
            "max_lora_rank": None if lora is None else lora.max_lora_rank,
        }

    def megaswift_take(self: Any, weights: Weights) -> None:
        """Replace all weights by these."""
        self.reload_weights(weights_iterator=weights)
        if self.device.type == "cpu":
            _pack_heads(self.get_model())

    def megaswift_adapt(self: Any, adapter: str, weights: Weights) -> None:
        """Replace the adapter by the one of these tensors and this adapter_config.json.

        vLLM 0.32 reads adapters from folders only (lora/worker_manager.py): this one is in memory where there is room, and gone at once.
        """
        from vllm.lora.request import LoRARequest  # this module is read where vLLM is not

        tensors = {name: tensor.contiguous().cpu() for name, tensor in weights}
        size = sum(tensor.nbytes for tensor in tensors.values())
        in_memory = os.path.isdir(MEMORY) and shutil.disk_usage(MEMORY).free > 2 * size
        with tempfile.TemporaryDirectory(prefix="megaswift-", dir=MEMORY if in_memory else None) as folder:
            save_file(tensors, os.path.join(folder, "adapter_model.safetensors"))
            Path(folder, "adapter_config.json").write_text(adapter, encoding="utf-8")
            self.add_lora(LoRARequest(ADAPTER, 1, folder, load_inplace=True))

    def megaswift_fetch(self: Any, host: str, port: str, token: str, adapter: str) -> None:
        """Replace all weights, or with adapter_config.json as `adapter` those of the adapter, by what the trainer offers there."""
        from vllm.distributed.parallel_state import get_world_group

        weights = arriving(host, int(port), token, get_world_group(), self.device)
        if adapter:
            self.megaswift_adapt(adapter, weights)
        else:
            self.megaswift_take(weights)


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
