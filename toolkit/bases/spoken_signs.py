"""What speech and writing show themselves by, in Korean and in English: signs to count in a text.

`side` is general knowledge of the language (for English see Biber, Variation across Speech and Writing, 1988:
contractions, private verbs, hedges and fillers against nouns, prepositions, passives and long words). What a sign
weighs is learned from data; that it speaks for its own side, or for none, is not.
"""

import re
from dataclasses import dataclass

SPOKEN, WRITTEN, EITHER = 1, -1, 0
ANY = ""  # before an ending: anything, nothing too


@dataclass(frozen=True)
class Sign:
    """Something to count in a text, and the side it speaks for."""

    name: str
    side: int
    pattern: str

    @property
    def regex(self) -> re.Pattern[str]:
        """The pattern over a text as `plain` gives it: words between single spaces, a space at either end."""
        return re.compile(self.pattern)


def _words(name: str, side: int, words: str) -> Sign:
    """Whole words."""
    return Sign(name, side, f" (?:{'|'.join(words.split())})(?= )")


def _ends(name: str, side: int, ends: str, before: str = r"\w") -> Sign:
    """Ends of words, with something before them."""
    return Sign(name, side, f"{before}(?:{'|'.join(ends.split())})(?= )")


KOREAN = (
    _ends("ends in -요", SPOKEN, "요 죠 여 욥 용"),
    _ends("ends in -니다", EITHER, "니다 니까 십시오 시오", ANY),
    _ends("ends in plain -다", WRITTEN, "다", ANY),
    _ends("ends in -ㄴ다", WRITTEN, "한다 된다 는다 인다 진다 린다", ANY),
    Sign("long past (하였, 되었)", WRITTEN, r"(?:하였|되었|이었|였)\w*(?= )"),
    _ends(
        "ends in 반말",
        SPOKEN,
        "어 아 해 지 네 야 줘 봐 돼 래 까 게 자 니 냐 군 걸 거든 잖아 더라 구나 는데 은데 대 나 라고 려고 다고 고",
    ),
    _ends("noun form (-음, -기, 것)", WRITTEN, "음 함 됨 임 기 것"),
    _ends(
        "written joints",
        WRITTEN,
        "으며 이며 하며 되며 므로 으나 하나 하여 되어 으로써 로서 고자 도록 함에 에도",
        ANY,
    ),
    _ends("spoken joints", SPOKEN, "니까 는데 은데 던데 한데 거든 잖아 면은 다가 라서 길래 구 더니 다며 대서"),
    _ends("topic 은/는", WRITTEN, "은 는"),
    _ends("subject 이/가", WRITTEN, "이 가"),
    _ends("object 을/를", WRITTEN, "을 를"),
    _ends("의", WRITTEN, "의"),
    _ends("에서, 으로", WRITTEN, "에서 에서는 에는 으로 로"),
    _ends("에", WRITTEN, "에"),
    _ends("와/과", WRITTEN, "와 과"),
    _ends("랑, 하고", SPOKEN, "랑 하고"),
    _ends("한테", SPOKEN, "한테 한테서 보고"),
    _ends("에게", WRITTEN, "에게 에게서 께"),
    _ends("-적, -화, -성", WRITTEN, "적 적인 적으로 화 성 률 율", ANY),
    Sign(
        "written phrases",
        WRITTEN,
        "로 인[해하한]|에 따[라른]|에 대[한해하]|[을를] 통[해한하]|에 관[한해]|에 의[해한하]|로부터| 및 | 등 | 해당 "
        "| 또한 | 즉 | 그러나 | 따라서 | 매우 | 다소 | 상당[한히] | 약 |으로써|에 불과| 가운데 | 것으로 "
        "| 것이다 | 것은 | 경우 | 위[해한] | 대비 | 오는 | 지난 ",
    ),
    _words("나, 저, 우리", SPOKEN, "나 난 내 내가 나는 나도 날 나한테 저 제 제가 저는 전 저도 우리 저희"),
    _words(
        "너, 얘, 엄마",
        SPOKEN,
        "너 넌 네 네가 니가 너도 너는 널 너한테 니 당신 얘 걔 쟤 얘는 걔는 언니 오빠 형 누나 엄마 아빠",
    ),
    _words(
        "이거, 뭐, 왜",
        SPOKEN,
        "이거 그거 저거 이게 그게 저게 이건 그건 저건 이걸 그걸 여기 거기 저기 이런 그런 이렇게 그렇게 요즘 요새 "
        "뭐 뭔 뭘 뭐가 뭐야 왜 어디 언제 누가 누구 어떻게 어떡해 얼마나 몇 무슨 어느",
    ),
    Sign("거, 건, 걸", SPOKEN, r"(?:거|건|게|걸|거야|거예요|건데|거든|거지|거라|거니|거임|거 ?같\w*)(?= )"),
    _words(
        "진짜, 너무, 좀",
        SPOKEN,
        "진짜 정말 너무 완전 좀 막 그냥 되게 엄청 많이 아주 꼭 잘 더 다 또 빨리 얼른 이제 아직 벌써 자꾸 맨날 "
        "하나도 별로 조금 제일 훨씬 딱 확 쫌 겁나 무지 혹시 아마 이따 이따가 지금 방금 아까 같이 혼자 다시 먼저 일단 "
        "계속",
    ),
    _words(
        "fillers",
        SPOKEN,
        "아 어 야 음 응 네 예 아니 글쎄 근데 그런데 그래서 그니까 그럼 그러면 그러니까 맞아 맞아요 와 "
        "우와 헐 에이 아이고 흠 참 자 좋아 그래 그치 그쵸 오 안녕 뭐랄까 있잖아 그 저기",
    ),
    _words("안, 못", SPOKEN, "안 못"),
    Sign("-지 않다", WRITTEN, "지 [않못]"),
    Sign("ㅋㅋ, ㅠㅠ", SPOKEN, "[ㄱ-ㅎㅏ-ㅣ]+"),
    Sign("-시-", SPOKEN, r"(?:세요|셨|시는|실|십)(?=\w* )"),
    _ends("asks to do", SPOKEN, "줘 주세요 줄래 봐 세요 십시오 해라 어라 아라 하자 할까 지마 말고 마라", ANY),
    Sign("asks", SPOKEN, "(?:까|나요|가요|니|냐|냐고|을까|는지|래|나|죠)(?= $)"),
    Sign("digits", WRITTEN, "0+"),
    Sign("Latin letters", WRITTEN, "[a-z]+"),
    Sign("Sino-Korean verbs", WRITTEN, " [가-힣]{2,4}(?:하는|되는|하고|되고|한|된|할|될|하여|되어)(?= )"),
)  # fmt: skip

# Signs that also count once more when the last word has them: a Korean sentence shows its manner at its end.
AT_THE_END = (
    "ends in -요", "ends in -니다", "ends in plain -다", "ends in -ㄴ다", "long past (하였, 되었)", "ends in 반말",
    "noun form (-음, -기, 것)", "object 을/를", "에서, 으로", "거, 건, 걸", "asks to do",
)  # fmt: skip

_OPEN = r"(?:'\w+)?"  # a contraction may follow
ENGLISH = (
    _words("I, me, my", SPOKEN, r"i me my mine myself i'\w+"),
    _words("you", SPOKEN, r"you your yours yourself ya u y'all you'\w+"),
    _words("we, us", SPOKEN, r"we us our ours let's we'\w+"),
    Sign("n't", SPOKEN, r"n't(?= )| (?:cant|dont|wont|didnt|isnt|wasnt|doesnt|cannot)(?= )"),
    Sign(
        "'m, 're, 've, 'll",
        SPOKEN,
        r"'(?:re|ve|ll|d|m)(?= )| (?:im|ive|thats|its|whats|youre|theres|hes|shes|ill)(?= )",
    ),
    _words("it's, that's", SPOKEN, "(?:it|that|there|he|she|what|who|here|how|where)'s"),
    _words("gonna, kinda", SPOKEN, "gonna wanna gotta kinda sorta lemme gimme dunno cause cuz tho til"),
    _words(
        "fillers",
        SPOKEN,
        "oh yeah yes yep yup no nope ok okay well hey hi hello wow haha lol ugh hmm um uh please thanks "
        "thank sorry sure "
        "right honestly actually basically anyway maybe huh omg aw oops alright",
    ),
    _words(
        "so, just, really",
        SPOKEN,
        "so really just pretty super way too very even still totally literally definitely probably like "
        "quite kind sort "
        "bit lot lots tons loads bunch whole ever never always already",
    ),
    _words(
        "thing, someone, guys",
        SPOKEN,
        "thing things stuff something anything everything nothing someone anyone everyone everybody somebody anybody "
        "nobody guy guys kid kids mom dad folks one ones",
    ),
    _words("get", SPOKEN, "get gets got getting gotten"),
    _words(
        "think, want, go",
        SPOKEN,
        "think thought know guess mean want wanted wanna like love hate need feel hope wish bet wonder "
        "remember forgot "
        "believe let try tell ask look looks sounds seems keep see hear talk talking come go going happened supposed "
        "figure figured mind care swear kidding",
    ),
    _words("up, out, off", SPOKEN, "up out off down around back away"),
    Sign("opens with what, how", SPOKEN, rf"^ (?:what|why|how|where|when|who|which|whose){_OPEN}(?= )"),
    Sign(
        "opens with do, is, can",
        SPOKEN,
        rf"^ (?:do|does|did|is|are|was|were|can|could|would|should|will|have|has|had|am){_OPEN}(?= )",
    ),
    Sign("opens with so, but", SPOKEN, rf"^ (?:so|and|but|or|because|then|also|plus|that|it|there){_OPEN}(?= )"),
    _words("this, that, it", SPOKEN, "this that these those it here there"),
    _words("do, can, would", SPOKEN, "do does did can could would should will might"),
    _words("because, if, but", SPOKEN, "because cuz cause if but when then"),
    _words(
        "little words",
        SPOKEN,
        "(?:i|you|he|she|it|we|they|me|him|us|them|my|your|do|does|did|is|are|am|was|can|will|would|could|should|not"
        f"|no|so|if|but|or|and|that|this|what|when|how|why|there|here|have|just|get|got|all|about|up|out){_OPEN}",
    ),
    _words("may, shall, must", WRITTEN, "may shall must ought"),
    _words("was, been, be", WRITTEN, "was were been being be"),
    _words("has, had", WRITTEN, "has had have"),
    Sign(
        "passive",
        WRITTEN,
        r" (?:was|were|been|being|be|is|are) (?:\w+ly )?\w+(?:ed|en|wn|ught|ade|eld)(?= )",
    ),
    _words("the", WRITTEN, "the"),
    _words("a, an", WRITTEN, "an?"),
    _words("of", WRITTEN, "of"),
    _words("in", WRITTEN, "in"),
    _words(
        "prepositions",
        WRITTEN,
        "by for with from as into upon within among between during under against through throughout "
        "toward towards via "
        "per following regarding concerning including despite owing prior",
    ),
    _words(
        "which, however",
        WRITTEN,
        "which whom whose thereby whereby wherein thus hence therefore however moreover furthermore "
        "although whereas such "
        "both either neither nor several various numerous respectively also while including who",
    ),
    _ends(
        "-tion, -ment, -ity",
        WRITTEN,
        "tion tions sion ment ments ity ities ance ence ness ism ship ure age ory ics cy",
        r" \w{2,}",
    ),
    _ends("-al, -ive, -ous", WRITTEN, "al ive ous ic able ible ary ent ant ical", r" \w{3,}"),
    _ends("-ly", WRITTEN, "ly", r" \w{4,}"),
    _ends("-ed", WRITTEN, "ed", r" \w{3,}"),
    _ends("-er, -ist", WRITTEN, "er or ist ian ers ors ists ians", r" \w{3,}"),
    _ends("plural", WRITTEN, "s", r" \w{4,}[^su]"),
    _words("his, its, their", WRITTEN, "his her its their"),
    Sign("digits", WRITTEN, r" 0+\w*(?= )"),
)  # fmt: skip
