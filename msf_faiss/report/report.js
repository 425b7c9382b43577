"use strict";
// The crosshair: the readings of all runs at one step, in every chart. Everything else on the page works without this.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const slider = document.getElementById("step");
  const at = document.getElementById("at");
  if (!slider) return; // nothing has been reported yet

  const steps = [...new Set(data.charts.flatMap((chart) => chart.series.flatMap((series) => series.steps)))].sort((a, b) => a - b);
  const figures = [...document.querySelectorAll(".chart")];
  const charts = figures.map((figure, number) => ({
    ...data.charts[number],
    plots: [...figure.querySelectorAll(".plot")].map((plot) => ({
      scale: plot.dataset.scale,
      line: plot.querySelector(".cursor line"),
      dots: [...plot.querySelectorAll(".cursor circle")],
    })),
    words: [...figure.querySelectorAll(".values b")].map((element) => ({ element, last: element.textContent })),
  }));

  // The place of the last of `sorted` that is not beyond `step`; -1: all are.
  function lastAt(sorted, step) {
    let low = 0;
    let high = sorted.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] <= step) low = middle + 1;
      else high = middle;
    }
    return low - 1;
  }

  // As `in_words` in charts.py.
  function inWords(value, format) {
    if (value === null) return "–";
    if (format === "percent") return `${(100 * value).toFixed(1)}%`;
    if (format === "count") return value.toLocaleString("en-US", { maximumFractionDigits: 0 });
    return format === "ms" ? `${digits(value, 3)} ms` : digits(value, 4);
  }

  function digits(value, count) {
    const size = Math.abs(value);
    if (size >= 1e12) return value.toExponential(2);
    if (size >= 10 ** count) return value.toLocaleString("en-US", { maximumFractionDigits: 0 });
    if (size >= 1e-4 || size === 0) return String(Number(value.toPrecision(count)));
    const [mantissa, power] = value.toExponential(count - 1).split("e");
    return `${Number(mantissa)}e${power}`;
  }

  function height(value, [low, high], scale) {
    if (scale === "log") return value > 0 ? 1 - Math.log(value / low) / Math.log(high / low) : null;
    return 1 - (value - low) / (high - low);
  }

  function show(step) {
    const across = `${(100 * step) / data.last}%`;
    for (const chart of charts) {
      const found = chart.series.map((series) => {
        const place = step > series.steps[series.steps.length - 1] ? -1 : lastAt(series.steps, step);
        return { step: series.steps[place], value: place < 0 ? null : series.values[place] };
      });
      found.forEach(({ value }, number) => (chart.words[number].element.textContent = inWords(value, chart.format)));
      for (const plot of chart.plots) {
        plot.line.setAttribute("x1", across);
        plot.line.setAttribute("x2", across);
        found.forEach(({ step: where, value }, number) => {
          const dot = plot.dots[number];
          const y = value === null ? null : height(value, chart[plot.scale], plot.scale);
          dot.classList.toggle("away", y === null);
          if (y === null) return;
          dot.setAttribute("cx", `${(100 * where) / data.last}%`);
          dot.setAttribute("cy", `${100 * y}%`);
        });
      }
    }
    const epochs = new Set(
      data.runs.filter((run) => run.steps.length && step <= run.steps[run.steps.length - 1]).map((run) => run.epochs[Math.max(0, lastAt(run.steps, step))]),
    );
    const [only] = epochs;
    const epoch = epochs.size === 1 && only !== null ? `, epoch ${only}` : "";
    at.textContent = `step ${step.toLocaleString("en-US")}${epoch}`;
    slider.setAttribute("aria-valuetext", at.textContent);
    document.body.classList.add("pointing");
  }

  function rest() {
    pinned = false;
    document.body.classList.remove("pointing");
    for (const chart of charts) for (const { element, last } of chart.words) element.textContent = last;
    at.textContent = "last reading";
    slider.value = slider.max;
    slider.setAttribute("aria-valuetext", "last reading");
  }

  let pinned = false; // a click or a key holds the crosshair where it is
  let waiting = null;

  function point(step) {
    if (waiting === null) {
      requestAnimationFrame(() => {
        if (waiting !== null) {
          slider.value = lastAt(steps, waiting);
          show(waiting);
        }
        waiting = null;
      });
    }
    waiting = step;
  }

  // The step of a report that is nearest to the pointer.
  function under(event, canvas) {
    const { left, width } = canvas.getBoundingClientRect();
    const wanted = (data.last * (event.clientX - left)) / width;
    const below = Math.max(0, lastAt(steps, wanted));
    const above = Math.min(steps.length - 1, below + 1);
    return steps[above] - wanted < wanted - steps[below] ? steps[above] : steps[below];
  }

  for (const canvas of document.querySelectorAll(".canvas")) {
    canvas.addEventListener("pointermove", (event) => pinned || point(under(event, canvas)));
    canvas.addEventListener("pointerleave", () => {
      if (pinned) return;
      waiting = null;
      rest();
    });
    canvas.addEventListener("click", (event) => {
      pinned = !pinned;
      if (pinned) slider.focus({ preventScroll: true });
      point(under(event, canvas));
    });
  }
  // On paper nothing can be unfolded.
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    for (const details of folded) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of folded) details.open = false;
  });
  slider.max = String(steps.length - 1);
  slider.addEventListener("input", () => {
    pinned = true;
    waiting = null;
    show(steps[Number(slider.value)]);
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && rest());
  slider.parentElement.hidden = false;
  rest();
})();
