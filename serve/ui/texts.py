"""Every word that the page shows, in both languages, and which of the two a visitor reads."""

import html
from collections.abc import Mapping
from typing import Any, Literal, get_args

Language = Literal["en", "ko"]
COOKIE = "maltu_language"  # what the switch was set to; without it the browser's own language decides

TEXTS: Mapping[Language, Mapping[str, str]] = {
    "en": {
        "language": "en",
        "chat": "Chat",
        "arena": "Arena",
        "feedback": "Feedback",
        "switch": "한국어",
        "model": "Model",
        "model_info": "auto: a router picks by what you say. mix: several answer as one, as you weigh them.",
        "talk": "Talk",
        "empty": "Say something.",
        "message": "Message, then Enter",
        "stop": "Stop",
        "retry": "Again",
        "clear": "Clear",
        "settings": "Settings",
        "weights": "How much each one says",
        "temperature": "Temperature",
        "temperature_info": "0: always the likeliest word. Higher: more varied.",
        "top_p": "Top p",
        "top_p_info": "Only the likeliest words that make up this share.",
        "top_k": "Top k",
        "top_k_info": "Only this many of the likeliest words. 0: no bound.",
        "min_p": "Min p",
        "min_p_info": "Only words at least this likely, the likeliest being 1.",
        "repetition_penalty": "Repetition penalty",
        "repetition_penalty_info": "Above 1: what was said already comes less often.",
        "max_tokens": "Longest answer",
        "max_tokens_info": "In tokens; a token is about a syllable or a short word.",
        "seed": "Seed",
        "seed_info": "The same number and the same talk: the same answer. Empty: a new one each time.",
        "bad_seed": "A seed is a whole number; leave it empty for a new answer each time.",
        "key": "API key",
        "key_info": "Then Enter. Kept in this tab until you close it, and sent with each question.",
        "edit": "Edit",
        "send": "Send",
        "save": "Save",
        "cancel": "Cancel",
        "copy": "Copy",
        "up": "Good answer",
        "down": "Bad answer",
        "correct": "Correct",
        "correct_label": "What should have been said",
        "edit_label": "What you said",
        "corrected": "Better:",
        "you": "You",
        "answer": "Answer",
        "thanks": "Stored. The Feedback tab shows it.",
        "forgot": "The talk has grown too long for this model: its oldest part was left out.",
        "no_weight": "Give at least one of them some weight.",
        "unreachable": "The server cannot be reached. Is it still running?",
        "broken_off": "The connection broke off before the answer was over.",
        "invalid_api_key": "This server wants an API key that it knows: write yours above.",
        "bad_key": "An API key is letters, digits and signs without spaces.",
        "queue_full": "Too many are asking at the moment. Try again in a little while.",
        "rate_limited": "You have asked as often as this server allows. Try again in a little while.",
        "stopping": "The server is stopping. Try again later.",
        "context_length_exceeded": "That is too long for this model. Say it in fewer words.",
        "arena_info": "Two models answer the same words, unseen. Say which was better; then you see who they were.",
        "arena_box": "What both are asked, then Enter",
        "drawn": "Drawn from",
        "drawn_info": "Each round draws two of these.",
        "too_few": "An arena needs at least two models to draw from.",
        "left": "Left",
        "right": "Right",
        "left_better": "Left is better",
        "right_better": "Right is better",
        "tie": "Tie",
        "both_bad": "Both bad",
        "nothing": "(said nothing)",
        "stored_empty": "Nothing is stored of you here. Thumbs, corrections and votes will show up.",
        "stored_info": "What this server keeps of what you judged.",
        "feedback_off": "This server takes no feedback in.",
        "export": "Export",
        "delete": "Delete",
        "delete_all": "Delete all",
        "sure": "Really delete all?",
        "deleted": "Deleted.",
        "kind_thumb": "Thumb",
        "kind_pair": "Arena",
        "kind_correction": "Correction",
        "better_a": "better",
        "worse": "worse",
    },
    "ko": {
        "language": "ko",
        "chat": "대화",
        "arena": "겨루기",
        "feedback": "의견",
        "switch": "English",
        "model": "모델",
        "model_info": "auto: 하는 말을 보고 알맞은 쪽을 골라요. mix: 정한 비율대로 여럿이 함께 답해요.",
        "talk": "대화",
        "empty": "말을 걸어 보세요.",
        "message": "할 말을 쓰고 Enter",
        "stop": "멈춤",
        "retry": "다시",
        "clear": "지우기",
        "settings": "설정",
        "weights": "누가 얼마나 말할지",
        "temperature": "온도",
        "temperature_info": "0이면 늘 가장 그럴듯한 말만, 높을수록 다양하게.",
        "top_p": "Top p",
        "top_p_info": "가장 그럴듯한 말부터 이 비율까지만 골라요.",
        "top_k": "Top k",
        "top_k_info": "가장 그럴듯한 말부터 이만큼만 골라요. 0이면 제한 없음.",
        "min_p": "Min p",
        "min_p_info": "가장 그럴듯한 말을 1로 볼 때 이보다 그럴듯한 말만 골라요.",
        "repetition_penalty": "반복 줄이기",
        "repetition_penalty_info": "1보다 크면 이미 한 말을 덜 되풀이해요.",
        "max_tokens": "답의 최대 길이",
        "max_tokens_info": "토큰 수. 한 토큰은 한두 글자쯤이에요.",
        "seed": "시드",
        "seed_info": "같은 수에 같은 대화면 같은 답이 나와요. 비우면 매번 달라요.",
        "bad_seed": "시드에는 정수를 적거나, 비워 두세요.",
        "key": "API 키",
        "key_info": "쓰고 Enter. 이 탭을 닫을 때까지만 간직하고, 물을 때마다 함께 보내요.",
        "edit": "고치기",
        "send": "보내기",
        "save": "저장",
        "cancel": "취소",
        "copy": "복사",
        "up": "좋은 답",
        "down": "아쉬운 답",
        "correct": "바로잡기",
        "correct_label": "이렇게 말했어야 해요",
        "edit_label": "내가 한 말",
        "corrected": "바로잡은 말:",
        "you": "나",
        "answer": "답",
        "thanks": "저장했어요. 의견 탭에서 볼 수 있어요.",
        "forgot": "대화가 이 모델에 담기엔 너무 길어져서 앞부분을 빼고 답했어요.",
        "no_weight": "적어도 하나에는 비율을 주세요.",
        "unreachable": "서버에 연결할 수 없어요. 아직 켜져 있나요?",
        "broken_off": "답이 끝나기 전에 연결이 끊겼어요.",
        "invalid_api_key": "이 서버는 맞는 API 키가 있어야 해요. 위에 적어 주세요.",
        "bad_key": "API 키에는 빈칸 없이 영문자와 숫자, 기호만 쓸 수 있어요.",
        "queue_full": "지금은 묻는 사람이 너무 많아요. 잠시 뒤에 다시 해 보세요.",
        "rate_limited": "이 서버가 정한 횟수만큼 다 물었어요. 잠시 뒤에 다시 해 보세요.",
        "stopping": "서버가 멈추는 중이에요. 나중에 다시 해 보세요.",
        "context_length_exceeded": "이 모델에는 너무 긴 말이에요. 조금 줄여서 말해 보세요.",
        "arena_info": "이름을 가린 두 모델이 같은 말에 답해요. 어느 쪽이 나은지 고르면 누구였는지 보여요.",
        "arena_box": "둘에게 할 말을 쓰고 Enter",
        "drawn": "겨룰 모델",
        "drawn_info": "매번 이 가운데 둘을 뽑아요.",
        "too_few": "겨루려면 모델이 둘은 있어야 해요.",
        "left": "왼쪽",
        "right": "오른쪽",
        "left_better": "왼쪽이 나아요",
        "right_better": "오른쪽이 나아요",
        "tie": "비겼어요",
        "both_bad": "둘 다 별로",
        "nothing": "(아무 말도 안 함)",
        "stored_empty": "아직 저장된 의견이 없어요. 좋은 답 표시, 바로잡은 말, 겨루기 결과가 여기 보여요.",
        "stored_info": "내가 남긴 의견 가운데 이 서버가 보관하는 것이에요.",
        "feedback_off": "이 서버는 의견을 받지 않아요.",
        "export": "내보내기",
        "delete": "지우기",
        "delete_all": "모두 지우기",
        "sure": "정말 모두 지울까요?",
        "deleted": "지웠어요.",
        "kind_thumb": "평가",
        "kind_pair": "겨루기",
        "kind_correction": "바로잡기",
        "better_a": "나음",
        "worse": "못함",
    },
}  # fmt: skip


class Trouble(Exception):
    """The API gave no answer: its message, and its code. A code that is the name of a text is told in its words."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


def language_of(request: Any) -> Language:
    """The language of the visitor that a request comes from."""
    if request is None:
        return "en"
    chosen = request.cookies.get(COOKIE)
    if chosen in get_args(Language):
        return "ko" if chosen == "ko" else "en"
    return "ko" if request.headers.get("accept-language", "").lower().startswith("ko") else "en"


def text(name: str, request: Any) -> str:
    """A text in the visitor's language."""
    return TEXTS[language_of(request)][name]


def told(trouble: Trouble, request: Any) -> str:
    """A trouble as a line of HTML."""
    texts = TEXTS[language_of(request)]
    return f"⚠ {html.escape(texts.get(trouble.code or '', str(trouble)))}"
