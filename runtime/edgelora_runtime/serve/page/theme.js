// The theme: the system's, light or dark. A classic script in the head, so that the page never flashes in the other one.
(() => {
  const KEY = "edgelora.theme";
  const THEMES = ["system", "light", "dark"];
  const root = document.documentElement;

  function readTheme() {
    try {
      const kept = localStorage.getItem(KEY);
      return THEMES.includes(kept) ? kept : "system";
    } catch { // storage is switched off
      return "system";
    }
  }

  function apply(theme) {
    if (theme === "system") root.removeAttribute("data-theme");
    else root.setAttribute("data-theme", theme);
  }

  apply(readTheme());
  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    let theme = readTheme();
    const show = () => { button.textContent = `Theme: ${theme}`; };
    show();
    button.addEventListener("click", () => {
      theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
      try { localStorage.setItem(KEY, theme); } catch { /* it holds for this visit */ }
      apply(theme);
      show();
    });
  });
})();
