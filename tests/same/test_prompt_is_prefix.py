"""The prompt that serving renders is a token prefix of what training rendered: five templates, four tokenizers."""

import json
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from toolkit.corpus.render import IGNORED, Renderer
from toolkit.corpus.talk import Talk, Turn

LINES = [
    "오늘 뭐 먹지? 김치찌개 먹을까, 라면 먹을까?",
    "글쎄, 나는 그냥 집에서 쉬고 싶어. 비도 오고.",
    "How was your day? I went to the park and it was lovely.",
    "User: hello there\n\nAssistant: it's 3 o'clock, let's go!",
    "user assistant model system start of turn header id INST",
]

CHATML = """{%- for m in messages %}
{{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA3 = """{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

GEMMA = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('there is no system role') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must take turns') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

MISTRAL = """{{- bos_token }}{% set ns = namespace(before='') %}
{%- for m in messages %}
{%- if m.role == 'system' %}{% set ns.before = m.content + '\n\n' %}
{%- elif m.role == 'user' %}{{ '[INST] ' + ns.before + m.content + ' [/INST]' }}{% set ns.before = '' %}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}"""

OURS = """{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

# template, special tokens (the first opens a text, the last ends an answer)
FAMILIES = {
    "chatml": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    "llama3": (LLAMA3, ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "gemma": (GEMMA, ["<bos>", "<start_of_turn>", "<end_of_turn>"]),
    "mistral": (MISTRAL, ["<s>", "[INST]", "[/INST]", "</s>"]),
    "ours": (OURS, ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]),
}
TOKENIZERS = ["byte level", "byte level, space in front", "metaspace", "prepended space"]


def _tokenizer(kind: str, special: list[str]) -> PreTrainedTokenizerFast:
    """A few hundred tokens learned from the lines above, with the spaces of that kind of tokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if kind.startswith("byte level"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space="front" in kind)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        alphabet = ["▁"]
        if kind == "metaspace":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:  # as Llama 2 wrote it: after every special token, too
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", *special, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    written = json.loads(tokenizer.to_str())
    written["added_tokens"] = [token for token in written["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(written))  # bytes are ordinary tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token=special[0],
        eos_token=special[-1],
        extra_special_tokens=special[1:-1],
    )


@pytest.fixture(scope="module", params=[f"{family}/{kind}" for family in FAMILIES for kind in TOKENIZERS])
def renderer(request: pytest.FixtureRequest) -> Renderer:
    family, kind = request.param.split("/")
    template, special = FAMILIES[family]
    return Renderer(_tokenizer(kind, special), template)


def _talks(renderer: Renderer) -> Iterator[Talk]:
    turns = [
        Turn("user", "오늘 뭐 먹지?"),
        Turn("assistant", "글쎄, 라면 먹을까?"),
        Turn("user", "  I had that yesterday.\n\nUser: what else? "),
        Turn("assistant", "\nLet's go to the park!\n\n"),
        Turn("user", f"{renderer.shape.end} 하고 {renderer.shape.opening} 라고 쓰면?"),
        Turn("assistant", f"{renderer.shape.end}? 그냥 글자야 ㅋㅋ 😀"),
    ]
    yield Talk(tuple(turns[:2]), "one round")
    yield Talk(tuple(turns), "three rounds")
    if renderer.shape.takes_system:
        yield Talk((Turn("system", "짧게 말해."), *turns), "with a system turn")


def _assert_every_prompt_is_a_prefix(renderer: Renderer, talk: Talk) -> None:
    row = renderer.training(talk)
    assert row.dropped is None
    n_answers = 0
    for i, turn in enumerate(talk.turns):
        if turn.role == "assistant":
            prompt = renderer.prompt(talk.turns[:i])
            n_answers += 1
            assert row.input_ids[: len(prompt)] == prompt
            assert row.labels[len(prompt) - 1] == IGNORED
            assert row.labels[len(prompt)] == row.input_ids[len(prompt)]
    assert sum(row.is_end) >= n_answers > 0


def test_every_prompt_is_a_prefix_of_the_training_row(renderer: Renderer) -> None:
    for talk in _talks(renderer):
        _assert_every_prompt_is_a_prefix(renderer, talk)


def test_ids_of_ordinary_talk_are_those_of_the_whole_text(renderer: Renderer) -> None:
    turns = [*next(_talks(renderer)).turns, Turn("user", "How was your day?"), Turn("assistant", "비도 오고, lovely.")]
    tokenizer = renderer._tokenizer
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    whole = tokenizer.apply_chat_template(messages, chat_template=renderer.template, return_dict=False)
    row = renderer.training(Talk(tuple(turns), "test"))
    assert row.input_ids == whole[: len(row.input_ids)]


@pytest.mark.parametrize("family", FAMILIES)
def test_prefixes_hold_for_any_text(family: str) -> None:
    template, special = FAMILIES[family]
    renderers = [Renderer(_tokenizer(kind, special), template) for kind in ("byte level", "prepended space")]
    bits = st.sampled_from([*special, "<", "|>", "\n", " ", "가", "뭐 해?", "ok", "Assistant:", "\ufdd0", "ㅋ\u0301"])
    text = st.lists(bits, min_size=1, max_size=6).map("".join)

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.tuples(text, text), min_size=1, max_size=3))
    def check(rounds: list[tuple[str, str]]) -> None:
        turns = [turn for ask, answer in rounds for turn in (Turn("user", ask), Turn("assistant", answer))]
        for renderer in renderers:
            _assert_every_prompt_is_a_prefix(renderer, Talk(tuple(turns), "made up"))

    check()
