// What the page's own parts share: elements made by hand, so that nothing said is ever read as markup.
const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, does] of Object.entries(value)) node.addEventListener(event, does);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
};
const words = () => props.texts || {};
const press = (name, does, more = {}) => make("button", { type: "button", class: "act", on: { click: does }, ...more }, name);
const percent = (weight) => `${Math.round(100 * weight)} %`;
const called = (model, weights) => {
  const several = Object.entries(weights || {}).sort((one, other) => other[1] - one[1]);
  const shares = several.map(([name, weight]) => (several.length > 1 ? `${name} ${percent(weight)}` : name)).join(" · ");
  if (!shares) return model || "";
  return model && several.length === 1 && model !== shares ? `${model} → ${shares}` : shares;
};
