// The page of neighbours. Everything named comes from a data set and is hostile: it enters the document as text only.
"use strict";
(() => {
  const root = document.documentElement;
  const themes = ["system", "light", "dark"];
  let theme = remembered();
  root.dataset.theme = theme; // before anything is drawn
  addEventListener("DOMContentLoaded", start);

  function remembered() {
    try {
      const found = localStorage.getItem("msf-faiss-theme");
      return themes.includes(found) ? found : "system";
    } catch {
      return "system"; // no storage is needed
    }
  }

  function start() {
    const data = JSON.parse(document.getElementById("data").textContent);
    const pictures = JSON.parse(document.getElementById("pictures").textContent);
    document.getElementById("data").remove();
    document.getElementById("pictures").remove(); // some megabytes of text
    const { classes, ids, names, labels, neighbors, similarities, ages } = data;
    const count = ids.length;
    const byId = (id) => document.getElementById(id);
    const still = matchMedia("(prefers-reduced-motion: reduce)");
    const darkSystem = matchMedia("(prefers-color-scheme: dark)");
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

    // ---------------------------------------------------------------- Where we are

    const views = new Map([
      ["explore", null],
      ["image", null],
      ["statistics", statistics],
      ["evolution", evolution],
      ["clusters", clusters],
      ["map", drawMap],
    ]);
    const built = new Set(["explore", "image"]);
    const left = new Map(); // by entry of the history: where it was scrolled to, and what had the focus
    let entry = { view: "explore", node: null, trail: [], key: 0, depth: 0 };
    let lastKey = Date.now();
    let mapView = null;
    history.scrollRestoration = "manual";

    function place(hash) {
      const image = /^#image-(\d{1,9})$/.exec(hash);
      if (image && Number(image[1]) < count) return { view: "image", node: Number(image[1]) };
      const view = hash.slice(1);
      return { view: view !== "image" && views.has(view) && byId(`view-${view}`) ? view : "explore", node: null };
    }

    function go(hash, trail = []) {
      leave();
      history.pushState({ trail, depth: entry.depth + 1, key: ++lastKey }, "", hash);
      show(true);
    }

    function follow(node) {
      if (entry.view === "image" && entry.node === node) return;
      go(`#image-${node}`, entry.view === "image" ? [...entry.trail, node].slice(-200) : [node]);
    }

    function back() {
      if (entry.depth > 0) history.back();
      else go("#explore"); // the page was opened at this image: there is nothing before it
    }

    function leave() {
      const active = document.activeElement;
      const list = active?.closest("[data-rove]");
      const lists = list ? [...byId(`view-${entry.view}`).querySelectorAll("[data-rove]")] : [];
      const kept = { list: lists.indexOf(list), node: active?.dataset?.node, link: active };
      left.set(entry.key, { ...kept, scroll: scrollY, top: active?.getBoundingClientRect().top });
    }

    function show(forward) {
      const found = place(location.hash);
      let state = history.state;
      if (!state || typeof state.key !== "number" || !Array.isArray(state.trail)) {
        state = { trail: found.node === null ? [] : [found.node], depth: 0, key: ++lastKey };
        history.replaceState(state, "", location.hash || "#explore");
      }
      const trail = state.trail.filter((node) => Number.isInteger(node) && node >= 0 && node < count);
      const known = found.node === null || trail.at(-1) === found.node;
      entry = { ...found, trail: known ? trail : [found.node], key: state.key, depth: state.depth };
      document.body.dataset.view = entry.view;
      for (const view of views.keys()) {
        const section = byId(`view-${view}`);
        if (section) section.hidden = view !== entry.view;
      }
      for (const anchor of document.querySelectorAll("[data-section]")) {
        const current = anchor.dataset.section === (entry.view === "image" ? "explore" : entry.view);
        if (current) anchor.setAttribute("aria-current", "page");
        else anchor.removeAttribute("aria-current");
        if (current) anchor.parentElement.scrollLeft = anchor.offsetLeft - anchor.parentElement.clientWidth / 2;
      }
      closeFound();
      if (entry.view === "image") one();
      else if (!built.has(entry.view)) {
        built.add(entry.view);
        views.get(entry.view)();
      }
      redraw();
      const section = `${entry.view[0].toUpperCase()}${entry.view.slice(1)} · `;
      const here = entry.view === "image" ? `${title(entry.node)} · ` : entry.view === "explore" ? "" : section;
      document.title = `${here}${data.title} · neighbours`;
      restore(forward);
    }

    function restore(forward) {
      const kept = forward ? undefined : left.get(entry.key);
      scrollTo(0, kept?.scroll ?? 0);
      const section = byId(`view-${entry.view}`);
      let target = null;
      if (kept?.link?.isConnected && section.contains(kept.link)) target = kept.link;
      else if (kept && kept.list >= 0) {
        target = section.querySelectorAll("[data-rove]")[kept.list]?.querySelector(`[data-node="${Number(kept.node)}"]`);
      }
      if (entry.view === "image" && forward !== undefined) {
        target ??= section.querySelector(".neighbors a") ?? section.querySelector("h2");
        const [matching, compared] = agreement[entry.node];
        const agreed = compared ? `${matching} of ${compared} neighbours match.` : "";
        say(`Query: ${title(entry.node)}, ${called(entry.node)}. ${agreed}`);
      }
      target?.focus({ preventScroll: true });
      // Cards above that were not drawn yet may be higher or lower than thought: what had the focus is where it was.
      if (kept && target) scrollBy(0, target.getBoundingClientRect().top - kept.top);
    }

    function say(text) {
      byId("said").textContent = text;
    }

    // The picture that is clicked grows into the query, where the browser can and motion is welcome.
    function morph(from, update) {
      if (!from || still.matches || !document.startViewTransition) return update();
      const big = document.querySelector("#view-image:not([hidden]) .big img");
      if (big) big.style.viewTransitionName = "none";
      from.style.viewTransitionName = "query";
      const transition = document.startViewTransition(() => {
        from.style.viewTransitionName = "";
        update();
      });
      // A transition that the next one cuts short is no error.
      for (const promise of [transition.ready, transition.finished]) promise.catch(() => {});
    }

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

    // ---------------------------------------------------------------- Charts

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

    // ---------------------------------------------------------------- Map

    // Ten colours can be told apart, each in a light and a dark shade. More classes are shown one at a time.
    const palette = [
      ["#2563eb", "#60a5fa"], ["#ea580c", "#fb923c"], ["#15803d", "#4ade80"], ["#dc2626", "#f87171"], ["#7c3aed", "#a78bfa"],
      ["#854d0e", "#d6a45a"], ["#db2777", "#f472b6"], ["#0891b2", "#22d3ee"], ["#737312", "#d9d94a"], ["#475569", "#a8b3c2"],
    ];
    const dark = () => theme === "dark" || (theme === "system" && darkSystem.matches);

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
        if (label < 0 || (!coloured && label !== only)) return dark() ? "#8b8f94" : "#8a857e";
        return coloured ? palette[present.indexOf(label)][dark() ? 1 : 0] : dark() ? "#2dd4bf" : "#0f766e";
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

    // ---------------------------------------------------------------- Finding

    const words = names.map((text, node) => `${text} ${classOf(node) ?? ""}`.toLowerCase());

    function find() {
      const asked = byId("search").value.trim().toLowerCase();
      if (!asked) return closeFound();
      const terms = asked.split(/\s+/);
      const number = /^#?\d+$/.test(asked) ? Number(asked.replace("#", "")) : -1;
      const exact = ids.indexOf(number);
      // The number, then those of the class, then those that have these words in a row, then those that have them at all.
      const rank = (node) => {
        if (number >= 0 && node === exact) return 0;
        if (classOf(node)?.toLowerCase() === asked) return 1;
        return words[node].includes(asked) ? 2 : terms.every((term) => words[node].includes(term)) ? 3 : 4;
      };
      const found = [[], [], [], [], []];
      for (let node = 0; node < count; node += 1) found[rank(node)].push(node);
      found.pop();
      showFound(found.flat());
    }

    function showFound(found) {
      const most = 60;
      const items = found.slice(0, most).map((node) => {
        const number = ids[node] >= 0 ? whole(ids[node]) : "";
        return tile(node, null, called(node), span(name(classOf(node) ?? "")), span(number));
      });
      const told = `${plural(found.length, "image")}${found.length > most ? `, the first ${most}` : ""}`;
      const without = "No image of this page has such a number, name or class.";
      byId("found").replaceChildren(
        el("p", { role: "status" }, found.length ? told : without),
        tiles({}, items),
      );
      byId("found").hidden = false;
    }

    function closeFound() {
      byId("found").hidden = true;
      byId("found").replaceChildren();
    }

    byId("search").addEventListener("input", find);
    byId("search").addEventListener("focus", find);
    byId("search").addEventListener("keydown", (event) => {
      const first = byId("found").querySelector("[data-node]");
      if (event.key === "Escape") {
        event.preventDefault();
        byId("search").value = "";
        closeFound();
        byId("search").blur();
      } else if (event.key === "Enter" && first) pick(first);
      else if (event.key === "ArrowDown" && first) {
        event.preventDefault();
        first.focus();
      }
    });
    document.addEventListener("pointerdown", (event) => {
      if (!event.target.closest(".find")) closeFound();
    });

    function pick(anchor) {
      byId("search").value = "";
      follow(Number(anchor.dataset.node));
      closeFound();
    }

    // ---------------------------------------------------------------- Pointer and keys

    document.addEventListener("click", (event) => {
      const anchor = event.target.closest("a");
      if (!anchor || event.defaultPrevented || event.button) return;
      if (event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return; // a new tab, say
      if (anchor.id === "skip") {
        event.preventDefault();
        byId("main").focus();
        return;
      }
      event.preventDefault();
      if (anchor.dataset.sectionLink) {
        go("#map");
        mapView.ring(Number(anchor.dataset.sectionLink));
      } else if (anchor.dataset.class) {
        byId("by-class").value = anchor.dataset.class;
        arrange();
        go("#explore");
        byId("view-explore").scrollIntoView();
      } else if (anchor.dataset.step) {
        const trail = entry.trail.slice(0, Number(anchor.dataset.step) + 1);
        if (trail.length < entry.trail.length) go(`#image-${trail.at(-1)}`, trail);
      } else if (anchor.closest(".found")) pick(anchor);
      else if (anchor.dataset.node) {
        const node = Number(anchor.dataset.node);
        morph(event.detail > 0 ? anchor.querySelector("img") : null, () => follow(node));
      } else if (anchor.hash === location.hash) scrollTo(0, 0);
      else go(anchor.hash);
    });

    document.addEventListener("focusin", (event) => {
      const list = event.target.closest?.("[data-rove]");
      if (!list || !event.target.dataset.node) return;
      for (const other of list.querySelectorAll('[tabindex="0"]')) other.setAttribute("tabindex", "-1");
      event.target.setAttribute("tabindex", "0");
    });

    document.addEventListener("keydown", (event) => {
      if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || byId("keys").open) return;
      const active = document.activeElement;
      if (active.matches("input, select, textarea")) return;
      const digit = Number(event.key);
      const sections = [...document.querySelectorAll("nav [data-section]")];
      if (event.key.startsWith("Arrow") || event.key === "Home" || event.key === "End") {
        if (active.matches("[data-rove] [data-node]")) arrow(active, event.key);
        else if (active === document.body && event.key === "ArrowRight") enter();
        else return;
      } else if (event.key === "Escape" && !byId("found").hidden) {
        closeFound();
        byId("search").focus();
      } else if ((event.key === "Escape" || event.key === "Backspace") && entry.view === "image") back();
      else if (event.key === "/") byId("search").focus();
      else if (event.key === "?") byId("keys").showModal();
      else if (digit >= 1 && digit <= sections.length) go(sections[digit - 1].hash);
      else return;
      event.preventDefault();
    });

    function enter() {
      byId(`view-${entry.view}`).querySelector("[data-rove] [data-node]")?.focus();
    }

    function arrow(active, key) {
      const list = active.closest("[data-rove]");
      const own = [...list.querySelectorAll("[data-node]")];
      const place = own.indexOf(active);
      let target = null;
      if (key === "Home") target = own[0];
      else if (key === "End") target = own.at(-1);
      else {
        target = ahead(active, key);
        if (!target && key === "ArrowRight") target = own[place + 1];
        if (!target && key === "ArrowLeft") target = own[place - 1];
        const aside = target && target.closest("[data-area]") !== active.closest("[data-area]");
        if (aside && /Left|Right/.test(key)) target = own[place + (key === "ArrowRight" ? 1 : -1)];
      }
      if (!target) return;
      target.focus({ preventScroll: true });
      target.scrollIntoView({ block: "nearest", inline: "nearest", behavior: still.matches ? "auto" : "smooth" });
    }

    // The nearest tile in a direction, in this part of the page or the next ones.
    function ahead(active, key) {
      const area = active.closest("[data-area]");
      const areas = area ? [area, area.previousElementSibling, area.nextElementSibling] : [active.closest("[data-rove]")];
      const from = active.getBoundingClientRect();
      const across = key === "ArrowLeft" || key === "ArrowRight";
      const sign = key === "ArrowRight" || key === "ArrowDown" ? 1 : -1;
      let best = null;
      let least = Infinity;
      for (const candidate of areas.flatMap((part) => [...(part?.querySelectorAll("[data-rove] [data-node]") ?? [])])) {
        const to = candidate.getBoundingClientRect();
        const dx = to.left + to.width / 2 - from.left - from.width / 2;
        const dy = to.top + to.height / 2 - from.top - from.height / 2;
        const along = sign * (across ? dx : dy);
        const aside = Math.abs(across ? dy : dx);
        if (along < 8 || (across && aside > from.height / 2)) continue;
        const cost = across ? along : along * 4 + aside; // the next line first, and there the tile below
        if (cost < least) [best, least] = [candidate, cost];
      }
      return best;
    }

    byId("help").addEventListener("click", () => byId("keys").showModal());
    byId("close-keys").addEventListener("click", () => byId("keys").close());
    byId("keys").addEventListener("click", (event) => event.target === byId("keys") && byId("keys").close());

    function paint() {
      root.dataset.theme = theme;
      const words = `Colours: ${{ system: "as the system has them", light: "light", dark: "dark" }[theme]}`;
      byId("theme").title = words;
      byId("theme").setAttribute("aria-label", words);
      if (entry.view === "map") mapView?.resize();
    }
    byId("theme").addEventListener("click", () => {
      // From what the system has to its opposite first, so that the button always does something that is seen.
      const round = darkSystem.matches ? ["system", "light", "dark"] : ["system", "dark", "light"];
      theme = round[(round.indexOf(theme) + 1) % 3];
      try {
        localStorage.setItem("msf-faiss-theme", theme);
      } catch {
        // The page then begins with the system's colours the next time.
      }
      paint();
    });
    darkSystem.addEventListener("change", paint);
    addEventListener("resize", redraw);
    addEventListener("popstate", () => {
      leave();
      show(false);
    });

    byId("summary").append(purityByRank() ?? similarityByRank() ?? "");
    explore();
    paint();
    show();
  }
})();
