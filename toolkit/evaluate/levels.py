"""Speech levels of Korean sentences by a table of endings: 반말, 해요체, 합쇼체, or none that can be told.

Only the spelling of the last word counts (of the whole sentence for a few words that are answers by themselves). What
ends in a noun, a particle, an adverb, an interjection or a nominal form (-음, -기, -듯) has no level here, and neither
has the old 하오체. 반말 holds 해체 and 해라체 alike, the plain written -다 among them. What quotation marks and
brackets enclose is not judged where words stand outside of them. Out of reach: dialects, and nouns missing from the
table that end like a verb.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

Level = Literal["banmal", "haeyo", "hapsyo"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class Rule:
    """Endings of one level (None: no level). An entry is the end of a last word; `=` makes it the whole word, `+` the
    whole sentence; {ㅂ} stands for any syllable with that final consonant, {*} for any with one, [가나] for either.
    """

    level: Level | None
    entries: str


# The first rule that fits decides: exceptions stand before the ending that they look like.
RULES = (
    Rule("haeyo", "+네 +넵 +넹 +예 +아니요 +아뇨 +아니오"),
    Rule(
        "banmal",
        """
        +응 +웅 +엉 +그래 +아니 +아냐 +안녕 +왜 +그치 +글치 +됐어 +미안 +그니까 +그러니까 +근까 +당연하지
        """,
    ),
    Rule(
        None,
        """
        +어 +아 +야 +와 +오 +자 +뭐 +그러면 +그래서 +그런데 +근데 +그리고 +그래도 +하지만 +아니면 +왜냐면 +그러게
        +아이고 +아이구 +워워
        """,
    ),
    # 합쇼체
    Rule(
        "hapsyo",
        """
        {ㅂ}니다 {ㅂ}니다만 {ㅂ}니까 십시오 십시요 {ㅂ}시오 {ㅂ}시다 {ㅂ}쇼 읍니다 슴다 슴까 함다 임다
        """,
    ),
    # 해요체: -요 with its nouns, then -죠 and the playful spellings
    Rule(None, "=요 =담요 =동요 =민요 =가요계 =수요 =소요 =주요 =강요 =요요 =중요 =필요 불필요 안중요"),
    Rule("haeyo", "요 죠 쥬 [어아에예해네세죠지까데게래워봐줘돼]용 [어아해네세까지데에예]여"),
    # nouns and adverbs that end like 반말
    Rule(
        None,
        """
        강아지 송아지 편지 아버지 휴지 바지 돼지 먼지 반지 페이지 소시지 메시지 패키지 오렌지 잡지 까지 =의지 유지
        금지 방지 정지 공지 목적지 관광지 여행지 출발지 도착지 포장지 복지 토지 처지 경지 단무지 메모지 이미지 =가지
        판타지 환타지 메세지 억지 남자 여자 피자 의자 과자 모자 글자 숫자 감자 상자 문자 그림자 환자 학자 투자 부자
        약자 각자 소비자 사용자 담당자 판매자 구매자 관리자 참가자 혼자 액자 전자 원자 양자 유자 한자 =기자 =비자
        =이자 배우자 언니 어머니 할머니 아주머니 주머니 바구니 비키니 애니 도가니 동네 =너네 =걔네 =얘네 =그네 =우리네
        =하나 =누구나 =언제나 =어디나 =아무나 =나 =너 =저 =더 =다 =또 =바다 =판다 사이다 수다 =소다 캐나다 광고 최고
        보고서 창고 경고 재고 신고 중고 냉장고 금고 예고 원고 참고 =사고 에서 께서 한테서 순서 독서 계약서 비서 =라면
        컵라면 냉면 화면 장면 표면 측면 방면 전면 반면 비빔면 짜장면 당면 =면 콜라 빌라 고릴라 바닐라 나라 분야 심야
        평야 참여 기여 수여 급여 샤워 파워 타워 안내 시내 실내 아내 국내 =내 영어 단어 언어 용어 국어 외국어 일본어
        중국어 연어 고등어 상어 인어 붕어 장어 광어 검색어 표어 오징어 문어 케어 육아 치아 아시아 엄마 드라마 고구마
        장마 치마 이마 악마 하마 아줌마 설마 얼마 가운데 =군데 장군 육군 해군 공군 식당 성당 담당 해당 정당 무게 가게
        =이게 =그게 =저게 =뭔가 전문가 노래 미래 빨래 나래 아래 원래 본래 고래 모래 거래 기대 시대 군대 무대 침대 절대
        상대 연대 반대 현대 근대 최대 확대 세대 초대 올해 이해 피해 오해 새해 방해 손해 화해 동해 서해 남해 지난해
        배려 고려 염려 우려 격려 전혀 먼저 서로 언제든지
        """,
    ),
    # 반말: statements and questions in -어 -아 and contracted stems
    Rule(
        "banmal",
        """
        어 {*}아 나아 해 워 [나져도들어아녀려사해고봐라]와 봐 줘 둬 놔 꿔 춰 돼 되 려 겨 져 쳐 켜 펴 혀 셔 여 뗘
        [보지힘끝꺼혼화빼해겨짜어아]내 빼 =깨 =세 =베 =매 바빠 아파 나빠 고파 예뻐 이뻐 기뻐 슬퍼 모아 따라 커 써 =떠
        =꺼 잠가 담가 들러 치러 {ㄹ}라 [불눌들흘질찔둘굴풀]러 [어아이그저]때 이래 =그래 =저래 뭐래 어째 =와 =가 =자
        =서 =사 들어가 걸어가 돌아가 올라가 내려가 나가 따라가 데려가 굴러가 넘어가 날아가 지나가 살아가 찾아가 뛰어가
        가져가 야 지 그렇치 맞치 네 넹 =싸 =뭐게 =누구게 텨 같애 비싸 안와 비와 안가 잘가
        """,
    ),
    # -ㄴ데 -대 -거든 -잖아 -더라 -구나 -ㄹ게 -ㄹ까 -ㄹ래 -ㄹ걸
    Rule(
        "banmal",
        """
        {ㄴ}데 {ㄴ}대 {ㅆ}대 {ㅄ}대 {ㅂ}대 하대 [좋같싶맞많높작짧]대 거든 걸랑 잖아 잖어 더라 구나 군 구먼 구만 {ㄹ}게
        {ㄹ}께 {ㄹ}까 {ㄹ}래 {ㄹ}걸 [는은던한된인]걸 =걸
        """,
    ),
    # -다 -냐 -니 -나 -ㄴ가
    Rule(
        "banmal",
        """
        다 냐 니 {ㅆ}나 {ㅄ}나 {ㄶ}나 {ㅂ}나 [먹크맞좋같많싶되하가오보쓰]나 생각나 화나 신나 일어나 끝나 만나 떠나
        혼나 나타나 달아나 태어나 깨어나 빛나 기억나 짜증나 눈물나 열나 소문나 고장나 겁나
        [인는은던건한된운런른선큰간온]가
        """,
    ),
    # -자 -라 -렴 -마
    Rule(
        "banmal",
        """
        [하가보먹놀말두쉬사타오내주치리들기나우앉읽듣걷찾담풀쓰잡지추르으서어돼시키마자]자
        [돌파누꾸끄알닫빼이루려쏘떠뜨펴켜열걸섞씻웃뛰갚맡묶업빌]자 [더해봐아어와워거가마줘지려져켜여겨말돼주하]라 렴
        려무나 지마 =마
        """,
    ),
    # connective endings left open
    Rule(
        "banmal",
        """
        고 {ㅆ}구 {ㅄ}구 [하좋라다냐자같]구 [아어여해와워려져봐줘돼라]서 면서 면 니까 지만 다며 라며 든지 든가 =게
        느라 [으하보사가]러
        """,
    ),
    # playful spellings
    Rule("banmal", "{ㅆ}당 {ㅄ}당 [좋같싶맞간한온기이]당 {ㅆ}엉 {ㅄ}엉 {ㅆ}옹 좋앙"),
)

_FINALS = " ㄱㄲㄳㄴㄵㄶㄷㄹㄺㄻㄼㄽㄾㄿㅀㅁㅂㅄㅅㅆㅇㅈㅊㅋㅌㅍㅎ"
_BREAK = re.compile(
    r"[.!?。！？…\n]+[\"'”’)」』]*(?=\s|$|[가-힣])|[~〜]+(?=\s|$)|(?<=[ㅋㅎㅠㅜ])\s+|\^\^+|;;+|[☀-➿\uFE0F\U0001F300-\U0001FAFF]+"
)
_ENCLOSED = re.compile(
    r"\"[^\"\n]*\"|“[^”\n]*”|‘[^’\n]*’|「[^」\n]*」|『[^』\n]*』|\([^)\n]*\)|(?<![A-Za-z0-9])'[^'\n]*'(?![A-Za-z])"
)
_AROUND = re.compile(r"^[^가-힣A-Za-z0-9]+|[^가-힣A-Za-z0-9]+$")
_HANGUL = re.compile(r"[가-힣]")


def sentences(text: str) -> list[str]:
    """The Korean sentences of a text, without what encloses and follows them (quotes, ㅋㅋ, emoji, punctuation)."""
    text = unicodedata.normalize("NFC", text)
    outside = _ENCLOSED.sub(" ", text)
    parts = _BREAK.split(outside if _HANGUL.search(outside) else text)
    return [_AROUND.sub("", part) for part in parts if _HANGUL.search(part)]


def level(sentence: str) -> Level | None:
    """The speech level of one Korean sentence, or None where its ending does not tell."""
    words = re.findall(r"[가-힣A-Za-z0-9]+", sentence)
    if not words:
        return None
    if len(words) > 1 and words[-1] == "뭐":  # "그랬겠지 뭐": said after the ending
        words.pop()
    whole = words[0] if len(words) == 1 else ""
    return next((of for of, pattern in _compiled() if pattern.search(f"+{whole}" if whole else f" {words[-1]}")), None)


def levels(text: str) -> list[Level | None]:
    """The speech level of every Korean sentence of a text, in order."""
    return [level(sentence) for sentence in sentences(text)]


def answer_level(text: str) -> Level | Literal["mixed"] | None:
    """The level that all sentences of an answer share which have one; "mixed" where they do not share it, None without
    any.
    """
    found = {of for of in levels(text) if of is not None}
    return "mixed" if len(found) > 1 else next(iter(found), None)


@cache
def _compiled() -> tuple[tuple[Level | None, re.Pattern[str]], ...]:
    return tuple(
        (rule.level, re.compile("(?:" + "|".join(map(_pattern, rule.entries.split())) + ")$")) for rule in RULES
    )


def _pattern(entry: str) -> str:
    start = {"=": r"[ +]", "+": r"\+"}.get(entry[0], "")
    return start + re.sub(r"\{(.)\}", lambda found: _syllables(found[1]), entry.lstrip("=+"))


def _syllables(final: str) -> str:
    places = range(1, 28) if final == "*" else [_FINALS.index(final)]
    return "[" + "".join(chr(0xAC00 + first + place) for first in range(0, 11172, 28) for place in places) + "]"
