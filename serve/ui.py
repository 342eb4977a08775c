"""The chat page: Gradio, speaking HTTP to the API like any app. It loads nothing from other machines.

Labels follow the browser's language (Korean or English). The talk lives in the browser; the server keeps none of it.
"""

import html
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio
import httpx
from starlette.applications import Starlette

TEXTS = {
    "en": {
        "model": "Model",
        "talk": "Talk",
        "empty": "Say something.",
        "message": "Message, then Enter",
        "stop": "Stop",
        "retry": "Again",
        "clear": "Clear",
        "settings": "Settings",
        "temperature": "Temperature",
        "temperature_info": "0: always the likeliest word. Higher: more varied.",
        "top_p": "Top p",
        "top_p_info": "Only the likeliest words that make up this share.",
        "max_tokens": "Longest answer",
        "max_tokens_info": "In tokens; a token is about a syllable or a short word.",
        "key": "API key",
        "key_info": "Kept in this tab alone, and sent with each question.",
        "forgot": "The talk has grown too long for this model: its oldest part was left out.",
        "unreachable": "The server cannot be reached. Is it still running?",
    },
    "ko": {
        "model": "모델",
        "talk": "대화",
        "empty": "말을 걸어 보세요.",
        "message": "할 말을 쓰고 Enter",
        "stop": "멈춤",
        "retry": "다시",
        "clear": "지우기",
        "settings": "설정",
        "temperature": "온도",
        "temperature_info": "0이면 늘 가장 그럴듯한 말만, 높을수록 다양하게.",
        "top_p": "Top p",
        "top_p_info": "가장 그럴듯한 말부터 이 비율까지만 골라요.",
        "max_tokens": "답의 최대 길이",
        "max_tokens_info": "토큰 수. 한 토큰은 한두 글자쯤이에요.",
        "key": "API 키",
        "key_info": "이 탭에만 두고, 물을 때마다 함께 보내요.",
        "forgot": "대화가 이 모델에 담기엔 너무 길어져서 앞부분을 빼고 답했어요.",
        "unreachable": "서버에 닿지 않아요. 아직 켜져 있나요?",
    },
}
CSS = """
main { width: 100%; max-width: 56rem !important; margin: 0 auto !important; }
#talk .icon-button-wrapper.top-panel { display: none; }
#talk { height: calc(100dvh - 21rem) !important; min-height: 15rem; }
#talk .message-content { white-space: pre-wrap; }
#controls button { min-width: 0; }
footer { display: none !important; }
"""
Talk = list[dict[str, str]]
_TIMEOUT = httpx.Timeout(600.0, connect=5.0)


@dataclass(frozen=True)
class Wish:
    """What the controls say: who answers, and how."""

    model: str
    temperature: float
    top_p: float
    max_tokens: int
    key: str | None


class Trouble(Exception):
    """The API gave no answer: its message, and its code."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class Caller:
    """Talks to the API at an address."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def models(self, key: str | None) -> dict[str, Any]:
        """Every model by name, runs first. Raises Trouble."""
        try:
            async with self._client(key) as client:
                response = await client.get("/v1/models")
                await _check(response)
        except httpx.HTTPError:
            raise Trouble("", "unreachable") from None
        entries = sorted(response.json()["data"], key=lambda entry: entry["maltu"]["kind"] == "base")
        return {entry["id"]: entry["maltu"] for entry in entries}

    async def stream(self, talk: Sequence[Mapping[str, str]], wish: Wish) -> AsyncIterator[str]:
        """Pieces of the next answer. Raises Trouble."""
        body = {
            "model": wish.model,
            "messages": list(talk),
            "stream": True,
            "temperature": wish.temperature,
            "top_p": wish.top_p,
            "max_completion_tokens": wish.max_tokens,
        }
        try:
            async with (
                self._client(wish.key) as client,
                client.stream("POST", "/v1/chat/completions", json=body) as response,
            ):
                await _check(response)
                async for line in response.aiter_lines():
                    yield _piece(line)
        except httpx.HTTPError:
            raise Trouble("", "unreachable") from None

    def _client(self, key: str | None) -> httpx.AsyncClient:
        sendable = bool(key) and str(key).isascii() and str(key).isprintable()
        headers = {"authorization": f"Bearer {key}"} if sendable else {}
        return httpx.AsyncClient(base_url=self._address, headers=headers, timeout=_TIMEOUT, trust_env=False)


class Page:
    """What the page's events do. A talk is a list of messages; a status is one line below it."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def look(self, model: str | None, key: str | None, request: gradio.Request) -> tuple[Any, ...]:
        """The models to choose from, the chosen one's own settings, and the status."""
        try:
            models = await self._caller.models(key)
        except Trouble as trouble:
            return gradio.skip(), {}, *[gradio.skip()] * 3, _says(trouble, request)
        chosen = model if model in models else next(iter(models))
        return gradio.Dropdown(choices=list(models), value=chosen), models, *settings_of(models, chosen), ""

    async def ask(self, said: str, talk: Any) -> tuple[str, Talk]:
        """Put what the visitor typed at the end of the talk, and empty the box."""
        messages = plain(talk)
        return "", shown([*messages, {"role": "user", "content": said.strip()}] if said.strip() else messages)

    async def again(self, talk: Any) -> Talk:
        """The talk without what followed the visitor's last words."""
        messages = plain(talk)
        while messages and messages[-1]["role"] != "user":
            messages.pop()
        return shown(messages)

    async def answer(
        self,
        talk: Any,
        model: str,
        temperature: float,
        top_p: float,
        max_tokens: int,
        key: str | None,
        request: gradio.Request,
    ) -> AsyncIterator[tuple[Talk, str]]:
        """The talk with the next answer growing at its end. What cannot be answered leaves the talk as it is."""
        messages, status, said = plain(talk), "", ""
        if not messages or messages[-1]["role"] != "user":
            yield shown(messages), status
            return
        wish = Wish(model or "", temperature, top_p, int(max_tokens), key)
        sent = messages
        while True:
            try:
                async for piece in self._caller.stream(sent, wish):
                    said += piece
                    if piece:
                        yield shown(messages, said), status
                if not said:
                    yield shown(messages, "…"), status
                return
            except Trouble as trouble:
                if trouble.code != "context_length_exceeded" or len(sent) < 3:
                    yield shown(messages, said), _says(trouble, request)
                    return
                sent, status = sent[2:], _text("forgot", request)


def settings_of(models: Mapping[str, Any], model: str) -> tuple[Any, ...]:
    """A model's own temperature, top_p and longest answer, for the controls."""
    own = models.get(model, {}).get("defaults", {})
    room = max(2, models.get(model, {}).get("context", 1024))
    longest = gradio.Slider(value=min(own.get("max_tokens", 256), room), maximum=room)
    return own.get("temperature", 0.7), own.get("top_p", 0.9), longest


def plain(talk: Any) -> Talk:
    """A chatbot's value as role and text alone, whichever form Gradio holds it in."""
    return [{"role": turn["role"], "content": html.unescape(_flat(turn["content"]))} for turn in talk or []]


def shown(talk: Talk, answer: str = "") -> Talk:
    """The chatbot's value of a talk and an answer to it. Gradio reads HTML there, so what could be HTML is escaped."""
    said = [{"role": "assistant", "content": answer}] if answer else []
    return [turn | {"content": html.escape(turn["content"], quote=False)} for turn in (*talk, *said)]


def build(address: str, wants_key: bool) -> Any:
    """The page, for an API at `address`. `wants_key`: whether visitors have to bring an API key."""
    page, say = Page(Caller(address)), gradio.I18n(**TEXTS)
    with gradio.Blocks(analytics_enabled=False, title="말투 Maltu", fill_height=True) as blocks:
        known = gradio.State({})
        key = gradio.Textbox(label=say("key"), info=say("key_info"), type="password", visible=wants_key, max_lines=1)
        model = gradio.Dropdown(label=say("model"), choices=[], interactive=True, elem_id="model")
        talk = gradio.Chatbot(
            label=say("talk"),
            elem_id="talk",
            placeholder=say("empty"),
            render_markdown=False,
            latex_delimiters=[],
            buttons=["copy"],
            scale=1,
        )
        status = gradio.Markdown("", elem_id="status")
        box = gradio.Textbox(
            placeholder=say("message"), show_label=False, label=say("message"), submit_btn=True, autofocus=True,
            max_lines=6, max_length=20_000, elem_id="box",
        )  # fmt: skip
        with gradio.Row(elem_id="controls"):
            again = gradio.Button(say("retry"), size="sm", min_width=0)
            stop = gradio.Button(say("stop"), size="sm", min_width=0)
            clear = gradio.Button(say("clear"), size="sm", min_width=0)
        with gradio.Accordion(say("settings"), open=False):
            temperature = gradio.Slider(0, 2, 0.7, step=0.05, label=say("temperature"), info=say("temperature_info"))
            top_p = gradio.Slider(0, 1, 0.9, step=0.01, label=say("top_p"), info=say("top_p_info"))
            longest = gradio.Slider(1, 1024, 256, step=1, label=say("max_tokens"), info=say("max_tokens_info"))
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        look = {"fn": page.look, "inputs": [model, key], "outputs": [model, known, temperature, top_p, longest, status]}
        blocks.load(**look, **quiet)
        key.change(**look, **quiet)
        model.input(settings_of, [known, model], [temperature, top_p, longest], **quiet)
        answer = {
            "fn": page.answer,
            "inputs": [talk, model, temperature, top_p, longest, key],
            "outputs": [talk, status],
            "concurrency_limit": None,  # the API bounds how many are answered
        }
        sent = box.submit(page.ask, [box, talk], [box, talk], concurrency_limit=None, **quiet).then(**answer, **quiet)
        redone = again.click(page.again, talk, talk, concurrency_limit=None, **quiet).then(**answer, **quiet)
        stop.click(None, cancels=[sent, redone], **quiet)
        clear.click(lambda: ([], ""), None, [talk, status], cancels=[sent, redone], **quiet)
    return blocks, say


def mount(app: Starlette, address: str, wants_key: bool) -> None:
    """Put the page at the root of an app whose own routes come first."""
    blocks, say = build(address, wants_key)
    sans = ("system-ui", "Apple SD Gothic Neo", "Malgun Gothic", "Noto Sans KR", "Noto Sans CJK KR", "sans-serif")
    fonts = [gradio.themes.Font(name) for name in sans]
    gradio.mount_gradio_app(
        app,
        blocks,
        path="/",
        theme=gradio.themes.Default(font=fonts, font_mono=[gradio.themes.Font("monospace")]),
        css=CSS,
        i18n=say,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        max_file_size=0,
        show_error=False,
    )


async def _check(response: httpx.Response) -> None:
    """Raises Trouble for a response that is an error."""
    if response.is_success:
        return
    await response.aread()
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        error = {"message": f"HTTP {response.status_code}"}
    raise Trouble(error["message"], error.get("code"))


def _piece(line: str) -> str:
    """The text in one line of an event stream; most lines have none."""
    if not line.startswith("data: {"):
        return ""
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        raise Trouble(event["error"]["message"], event["error"].get("code"))
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])


def _flat(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in content)


def _says(trouble: Trouble, request: gradio.Request) -> str:
    return f"⚠ {_text('unreachable', request) if trouble.code == 'unreachable' else html.escape(str(trouble))}"


def _text(name: str, request: gradio.Request) -> str:
    """A text in the visitor's language."""
    asked = request.headers.get("accept-language", "") if request else ""
    return TEXTS["ko" if asked.lower().startswith("ko") else "en"][name]
