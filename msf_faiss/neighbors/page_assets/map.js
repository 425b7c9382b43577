// The map: points and pictures on a canvas.

let imageMap = null; // { resize, focus, showGroup }, once the map has been built

// The visible part of the map. Both axes have one scale, since distances mean the same in both.
class Camera {
  constructor(points) {
    const range = (values) => [Math.min(...values, 1), Math.max(...values, 0)];
    [this.west, this.east] = range(points.map((point) => point.x));
    [this.north, this.south] = range(points.map((point) => point.y));
    this.across = Math.max(0.02, this.east - this.west);
    this.down = Math.max(0.02, this.south - this.north);
    this.width = this.height = 0; // of the canvas, in CSS pixels
    this.fit();
  }

  fit() {
    this.zoom = 1;
    this.moveTo((this.west + this.east) / 2, (this.north + this.south) / 2);
  }

  // CSS pixels of one unit.
  get scale() {
    const margin = 72;
    return Math.max(1, Math.min((this.width - margin) / this.across, (this.height - margin) / this.down)) * this.zoom;
  }

  toPixels(point) {
    const { scale } = this;
    return [this.width / 2 + (point.x - this.x) * scale, this.height / 2 + (point.y - this.y) * scale];
  }

  moveTo(x, y) {
    this.x = Math.max(this.west, Math.min(this.east, x));
    this.y = Math.max(this.north, Math.min(this.south, y));
  }

  // The point at pixel (x, y) stays there.
  zoomBy(factor, x = this.width / 2, y = this.height / 2) {
    const before = this.scale;
    this.zoom = Math.max(0.8, Math.min(60, this.zoom * factor));
    const change = 1 / before - 1 / this.scale;
    this.moveTo(this.x + (x - this.width / 2) * change, this.y + (y - this.height / 2) * change);
  }
}

function buildMap() {
  const canvas = byId("canvas");
  const context = canvas.getContext("2d");
  const points = data.map.nodes.map((node, place) => {
    const [x, y] = data.map.positions[place];
    return { node, x: x / 10000, y: 1 - y / 10000 };
  });
  const pointOf = new Map(points.map((point) => [point.node, point]));
  const colorings = mapColorings(data.map.nodes);
  const camera = new Camera(points);
  const images = new Map(); // by node
  let hovered = null; // the point under the pointer, or with the keyboard's focus
  let ringed = null; // the point that "Show on the map" asked for
  let coloring = colorings[0];
  let legend = null;
  let onlyGroup = null; // the one class or cluster that is shown
  let lasso = null; // [x, y] in pixels, while one is drawn
  let frameRequested = false;

  const isShown = (point) => onlyGroup === null || coloring.groupOf(point.node) === onlyGroup;

  // -------------------------------------------------------------- Drawing

  function redraw() {
    if (frameRequested) return;
    frameRequested = true;
    requestAnimationFrame(() => {
      frameRequested = false;
      draw();
    });
  }

  // Points that are drawn as pictures: as many as fit without overlap, chosen in a fixed order, so that panning does
  // not change them. They change only when `zoomLevel`, the zoom rounded down, does.
  let thumbnails = { key: "", points: new Set() };
  function choosePictured(size, zoomLevel) {
    const cell = (size + 6) / ((camera.scale / camera.zoom) * zoomLevel);
    const key = [cell, coloring.key, onlyGroup].join(" ");
    if (thumbnails.key === key) return thumbnails.points;
    const taken = new Map();
    const around = [-1, 0, 1];
    const isFree = ({ x, y }) =>
      around.every((column) =>
        around.every((row) => {
          const other = taken.get(`${Math.floor(x / cell) + column} ${Math.floor(y / cell) + row}`);
          return !other || Math.abs(other.x - x) >= cell || Math.abs(other.y - y) >= cell;
        }),
      );
    for (const point of points.filter(isShown)) {
      if (isFree(point)) taken.set(`${Math.floor(point.x / cell)} ${Math.floor(point.y / cell)}`, point);
    }
    thumbnails = { key, points: new Set(taken.values()) };
    return thumbnails.points;
  }

  function draw() {
    const { width, height, zoom } = camera;
    const ratio = devicePixelRatio || 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const zoomLevel = 2 ** (Math.floor(2 * Math.log2(zoom) + 1e-9) / 2);
    const density = Math.sqrt((camera.across * camera.down) / Math.max(1, points.length));
    const spacing = (zoomLevel / zoom) * camera.scale * density; // pixels between points, on average
    const size = Math.min(snapSide(64), Math.max(24, spacing * 0.9));
    const withPictures = zoom > 1.3 || spacing > 30;
    const pictured = withPictures ? choosePictured(size, zoomLevel) : new Set();
    const isVisible = ([x, y]) => x > -size && y > -size && x < width + size && y < height + size;
    const radius = Math.max(2.2, Math.min(5, spacing * 0.16));
    for (const dim of [true, false]) {
      context.globalAlpha = dim ? 0.16 : 0.88;
      for (const point of points) {
        const [x, y] = camera.toPixels(point);
        if (isShown(point) === dim || pictured.has(point) || !isVisible([x, y])) continue;
        context.fillStyle = coloring.colorOf(point.node);
        tracePoint(context, coloring.shapeOf(point.node), x, y, radius);
        context.fill();
      }
    }
    context.globalAlpha = 1;
    for (const point of pictured) if (isVisible(camera.toPixels(point))) drawThumbnail(point, size);
    drawSelected(pictured, size, radius);
    const query = hovered ?? ringed;
    if (query) drawNeighbors(query, size, withPictures);
    if (lasso) drawLasso();
    canvas.dataset.pictures = pictured.size;
    canvas.dataset.zoom = zoom.toFixed(2);
    canvas.dataset.node = hovered ? hovered.node : "";
  }

  function drawThumbnail(point, size) {
    const [x, y] = camera.toPixels(point).map((center) => Math.round(center - size / 2));
    const image = loadImage(point.node);
    const edge = coloring.key === "none" ? 0 : 2;
    context.fillStyle = coloring.colorOf(point.node);
    context.fillRect(x - edge, y - edge, size + 2 * edge, size + 2 * edge);
    if (!image) return;
    context.imageSmoothingEnabled = !pictures.small || size < pictures.side;
    context.drawImage(image, x, y, size, size);
  }

  function drawSelected(pictured, size, radius) {
    context.strokeStyle = getComputedStyle(canvas).color;
    context.lineWidth = 2;
    for (const node of selected) {
      const point = pointOf.get(node);
      if (!point) continue;
      const [x, y] = camera.toPixels(point);
      context.beginPath();
      if (pictured.has(point)) context.rect(x - size / 2 - 3, y - size / 2 - 3, size + 6, size + 6);
      else context.arc(x, y, radius + 2.5, 0, 7);
      context.stroke();
    }
  }

  function drawLasso() {
    context.strokeStyle = getComputedStyle(canvas).color;
    context.lineWidth = 1.5;
    context.setLineDash([5, 4]);
    context.beginPath();
    for (const [x, y] of lasso) context.lineTo(x, y);
    context.closePath();
    context.stroke();
    context.setLineDash([]);
  }

  function loadImage(node) {
    let image = images.get(node);
    if (!image) {
      image = new Image();
      image.src = imageUrl(node);
      images.set(node, image);
      image.decode().then(redraw, () => {});
    }
    return image.complete && image.naturalWidth ? image : null;
  }

  function drawNeighbors(query, size, withPictures) {
    const [x, y] = camera.toPixels(query);
    const onMap = neighbors[query.node].map((node) => pointOf.get(node)).filter(Boolean);
    context.strokeStyle = getComputedStyle(canvas).color;
    context.lineWidth = 1;
    context.globalAlpha = 0.55;
    context.beginPath();
    for (const neighbor of onMap) {
      context.moveTo(x, y);
      context.lineTo(...camera.toPixels(neighbor));
    }
    context.stroke();
    context.globalAlpha = 1;
    // The nearest is drawn last, on top of the others.
    for (const neighbor of onMap.reverse()) drawThumbnail(neighbor, withPictures ? size : snapSide(32));
    if (withPictures) drawThumbnail(query, size);
    context.lineWidth = 2.5;
    context.beginPath();
    if (withPictures) context.rect(x - size / 2 - 3, y - size / 2 - 3, size + 6, size + 6);
    else context.arc(x, y, 8, 0, 7);
    context.stroke();
  }

  // -------------------------------------------------------------- Choosing a point

  function hover(point, spoken = false) {
    if (point === hovered) return;
    hovered = point;
    canvas.classList.toggle("over", point !== null);
    byId("map-card").hidden = point === null;
    if (point) showCard(point);
    if (point && spoken) announce(`${title(point.node)}, ${idOrName(point.node)}. ${matchText(summaries[point.node])}`);
    redraw();
  }

  function showCard(point) {
    const { node } = point;
    const onMap = neighbors[node].filter((other) => pointOf.has(other)).length;
    const box = byId("map-card");
    box.replaceChildren(
      picture(node),
      el("b", null, isolate(title(node))),
      span(isolate(shortName(node))),
      span(matchText(summaries[node]) || plural(onMap, "neighbour")),
    );
    const [x, y] = camera.toPixels(point);
    const { width, height } = camera;
    box.style.left = `${Math.max(8, Math.min(width - 160, x + (x + 190 > width ? -176 : 24)))}px`;
    box.style.top = `${Math.max(8, Math.min(height - box.offsetHeight - 8, y - box.offsetHeight / 2))}px`;
  }

  // The shown point with the lowest cost; null: none below `limit`.
  function cheapest(limit, costOf) {
    let [best, lowest] = [null, limit];
    for (const point of points) {
      const cost = isShown(point) ? costOf(point, ...camera.toPixels(point)) : Infinity;
      if (cost < lowest) [best, lowest] = [point, cost];
    }
    return best;
  }

  const nearest = ([x, y], reach) => cheapest(reach, (_, pointX, pointY) => Math.hypot(pointX - x, pointY - y));

  // The next point in a direction; a point straight ahead comes before one to the side.
  function step([dx, dy]) {
    const from = hovered ?? ringed;
    if (!from) return hover(nearest([camera.width / 2, camera.height / 2], Infinity), true);
    const [fromX, fromY] = camera.toPixels(from);
    const next = cheapest(Infinity, (point, x, y) => {
      const ahead = (x - fromX) * dx + (y - fromY) * dy;
      const aside = Math.abs((x - fromX) * dy) + Math.abs((y - fromY) * dx);
      return point === from || ahead <= 0 || aside > ahead * 1.5 ? Infinity : ahead + 2 * aside;
    });
    if (!next) return;
    const [x, y] = camera.toPixels(next);
    if (x < 20 || x > camera.width - 20 || y < 20 || y > camera.height - 20) camera.moveTo(next.x, next.y);
    hover(next, true);
  }

  // -------------------------------------------------------------- Pointer and keys

  function zoomBy(factor, x, y) {
    camera.zoomBy(factor, x, y);
    hover(null);
    redraw();
  }

  function fit() {
    camera.fit();
    hover(null);
    redraw();
  }

  const position = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const lassoButton = byId("lasso");
  const isLassoOn = () => lassoButton.getAttribute("aria-pressed") === "true";
  lassoButton.addEventListener("click", () => {
    lassoButton.setAttribute("aria-pressed", String(!isLassoOn()));
    canvas.classList.toggle("lasso", isLassoOn());
  });

  function selectInside(isInside) {
    const inside = points.filter((point) => isShown(point) && isInside(camera.toPixels(point)));
    setSelected(inside.map(({ node }) => node), true);
  }

  function finishLasso() {
    const corners = lasso;
    lasso = null;
    if (corners.length > 2) selectInside((place) => isInPolygon(place, corners));
    redraw();
  }

  const isInView = ([x, y]) => x >= 0 && y >= 0 && x <= camera.width && y <= camera.height;
  const pointers = new Map(); // [x, y] of those that are down
  let moved = 0; // pixels since the first came down
  canvas.addEventListener("pointerdown", (event) => {
    pointers.set(event.pointerId, position(event));
    canvas.setPointerCapture(event.pointerId);
    if (pointers.size === 1) moved = 0;
    lasso = pointers.size === 1 && (isLassoOn() || event.shiftKey) ? [position(event)] : null;
  });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = position(event);
    const before = pointers.get(event.pointerId);
    if (!before) return hover(nearest([x, y], 18));
    moved += Math.hypot(x - before[0], y - before[1]);
    const [other] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, where]) => where);
    if (other) {
      const apart = Math.hypot(before[0] - other[0], before[1] - other[1]);
      const nowApart = Math.hypot(x - other[0], y - other[1]);
      if (apart > 1) zoomBy(nowApart / apart, (x + other[0]) / 2, (y + other[1]) / 2);
    } else if (moved > 4) {
      hover(null);
      if (lasso) lasso.push([x, y]);
      else {
        canvas.classList.add("dragging");
        camera.moveTo(camera.x - (x - before[0]) / camera.scale, camera.y - (y - before[1]) / camera.scale);
      }
      redraw();
    }
    pointers.set(event.pointerId, [x, y]);
  });
  const release = (event) => {
    if (!pointers.delete(event.pointerId)) return;
    canvas.classList.remove("dragging");
    if (lasso && moved > 4) return finishLasso();
    lasso = null;
    if (event.type !== "pointerup" || pointers.size || moved > 4 || event.button !== 0) return;
    const point = nearest(position(event), event.pointerType === "touch" ? 28 : 18);
    if (!point) return;
    if (event.shiftKey || isLassoOn()) setSelected([point.node], !selected.has(point.node));
    else openQuery(point.node);
  };
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", release);
  canvas.addEventListener("pointerleave", () => pointers.size || hover(null));
  canvas.addEventListener("blur", () => hover(null));
  const turnWheel = (event) => {
    event.preventDefault();
    const pixels = Math.max(-240, Math.min(240, event.deltaY * (event.deltaMode === 1 ? 16 : 1)));
    zoomBy(Math.exp(-pixels * (event.ctrlKey ? 0.01 : 0.0022)), ...position(event)); // Ctrl: a trackpad's pinch
  };
  canvas.addEventListener("wheel", turnWheel, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (direction) step(direction);
    else if (event.key === "+" || event.key === "=") zoomBy(1.5);
    else if (event.key === "-") zoomBy(1 / 1.5);
    else if (event.key === "0") fit();
    else if (event.key === "Enter" && hovered) openQuery(hovered.node);
    else if (event.key === " " && hovered) setSelected([hovered.node], !selected.has(hovered.node));
    else if (event.key === "a") selectInside(isInView);
    else if (event.key === "Escape" && hovered) hover(null);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  byId("zoom-in").addEventListener("click", () => zoomBy(1.6));
  byId("zoom-out").addEventListener("click", () => zoomBy(1 / 1.6));
  byId("zoom-fit").addEventListener("click", fit);

  // -------------------------------------------------------------- Colours and legend

  function showOnly(group) {
    onlyGroup = group;
    legend.press(group);
    hover(null);
    redraw();
  }

  function colorBy(key) {
    coloring = colorings.find((other) => other.key === key);
    legend = buildLegend(coloring, showOnly);
    byId("map-legend").replaceChildren(...chooser, ...legend.elements);
    showOnly(null);
  }

  const options = colorings.map(({ key, title: text }) => el("option", { value: key }, text));
  const colorSelect = el("select", { id: "color-by" }, ...options);
  colorSelect.addEventListener("change", () => colorBy(colorSelect.value));
  const chooser = colorings.length > 1 ? [el("label", null, "Colour by ", colorSelect)] : [];
  colorBy(coloring.key);
  selectionListeners.push(redraw);

  imageMap = {
    resize() {
      const box = byId("map-box");
      [camera.width, camera.height] = [box.clientWidth, box.clientHeight];
      const ratio = devicePixelRatio || 1;
      [canvas.width, canvas.height] = [camera.width, camera.height].map((pixels) => Math.round(pixels * ratio));
      legend.recolor();
      draw();
    },
    focus(node) {
      ringed = pointOf.get(node) ?? null;
      if (!ringed) return;
      camera.zoom = 4;
      camera.moveTo(ringed.x, ringed.y);
      redraw();
    },
    showGroup(key, group) {
      colorSelect.value = key;
      colorBy(key);
      showOnly(group);
      fit();
    },
  };
}

// By the even-odd rule.
function isInPolygon([x, y], corners) {
  let inside = false;
  corners.forEach(([x1, y1], place) => {
    const [x0, y0] = corners.at(place - 1);
    if (y0 > y !== y1 > y && x < x0 + ((y - y0) * (x1 - x0)) / (y1 - y0)) inside = !inside;
  });
  return inside;
}
