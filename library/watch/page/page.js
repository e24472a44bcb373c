"use strict";
// All that comes from a run (names, prompts, messages) is set as text, never as markup.
(() => {
  const { one, number, make, isolated, time, clock } = Elements;
  const state = { runs: [], shown: [null, null], data: new Map() };
  const SILENT = 120; // seconds without an event after which a run that has not ended is said to be silent
  const ENDED = ["finished", "interrupted", "failed"];

  const shown = () =>
    state.shown.flatMap((id, index) => {
      const data = id === null ? undefined : state.data.get(id);
      return data ? [{ ...data, id, index, label: state.runs[id].label }] : [];
    });

  // ---- fetching

  class Unreachable extends Error {}

  async function get(path) {
    const answer = await fetch(path, { cache: "no-store" }).catch(() => null);
    if (!answer?.ok) throw new Unreachable(path);
    return answer.json();
  }

  async function update() {
    clearTimeout(update.timer);
    let wait = 15000;
    try {
      if (!document.hidden) {
        await fetchRuns();
        const ids = [...new Set(state.shown.filter((id) => id !== null))];
        const changed = await Promise.all(ids.map(fetchRun));
        if (changed.includes(true)) draw();
        else drawHeads();
        one("connection").textContent = "";
        if (shown().some((run) => !ENDED.includes(run.stage))) wait = 2000;
      }
    } catch (error) {
      if (!(error instanceof Unreachable)) throw error;
      one("connection").textContent = "The server does not answer. Is tools/watch.py still running?";
      wait = 5000;
    } finally {
      clearTimeout(update.timer);
      update.timer = setTimeout(update, wait);
    }
  }

  async function fetchRuns() {
    const { runs, first } = await get("runs.json");
    const labelled = runs.map((run) => {
      const others = runs.filter((other) => other !== run && other.name === run.name);
      return { ...run, label: others.length ? run.name + " (" + ownPart(run.folder, others.map((other) => other.folder)) + ")" : run.name };
    });
    if (JSON.stringify(labelled) === JSON.stringify(state.runs)) return;
    const isThere = state.shown[0] !== null && state.shown.every((id) => id === null || id < runs.length);
    if (!isThere) state.shown = chosen(runs.length) ?? [first[0] ?? 0, first[1] ?? null]; // also if the server has begun anew
    state.runs = labelled;
    fillChoice();
  }

  // A folder without the parts that it begins with like all the others.
  function ownPart(folder, others) {
    const [parts, ...rest] = [folder, ...others].map((each) => each.split(/[\\/]/));
    let shared = 0;
    while (shared < parts.length - 1 && rest.every((other) => other[shared] === parts[shared])) shared += 1;
    return parts.slice(shared).join("/");
  }

  // The choice in the address, so that it survives a reload.
  function chosen(count) {
    const found = /^#(\d+)(?:,(\d+))?$/.exec(location.hash);
    const ids = found && [Number(found[1]), found[2] === undefined ? null : Number(found[2])];
    return ids && ids.every((id) => id === null || id < count) ? ids : null;
  }

  function fillChoice() {
    state.shown.forEach((id, index) => {
      const options = state.runs.map((run, i) => new Option(run.label, String(i)));
      if (index === 1) options.unshift(new Option("none", ""));
      const select = one(index ? "run-b" : "run-a");
      select.replaceChildren(...options);
      select.value = id === null ? "" : String(id);
    });
    one("choice").hidden = state.runs.length < 2;
  }

  // Whether there was something new.
  async function fetchRun(id) {
    const known = state.data.get(id);
    const answer = await get("runs/" + id + ".json?version=" + (known?.version ?? ""));
    const isNew = answer.version !== known?.version;
    if (isNew) state.data.set(id, answer);
    else known.now = answer.now;
    return isNew;
  }

  function choose(index, value) {
    state.shown[index] = value === "" ? null : Number(value);
    history.replaceState(null, "", "#" + state.shown.filter((id) => id !== null).join(","));
    draw();
    update();
  }

  // ---- where the runs are

  function stageOf(run) {
    if (ENDED.includes(run.stage)) return [run.stage, run.stage];
    if (!run.stage) return ["", "no events yet"];
    const silent = run.now - run.last;
    if (silent > Math.max(SILENT, 10 * (run.status.seconds_per_step ?? 0))) return ["silent", "nothing new for " + time(silent)];
    return ["going", run.step ? "training" : "starting"];
  }

  function tiles(run) {
    const { status } = run;
    const found = [];
    const add = (value, name) => found.push(make("li", "", make("b", "", value), " " + name));
    const isGoing = stageOf(run)[0] === "going";
    if (status.remaining_seconds !== undefined && isGoing) {
      add(time(status.remaining_seconds), "left, until " + clock(run.last + status.remaining_seconds));
    }
    const seconds = (isGoing ? Math.max(run.last, run.now) : run.last) - run.began;
    if (run.began && seconds >= 0) add(time(seconds), isGoing ? "so far" : "in all"); // less than 0: the clock was set back
    if (status.seconds_per_step !== undefined) add(time(status.seconds_per_step), "per step");
    if (status.loss !== undefined) add(Charts.short(status.loss, "loss"), "loss");
    if (status.epoch !== undefined) add("epoch " + number(status.epoch), run.epochs ? "of " + number(run.epochs) : "");
    if (status.memory_bytes !== undefined) add(Charts.bytes(status.memory_bytes), "memory");
    if (status.gpu_memory_bytes !== undefined) add(Charts.bytes(status.gpu_memory_bytes), "GPU memory");
    return make("ul", "tiles", ...found);
  }

  function head(run) {
    const [kind, words] = stageOf(run);
    const title = make("h1", "", isolated(run.name), make("span", "stage " + kind, words));
    const bar = make("progress", "");
    bar.max = run.steps || 1;
    bar.value = Math.min(run.step, bar.max);
    const said = run.messages.at(-1)?.[2] ?? "";
    const steps = "step " + number(run.step) + (run.steps ? " of " + number(run.steps) : "");
    const lines = run.ending ? [make("li", run.stage === "failed" ? "bad" : "warn", isolated(run.ending))] : [];
    if (run.problem) lines.push(make("li", "bad", isolated(run.problem)));
    if (run.damaged) lines.push(make("li", "warn", number(run.damaged) + " damaged lines of the record are left out"));
    lines.push(...run.warnings.map(([, text]) => make("li", "warn", isolated(text))).reverse());
    lines.push(...run.notes.map((note) => make("li", "warn", isolated(note))));
    return make("article", "run r" + run.index, title, make("p", "where", isolated(run.record)), bar, make("p", "steps-done", steps, make("span", "said", isolated(said))),
      tiles(run), lines.length ? make("ul", "notes", ...lines) : null);
  }

  function drawHeads() {
    const runs = shown();
    document.body.classList.toggle("two", runs.length > 1);
    one("runs").replaceChildren(...runs.map(head));
    document.title = runs.map((run) => (run.steps ? Math.floor((100 * run.step) / run.steps) + " % " : "") + run.name).join(" | ") || "Dreamfolder";
  }

  // ---- curves

  const settings = () => ({ smoothing: Number(one("smoothing").value) / 100, log: one("log").checked, outliers: one("outliers").checked });

  function drawCurves() {
    const runs = shown();
    one("curves").hidden = !runs.some((run) => run.charts.length);
    const isByTimestep = (name) => name.endsWith(" by timestep");
    one("by-timestep").hidden = !runs.some((run) => run.charts.some((chart) => isByTimestep(chart.name)));
    const place = (name) => one(isByTimestep(name) ? "more-charts" : "charts");
    Charts.draw(place, runs, settings(), () => {
      requestAnimationFrame(() => { one("whole").hidden = !Charts.anyZoomed(); });
    });
  }

  // ---- texts

  function folded(title, count, content, isOpen) {
    const made = make("details", "", make("summary", "", title, count ? make("small", "", " " + count) : null), content);
    made.open = isOpen;
    made.dataset.title = title;
    return made;
  }

  function table(rows) {
    return make("div", "scroll", make("table", "", ...rows.map((cells) => make("tr", cells.className ?? "", ...cells.map((cell) => make("td", "", isolated(cell)))))));
  }

  function planRows(plan) {
    return plan.map(([title, line], i) => [i && plan[i - 1][0] === title ? "" : title, line]);
  }

  function optionRows(run, other) {
    const names = Object.keys(run.options);
    const missing = other ? Object.keys(other.options).filter((name) => !names.includes(name)) : [];
    const differs = (name) => other && run.options[name] !== other.options[name];
    const rows = [...names, ...missing].map((name) => Object.assign(["--" + name, run.options[name] ?? "not given"], { className: differs(name) ? "differs" : "" }));
    return rows.sort((a, b) => Number(b.className === "differs") - Number(a.className === "differs") || (a[0] < b[0] ? -1 : 1));
  }

  function texts(run, runs, open) {
    const other = runs.find((each) => each !== run);
    const options = optionRows(run, other);
    const differing = options.filter((row) => row.className === "differs").length;
    const files = run.checkpoints.map((saved) => ["step " + number(saved.step), saved.path, saved.bytes ? Charts.bytes(saved.bytes) : ""]);
    const messages = run.messages.map(([step, at, text]) => [clock(at), "step " + number(step), text]);
    const earlier = run.earlier_messages ? "(the last " + number(messages.length) + ")" : number(messages.length);
    const isOpen = (title, otherwise) => open.get(run.index + title) ?? otherwise;
    return make("article", "r" + run.index,
      runs.length > 1 ? make("h2", "", isolated(run.label)) : null,
      folded("Plan", "", table(planRows(run.plan)), isOpen("Plan", false)),
      folded("Options", other && differing ? number(differing) + " differ" : number(options.length), table(options), isOpen("Options", Boolean(other && differing))),
      folded("Saved", number(files.length), table(files), isOpen("Saved", false)),
      folded("Messages", earlier, table(messages.reverse()), isOpen("Messages", false)));
  }

  function drawTexts() {
    const open = new Map();
    const scrolled = new Map();
    for (const article of one("texts").children) {
      for (const details of article.querySelectorAll("details")) {
        const key = article.className.slice(1) + details.dataset.title;
        open.set(key, details.open);
        scrolled.set(key, details.querySelector(".scroll").scrollTop);
      }
    }
    const runs = shown();
    one("texts").replaceChildren(...runs.map((run) => texts(run, runs, open)));
    for (const article of one("texts").children) {
      for (const details of article.querySelectorAll("details")) {
        details.querySelector(".scroll").scrollTop = scrolled.get(article.className.slice(1) + details.dataset.title) ?? 0;
      }
    }
  }

  function draw() {
    drawHeads();
    drawCurves();
    Previews.draw(shown());
    drawTexts();
  }

  // ---- what the user does

  one("run-a").addEventListener("change", (event) => choose(0, event.target.value));
  one("run-b").addEventListener("change", (event) => choose(1, event.target.value));
  one("choice").addEventListener("submit", (event) => event.preventDefault());
  one("smoothing").addEventListener("input", drawCurves);
  one("log").addEventListener("change", drawCurves);
  one("outliers").addEventListener("change", drawCurves);
  one("whole").addEventListener("click", Charts.showAll);
  document.addEventListener("visibilitychange", () => document.hidden || update());
  Charts.onTheme(drawCurves);
  update();
})();
