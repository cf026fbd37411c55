// The theme: the reader's system decides until this button does. Nothing is stored: the page may lie in a folder where
// storage is refused.
const button = document.getElementById("theme");
const dark = matchMedia("(prefers-color-scheme: dark)");
const shown = () => document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
const other = () => (shown() === "dark" ? "light" : "dark");
const say = () => { button.textContent = `${other()[0].toUpperCase()}${other().slice(1)} theme`; };
button.addEventListener("click", () => { document.documentElement.dataset.theme = other(); say(); });
dark.addEventListener("change", say);
button.hidden = false;
say();
