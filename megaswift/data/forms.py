"""What the rows of a task must hold: the documents that a row becomes, and what it says about them."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from megaswift.config.preference import PreferenceConfig
from megaswift.config.reranker import TASK_TYPES as RERANKERS
from megaswift.config.rollout_rules import distils_nothing_else
from megaswift.config.rows import embedding_loss_of, reranker_loss_of
from megaswift.config.run import RunConfig
from megaswift.config.teachers import BY_SET, shares_rows_out, teachers_by_tag
from megaswift.data.channels import channel_of
from megaswift.data.sample import MAX_FLOAT32, Message, RowError, Sample


@dataclass(frozen=True, kw_only=True)
class Form:
    """How rows become documents. The documents of a row stay together in every batch and in every pack."""

    name: str
    documents: Callable[[Sample], tuple[Sample, ...]]  # raises RowError for a row that the task cannot use
    per_row: int  # how many they are, at most
    # What the row says beside its text: one number, or as many for every row; None: nothing.
    target: Callable[[Sample], float | tuple[float, ...] | None]
    asks: bool = False  # documents are prompts that the model is to answer: no token carries loss
    reads: bool = False  # documents are read from their last token: no token carries loss
    channel: Callable[[Sample], str] | None = (
        None  # the part of the data whose loss the row's is counted among
    )


def _itself(sample: Sample) -> tuple[Sample, ...]:
    return (sample,)


def _pair(sample: Sample) -> tuple[Sample, ...]:
    """Return the conversation with the chosen answer, then the one with the rejected answer."""
    if not sample.rejected:
        raise RowError(
            "pair", f"a row of layout {sample.layout} has no rejected answer (rejected, rejected_response)"
        )
    return sample, dataclasses.replace(sample, messages=sample.rejected)


def _of_a_channel(sample: Sample) -> tuple[Sample, ...]:
    channel_of(sample)
    return (sample,)


def _judged(sample: Sample) -> tuple[Sample, ...]:
    if not isinstance(sample.label, bool | int) or sample.label not in (0, 1):
        raise RowError("label", f"label is {sample.label!r}, not true or false")
    return (sample,)


def _prompt(sample: Sample) -> tuple[Sample, ...]:
    """Return the conversation without its answer, if it has one: that is left to the rewards."""
    asked = asked_of(sample.messages)
    if not asked or asked[-1]["role"] == "system":
        raise RowError("no prompt", f"a row of layout {sample.layout} has no turn to answer")
    return (dataclasses.replace(sample, messages=asked),)


def asked_of(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the conversation up to where the assistant has to speak last."""
    asked = [number for number, message in enumerate(messages) if message["role"] != "assistant"]
    return messages[: asked[-1] + 1] if asked else ()


CONVERSATIONS = Form(name="conversations", documents=_itself, per_row=1, target=lambda sample: None)
CHANNELS = dataclasses.replace(
    CONVERSATIONS, name="conversations with channels", documents=_of_a_channel, channel=channel_of
)
PAIRS = Form(name="pairs", documents=_pair, per_row=2, target=lambda sample: sample.margin)
JUDGEMENTS = Form(
    name="judgements",
    documents=_judged,
    per_row=1,
    target=lambda sample: float(sample.label),  # type: ignore[arg-type]  # seen by _judged
)

PROMPTS = Form(name="prompts", documents=_prompt, per_row=1, target=lambda sample: None, asks=True)


def form_of(run: RunConfig) -> Form:
    """Return what the rows of a run must hold."""
    if run.model.task_type == "seq_cls":
        return labelled(run.model.problem, num_labels=run.model.num_labels or 1)
    if run.model.task_type == "embedding":
        is_infonce = embedding_loss_of(run) == "infonce"
        return grouped(run.embedding.infonce_hard_negatives) if is_infonce else COMPARED
    if run.model.task_type in RERANKERS:
        return _ranked_form(run)
    if run.task != "rlhf":
        return CHANNELS if run.training.enable_channel_loss else CONVERSATIONS
    if run.preference.rlhf_type == "gkd":
        # On the answers of rows.
        validates = bool(run.data.val_dataset) or run.data.split_dataset_ratio > 0
        form = PROMPTS if distils_nothing_else(run) and not validates else CONVERSATIONS
    else:
        form = {"kto": JUDGEMENTS, "grpo": PROMPTS}.get(run.preference.rlhf_type, PAIRS)
    return taught(form, run.preference) if shares_rows_out(run.preference) else form


def taught(form: Form, chosen: PreferenceConfig) -> Form:
    """Return the form of rows that several teachers share out: what a row says beside its text is the number of its teacher."""
    key, numbers = chosen.teacher_tag_key, teachers_by_tag(chosen)

    def tag_of(sample: Sample) -> str:
        return sample.dataset if key == BY_SET else str(sample.extras.get(key))

    def documents(sample: Sample) -> tuple[Sample, ...]:
        if tag_of(sample) not in numbers:
            raise RowError("teacher", f"{key} is {tag_of(sample)!r}, and no teacher has this tag")
        return form.documents(sample)

    return dataclasses.replace(
        form,
        name=f"{form.name} with teachers by {key}: {sorted(numbers.items())}",
        documents=documents,
        target=lambda sample: float(numbers[tag_of(sample)]),
    )


def labelled(problem: str, *, num_labels: int) -> Form:
    """Return the form of rows for sequence classification of that problem_type."""
    label_of = partial(LABELS[problem], num_labels=num_labels)

    def documents(sample: Sample) -> tuple[Sample, ...]:
        label_of(sample)
        return (sample,)

    name = f"{problem} of {num_labels}"
    return Form(name=name, documents=documents, per_row=1, target=label_of, reads=True)


def _one_label(sample: Sample, *, num_labels: int) -> float:
    """Return the number of the label."""
    label = sample.label
    if not isinstance(label, bool | int) or not 0 <= label < num_labels:
        raise RowError("label", f"label is {label!r}, not a whole number from 0 to {num_labels - 1}")
    return float(label)


def _several_labels(sample: Sample, *, num_labels: int) -> tuple[float, ...]:
    """Return 1 for every label that holds: from their numbers (ms-swift), or from as many floats as there are labels."""
    label = sample.label if isinstance(sample.label, tuple) else (sample.label,)
    if len(label) == num_labels and all(isinstance(one, float) and 0 <= one <= 1 for one in label):
        return tuple(float(one) for one in label if one is not None)
    if any(not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < num_labels for one in label):
        raise RowError(
            "label",
            f"label is {sample.label!r}, not a list of whole numbers from 0 to {num_labels - 1}, nor one of {num_labels} floats",
        )
    return tuple(float(number in label) for number in range(num_labels))


def _numbers(sample: Sample, *, num_labels: int) -> tuple[float, ...]:
    """Return the numbers to predict."""
    label = sample.label if isinstance(sample.label, tuple) else (sample.label,)
    if len(label) != num_labels or not all(map(_is_number, label)):
        wanted = "a finite number" if num_labels == 1 else f"a list of {num_labels} finite numbers"
        raise RowError("label", f"label is {sample.label!r}, not {wanted}")
    return tuple(float(one) for one in label if one is not None)


def _is_number(value: object) -> bool:
    """Return whether a value is a number that a float32 holds: NaN and infinity make a loss of nothing."""
    return isinstance(value, bool | int | float) and abs(value) <= MAX_FLOAT32


def grouped(negatives: int) -> Form:
    """Return the form of rows for InfoNCE: a text, its positive, and so many negatives."""
    return Form(
        name=f"groups with {negatives} negatives",
        documents=partial(_group, negatives=negatives),
        per_row=2 + negatives,
        target=lambda sample: None,
        reads=True,
    )


def _group(sample: Sample, *, negatives: int) -> tuple[Sample, ...]:
    anchor, positive = _two_texts(sample)
    found = sample.negatives or ((_as_text(sample.rejected),) if sample.rejected else ())
    if bool(found) != bool(negatives):
        raise RowError(
            "group",
            f"the row has {len(found)} negatives, and infonce_hard_negatives={negatives} asks for others",
        )
    chosen = [found[number % len(found)] for number in range(negatives)]
    return anchor, positive, *(dataclasses.replace(sample, messages=turns) for turns in chosen)


def _ranked_form(run: RunConfig) -> Form:
    chosen, is_listwise = run.reranker, reranker_loss_of(run) == "listwise_reranker"
    return ranked(
        positives=chosen.max_positive_samples,
        negatives=chosen.max_negative_samples,
        fewest=chosen.listwise_reranker_min_group_size if is_listwise else 2,
        text=asked_to_judge if run.model.task_type == "generative_reranker" else answered,
    )


def ranked(*, positives: int, negatives: int, fewest: int, text: Callable[[Sample, Message], Sample]) -> Form:
    """Return the form of rows for rerankers: groups of a positive document and up to so many negatives, `fewest` documents at least.

    `text` makes what is read of a query (a sample that ends with it) and a document. The target of a row is how many
    documents each of its groups has; 0: there is no such group.
    """

    def groups(sample: Sample) -> list[list[Sample]]:
        query, good, poor = _query_and_documents(sample)
        if 1 + min(len(poor), negatives) < fewest:
            raise RowError(
                "group", f"the row has {len(poor)} negatives, and a group is {fewest} documents or more"
            )
        return [
            [_read_with(query, turns, text) for turns in (one, *_share(poor, number, negatives))]
            for number, one in enumerate(good[:positives])
        ]

    def sizes(sample: Sample) -> float | tuple[float, ...]:
        found = [float(len(group)) for group in groups(sample)]
        return found[0] if positives == 1 else (*found, *[0.0] * (positives - len(found)))

    return Form(
        name=f"{text.__name__} in {positives} groups of {fewest} to {1 + negatives}",
        documents=lambda sample: tuple(document for group in groups(sample) for document in group),
        per_row=positives * (1 + negatives),
        target=sizes,
        reads=True,
    )


Turns = tuple[Message, ...]


def _share(turns: Sequence[Turns], number: int, count: int) -> list[Turns]:
    """Return what group `number` takes of the negatives: the next ones in turn, none of them twice."""
    return [turns[(number * count + place) % len(turns)] for place in range(min(count, len(turns)))]


def _query_and_documents(sample: Sample) -> tuple[Sample, tuple[Turns, ...], tuple[Turns, ...]]:
    """Return a query with its relevant and its other documents: positive_messages and negative_messages, or two answers."""
    query, good, poor = _as_conversation(sample), sample.positives, sample.negatives
    if not good and sample.rejected:
        query = dataclasses.replace(sample, messages=asked_of(sample.messages))
        good, poor = (
            (talk[len(asked_of(talk)) :],) for talk in (sample.messages, sample.rejected)
        )  # what the assistant says last
    if not good or not poor:
        missing = "negative_messages" if good else "positive_messages"
        raise RowError("group", f"a row of layout {sample.layout} has no {missing}")
    if not query.messages or query.messages[-1]["role"] != "user":
        raise RowError("group", "the query (messages) does not end with a user turn")
    return query, good, poor


def _read_with(query: Sample, document: Turns, text: Callable[[Sample, Message], Sample]) -> Sample:
    """Return what is read of a query and a document, whose own system turn comes before that of the query."""
    own = document[:1] if document and document[0]["role"] == "system" else ()
    turns = document[len(own) :]
    if len(turns) != 1 or not turns[0]["content"].strip():
        raise RowError("group", f"a document has {len(turns)} turns, or no text; it is one turn with text")
    asked = query.messages[query.messages[0]["role"] == "system" :] if own else query.messages
    return text(dataclasses.replace(query, messages=(*own, *asked)), turns[0])


def answered(query: Sample, document: Message) -> Sample:
    """Return a document as the answer to its query."""
    return dataclasses.replace(
        query, messages=(*query.messages, {"role": "assistant", "content": document["content"]})
    )


# How Qwen3-Reranker is asked: the model card of Qwen/Qwen3-Reranker-0.6B, and arXiv 2506.05176, section 2.
JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


def asked_to_judge(query: Sample, document: Message) -> Sample:
    """Return the question whether a document is relevant, to be answered at once; a system turn is the instruction."""
    *before, asked = query.messages
    if len(before) > 1 or (before and before[0]["role"] != "system"):
        raise RowError("group", f"the query has {len(query.messages)} turns; it is one user turn")
    instruction = before[0]["content"] if before else INSTRUCTION
    question = f"<Instruct>: {instruction}\n<Query>: {asked['content']}\n<Document>: {document['content']}"
    return dataclasses.replace(
        query,
        messages=({"role": "system", "content": JUDGE}, {"role": "user", "content": question}),
        template_kwargs={"enable_thinking": False, **query.template_kwargs},
    )


def _compared(sample: Sample) -> tuple[Sample, ...]:
    """Return the two texts whose similarity the label gives."""
    if not _is_number(sample.label):
        raise RowError("label", f"label is {sample.label!r}, not the similarity of two texts")
    return _two_texts(sample)


def _two_texts(sample: Sample) -> tuple[Sample, Sample]:
    """Return the text of a row and its positive: positive_messages, or a question's answer (ms-swift's older layout)."""
    sample = _as_conversation(sample)
    if len(sample.positives) == 1:
        return sample, dataclasses.replace(sample, messages=sample.positives[0])
    asked = asked_of(sample.messages)
    if sample.positives or not asked or len(asked) == len(sample.messages):
        raise RowError(
            "group", f"a row of layout {sample.layout} has {len(sample.positives)} positive_messages, not one"
        )
    return (
        dataclasses.replace(sample, messages=asked),
        dataclasses.replace(sample, messages=_as_text(sample.messages)),
    )


def _as_conversation(sample: Sample) -> Sample:
    """Return a sample with a text of its own as what the user says."""
    if sample.text is None:
        return sample
    return dataclasses.replace(sample, text=None, messages=({"role": "user", "content": sample.text},))


def _as_text(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the last turn as a text of its own."""
    return ({"role": "user", "content": messages[-1]["content"]},)


COMPARED = Form(
    name="compared",
    documents=_compared,
    per_row=2,
    target=lambda sample: float(sample.label),  # type: ignore[arg-type]  # seen by _compared
    reads=True,
)

LABELS: dict[str, Callable[..., float | tuple[float, ...]]] = {
    "single_label_classification": _one_label,
    "multi_label_classification": _several_labels,
    "regression": _numbers,
}
