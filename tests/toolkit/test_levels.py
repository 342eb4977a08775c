"""The table of Korean endings, sentence by sentence, and on the dialogues that ship."""

import json

import pytest

from toolkit.evaluate.levels import RULES, answer_level, level, levels, sentences
from toolkit.evaluate.metrics import answers_by_level, share_by_level
from toolkit.shipped import shipped

BANMAL = """
오늘 뭐 먹지?
나도 그렇게 생각해.
어제 영화 봤어
진짜 맛있더라
내가 할게
내가 할께!
같이 가자
뭐 하냐
밥 먹었니?
지금 어디야?
그거 내 거야.
그 사람 좋은 사람이야
비가 오네
추우면 옷 입어라
그러게 내가 뭐랬어
나 먼저 간다
오늘 진짜 춥다ㅋㅋㅋ
배고파 죽겠다 ㅠㅠ
그건 좀 아니지 않나
이따 전화할까?
커피 마실래?
그냥 갈걸
비 온대
걔도 온댔어
오늘 쉰다며
집에 있거든
내가 말했잖아
아까 밥 먹었는데
그럴 텐데…
왜 그런지 모르겠어
여기 어때?
그럼 내일 봐~
빨리 와
먼저 가
나한테 줘
같이 들어가
그거 버려
고마워!
미안해 ㅎㅎ
괜찮아?
뭐 그런 걸 다 기억하고 그래
너 때문에 웃겨
머리가 아파
나 요즘 바빠
그게 더 예뻐
이거 먹어 봐도 돼
몰라
전화 안 불러
벌써 왔구나
그랬군
오지 마
하지 마라
얼른 자렴
공부하면서
비 오니까
안 되면 말고
그냥 심심해서
가고 싶지만
거기 뭐가 있는데?
누가 그랬는가
내가 본 건가
그거 진짜 웃기당
그랬었잖아ㅋㅋ
내일 만나
짜증나
힘내!
안녕
응
왜?
그랬겠지 뭐
네 말이 맞아
"왜 안 와?" 하고 물어봤어
우리 친구야 🙂
하나만 먹자
그건 의자지 책상이 아니야
몇 시야
친한 친군데
또 사 줄게
좀 쉬어😊
이번 주말에 뭐 할 거야??
"""

HAEYO = """
오늘 뭐 먹을까요?
네, 맞아요.
저는 학생이에요
그건 제 거예요
어디 가세요?
잠깐만 기다려 주세요!
그렇죠
그렇지요
많이 춥네요ㅎㅎ
비가 온대요
제가 할게요~
같이 갈래요?
그랬군요
좋은데요
먹었거든요
그렇잖아요
왜요?
정말요
어제 샀어요 ㅠㅠ
필요해요
그게 중요하죠
둘 다 필요하거든요
연필요?
누구세요
안 돼요
그랬나요?
아니요
네.
아뇨
몇 개요
점수요
괜찮으세요…?
안녕하세요
감사해용
좋아여
그랬어용
"그건 안 돼." 라고 했어요.
'응'이라고 답하면 돼요
천천히 말해 줘요.
맞쥬
제주요
그건 아니고요
추우니까요
"""

HAPSYO = """
안녕하십니까
반갑습니다
감사합니다.
무엇을 도와드릴까 합니다
주문하신 상품이 출고되었습니다!
어디로 가십니까?
잠시만 기다려 주십시오
기다려 주십시요
확인해 드리겠습니다만
함께 가십시다
고맙습니다ㅎㅎ
안 됩니까?
그렇습니다…
제가 하겠슴다
감사함다
그렇게 합시다
"""

NONE = """
정말 필요
그건 안 중요
이불이랑 담요
영어 단어
우리 강아지
오늘도 출발
아마 그럴 듯
인정
두 개만
친구네 언니
어제 받은 편지
큰 피자
하나
그 남자
최고
오늘의 라면
냉장고
학교에서
서울까지
어머니
다음에
어제 감
참을 수 없음
먹기
와
헐
근데
음
아이고
그게 하오
동네
시원한 바다
혼자
먼저
그냥
17500원
내 노래
가위바위보
"""


def lines(block: str) -> list[str]:
    return [line for line in block.strip().split("\n") if line]


CASES = [
    *(("banmal", line) for line in lines(BANMAL)),
    *(("haeyo", line) for line in lines(HAEYO)),
    *(("hapsyo", line) for line in lines(HAPSYO)),
    *((None, line) for line in lines(NONE)),
]


def test_the_table_is_tried_on_enough_sentences() -> None:
    assert len(CASES) >= 120


@pytest.mark.parametrize(("wanted", "sentence"), CASES)
def test_a_sentence_has_the_level_of_its_ending(wanted: str | None, sentence: str) -> None:
    assert levels(sentence) == [wanted]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("오늘 춥네. 감기 조심해요! 고맙습니다…", ["오늘 춥네", "감기 조심해요", "고맙습니다"]),
        ("맞아ㅋㅋ 나도 그래", ["맞아", "나도 그래"]),
        ("좋아~ 가자", ["좋아", "가자"]),
        ("3.5킬로 뛰었어", ["3.5킬로 뛰었어"]),
        ("10시~12시에 와", ["10시~12시에 와"]),
        ("좋다!그럼 내일", ["좋다", "그럼 내일"]),
        ("진짜? Really? ㅋㅋㅋ 🙂", ["진짜"]),
        ("“왜 안 와?” 하고 물었어", ["하고 물었어"]),
        ("“왜 안 와?”", ["왜 안 와"]),
        ("잘 가(손을 흔든다)", ["잘 가"]),
        ("좋아 🙂 그럼 봐", ["좋아", "그럼 봐"]),
        ("It's fine, don't worry.", []),
        ("", []),
    ],
)
def test_a_text_is_cut_into_its_korean_sentences(text: str, wanted: list[str]) -> None:
    assert sentences(text) == wanted


def test_decomposed_hangul_is_read_like_composed() -> None:
    assert level("나는 갔어") == "banmal" == levels("나는 갔어")[0]


def test_an_answer_has_a_level_only_when_its_sentences_share_it() -> None:
    assert [answer_level(text) for text in ("좋아. 가자!", "좋아요. 가자!", "피자.", "Hello.")] == [
        "banmal",
        "mixed",
        None,
        None,
    ]


def test_shares_count_only_what_can_be_told() -> None:
    answers = ["좋아. 피자!", "맞아요. 감사합니다.", "Fine.", "갈래"]
    assert share_by_level(answers) == {"banmal": 0.5, "haeyo": 0.25, "hapsyo": 0.25}
    assert answers_by_level(answers) == {"banmal": 2 / 3, "haeyo": 0.0, "hapsyo": 0.0}
    assert sum(share_by_level(["Fine."]).values()) == 0.0


def test_no_entry_of_the_table_is_written_twice() -> None:
    entries = [entry for rule in RULES for entry in rule.entries.split()]
    assert len(entries) > 300 and {entry for entry in entries if entries.count(entry) > 1} == set()


@pytest.mark.parametrize(
    ("voice", "wanted", "told"),
    [
        ("casual", {"banmal"}, 0.8),
        ("polite", {"haeyo", "hapsyo"}, 0.95),
        ("teacher", {"haeyo", "hapsyo"}, 0.95),
        ("listener", {"haeyo", "hapsyo"}, 0.95),
    ],
)
def test_the_voices_that_ship_speak_at_their_level(voice: str, wanted: set[str], told: float) -> None:
    path = shipped(f"talk/{voice}.ko.jsonl")
    if not path.is_file():
        pytest.skip(f"{path.name} is not there yet")
    talks = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    said = [turn["content"] for talk in talks for turn in talk["messages"] if turn["role"] == "assistant"]
    found = [of for text in said for of in levels(text)]
    known = [of for of in found if of is not None]
    assert len(known) > told * len(found)
    assert sum(of in wanted for of in known) >= 0.97 * len(known)
