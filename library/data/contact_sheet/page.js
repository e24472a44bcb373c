"use strict";
(() => {
  const one = (selector, within = document) => within.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const body = document.body;
  const cards = all(".card");
  const sections = all("section.bucket");
  const fields = { bucket: one("#bucket"), subset: one("#subset"), flag: one("#flag") };
  const find = one("#find");
  const large = one("#large");
  const number = (value) => value.toLocaleString("en-GB");
  const plain = (text) => text.normalize("NFC").toLowerCase();
  let texts = null; // searchable text per card, built on first use
  let matching = cards;
  let current = 0; // index in `matching` of the enlarged image

  document.documentElement.classList.add("js");
  const bar = one("form.bar");
  new ResizeObserver(() => document.documentElement.style.setProperty("--bar", bar.offsetHeight + "px")).observe(bar);

  const textOf = (card) =>
    plain(one(".folder", card).title + "\n" + all(".words", card).map((words) => words.textContent).join("\n"));

  function filter() {
    const words = plain(find.value).split(/\s+/).filter(Boolean);
    if (words.length && !texts) texts = new Map(cards.map((card) => [card, textOf(card)]));
    const value = (name) => (fields[name] ? fields[name].value : "");
    const [bucket, subset, flag] = [value("bucket"), value("subset"), value("flag")];
    matching = [];
    for (const section of sections) {
      const right = !bucket || section.dataset.bucket === bucket;
      const inside = all(".card", section);
      let count = 0;
      for (const card of inside) {
        const data = card.dataset;
        const shown =
          right &&
          (!subset || data.subset === subset) &&
          (!flag || data.kind === flag || data.flags.split(" ").includes(flag)) &&
          words.every((word) => texts.get(card).includes(word));
        card.hidden = !shown;
        if (shown) {
          matching.push(card);
          count += 1;
        }
      }
      section.hidden = count === 0;
      one(".matching", section).textContent = count < inside.length ? number(count) + " match" : "";
    }
    const active = Boolean(words.length || bucket || subset || flag);
    one("#status").textContent =
      (active ? number(matching.length) + " of " : "") + number(cards.length) + (cards.length === 1 ? " image" : " images");
    one("#clear").hidden = !active;
    one("#nothing").hidden = matching.length > 0 || cards.length === 0;
    for (const row of all("[data-go=bucket]")) row.setAttribute("aria-pressed", String(row.dataset.value === bucket));
  }

  function clear() {
    find.value = "";
    for (const field of Object.values(fields)) if (field) field.value = "";
    filter();
  }

  function press(button, name) {
    if (button) button.setAttribute("aria-pressed", String(body.classList.toggle(name)));
  }

  function go(button) {
    const field = fields[button.dataset.go];
    const again = field && field.value === button.dataset.value;
    clear();
    if (!field) return;
    field.value = again && button.dataset.go === "bucket" ? "" : button.dataset.value;
    filter();
    one("#sheets").scrollIntoView();
  }

  function show(place) {
    current = (place + matching.length) % matching.length;
    const card = matching[current];
    const copy = card.cloneNode(true);
    copy.removeAttribute("id");
    const [width, height] = card.closest("section").dataset.bucket.split("x");
    copy.style.setProperty("--r", Number(width) / Number(height));
    const image = one(".image", copy);
    const still = document.createElement("div"); // not a button inside the dialog
    still.className = image.className;
    still.append(...image.childNodes);
    image.replaceWith(still);
    one(".holder", large).replaceChildren(copy);
    one("#place").textContent = number(current + 1) + " of " + number(matching.length);
    if (!large.open) large.showModal();
  }

  function back() {
    const image = one(".image", matching[current]);
    image.scrollIntoView({ block: "nearest" });
    image.focus();
  }

  // index of the image that an arrow key moves to: the next one sideways, the nearest in the row above or below
  function beside(place, key) {
    if (key === "ArrowLeft") return place - 1;
    if (key === "ArrowRight") return place + 1;
    const from = matching[place].getBoundingClientRect();
    const way = key === "ArrowDown" ? 1 : -1;
    let row = null;
    let best = -1;
    for (let next = place + way; next >= 0 && next < matching.length; next += way) {
      const to = matching[next].getBoundingClientRect();
      if (Math.abs(to.top - from.top) < 2) continue;
      if (row === null) row = to.top;
      if (Math.abs(to.top - row) > 2) break;
      const far = (rectangle) => Math.abs(rectangle.left - from.left);
      if (best < 0 || far(to) < far(matching[best].getBoundingClientRect())) best = next;
    }
    return best;
  }

  function typed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key;
    const writing = event.target.matches("input, select");
    if (large.open) {
      if (key === "ArrowLeft" || key === "ArrowRight") show(current + (key === "ArrowLeft" ? -1 : 1));
      else if (key === "m") press(one("#masks"), "masks");
      return;
    }
    if (key === "Escape" && event.target === find) {
      find.value = "";
      filter();
      find.blur();
    } else if (writing) {
      return;
    } else if (key === "/") {
      event.preventDefault();
      find.focus();
      find.select();
    } else if (key === "m") press(one("#masks"), "masks");
    else if (key === "v") press(one("#dense"), "dense");
    else if (key.startsWith("Arrow")) {
      const place = matching.indexOf(event.target.closest(".card"));
      const next = place < 0 ? -1 : beside(place, key);
      if (place < 0) return;
      event.preventDefault();
      if (next >= 0 && next < matching.length) one(".image", matching[next]).focus();
    }
  }

  let waiting = 0;
  find.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, 120);
  });
  for (const field of Object.values(fields)) if (field) field.addEventListener("change", filter);
  bar.addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("keydown", typed);
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    const link = event.target.closest("a[href^='#p']");
    if (link) clear(); // the linked card may be filtered out
    if (event.target === large) large.close();
    if (!button) return;
    if (button.dataset.go) go(button);
    else if (button.classList.contains("image")) show(matching.indexOf(button.closest(".card")));
    else if (button.id === "clear") clear();
    else if (button.id === "masks" || button.id === "dense") press(button, button.id);
    else if (button.id === "previous" || button.id === "next") show(current + (button.id === "next" ? 1 : -1));
  });
  large.addEventListener("close", back);
  filter();
})();
