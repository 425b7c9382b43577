// Selected images, and what can be done with them: their names are copied or saved as text, one on a line.

const selected = new Set(); // nodes
const selectionListeners = []; // called after each change
let lastSelected = null; // the anchor from which Shift selects a range

function setSelected(nodes, on) {
  for (const node of nodes) {
    if (on) selected.add(node);
    else selected.delete(node);
  }
  markSelected(document);
  byId("selection").hidden = selected.size === 0;
  byId("selection-count").textContent = `${plural(selected.size, "image")} selected`;
  announce(`${plural(selected.size, "image")} selected`);
  for (const listener of selectionListeners) listener();
}

// Show on everything inside `root` which images are selected.
function markSelected(root) {
  for (const anchor of root.querySelectorAll("a[data-node]")) markLink(anchor);
  for (const button of root.querySelectorAll("[data-select]")) {
    button.textContent = selected.has(Number(button.dataset.select)) ? "Deselect" : "Select";
  }
}

function markLink(anchor) {
  const on = selected.has(Number(anchor.dataset.node));
  anchor.classList.toggle("selected", on);
  if (on) anchor.setAttribute("aria-describedby", "is-selected");
  else anchor.removeAttribute("aria-describedby");
}

// Select the image of a tile, or with `range` all from the one before it in the same list; or deselect it.
function toggleSelected(anchor, range) {
  const node = Number(anchor.dataset.node);
  const tiles = [...(anchor.closest("[data-roving]")?.querySelectorAll("[data-node]") ?? [anchor])];
  const from = range ? tiles.indexOf(lastSelected) : -1;
  const to = tiles.indexOf(anchor);
  const isRange = from >= 0 && from !== to;
  const chosen = isRange ? tiles.slice(Math.min(from, to), Math.max(from, to) + 1) : [anchor];
  const on = isRange || !selected.has(node);
  lastSelected = on ? anchor : null;
  setSelected(chosen.map((tile) => Number(tile.dataset.node)), on);
}

// As they are in the data set. A name of several lines is quoted.
const selectedNames = () =>
  [...selected]
    .sort((one, two) => one - two)
    .map((node) => (/[\n\r]/.test(data.names[node]) ? JSON.stringify(data.names[node]) : data.names[node]));

async function copyNames() {
  let copied = true;
  try {
    await navigator.clipboard.writeText(selectedNames().join("\n"));
  } catch {
    copied = false; // the browser denies pages from disk its clipboard
  }
  const text = copied ? `${plural(selected.size, "name")} copied` : "The clipboard is denied; save the names instead";
  byId("selection-count").textContent = text;
  announce(text);
}

function saveNames() {
  const url = URL.createObjectURL(new Blob([`${selectedNames().join("\n")}\n`], { type: "text/plain" }));
  const anchor = el("a", { href: url, download: "selected-images.txt" });
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
  announce(`${plural(selected.size, "name")} saved`);
}

function selectButton(text, nodes) {
  const button = el("button", { type: "button", class: "button" }, text);
  button.addEventListener("click", () => setSelected(nodes(), true));
  return button;
}

byId("copy-names").addEventListener("click", copyNames);
byId("save-names").addEventListener("click", saveNames);
byId("clear-selection").addEventListener("click", () => setSelected([...selected], false));
