"use strict";
// The crosshair: the values of all runs at one step, in every chart. The rest of the page works without this script.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const slider = document.getElementById("step");
  const position = document.getElementById("position");
  if (!slider) return; // there are no metrics yet

  const allSteps = data.charts.flatMap((chart) => chart.series.flatMap((series) => series.steps));
  const steps = [...new Set(allSteps)].sort((a, b) => a - b);
  const charts = [...document.querySelectorAll(".chart")].map((figure, number) => ({
    ...data.charts[number],
    plots: [...figure.querySelectorAll(".plot")].map((plot) => ({
      scale: plot.dataset.scale,
      line: plot.querySelector(".cursor line"),
      dots: [...plot.querySelectorAll(".cursor circle")],
    })),
    values: [...figure.querySelectorAll(".values b")].map((element) => ({ element, latest: element.textContent })),
  }));
  let pinned = false; // a click or a key has fixed the crosshair
  let nextStep = null; // to be shown in the next frame

  // The index of the last of `sorted` that is at most `step`; -1 if there is none.
  function lastIndexUpTo(sorted, step) {
    let low = 0;
    let high = sorted.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] <= step) low = middle + 1;
      else high = middle;
    }
    return low - 1;
  }

  const integer = (value) => value.toLocaleString("en-US", { maximumFractionDigits: 0 });

  // The same as `format_value` in charts.py.
  function formatValue(value, format) {
    if (value === null) return "–";
    if (format === "percent") return `${(100 * value).toFixed(1)}%`;
    if (format === "count") return integer(value);
    return format === "ms" ? `${significant(value, 3)} ms` : significant(value, 4);
  }

  function significant(value, digits) {
    const size = Math.abs(value);
    if (size >= 1e12) return value.toExponential(2);
    if (size >= 10 ** digits) return integer(value);
    if (size >= 1e-4 || size === 0) return String(Number(value.toPrecision(digits)));
    const [mantissa, power] = value.toExponential(digits - 1).split("e");
    return `${Number(mantissa)}e${power}`;
  }

  // The distance from the top, 0 to 1; null if a logarithmic scale cannot show the value.
  function height(value, [low, high], scale) {
    if (scale === "log") return value > 0 ? 1 - Math.log(value / low) / Math.log(high / low) : null;
    return 1 - (value - low) / (high - low);
  }

  function show(step) {
    const x = `${(100 * step) / data.last}%`;
    for (const chart of charts) {
      const points = chart.series.map((series) => {
        const index = step > series.steps.at(-1) ? -1 : lastIndexUpTo(series.steps, step);
        return { step: series.steps[index], value: index < 0 ? null : series.values[index] };
      });
      points.forEach(({ value }, number) => {
        chart.values[number].element.textContent = formatValue(value, chart.format);
      });
      for (const plot of chart.plots) {
        plot.line.setAttribute("x1", x);
        plot.line.setAttribute("x2", x);
        points.forEach((point, number) => {
          const dot = plot.dots[number];
          const y = point.value === null ? null : height(point.value, chart[plot.scale], plot.scale);
          dot.classList.toggle("absent", y === null);
          if (y === null) return;
          dot.setAttribute("cx", `${(100 * point.step) / data.last}%`);
          dot.setAttribute("cy", `${100 * y}%`);
        });
      }
    }
    const running = data.runs.filter((run) => run.steps.length && step <= run.steps.at(-1));
    const [epoch, ...others] = new Set(running.map((run) => run.epochs[Math.max(0, lastIndexUpTo(run.steps, step))]));
    position.textContent = `step ${integer(step)}${epoch == null || others.length ? "" : `, epoch ${epoch}`}`;
    slider.setAttribute("aria-valuetext", position.textContent);
    document.body.classList.add("pointing");
  }

  function showLatest() {
    pinned = false;
    document.body.classList.remove("pointing");
    for (const chart of charts) for (const { element, latest } of chart.values) element.textContent = latest;
    position.textContent = "latest value";
    slider.value = slider.max;
    slider.setAttribute("aria-valuetext", "latest value");
  }

  function showInNextFrame(step) {
    if (nextStep === null) {
      requestAnimationFrame(() => {
        if (nextStep !== null) {
          slider.value = lastIndexUpTo(steps, nextStep);
          show(nextStep);
        }
        nextStep = null;
      });
    }
    nextStep = step;
  }

  // The recorded step that is nearest to the pointer.
  function nearestStep(event, canvas) {
    const { left, width } = canvas.getBoundingClientRect();
    const wanted = (data.last * (event.clientX - left)) / width;
    const below = Math.max(0, lastIndexUpTo(steps, wanted));
    const above = Math.min(steps.length - 1, below + 1);
    return steps[above] - wanted < wanted - steps[below] ? steps[above] : steps[below];
  }

  for (const canvas of document.querySelectorAll(".canvas")) {
    canvas.addEventListener("pointermove", (event) => pinned || showInNextFrame(nearestStep(event, canvas)));
    canvas.addEventListener("pointerleave", () => {
      if (pinned) return;
      nextStep = null;
      showLatest();
    });
    canvas.addEventListener("click", (event) => {
      pinned = !pinned;
      if (pinned) slider.focus({ preventScroll: true });
      showInNextFrame(nearestStep(event, canvas));
    });
  }
  // Print what is folded, too.
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
    nextStep = null;
    show(steps[Number(slider.value)]);
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && showLatest());
  slider.parentElement.hidden = false;
  showLatest();
})();
