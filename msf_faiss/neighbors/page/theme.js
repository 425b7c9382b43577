// The colours: light, dark, or the system's. Runs before anything is drawn.

const root = document.documentElement;
const darkSystem = matchMedia("(prefers-color-scheme: dark)");
let theme = rememberedTheme();
root.dataset.theme = theme;

function rememberedTheme() {
  try {
    const remembered = localStorage.getItem("msf-faiss-theme");
    return ["light", "dark"].includes(remembered) ? remembered : "system";
  } catch {
    return "system"; // storage is optional
  }
}

function nextTheme() {
  // First to the opposite of the system's, so that every click changes something visible.
  const order = darkSystem.matches ? ["system", "light", "dark"] : ["system", "dark", "light"];
  theme = order[(order.indexOf(theme) + 1) % 3];
  try {
    localStorage.setItem("msf-faiss-theme", theme);
  } catch {
    // The page then opens in the system's colours the next time.
  }
}

const isDark = () => theme === "dark" || (theme === "system" && darkSystem.matches);
