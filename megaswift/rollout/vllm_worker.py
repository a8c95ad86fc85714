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
MEMORY, AT_ONCE = "/dev/shm", 16  # ranks of a machine, twice


class WeightReceiver:
    """Methods of a worker; `self` is vLLM's own."""

    model_config: Any
    vllm_config: Any
    device: Any
    megaswift_owner: str | None
    megaswift_folder: str | None

    def megaswift_state(self: Any) -> dict[str, Any]:
        """Return what the trainer must know of this engine; a server lets adapters change only if it was told to."""
        config, lora = self.model_config, self.vllm_config.lora_config
        changes = os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") == "1"
        return {
            "logprobs_mode": config.logprobs_mode,
            "max_model_len": config.max_model_len,
            "max_lora_rank": lora.max_lora_rank if lora is not None and changes else None,
            "owner": getattr(self, "megaswift_owner", None),
        }

    def megaswift_take(self: Any, weights: Weights) -> None:
        """Replace all weights by these."""
        self.reload_weights(weights_iterator=weights)
        if self.device.type == "cpu":
            _pack_heads(self.get_model())

    def megaswift_adapt(self: Any, adapter: str, weights: Weights) -> None:
        """Replace the adapter by the one of these tensors and this adapter_config.json."""
        from vllm.lora.request import LoRARequest  # this module is read where vLLM is not

        folder = adapter_folder(adapter, weights)
        try:
            self.add_lora(LoRARequest(ADAPTER, 1, folder, load_inplace=True))
        finally:
            shutil.rmtree(folder)

    def megaswift_fetch(
        self: Any, host: str, port: str, token: str, owner: str, adapter: str
    ) -> str | None:
        """Take what the trainer offers there: all weights, which are the `owner`'s then, or with adapter_config.json as `adapter` those.

        An adapter waits in a folder until it is read and forgotten, whose path the first worker returns.
        """
        from vllm.distributed.parallel_state import get_world_group

        group = get_world_group()
        weights = arriving(host, int(port), token, group, self.device)
        if not adapter:
            self.megaswift_take(weights)
            self.megaswift_owner = owner
            return None
        if group.rank_in_group > 0:
            for _ in weights:
                pass
            return None
        self.megaswift_forget()
        self.megaswift_folder = adapter_folder(adapter, weights)
        return str(self.megaswift_folder)

    def megaswift_forget(self: Any) -> None:
        """Remove the folder of the adapter that came last, if there is one."""
        folder = getattr(self, "megaswift_folder", None)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            self.megaswift_folder = None


def adapter_folder(adapter: str, weights: Weights) -> str:
    """Write a PEFT folder, in memory where there is room: vLLM 0.32 reads adapters from folders only (lora/worker_manager.py)."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in weights}
    size = sum(tensor.nbytes for tensor in tensors.values())
    # Every rank of a trainer writes its own at once, and an older one may be mapped still.
    has_room = os.path.isdir(MEMORY) and shutil.disk_usage(MEMORY).free > AT_ONCE * size
    folder = tempfile.mkdtemp(prefix="megaswift-", dir=MEMORY if has_room else None)
    save_file(tensors, os.path.join(folder, "adapter_model.safetensors"))
    Path(folder, "adapter_config.json").write_text(adapter, encoding="utf-8")
    return folder


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
