// Where we are: history, search, pointer and keys. Starts the page.

// ---------------------------------------------------------------- Where we are

const views = new Map([
  ["explore", null],
  ["image", null],
  ["statistics", statistics],
  ["evolution", evolution],
  ["clusters", clusters],
  ["map", drawMap],
]);
const built = new Set(["explore", "image"]);
const left = new Map(); // by entry of the history: where it was scrolled to, and what had the focus
let entry = { view: "explore", node: null, trail: [], key: 0, depth: 0 };
let lastKey = Date.now();
let mapView = null;
history.scrollRestoration = "manual";

function place(hash) {
  const image = /^#image-(\d{1,9})$/.exec(hash);
  if (image && Number(image[1]) < count) return { view: "image", node: Number(image[1]) };
  const view = hash.slice(1);
  return { view: view !== "image" && views.has(view) && byId(`view-${view}`) ? view : "explore", node: null };
}

function go(hash, trail = []) {
  leave();
  history.pushState({ trail, depth: entry.depth + 1, key: ++lastKey }, "", hash);
  show(true);
}

function follow(node) {
  if (entry.view === "image" && entry.node === node) return;
  go(`#image-${node}`, entry.view === "image" ? [...entry.trail, node].slice(-200) : [node]);
}

function back() {
  if (entry.depth > 0) history.back();
  else go("#explore"); // the page was opened at this image: there is nothing before it
}

function leave() {
  const active = document.activeElement;
  const list = active?.closest("[data-rove]");
  const lists = list ? [...byId(`view-${entry.view}`).querySelectorAll("[data-rove]")] : [];
  const kept = { list: lists.indexOf(list), node: active?.dataset?.node, link: active };
  left.set(entry.key, { ...kept, scroll: scrollY, top: active?.getBoundingClientRect().top });
}

function show(forward) {
  const found = place(location.hash);
  let state = history.state;
  if (!state || typeof state.key !== "number" || !Array.isArray(state.trail)) {
    state = { trail: found.node === null ? [] : [found.node], depth: 0, key: ++lastKey };
    history.replaceState(state, "", location.hash || "#explore");
  }
  const trail = state.trail.filter((node) => Number.isInteger(node) && node >= 0 && node < count);
  const known = found.node === null || trail.at(-1) === found.node;
  entry = { ...found, trail: known ? trail : [found.node], key: state.key, depth: state.depth };
  document.body.dataset.view = entry.view;
  for (const view of views.keys()) {
    const section = byId(`view-${view}`);
    if (section) section.hidden = view !== entry.view;
  }
  for (const anchor of document.querySelectorAll("[data-section]")) {
    const current = anchor.dataset.section === (entry.view === "image" ? "explore" : entry.view);
    if (current) anchor.setAttribute("aria-current", "page");
    else anchor.removeAttribute("aria-current");
    if (current) anchor.parentElement.scrollLeft = anchor.offsetLeft - anchor.parentElement.clientWidth / 2;
  }
  closeFound();
  if (entry.view === "image") one();
  else if (!built.has(entry.view)) {
    built.add(entry.view);
    views.get(entry.view)();
  }
  redraw();
  const section = `${entry.view[0].toUpperCase()}${entry.view.slice(1)} · `;
  const here = entry.view === "image" ? `${title(entry.node)} · ` : entry.view === "explore" ? "" : section;
  document.title = `${here}${data.title} · neighbours`;
  restore(forward);
}

function restore(forward) {
  const kept = forward ? undefined : left.get(entry.key);
  scrollTo(0, kept?.scroll ?? 0);
  const section = byId(`view-${entry.view}`);
  let target = null;
  if (kept?.link?.isConnected && section.contains(kept.link)) target = kept.link;
  else if (kept && kept.list >= 0) {
    target = section.querySelectorAll("[data-rove]")[kept.list]?.querySelector(`[data-node="${Number(kept.node)}"]`);
  }
  if (entry.view === "image" && forward !== undefined) {
    target ??= section.querySelector(".neighbors a") ?? section.querySelector("h2");
    const [matching, compared] = agreement[entry.node];
    const agreed = compared ? `${matching} of ${compared} neighbours match.` : "";
    say(`Query: ${title(entry.node)}, ${called(entry.node)}. ${agreed}`);
  }
  target?.focus({ preventScroll: true });
  // Cards above that were not drawn yet may be higher or lower than thought: what had the focus is where it was.
  if (kept && target) scrollBy(0, target.getBoundingClientRect().top - kept.top);
}

function say(text) {
  byId("said").textContent = text;
}

// The picture that is clicked grows into the query, where the browser can and motion is welcome.
function morph(from, update) {
  if (!from || still.matches || !document.startViewTransition) return update();
  const big = document.querySelector("#view-image:not([hidden]) .big img");
  if (big) big.style.viewTransitionName = "none";
  from.style.viewTransitionName = "query";
  const transition = document.startViewTransition(() => {
    from.style.viewTransitionName = "";
    update();
  });
  // A transition that the next one cuts short is no error.
  for (const promise of [transition.ready, transition.finished]) promise.catch(() => {});
}

// ---------------------------------------------------------------- Finding

const words = names.map((text, node) => `${text} ${classOf(node) ?? ""}`.toLowerCase());

function find() {
  const asked = byId("search").value.trim().toLowerCase();
  if (!asked) return closeFound();
  const terms = asked.split(/\s+/);
  const number = /^#?\d+$/.test(asked) ? Number(asked.replace("#", "")) : -1;
  const exact = ids.indexOf(number);
  // The number, then those of the class, then those that have these words in a row, then those that have them at all.
  const rank = (node) => {
    if (number >= 0 && node === exact) return 0;
    if (classOf(node)?.toLowerCase() === asked) return 1;
    return words[node].includes(asked) ? 2 : terms.every((term) => words[node].includes(term)) ? 3 : 4;
  };
  const found = [[], [], [], [], []];
  for (let node = 0; node < count; node += 1) found[rank(node)].push(node);
  found.pop();
  showFound(found.flat());
}

function showFound(found) {
  const most = 60;
  const items = found.slice(0, most).map((node) => {
    const number = ids[node] >= 0 ? whole(ids[node]) : "";
    return tile(node, null, called(node), span(name(classOf(node) ?? "")), span(number));
  });
  const told = `${plural(found.length, "image")}${found.length > most ? `, the first ${most}` : ""}`;
  const without = "No image of this page has such a number, name or class.";
  byId("found").replaceChildren(
    el("p", { role: "status" }, found.length ? told : without),
    tiles({}, items),
  );
  byId("found").hidden = false;
}

function closeFound() {
  byId("found").hidden = true;
  byId("found").replaceChildren();
}

byId("search").addEventListener("input", find);
byId("search").addEventListener("focus", find);
byId("search").addEventListener("keydown", (event) => {
  const first = byId("found").querySelector("[data-node]");
  if (event.key === "Escape") {
    event.preventDefault();
    byId("search").value = "";
    closeFound();
    byId("search").blur();
  } else if (event.key === "Enter" && first) pick(first);
  else if (event.key === "ArrowDown" && first) {
    event.preventDefault();
    first.focus();
  }
});
document.addEventListener("pointerdown", (event) => {
  if (!event.target.closest(".find")) closeFound();
});

function pick(anchor) {
  byId("search").value = "";
  follow(Number(anchor.dataset.node));
  closeFound();
}

// ---------------------------------------------------------------- Pointer and keys

document.addEventListener("click", (event) => {
  const anchor = event.target.closest("a");
  if (!anchor || event.defaultPrevented || event.button) return;
  if (event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return; // a new tab, say
  if (anchor.id === "skip") {
    event.preventDefault();
    byId("main").focus();
    return;
  }
  event.preventDefault();
  if (anchor.dataset.sectionLink) {
    go("#map");
    mapView.ring(Number(anchor.dataset.sectionLink));
  } else if (anchor.dataset.class) {
    byId("by-class").value = anchor.dataset.class;
    arrange();
    go("#explore");
    byId("view-explore").scrollIntoView();
  } else if (anchor.dataset.step) {
    const trail = entry.trail.slice(0, Number(anchor.dataset.step) + 1);
    if (trail.length < entry.trail.length) go(`#image-${trail.at(-1)}`, trail);
  } else if (anchor.closest(".found")) pick(anchor);
  else if (anchor.dataset.node) {
    const node = Number(anchor.dataset.node);
    morph(event.detail > 0 ? anchor.querySelector("img") : null, () => follow(node));
  } else if (anchor.hash === location.hash) scrollTo(0, 0);
  else go(anchor.hash);
});

document.addEventListener("focusin", (event) => {
  const list = event.target.closest?.("[data-rove]");
  if (!list || !event.target.dataset.node) return;
  for (const other of list.querySelectorAll('[tabindex="0"]')) other.setAttribute("tabindex", "-1");
  event.target.setAttribute("tabindex", "0");
});

document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || byId("keys").open) return;
  const active = document.activeElement;
  if (active.matches("input, select, textarea")) return;
  const digit = Number(event.key);
  const sections = [...document.querySelectorAll("nav [data-section]")];
  if (event.key.startsWith("Arrow") || event.key === "Home" || event.key === "End") {
    if (active.matches("[data-rove] [data-node]")) arrow(active, event.key);
    else if (active === document.body && event.key === "ArrowRight") enter();
    else return;
  } else if (event.key === "Escape" && !byId("found").hidden) {
    closeFound();
    byId("search").focus();
  } else if ((event.key === "Escape" || event.key === "Backspace") && entry.view === "image") back();
  else if (event.key === "/") byId("search").focus();
  else if (event.key === "?") byId("keys").showModal();
  else if (digit >= 1 && digit <= sections.length) go(sections[digit - 1].hash);
  else return;
  event.preventDefault();
});

function enter() {
  byId(`view-${entry.view}`).querySelector("[data-rove] [data-node]")?.focus();
}

function arrow(active, key) {
  const list = active.closest("[data-rove]");
  const own = [...list.querySelectorAll("[data-node]")];
  const place = own.indexOf(active);
  let target = null;
  if (key === "Home") target = own[0];
  else if (key === "End") target = own.at(-1);
  else {
    target = ahead(active, key);
    if (!target && key === "ArrowRight") target = own[place + 1];
    if (!target && key === "ArrowLeft") target = own[place - 1];
    const aside = target && target.closest("[data-area]") !== active.closest("[data-area]");
    if (aside && /Left|Right/.test(key)) target = own[place + (key === "ArrowRight" ? 1 : -1)];
  }
  if (!target) return;
  target.focus({ preventScroll: true });
  target.scrollIntoView({ block: "nearest", inline: "nearest", behavior: still.matches ? "auto" : "smooth" });
}

// The nearest tile in a direction, in this part of the page or the next ones.
function ahead(active, key) {
  const area = active.closest("[data-area]");
  const areas = area ? [area, area.previousElementSibling, area.nextElementSibling] : [active.closest("[data-rove]")];
  const from = active.getBoundingClientRect();
  const across = key === "ArrowLeft" || key === "ArrowRight";
  const sign = key === "ArrowRight" || key === "ArrowDown" ? 1 : -1;
  let best = null;
  let least = Infinity;
  for (const candidate of areas.flatMap((part) => [...(part?.querySelectorAll("[data-rove] [data-node]") ?? [])])) {
    const to = candidate.getBoundingClientRect();
    const dx = to.left + to.width / 2 - from.left - from.width / 2;
    const dy = to.top + to.height / 2 - from.top - from.height / 2;
    const along = sign * (across ? dx : dy);
    const aside = Math.abs(across ? dy : dx);
    if (along < 8 || (across && aside > from.height / 2)) continue;
    const cost = across ? along : along * 4 + aside; // the next line first, and there the tile below
    if (cost < least) [best, least] = [candidate, cost];
  }
  return best;
}

byId("help").addEventListener("click", () => byId("keys").showModal());
byId("close-keys").addEventListener("click", () => byId("keys").close());
byId("keys").addEventListener("click", (event) => event.target === byId("keys") && byId("keys").close());

function paint() {
  root.dataset.theme = theme;
  const words = `Colours: ${{ system: "as the system has them", light: "light", dark: "dark" }[theme]}`;
  byId("theme").title = words;
  byId("theme").setAttribute("aria-label", words);
  if (entry.view === "map") mapView?.resize();
}
byId("theme").addEventListener("click", () => {
  nextTheme();
  paint();
});
darkSystem.addEventListener("change", paint);
addEventListener("resize", redraw);
addEventListener("popstate", () => {
  leave();
  show(false);
});

byId("summary").append(purityByRank() ?? similarityByRank() ?? "");
explore();
paint();
show();
