"""The page's layout and wiring: three tabs, one key, one language. It loads nothing from other machines."""

import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gradio
from starlette.applications import Starlette

from serve.names import BASE, MIX
from serve.ui import parts
from serve.ui.arena import Arena, Winner
from serve.ui.calls import Caller, Visitor
from serve.ui.opinions import Opinions
from serve.ui.talking import Talking, choices_of, drawn_of, settings_of, weights_of
from serve.ui.texts import COOKIE, TEXTS, Trouble, language_of, told

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
FREE: dict[str, Any] = QUIET | {"concurrency_limit": None}  # the API bounds how many are answered

# What a tab keeps until it is closed: its talk, its visitor's key, and the id that its feedback stands under.
_ARRIVE = """(talk, key, conversation) => {
  const random = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0"));
  const id = sessionStorage.getItem("maltu.conversation") || random().join("");
  sessionStorage.setItem("maltu.conversation", id);
  const turns = JSON.parse(sessionStorage.getItem("maltu.talk") || "[]");
  return [{ turns, busy: false }, sessionStorage.getItem("maltu.key") || key, id];
}"""
_BRING = """(key, ...rest) => {
  sessionStorage.setItem("maltu.key", key);
  return [key, ...rest];
}"""
_SWITCH = f"""() => {{
  const language = document.documentElement.lang === "ko" ? "en" : "ko";
  document.cookie = `{COOKIE}=${{language}}; path=/; max-age=31536000; samesite=strict`;
}}"""
_SAVE = """(lines) => {
  if (!lines) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines], { type: "application/jsonl" }));
  link.download = "maltu-feedback.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
}"""
_HALT = "(talk) => ({ ...talk, busy: false })"
_EMPTY = '() => [{ turns: [], busy: false }, ""]'


@dataclass
class Labels:
    """Every component whose words depend on the language, with what tells them."""

    told: list[tuple[Any, Callable[[Mapping[str, str]], Any]]] = field(default_factory=list)

    def add(self, component: Any, **names: str) -> Any:
        """Remember a component: which of its properties has which text. Gives it back."""
        self.told.append((component, lambda texts: gradio.update(**_words(texts, names))))
        return component

    def part(self, component: Any, **names: str) -> Any:
        """Like add, for a part that has all texts at hand."""
        self.told.append((component, lambda texts: gradio.update(texts=dict(texts), **_words(texts, names))))
        return component

    @property
    def components(self) -> list[Any]:
        """All of them, as outputs of `speak`."""
        return [component for component, _ in self.told]

    def speak(self, request: gradio.Request) -> list[Any]:
        """Their words in the visitor's language."""
        texts = TEXTS[language_of(request)]
        return [update(texts) for _, update in self.told]


@dataclass(frozen=True)
class Common:
    """What all tabs need: who asks, what can be asked, where words are told."""

    labels: Labels
    say: gradio.I18n
    caller: Caller
    key: Any
    conversation: Any
    known: Any

    @property
    def visitor(self) -> list[Any]:
        """Inputs of every event that calls the API."""
        return [self.key, self.conversation]


def looking(caller: Caller) -> Callable[..., Awaitable[tuple[Any, ...]]]:
    """What a visitor's arrival does, and a new key: find out who can be asked, and the chosen one's own settings."""

    async def look(
        request: gradio.Request, key: str, conversation: str, model: str | None, weights: Any
    ) -> tuple[Any, ...]:
        visitor = Visitor(key, conversation)
        try:
            models = await caller.models(visitor)
            judges = await caller.takes_feedback(visitor)
        except Trouble as trouble:
            return *[gradio.skip()] * 11, told(trouble, request)
        name, drawn = choices_of(models, model), drawn_of(models)
        sliders = gradio.update(value=weights_of(models, weights), visible=name == MIX)
        likely = [one for one in drawn if one != BASE] if len(drawn) > 2 else drawn
        arena, talk = gradio.update(choices=drawn, value=likely), gradio.update(judge=judges)
        choice = gradio.update(choices=list(models), value=name)
        return models, choice, sliders, arena, talk, *settings_of(models, name), ""

    return look


def build(address: str, wants_key: bool) -> Any:
    """The page, for an API at `address`. `wants_key`: whether visitors have to bring an API key."""
    labels, say = Labels(), gradio.I18n(**{str(language): dict(texts) for language, texts in TEXTS.items()})
    with gradio.Blocks(analytics_enabled=False, title="말투 Maltu") as blocks:
        with gradio.Row(elem_id="head"):
            gradio.HTML("<h1>말투 <small>Maltu</small></h1>", elem_id="title", js_on_load=None)
            switch = labels.add(gradio.Button(say("switch"), size="sm", elem_id="language"), value="switch")
        key = gradio.Textbox(
            label=say("key"), info=say("key_info"), type="password", visible=wants_key, max_lines=1, elem_id="key"
        )
        labels.add(key, label="key", info="key_info")
        conversation = gradio.Textbox(visible=False)
        common = Common(labels, say, Caller(address), key, conversation, gradio.State({}))
        with gradio.Tabs(elem_id="tabs"):
            with labels.add(gradio.Tab(say("chat"), id="chat"), label="chat"):
                model, weights, seen = chat_tab(common)
            with labels.add(gradio.Tab(say("arena"), id="arena"), label="arena"):
                drawn = arena_tab(common)
            with labels.add(gradio.Tab(say("feedback"), id="feedback"), label="feedback") as tab:
                feedback_tab(common, tab)
        talk, *settings, status = seen
        arriving: dict[str, Any] = {
            "fn": looking(common.caller),
            "inputs": [*common.visitor, model, weights],
            "outputs": [common.known, model, weights, drawn, talk, *settings, status],
        }
        speaking: dict[str, Any] = {"fn": labels.speak, "inputs": None, "outputs": labels.components}
        kept = [talk, *common.visitor]
        blocks.load(None, kept, kept, js=_ARRIVE, **QUIET).then(**arriving, **FREE)
        blocks.load(**speaking, **FREE)
        gradio.on([key.submit, key.blur], **arriving, js=_BRING, **FREE)
        switch.click(**speaking, js=_SWITCH, **FREE)
    return blocks, say


def chat_tab(common: Common) -> tuple[Any, Any, list[Any]]:
    """The chat; gives the model, the weights, and what else a look at the models changes."""
    labels, say, page = common.labels, common.say, Talking(common.caller)
    model = gradio.Dropdown(label=say("model"), info=say("model_info"), choices=[], interactive=True, elem_id="model")
    labels.add(model, label="model", info="model_info")
    weights = labels.part(parts.weights("weights"))
    talk = labels.part(parts.talk("talk", kept="maltu.talk"), name="talk", empty="empty")
    status = parts.status("status")
    box = gradio.Textbox(
        placeholder=say("message"), show_label=False, label=say("message"), submit_btn="Send", autofocus=True,
        max_lines=6, max_length=20_000, elem_id="box",
    )  # fmt: skip
    labels.add(box, placeholder="message", label="message", submit_btn="send")
    with gradio.Row(elem_classes="controls"):
        again, stop, clear = (
            labels.add(gradio.Button(say(name), size="sm", min_width=0), value=name)
            for name in ("retry", "stop", "clear")
        )
    settings = sampling_controls(common)
    sampled = [model, weights, *common.visitor, *settings]
    answer = {"fn": page.answer, "inputs": [talk, *sampled], "outputs": [talk, status]}
    running = [
        box.submit(page.ask, [box, talk], [box, talk], **FREE).then(**answer, **FREE),
        again.click(page.again, talk, talk, **FREE).then(**answer, **FREE),
        talk.edit(page.edit, talk, talk, **FREE).then(**answer, **FREE),
    ]
    stop.click(None, talk, talk, js=_HALT, cancels=running, **QUIET)
    clear.click(None, None, [talk, status], js=_EMPTY, cancels=running, **QUIET)
    talk.like(page.thumb, [talk, *common.visitor], [talk, status], **FREE)
    talk.apply(page.correct, [talk, *common.visitor], [talk, status], **FREE)
    model.input(settings_of, [common.known, model], settings[:-1], **FREE)
    model.input(lambda name: gradio.update(visible=name == MIX), model, weights, **FREE)
    return model, weights, [talk, *settings[:-1], status]


def sampling_controls(common: Common) -> list[Any]:
    """One control for each of talking.SAMPLING, in that order, folded away."""
    labels, say = common.labels, common.say
    ranges = {
        "temperature": (0, 2, 0.7, 0.05),
        "top_p": (0, 1, 0.9, 0.01),
        "top_k": (0, 200, 0, 1),
        "min_p": (0, 0.5, 0, 0.01),
        "repetition_penalty": (1, 2, 1, 0.05),
        "max_tokens": (1, 1024, 256, 1),
    }
    with labels.add(gradio.Accordion(say("settings"), open=False, elem_id="settings"), label="settings"):
        controls: list[Any] = [
            gradio.Slider(low, high, value, step=step, label=say(name), info=say(f"{name}_info"))
            for name, (low, high, value, step) in ranges.items()
        ]
        # No Number: without a value it shows and sends 0 once it is seen (gradio-app/gradio#6728, there still in 6.31).
        controls.append(gradio.Textbox("", label=say("seed"), info=say("seed_info"), max_lines=1, max_length=20))
    for name, control in zip([*ranges, "seed"], controls, strict=True):
        labels.add(control, label=name, info=f"{name}_info")
    return controls


def arena_tab(common: Common) -> Any:
    """The arena; gives the names that it draws from."""
    labels, say, page = common.labels, common.say, Arena(common.caller)
    info = gradio.HTML("", js_on_load=None, elem_classes="info")
    labels.add(info, value="arena_info")
    with gradio.Row(elem_id="sides"):
        left = labels.part(parts.talk("left"), name="left")
        right = labels.part(parts.talk("right"), name="right")
    with gradio.Row(elem_classes="controls", elem_id="votes"):
        names: dict[str, Winner] = {"left_better": "a", "tie": "tie", "both_bad": "both_bad", "right_better": "b"}
        buttons = {
            winner: labels.add(gradio.Button(say(name), size="sm", min_width=0, interactive=False), value=name)
            for name, winner in names.items()
        }
    status = parts.status("arena-status")
    box = gradio.Textbox(
        placeholder=say("arena_box"), show_label=False, label=say("arena_box"), submit_btn="Send", max_lines=6,
        max_length=20_000, elem_id="arena-box",
    )  # fmt: skip
    labels.add(box, placeholder="arena_box", label="arena_box", submit_btn="send")
    drawn = gradio.Dropdown(label=say("drawn"), info=say("drawn_info"), choices=[], multiselect=True, elem_id="drawn")
    labels.add(drawn, label="drawn", info="drawn_info")
    done = gradio.State(None)
    box.submit(page.fight, [box, drawn, *common.visitor], [box, left, right, done, *buttons.values(), status], **FREE)
    for winner, button in buttons.items():
        button.click(
            page.voting(winner), [done, *common.visitor], [left, right, done, *buttons.values(), status], **FREE
        )
    return drawn


def feedback_tab(common: Common, tab: Any) -> None:
    """What was stored: looked up whenever the tab is opened."""
    page = Opinions(common.caller)
    status = parts.status("feedback-status")
    listed = common.labels.part(parts.stored("stored"))
    lines = gradio.Textbox(visible=False)
    tab.select(page.see, common.visitor, [listed, status], **FREE)
    listed.delete(page.delete, common.visitor, [listed, status], **FREE)
    listed.clear(page.clear, common.visitor, [listed, status], **FREE)
    saving = listed.download(page.export, common.visitor, [lines, status], **FREE)
    saving.then(None, lines, None, js=_SAVE, **QUIET)


def _words(texts: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    return {name: texts[word] for name, word in names.items()}


def mount(app: Starlette, address: str, wants_key: bool) -> None:
    """Put the page at the root of an app whose own routes come first."""
    # Gradio 6.31 makes a table over all its events after each of them, for a route that stays shut here.
    os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", str(10**12))
    blocks, say = build(address, wants_key)
    sans = ("system-ui", "Apple SD Gothic Neo", "Malgun Gothic", "Noto Sans KR", "Noto Sans CJK KR", "sans-serif")
    fonts = [gradio.themes.Font(name) for name in sans]
    gradio.mount_gradio_app(
        app,
        blocks,
        path="/",
        theme=gradio.themes.Default(
            primary_hue="teal", neutral_hue="stone", font=fonts, font_mono=[gradio.themes.Font("monospace")]
        ),
        css=parts.STYLE,
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
