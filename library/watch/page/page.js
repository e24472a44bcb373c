"use strict";
// All that comes from a run (names, prompts, messages) is set as text, never as markup.
(() => {
  const one = (id) => document.getElementById(id);
  const number = (value) => value.toLocaleString("en-GB");
  const state = { runs: [], shown: [null, null], data: new Map(), step: null, playing: 0, enlarged: null };
  const SILENT = 120; // seconds without an event after which a run that has not ended is said to be silent
  const ENDED = ["finished", "interrupted", "failed"];

  function make(tag, className, ...children) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.append(...children.filter((child) => child !== null));
    return made;
  }

  const isolated = (text) => make("bdi", "", text);

  function time(seconds) {
    if (seconds < 100) return Number(seconds.toPrecision(2)) + " s";
    const minutes = Math.round(seconds / 60);
    if (minutes < 60) return minutes + " min";
    const hours = Math.floor(minutes / 60);
    return hours < 48 ? hours + " h " + (minutes % 60) + " min" : Math.round(hours / 24) + " days";
  }

  // 14:05, or with the date if that is not today.
  function clock(seconds) {
    const at = new Date(seconds * 1000);
    const day = at.toDateString() === new Date().toDateString() ? {} : { day: "numeric", month: "short" };
    return at.toLocaleString("en-GB", { ...day, hour: "2-digit", minute: "2-digit" });
  }

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
    if (!document.hidden) {
      try {
        await fetchRuns();
        const ids = [...new Set(state.shown.filter((id) => id !== null))];
        const changed = await Promise.all(ids.map(fetchRun));
        if (changed.includes(true)) draw();
        else drawHeads();
        one("connection").textContent = "";
        if (shown().some((run) => !ENDED.includes(run.stage))) wait = 2000;
      } catch (error) {
        if (!(error instanceof Unreachable)) throw error;
        one("connection").textContent = "The server does not answer. Is tools/watch.py still running?";
        wait = 5000;
      }
    }
    clearTimeout(update.timer);
    update.timer = setTimeout(update, wait);
  }

  async function fetchRuns() {
    const { runs, first } = await get("runs.json");
    const twice = (name) => runs.filter((run) => run.name === name).length > 1;
    const labelled = runs.map((run) => ({ ...run, label: twice(run.name) ? run.name + " (" + run.folder + ")" : run.name }));
    if (JSON.stringify(labelled) === JSON.stringify(state.runs)) return;
    if (!state.runs.length) state.shown = chosen(runs.length) ?? [first[0], first[1] ?? null];
    state.runs = labelled;
    fillChoice();
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
    if (run.began) add(time((isGoing ? Math.max(run.last, run.now) : run.last) - run.began), isGoing ? "so far" : "in all");
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

  // ---- previews

  const stepsOf = (runs) =>
    [...new Set(runs.flatMap((run) => run.prompts.flatMap((prompt) => [...prompt.images, prompt.so_far ?? []].flatMap(([step]) => step ?? []))))]
      .sort((a, b) => a - b);

  // The last image of a prompt up to a step, also one that is being drawn: [step, key, how far it is], or undefined.
  const imageAt = (prompt, step) => [...(prompt?.images ?? []), ...(prompt?.so_far ? [prompt.so_far] : [])].findLast(([at]) => at <= step);

  // The prompts of a run by what tells them apart in another run too: the text, the version of the weights, and which
  // of several with one text it is.
  function byKey(run) {
    const found = new Map();
    for (const prompt of run.prompts) {
      const version = prompt.name.replace(/^.*?\d+/, "");
      let again = 0;
      const key = () => JSON.stringify([prompt.text, version, again]);
      while (found.has(key())) again += 1;
      found.set(key(), prompt);
    }
    return found;
  }

  // Keys of the prompts of all runs; those that several runs drew come first.
  function promptKeys(maps) {
    const keys = [...new Set(maps.flatMap((map) => [...map.keys()]))];
    const runs = (key) => maps.filter((map) => map.has(key)).length;
    return keys.sort((a, b) => runs(b) - runs(a));
  }

  function drawPreviews() {
    const runs = shown();
    const steps = stepsOf(runs);
    one("previews").hidden = steps.length === 0;
    if (!steps.length) return;
    const slider = one("step");
    slider.max = String(steps.length - 1);
    const last = steps.at(-1);
    const at = state.step === null ? last : steps.findLast((step) => step <= state.step) ?? steps[0];
    slider.value = String(steps.indexOf(at));
    one("step-text").textContent = "step " + number(at);
    slider.setAttribute("aria-valuetext", "step " + at);
    Charts.markStep(state.step === null ? null : at);
    const maps = runs.map(byKey);
    const keys = promptKeys(maps);
    const rows = one("prompts");
    while (rows.children.length > keys.length) rows.lastChild.remove();
    keys.forEach((key, i) => {
      if (!rows.children[i]) rows.append(make("article", "prompt", make("div", "images"), make("p", "text"), make("p", "place")));
      const [images, text, place] = rows.children[i].children;
      const prompt = maps.find((map) => map.has(key)).get(key);
      rows.children[i].dataset.key = key;
      text.replaceChildren(isolated(prompt.text || "no prompt"));
      place.replaceChildren(isolated(prompt.name));
      while (images.children.length > runs.length) images.lastChild.remove();
      runs.forEach((run, j) => {
        if (!images.children[j]) images.append(emptyImage());
        fillImage(images.children[j], run, maps[j].get(key), at);
      });
    });
    if (state.enlarged) drawLarge(at);
  }

  function emptyImage() {
    const image = make("img", "");
    image.alt = "";
    const button = make("button", "image", image, make("span", ""), make("small", ""));
    button.type = "button";
    image.addEventListener("error", () => {
      if (!image.getAttribute("src")) return;
      button.classList.add("gone");
      button.children[1].textContent = "The file is not there any more";
    });
    image.addEventListener("load", () => button.classList.remove("gone"));
    return button;
  }

  function fillImage(button, run, prompt, step) {
    const [image, gone, label] = button.children;
    const found = imageAt(prompt, step);
    button.disabled = !found;
    const source = found ? "runs/" + run.id + "/images/" + found[1] : "";
    label.replaceChildren(...(shown().length > 1 ? [isolated(run.label), " · "] : []), found ? "step " + number(found[0]) + (found[2] ? ", drawing " + found[2] : "") : "");
    button.classList.toggle("older", Boolean(found) && found[0] !== step);
    if (!found) {
      button.classList.add("gone");
      gone.textContent = prompt ? "not drawn yet at this step" : "not drawn by this run";
      image.removeAttribute("src");
    } else if (image.getAttribute("src") !== source) {
      button.classList.remove("gone");
      image.alt = prompt.text;
      image.src = source;
    }
    button.dataset.run = String(run.index);
  }

  // Move by a number of drawn steps; at the last one the page follows the run.
  function move(by) {
    const steps = stepsOf(shown());
    const at = Number(one("step").value) + by;
    const place = Math.max(0, Math.min(steps.length - 1, at));
    state.step = place === steps.length - 1 ? null : steps[place];
    drawPreviews();
    return at === place;
  }

  function play(on) {
    clearInterval(state.playing);
    state.playing = 0;
    one("play").setAttribute("aria-pressed", String(on));
    one("play").textContent = on ? "Stop" : "Play";
    if (!on) return;
    if (state.step === null) move(-1e9);
    state.playing = setInterval(() => move(1) || play(false), 700);
  }

  function drawLarge(at) {
    const maps = shown().map((run) => [run, byKey(run).get(state.enlarged)]);
    const images = maps.map(([run, prompt]) => {
      const button = emptyImage();
      fillImage(button, run, prompt, at);
      return button;
    });
    const text = maps.find(([, prompt]) => prompt)?.[1].text ?? "";
    one("large").firstElementChild.replaceChildren(make("div", "images", ...images), make("p", "text", isolated(text)));
    one("large-step").textContent = "step " + number(at);
  }

  function enlarge(button) {
    state.enlarged = button.closest(".prompt").dataset.key;
    drawPreviews();
    one("large").showModal();
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
    drawPreviews();
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
  one("step").addEventListener("input", () => { play(false); move(0); });
  for (const [id, by] of [["earlier", -1], ["later", 1], ["large-earlier", -1], ["large-later", 1]]) {
    one(id).addEventListener("click", () => { play(false); move(by); });
  }
  one("play").addEventListener("click", () => play(!state.playing));
  one("prompts").addEventListener("click", (event) => {
    const button = event.target.closest("button.image");
    if (button) enlarge(button);
  });
  one("large").addEventListener("close", () => { state.enlarged = null; });
  one("large").addEventListener("click", (event) => event.target === one("large") && one("large").close());
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select") || one("previews").hidden) return;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") move(event.key === "ArrowLeft" ? -1 : 1);
  });
  document.addEventListener("visibilitychange", () => document.hidden || update());
  Charts.onTheme(drawCurves);
  update();
})();
