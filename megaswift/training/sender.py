"""What an engine is sent before it writes completions: the merged model, or the base model once and then the adapters alone."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist

from megaswift.config.run import RunConfig
from megaswift.config.vllm_rules import check_adapter, what_vllm_does_not_adapt
from megaswift.converters.adapter_rows import adapted_tensors, config_json
from megaswift.converters.gather import stream_adapters, stream_model
from megaswift.converters.live import TORCH_DTYPES, live_parameters
from megaswift.converters.output_folder import gathered
from megaswift.converters.tensor_files import DTYPE_NAMES
from megaswift.metadata.meta import ModelMeta
from megaswift.models.lora import AdaptedLinear
from megaswift.parallel.layout import Layout
from megaswift.rollout.engine import Weights

Stream = Callable[..., Weights]  # takes group, dtype and keep, as in converters/gather.py


class Sender:
    """Gathers weights out of the shards; every rank of the world calls it alike."""

    def __init__(
        self,
        run: RunConfig,
        meta: ModelMeta,
        layout: Layout,
        chunks: Sequence[Any],
        *,
        holders: Any,
        keeps: bool,
        adapts: bool,
    ) -> None:
        """`holders` is the group that gathers weights with this rank, None if none does; `keeps` says that this rank hands them on.

        With `adapts` the engine holds the base model, and takes adapters.
        """
        self._run, self._meta, self._layout, self._chunks = run, meta, layout, chunks
        self._holders, self._keeps = holders, keeps
        self._adapts, self._has_base = adapts, False

    def parcels(self) -> Iterator[tuple[str | None, Weights]]:
        """Yield what is to be sent, one after the other: the adapter_config.json where it is an adapter, and the tensors."""
        if not self._adapts:
            yield None, self._of(self._model(merge=True))
            return
        if not self._has_base:
            yield None, self._of(self._model(merge=False))
            self._has_base = True
        yield self._adapter()

    def _model(self, *, merge: bool) -> Stream:
        return partial(stream_model, self._chunks, self._meta, self._layout, dist.get_rank(), merge=merge)

    def _adapter(self) -> tuple[str, Weights]:
        rank, tuner = dist.get_rank(), self._run.tuner
        live = live_parameters(self._chunks, self._meta, self._layout, rank=rank)
        adapted = [one for one in live if one.adapted_module is not None]
        pairs = adapted_tensors(adapted, self._meta, self._layout, tuner)
        device = next(self._chunks[0].parameters()).device
        stream = partial(stream_adapters, adapted, self._meta, self._layout, rank, pairs=pairs, device=device)
        return config_json(pairs, tuner, base_model=str(self._meta.folder)), self._of(stream)

    def _of(self, stream: Stream) -> Weights:
        if self._holders is None:
            return iter(())
        dtype = TORCH_DTYPES[DTYPE_NAMES[self._run.model.torch_dtype or self._meta.dtype]]
        return stream(group=self._holders, dtype=dtype, keep=self._keeps)


def rank_of_adapters(run: RunConfig, meta: ModelMeta, layout: Layout, chunks: Sequence[Any]) -> int:
    """Return the greatest rank of the adapters that vLLM may hold beside the base model, 0 for none; every rank of the world calls it.

    Raises ConfigError where it was asked to and cannot, as the settings of a PEFT folder may say.
    """
    sampler = run.sampler
    if not sampler.use_vllm:
        return 0
    if run.vllm.vllm_enable_lora:
        check_adapter(run, meta)
    elif sampler.vllm_mode == "colocate" or what_vllm_does_not_adapt(run, meta) is not None:
        return 0
    modules = [one for chunk in chunks for one in chunk.modules() if isinstance(one, AdaptedLinear)]
    return max(gathered(max((len(one.lora_a()) for one in modules), default=0), world=layout.world))
