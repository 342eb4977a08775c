"""Answers of a given form, on tokenizers of every kind: what can be said, what is refused, what it may cost."""

import json
from typing import Any

import jsonschema_rs
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.encoder_world import word_pieces
from toolkit import grammar as room
from toolkit.grammar import Grammar, GrammarError, Vocabulary, bridge, check_schema
from toolkit.sampling import Sampling, masked
from toolkit.shipped import shipped
from toolkit.writing import Writing, next_tokens

TALK: dict[str, Any] = {
    "type": "object",
    "properties": {
        "기분": {"enum": ["좋음", "나쁨", "그저 그래"]},
        "점수": {"type": "integer", "minimum": 1, "maximum": 12},
        "메모": {"type": "string", "maxLength": 4},
        "목록": {
            "type": "array",
            "items": {"type": "object", "properties": {"값": {"type": "boolean"}}, "required": ["값"]}
            | {"additionalProperties": False},
            "maxItems": 2,
        },
    },
    "required": ["기분", "점수", "메모", "목록"],
    "additionalProperties": False,
}
LINES = ["오늘 뭐 먹지? 김치찌개 어때.", '{"기분": "좋음", "점수": 12}', "What shall we eat, noodles or rice?"] * 3


def byte_level() -> Any:
    return AutoTokenizer.from_pretrained(shipped("base/spoken-mini"))


def byte_fallback(spaces: str) -> PreTrainedTokenizerFast:
    """As sentencepiece writes it: spaces as ▁, unknown signs as bytes."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if spaces == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(pieces)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=["▁"],
        show_progress=False,
    )
    made.train_from_iterator(LINES, trainer)
    written = json.loads(made.to_str())
    written["added_tokens"] = [token for token in written["added_tokens"] if not token["content"].startswith("<0x")]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(written)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


TOKENIZERS = {
    "byte level": byte_level,
    "metaspace": lambda: byte_fallback("metaspace"),
    "prepended space": lambda: byte_fallback("prepended"),
}


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def own() -> tuple[Any, Vocabulary]:
    """The shipped base's tokenizer, bridged."""
    made = byte_level()
    return made, bridge(made)


def written(tokenizer: Any, grammar: Grammar, seed: int, limit: int = 3000, liked: str = "") -> Writing:
    """An answer of any tokens that may come, each as likely as the other; those that are liked, more often."""
    logits_RV = torch.zeros(1, len(tokenizer) + 7)  # models often have a few more
    logits_RV[0, [tokenizer(sign, add_special_tokens=False)["input_ids"][0] for sign in liked]] = 7.0
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=limit, seed=seed)
    writing = Writing(tokenizer, [0], sampling, limit, {tokenizer.eos_token_id})
    writing.guide = grammar.start({tokenizer.eos_token_id})
    while writing.finish is None:
        (token,) = next_tokens(logits_RV, [writing])
        assert token is not None
        writing.take(token)
    return writing


def satisfies(schema: dict[str, Any], text: str) -> bool:
    return jsonschema_rs.validator_for(schema).is_valid(json.loads(text))


def test_whatever_is_said_satisfies_the_schema_whatever_spells_it(tokenizer: Any) -> None:
    grammar, texts = Grammar(bridge(tokenizer), check_schema(TALK)), set()
    for seed in range(12):
        answer = written(tokenizer, grammar, seed).answer()
        assert answer.finish == "stop" and satisfies(TALK, answer.text), answer.text
        texts.add(json.loads(answer.text)["기분"])
    assert len(texts) > 1


def test_any_json_object_parses(own: tuple[Any, Vocabulary]) -> None:
    tokenizer, vocabulary = own
    grammar, n_whole = Grammar(vocabulary, room.JSON_OBJECT), 0
    for seed in range(6):
        answer = written(tokenizer, grammar, seed, limit=200, liked='{}[]":,').answer()
        if answer.finish == "stop":
            assert isinstance(json.loads(answer.text), dict)
            n_whole += 1
    assert n_whole > 2


def test_an_answer_is_over_with_its_last_bracket(own: tuple[Any, Vocabulary]) -> None:
    tokenizer, vocabulary = own
    grammar = Grammar(vocabulary, '{"const":{"가":1}}')
    writing = written(tokenizer, grammar, 0)
    assert writing.answer().text.endswith("}") and writing.finish == "stop"
    short = written(tokenizer, grammar, 0, limit=len(writing.ids))
    assert short.finish == "stop"
    cut = written(tokenizer, grammar, 0, limit=len(writing.ids) - 1)
    assert cut.finish == "length"


def test_an_end_comes_where_the_answer_may_end_and_nowhere_else(own: tuple[Any, Vocabulary]) -> None:
    tokenizer, vocabulary = own
    end = tokenizer.convert_ids_to_tokens(range(len(tokenizer))).index("1")  # a template may end with ordinary tokens
    guide = Grammar(vocabulary, '{"type":"integer"}').start({end, 2})
    first = guide.mask(len(tokenizer))
    assert not first[end] and not first[2] and not first[tokenizer.eos_token_id]
    guide.take(tokenizer("7", add_special_tokens=False)["input_ids"][-1])
    then = guide.mask(len(tokenizer))
    assert then[end] and then[2] and not then[tokenizer.eos_token_id]


def test_special_tokens_are_no_text(own: tuple[Any, Vocabulary]) -> None:
    tokenizer, vocabulary = own
    guide = Grammar(vocabulary, '{"type":"string"}').start({tokenizer.eos_token_id})
    guide.take(tokenizer('"', add_special_tokens=False)["input_ids"][0])
    may = guide.mask(len(tokenizer))
    assert may.sum() > 1000 and not may[tokenizer.all_special_ids].any()


def test_a_tokenizer_that_does_not_spell_bytes_is_refused_by_name() -> None:
    with pytest.raises(GrammarError, match=r"byte.*WordPiece"):
        bridge(word_pieces())


def test_a_tokenizer_that_names_no_end_is_refused_and_no_other_token_stands_for_it() -> None:
    endless = byte_level()
    endless.eos_token = None
    with pytest.raises(GrammarError, match=r"token that ends a text.*Set eos_token in its tokenizer_config.json"):
        bridge(endless)


def wide(key: str, n: int) -> dict[str, Any]:
    return {key: {f"p{place}": {"type": "integer"} for place in range(n)}}


def patterns(n: int) -> dict[str, Any]:
    return {"properties": {f"p{place}": {"pattern": "가"} for place in range(n)}}


def deep(n: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(n):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ([], "no JSON object"),
        (wide("properties", 3000), "5000 parts"),
        (deep(40), "nests more than 32 deep"),
        ({"enum": [f"값 {n}" for n in range(1001)]}, "1000 values"),
        ({"anyOf": [{"enum": ["가"] * 600}, {"enum": ["나"] * 600}]}, "1000 values"),
        ({"pattern": "a" * 501}, "500 characters"),
        ({"description": "말" * 30_000}, "65536 bytes"),
        ({"minItems": 10**9}, "minItems: 1000000000 is more"),
        ({"properties": {"가": {"minLength": 1e9}}}, "properties.가.minLength"),
        ({"$ref": "http://169.254.169.254/"}, "only references inside"),
        ({"$ref": "file:///etc/passwd"}, "only references inside"),
        ({"allOf": [{"pattern": f"a.{{{n}}}b"} for n in range(9)]}, "9 patterns and formats"),
        ({"$ref": "#/$defs/a", "pattern": "a", "$defs": {"a": patterns(8)}}, "9 patterns"),
        ({"patternProperties": {f"^{n}": {} for n in range(9)}}, "9 patterns"),
        (patterns(65), "65 patterns"),
        ({"multipleOf": 99_999_989}, "multipleOf"),
        ({"$ref": "#/$defs/d0", "$defs": {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(300)}}, "references"),
        ({"anyOf": [{"multipleOf": 7919}, {"multipleOf": 7907}]}, "multipleOf"),
        ({"multipleOf": 1e-300}, "multipleOf"),
        ({"multipleOf": "x"}, "multipleOf"),
        ({"multipleOf": "9e999998"}, "multipleOf"),
        ({"multipleOf": True}, "multipleOf"),
        ({"multipleOf": 10**400}, "multipleOf"),
        ({"x-guidance": {"lenient": True}}, "x-guidance: is no keyword"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_schema_that_is_too_much_is_refused_before_it_is_compiled(schema: Any, says: str) -> None:
    with pytest.raises(GrammarError, match=says):
        check_schema(schema)


def test_names_and_values_are_no_keywords() -> None:
    names = {"enum": {"type": "string"}, "pattern": {"const": "x" * 600}, "$ref": {"const": 1}, "minItems": True}
    data = {"const": {"$ref": "http://a.example", "minItems": 10**9}}
    check_schema({"properties": names | {"값": data}, "$defs": {"$ref": {}}})
    check_schema({"properties": {"multipleOf": {"multipleOf": 0.01}, "pattern": {"multipleOf": 25}, "allOf": {}}})
    check_schema(patterns(64))


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "string", "pattern": "^(?=가)나"}, "look-around"),
        ({"not": {}}, 'Unimplemented keys: \\["not"\\]'),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"enum": []}, "cannot be followed"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum .5. is greater than maximum"),
        ({"type": "strnig"}, "cannot be followed"),
        ({"$ref": "#/$defs/none"}, "cannot be followed"),
        ({"$ref": "#"}, "schema"),
        ({"type": "string", "format": "color"}, "Unknown format: color"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_schema_that_cannot_be_followed_is_refused(own: tuple[Any, Vocabulary], schema: Any, says: str) -> None:
    with pytest.raises(GrammarError, match=says):
        Grammar(own[1], check_schema(schema))


def test_an_answer_that_becomes_too_costly_has_a_failure_and_its_neighbour_goes_on(
    own: tuple[Any, Vocabulary], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, vocabulary = own
    cheap = Grammar(vocabulary, check_schema(TALK))
    monkeypatch.setitem(room.LIMITS, "max_lexer_states", 60)
    costly = Grammar(
        vocabulary, check_schema({"type": "string", "pattern": "^(가나다라마바사){9}(.*[가-힣].{40}){2}$"})
    )
    sampling = Sampling(temperature=1.0, top_p=1.0, seed=1)
    rows = [Writing(tokenizer, [0], sampling, 500, {4}, number) for number in range(3)]
    rows[0].guide, rows[1].guide = costly.start({4}), cheap.start({4})
    for _ in range(400):
        tokens = next_tokens(torch.zeros(3, len(tokenizer)), rows)
        if rows[0].failure is not None:
            break
        for row, token in zip(rows, tokens, strict=True):
            if row.finish is None and token is not None:
                row.take(token)
    assert "after" in str(rows[0].failure) and tokens[0] is None
    assert rows[1].failure is None and tokens[1] is not None and tokens[2] is not None


def test_a_mask_leaves_other_rows_alone_and_a_row_without_one_its_tensor() -> None:
    logits_BV = torch.randn(3, 5)
    assert masked(logits_BV, [None, None, None]) is logits_BV
    before = logits_BV.clone()
    may = torch.tensor([False, True, False, False, True])
    told = masked(logits_BV, [None, may, None])
    assert torch.equal(told[[0, 2]], before[[0, 2]]) and torch.equal(logits_BV, before)
    assert torch.equal(told[1].isfinite(), may) and torch.equal(told[1][may], before[1][may])


def test_what_a_model_holds_impossible_is_said_where_nothing_else_may_be() -> None:
    logits_BV = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    told = masked(logits_BV, [torch.tensor([False, True, True])])
    assert torch.softmax(told, -1).tolist() == [[0.0, 0.5, 0.5]]


def test_a_walk_is_the_same_whatever_walks_beside_it(own: tuple[Any, Vocabulary]) -> None:
    tokenizer, vocabulary = own
    grammar = Grammar(vocabulary, check_schema(TALK))
    alone = [written(tokenizer, grammar, seed).ids for seed in range(3)]
    rows = []
    for seed in range(3):
        sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=3000, seed=seed)
        rows.append(Writing(tokenizer, [0], sampling, 3000, {tokenizer.eos_token_id}))
        rows[-1].guide = grammar.start({tokenizer.eos_token_id})
    while left := [row for row in rows if row.finish is None]:
        for row, token in zip(left, next_tokens(torch.zeros(len(left), len(tokenizer) + 7), left), strict=True):
            assert token is not None
            row.take(token)
    assert [row.ids for row in rows] == alone
