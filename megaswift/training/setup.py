"""The parts of a run, made in order: folder, data, model, and what is saved of them."""

import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megaswift.checkpoint.save import Writer
from megaswift.config.precision import token_multiple
from megaswift.config.rollout_rules import distils_completions, distils_nothing_else, generates
from megaswift.config.run import RunConfig
from megaswift.converters.adapters import save_peft
from megaswift.converters.export import export_hf
from megaswift.converters.lora_targets import whole_tensors
from megaswift.converters.new_tokens import read_with_new_tokens
from megaswift.converters.selection import drawn_elements, elements_of, trained_elements
from megaswift.data.batches import BatchSettings, MicroBatch, TrainData, ValidationData
from megaswift.data.chatml import added_chat_template
from megaswift.data.encode import EncodedSet
from megaswift.data.forms import form_of
from megaswift.data.load import load_data, with_prompts
from megaswift.data.mismatched import mismatched_answers
from megaswift.data.prompt_set import PromptSet
from megaswift.data.prompts import PromptRows, save_rows
from megaswift.data.questions import Questions, questions_of
from megaswift.data.stream_batches import StreamData
from megaswift.data.template import Template
from megaswift.data.tokenizer import load_tokenizer, pad_id_of
from megaswift.errors import CheckpointError, DataError
from megaswift.logs import get_logger
from megaswift.metadata.meta import ModelMeta
from megaswift.models.lora import resolve_targets
from megaswift.parallel.agreement import agree, agree_on_first
from megaswift.parallel.context import pad_multiple
from megaswift.parallel.layout import Layout
from megaswift.training.flops import StepCost, step_cost
from megaswift.training.reference import References

logger = get_logger(__name__)

TOKENISED = ".tokenised"  # where rank 0 leaves the token ids for the ranks beside it
QUESTIONS, HELD_BACK = "questions", "held_back"  # below that


@dataclass(frozen=True, kw_only=True)
class Sets:
    """The training stream and the validation set."""

    train: TrainData | StreamData
    val: ValidationData | None
    lengths: np.ndarray  # tokens of every training entry; of a stream, of those in its first window
    num_items: int  # that hold these entries
    settings: BatchSettings  # of batches of samples, or of completions where the samples are prompts
    pad_id: int
    rows: PromptRows | None = None  # behind the prompts
    held_back: PromptSet | None = None  # prompts whose completions are rewarded at validations
    prompts: EncodedSet | None = (
        None  # of the training entries, where some steps are on completions of theirs
    )
    questions: Questions | None = None  # of the validation rows, where the model answers them


def share_folder(output_dir: Path) -> None:
    """Create the folder and check that every rank sees what rank 0 writes there; every rank calls it."""

    def leave_mark() -> Path:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            mark = output_dir / f".seen-{uuid.uuid4().hex}"
            mark.touch()
        except OSError as error:
            raise CheckpointError(
                f"output_dir={output_dir} cannot be written: {error.strerror}. Choose a folder that can."
            ) from error
        return mark

    def look(mark: Path) -> None:
        if not mark.exists():
            raise CheckpointError(
                f"output_dir={output_dir} is not shared: rank {dist.get_rank()} does not see what rank 0 writes there. "
                "Choose a folder on a file system that all nodes mount."
            )

    mark = agree_on_first(leave_mark)
    agree(lambda: look(mark))
    if dist.get_rank() == 0:
        mark.unlink()


def model_folder(run: RunConfig, *, group: Any) -> str | Path:
    """Return what is read as the model: --model, or the folder that adds new tokens to it. Every rank calls it, and waits in `group`."""
    assert run.model.model is not None, "checked by config/rules.py"
    if not run.model.new_special_tokens:
        return run.model.model
    output_dir = Path(run.checkpoint.output_dir)
    share_folder(output_dir)
    return agree_on_first(lambda: read_with_new_tokens(run.model, output_dir), group=group)


def load_sets(
    run: RunConfig,
    meta: ModelMeta,
    layout: Layout,
    *,
    output_dir: Path,
    group: Any,
) -> Sets:
    """Tokenise on rank 0 alone and open the result on every rank; every rank calls it, waiting in the patient `group`."""
    assert meta.folder is not None and run.training.global_batch_size is not None, "resolved"
    folder, form = output_dir / TOKENISED, form_of(run)
    tokenizer = agree(lambda: load_tokenizer(str(meta.folder), trust_remote_code=run.model.trust_remote_code))

    def encode() -> dict[str, str]:
        data = load_data(
            run.data,
            tokenizer,
            max_length=_room(run) if form.asks else run.data.max_length,
            seed=run.training.seed,
            use_hf=run.model.use_hf,
            stop_ids=meta.eos_token_ids,
            form=form,
        )
        completes, predicts = distils_completions(run), run.logging.predict_with_generate
        if generates(run) or completes or predicts:
            if data.read is None:
                raise DataError(
                    f"dataset={' '.join(run.data.dataset)} is prepared, and completions need the rows themselves. Give those, and no "
                    "--prepared_dir."
                )
            template = Template.from_config(
                run.data, tokenizer, max_length=_room(run), stop_ids=meta.eos_token_ids
            )
            if predicts:
                questions_of(data.read.val, template, run.data).save(folder / QUESTIONS)
            else:
                save_rows(folder, data.read.train)
                save_rows(folder / HELD_BACK, data.read.val)
        estimates_kl = (
            run.task == "rlhf" and run.preference.rlhf_type == "kto" and run.preference.calculate_kl
        )
        if data.prepared is not None and not estimates_kl:
            return {name: str(place) for name, place in data.prepared.sets.items()}
        sets = {"train": data.train} | ({} if data.val is None else {"val": data.val})
        if completes and not form.asks:
            assert data.read is not None, "seen above"
            sets["train"], sets["prompts"] = with_prompts(data.train, data.read.train, template, run.data)
        for name, encoded in sets.items():
            if estimates_kl:
                others = mismatched_answers(encoded, max_length=run.data.max_length)
                encoded = replace(encoded, mismatched=others, packs=None)  # a pack holds either of the two
            encoded.save(folder / name)
        return {name: str(folder / name) for name in sets}

    places = agree_on_first(encode, group=group)
    settings = batch_settings(run, meta, layout)
    pad_id = pad_id_of(tokenizer)
    encoded = agree(lambda: {name: EncodedSet.load(Path(place)) for name, place in places.items()})

    def form_items() -> Sets:
        if generates(run):
            asked = settings.global_batch_size // run.rollout.num_generations
            of_prompts = replace(settings, global_batch_size=asked, micro_batch_size=1, packing=False)
            prompts = TrainData(encoded["train"], of_prompts, pad_id=pad_id)
            held_back = None
            if "val" in encoded:
                held_back = PromptSet(encoded=encoded["val"], rows=PromptRows(folder / HELD_BACK))
            return Sets(
                train=prompts,
                val=None,
                lengths=encoded["train"].lengths,
                num_items=prompts.num_items,
                settings=settings,
                pad_id=pad_id,
                rows=PromptRows(folder),
                held_back=held_back,
            )
        sets = _sets([encoded[name] for name in ("train", "val") if name in encoded], settings, pad_id=pad_id)
        if run.logging.predict_with_generate:
            return replace(sets, questions=Questions.load(folder / QUESTIONS))
        if not distils_completions(run):
            return sets
        sets = replace(sets, prompts=encoded.get("prompts", encoded["train"]), rows=PromptRows(folder))
        if not distils_nothing_else(run):
            return sets
        rows = TrainData(encoded["train"], replace(settings, packing=False), pad_id=pad_id)
        return replace(sets, train=rows, num_items=rows.num_items)  # not they, but completions are packed

    return agree(form_items)


def batch_settings(run: RunConfig, meta: ModelMeta, layout: Layout) -> BatchSettings:
    """Return how the rows of a resolved run become batches."""
    assert run.training.global_batch_size is not None, "resolved"
    return BatchSettings(
        global_batch_size=run.training.global_batch_size,
        micro_batch_size=run.training.micro_batch_size,
        packing=run.data.packing,
        packing_length=run.data.packing_length,
        padding_free=run.data.padding_free,
        shuffle=run.data.dataset_shuffle,
        group_by_length=run.data.group_by_length,
        token_cost=cost_of(run, meta).token_in_pairs,
        seed=run.training.seed if run.data.data_seed is None else run.data.data_seed,
        pad_to_multiple=token_multiple(run.precision)
        * pad_multiple(cp=layout.cp, tp=layout.tp, sequence_parallel=layout.sequence_parallel),
        round_size=layout.pp if layout.vpp > 1 else 1,
    )


def _sets(encoded: list[EncodedSet], settings: BatchSettings, *, pad_id: int) -> Sets:
    """Return the items of a training set, and of a validation set where there is one."""
    first, *rest = encoded
    train = TrainData(first, settings, pad_id=pad_id)
    return Sets(
        train=train,
        val=ValidationData(rest[0], settings, pad_id=pad_id) if rest else None,
        lengths=first.lengths,
        num_items=train.num_items,
        settings=settings,
        pad_id=pad_id,
    )


def with_references(sets: Sets, references: References) -> Sets:
    """Return the sets with log-probabilities under the reference model; every rank calls it, once the context is placed."""
    assert isinstance(sets.train, TrainData), "refused for streams by config/data_rules.py"
    encoded = [one.encoded for one in (sets.train, sets.val) if one is not None]
    found = references.of(encoded, sets.settings, pad_id=sets.pad_id)
    return agree(lambda: _sets(found, sets.settings, pad_id=sets.pad_id))


def _room(run: RunConfig) -> int | None:
    """Return the tokens that a prompt may have: it leaves room for its completion."""
    longest = run.data.max_length
    return None if longest is None else longest - run.rollout.max_completion_length


def cost_of(run: RunConfig, meta: ModelMeta) -> StepCost:
    """Return the FLOPs of what a run trains."""
    trained = trained_elements(meta, run.freeze) if run.freeze.chooses else None
    if run.tuner.modules_to_save:
        trained = elements_of(meta, whole_tensors(meta, run.tuner))
    if run.lisa.lisa_activated_layers:
        trained = drawn_elements(meta, run.lisa.lisa_activated_layers)
    return step_cost(meta, run.tuner, trained=trained)


def measurer(run: RunConfig, meta: ModelMeta) -> Callable[[MicroBatch], tuple[int, float]]:
    """Return what tells the tokens of a micro batch, padding left out, and its model FLOPs."""
    cost = cost_of(run, meta)

    def measure(batch: MicroBatch) -> tuple[int, float]:
        own = list(batch.lengths)
        return sum(own), cost.of(lengths=own, loss_tokens=int((batch.loss_mask != 0).sum()))

    return measure


def identity_of(run: RunConfig, meta: ModelMeta) -> dict[str, Any]:
    """Return what a run must have in common with the checkpoint that it resumes from."""
    tuner, draws = run.tuner, run.lisa.lisa_activated_layers
    adapters = {
        "lora_rank": tuner.lora_rank,
        "lora_alpha": tuner.lora_alpha,
        "use_rslora": tuner.use_rslora,
        "use_dora": tuner.use_dora,
        "init_weights": tuner.init_weights,
        "quant_bits": tuner.quant_bits,
        "target_modules": list(resolve_targets(tuner.target_modules)),
        "target_regex": tuner.target_regex,
        "modules_to_save": tuner.modules_to_save,
    }
    subspace = {
        name: getattr(run.optimizer, name)
        for name in ("galore_rank", "galore_proj_type", "galore_quantization")
    }
    return {
        "model_type": meta.model_type,
        "new_special_tokens": run.model.new_special_tokens,
        "num_layers": meta.num_layers,
        "hidden_size": meta.hidden_size,
        "vocab_size": meta.vocab_size,
        "torch_dtype": run.model.torch_dtype,
        "optimizer": run.optimizer.optimizer.removeprefix("dist_"),  # the same state, kept elsewhere
        "use_galore": run.optimizer.use_galore,
        **(subspace if run.optimizer.use_galore else {}),
        "tuner_type": tuner.tuner_type,
        "streaming": run.data.streaming,
        "group_by_length": run.data.group_by_length,
        **({} if meta.scores is None else {"scores": meta.scores}),
        **(adapters if tuner.tuner_type == "lora" else asdict(run.freeze)),
        "lisa_activated_layers": draws,
        **({"lisa_step_interval": run.lisa.lisa_step_interval, "seed": run.training.seed} if draws else {}),
    }


def export_writers(
    run: RunConfig, meta: ModelMeta, layout: Layout, chunks: list[Any], *, dtype: str
) -> dict[str, Writer]:
    """Return what writes the exports of a checkpoint: "hf" or "adapter", and "merged" where asked."""
    if not run.checkpoint.save_safetensors:
        return {}
    rank, size = dist.get_rank(), run.checkpoint.max_shard_size

    template = added_chat_template(run, meta) if rank == 0 else None

    def model(folder: Path, *, merge_lora: bool = False) -> None:
        export_hf(
            chunks,
            meta,
            layout,
            rank,
            folder,
            dtype=dtype,
            max_shard_size=size,
            merge_lora=merge_lora,
            chat_template=template,
        )

    def adapter(folder: Path) -> None:
        base = run.model.model
        tokens = bool(run.model.new_special_tokens)
        save_peft(
            chunks,
            meta,
            layout,
            rank,
            folder,
            tuner=run.tuner,
            dtype=dtype,
            base_model=base,
            with_tokenizer=tokens,
        )

    if run.tuner.tuner_type == "full":
        return {"hf": model}
    return {
        "adapter": adapter,
        **({"merged": partial(model, merge_lora=True)} if run.tuner.merge_lora else {}),
    }
