// A talk. value: {turns: [{role, content, id, model, weights, thumb, corrected}], busy}; judge: whether
// answers can be judged; kept: the name under which this tab keeps the talk over a reload. Events: edit {turn, text}, like {turn, value}, apply {turn, text}: a correction.
const list = make("div", { class: "turns", role: "log", tabindex: "0" });
const side = make("h2", { class: "side" });
element.replaceChildren(...(props.kept ? [list] : [side, list]));
let shown = [];
let has_come = false; // before, what the tab kept is not here yet
const turns = () => (props.value && props.value.turns) || [];
const thumb = (turn, place, value) => {
  const icon = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  icon.setAttribute("viewBox", "0 0 24 24");
  icon.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", "M3 10h4v10H3zM9 20h8.5a2 2 0 0 0 2-1.6l1.2-6a2 2 0 0 0-2-2.4H14l.8-3.9A2 2 0 0 0 12.9 4L9 10.5z");
  icon.append(path);
  const more = { class: `act thumb ${value}`, "aria-label": words()[value], title: words()[value], "aria-pressed": String(turn.thumb === value) };
  const button = press("", () => trigger("like", { turn: place, value }), more);
  button.append(icon);
  return button;
};
const shut = (entry) => { entry.editor.remove(); entry.editor = null; entry.acts.hidden = false; };
const write = (entry, place, name, label, send) => {
  const box = make("textarea", { "aria-label": label, rows: 3, maxlength: 20000 });
  box.value = turns()[place].content;
  const close = () => { shut(entry); entry.acts.querySelector("[data-opens]").focus(); };
  const done = () => { const text = box.value.trim(); close(); if (text) send(text); };
  entry.editor = make("div", { class: "editor" }, make("label", {}, label), box,
    make("div", { class: "acts" }, press(name, done, { class: "act main" }), press(words().cancel, close)));
  box.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Escape") close();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) done();
  });
  entry.acts.hidden = true;
  entry.node.append(entry.editor);
  box.focus();
  box.setSelectionRange(box.value.length, box.value.length);
};
const actions = (entry, turn, place) => {
  const acts = make("div", { class: "acts" });
  const opens = (name, button, label, send) => {
    acts.append(press(name, () => write(entry, place, button, label, send), { "data-opens": true }));
  };
  if (turn.role === "user") {
    opens(words().edit, words().send, words().edit_label, (text) => trigger("edit", { turn: place, text }));
    return acts;
  }
  if (props.judge && turn.id) {
    acts.append(thumb(turn, place, "up"), thumb(turn, place, "down"));
    opens(words().correct, words().save, words().correct_label, (text) => trigger("apply", { turn: place, text }));
  }
  if (navigator.clipboard) acts.append(press(words().copy, () => navigator.clipboard.writeText(turn.content)));
  return acts;
};
const draw = (entry, turn, place) => {
  const is_bot = turn.role === "assistant";
  entry.said = make("div", { class: "said", "data-testid": is_bot ? "bot" : "user" }, turn.content);
  entry.who = make("div", { class: "who" }, is_bot ? called(turn.model, turn.weights) : "");
  entry.acts = props.kept ? actions(entry, turn, place) : make("div", { hidden: true });
  const better = turn.corrected ? make("p", { class: "corrected" }, make("b", {}, words().corrected), " ", turn.corrected) : null;
  entry.node = make("article", { class: `turn ${is_bot ? "bot" : "user"}`, "aria-label": is_bot ? words().answer : words().you },
    is_bot ? entry.who : null, entry.said, better, entry.acts);
  if (!entry.editor) return;
  entry.acts.hidden = true;
  entry.node.append(entry.editor);
};
const same = (one, other) => JSON.stringify({ ...one, content: "" }) === JSON.stringify({ ...other, content: "" });
const redraw = (entry, turn, place) => {
  const before = entry.node;
  const at = before ? [...before.querySelectorAll("button, textarea")].indexOf(document.activeElement) : -1;
  draw(entry, turn, place);
  before ? before.replaceWith(entry.node) : list.append(entry.node);
  if (at >= 0) entry.node.querySelectorAll("button, textarea")[at]?.focus();
};
const show = () => {
  const busy = Boolean(props.value && props.value.busy);
  const follows = list.scrollHeight - list.scrollTop - list.clientHeight < 60;
  const look = JSON.stringify([props.texts, props.judge]);
  turns().forEach((turn, place) => {
    const old = shown[place];
    if (old && old.entry.editor && old.turn.content !== turn.content) shut(old.entry);
    if (old && old.look === look && same(old.turn, turn)) {
      if (old.turn.content !== turn.content) old.entry.said.textContent = turn.content;
      old.turn = turn;
      return;
    }
    const entry = old ? old.entry : { editor: null };
    redraw(entry, turn, place);
    shown[place] = { turn, entry, look };
  });
  shown.splice(turns().length).forEach(({ entry }) => entry.node.remove());
  list.querySelector(".empty")?.remove();
  if (!turns().length) list.append(make("p", { class: "empty" }, props.empty || ""));
  if (words().language) document.documentElement.lang = words().language;
  side.textContent = props.name || "";
  list.setAttribute("aria-label", props.name || "");
  list.setAttribute("aria-busy", String(busy));
  element.classList.toggle("busy", busy);
  if (follows || (busy && turns().at(-1)?.role === "user")) list.scrollTop = list.scrollHeight;
  if (props.kept && has_come) sessionStorage.setItem(props.kept, JSON.stringify(turns()));
};
let is_at_end = true; // what was at the end stays there when the talk is given less room
list.addEventListener("scroll", () => { is_at_end = list.scrollHeight - list.scrollTop - list.clientHeight < 60; });
new ResizeObserver(() => { if (is_at_end) list.scrollTop = list.scrollHeight; }).observe(list);
watch("value", () => { has_come = true; });
watch(["value", "texts", "judge", "name", "empty"], show);
show();
