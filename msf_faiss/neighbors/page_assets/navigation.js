// Navigation: the history of views, search, pointer and keys. This part starts the page.

const builders = new Map([ // by view, in the order of the sections; null: nothing to build
  ["explore", null],
  ["image", null],
  ["statistics", buildStatistics],
  ["review", buildReview],
  ["evolution", buildEvolution],
  ["clusters", buildClusters],
  ["map", buildMap],
]);
let current = { view: "explore", node: null, trail: [], key: 0, depth: 0 };
let lastKey = Date.now();
const savedPositions = new Map(); // by key of a history entry: scroll position and focus
history.scrollRestoration = "manual";

function parseHash(hash) {
  const image = /^#image-(\d{1,9})$/.exec(hash);
  if (image && Number(image[1]) < imageCount) return { view: "image", node: Number(image[1]) };
  const view = hash.slice(1);
  return { view: view !== "image" && builders.has(view) && byId(`view-${view}`) ? view : "explore", node: null };
}

function goTo(hash, trail = []) {
  savePosition();
  history.pushState({ trail, depth: current.depth + 1, key: ++lastKey }, "", hash);
  showCurrent("forward");
}

function openQuery(node) {
  if (current.view === "image" && current.node === node) return;
  goTo(`#image-${node}`, current.view === "image" ? [...current.trail, node].slice(-200) : [node]);
}

function goBack() {
  if (current.depth > 0) history.back();
  else goTo("#explore"); // the page was opened at this image
}

function showCurrent(direction) {
  const target = parseHash(location.hash);
  let state = history.state;
  if (typeof state?.key !== "number" || !Array.isArray(state.trail)) {
    state = { trail: target.node === null ? [] : [target.node], depth: 0, key: ++lastKey };
    history.replaceState(state, "", location.hash || "#explore");
  }
  const trail = state.trail.filter((node) => Number.isInteger(node) && node >= 0 && node < imageCount);
  const isValid = target.node === null || trail.at(-1) === target.node;
  current = { ...target, trail: isValid ? trail : [target.node], key: state.key, depth: state.depth };
  const { view, node } = current;
  document.body.dataset.view = view;
  for (const name of builders.keys()) {
    const section = byId(`view-${name}`);
    if (section) section.hidden = name !== view;
  }
  for (const anchor of document.querySelectorAll("[data-section]")) {
    if (anchor.dataset.section === (view === "image" ? "explore" : view)) {
      anchor.setAttribute("aria-current", "page");
      anchor.parentElement.scrollLeft = anchor.offsetLeft - anchor.parentElement.clientWidth / 2;
    } else anchor.removeAttribute("aria-current");
  }
  closeResults();
  if (view === "image") showQuery(node);
  builders.get(view)?.();
  builders.set(view, null);
  resize();
  const heading = { image: () => title(node), explore: () => "" }[view]?.() ?? view[0].toUpperCase() + view.slice(1);
  document.title = [heading, data.title, "neighbours"].filter(Boolean).join(" · ");
  restorePosition(direction);
}

function resize() {
  redrawCharts();
  if (current.view === "map") imageMap.resize();
}

function savePosition() {
  const active = document.activeElement;
  const list = active?.closest("[data-roving]");
  const lists = list ? [...byId(`view-${current.view}`).querySelectorAll("[data-roving]")] : [];
  const focus = { element: active, list: lists.indexOf(list), node: active?.dataset?.node };
  savedPositions.set(current.key, { ...focus, scroll: scrollY, top: active?.getBoundingClientRect().top });
}

// Scroll and focus as they were when this entry was left ("back"), or at the start of the view ("forward").
function restorePosition(direction) {
  const saved = direction === "forward" ? undefined : savedPositions.get(current.key);
  scrollTo(0, saved?.scroll ?? 0);
  const section = byId(`view-${current.view}`);
  let target = null;
  if (saved?.element?.isConnected && section.contains(saved.element)) target = saved.element;
  else if (saved && saved.list >= 0) {
    const list = section.querySelectorAll("[data-roving]")[saved.list]; // it has been rebuilt
    target = list?.querySelector(`[data-node="${Number(saved.node)}"]`);
  }
  if (current.view === "image" && direction) {
    target ??= section.querySelector(".neighbors a") ?? section.querySelector("h2");
    const { matching, compared } = summaries[current.node];
    const score = compared ? `${matching} of ${compared} neighbours match.` : "";
    announce(`Query: ${title(current.node)}, ${idOrName(current.node)}. ${score}`);
  }
  target?.focus({ preventScroll: true });
  // Cards above that had not been drawn yet may change their height: move the focused element back to where it was.
  if (saved && target) scrollBy(0, target.getBoundingClientRect().top - saved.top);
}

// The clicked picture grows into the query, if the browser can animate it and the user allows motion.
function withTransition(image, update) {
  if (!image || reducedMotion.matches || !document.startViewTransition) return update();
  const large = document.querySelector("#view-image:not([hidden]) .large img");
  if (large) large.style.viewTransitionName = "none";
  image.style.viewTransitionName = "query";
  const transition = document.startViewTransition(() => {
    image.style.viewTransitionName = "";
    update();
  });
  // They reject if the next transition interrupts this one, which is no error.
  for (const promise of [transition.ready, transition.finished]) promise.catch(() => {});
}

// ---------------------------------------------------------------- Search

const searchTexts = names.map((text, node) => `${text} ${classOf(node) ?? ""}`.toLowerCase());

function search() {
  const query = byId("search").value.trim().toLowerCase();
  if (!query) return closeResults();
  const terms = query.split(/\s+/);
  const byNumber = /^#?\d+$/.test(query) ? ids.indexOf(Number(query.replace("#", ""))) : -1;
  // In this order: the number, the class, all words in a row, all words in any order.
  const rank = (node) => {
    if (node === byNumber) return 0;
    if (classOf(node)?.toLowerCase() === query) return 1;
    return searchTexts[node].includes(query) ? 2 : terms.every((term) => searchTexts[node].includes(term)) ? 3 : 4;
  };
  const byRank = [[], [], [], [], []];
  for (let node = 0; node < imageCount; node += 1) byRank[rank(node)].push(node);
  showResults(byRank.slice(0, 4).flat());
}

function showResults(nodes) {
  const most = 60;
  const items = nodes.slice(0, most).map((node) => {
    const number = ids[node] >= 0 ? integer(ids[node]) : "";
    return tile(node, null, idOrName(node), span(isolate(classOf(node) ?? "")), span(number));
  });
  const total = `${plural(nodes.length, "image")}${nodes.length > most ? `; the first ${most}` : ""}`;
  const none = "No image on this page has this number, name or class.";
  byId("results").replaceChildren(el("p", { role: "status" }, nodes.length ? total : none), tileList({}, items));
  byId("results").hidden = false;
}

function closeResults() {
  byId("results").hidden = true;
  byId("results").replaceChildren();
}

function openResult(anchor) {
  byId("search").value = "";
  openQuery(Number(anchor.dataset.node));
  closeResults();
}

byId("search").addEventListener("input", search);
byId("search").addEventListener("focus", search);
byId("search").addEventListener("keydown", (event) => {
  const first = byId("results").querySelector("[data-node]");
  if (event.key === "Escape") {
    event.preventDefault();
    byId("search").value = "";
    closeResults();
    byId("search").blur();
  } else if (event.key === "Enter" && first) openResult(first);
  else if (event.key === "ArrowDown" && first) {
    event.preventDefault();
    first.focus();
  }
});
document.addEventListener("pointerdown", (event) => {
  if (!event.target.closest(".search")) closeResults();
});

// ---------------------------------------------------------------- Pointer and keys

document.addEventListener("click", (event) => {
  const anchor = event.target.closest("a");
  if (!anchor || event.defaultPrevented || event.button) return;
  if (event.ctrlKey || event.metaKey || event.altKey) return; // such as for a new tab
  if (event.shiftKey && !anchor.dataset.node) return;
  event.preventDefault();
  if (event.shiftKey) toggleSelected(anchor, true);
  else if (anchor.id === "skip") byId("main").focus();
  else if (anchor.dataset.mapNode) {
    goTo("#map");
    imageMap.focus(Number(anchor.dataset.mapNode));
  } else if (anchor.dataset.mapCluster) {
    goTo("#map");
    imageMap.showGroup("cluster", Number(anchor.dataset.mapCluster));
  } else if (anchor.dataset.class) {
    byId("by-class").value = anchor.dataset.class;
    showCards();
    goTo("#explore");
    byId("view-explore").scrollIntoView();
  } else if (anchor.dataset.step) {
    const trail = current.trail.slice(0, Number(anchor.dataset.step) + 1);
    if (trail.length < current.trail.length) goTo(`#image-${trail.at(-1)}`, trail);
  } else if (anchor.closest(".results")) openResult(anchor);
  else if (anchor.dataset.node) {
    const byPointer = event.detail > 0; // keys may be faster than the animation
    withTransition(byPointer ? anchor.querySelector("img") : null, () => openQuery(Number(anchor.dataset.node)));
  } else if (anchor.hash === location.hash) scrollTo(0, 0);
  else goTo(anchor.hash);
});

// Shift would extend the browser's selection of text, and open a window.
document.addEventListener("mousedown", (event) => {
  const anchor = event.shiftKey && event.target.closest("a[data-node]");
  if (!anchor) return;
  event.preventDefault();
  anchor.focus({ preventScroll: true });
});

document.addEventListener("focusin", (event) => {
  const list = event.target.closest?.("[data-roving]");
  if (!list || !event.target.dataset.node) return;
  for (const other of list.querySelectorAll('[tabindex="0"]')) other.setAttribute("tabindex", "-1");
  event.target.setAttribute("tabindex", "0");
});

document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || byId("keys").open) return;
  const active = document.activeElement;
  if (active.matches("input, select, textarea")) return;
  const { key } = event;
  const sections = [...document.querySelectorAll("nav [data-section]")];
  if (/^Arrow|^Home$|^End$/.test(key) && active.matches("[data-roving] [data-node]")) moveFocus(active, key);
  else if (key === "ArrowRight" && active === document.body) focusFirstTile();
  else if (key === " " && active.matches("a[data-node]")) toggleSelected(active, event.shiftKey);
  else if (key === "Escape" && !byId("results").hidden) {
    closeResults();
    byId("search").focus();
  } else if ((key === "Escape" || key === "Backspace") && current.view === "image") goBack();
  else if (key === "/") byId("search").focus();
  else if (key === "?") byId("keys").showModal();
  else if (Number(key) >= 1 && Number(key) <= sections.length) goTo(sections[Number(key) - 1].hash);
  else return;
  event.preventDefault();
});

function focusFirstTile() {
  byId(`view-${current.view}`).querySelector("[data-roving] [data-node]")?.focus();
}

function moveFocus(active, key) {
  const tiles = [...active.closest("[data-roving]").querySelectorAll("[data-node]")];
  const place = tiles.indexOf(active);
  const inList = { Home: tiles[0], End: tiles.at(-1), ArrowRight: tiles[place + 1], ArrowLeft: tiles[place - 1] }[key];
  let target = key.startsWith("Arrow") ? nearestTile(active, key) ?? inList : inList;
  const leavesArea = target && target.closest("[data-area]") !== active.closest("[data-area]");
  if (leavesArea && /Left|Right/.test(key)) target = inList;
  if (!target) return;
  target.focus({ preventScroll: true });
  target.scrollIntoView({ block: "nearest", inline: "nearest", behavior: reducedMotion.matches ? "auto" : "smooth" });
}

// The nearest tile in the direction of an arrow key, in this part of the page or an adjacent one; null: there is none.
function nearestTile(active, key) {
  const area = active.closest("[data-area]");
  const areas = area ? [area, area.previousElementSibling, area.nextElementSibling] : [active.closest("[data-roving]")];
  const from = active.getBoundingClientRect();
  const sideways = key === "ArrowLeft" || key === "ArrowRight";
  const sign = key === "ArrowRight" || key === "ArrowDown" ? 1 : -1;
  let [best, lowest] = [null, Infinity];
  for (const tile of areas.flatMap((part) => [...(part?.querySelectorAll("[data-roving] [data-node]") ?? [])])) {
    const to = tile.getBoundingClientRect();
    const dx = to.left + to.width / 2 - from.left - from.width / 2;
    const dy = to.top + to.height / 2 - from.top - from.height / 2;
    const along = sign * (sideways ? dx : dy);
    const aside = Math.abs(sideways ? dy : dx);
    if (along < 8 || (sideways && aside > from.height / 2)) continue;
    const cost = sideways ? along : along * 4 + aside; // up and down: the next row first, then the nearest column
    if (cost < lowest) [best, lowest] = [tile, cost];
  }
  return best;
}

byId("help").addEventListener("click", () => byId("keys").showModal());
byId("close-keys").addEventListener("click", () => byId("keys").close());
byId("keys").addEventListener("click", (event) => event.target === byId("keys") && byId("keys").close());
addEventListener("resize", resize);
root.addEventListener("themechange", resize);
addEventListener("popstate", () => {
  savePosition();
  showCurrent("back");
});

byId("summary").append(purityByRank() ?? similarityByRank() ?? "");
buildExplore();
showCurrent();
