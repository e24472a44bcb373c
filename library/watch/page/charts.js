"use strict";
// Charts of curves over steps, drawn by uPlot. A curve comes from the server as points {name, steps, means, lows, highs}.
const Charts = (() => {
  const plots = new Map(); // chart name -> {plot, shape, figure}
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const COLOURS = 8; // --c0 … in page.css
  const PER_STEP = ["learning rate", "speed", "memory"]; // exact as they are: never smoothed
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const hidden = new Set(); // keys of the curves that the user has switched off
  let marked = null; // step of the previews that are shown

  function bytes(value) {
    return value >= 1e9 ? (value / 1e9).toFixed(1) + " GB" : (value / 1e6).toFixed(0) + " MB";
  }

  function short(value, chart) {
    if (value === null || value === undefined) return "";
    if (chart === "memory") return bytes(value);
    const unit = chart === "speed" ? " s" : "";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace("e+", "e") + unit;
    return String(Number(value.toPrecision(4))) + unit;
  }

  // Exponential mean over about `span` steps, corrected for its start, for points that are not evenly spaced.
  function smoothed(steps, values, span) {
    if (!span) return values;
    let mean = 0;
    let weight = 0;
    let last = steps[0] - 1;
    return values.map((value, i) => {
      const keep = Math.exp(-(steps[i] - last) / span);
      last = steps[i];
      mean = keep * mean + (1 - keep) * value;
      weight = keep * weight + (1 - keep);
      return mean / weight;
    });
  }

  // What is drawn of a curve, one series each: the range that its points stand for, the values themselves, their mean.
  function layers(chart, curve, settings) {
    const span = PER_STEP.includes(chart) || curve.steps.length < 30 ? 0 : settings.smoothing * Math.max(400, curve.steps.at(-1));
    const isThinned = curve.highs.some((high, i) => high !== curve.lows[i]);
    const found = [];
    if (isThinned) found.push({ kind: "high", values: curve.highs }, { kind: "low", values: curve.lows });
    else if (span) found.push({ kind: "raw", values: curve.means });
    found.push({ kind: "mean", values: smoothed(curve.steps, curve.means, span) });
    return found;
  }

  // Names without the folders that they share: loss/validation/step_average is step_average if there is no other.
  function shortNames(names) {
    const folders = names.map((name) => name.split("/").slice(0, -1));
    let shared = 0;
    while (folders.every((folder) => shared < folder.length && folder[shared] === folders[0][shared])) shared += 1;
    return names.map((name) => name.split("/").slice(shared).join("/").replace(/^.*_(t\d+_\d+)/, "$1"));
  }

  function parts(chart, runs, settings) {
    const names = [...new Set(runs.flatMap((run) => run.curves.map((curve) => curve.name)))];
    const short = shortNames(names);
    const found = [];
    for (const run of runs) {
      for (const curve of run.curves) {
        const colour = names.length === 1 ? run.index : names.indexOf(curve.name);
        const name = short[names.indexOf(curve.name)];
        const label = runs.length > 1 ? name + " · " + run.label : name;
        for (const layer of layers(chart, curve, settings)) {
          const key = [chart, run.index, curve.name].join("\n");
          found.push({ ...layer, key, label, steps: curve.steps, colour: colour % COLOURS, second: run.index === 1 });
        }
      }
    }
    return found;
  }

  function lastValue(plot, series, index) {
    const values = plot.data[series];
    for (let i = index ?? values.length - 1; i >= 0; i -= 1) if (values[i] != null) return values[i];
    return null;
  }

  function seriesOf(part, chart) {
    const colour = style("--c" + part.colour);
    const isBehind = part.kind !== "mean";
    return {
      label: part.label,
      show: !hidden.has(part.key),
      class: isBehind ? "layer" : null,
      stroke: part.kind === "raw" ? colour + "55" : isBehind ? "transparent" : colour,
      width: part.kind === "mean" ? 1.75 : 1,
      dash: part.second && !isBehind ? [6, 4] : undefined,
      points: isBehind ? { show: false } : { size: 5, fill: colour },
      value: (plot, value, series, index) => short(lastValue(plot, series, index), chart),
    };
  }

  function mark(plot) {
    if (marked === null) return;
    const { left, top, width, height } = plot.bbox;
    const x = plot.valToPos(marked, "x", true);
    if (x < left || x > left + width) return;
    plot.ctx.save();
    plot.ctx.strokeStyle = style("--soft");
    plot.ctx.setLineDash([2, 4]);
    plot.ctx.beginPath();
    plot.ctx.moveTo(x, top);
    plot.ctx.lineTo(x, top + height);
    plot.ctx.stroke();
    plot.ctx.restore();
  }

  // The range of the y axis over the steps in view. Single values far from the others do not set it, unless asked for:
  // of what is drawn behind a mean, one in twenty on each side may lie outside.
  function range(plot, found, low, high, settings, isLog) {
    if (low === null || high === null) return [null, null];
    const [from, to] = plot.series[0].idxs ?? [0, plot.data[0].length - 1];
    if (!settings.outliers && found.some((part) => part.kind !== "mean")) {
      const limits = found.flatMap((part, i) => {
        const values = plot.series[i + 1].show ? plot.data[i + 1].slice(from, to + 1).filter((value) => value != null) : [];
        values.sort((a, b) => a - b);
        const cut = part.kind === "mean" ? 0 : Math.floor(values.length / 20);
        return values.length ? [values[cut], values[values.length - 1 - cut]] : [];
      });
      if (limits.length) [low, high] = [Math.min(...limits), Math.max(...limits)];
    }
    return isLog ? uPlot.rangeLog(low, high, 10, false) : uPlot.rangeNum(low, high, 0.08, true);
  }

  const size = (figure) => ({ width: Math.max(200, figure.clientWidth), height: innerWidth < 700 ? 190 : 230 });

  function make(chart, figure, found, data, { settings, isLog, onZoom }) {
    const axis = { stroke: style("--soft"), grid: { stroke: style("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    const bands = found.flatMap((part, i) =>
      part.kind === "high" ? [{ series: [i + 1, i + 2], fill: style("--c" + part.colour) + "30" }] : []);
    return new uPlot({
      ...size(figure),
      series: [{ label: "step", value: (plot, value, series, index) => String(lastValue(plot, 0, index) ?? "") },
        ...found.map((part) => seriesOf(part, chart))],
      bands,
      scales: { x: { time: false }, y: { distr: isLog ? 3 : 1, range: (plot, low, high) => range(plot, found, low, high, settings, isLog) } },
      legend: { markers: { width: (plot, i) => (found[i - 1].second ? 2 : 0), fill: (plot, i) => (found[i - 1].second ? "transparent" : style("--c" + found[i - 1].colour)) } },
      axes: [{ ...axis, size: 30 }, { ...axis, size: 62, values: (plot, ticks) => ticks.map((tick) => short(tick, chart)) }],
      cursor: { sync: { key: "steps", setSeries: false }, points: { size: 7 } },
      hooks: {
        draw: [mark],
        setScale: [(plot, key) => key === "x" && onZoom()],
        setSeries: [(plot, index, options) => follow(plot, index, options, found)],
      },
    }, data, figure);
  }

  // A curve is switched on and off with its other layers, and stays so when the chart is made anew.
  function follow(plot, index, options, found) {
    if (index === null || options.show === undefined || found[index - 1].kind !== "mean") return;
    hidden[options.show ? "delete" : "add"](found[index - 1].key);
    for (let i = index - 1; i > 0 && found[i - 1].kind !== "mean"; i -= 1) plot.setSeries(i, { show: options.show }, false);
  }

  const isZoomed = (plot) => {
    const steps = plot.data[0];
    return steps.length > 1 && (plot.scales.x.min > steps[0] || plot.scales.x.max < steps.at(-1));
  };

  const anyZoomed = () => [...plots.values()].some(({ plot }) => isZoomed(plot));

  // Whether a logarithmic scale shows more than a linear one.
  function spansDecades(values) {
    const [least, most] = values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, 0]);
    return least > 0 && most > 5 * least;
  }

  function drawOne(chart, runs, settings, container, onZoom) {
    const found = parts(chart, runs, settings);
    const isLog = settings.log && spansDecades(found.flatMap((part) => part.values));
    const data = found.length > 1 ? uPlot.join(found.map((part) => [part.steps, part.values])) : [found[0].steps, found[0].values];
    const shape = JSON.stringify([isLog, settings.outliers, dark.matches, found.map((part) => [part.label, part.kind, part.colour, part.second])]);
    let known = plots.get(chart);
    const zoom = known && isZoomed(known.plot) ? { min: known.plot.scales.x.min, max: known.plot.scales.x.max } : null;
    if (known && known.shape === shape) {
      known.plot.setData(data, !zoom);
    } else {
      const figure = known ? known.figure : document.createElement("figure");
      if (known) known.plot.destroy();
      else {
        const title = document.createElement("figcaption");
        title.textContent = chart;
        figure.append(title);
        container.append(figure);
        new ResizeObserver(() => plots.get(chart)?.plot.setSize(size(figure))).observe(figure);
      }
      known = { figure, shape, plot: make(chart, figure, found, data, { settings, isLog, onZoom }) };
      plots.set(chart, known);
    }
    if (zoom) known.plot.setScale("x", zoom);
    const bad = runs.flatMap((run) => run.curves).reduce((sum, curve) => sum + curve.not_finite, 0);
    known.figure.querySelector("figcaption").textContent = chart + (bad ? " (" + bad + (bad === 1 ? " value is" : " values are") + " not finite)" : "");
    container.append(known.figure); // in the order of the page
  }

  // `runs`: the shown runs as {index (0, 1), label, charts}; `settings`: smoothing as a share of the run, log, outliers.
  // `place(name)`: the element that a chart belongs to.
  function draw(place, runs, settings, onZoom) {
    const names = [...new Set(runs.flatMap((run) => run.charts.map((chart) => chart.name)))];
    for (const [name, { plot, figure }] of plots) {
      if (names.includes(name)) continue;
      plot.destroy();
      figure.remove();
      plots.delete(name);
    }
    for (const name of names) {
      const curves = (run) => run.charts.find((chart) => chart.name === name)?.curves ?? [];
      drawOne(name, runs.map((run) => ({ ...run, curves: curves(run) })), settings, place(name), onZoom);
    }
  }

  function markStep(step) {
    if (marked === step) return;
    marked = step;
    for (const { plot } of plots.values()) plot.redraw(false);
  }

  function showAll() {
    for (const { plot } of plots.values()) plot.setData(plot.data);
  }

  return { draw, markStep, showAll, anyZoomed, bytes, short, onTheme: (call) => dark.addEventListener("change", call) };
})();
