// The page's data, and the elements that all views are made of. Names come from a data set and may be hostile: they
// enter the document as text only. A node is the position of an image on this page.

const byId = (id) => document.getElementById(id);
const [data, pictures] = ["data", "pictures"].map((id) => {
  const element = byId(id);
  element.remove(); // megabytes of text
  return JSON.parse(element.textContent);
});
const { classes, ids, labels, neighbors, similarities, ages } = data;
const names = data.names.map((name) => name.replace(/[\p{Cc}\p{Bidi_Control}\u2028\u2029]/gu, "\ufffd")); // to show
const imageCount = ids.length;
const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");
const labelled = labels.some((label) => label >= 0);
document.body.classList.toggle("unlabelled", !labelled);
document.body.classList.toggle("small", pictures.small);

// ---------------------------------------------------------------- Numbers and names

const integer = new Intl.NumberFormat("en").format;
const percent = (value, digits = 1) => `${(100 * value).toFixed(digits)}%`;
const cosine = (value) => value.toFixed(3);
const plural = (number, one, many = `${one}s`) => `${integer(number)} ${number === 1 ? one : many}`;
const sum = (values) => values.reduce((total, value) => total + value, 0);
const similarity = (node, rank) => similarities[node][rank] / 100000;
const classOf = (node) =>
  labels[node] < 0 ? null : classes && labels[node] < classes.length ? classes[labels[node]] : `class ${labels[node]}`;
const idOrName = (node) => (ids[node] >= 0 ? `image ${integer(ids[node])}` : names[node]);
const title = (node) => classOf(node) ?? idOrName(node).replace(/^image/, "Image");
const commonPrefix = names.reduce((prefix, text) => {
  let length = 0;
  while (length < prefix.length && prefix[length] === text[length]) length += 1;
  return prefix.slice(0, length);
});
const shortName = (node) => names[node].slice(commonPrefix.lastIndexOf("/") + 1); // without the common folders

// Whether two images have the same class; null if one of them has no label.
const matches = (query, node) => (labels[query] < 0 || labels[node] < 0 ? null : labels[query] === labels[node]);

function countMatches(query, nodes) {
  const compared = nodes.map((node) => matches(query, node)).filter((match) => match !== null);
  return { matching: compared.filter(Boolean).length, compared: compared.length };
}

const summaries = neighbors.map((row, node) => ({
  ...countMatches(node, row),
  meanSimilarity: row.length ? sum(similarities[node]) / 100000 / row.length : null,
}));
const matchText = ({ matching, compared }) => (compared ? `${matching} of ${compared} match` : "");
const purityOf = (node) => (summaries[node].compared ? summaries[node].matching / summaries[node].compared : null);

// By node: [rank, query] of all nodes that retrieve it.
const retrievedBy = Array.from({ length: imageCount }, () => []);
neighbors.forEach((row, node) => row.forEach((other, rank) => retrievedBy[other].push([rank, node])));
retrievedBy.forEach((row) => row.sort((one, two) => one[0] - two[0]));

// ---------------------------------------------------------------- Elements

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const span = (...children) => el("span", null, ...children);
const isolate = (text) => el("bdi", null, text); // a right-to-left name leaves the text around it as it is
const imageUrl = (node) => `data:image/webp;base64,${pictures.images[node]}`;
const picture = (node, alt = "") => el("img", { src: imageUrl(node), alt, decoding: "async", draggable: "false" });
function link(node, attributes, ...children) {
  const anchor = el("a", { href: `#image-${node}`, "data-node": node, ...attributes }, ...children);
  markLink(anchor);
  return anchor;
}

// `interval`: the error band, drawn over the end of the bar.
function bar(fraction, interval = null) {
  const part = (kind, from, to) => {
    const element = el("i", { class: kind });
    element.style.left = percent(from);
    element.style.width = percent(to - from);
    return element;
  };
  const band = interval && part("band", ...interval);
  return el("div", { class: "meter", "aria-hidden": "true" }, part("filled", 0, fraction), band);
}
const intervalText = (interval) => (interval ? `${percent(interval[0])} to ${percent(interval[1])}` : "–");

function matchMark(match) {
  if (match === null) return null;
  const path = match ? "M5.5 10.5 8.7 13.7 14.5 6.5" : "M6.2 6.2 13.8 13.8M13.8 6.2 6.2 13.8";
  const attributes = { class: match ? "mark" : "mark no", viewBox: "0 0 20 20", "aria-hidden": "true" };
  return svg("svg", attributes, svg("path", { d: path }));
}

// A picture that becomes the query when clicked. `match`: null if there is no query or no label to compare with.
function tile(node, match, label, ...caption) {
  const spoken = [label, title(node), match === null ? null : match ? "same class" : "different class"];
  return el(
    "li",
    { class: `tile${match === null ? "" : match ? " match" : " mismatch"}` },
    link(
      node,
      { tabindex: "-1", title: names[node], "aria-label": spoken.filter(Boolean).join(", ") },
      el("span", { class: "frame" }, picture(node), matchMark(match)),
      caption.length ? el("span", { class: "caption" }, ...caption) : null,
    ),
  );
}

function neighborTile(query, rank) {
  const node = neighbors[query][rank];
  const age = ages === null ? null : `age ${integer(ages[query][rank])}`;
  const value = cosine(similarity(query, rank));
  const label = [`Neighbour ${rank + 1}`, `similarity ${value}`, age].filter(Boolean).join(", ");
  return tile(node, matches(query, node), label, el("b", null, value), span(isolate(title(node))), age && span(age));
}

// A list of tiles is one stop of the Tab key; arrow keys move within it ("roving tabindex").
function tileList(attributes, items) {
  items[0]?.querySelector("a")?.setAttribute("tabindex", "0");
  return el("ol", { "data-roving": true, ...attributes }, ...items);
}

// A list of tiles of which `batch` are built at a time, followed by a button for more. `build(item)` returns a tile.
function pagedTiles(attributes, items, batch, build) {
  const list = tileList(attributes, items.slice(0, batch).map(build));
  if (items.length <= batch) return [list];
  const more = el("button", { type: "button", class: "button" });
  const update = () => {
    const left = items.length - list.children.length;
    more.textContent = `Show ${integer(Math.min(batch, left))} more of ${integer(left)}`;
    more.hidden = left === 0;
  };
  more.addEventListener("click", () => {
    const added = items.slice(list.children.length, list.children.length + batch).map(build);
    list.append(...added);
    update();
    added[0].querySelector("a").focus({ preventScroll: true });
  });
  update();
  return [list, more];
}

// The side at which a picture is shown, near `pixels`: small pictures are enlarged by whole factors, without blur.
function snapSide(pixels) {
  return pictures.small ? pictures.side * Math.max(1, Math.round(pixels / pictures.side)) : pixels;
}
const grid = { tile: 96, query: 152, "query-narrow": 128, member: 72, checkpoint: 70, result: 72 };
const queryView = { "query-large": 288, neighbor: 112 };
for (const [name, pixels] of Object.entries({ ...grid, ...queryView })) {
  root.style.setProperty(`--${name}`, `${snapSide(pixels)}px`);
}

// A table to unfold. The first cell of each column decides how the column is aligned.
function dataTable(summary, columns, rows) {
  const alignment = (column) => (/^[\d–−-]/.test(String(rows[0]?.[column] ?? "")) ? "number" : null);
  const head = columns.map((text, column) => el("th", { scope: "col", class: alignment(column) }, text));
  const kind = (column) => (columns[column] === "Name" ? "file" : alignment(column));
  const cell = (content, column) => el("td", { class: kind(column) }, content);
  const body = rows.map((row) => el("tr", null, ...row.map(cell)));
  const table = el("table", null, el("thead", null, el("tr", null, ...head)), el("tbody", null, ...body));
  const region = { class: "scroll", tabindex: "0", role: "region", "aria-label": summary };
  return el("details", null, el("summary", null, summary), el("div", region, table));
}

function announce(text) {
  byId("announcement").textContent = text;
}
