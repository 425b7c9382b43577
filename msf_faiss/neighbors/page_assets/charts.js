// Charts, drawn as SVG at the width that they have, and the statistics view.

const plots = []; // [element, draw(element, width)]

function redrawCharts() {
  for (const [element, draw] of plots) {
    const width = Math.round(element.getBoundingClientRect().width);
    if (width && width !== element.drawnWidth) {
      element.drawnWidth = width;
      draw(element, width);
    }
  }
}

// `draw(width)` returns the elements of a plot. Its height is fixed.
function plot(label, height, draw) {
  const element = svg("svg", { class: "plot", role: "img", "aria-label": label, height });
  plots.push([
    element,
    (target, width) => {
      target.setAttribute("viewBox", `0 0 ${width} ${height}`);
      target.replaceChildren(...draw(width).filter(Boolean));
    },
  ]);
  return element;
}

function chart(heading, description, ...content) {
  return el("div", { class: "chart" }, el("h3", null, heading), el("p", null, description), ...content);
}

const plotHeight = 210;
const plotText = (x, y, content, kind) => svg("text", { x, y, class: kind }, content);
const plotLine = (x1, y1, x2, y2, kind) => svg("line", { x1, y1, x2, y2, class: kind });
const plotRect = (kind, x, y, width, height, rx) => svg("rect", { class: kind, x, y, width, height, rx });
const tooltip = (content) => svg("title", null, content);

// At most about `count` round numbers from `low` to `high`, and the step between them.
function roundTicks(low, high, count) {
  const range = high - low || Math.abs(high) || 1;
  const rough = range / Math.max(1, count);
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * unit).find((value) => value >= rough * 0.999);
  const ticks = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-6; value += step) ticks.push(value);
  return [ticks, step];
}

function histogram({ edges, matching, others }, heading, description, isAge) {
  const totals = matching.map((value, bin) => value + others[bin]);
  const total = sum(totals);
  if (!total) return null;
  const bins = totals.length;
  const highest = Math.max(...totals);
  const [low, high] = [edges[0], edges[bins]];
  const range = high - low || 1;
  const digits = isAge ? 0 : Math.min(6, Math.max(2, Math.ceil(-Math.log10(range / bins)) + 1));
  const format = (value) => (isAge ? integer(Math.round(value)) : value.toFixed(digits));
  const binRange = (bin) => `${format(edges[bin])} – ${format(edges[bin + 1])}`;
  const draw = (width) => {
    const base = plotHeight - 24;
    const top = 22;
    const x = (value) => ((value - low) / range) * width;
    const height = (value) => ((base - top) * value) / highest;
    const columns = totals.map((count, bin) => {
      const left = x(edges[bin]);
      const wide = Math.max(1, x(edges[bin + 1]) - left - (bins > width / 4 ? 0 : 1.5));
      const parts = `${integer(matching[bin])} same class, ${integer(others[bin])} other`;
      return svg(
        "g",
        null,
        tooltip(`${binRange(bin)}: ${labelled ? parts : integer(count)}`),
        plotRect("catch", left, top, wide, base - top),
        plotRect("b", left, base - height(count), wide, height(others[bin])),
        plotRect("a", left, base - height(matching[bin]), wide, height(matching[bin])),
      );
    });
    const [fineTicks, step] = roundTicks(low, high, Math.max(2, Math.floor(width / 90)));
    const ticks = fineTicks.filter((value) => !isAge || Math.abs(value - Math.round(value)) < 1e-6);
    const decimals = Math.max(0, Math.min(6, -Math.floor(Math.log10(step) + 1e-9)));
    const tickLabels = ticks.map((value) => {
      const at = x(value);
      const rounded = Math.abs(value) < step / 2 ? 0 : value; // never a negative zero
      const anchor = at < 16 ? "start" : at > width - 20 ? "end" : null;
      return plotText(at, base + 17, isAge ? integer(Math.round(rounded)) : rounded.toFixed(decimals), anchor);
    });
    return [
      plotLine(0, top, width, top, "axis"),
      plotText(width, top - 6, integer(highest), "end"),
      ...columns,
      plotLine(0, base, width, base, "axis"),
      ...tickLabels,
    ];
  };
  const span = `${plural(total, "neighbour")} from ${format(low)} to ${format(high)}`;
  const label = `${heading}: ${span}; tallest bin ${binRange(totals.indexOf(highest))} with ${integer(highest)}`;
  return chart(
    `${heading} of the neighbours`,
    description,
    labelled ? colorKey() : null,
    plot(label, plotHeight, draw),
    dataTable(
      "Numbers",
      [heading, ...(labelled ? ["Same class", "Other"] : ["Neighbours"])],
      totals.map((count, bin) => [binRange(bin), ...(labelled ? [matching[bin], others[bin]] : [count]).map(integer)]),
    ),
  );
}

const colorKey = () =>
  el(
    "ul",
    { class: "swatches" },
    el("li", null, el("span", { class: "swatch a" }), "same class as the query"),
    el("li", null, el("span", { class: "swatch b" }), "different or unknown class"),
  );

function purityByRank() {
  const { purityByRank: values, chance } = data.statistics;
  if (values.every((value) => value === null)) return null;
  const highest = Math.max(chance ?? 0, ...values.map((value) => value ?? 0));
  const limit = [0.25, 0.5, 1].find((value) => highest <= value) ?? 1;
  const format = (value) => (value === null ? "–" : percent(value));
  const draw = (width) => {
    const base = plotHeight - 24;
    const top = 24;
    const step = Math.min(width / values.length, 72);
    const y = (value) => base - ((base - top) * value) / limit;
    const every = Math.ceil(values.length / Math.max(1, Math.floor(width / 26)));
    const roomy = step >= 32;
    const columns = values.map((value, rank) =>
      svg(
        "g",
        null,
        tooltip(`Neighbour ${rank + 1}: ${value === null ? "no labels to compare" : percent(value)}`),
        plotRect("catch", rank * step, top, step, base - top),
        plotRect("a", (rank + 0.12) * step, y(value ?? 0), 0.76 * step, base - y(value ?? 0), Math.min(2, step / 8)),
      ),
    );
    const texts = values.flatMap((value, rank) => [
      roomy && value !== null ? plotText((rank + 0.5) * step, y(value) - 6, percent(value, 0), "value") : null,
      rank % every ? null : plotText((rank + 0.5) * step, base + 17, String(rank + 1)),
    ]);
    return [
      roomy ? null : plotLine(0, top, width, top, "axis"),
      roomy ? null : plotText(width, top - 6, percent(limit, 0), "end"),
      ...columns,
      plotLine(0, base, width, base, "axis"),
      chance === null ? null : plotLine(0, y(chance), step * values.length, y(chance), "chance"),
      ...texts,
    ];
  };
  const byRank = values.map((value, rank) => `${rank + 1}: ${format(value)}`).join(", ");
  const dashes = svg(
    "svg",
    { width: 26, height: 8, "aria-hidden": "true" },
    svg("line", { class: "swatch dashes", x1: 0, x2: 26, y1: 4, y2: 4 }),
  );
  return chart(
    "Purity by rank",
    "Share of the 1st, 2nd, … neighbours with the same class as their query.",
    chance === null ? null : el("ul", { class: "swatches" }, el("li", null, dashes, `chance: ${percent(chance)}`)),
    plot(`Purity by rank: ${byRank}${chance === null ? "" : `; chance: ${percent(chance)}`}`, plotHeight, draw),
    dataTable("Numbers", ["Rank", "Purity"], values.map((value, rank) => [String(rank + 1), format(value)])),
  );
}

// A line through `points`: { x, value, label, interval } with null for a missing value; `interval`: an error band, or
// undefined. `name`: what the labels count.
function lineChart(heading, description, points, name, { isPercent, height = plotHeight }) {
  const format = (value) => (isPercent ? percent(value) : cosine(value));
  const formatTick = (value, step) => {
    const digits = Math.max(0, Math.ceil(-Math.log10(isPercent ? 100 * step : step) - 1e-9));
    return isPercent ? percent(value, digits) : value.toFixed(Math.max(2, digits));
  };
  const describe = ({ value, interval }) =>
    format(value) + (interval ? `, 95% interval ${intervalText(interval)}` : "");
  const known = points.filter((point) => point.value !== null);
  if (!known.length) return null;
  const values = known.flatMap((point) => [point.value, ...(point.interval ?? [])]);
  const [lowest, highest] = [Math.min(...values), Math.max(...values)];
  const padding = (highest - lowest) * 0.15 || Math.abs(lowest) * 0.05 || 0.05;
  const [low, high] = [lowest - padding, highest + padding];
  const draw = (width) => {
    const base = height - 24;
    const top = 14;
    const [first, last] = [points[0].x, points.at(-1).x];
    const x = (point) => 46 + ((width - 76) * (point.x - first)) / (last - first || 1);
    const y = (value) => base - ((base - top) * (value - low)) / (high - low);
    const [ticks, step] = roundTicks(low, high, 4);
    const every = Math.ceil((points.length * 64) / width);
    const path = known.map((point, place) => `${place ? "L" : "M"}${x(point)} ${y(point.value)}`).join("");
    return [
      ...ticks.flatMap((value) => [
        plotLine(46, y(value), width, y(value), "axis"),
        plotText(38, y(value) + 4, formatTick(value, step), "end"),
      ]),
      svg("path", { class: "curve", d: path }),
      ...known.map((point) => {
        const dot = svg("circle", { class: "dot", cx: x(point), cy: y(point.value), r: 4.5 });
        const band = point.interval?.map(y);
        const whisker = band && plotLine(x(point), band[0], x(point), band[1], "whisker");
        return svg("g", null, tooltip(`${name} ${point.label}: ${describe(point)}`), whisker, dot);
      }),
      ...points.map((point, place) =>
        place % every && place !== points.length - 1 ? null : plotText(x(point), base + 17, point.label),
      ),
    ];
  };
  const spoken = known.map((point) => `${name} ${point.label}: ${describe(point)}`).join(", ");
  const banded = known.some((point) => point.interval);
  const rows = known.map((point) => [
    point.label,
    format(point.value),
    ...(banded ? [intervalText(point.interval)] : []),
  ]);
  return chart(
    heading,
    description,
    plot(`${heading}: ${spoken}`, height, draw),
    dataTable("Numbers", [name, heading.split(" ")[0], ...(banded ? ["95% interval"] : [])], rows),
  );
}

// ---------------------------------------------------------------- Statistics

function buildStatistics() {
  const { similarity, age, hubs } = data.statistics;
  const charts = [
    purityByRank(),
    similarityByRank(),
    purityByClass(),
    confusionMatrix(),
    histogram(similarity, "Similarity", "Cosine similarity between a neighbour and its query.", false),
    age && histogram(age, "Age", "Entries pushed into the bank after the neighbour.", true),
    hubs.length ? hubGallery(hubs) : null,
  ].filter(Boolean);
  const empty = el("p", { class: "empty" }, "No image has a neighbour, so there are no statistics.");
  byId("charts").append(...(charts.length ? charts : [empty]));
}

function similarityByRank() {
  const points = data.statistics.similarityByRank.map((value, rank) => ({ x: rank, value, label: String(rank + 1) }));
  const description = "Mean cosine similarity between a query and its 1st, 2nd, … neighbour.";
  return lineChart("Similarity by rank", description, points, "Rank", { isPercent: false });
}

function purityByClass() {
  const rows = data.statistics.purityByClass;
  if (!rows.length) return null;
  const first = 10;
  const options = [...byId("by-class").options].map((option) => option.value).filter(Boolean);
  const labelOf = new Map(options.map((value) => [classes?.[Number(value)], value])); // of classes among the queries
  const list = el("ol", { class: "classes" });
  const show = (count) =>
    list.replaceChildren(
      ...rows.slice(0, count).map(([className, purity, images, ...interval]) => {
        const cells = [
          el("b", { title: className }, isolate(className)),
          bar(purity, interval),
          el("span", { title: `95% interval: ${intervalText(interval)}` }, percent(purity)),
          el("small", null, plural(images, "image")),
        ];
        const label = labelOf.get(className);
        if (label === undefined) return el("li", null, el("div", null, ...cells));
        const attributes = { href: "#explore", "data-class": label, title: "Show the queries of this class" };
        return el("li", null, el("a", attributes, ...cells));
      }),
    );
  const foldable = rows.length > first + 2;
  show(foldable ? first : rows.length);
  const all = el("button", { type: "button", class: "button" }, `All ${integer(rows.length)} classes`);
  all.addEventListener("click", () => {
    show(rows.length);
    all.remove();
  });
  const description = "Lowest purity first. Thin lines: 95% intervals, wide where few images were asked.";
  return chart("Purity by class", description, list, foldable ? all : null);
}

function hubGallery(hubs) {
  const items = hubs.map(([node, retrieved, share]) =>
    tile(
      node,
      null,
      `Retrieved by ${plural(retrieved, "image")}`,
      el("b", null, `${integer(retrieved)} ×`),
      span(isolate(title(node))),
      share === null ? null : span(`${percent(share, 0)} same class`),
    ),
  );
  const gallery = chart(
    "Hubs",
    `The images retrieved most often${labelled ? ", with the share of queries that have the same class" : ""}. ` +
      `${percent(data.statistics.never)} of the searched images are never retrieved.`,
    tileList({ class: "hubs" }, items),
  );
  gallery.classList.add("wide");
  gallery.dataset.area = "";
  return gallery;
}
