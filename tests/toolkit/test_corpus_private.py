"""Private data is masked; what only looks like it stays."""

import pytest

from toolkit.corpus.private import RULES, mask

PRIVATE = {
    "email": ["haru.kim+1@naver.com", "a@b.co.kr", "HARU_99@mail.example.com"],
    "phone": [
        "010-1234-5678", "01012345678", "010 1234 5678", "010.1234.5678", "010)1234-5678", "010–1234–5678",
        "011-123-4567", "+82 10-1234-5678", "+82-10-1234-5678", "(+82) 10 1234 5678", "+821012345678",
        "82-10-1234-5678", "02-123-4567", "02) 345-6789", "(02)3456-7890", "031 123 4567", "064-123-4567",
        "070-1234-5678", "0507-1234-5678", "+1 (212) 555-0123", "(212) 555-0123", "212-555-0123",
        "+44 20 7946 0958", "０１０-１２３４-５６７８",
    ],
    "resident_number": ["900101-1234567", "900101 - 5234567", "000229-3123456", "900101-1******", "9001011234568"],
    "card": [
        "4111-1111-1111-1111", "4111 1111 1111 1111", "4111111111111111", "5555-5555-5555-4444", "3782 822463 10005",
        "378282246310005", "9410-1234-5678-9010",
    ],
}  # fmt: skip
LOOK_ALIKES = [
    "30,000원", "1,000,000원", "30000000원", "+30000000원", "5,000~10,000원", "100-200-3000",  # prices and ranges
    "109", "1388", "112", "119", "1588-1234", "1-800-273-8255", "080-123-4567",  # helplines and firms
    "2026-11-24", "2026.11.24", "20261124", "2026-11-24 10:30:15", "14:30-16:00", "010-11-24",  # dates and times
    "주문번호 20261124-0001234", "주문번호 2026112400123", "ORD-2026-1124-5678", "A-010-1234-5678-99",  # orders
    "2026-010-1234-5678", "2026.010-1234-5678",
    "송장 123456789012", "6123 4567 8901", "우편번호 06236", "8801056012345",  # parcels, barcodes
    "192.168.0.1", "10.0.0.255:8080", "v2.10.1234", "3.11.7", "3.14159265358979",  # addresses, versions, numbers
    "4111-1111-1111-1112", "1234567890123456", "0000000000000000",  # no check digit, no issuer
    "900101-9234567", "991301-1234567", "900132-1234567", "9001011234567",  # no such person or day, no check digit
    "1234-5678", "123-456-7890", "isbn 978-89-123-4567-8", "@haru", "3@1000원", "haru@home", "2+2=4",
]  # fmt: skip


@pytest.mark.parametrize(("rule", "text"), [(rule, text) for rule, texts in PRIVATE.items() for text in texts])
def test_private_data_is_masked_in_a_sentence(rule: str, text: str) -> None:
    found = mask(f"내 거는 {text}이야, 적어 둬.", is_korean=True)
    word = next(known.korean for known in RULES if known.name == rule)
    assert (found.text, dict(found.counts)) == (f"내 거는 {word}이야, 적어 둬.", {rule: 1})


@pytest.mark.parametrize("text", LOOK_ALIKES)
def test_a_look_alike_stays(text: str) -> None:
    sentence = f"그건 {text} 맞지?"
    assert mask(sentence, is_korean=True).text == sentence


def test_english_talk_gets_english_words() -> None:
    found = mask("Mail me at a@b.com or call 212-555-0123.", is_korean=False)
    assert found.text == "Mail me at [email] or call [phone number]."


def test_several_numbers_are_masked_one_by_one() -> None:
    found = mask("010-1234-5678,010-2222-3333", is_korean=True)
    assert (found.text, found.counts["phone"]) == ("[전화번호],[전화번호]", 2)


def test_masking_twice_changes_nothing_more() -> None:
    once = mask("010-1234-5678 a@b.com 900101-1234567 4111111111111111", is_korean=True).text
    assert mask(once, is_korean=True).text == once


def test_only_masks_known_values_however_they_are_written() -> None:
    known = mask("+82 10-1234-5678", is_korean=True).values
    found = mask("01012345678 맞으시죠? 저희는 02-123-4567이에요.", is_korean=True, only=known)
    assert found.text == "[전화번호] 맞으시죠? 저희는 02-123-4567이에요."


@pytest.mark.parametrize("text", ["0" * 300_000, "a" * 300_000 + "@", "+1 " * 100_000, "1-" * 150_000, "a.@" * 100_000])
def test_no_text_makes_the_rules_run_away(text: str) -> None:
    assert mask(text, is_korean=True).text == text  # a rule that backtracks would take hours
