// The map: points and pictures on a canvas.

// Ten colours can be told apart, each in a light and a dark shade. More classes are shown one at a time.
const palette = [
  ["#2563eb", "#60a5fa"], ["#ea580c", "#fb923c"], ["#15803d", "#4ade80"], ["#dc2626", "#f87171"], ["#7c3aed", "#a78bfa"],
  ["#854d0e", "#d6a45a"], ["#db2777", "#f472b6"], ["#0891b2", "#22d3ee"], ["#737312", "#d9d94a"], ["#475569", "#a8b3c2"],
];

function drawMap() {
  const canvas = byId("canvas");
  const context = canvas.getContext("2d");
  const { nodes, positions } = data.map;
  const points = nodes.map((node, place) => {
    const [x, y] = positions[place];
    return { node, x: x / 10000, y: 1 - y / 10000 };
  });
  const at = new Map(points.map((point) => [point.node, point]));
  const present = [...new Set(nodes.map((node) => labels[node]))].filter((label) => label >= 0);
  present.sort((one, two) => one - two);
  const coloured = present.length <= palette.length;
  const images = new Map();
  const margin = 36;
  const extent = (axis) => {
    const values = points.map((point) => point[axis]);
    return [Math.min(...values, 1), Math.max(...values, 0)];
  };
  const [[west, east], [north, south]] = [extent("x"), extent("y")];
  const centre = { x: (west + east) / 2, y: (north + south) / 2 };
  let middle = centre;
  let width = 0;
  let height = 0;
  let zoom = 1; // 1: all of it
  let chosen = null; // the point with the focus or under the pointer
  let ringed = null; // the node that the page came here from
  let only = null; // the class that is shown
  let waiting = false;

  // All of it fits; both directions have the same scale, as distances mean the same in both.
  const scale = () => {
    const [wide, high] = [east - west, south - north].map((length) => Math.max(0.02, length));
    return Math.max(1, Math.min((width - 2 * margin) / wide, (height - 2 * margin) / high)) * zoom;
  };
  const toX = (point) => width / 2 + (point.x - middle.x) * scale();
  const toY = (point) => height / 2 + (point.y - middle.y) * scale();
  const colour = (label) => {
    if (label < 0 || (!coloured && label !== only)) return isDark() ? "#8b8f94" : "#8a857e";
    return coloured ? palette[present.indexOf(label)][isDark() ? 1 : 0] : isDark() ? "#2dd4bf" : "#0f766e";
  };

  function later() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      draw();
    });
  }

  // Pictures appear where none covers another, the same ones while the map is moved. Closer in there is room for
  // more of them, until every point is its picture. `near`: of zooms that show the same ones.
  let kept = { key: "", found: new Set() };
  function pictured(size, near) {
    const cell = (size + 6) / ((scale() / zoom) * near);
    const key = [cell, only].join(" ");
    if (kept.key === key) return kept.found;
    const taken = new Map();
    const around = [-1, 0, 1];
    const free = (x, y) =>
      around.every((column) =>
        around.every((row) => {
          const other = taken.get(`${Math.floor(x / cell) + column} ${Math.floor(y / cell) + row}`);
          return !other || Math.abs(other[0] - x) >= cell || Math.abs(other[1] - y) >= cell;
        }),
      );
    const found = new Set();
    for (const point of points) {
      const [x, y] = [point.x, point.y];
      if ((only !== null && labels[point.node] !== only) || !free(x, y)) continue;
      taken.set(`${Math.floor(x / cell)} ${Math.floor(y / cell)}`, [x, y]);
      found.add(point);
    }
    kept = { key, found };
    return found;
  }

  function draw() {
    const ratio = devicePixelRatio || 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const near = 2 ** (Math.floor(2 * Math.log2(zoom) + 1e-9) / 2);
    const area = Math.max(0.02, east - west) * Math.max(0.02, south - north);
    const spacing = (near / zoom) * scale() * Math.sqrt(area / Math.max(1, points.length));
    const size = Math.min(side(64), Math.max(24, spacing * 0.9));
    const withPictures = zoom > 1.3 || spacing > 30;
    const shown = withPictures ? pictured(size, near) : new Set();
    const inside = (x, y) => x > -size && y > -size && x < width + size && y < height + size;
    const radius = Math.max(2.2, Math.min(5, spacing * 0.16));
    context.globalAlpha = 0.9;
    for (const dim of [true, false]) {
      for (const point of points) {
        const label = labels[point.node];
        if ((only !== null && label !== only) !== dim || shown.has(point)) continue;
        const x = toX(point);
        const y = toY(point);
        if (!inside(x, y)) continue;
        context.globalAlpha = dim ? 0.16 : 0.88;
        context.fillStyle = colour(label);
        context.beginPath();
        context.arc(x, y, radius, 0, 7);
        context.fill();
      }
    }
    context.globalAlpha = 1;
    for (const point of shown) if (inside(toX(point), toY(point))) thumbnail(point, size);
    const hub = chosen ?? at.get(ringed);
    if (hub) links(hub, size, withPictures);
    canvas.dataset.pictures = shown.size;
    canvas.dataset.zoom = zoom.toFixed(2);
    canvas.dataset.node = chosen ? chosen.node : "";
  }

  function thumbnail(point, size) {
    const x = Math.round(toX(point) - size / 2);
    const y = Math.round(toY(point) - size / 2);
    const image = loaded(point.node);
    const edge = present.length ? 2 : 0;
    context.fillStyle = colour(labels[point.node]);
    context.fillRect(x - edge, y - edge, size + 2 * edge, size + 2 * edge);
    if (!image) return;
    context.imageSmoothingEnabled = !pictures.small || size < pictures.side;
    context.drawImage(image, x, y, size, size);
  }

  function loaded(node) {
    let image = images.get(node);
    if (!image) {
      image = new Image();
      image.src = source(node);
      images.set(node, image);
      image.decode().then(later, () => {});
    }
    return image.complete && image.naturalWidth ? image : null;
  }

  function links(hub, size, withPictures) {
    const ink = getComputedStyle(canvas).color;
    context.strokeStyle = ink;
    context.lineWidth = 1;
    context.globalAlpha = 0.55;
    context.beginPath();
    for (const node of neighbors[hub.node]) {
      const other = at.get(node);
      if (!other) continue;
      context.moveTo(toX(hub), toY(hub));
      context.lineTo(toX(other), toY(other));
    }
    context.stroke();
    context.globalAlpha = 1;
    for (const node of [...neighbors[hub.node]].reverse()) {
      if (at.has(node)) thumbnail(at.get(node), withPictures ? size : side(32));
    }
    if (withPictures) thumbnail(hub, size);
    context.lineWidth = 2.5;
    context.beginPath();
    if (withPictures) context.rect(toX(hub) - size / 2 - 3, toY(hub) - size / 2 - 3, size + 6, size + 6);
    else context.arc(toX(hub), toY(hub), 8, 0, 7);
    context.stroke();
  }

  function choose(point, spoken) {
    if (point === chosen) return;
    chosen = point;
    const box = byId("map-card");
    canvas.classList.toggle("over", point !== null);
    box.hidden = point === null;
    if (point) {
      const near = neighbors[point.node].filter((node) => at.has(node)).length;
      box.replaceChildren(
        picture(point.node),
        el("b", null, name(title(point.node))),
        span(name(brief(point.node))),
        span(score(point.node) || plural(near, "neighbour")),
      );
      const x = toX(point);
      const y = toY(point);
      const high = box.offsetHeight;
      box.style.left = `${Math.max(8, Math.min(width - 160, x + (x + 190 > width ? -176 : 24)))}px`;
      box.style.top = `${Math.max(8, Math.min(height - high - 8, y - high / 2))}px`;
      if (spoken) say(`${title(point.node)}, ${called(point.node)}. ${score(point.node)}`);
    }
    later();
  }

  function nearest(x, y, reach) {
    let best = null;
    let least = reach * reach;
    for (const point of points) {
      if (only !== null && labels[point.node] !== only) continue;
      const distance = (toX(point) - x) ** 2 + (toY(point) - y) ** 2;
      if (distance < least) [best, least] = [point, distance];
    }
    return best;
  }

  // Zoom by a factor, so that the place under (x, y) stays where it is.
  function magnify(factor, x = width / 2, y = height / 2) {
    const next = Math.max(0.8, Math.min(60, zoom * factor));
    const place = { x: middle.x + (x - width / 2) / scale(), y: middle.y + (y - height / 2) / scale() };
    zoom = next;
    middle = { x: place.x - (x - width / 2) / scale(), y: place.y - (y - height / 2) / scale() };
    clamp();
    choose(null);
    later();
  }

  function clamp() {
    const within = (value, low, high) => Math.max(low, Math.min(high, value));
    middle = { x: within(middle.x, west, east), y: within(middle.y, north, south) };
  }

  function all() {
    zoom = 1;
    middle = centre;
    choose(null);
    later();
  }

  const spot = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const pointers = new Map();
  let moved = 0;
  canvas.addEventListener("pointerdown", (event) => {
    pointers.set(event.pointerId, spot(event));
    canvas.setPointerCapture(event.pointerId);
    if (pointers.size === 1) moved = 0;
  });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = spot(event);
    const before = pointers.get(event.pointerId);
    if (!before) return choose(nearest(x, y, 18));
    const others = [...pointers].filter(([id]) => id !== event.pointerId).map(([, where]) => where);
    moved += Math.hypot(x - before[0], y - before[1]);
    if (others.length) {
      const [ox, oy] = others[0];
      const apart = Math.hypot(before[0] - ox, before[1] - oy);
      if (apart > 1) magnify(Math.hypot(x - ox, y - oy) / apart, (x + ox) / 2, (y + oy) / 2);
    } else if (moved > 4) {
      canvas.classList.add("dragging");
      choose(null);
      middle = { x: middle.x - (x - before[0]) / scale(), y: middle.y - (y - before[1]) / scale() };
      clamp();
      later();
    }
    pointers.set(event.pointerId, [x, y]);
  });
  const released = (event) => {
    if (!pointers.delete(event.pointerId)) return;
    canvas.classList.remove("dragging");
    if (event.type === "pointerup" && pointers.size === 0 && moved <= 4) {
      const point = nearest(...spot(event), event.pointerType === "touch" ? 28 : 18);
      if (point && event.button === 0) follow(point.node);
    }
  };
  canvas.addEventListener("pointerup", released);
  canvas.addEventListener("pointercancel", released);
  canvas.addEventListener("pointerleave", () => pointers.size || choose(null));
  canvas.addEventListener("blur", () => choose(null));
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const lines = event.deltaMode === 1 ? 16 : 1;
    magnify(Math.exp(-Math.max(-240, Math.min(240, event.deltaY * lines)) * (event.ctrlKey ? 0.01 : 0.0022)), ...spot(event));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (way) step(way);
    else if (event.key === "+" || event.key === "=") magnify(1.5);
    else if (event.key === "-") magnify(1 / 1.5);
    else if (event.key === "0") all();
    else if (event.key === "Enter" && chosen) follow(chosen.node);
    else if (event.key === "Escape" && chosen) choose(null);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  // The nearest point in a direction, those straight ahead before those aside.
  function step([dx, dy]) {
    const from = chosen ?? at.get(ringed) ?? null;
    if (!from) return choose(nearest(width / 2, height / 2, Infinity), true);
    let best = null;
    let least = Infinity;
    for (const point of points) {
      if (point === from || (only !== null && labels[point.node] !== only)) continue;
      const x = toX(point) - toX(from);
      const y = toY(point) - toY(from);
      const ahead = x * dx + y * dy;
      const aside = Math.abs(x * dy) + Math.abs(y * dx);
      if (ahead <= 0 || aside > ahead * 1.5) continue;
      if (ahead + 2 * aside < least) [best, least] = [point, ahead + 2 * aside];
    }
    if (!best) return;
    if (toX(best) < 20 || toX(best) > width - 20 || toY(best) < 20 || toY(best) > height - 20) {
      middle = { x: best.x, y: best.y };
    }
    choose(best, true);
  }

  function legend() {
    const box = byId("map-legend");
    const named = present.map((label) => [label, classOf(nodes.find((node) => labels[node] === label))]);
    if (!named.length) return;
    if (!coloured) {
      const select = el(
        "select",
        null,
        el("option", { value: "" }, `All ${whole(named.length)} classes`),
        ...named.map(([label, text]) => el("option", { value: label }, text)),
      );
      select.addEventListener("change", () => {
        only = select.value === "" ? null : Number(select.value);
        choose(null);
        later();
      });
      box.append(el("label", null, "Show one class ", select));
      return;
    }
    const chips = named.map(([label, text]) => {
      const dot = el("i");
      const chip = el("button", { type: "button", class: "chip", "aria-pressed": "false", title: text }, dot, name(text));
      chip.recolour = () => (dot.style.background = colour(label));
      chip.addEventListener("click", () => {
        only = only === label ? null : label;
        for (const other of chips) other.setAttribute("aria-pressed", String(other === chip && only !== null));
        choose(null);
        later();
      });
      return chip;
    });
    box.append(...chips);
    mapView.chips = chips;
  }

  byId("zoom-in").addEventListener("click", () => magnify(1.6));
  byId("zoom-out").addEventListener("click", () => magnify(1 / 1.6));
  byId("zoom-fit").addEventListener("click", all);
  mapView = {
    chips: [],
    resize() {
      const box = byId("map-box");
      width = box.clientWidth;
      height = box.clientHeight;
      const ratio = devicePixelRatio || 1;
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      for (const chip of mapView.chips) chip.recolour();
      draw();
    },
    ring(node) {
      ringed = node;
      const point = at.get(node);
      if (!point) return;
      middle = { x: point.x, y: point.y };
      zoom = 4;
      clamp();
      later();
    },
  };
  legend();
}
