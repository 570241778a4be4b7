"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const element = (tag, text, kind) => {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
};
const count = (value) => value.toLocaleString("en");
(() => {
  const minutes = Math.round((Date.now() / 1000 - data.written) / 60);
  const written = document.getElementById("written");
  if (minutes > 2) written.append(" That was " + (minutes < 120 ? count(minutes) + " minutes" : minutes < 2880 ? count(Math.round(minutes / 60)) + " hours"
    : count(Math.round(minutes / 1440)) + " days") + " ago.");
})();
