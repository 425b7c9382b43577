// The colours of the map: by class or cluster, in groups; by purity or age, on a scale.

// Twenty colours that can be told apart, in a light and in a dark shade. More groups also differ by the shape of their
// points; more than twenty times the shapes share both.
const palette = [
  ["#2563eb", "#60a5fa"], ["#ea580c", "#fb923c"], ["#15803d", "#4ade80"], ["#7c3aed", "#a78bfa"],
  ["#db2777", "#f472b6"], ["#0891b2", "#22d3ee"], ["#541818", "#6c8454"], ["#002478", "#fcd8fc"],
  ["#f000fc", "#d800fc"], ["#c090e4", "#fcf000"], ["#b4a800", "#fc0018"], ["#785478", "#b4fcd8"],
  ["#003c00", "#00a800"], ["#600084", "#b46c6c"], ["#906000", "#a8b490"], ["#00c000", "#3084a8"],
  ["#a80000", "#00fc00"], ["#b49084", "#c0c000"], ["#a80ca8", "#f000b4"], ["#0000d8", "#b454c0"],
];
const shapes = ["circle", "square", "triangle", "diamond"];
const noColor = ["#8a857e", "#8b8f94"];
// From low to high, each further from the background than the one before.
const ramps = [
  [[240, 160, 40], [219, 39, 119], [60, 20, 130]],
  [[124, 58, 237], [244, 114, 182], [253, 230, 138]],
];

const themed = ([light, dark]) => (isDark() ? dark : light);

function rampColor(fraction) {
  const ramp = themed(ramps);
  const place = Math.max(0, Math.min(1, fraction)) * (ramp.length - 1);
  const below = Math.min(ramp.length - 2, Math.floor(place));
  const mixed = ramp[below].map((part, channel) => part + (place - below) * (ramp[below + 1][channel] - part));
  return `rgb(${mixed.map(Math.round).join(" ")})`;
}

// Ways to colour the nodes of the map. Each has { key, title, groupOf(node), colorOf(node), shapeOf(node) }; groups
// have { groups: [{ group, name }] }, scales have { low, high, format } and no groups.
function mapColorings(nodes) {
  const colorings = [];
  const byGroup = (key, title, groupOf, nameOf) => {
    const groups = [...new Set(nodes.map(groupOf))].filter((group) => group >= 0).sort((one, two) => one - two);
    const place = new Map(groups.map((group, index) => [group, index]));
    const placeOf = (node) => place.get(groupOf(node));
    colorings.push({
      key,
      title,
      groupOf,
      groups: groups.map((group) => ({ group, name: nameOf(group) })),
      colorOf: (node) => themed(placeOf(node) === undefined ? noColor : palette[placeOf(node) % palette.length]),
      shapeOf: (node) => shapes[Math.floor((placeOf(node) ?? 0) / palette.length) % shapes.length],
    });
  };
  const byValue = (key, title, valueOf, range, format) => {
    const values = nodes.map(valueOf).filter((value) => value !== null);
    if (!values.length) return;
    const [low, high] = range ?? [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
    const colorOf = (node) =>
      valueOf(node) === null ? themed(noColor) : rampColor((valueOf(node) - low) / (high - low || 1));
    colorings.push({ key, title, groupOf: () => -1, groups: [], low, high, format, colorOf, shapeOf: () => "circle" });
  };
  if (nodes.some((node) => labels[node] >= 0)) {
    const nameOf = (label) => classOf(nodes.find((node) => labels[node] === label));
    byGroup("class", "class", (node) => labels[node], nameOf);
  }
  if (data.clusters.length) byGroup("cluster", "cluster", (node) => data.clusterOf[node], clusterLabel);
  byValue("purity", "purity", purityOf, [0, 1], (value) => percent(value, 0));
  if (ages) {
    const meanAge = (node) => (ages[node].length ? sum(ages[node]) / ages[node].length : null);
    byValue("age", "age of neighbours", meanAge, null, (value) => integer(Math.round(value)));
  }
  const plain = { key: "none", title: "nothing", groupOf: () => -1, groups: [], shapeOf: () => "circle" };
  return colorings.length ? colorings : [{ ...plain, colorOf: () => themed(noColor) }];
}

// Chips that show one group each, or a list to choose from where there are too many, or a scale. `showOnly(group)` is
// called with the chosen group, or null for all.
function buildLegend(coloring, showOnly) {
  const { groups } = coloring;
  const legend = { elements: [], recolor() {}, press() {} };
  if (!groups.length && coloring.format) {
    const bar = el("div", { class: "ramp", "aria-hidden": "true" });
    legend.recolor = () => {
      const stops = themed(ramps).map((color) => `rgb(${color.join(" ")})`);
      bar.style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
    };
    const ends = [span(coloring.format(coloring.low)), bar, span(coloring.format(coloring.high))];
    legend.elements = [el("div", { class: "scale" }, ...ends)];
  } else if (groups.length > palette.length * 2) {
    const options = groups.map(({ group, name }) => el("option", { value: group }, name));
    const all = el("option", { value: "" }, `All ${integer(groups.length)}`);
    const select = el("select", null, all, ...options);
    select.addEventListener("change", () => showOnly(select.value === "" ? null : Number(select.value)));
    legend.press = (group) => (select.value = group ?? "");
    legend.elements = [el("label", null, "Show only ", select)];
  } else {
    legend.elements = groups.map(({ group, name }) => {
      const dot = el("i");
      const chip = el("button", { type: "button", class: "chip", title: name }, dot, isolate(name));
      chip.group = group;
      chip.dot = dot;
      chip.addEventListener("click", () => showOnly(chip.getAttribute("aria-pressed") === "true" ? null : group));
      return chip;
    });
    legend.recolor = () => {
      for (const { dot, group } of legend.elements) {
        const place = groups.findIndex((other) => other.group === group);
        dot.style.background = themed(palette[place % palette.length]);
        dot.dataset.shape = shapes[Math.floor(place / palette.length) % shapes.length];
      }
    };
    legend.press = (group) => {
      for (const chip of legend.elements) chip.setAttribute("aria-pressed", String(chip.group === group));
    };
  }
  legend.recolor();
  legend.press(null);
  return legend;
}

// A point of one of the shapes, about `radius` around (x, y), as the path of a canvas.
function tracePoint(context, shape, x, y, radius) {
  context.beginPath();
  if (shape === "circle") return context.arc(x, y, radius, 0, 7);
  const around = { square: [45, 4, 1.25], triangle: [90, 3, 1.35], diamond: [0, 4, 1.35] }[shape];
  const [turn, corners, reach] = around;
  for (let corner = 0; corner < corners; corner += 1) {
    const angle = ((turn + (360 * corner) / corners) * Math.PI) / 180;
    context.lineTo(x + reach * radius * Math.cos(angle), y - reach * radius * Math.sin(angle));
  }
  return context.closePath();
}
