"""Our own chat templates, for bases that bring none or one that cannot be trained on: one per family of turn tokens.

Each marks what the model says with {% generation %} and ends an answer inside the marks, so that the end is learned.
"""

from collections.abc import Collection
from dataclasses import dataclass

OURS = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# Gemma's turns know no system role: what it would say opens the first user turn.
GEMMA = (
    "{{ bos_token or '' }}{% set ns = namespace(system='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.system = message['content'] + '\\n\\n' %}"
    "{% elif message['role'] == 'assistant' %}{{ '<start_of_turn>model\\n' }}"
    "{% generation %}{{ message['content'] + '<end_of_turn>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ '<start_of_turn>user\\n' + ns.system + message['content'] + '<end_of_turn>\\n' }}"
    "{% set ns.system = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
EXAONE = (
    "{% for message in messages %}{{ '[|' + message['role'] + '|]\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '[|endofturn|]' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '[|endofturn|]' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[|assistant|]\\n' }}{% endif %}"
)
# Works with any tokenizer that has an end token: the roles are plain words on a line of their own, so that no word of
# the answer merges with them.
PLAIN_TEXT = (
    "{{ bos_token or '' }}{% for message in messages %}{% if message['role'] == 'assistant' %}{{ 'Assistant:\\n' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n\\n' }}"
    "{% else %}{{ message['role'] | capitalize + ':\\n' + message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A way of writing turns: the template, and the tokens a tokenizer must know for it."""

    name: str
    template: str
    tokens: tuple[str, ...]


FAMILIES: tuple[Family, ...] = (
    Family("ours", OURS, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    Family("chatml", CHATML, ("<|im_start|>", "<|im_end|>")),
    Family("llama3", LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    Family("exaone", EXAONE, ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]")),
    Family("gemma", GEMMA, ("<start_of_turn>", "<end_of_turn>")),
)


def family_of(tokens: Collection[str], eos: str | None) -> Family | None:
    """The family whose tokens are all in `tokens` (a tokenizer's added tokens), else plain text ending in `eos`, else
    None.
    """
    for family in FAMILIES:
        if all(token in tokens for token in family.tokens):
            return family
    return Family("plain text", PLAIN_TEXT, (eos,)) if eos else None
