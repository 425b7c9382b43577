// The theme: light, dark, or the system's. This part runs before the page is drawn, so that no other theme flashes up.

const root = document.documentElement;
const systemDark = matchMedia("(prefers-color-scheme: dark)");
let theme = loadTheme();
root.dataset.theme = theme;

function loadTheme() {
  try {
    const saved = localStorage.getItem("msf-faiss-theme");
    return ["light", "dark"].includes(saved) ? saved : "system";
  } catch {
    return "system"; // the browser may deny access to its storage
  }
}

const isDark = () => theme === "dark" || (theme === "system" && systemDark.matches);

function applyTheme() {
  root.dataset.theme = theme;
  const button = document.getElementById("theme");
  button.title = `Theme: ${theme}`;
  button.setAttribute("aria-label", button.title);
  root.dispatchEvent(new Event("themechange"));
}

function switchTheme() {
  // First to the opposite of the system's theme, so that every click changes something visible.
  const order = systemDark.matches ? ["system", "light", "dark"] : ["system", "dark", "light"];
  theme = order[(order.indexOf(theme) + 1) % 3];
  try {
    localStorage.setItem("msf-faiss-theme", theme);
  } catch {
    // The theme then lasts until the page is closed.
  }
  applyTheme();
}

addEventListener("DOMContentLoaded", () => {
  document.getElementById("theme").addEventListener("click", switchTheme);
  systemDark.addEventListener("change", applyTheme);
  applyTheme();
});
