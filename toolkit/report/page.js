const ko = document.getElementById("lang-ko"), root = document.documentElement;
const said = () => { root.lang = ko.checked ? "ko" : "en"; };
ko.checked = /^ko\b/i.test(navigator.language);
document.querySelector(".switch").addEventListener("change", said);
said();
const folded = () => document.querySelectorAll("details:not([open])");
addEventListener("beforeprint", () => folded().forEach((one) => { one.open = true; one.dataset.folded = ""; }));
addEventListener("afterprint", () => document.querySelectorAll("[data-folded]").forEach((one) => {
  one.open = false; delete one.dataset.folded; }));
