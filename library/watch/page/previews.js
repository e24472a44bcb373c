"use strict";
// The previews: the newest image of each prompt up to a step, and a slider over the steps. Prompts are set as text, never
// as markup.
const Previews = (() => {
  const { one, number, make, isolated } = Elements;
  let runs = []; // those that are shown
  let chosen = null; // the step whose images are shown; null: the last one, also once there is a later one
  let playing = 0; // the timer that goes from step to step; 0: none
  let enlarged = null; // the key of the prompt that is shown large

  // Show the previews of these runs.
  function draw(shown) {
    runs = shown;
    show();
  }

  const drawnSteps = () =>
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

  function show() {
    const steps = drawnSteps();
    one("previews").hidden = steps.length === 0;
    if (!steps.length) return;
    const slider = one("step");
    slider.max = String(steps.length - 1);
    const last = steps.at(-1);
    const at = chosen === null ? last : steps.findLast((step) => step <= chosen) ?? steps[0];
    slider.value = String(steps.indexOf(at));
    one("step-text").textContent = "step " + number(at);
    slider.setAttribute("aria-valuetext", "step " + at);
    Charts.markStep(chosen === null ? null : at);
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
    if (enlarged) drawLarge(at);
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
    label.replaceChildren(...(runs.length > 1 ? [isolated(run.label), found ? " · " : ""] : []), found ? "step " + number(found[0]) + (found[2] ? ", drawing " + found[2] : "") : "");
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
    const steps = drawnSteps();
    const at = Number(one("step").value) + by;
    const place = Math.max(0, Math.min(steps.length - 1, at));
    chosen = place === steps.length - 1 ? null : steps[place];
    show();
    return at === place;
  }

  function play(on) {
    clearInterval(playing);
    playing = 0;
    one("play").setAttribute("aria-pressed", String(on));
    one("play").textContent = on ? "Stop" : "Play";
    if (!on) return;
    if (chosen === null) move(-1e9);
    playing = setInterval(() => move(1) || play(false), 700);
  }

  function drawLarge(at) {
    const maps = runs.map((run) => [run, byKey(run).get(enlarged)]);
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
    enlarged = button.closest(".prompt").dataset.key;
    show();
    one("large").showModal();
  }

  // ---- what the user does

  one("step").addEventListener("input", () => { play(false); move(0); });
  for (const [id, by] of [["earlier", -1], ["later", 1], ["large-earlier", -1], ["large-later", 1]]) {
    one(id).addEventListener("click", () => { play(false); move(by); });
  }
  one("play").addEventListener("click", () => play(!playing));
  one("prompts").addEventListener("click", (event) => {
    const button = event.target.closest("button.image");
    if (button) enlarge(button);
  });
  one("large").addEventListener("close", () => { enlarged = null; });
  one("large").addEventListener("click", (event) => event.target === one("large") && one("large").close());
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select") || one("previews").hidden) return;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") move(event.key === "ArrowLeft" ? -1 : 1);
  });

  return { draw };
})();
