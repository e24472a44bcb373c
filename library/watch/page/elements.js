"use strict";
// Elements of the page, and how numbers and times read.
const Elements = (() => {
  const one = (id) => document.getElementById(id);
  const number = (value) => value.toLocaleString("en-GB");

  // A <tag class=…> of children: elements, and text that is only ever text. A child that is null is left out.
  function make(tag, className, ...children) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.append(...children.filter((child) => child !== null));
    return made;
  }

  // Text of a run, whose direction of writing does not change that of what is around it.
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

  return { one, number, make, isolated, time, clock };
})();
