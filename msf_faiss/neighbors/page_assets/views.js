// The views made of tiles: explore, one query, evolution and clusters.

const noNeighbors = () => el("p", { class: "empty" }, "There are no other images to retrieve.");
const searched = data.searched === "bank" ? "the whole bank" : "all searched images";
const incompleteNote = () =>
  el("p", { class: "note" }, `Nearest among the ${integer(imageCount)} images on this page, not in ${searched}.`);

function queryHeading(query, ...details) {
  return el(
    "div",
    { class: "query-head" },
    link(query, { title: "Open this query", "aria-label": `Query: ${title(query)}. Open` }, picture(query)),
    el("div", null, el("h3", null, isolate(title(query))), ...details),
  );
}

// ---------------------------------------------------------------- Explore

const cards = new Map(); // by query, built when first shown
const maxInCard = 20; // neighbours; the query's own view shows all
const orders = [
  ["default", { random: "Random", chosen: "As chosen", worst: "Worst first" }[data.order]],
  ...(labelled ? [["purity-up", "Purity, lowest first"], ["purity-down", "Purity, highest first"]] : []),
  ["similarity-up", "Similarity, lowest first"],
  ["similarity-down", "Similarity, highest first"],
];

function buildExplore() {
  const byLabel = new Map(); // number of queries
  for (const query of data.queries) byLabel.set(labels[query], (byLabel.get(labels[query]) ?? 0) + 1);
  const present = [...byLabel.keys()].filter((label) => label >= 0).sort((one, two) => one - two);
  const nameOf = (label) => classOf(data.queries.find((query) => labels[query] === label));
  byId("by-class").append(
    el("option", { value: "" }, "All classes"),
    ...present.map((label) => el("option", { value: label }, `${nameOf(label)} (${byLabel.get(label)})`)),
  );
  byId("order").append(...orders.map(([value, text]) => el("option", { value }, text)));
  for (const id of ["by-class", "order"]) byId(id).addEventListener("change", showCards);
  showCards();
}

function showCards() {
  const label = byId("by-class").value;
  const [by, direction] = byId("order").value.split("-");
  const value = (node) => {
    const { matching, compared, meanSimilarity } = summaries[node];
    return by === "purity" ? (compared ? matching / compared : null) : meanSimilarity;
  };
  let queries = data.queries.filter((query) => label === "" || labels[query] === Number(label));
  if (direction) {
    const known = queries.filter((query) => value(query) !== null);
    known.sort((one, two) => (direction === "up" ? 1 : -1) * (value(one) - value(two)));
    queries = [...known, ...queries.filter((query) => value(query) === null)];
  }
  const few = queries.some((query) => data.complete[query] && neighbors[query].length < data.k);
  const partOf = queries.length < data.queries.length ? `${integer(queries.length)} of ` : "";
  const missing = few ? `; there are fewer images than the ${integer(data.k)} neighbours requested` : "";
  byId("shown").textContent = partOf + plural(data.queries.length, "query", "queries") + missing;
  byId("queries").replaceChildren(...queries.map(card));
  markSelected(byId("queries")); // cards that had been hidden
}

function card(query) {
  if (!cards.has(query)) cards.set(query, buildCard(query));
  return cards.get(query);
}

function buildCard(query) {
  const name = names[query] === title(query) ? null : shortName(query);
  const tiles = neighbors[query].slice(0, maxInCard).map((_, rank) => neighborTile(query, rank));
  const rest = neighbors[query].length - tiles.length;
  const label = `${plural(rest, "more neighbour")} of ${title(query)}`;
  return el(
    "article",
    { class: "query", "data-area": true, "data-query": query, "aria-label": `Query: ${title(query)}` },
    queryHeading(
      query,
      el("p", { class: "score" }, matchText(summaries[query])),
      name && el("p", { class: "name", title: names[query] }, isolate(name)),
    ),
    el(
      "div",
      { class: "group" },
      tiles.length ? tileList({ class: "neighbors" }, tiles) : noNeighbors(),
      rest > 0 ? el("p", { class: "more" }, link(query, { "aria-label": label }, `${integer(rest)} more`)) : null,
      data.complete[query] ? null : incompleteNote(),
    ),
  );
}

// ---------------------------------------------------------------- One query

function showQuery(node) {
  const row = neighbors[node];
  const group = el(
    "div",
    { class: "group" },
    el("h3", null, "Neighbours", span(row.length ? "most similar first" : "")),
    data.complete[node] ? null : incompleteNote(),
    row.length ? tileList({ class: "neighbors" }, row.map((_, rank) => neighborTile(node, rank))) : noNeighbors(),
  );
  const content = el("div", null, group, retrievers(node), row.length ? neighborTable(node) : null);
  const panes = el("div", { class: "single", "data-area": true }, queryPane(node), content);
  byId("view-image").replaceChildren(trail(), panes);
  markSelected(byId("view-image"));
}

function queryPane(node) {
  const { matching, compared, meanSimilarity } = summaries[node];
  const facts = [];
  if (compared) facts.push(["Same class", `${matching} of ${compared}`]);
  if (meanSimilarity !== null) facts.push(["Mean similarity", cosine(meanSimilarity)]);
  if (ages?.[node].length) facts.push(["Mean age", integer(Math.round(sum(ages[node]) / ages[node].length))]);
  facts.push(["Retrieved by", plural(retrievedBy[node].length, "image")]);
  const number = ids[node] >= 0 && classOf(node) !== null ? `Image ${integer(ids[node])} · ` : ""; // if not the title
  const onMap = data.map !== null && data.map.nodes.includes(node);
  const select = el("button", { type: "button", class: "button", "data-select": node });
  select.addEventListener("click", () => setSelected([node], !selected.has(node)));
  return el(
    "div",
    { class: "query-pane" },
    el("div", { class: "large" }, picture(node, `Query: ${title(node)}`)),
    el(
      "div",
      { class: "facts" },
      el("h2", { tabindex: "-1" }, isolate(title(node))),
      el("p", { class: "name" }, number, isolate(names[node])),
      el("dl", null, ...facts.flatMap(([term, text]) => [el("dt", null, term), el("dd", null, text)])),
      onMap ? el("a", { href: "#map", class: "button", "data-map-node": node }, "Show on the map") : null,
      select,
    ),
  );
}

function retrievers(node) {
  const all = retrievedBy[node];
  const shown = all.slice(0, 36);
  if (!shown.length) return null;
  const partOf = shown.length < all.length ? `${shown.length} of ` : "";
  const items = shown.map(([rank, other]) => {
    const label = `Retrieves this image as neighbour ${rank + 1}`;
    return tile(other, matches(node, other), label, span(`rank ${rank + 1}`));
  });
  return el(
    "div",
    { class: "group retrievers" },
    el("h3", null, "Retrieved by", span(`${partOf}${plural(all.length, "image")} on this page`)),
    tileList({ class: "neighbors" }, items),
  );
}

function neighborTable(node) {
  const classColumns = labelled ? ["Class", "Match"] : [];
  const columns = ["Rank", "Image", "Similarity", ...(ages === null ? [] : ["Age"]), ...classColumns, "Name"];
  const rows = neighbors[node].map((other, rank) => {
    const match = matches(node, other);
    return [
      String(rank + 1),
      ids[other] >= 0 ? integer(ids[other]) : "–",
      similarity(node, rank).toFixed(5),
      ...(ages === null ? [] : [integer(ages[node][rank])]),
      ...(labelled ? [isolate(classOf(other) ?? "–"), match === null ? "–" : match ? "yes" : "no"] : []),
      isolate(names[other]),
    ];
  });
  return dataTable("Names and numbers", columns, rows);
}

// The queries visited on the way to this one.
function trail() {
  const first = Math.max(0, current.trail.length - 16);
  const steps = current.trail.slice(first).map((node, place) => {
    const step = first + place;
    const isLast = step === current.trail.length - 1;
    const attributes = {
      "data-step": step,
      "aria-current": isLast ? "step" : null,
      "aria-label": `${isLast ? "Current query:" : "Back to"} ${title(node)}`,
      title: title(node),
    };
    return el("li", null, link(node, attributes, picture(node)));
  });
  const arrow = el("span", { "aria-hidden": "true" }, "←");
  const button = el("button", { type: "button", class: "button", "aria-label": "Back" }, arrow, "Back");
  button.addEventListener("click", goBack);
  const list = el("ol", null, first ? el("li", null, `… ${integer(first)} more`) : null, ...steps);
  requestAnimationFrame(() => (list.scrollLeft = list.scrollWidth));
  return el("nav", { class: "trail", "aria-label": "Visited queries" }, button, list);
}

// ---------------------------------------------------------------- Evolution

function buildEvolution() {
  const checkpoints = data.evolution;
  const points = checkpoints.map(({ step, purity, interval }) => {
    return { x: step, value: purity, interval, label: integer(step) };
  });
  const asked = plural(Math.max(...checkpoints.map(({ images }) => images)), "image");
  const description = `Share of the neighbours of ${asked} with the same class as their query, with 95% intervals.`;
  const options = { isPercent: true, height: 130 };
  const purity = points.length > 1 ? lineChart("Purity over the run", description, points, "Step", options) : null;
  if (purity) byId("evolution-head").append(purity);
  const deepest = Math.max(0, ...checkpoints.flatMap((checkpoint) => checkpoint.neighbors.map((row) => row.length)));
  const depths = [3, 5, 10].filter((depth) => depth < deepest);
  const select = byId("depth");
  select.append(
    ...depths.map((depth) => el("option", { value: depth }, String(depth))),
    el("option", { value: deepest }, depths.length ? `all ${deepest}` : String(deepest)),
  );
  if (depths.includes(5)) select.value = "5";
  const rows = byId("evolutions");
  const width = snapSide(96) + 62 + checkpoints.length * (Math.max(snapSide(70) + 6, 70) + 10);
  rows.style.setProperty("--evolution", `${width}px`);
  const show = () =>
    rows.replaceChildren(...data.queries.map((query, place) => evolutionCard(query, place, Number(select.value))));
  select.addEventListener("change", show);
  show();
  for (const [kind, on] of [["pointerover", true], ["focusin", true], ["pointerout", false], ["focusout", false]]) {
    rows.addEventListener(kind, (event) => {
      const anchor = event.target.closest(".checkpoint [data-node]");
      const same = anchor?.closest(".columns").querySelectorAll(`[data-node="${anchor.dataset.node}"]`) ?? [];
      for (const other of same) other.classList.toggle("same", on);
    });
  }
}

function evolutionCard(query, place, depth) {
  const columns = data.evolution.map((checkpoint) => {
    const row = checkpoint.neighbors[place];
    const { matching, compared } = countMatches(query, row);
    const items = row.slice(0, depth).map((node, rank) => {
      const value = cosine(checkpoint.similarities[place][rank] / 100000);
      const label = `Step ${integer(checkpoint.step)}, neighbour ${rank + 1}, similarity ${value}`;
      return tile(node, matches(query, node), label, el("b", null, value));
    });
    return el(
      "div",
      { class: "checkpoint" },
      el("h4", null, span("step"), ` ${integer(checkpoint.step)}`),
      el("p", null, `epoch ${Number(checkpoint.epoch.toPrecision(3))}`),
      compared ? el("p", null, `${matching} of ${compared}`) : null,
      items.length ? tileList({}, items) : el("p", null, "none"),
    );
  });
  return el(
    "article",
    { class: "evolution", "data-area": true, "aria-label": `Query: ${title(query)}` },
    queryHeading(query),
    el("div", { class: "columns" }, ...columns),
  );
}
