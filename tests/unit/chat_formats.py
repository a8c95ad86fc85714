"""The conversation formats of public models, each as a chat template written for these tests.

A format is a fact: which tokens stand before and after a turn. `answers` says what a model of that format is to write
for the answers "First answer" and "Second answer" of a conversation of two rounds.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """One format: its template, its tokens, and the trained text of two answers."""

    template: str
    special: tuple[str, ...] = ()
    eos: str = "</s>"
    bos: str | None = None
    answers: tuple[str, str]
    takes_system: bool = True
    tool_answers: tuple[str, str] | None = None  # for a call of get_weather(city="Rome") and "It is sunny."
    stop_tokens: tuple[str, ...] = field(default=())


def ended(token: str, lead: str = "") -> tuple[str, str]:
    """Return both answers between `lead` and `token`."""
    return f"{lead}First answer{token}", f"{lead}Second answer{token}"


CHATML_TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
IM = ("<|im_start|>", "<|im_end|>")
HEADER = "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
CALLS = (
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    """{{ '{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson + '}' }}\n</tool_call>"""
    "{% endfor %}"
)
CALL_TEXT = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'

FORMATS: dict[str, ChatFormat] = {
    "chatml": ChatFormat(
        template="{% for m in messages %}" + CHATML_TURN + "{% endfor %}" + CHATML_PROMPT,
        special=IM, eos="<|im_end|>", answers=ended("<|im_end|>"),
    ),
    "chatml, default system (Qwen2, SmolLM2)": ChatFormat(
        template="{% for m in messages %}{% if loop.first and m.role != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}" + CHATML_TURN + "{% endfor %}" + CHATML_PROMPT,
        special=IM, eos="<|im_end|>", answers=ended("<|im_end|>"),
    ),
    "chatml with bos (InternLM2)": ChatFormat(
        template="{{ bos_token }}{% for m in messages %}" + CHATML_TURN + "{% endfor %}" + CHATML_PROMPT,
        special=IM, bos="<s>", eos="</s>", answers=ended("<|im_end|>"),
    ),
    "chatml with tools (Qwen2.5)": ChatFormat(
        template="{% if tools %}<|im_start|>system\n# Tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
        "{% for m in messages %}{% if m.role == 'tool' %}{% if loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}\n"
        "<tool_response>\n{{ m.content }}\n</tool_response>{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}" + CALLS + "<|im_end|>\n{% endif %}{% endfor %}" + CHATML_PROMPT,
        special=IM, eos="<|im_end|>", answers=ended("<|im_end|>"),
        tool_answers=(CALL_TEXT + "<|im_end|>", "It is sunny.<|im_end|>"),
    ),
    "thinking of earlier turns dropped (Qwen3)": ChatFormat(
        template="{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{% set c = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{% set r = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' %}"
        "<|im_start|>assistant\n{% if loop.index0 > ns.last and (loop.last or r) %}<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}"
        + CALLS + "<|im_end|>\n{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
        "{% else %}" + CHATML_TURN + "{% endif %}{% endfor %}" + CHATML_PROMPT,
        special=IM, eos="<|im_end|>",
        answers=("First answer<|im_end|>", "<think>\n\n</think>\n\nSecond answer<|im_end|>"),
        tool_answers=(CALL_TEXT + "<|im_end|>", "<think>\n\n</think>\n\nIt is sunny.<|im_end|>"),
    ),
    "the prompt opens the thinking (Qwen3.5)": ChatFormat(
        template="{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% if loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content | trim }}<|im_end|>\n{% else %}" + CHATML_TURN + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        special=IM, eos="<|im_end|>", # one token holds the prompt's last line end and the answer's first: it is the assistant's
        answers=("First answer<|im_end|>", "\n\n</think>\n\nSecond answer<|im_end|>"),
    ),
    "no end after the last answer (Qwen1.5)": ChatFormat(
        template="{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if (loop.last and add_generation_prompt) or not loop.last %}<|im_end|>\n{% endif %}{% endfor %}" + CHATML_PROMPT,
        special=IM, eos="<|im_end|>", answers=("First answer<|im_end|>", "Second answer"),
    ),
    "sections marked as generated (SmolLM3)": ChatFormat(
        template="{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
        "{% else %}" + CHATML_TURN + "{% endif %}{% endfor %}" + CHATML_PROMPT,
        special=IM, eos="<|im_end|>", answers=ended("<|im_end|>"),
    ),
    "generated sections without the end": ChatFormat(
        template="{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + CHATML_PROMPT,
        special=IM, eos="<|im_end|>", answers=ended("<|im_end|>"),
    ),
    "llama 2": ChatFormat(
        template="{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token }}[INST] {% if loop.first and s %}<<SYS>>\n{{ s }}\n<</SYS>>\n\n{% endif %}"
        "{{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}",
        bos="<s>", answers=ended(" </s>", " "),
    ),
    "llama 3": ChatFormat(
        template="{{ bos_token }}{% for m in messages %}" + HEADER + "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        special=("<|start_header_id|>", "<|end_header_id|>"), bos="<|begin_of_text|>", eos="<|eot_id|>", answers=ended("<|eot_id|>"),
    ),
    "llama 3.1 with tools": ChatFormat(
        template="{{ bos_token }}{% for m in messages %}{% if m.tool_calls %}" + HEADER + CALLS + "<|eom_id|>"
        "{% elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>"
        "{% else %}" + HEADER + "{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        special=("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"), bos="<|begin_of_text|>", eos="<|eot_id|>",
        answers=ended("<|eot_id|>"), tool_answers=(CALL_TEXT + "<|eom_id|>", "It is sunny.<|eot_id|>"),
    ),
    "mistral 0.1": ChatFormat(
        template="{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        bos="<s>", answers=ended("</s>"), takes_system=False,
    ),
    "mistral 0.3": ChatFormat(
        template="{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
        "{% elif m.role == 'user' %}[INST] {{ m.content }}[/INST]"
        "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }}[/TOOL_RESULTS]"
        "{% elif m.tool_calls %}[TOOL_CALLS]" + CALLS + "{{ eos_token }}{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        special=("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"), bos="<s>",
        answers=ended("</s>", " "), takes_system=False,
        tool_answers=(f"[TOOL_CALLS]{CALL_TEXT}</s>", " It is sunny.</s>"),
    ),
    "gemma": ChatFormat(
        template="{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        special=("<start_of_turn>", "<end_of_turn>"), bos="<bos>", eos="<eos>", answers=ended("<end_of_turn>"), takes_system=False,
    ),
    "system put into the first question (Gemma 3)": ChatFormat(
        template="{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
        "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ s if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        special=("<start_of_turn>", "<end_of_turn>"), bos="<bos>", eos="<eos>", answers=ended("<end_of_turn>"),
    ),
    "eos after the conversation (Phi-3)": ChatFormat(
        template="{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), eos="<|endoftext|>", answers=ended("<|end|>"),
    ),
    "phi 4": ChatFormat(
        template="{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
        special=(*IM, "<|im_sep|>"), eos="<|im_end|>", answers=ended("<|im_end|>"),
    ),
    "deepseek 2": ChatFormat(
        template="{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}\n\n"
        "{% elif m.role == 'assistant' %}Assistant: {{ m.content }}{{ eos_token }}{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}",
        bos="<|bos|>", eos="<|eos|>", answers=ended("<|eos|>", " "),
    ),
    "thinking dropped, prompt opens it (DeepSeek-R1)": ChatFormat(
        template="{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% elif m.role == 'assistant' %}"
        "<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
        special=("<|User|>", "<|Assistant|>"), bos="<|bos|>", eos="<|eos|>", answers=ended("<|eos|>"),
    ),
    "answers end where the next turn begins (GLM-4)": ChatFormat(
        template="[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        special=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"), eos="<|endoftext|>",
        answers=("\nFirst answer<|user|>", "\nSecond answer"), stop_tokens=("<|user|>",),
    ),
    "empty thinking in every answer (GLM-4.5)": ChatFormat(
        template="[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}<think></think>\n{% endif %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        special=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"), eos="<|endoftext|>",
        answers=("\n<think></think>\nFirst answer<|user|>", "\n<think></think>\nSecond answer"), stop_tokens=("<|user|>",),
    ),
    "command r": ChatFormat(
        template="{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>{{ {'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>', 'system': '<|SYSTEM_TOKEN|>'}[m.role] }}"
        "{{ m.content | trim }}<|END_OF_TURN_TOKEN|>{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
        special=("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
        bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>", answers=ended("<|END_OF_TURN_TOKEN|>"),
    ),
    "two tokens end a turn (Command R7B)": ChatFormat(
        template="{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|><|{{ m.role | upper }}|>"
        "{% if m.role == 'assistant' %}<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>{% else %}{{ m.content }}{% endif %}<|END_OF_TURN_TOKEN|>{% endfor %}"
        "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|ASSISTANT|>{% endif %}",
        special=("<|START_OF_TURN_TOKEN|>", "<|USER|>", "<|ASSISTANT|>", "<|SYSTEM|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>", answers=ended("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "<|START_RESPONSE|>"),
    ),
    "channels, another end in the middle (gpt-oss)": ChatFormat(
        template="{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final<|message|>{{ m.content }}"
        "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% else %}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        special=("<|start|>", "<|channel|>", "<|message|>", "<|end|>"), eos="<|return|>",
        answers=("<|channel|>final<|message|>First answer<|end|>", "<|channel|>final<|message|>Second answer<|return|>"),
    ),
    "zephyr": ChatFormat(
        template="{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        answers=ended("</s>"),
    ),
    "vicuna": ChatFormat(
        template="{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n{% elif m.role == 'user' %}USER: {{ m.content | trim }}\n"
        "{% else %}ASSISTANT: {{ m.content | trim }}{{ eos_token }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        bos="<s>", answers=ended("</s>", " "),
    ),
    "plain text only (Solar)": ChatFormat(
        template="{% for m in messages %}### {{ m.role | capitalize }}:\n{{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}### Assistant:\n{% endif %}",
        answers=ended("\n\n"),
    ),
    "granite": ChatFormat(
        template="{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}",
        special=("<|start_of_role|>", "<|end_of_role|>"), eos="<|end_of_text|>", answers=ended("<|end_of_text|>"),
    ),
    "openchat": ChatFormat(
        template="{{ bos_token }}{% for m in messages %}GPT4 Correct {{ m.role | title }}: {{ m.content }}<|end_of_turn|>{% endfor %}"
        "{% if add_generation_prompt %}GPT4 Correct Assistant:{% endif %}",
        special=("<|end_of_turn|>",), bos="<s>", answers=ended("<|end_of_turn|>", " "),
    ),
    "always ends with a prompt (DeepSeek-Coder)": ChatFormat(
        template="{% for m in messages %}{% if m.role == 'assistant' %}### Response:\n{{ m.content }}\n<|EOT|>\n{% elif m.role == 'user' %}### Instruction:\n{{ m.content }}\n"
        "{% else %}{{ m.content }}\n{% endif %}{% endfor %}{{ '### Response:\n' }}",
        special=("<|EOT|>",), eos="<|EOT|>", answers=ended("\n<|EOT|>"),
    ),
    "reads blocks only (Idefics3)": ChatFormat(
        template="{% for m in messages %}{{ m.role | capitalize }}:{% for b in m.content %}{% if b.type == 'text' %} {{ b.text }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}",
        special=("<end_of_utterance>",), eos="<end_of_utterance>", answers=ended("<end_of_utterance>", " "),
    ),
}  # fmt: skip
