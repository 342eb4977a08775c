// What was stored of the visitor. value: {items: [feedback as the API shows it], off}.
// Events: download; delete {id}; clear.
const list = make("div", { class: "stored" });
element.replaceChildren(list);
const signs = { up: () => words().up, down: () => words().down };
const short = (text) => (text.length > 160 ? `${text.slice(0, 160)}…` : text);
const answers = (item) => item.answers.map((answer, place) => {
  const mark = item.kind !== "pair" ? "" : item.winner === "tie" ? words().tie : item.winner === "both_bad" ? words().both_bad
    : item.winner === "ab"[place] ? words().better_a : words().worse;
  return make("div", { class: "said" }, make("span", { class: "who" }, [answer.model, mark].filter(Boolean).join(" · ")), short(answer.content));
});
const card = (item) => {
  const when = new Date(item.created * 1000).toLocaleString(words().language);
  const verdict = item.kind === "thumb" ? signs[item.value]() : "";
  const better = item.corrected ? make("p", { class: "corrected" }, make("b", {}, words().corrected), " ", short(item.corrected)) : null;
  const asked = item.messages.at(-1);
  const head = make("header", {}, make("b", {}, words()[`kind_${item.kind}`]), make("span", {}, verdict), make("time", {}, when));
  return make("article", { class: "card" }, head, make("p", { class: "asked" }, short(asked ? asked.content : "")), ...answers(item), better,
    make("div", { class: "acts" }, press(words().delete, () => trigger("delete", { id: item.id }))));
};
const clearing = () => {
  const button = press(words().delete_all, () => {
    if (button.dataset.sure) return trigger("clear", {});
    button.dataset.sure = "yes";
    button.textContent = words().sure;
  }, { class: "act danger" });
  button.addEventListener("blur", () => { delete button.dataset.sure; button.textContent = words().delete_all; });
  return button;
};
const show = () => {
  const value = props.value || {};
  const items = [...(value.items || [])].reverse();
  if (value.off) return list.replaceChildren(make("p", { class: "empty" }, words().feedback_off));
  if (!items.length) return list.replaceChildren(make("p", { class: "empty" }, words().stored_empty));
  const bar = make("div", { class: "acts bar" }, make("span", { class: "who" }, words().stored_info),
    press(words().export, () => trigger("download", {})), clearing());
  list.replaceChildren(bar, ...items.map(card));
};
watch(["value", "texts"], show);
show();
