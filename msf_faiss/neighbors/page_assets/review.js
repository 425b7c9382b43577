// What to look at in a data set: classes that are confused, images that are nearly the same, and images that are like
// no other.

// ---------------------------------------------------------------- Confusion matrix

function confusionMatrix() {
  const { confusion } = data.statistics;
  if (!confusion || confusion.labels.length < 2) return null;
  const { labels: shown, counts, totals, present } = confusion;
  const name = (place) => classes[shown[place]];
  const share = (row, column) => (totals[row] ? counts[row][column] / totals[row] : 0);
  const cell = (row, column) => {
    const value = share(row, column);
    const element = el(
      "td",
      {
        role: "gridcell",
        class: row === column ? "same" : null,
        "data-cell": `${row} ${column}`,
        tabindex: row === 0 && column === 0 ? "0" : "-1",
        title: `${percent(value)} of the neighbours of ${name(row)} are ${name(column)}`,
      },
      counts[row][column] ? String(Math.round(100 * value)) : "",
    );
    element.setAttribute("aria-label", element.title);
    const color = row === column ? "--match" : "--mismatch";
    element.style.background = `color-mix(in srgb, var(${color}) ${percent(0.45 * value ** 0.6)}, transparent)`;
    return element;
  };
  const heads = shown.map((_, column) =>
    el("th", { scope: "col", title: name(column) }, span(isolate(name(column)))),
  );
  const rows = shown.map((_, row) => {
    const head = el("th", { scope: "row", title: name(row) }, span(isolate(name(row))));
    return el("tr", { role: "row" }, head, ...shown.map((_, column) => cell(row, column)));
  });
  const corner = el("tr", { role: "row" }, el("td", { role: "gridcell" }), ...heads);
  const label = "Confusion matrix; rows: class of the query, columns: class of the neighbour";
  const table = el(
    "table",
    { class: "confusion", role: "grid", "aria-label": label },
    el("thead", null, corner),
    el("tbody", null, ...rows),
  );
  const images = el("div", { class: "confused" });
  const show = (active) => showConfused(images, ...active.dataset.cell.split(" ").map((place) => shown[place]));
  table.addEventListener("click", (event) => {
    const active = event.target.closest("[data-cell]");
    if (active) show(active);
  });
  table.addEventListener("keydown", (event) => moveInMatrix(event, table, shown.length, show));
  const partOf = shown.length < present ? ` Shown: the ${shown.length} of ${integer(present)} confused most.` : "";
  const description =
    "Percentage of the neighbours of each class (rows) that have a class (columns), " +
    `from ${plural(data.statistics.images, "image")}.${partOf} Choose a cell to see its images.`;
  const matrix = chart("Confusion of classes", description, el("div", { class: "scroll" }, table), images);
  matrix.classList.add("wide");
  matrix.dataset.area = "";
  return matrix;
}

function moveInMatrix(event, table, side, show) {
  const active = event.target.closest("[data-cell]");
  if (!active || event.ctrlKey || event.metaKey || event.altKey) return;
  let [row, column] = active.dataset.cell.split(" ").map(Number);
  if (event.key === "Enter" || event.key === " ") show(active);
  else if (event.key === "ArrowLeft") column -= 1;
  else if (event.key === "ArrowRight") column += 1;
  else if (event.key === "ArrowUp") row -= 1;
  else if (event.key === "ArrowDown") row += 1;
  else if (event.key === "Home") column = 0;
  else if (event.key === "End") column = side - 1;
  else return;
  event.preventDefault();
  event.stopPropagation();
  const target = table.querySelector(`[data-cell="${row} ${column}"]`);
  if (!target || target === active) return;
  active.setAttribute("tabindex", "-1");
  target.setAttribute("tabindex", "0");
  target.focus();
}

// The images of class `queryLabel` on this page that have a neighbour of class `neighborLabel`, those with most first.
function showConfused(box, queryLabel, neighborLabel) {
  const count = (node) => neighbors[node].filter((other) => labels[other] === neighborLabel).length;
  const found = names.map((_, node) => node).filter((node) => labels[node] === queryLabel && count(node) > 0);
  found.sort((one, two) => count(two) - count(one));
  const text = [classes[queryLabel], classes[neighborLabel]];
  const heading = el("h4", null, "Images of ", isolate(text[0]), " with neighbours of ", isolate(text[1]));
  const partial = `${plural(found.length, "image")} on this page, most such neighbours first`;
  const build = (node) => tile(node, null, text[0], el("b", null, `${count(node)} of ${neighbors[node].length}`));
  const tiles = pagedTiles({ class: "hubs" }, found, 24, build);
  box.replaceChildren(heading, el("p", { role: "status" }, partial), ...tiles);
}

// ---------------------------------------------------------------- Near-duplicates and outliers

function buildReview() {
  const { pairs, outliers } = data.review;
  if (pairs.length) byId("review").append(duplicateList(pairs));
  if (outliers.length) byId("review").append(outlierList(outliers));
}

function duplicateList(pairs) {
  const value = (pair) => pair[2] / 100000;
  const [highest, lowest] = [value(pairs[0]), value(pairs.at(-1))];
  const floor = Math.floor(lowest * 100) / 100;
  const slider = el("input", { type: "range", min: floor, max: 1, step: 0.005, id: "threshold" });
  slider.value = Math.max(floor, Math.min(0.95, Math.floor(highest * 200) / 200));
  const output = el("output", { for: "threshold" });
  const count = el("p", { role: "status", id: "pair-count" });
  const box = el("div", { class: "pair-list" });
  let shown = [];
  const build = (pair) => {
    const [one, two] = pair;
    const match = matches(one, two);
    const kind = match === null ? "" : match ? "same class" : "different class";
    const spoken = (other) => `Near-duplicate of ${idOrName(other)}, similarity ${cosine(value(pair))}`;
    const tiles = [tile(one, match, spoken(two)), tile(two, match, spoken(one))];
    const text = el("p", null, el("b", null, cosine(value(pair))), " ", kind);
    return el("li", { class: "pair" }, el("ol", null, ...tiles), text);
  };
  const show = () => {
    shown = pairs.filter((pair) => value(pair) >= Number(slider.value));
    output.textContent = Number(slider.value).toFixed(3);
    count.textContent = plural(shown.length, "pair");
    box.replaceChildren(...pagedTiles({ class: "pairs" }, shown, 24, build));
  };
  slider.addEventListener("input", show);
  show();
  const images = data.searched === "bank" ? plural(data.statistics.images, "random image") : "all images";
  const list = chart(
    "Near-duplicates",
    `The ${plural(pairs.length, "most similar pair")} among ${images} and their neighbours, by the cosine of their ` +
      "embeddings at this checkpoint.",
    el("div", { class: "toolbar" }, el("label", null, "Similarity at least ", slider, output), count),
    el("div", { class: "actions" }, selectButton("Select the second of each pair", () => shown.map((pair) => pair[1]))),
    box,
  );
  list.dataset.area = "";
  return list;
}

function outlierList(outliers) {
  const build = ([node, mean]) => {
    const value = cosine(mean / 100000);
    return tile(node, null, `Mean similarity ${value}`, el("b", null, value), span(isolate(title(node))));
  };
  const nodes = outliers.map(([node]) => node);
  const list = chart(
    "Outliers",
    `The ${integer(outliers.length)} of ${plural(data.statistics.images, "image")} with the lowest mean similarity ` +
      "to their neighbours.",
    el("div", { class: "actions" }, selectButton(`Select all ${integer(nodes.length)}`, () => nodes)),
    ...pagedTiles({ class: "hubs" }, outliers, 24, build),
  );
  list.dataset.area = "";
  return list;
}
