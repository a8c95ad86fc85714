"""ChatML, the chat template of tokenizers that have none."""

from typing import Any

from megaswift.config.run import RunConfig
from megaswift.data.tokenizer import load_tokenizer
from megaswift.errors import DataError
from megaswift.logs import get_logger
from megaswift.metadata.meta import ModelMeta

logger = get_logger(__name__)

CHATML = (  # what Qwen and many others use; {end} is the token that ends a turn
    "{{% for message in messages %}}{{{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '{end}' + '\\n' }}}}"
    "{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}{{% endif %}}"
)


def chatml(tokenizer: Any) -> str:
    """Return the template with the token that ends a turn of this tokenizer. Raises DataError where it has none."""
    end = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token
    if not end:
        raise DataError(
            "The tokenizer has neither a chat template nor an eos token. Set eos_token in tokenizer_config.json."
        )
    logger.info("the tokenizer has no chat template; using ChatML with %s at the end of a turn", end)
    return CHATML.format(end=end)


def added_chat_template(run: RunConfig, meta: ModelMeta) -> str | None:
    """Return the template that a run trains with and an export has to add to the tokenizer's files, if they have none."""
    if run.task == "pt" or not run.data.use_chat_template or meta.folder is None:
        return None
    try:
        tokenizer = load_tokenizer(meta.folder, trust_remote_code=run.model.trust_remote_code)
        return None if tokenizer.chat_template else chatml(tokenizer)
    except DataError:  # without a tokenizer there was no text: the rows were token ids
        return None
