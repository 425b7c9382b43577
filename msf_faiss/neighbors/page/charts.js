// Charts, drawn as SVG at the width they have.

const plots = []; // functions that draw a chart at the width it now has

function redraw() {
  for (const [element, draw] of plots) {
    const width = Math.round(element.getBoundingClientRect().width);
    if (width && width !== element.drawn) {
      element.drawn = width;
      draw(element, width);
    }
  }
  if (entry.view === "map") mapView?.resize();
}

function plot(label, height, draw) {
  const element = svg("svg", { class: "plot", role: "img", "aria-label": label, height });
  plots.push([
    element,
    (target, width) => {
      target.setAttribute("viewBox", `0 0 ${width} ${height}`);
      target.replaceChildren(...draw(width, height).filter(Boolean));
    },
  ]);
  return element;
}

const text = (x, y, content, kind) => svg("text", { x, y, class: kind }, content);
const line = (x1, y1, x2, y2, kind) => svg("line", { x1, y1, x2, y2, class: kind });
const tip = (content) => svg("title", null, content);

function steps(low, high, most) {
  const span = high - low || Math.abs(high) || 1;
  const rough = span / Math.max(1, most);
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * unit).find((value) => value >= rough * 0.999);
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-6; value += step) found.push(value);
  return [found, step];
}

function histogram({ edges, matching, others }, heading, explained, ageing) {
  const bins = matching.length;
  const totals = matching.map((value, bin) => value + others[bin]);
  const most = Math.max(...totals);
  const all = totals.reduce((sum, value) => sum + value, 0);
  if (!all) return null;
  const low = edges[0];
  const high = edges[bins];
  const digits = ageing ? 0 : Math.min(6, Math.max(2, Math.ceil(-Math.log10((high - low || 1) / Math.max(1, bins))) + 1));
  const format = (value) => (ageing ? whole(Math.round(value)) : value.toFixed(digits));
  const range = (bin) => `${format(edges[bin])} – ${format(edges[bin + 1])}`;
  const peak = totals.indexOf(most);
  const ends = `between ${format(low)} and ${format(high)}`;
  const label = `${heading}, ${plural(all, "neighbour")} ${ends}; most, ${whole(most)}, at ${range(peak)}`;
  const draw = (width, height) => {
    const base = height - 24;
    const top = 22;
    const x = (value) => ((value - low) / (high - low || 1)) * width;
    const tall = (value) => ((base - top) * value) / most;
    const columns = totals.map((total, bin) => {
      const at = x(edges[bin]);
      const wide = Math.max(1, x(edges[bin + 1]) - at - (bins > width / 4 ? 0 : 1.5));
      const parts = `${whole(matching[bin])} of the query’s class, ${whole(others[bin])} others`;
      const words = `${range(bin)}: ${labelled ? parts : whole(total)}`;
      return svg(
        "g",
        null,
        tip(words),
        svg("rect", { class: "catch", x: at, y: top, width: wide, height: base - top }),
        svg("rect", { class: "b", x: at, y: base - tall(total), width: wide, height: tall(others[bin]) }),
        svg("rect", { class: "a", x: at, y: base - tall(matching[bin]), width: wide, height: tall(matching[bin]) }),
      );
    });
    const [fine, step] = steps(low, high, Math.max(2, Math.floor(width / 90)));
    const ticks = fine.filter((value) => !ageing || Math.abs(value - Math.round(value)) < 1e-6);
    const places = Math.max(0, Math.min(6, -Math.floor(Math.log10(step) + 1e-9)));
    const labels = ticks.map((value) => {
      const at = x(value);
      const round = Math.abs(value) < step / 2 ? 0 : value; // never a negative zero
      const anchor = at < 16 ? "start" : at > width - 20 ? "end" : null;
      return text(at, base + 17, ageing ? whole(Math.round(round)) : round.toFixed(places), anchor);
    });
    return [
      line(0, top, width, top, "axis"),
      text(width, top - 6, whole(most), "end"),
      ...columns,
      line(0, base, width, base, "axis"),
      ...labels,
    ];
  };
  return chart(
    `${heading} of the neighbours`,
    explained,
    labelled ? swatches() : null,
    plot(label, 210, draw),
    details(
      "Numbers",
      [ageing ? "Age" : "Similarity", ...(labelled ? ["The query’s class", "Others"] : ["Neighbours"])],
      totals.map((total, bin) => [range(bin), ...(labelled ? [matching[bin], others[bin]] : [total]).map(whole)]),
    ),
  );
}

const swatches = () =>
  el(
    "ul",
    { class: "swatches" },
    el("li", null, el("span", { class: "swatch a" }), "the query’s class"),
    el("li", null, el("span", { class: "swatch b" }), "another class, or none known"),
  );

function chart(heading, explained, ...content) {
  return el("div", { class: "chart" }, el("h3", null, heading), explained ? el("p", null, explained) : null, ...content);
}

function purityByRank() {
  const { purityByRank: values, chance } = data.statistics;
  if (values.every((value) => value === null)) return null;
  const highest = Math.max(chance ?? 0, ...values.map((value) => value ?? 0));
  const limit = [0.25, 0.5, 1].find((value) => highest <= value) ?? 1;
  const spoken = values.map((value, rank) => `${rank + 1}: ${value === null ? "–" : percent(value)}`).join(", ");
  const draw = (width, height) => {
    const base = height - 24;
    const top = 24;
    const step = Math.min(width / Math.max(1, values.length), 72);
    const y = (value) => base - ((base - top) * value) / limit;
    const every = Math.ceil(values.length / Math.max(1, Math.floor(width / 26)));
    const roomy = step >= 32;
    const columns = values.map((value, rank) =>
      svg(
        "g",
        null,
        tip(`Neighbour ${rank + 1}: ${value === null ? "nothing to compare" : percent(value)}`),
        svg("rect", { class: "catch", x: rank * step, y: top, width: step, height: base - top }),
        svg("rect", {
          class: "a",
          x: (rank + 0.12) * step,
          y: y(value ?? 0),
          width: 0.76 * step,
          height: base - y(value ?? 0),
          rx: Math.min(2, step / 8),
        }),
      ),
    );
    const texts = values.flatMap((value, rank) => [
      roomy && value !== null ? text((rank + 0.5) * step, y(value) - 6, percent(value, 0), "value") : null,
      rank % every ? null : text((rank + 0.5) * step, base + 17, String(rank + 1)),
    ]);
    const wide = step * values.length;
    return [
      roomy ? null : line(0, top, width, top, "axis"),
      roomy ? null : text(width, top - 6, percent(limit, 0), "end"),
      ...columns,
      line(0, base, width, base, "axis"),
      chance === null ? null : line(0, y(chance), wide, y(chance), "chance"),
      ...texts,
    ];
  };
  const dash = svg("line", { class: "swatch dashes", x1: 0, x2: 26, y1: 4, y2: 4 });
  const dashes = svg("svg", { width: 26, height: 8, "aria-hidden": "true" }, dash);
  return chart(
    "Purity by rank",
    "How many of the first, second, … neighbours have their query’s class.",
    chance === null ? null : el("ul", { class: "swatches" }, el("li", null, dashes, `chance, ${percent(chance)}`)),
    plot(`Purity by rank: ${spoken}${chance === null ? "" : `; chance ${percent(chance)}`}`, 210, draw),
    details(
      "Numbers",
      ["Rank", "Purity"],
      values.map((value, rank) => [String(rank + 1), value === null ? "–" : percent(value)]),
    ),
  );
}

function curve(heading, explained, points, percents, columns, height = 210) {
  const format = percents ? (value) => percent(value) : cosine;
  const finely = (value, step) => {
    const digits = Math.max(0, Math.ceil(-Math.log10(percents ? 100 * step : step) - 1e-9));
    return percents ? percent(value, digits) : value.toFixed(Math.max(2, digits));
  };
  const known = points.filter((point) => point.value !== null);
  if (!known.length) return null;
  const values = known.map((point) => point.value);
  const pad = (Math.max(...values) - Math.min(...values)) * 0.15 || Math.abs(values[0]) * 0.05 || 0.05;
  const low = Math.min(...values) - pad;
  const high = Math.max(...values) + pad;
  const draw = (width, height) => {
    const base = height - 24;
    const top = 14;
    const first = points[0].at;
    const last = points.at(-1).at;
    const x = (at) => 46 + ((width - 76) * (at - first)) / (last - first || 1);
    const y = (value) => base - ((base - top) * (value - low)) / (high - low);
    const [ticks, step] = steps(low, high, 4);
    const every = Math.ceil((points.length * 64) / width);
    return [
      ...ticks.flatMap((value) => [
        line(46, y(value), width, y(value), "axis"),
        text(38, y(value) + 4, finely(value, step), "end"),
      ]),
      svg("path", {
        class: "curve",
        d: known.map((point, place) => `${place ? "L" : "M"}${x(point.at)} ${y(point.value)}`).join(""),
      }),
      ...known.map((point) => {
        const dot = svg("circle", { class: "dot", cx: x(point.at), cy: y(point.value), r: 4.5 });
        return svg("g", null, tip(`${point.name}: ${format(point.value)}`), dot);
      }),
      ...points.map((point, place) =>
        place % every && place !== points.length - 1 ? null : text(x(point.at), base + 17, point.label),
      ),
    ];
  };
  return chart(
    heading,
    explained,
    plot(`${heading}: ${known.map((point) => `${point.name}: ${format(point.value)}`).join(", ")}`, height, draw),
    details("Numbers", columns, known.map((point) => [point.label, format(point.value)])),
  );
}

// ---------------------------------------------------------------- Statistics

function statistics() {
  const found = data.statistics;
  const parts = [purityByRank(), similarityByRank()];
  if (found.purityByClass.length) parts.push(purityByClass(found.purityByClass));
  parts.push(histogram(found.similarity, "Similarity", "By the cosine with their query.", false));
  if (found.age) parts.push(histogram(found.age, "Age", "By the entries pushed into the bank since.", true));
  if (found.hubs.length) parts.push(hubs(found.hubs));
  const drawn = parts.filter(Boolean);
  const empty = el("p", { class: "none" }, "No image has a neighbour: there is nothing to count.");
  byId("charts").append(...(drawn.length ? drawn : [empty]));
}

function similarityByRank() {
  const points = data.statistics.similarityByRank.map((value, rank) => {
    return { at: rank, value, label: String(rank + 1), name: `Neighbour ${rank + 1}` };
  });
  const explained = "Mean cosine of query and first, second, … neighbour.";
  return curve("Similarity by rank", explained, points, false, ["Rank", "Similarity"]);
}

function purityByClass(rows) {
  const first = 10;
  const options = [...byId("by-class").options].map((option) => option.value).filter(Boolean);
  const asked = new Map(options.map((value) => [classes?.[Number(value)], value]));
  const list = el("ol", { class: "classes" });
  const fill = (many) =>
    list.replaceChildren(
      ...rows.slice(0, many).map(([label, purity, images]) => {
        const bar = el("i");
        bar.style.width = percent(purity);
        const cells = [
          el("b", { title: label }, name(label)),
          el("div", { class: "meter" }, bar),
          span(percent(purity)),
          el("small", null, plural(images, "image")),
        ];
        if (!asked.has(label)) return el("li", null, el("div", null, ...cells));
        const properties = { href: "#explore", "data-class": asked.get(label), title: "See the queries of this class" };
        return el("li", null, el("a", properties, ...cells));
      }),
    );
  fill(rows.length <= first + 2 ? rows.length : first);
  const found = chart("Purity by class", "The worst first.", list);
  if (rows.length > first + 2) {
    const button = el("button", { type: "button", class: "button" }, `All ${whole(rows.length)} classes`);
    button.addEventListener("click", () => {
      fill(rows.length);
      button.remove();
    });
    found.append(button);
  }
  return found;
}

function hubs(rows) {
  const items = rows.map(([node, retrieved, share]) =>
    tile(
      node,
      null,
      `Retrieved by ${plural(retrieved, "image")}`,
      el("b", null, `${whole(retrieved)} ×`),
      span(name(title(node))),
      share === null ? null : span(`${percent(share, 0)} its class`),
    ),
  );
  const found = chart(
    "Hubs",
    `The images that most others retrieve${labelled ? ", and how many of those have their class" : ""}. ` +
      `${percent(data.statistics.never)} of the images that were searched are never retrieved.`,
    tiles({ class: "hubs" }, items),
  );
  found.classList.add("wide");
  found.dataset.area = "";
  return found;
}
