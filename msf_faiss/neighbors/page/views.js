// The views made of tiles: explore, one query, evolution, clusters.

// ---------------------------------------------------------------- Explore

const cards = new Map();
const mostInGrid = 20; // neighbours; the others are in the view of the query alone
const orders = [
  ["page", { random: "As drawn", chosen: "As chosen", worst: "Worst first" }[data.order]],
  ...(labelled ? [["purity-up", "Purity, lowest first"], ["purity-down", "Purity, highest first"]] : []),
  ["similarity-up", "Similarity, lowest first"],
  ["similarity-down", "Similarity, highest first"],
];

function explore() {
  const present = [...new Set(data.queries.map((query) => labels[query]))].filter((label) => label >= 0);
  const counts = (label) => data.queries.filter((query) => labels[query] === label).length;
  const named = present.map((label) => [label, classOf(data.queries.find((query) => labels[query] === label))]);
  named.sort((one, two) => one[0] - two[0]);
  byId("by-class").append(
    el("option", { value: "" }, "All classes"),
    ...named.map(([label, text]) => el("option", { value: label }, `${text} (${counts(label)})`)),
  );
  byId("order").append(...orders.map(([value, text]) => el("option", { value }, text)));
  byId("by-class").addEventListener("change", arrange);
  byId("order").addEventListener("change", arrange);
  arrange();
}

function arrange() {
  const label = byId("by-class").value;
  const [by, way] = byId("order").value.split("-");
  const value = (node) => {
    const [matching, compared, mean] = agreement[node];
    return by === "purity" ? (compared ? matching / compared : null) : mean;
  };
  const some = data.queries.filter((query) => label === "" || labels[query] === Number(label));
  if (way) {
    const known = some.filter((query) => value(query) !== null);
    known.sort((one, two) => (way === "up" ? 1 : -1) * (value(one) - value(two)));
    some.splice(0, some.length, ...known, ...some.filter((query) => value(query) === null));
  }
  const fewest = Math.min(...some.map((query) => (data.complete[query] ? neighbors[query].length : data.k)));
  const short = some.length > 0 && fewest < data.k;
  const partOf = some.length < data.queries.length ? `${whole(some.length)} of ` : "";
  const missing = `; ${whole(data.k)} neighbours were asked for, but there are not so many other images`;
  const all = plural(data.queries.length, "query", "queries");
  byId("shown").textContent = `${partOf}${all}${short ? missing : ""}`;
  byId("queries").replaceChildren(...some.map(card));
}

function card(query) {
  if (!cards.has(query)) {
    const shownName = names[query] === title(query) ? null : el("p", { class: "name", title: names[query] }, name(brief(query)));
    const row = neighbors[query];
    const items = row.slice(0, mostInGrid).map((_, rank) => neighborTile(query, rank));
    const rest = row.length - items.length;
    const further = { "aria-label": `${plural(rest, "more neighbour")} of ${title(query)}` };
    const more = rest > 0 ? el("p", { class: "more" }, link(query, further, `${whole(rest)} more`)) : null;
    const spoken = `Query: ${title(query)}. Look at it alone`;
    cards.set(
      query,
      el(
        "article",
        { class: "query", "data-area": true, "data-query": query, "aria-label": `Query: ${title(query)}` },
        el(
          "div",
          { class: "asked" },
          link(query, { title: "Look at this query", "aria-label": spoken }, picture(query)),
          el("div", null, el("h3", null, name(title(query))), el("p", { class: "score" }, score(query)), shownName),
        ),
        el(
          "div",
          { class: "group" },
          items.length ? tiles({ class: "neighbors" }, items) : nothing(),
          more,
          data.complete[query] ? null : partly(),
        ),
      ),
    );
  }
  return cards.get(query);
}

const nothing = () => el("p", { class: "none" }, "There is no other image to retrieve.");
const searched = data.searched === "bank" ? "the bank holds" : "were searched";
const partly = () =>
  el("p", { class: "note" }, `Nearest among the ${whole(count)} images of this page, not among all that ${searched}.`);

// ---------------------------------------------------------------- One query

function one() {
  const node = entry.node;
  const [matching, compared, mean] = agreement[node];
  const row = neighbors[node];
  const facts = [];
  if (compared) facts.push(["Matching", `${matching} of ${compared}`]);
  if (mean !== null) facts.push(["Mean similarity", cosine(mean)]);
  if (ages !== null && row.length) {
    const total = ages[node].reduce((sum, age) => sum + age, 0);
    facts.push(["Mean age", whole(Math.round(total / row.length))]);
  }
  facts.push(["Retrieved by", plural(retrievedBy[node].length, "image")]);
  const numbered = ids[node] >= 0 && classOf(node) !== null; // otherwise the number is the heading
  const number = numbered ? `Image ${whole(ids[node])} · ` : "";
  const onMap = data.map !== null && data.map.nodes.includes(node);
  const toMap = onMap ? el("a", { href: "#map", class: "button", "data-section-link": node }, "Show on the map") : null;
  const asker = el(
    "div",
    { class: "asker" },
    el("div", { class: "big" }, picture(node, `Query: ${title(node)}`)),
    el(
      "div",
      { class: "fact" },
      el("h2", { tabindex: "-1" }, name(title(node))),
      el("p", { class: "name" }, number, name(names[node])),
      el("dl", null, ...facts.flatMap(([term, text]) => [el("dt", null, term), el("dd", null, text)])),
      toMap,
    ),
  );
  const group = el(
    "div",
    { class: "group" },
    el("h3", null, "Neighbours", span(row.length ? "the most similar first" : "")),
    data.complete[node] ? null : partly(),
    row.length ? tiles({ class: "neighbors" }, row.map((_, rank) => neighborTile(node, rank))) : nothing(),
  );
  const asking = retrievedBy[node].slice(0, 36);
  const some = asking.length < retrievedBy[node].length ? `${asking.length} of ` : "";
  const reverse = asking.length
    ? el(
        "div",
        { class: "group retrieving" },
        el("h3", null, "Retrieved by", span(`${some}${plural(retrievedBy[node].length, "image")} of this page`)),
        tiles(
          { class: "neighbors" },
          asking.map(([rank, other]) => {
            const spoken = `Retrieves it as neighbour ${rank + 1}`;
            return tile(other, matches(node, other), spoken, span(`as no. ${rank + 1}`));
          }),
        ),
      )
    : null;
  const aged = ages === null ? [] : ["Age"];
  const columns = ["Rank", "Image", "Similarity", ...aged, ...(labelled ? ["Class", "Match"] : []), "Name"];
  const table = row.length
    ? details(
        "Names and numbers",
        columns,
        row.map((other, rank) => {
          const match = matches(node, other);
          return [
            String(rank + 1),
            ids[other] >= 0 ? whole(ids[other]) : "–",
            similarity(node, rank).toFixed(5),
            ...(ages === null ? [] : [whole(ages[node][rank])]),
            ...(labelled ? [name(classOf(other) ?? "–"), match === null ? "–" : match ? "yes" : "no"] : []),
            name(names[other]),
          ];
        }),
      )
    : null;
  byId("view-image").replaceChildren(
    trail(),
    el("div", { class: "one", "data-area": true }, asker, el("div", null, group, reverse, table)),
  );
}

function trail() {
  const first = Math.max(0, entry.trail.length - 16);
  const steps = entry.trail.slice(first).map((node, step) => {
    const last = first + step === entry.trail.length - 1;
    const properties = {
      "data-step": first + step,
      "aria-current": last ? "step" : null,
      "aria-label": `${last ? "Now" : "Back to"} ${title(node)}`,
      title: title(node),
    };
    return el("li", null, link(node, properties, picture(node)));
  });
  const arrowLeft = el("span", { "aria-hidden": "true" }, "←");
  const button = el("button", { type: "button", class: "button", "aria-label": "Back" }, arrowLeft, "Back");
  button.addEventListener("click", back);
  const list = el("ol", { "data-trail": true }, first ? el("li", null, `… ${whole(first)} more`) : null, ...steps);
  requestAnimationFrame(() => (list.scrollLeft = list.scrollWidth));
  return el("nav", { class: "path", "aria-label": "The way here" }, button, list);
}

// ---------------------------------------------------------------- Evolution

function evolution() {
  const moments = data.evolution;
  const points = moments.map((moment) => {
    return { at: moment.step, value: moment.purity, label: whole(moment.step), name: `Step ${whole(moment.step)}` };
  });
  const explained = "Share of these queries’ neighbours that have their class.";
  const purity =
    moments.length > 1 ? curve("Purity over the run", explained, points, true, ["Step", "Purity"], 130) : null;
  const deepest = Math.max(0, ...moments.flatMap((moment) => moment.neighbors.map((row) => row.length)));
  const depths = [3, 5, 10].filter((depth) => depth < deepest);
  const select = byId("depth");
  select.append(
    ...depths.map((depth) => el("option", { value: depth }, String(depth))),
    el("option", { value: deepest }, depths.length ? `all ${deepest}` : String(deepest)),
  );
  if (depths.includes(5)) select.value = "5";
  const rows = byId("moments");
  const wide = side(96) + 62 + moments.length * (Math.max(side(70) + 6, 70) + 10);
  rows.style.setProperty("--evolution", `${wide}px`);
  const fill = () => rows.replaceChildren(...data.queries.map((query, place) => evolved(query, place, Number(select.value))));
  select.addEventListener("change", fill);
  fill();
  if (purity) byId("opening").append(purity);
  for (const [kind, on] of [["pointerover", true], ["focusin", true], ["pointerout", false], ["focusout", false]]) {
    rows.addEventListener(kind, (event) => {
      const anchor = event.target.closest(".moment [data-node]");
      const alike = anchor?.closest(".columns").querySelectorAll(`[data-node="${anchor.dataset.node}"]`) ?? [];
      for (const other of alike) other.classList.toggle("same", on);
    });
  }
}

function evolved(query, place, depth) {
  const columns = data.evolution.map((moment) => {
    const row = moment.neighbors[place];
    const compared = row.map((node) => matches(query, node)).filter((match) => match !== null);
    const items = row.slice(0, depth).map((node, rank) => {
      const like = cosine(moment.similarities[place][rank] / 100000);
      const spoken = `Step ${whole(moment.step)}, neighbour ${rank + 1}, similarity ${like}`;
      return tile(node, matches(query, node), spoken, el("b", null, like));
    });
    return el(
      "div",
      { class: "moment" },
      el("h4", null, span("step"), ` ${whole(moment.step)}`),
      el("p", null, `epoch ${Number(moment.epoch.toPrecision(3))}`),
      compared.length ? el("p", null, `${compared.filter(Boolean).length} of ${compared.length}`) : null,
      items.length ? tiles({}, items) : el("p", null, "none"),
    );
  });
  return el(
    "article",
    { class: "evolution", "data-area": true, "aria-label": `Query: ${title(query)}` },
    el(
      "div",
      { class: "asked" },
      link(query, { "aria-label": `Query: ${title(query)}. Look at it alone` }, picture(query)),
      el("div", null, el("h3", null, name(title(query)))),
    ),
    el("div", { class: "columns" }, ...columns),
  );
}

// ---------------------------------------------------------------- Clusters

function clusters() {
  byId("cluster-cards").append(
    ...data.clusters.map((cluster, place) => {
      const bar = el("i");
      bar.style.width = percent(cluster.share ?? 0);
      return el(
        "article",
        { class: "cluster", "data-area": true },
        el("h3", null, cluster.name === null ? `Cluster ${place + 1}` : name(cluster.name)),
        el(
          "p",
          null,
          span(`${cluster.name === null ? "" : `Cluster ${place + 1}, `}${plural(cluster.size, "image")}`),
          cluster.share === null ? null : span(`${percent(cluster.share, 0)} of this class`),
        ),
        cluster.share === null ? null : el("div", { class: "meter", "aria-hidden": "true" }, bar),
        tiles({}, cluster.members.map((node) => tile(node, null, "Member"))),
      );
    }),
  );
}
