// Data of the page, numbers in words, and elements. Names come from a data set and may be hostile: they enter the
// document as text only.

const data = JSON.parse(document.getElementById("data").textContent);
const pictures = JSON.parse(document.getElementById("pictures").textContent);
document.getElementById("data").remove();
document.getElementById("pictures").remove(); // some megabytes of text
const { classes, ids, names, labels, neighbors, similarities, ages } = data;
const count = ids.length;
const byId = (id) => document.getElementById(id);
const still = matchMedia("(prefers-reduced-motion: reduce)");
const labelled = labels.some((label) => label >= 0);
document.body.classList.toggle("unlabelled", !labelled);
document.body.classList.toggle("small", pictures.small);

// ---------------------------------------------------------------- Words and numbers

const whole = new Intl.NumberFormat("en").format;
const percent = (value, digits = 1) => `${(100 * value).toFixed(digits)}%`;
const cosine = (value) => value.toFixed(3);
const similarity = (node, rank) => similarities[node][rank] / 100000;
const plural = (number, one, many = `${one}s`) => `${whole(number)} ${number === 1 ? one : many}`;
const classOf = (node) =>
  labels[node] < 0 ? null : classes && labels[node] < classes.length ? classes[labels[node]] : `class ${labels[node]}`;
const called = (node) => (ids[node] >= 0 ? `image ${whole(ids[node])}` : names[node]);
const title = (node) => classOf(node) ?? called(node).replace(/^image/, "Image");
// A name without the folders that all names share.
const shared = names.reduce((prefix, text) => {
  let length = 0;
  while (length < prefix.length && prefix[length] === text[length]) length += 1;
  return prefix.slice(0, length);
});
const brief = (node) => names[node].slice(shared.lastIndexOf("/") + 1);
const matches = (query, node) => (labels[query] < 0 || labels[node] < 0 ? null : labels[query] === labels[node]);

// How the neighbours of a node agree with it: [matching, compared, mean similarity].
const agreement = neighbors.map((row, node) => {
  const compared = row.map((other) => matches(node, other)).filter((match) => match !== null);
  const total = similarities[node].reduce((sum, value) => sum + value, 0) / 100000;
  return [compared.filter(Boolean).length, compared.length, row.length ? total / row.length : null];
});
const retrievedBy = Array.from({ length: count }, () => []);
neighbors.forEach((row, node) => row.forEach((other, rank) => retrievedBy[other].push([rank, node])));
retrievedBy.forEach((row) => row.sort((one, two) => one[0] - two[0]));
const score = (node) => {
  const [matching, compared] = agreement[node];
  return compared ? `${matching} of ${compared} match` : "";
};

// ---------------------------------------------------------------- Elements

function el(name, properties, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

function svg(name, properties, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(properties ?? {})) {
    if (value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

const span = (...children) => el("span", null, ...children);
const name = (text) => el("bdi", null, text); // a name that is written from right to left turns nothing around it
const source = (node) => `data:image/webp;base64,${pictures.images[node]}`;
const picture = (node, alt = "") => el("img", { src: source(node), alt, decoding: "async", draggable: "false" });
const link = (node, properties, ...children) =>
  el("a", { href: `#image-${node}`, "data-node": node, ...properties }, ...children);

function mark(match) {
  if (match === null) return null;
  const path = match ? "M5.5 10.5 8.7 13.7 14.5 6.5" : "M6.2 6.2 13.8 13.8M13.8 6.2 6.2 13.8";
  const properties = { class: match ? "mark" : "mark no", viewBox: "0 0 20 20", "aria-hidden": "true" };
  return svg("svg", properties, svg("path", { d: path }));
}

// A picture that becomes the query. `match`: null where nothing can be compared.
function tile(node, match, spoken, ...caption) {
  const said = [spoken, title(node), match === null ? null : match ? "same class" : "another class"];
  return el(
    "li",
    { class: `tile${match === null ? "" : match ? " match" : " mismatch"}` },
    link(
      node,
      { tabindex: "-1", title: names[node], "aria-label": said.filter(Boolean).join(", ") },
      el("span", { class: "frame" }, picture(node), mark(match)),
      caption.length ? el("span", { class: "caption" }, ...caption) : null,
    ),
  );
}

function neighborTile(query, rank) {
  const node = neighbors[query][rank];
  const like = cosine(similarity(query, rank));
  const age = ages === null ? null : ages[query][rank];
  return tile(
    node,
    matches(query, node),
    `Neighbour ${rank + 1}, similarity ${like}${age === null ? "" : `, age ${whole(age)}`}`,
    el("b", null, like),
    span(name(title(node))),
    age === null ? null : span(`age ${whole(age)}`),
  );
}

// A list of tiles has one place in the order of Tab; arrows move within it.
function tiles(properties, items) {
  items[0]?.querySelector("a")?.setAttribute("tabindex", "0");
  return el("ol", { "data-rove": true, ...properties }, ...items);
}

// Sides near `about`: a whole multiple of small pictures, so that all their pixels are equal.
function side(about) {
  return pictures.small ? pictures.side * Math.max(1, Math.round(about / pictures.side)) : about;
}
const sides = { tile: 96, query: 152, asked: 128, near: 112, big: 288, moment: 70, member: 72, found: 72 };
for (const [key, about] of Object.entries(sides)) root.style.setProperty(`--${key}`, `${side(about)}px`);

function details(summary, columns, rows) {
  // The first cell of a column says whether it is of numbers.
  const kind = (place) => (/^[\d–−-]/.test(String(rows[0]?.[place] ?? "")) ? "number" : null);
  const head = columns.map((text, place) => el("th", { scope: "col", class: kind(place) }, text));
  const body = rows.map((row) =>
    el("tr", null, ...row.map((cell, place) => el("td", { class: columns[place] === "Name" ? "file" : kind(place) }, cell))),
  );
  const table = el("table", null, el("thead", null, el("tr", null, ...head)), el("tbody", null, ...body));
  return el(
    "details",
    null,
    el("summary", null, summary),
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": summary }, table),
  );
}
