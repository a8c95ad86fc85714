"""Samples to token ids and loss weights, with the tokenizer's own chat template.

The ids are those of tokenizer.apply_chat_template(messages); loss weights are 0 outside of what the assistant wrote.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from megaswift.config.data import DataConfig
from megaswift.config.loss_scale import split_loss_scale
from megaswift.data.agent_format import check_agent_format
from megaswift.data.chatml import chatml
from megaswift.data.part_weights import weighted_parts
from megaswift.data.sample import STUMBLES, Message, RowError, Sample, row_error, unicode
from megaswift.data.spans import Span, SpanFinder, drops_thinking
from megaswift.data.tokenizer import TextEncoder
from megaswift.errors import DataError
from megaswift.logs import get_logger

logger = get_logger(__name__)

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = ("What is  the capital\nof France?", "Paris.")
LOSS_KEYS = ("loss", "loss_scale")


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """One tokenised sample, or one piece of a long text."""

    input_ids: np.ndarray  # int32 [tokens]
    loss_weights: np.ndarray  # float32 [tokens]; 0: no loss on predicting this token


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """Text that is ready for the tokenizer and the characters that carry loss."""

    text: str
    spans: tuple[tuple[int, int, float], ...]  # start, end, weight
    is_text: bool = False  # a pre-training row: bos and eos are added, every token carries loss


class Template:
    """Renders and tokenises samples for one tokenizer and one set of template settings."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        use_chat_template: bool = True,
        loss_scale: str = "default",
        system: str | None = None,
        enable_thinking: bool | None = None,
        max_length: int | None = None,
        truncation_strategy: str = "delete",
        stop_ids: Iterable[int] = (),
    ) -> None:
        """Take the settings of DataConfig; `stop_ids` are the tokens besides eos at which generation stops.

        Raises DataError for a tokenizer or a template that cannot be used.
        """
        self.tokenizer = tokenizer
        self.encoder = TextEncoder(tokenizer)
        self.max_length = max_length
        self.truncation_strategy = truncation_strategy
        self.loss_scale, self.part_rules = split_loss_scale(loss_scale)
        self.system = _system_text(system)
        self.uses_chat_template = use_chat_template
        self.variables = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self.eos_token: str = tokenizer.eos_token or ""
        self.chat_template: str | dict[str, str] | None = None
        self._warned_thinking = False
        if use_chat_template:
            self.chat_template = tokenizer.chat_template or chatml(tokenizer)
            self._reads_blocks = False
            self._has_marks = isinstance(self.chat_template, str) and bool(
                GENERATION_MARK.search(self.chat_template)
            )
            special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
            stop = [
                self.eos_token,
                *tokenizer.convert_ids_to_tokens([i for i in stop_ids if i < len(tokenizer)]),
            ]
            self._finder = SpanFinder(special_tokens=[*special, self.eos_token], stop_tokens=stop)
            self._check_template()

    @classmethod
    def from_config(
        cls, config: DataConfig, tokenizer: Any, *, max_length: int | None, stop_ids: Iterable[int] = ()
    ) -> "Template":
        """Build the template of a run; `max_length` is the resolved one."""
        template = cls(
            tokenizer,
            use_chat_template=config.use_chat_template,
            loss_scale=config.loss_scale,
            system=config.system,
            enable_thinking=config.enable_thinking,
            max_length=max_length,
            truncation_strategy=config.truncation_strategy,
            stop_ids=stop_ids,
        )
        if config.agent_template is not None:
            model = tokenizer.name_or_path or "this tokenizer"
            check_agent_format(config.agent_template, template.chat_template, model=model)
        return template

    def encode(self, sample: Sample) -> list[Encoded]:
        """Return the tokens of one sample: one entry, or several for a long text that is split. Raises RowError."""
        outcome = self.encode_batch([sample])[0]
        if isinstance(outcome, RowError):
            raise outcome
        return outcome

    def encode_batch(self, samples: Sequence[Sample]) -> list[list[Encoded] | RowError]:
        """Tokenise many samples in one call of the tokenizer; a sample that cannot be used gives its RowError."""
        rendered = [self._render_or_error(sample) for sample in samples]
        usable = [entry for entry in rendered if isinstance(entry, Rendered)]
        located = iter(
            self.encoder.locate([entry.text for entry in usable], [entry.spans for entry in usable])
        )
        outcomes: list[list[Encoded] | RowError] = []
        for entry in rendered:
            if isinstance(entry, RowError):
                outcomes.append(entry)
                continue
            try:
                outcomes.append(self._fit(self._tokens(entry, *next(located)), entry.is_text))
            except RowError as error:
                outcomes.append(error)
        return outcomes

    def render(self, sample: Sample) -> Rendered:
        """Return the text of a sample and the spans that carry loss. Raises RowError."""
        if sample.text is not None:
            return Rendered(text=unicode(sample.text), spans=((0, len(sample.text), 1.0),), is_text=True)
        media = len(sample.images) + len(sample.videos) + len(sample.audios)
        if media:
            raise RowError(
                "media", f"the row has {media} images, videos or audios, and the model reads text only"
            )
        messages = self.messages(sample)
        if messages[-1]["role"] != "assistant":
            raise RowError(
                "no answer",
                f"the conversation ends with a {messages[-1]['role']} turn, so there is nothing to learn",
            )
        weights = self._turn_weights(messages)
        plain = [_for_template(message) for message in messages]
        if not self.uses_chat_template:
            return self._concatenated(plain, weights)
        variables = {**self.variables, **sample.template_kwargs}
        tools = list(sample.tools) or None

        def render(turns: Sequence[Message], generation_prompt: bool) -> str:
            return self._apply(turns, tools, variables, generation_prompt)

        if self._has_marks:
            text, spans = self._marked(plain, tools, variables)
        else:
            text = render(plain, False)
            shape = (
                json.dumps([tools, variables], sort_keys=True, default=str) if tools or variables else None
            )
            spans = self._finder.find(text, plain, render, shape=shape)
        if not self._warned_thinking and drops_thinking(text, plain[-1], spans[-1]):
            self._warned_thinking = True
            logger.warning(
                "%s: the chat template drops the thinking of the last answer; it is not trained on",
                sample.source,
            )
        if self.loss_scale == "all":
            return self._rendered(text, ((0, len(text), 1.0),))
        return self._rendered(text, tuple((span.start, span.end, weights[span.turn]) for span in spans))

    def messages(self, sample: Sample) -> list[Message]:
        """Return the messages of a sample, with the run's system message where the row has none."""
        messages = list(sample.messages)
        if self.system is not None and messages and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        return messages

    def prompt(self, sample: Sample) -> str:
        """Return the text of a conversation, up to where the assistant answers if it waits for that. Raises RowError."""
        if sample.images or sample.videos or sample.audios:
            raise RowError("media", "the row has images, videos or audios, and the model reads text only")
        plain = [_for_template(message) for message in self.messages(sample)]
        if not self.uses_chat_template:
            return unicode(
                "".join(
                    message["content"] + self.eos_token * (message["role"] == "assistant")
                    for message in plain
                )
            )
        variables = {**self.variables, **sample.template_kwargs}
        waits = plain[-1]["role"] != "assistant"
        return unicode(self._apply(plain, list(sample.tools) or None, variables, waits))

    def _apply(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        variables: dict[str, Any],
        prompt: bool,
    ) -> str:
        contents = self._contents(messages)
        try:
            if tools is None and isinstance(self.chat_template, str) and all(map(_is_text, contents)):
                # apply_chat_template gives a template the same and needs longer to make it plain than to render it.
                return self._render_plain(messages=contents, add_generation_prompt=prompt, **variables)
            text: str = self.tokenizer.apply_chat_template(
                contents, tools=tools, chat_template=self.chat_template if not self.tokenizer.chat_template else None,
                tokenize=False, add_generation_prompt=prompt, **variables,
            )  # fmt: skip
        except _template_errors() as error:
            raise RowError("template", f"the chat template refuses the conversation: {error}") from error
        return text

    @cached_property
    def _render_plain(self) -> Callable[..., str]:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        render = _compile_jinja_template(self.chat_template).render
        return partial(render, tools=None, documents=None, **self.tokenizer.special_tokens_map)

    def _contents(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages with their contents as this template reads them: text, or a list of blocks."""
        if not self._reads_blocks:
            return list(messages)
        return [
            {**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages
        ]

    def _marked(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, variables: dict[str, Any]
    ) -> tuple[str, list[Span]]:
        """Render with the template's own {% generation %} marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, marks = render_jinja_template(
                conversations=[self._contents(messages)], tools=tools, chat_template=self.chat_template,
                return_assistant_tokens_mask=True, **{**self.tokenizer.special_tokens_map, **variables},
            )  # fmt: skip
        except _template_errors() as error:
            raise RowError("template", f"the chat template refuses the conversation: {error}") from error
        return texts[0], self._finder.from_marks(texts[0], messages, marks[0])

    def _concatenated(self, messages: list[Message], weights: dict[int, float]) -> Rendered:
        """Join the turns as they are; an eos ends every answer. Used by base models with use_chat_template false."""
        text, spans = "", []
        for turn, message in enumerate(messages):
            start = len(text)
            text += message["content"]
            if message["role"] == "assistant":
                text += self.eos_token
                spans.append((start, len(text), weights[turn]))
        return self._rendered(text, ((0, len(text), 1.0),) if self.loss_scale == "all" else tuple(spans))

    def _rendered(self, text: str, spans: tuple[tuple[int, int, float], ...]) -> Rendered:
        text = unicode(text)
        if not self.part_rules:
            return Rendered(text=text, spans=spans)
        kept = []
        for start, end, weight in spans:
            said = end - self._ending(text[start:end])
            for first, last, share in weighted_parts(text[start:said], self.part_rules):
                kept.append((start + first, start + last, weight * share))
            kept.append((said, end, weight))  # the end of a turn is no part of what it says
        return Rendered(text=text, spans=tuple(span for span in kept if span[0] < span[1] and span[2]))

    def _ending(self, answer: str) -> int:
        """Return how many characters of a span end its turn."""
        if self.uses_chat_template:
            return self._finder.ending(answer)
        return len(self.eos_token) if answer.endswith(self.eos_token) else 0

    def _turn_weights(self, messages: Sequence[Message]) -> dict[int, float]:
        """Return the loss weight of every assistant turn: per-message loss and loss_scale first, then --loss_scale."""
        last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        weights = {}
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                default = 1.0 if self.loss_scale != "last_round" or turn > last_user else 0.0
                chosen = default if message.get("loss") is None else float(bool(message["loss"]))
                weights[turn] = chosen * float(message.get("loss_scale", 1.0))
        return weights

    def _tokens(self, rendered: Rendered, ids: np.ndarray, places: Sequence[tuple[int, int]]) -> Encoded:
        weights = np.zeros(len(ids), np.float32)
        for (first, last), (*_, weight) in zip(places, rendered.spans, strict=True):
            weights[first:last] = weight
        bos = self.encoder.bos if rendered.is_text or not self.uses_chat_template else []
        eos = self.encoder.eos if rendered.is_text else []
        if bos or eos:
            ids = np.concatenate([bos, ids, eos]).astype(np.int32)
            weights = np.concatenate([np.zeros(len(bos)), weights, np.ones(len(eos))]).astype(np.float32)
        return Encoded(input_ids=ids, loss_weights=weights)

    def _fit(self, encoded: Encoded, is_text: bool) -> list[Encoded]:
        """Apply max_length and the truncation strategy. Raises RowError when nothing remains to learn from."""
        length, limit = len(encoded.input_ids), self.max_length
        if limit is None or length <= limit:
            pieces = [slice(0, length)]
        elif self.truncation_strategy == "left":
            pieces = [slice(length - limit, length)]
        elif self.truncation_strategy == "right":
            pieces = [slice(0, limit)]
        elif self.truncation_strategy == "split" and is_text:
            pieces = [slice(start, min(start + limit, length)) for start in range(0, length, limit)]
        else:
            raise RowError("too long", f"{length} tokens, max_length={limit}")
        kept = [
            Encoded(input_ids=encoded.input_ids[piece], loss_weights=encoded.loss_weights[piece])
            for piece in pieces
            if encoded.loss_weights[piece][
                1:
            ].any()  # the first token of a document has nothing to be predicted from
        ]
        if not kept:
            cut = (
                f" of {length} left by truncation_strategy={self.truncation_strategy}"
                if length > (limit or length)
                else ""
            )
            raise RowError("no loss", f"none of the {min(length, limit or length)} tokens{cut} carries loss")
        return kept

    def _check_template(self) -> None:
        """Refuse at once a template from which the assistant's tokens cannot be told, or ids that differ."""
        try:
            rendered = self._probe()
        except RowError as error:
            try:
                self._reads_blocks = True  # templates of vision models may read lists of blocks only
                rendered = self._probe()
            except RowError:
                raise DataError(
                    f"The chat template of {self.tokenizer.name_or_path or 'this tokenizer'} cannot be trained with: "
                    f"{error.reason}. Set --use_chat_template false, or mend chat_template in the tokenizer's files."
                ) from error
        (own,) = self.encoder.encode([rendered.text])
        theirs = self.tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
        if own.tolist() != list(theirs):
            raise DataError(
                f"The fast backend of {type(self.tokenizer).__name__} does not give the tokenizer's own ids. "
                "Bring a tokenizer.json that transformers writes with save_pretrained."
            )

    def _probe(self) -> Rendered:
        question, answer = PROBE
        if not self._has_marks:
            self._finder.learn_tail(
                lambda turns, prompt: self._apply(turns, None, self.variables, prompt), question, answer
            )
            if not self._finder.ends_turns:
                logger.warning(
                    "the chat template ends the last answer without a token, so the model learns to stop from earlier "
                    "turns only"
                )
        turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        return self.render(Sample(source="probe", messages=turns))

    def _render_or_error(self, sample: Sample) -> Rendered | RowError:
        try:
            return self.render(sample)
        except (RowError, *STUMBLES) as error:
            return row_error(error)


def _template_errors() -> tuple[type[Exception], ...]:
    import jinja2  # transformers' own requirement for chat templates, loaded with them

    return (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)


def _is_text(message: Message) -> bool:
    """Return whether a message is a role and a text, which transformers hands to a template as they are."""
    return (
        message.keys() == {"role", "content"}
        and type(message["content"]) is str
        and type(message["role"]) is str
    )


def _for_template(message: Message) -> Message:
    if not any(key in message for key in LOSS_KEYS):
        return message
    return {key: value for key, value in message.items() if key not in LOSS_KEYS}


def _system_text(system: str | None) -> str | None:
    if system is None or not system.endswith(".txt"):
        return system
    path = Path(system).expanduser()
    if not path.is_file():
        raise DataError(f"system={system} is not there. Give the text itself, or a .txt file that exists.")
    return path.read_text("utf-8").strip()
