// Sliders of a mixture. value: {name: weight}, every weight from 0 to 1; the shares shown are those that they make.
const rows = make("div", { class: "weights", role: "group" });
element.replaceChildren(rows);
let names = "";
const shares = () => {
  const value = props.value || {};
  const sum = Object.values(value).reduce((one, other) => one + other, 0);
  rows.querySelectorAll("label").forEach((row) => {
    row.querySelector("output").textContent = percent(sum ? value[row.dataset.name] / sum : 0);
  });
};
const show = () => {
  rows.setAttribute("aria-label", words().weights || "");
  const value = props.value || {};
  if (JSON.stringify(Object.keys(value)) !== names) {
    names = JSON.stringify(Object.keys(value));
    rows.replaceChildren(...Object.entries(value).map(([name, weight]) => {
      const slider = make("input", { type: "range", min: 0, max: 1, step: 0.05, "aria-label": name });
      slider.value = weight;
      slider.addEventListener("input", () => { props.value = { ...props.value, [name]: Number(slider.value) }; shares(); });
      return make("label", { "data-name": name }, make("span", {}, name), slider, make("output"));
    }));
  }
  shares();
};
watch(["value", "texts"], show);
show();
