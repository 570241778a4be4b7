"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const rows = data.rows.map((values) => Object.fromEntries(data.columns.map((name, at) => [name, values[at]])));
  const PAGE = 50;
  const rate = (hz) => (hz === null ? "" : (hz / 1000).toLocaleString("en", { maximumFractionDigits: 3 }) + " kHz");
  const seconds = (s) => (s === null ? "" : s < 60 ? s.toFixed(2) + " s"
    : Math.floor(s / 60) + ":" + String(Math.floor(s % 60)).padStart(2, "0"));
  const lufs = (loudness) => (loudness === null ? "" : loudness.toFixed(1) + " LUFS");
  const columns = [
    { name: "path", title: "File" },
    { name: "fate", title: "Fate", text: (row) => (row.use === "validation" ? "used to validate" : row.fate) },
    { name: "detail", title: "Remark" },
    { name: "caption", title: "Caption" },
    { name: "seconds", title: "Length", number: true, text: (row) => seconds(row.seconds) },
    { name: "sample_rate_hz", title: "Rate", number: true, text: (row) => rate(row.sample_rate_hz) },
    { name: "channels", title: "Channels", number: true, text: (row) => row.channels ?? "" },
    { name: "format", title: "Format" },
    { name: "loudness_lufs", title: "Loudness", number: true, text: (row) => lufs(row.loudness_lufs) },
    { name: "treated_lufs", title: "Treated", number: true, text: (row) => lufs(row.treated_lufs) },
    { name: "near", title: "Equal sounds", number: true, text: (row) => (row.near === null ? "" : "group " + row.near) },
    { name: "source", title: "Caption from" },
  ].filter((column) => column.name === "path" || rows.some((row) => row[column.name] !== null && row[column.name] !== ""));

  const byId = (id) => document.getElementById(id);
  const head = document.querySelector("#table thead tr"), body = document.querySelector("#table tbody");
  const audio = byId("audio"), search = byId("search"), show = byId("show");
  let shown = rows, place = 0, sorted = { name: "", down: false }, playing = null;

  const element = (tag, text, kind) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };
  const textOf = (column, row) => String(column.text ? column.text(row) : row[column.name] ?? "");
  const canPlay = (row) => Boolean(data.excerpts[row.path] || row.link);
  const searched = rows.map((row) => [row.path, row.caption, row.detail, row.source, row.unknown.join(" ")].join("\n").toLowerCase());
  rows.forEach((row, at) => { row.at = at; });

  function fits(row, wanted) {
    if (wanted === "") return true;
    if (wanted === "used") return row.use !== "";
    if (wanted === "left out") return row.use === "";
    if (wanted === "validation") return row.use === "validation";
    return wanted.startsWith("fate:") ? row.fate === wanted.slice(5) : row.marks.includes(wanted);
  }

  const language = new Intl.Collator("en", { numeric: true });
  function compare(one, other) {
    const a = one[sorted.name], b = other[sorted.name];
    const noA = a === null || a === "", noB = b === null || b === "";
    if (noA || noB) return noA - noB || one.at - other.at; // what is not known comes last in both directions
    const order = typeof a === "number" ? a - b : language.compare(a, b);
    return (sorted.down ? -order : order) || one.at - other.at;
  }

  function update() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean), wanted = show.value;
    shown = rows.filter((row) => fits(row, wanted) && words.every((word) => searched[row.at].includes(word)));
    if (sorted.name) shown.sort(compare);
    place = 0;
    draw();
  }

  function draw() {
    for (const cell of head.querySelectorAll("th[data-name]")) {
      if (cell.dataset.name === sorted.name) cell.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
      cell.querySelector("span").textContent = cell.dataset.name === sorted.name ? (sorted.down ? " ▼" : " ▲") : "";
    }
    body.replaceChildren(...shown.slice(place, place + PAGE).map(line));
    const end = Math.min(place + PAGE, shown.length);
    byId("count").textContent = shown.length.toLocaleString("en") + " of " + rows.length.toLocaleString("en") + " files";
    byId("place").textContent = shown.length ? (place + 1).toLocaleString("en") + " to " + end.toLocaleString("en") : "none";
    byId("before").disabled = place === 0;
    byId("after").disabled = end >= shown.length;
  }

  function line(row) {
    const made = element("tr");
    made.dataset.at = row.at;
    if (row === playing) made.className = "now";
    const first = element("td");
    if (canPlay(row)) {
      const odd = row.unplayed && !data.excerpts[row.path];
      const button = element("button", "▶\ufe0e", odd ? "play odd" : "play");
      button.type = "button";
      button.setAttribute("aria-label", "Play " + row.path);
      if (odd) button.title = row.unplayed;
      button.addEventListener("click", () => play(row));
      first.append(button);
    }
    made.append(first);
    for (const column of columns) {
      const cell = element("td", undefined, column.name + (column.number ? " n" : ""));
      const text = textOf(column, row);
      if (text) cell.append(element("bdi", text));
      if (column.name === "path" && row.unplayed) cell.append(element("div", row.unplayed, "soft"));
      if (text && !["path", "caption"].includes(column.name)) cell.dataset.label = column.title;
      made.append(cell);
    }
    return made;
  }

  function play(row) {
    playing = row;
    byId("player").hidden = false;
    const excerpt = data.excerpts[row.path];
    audio.src = excerpt ? "data:audio/mpeg;base64," + excerpt[1] : row.link;
    byId("playing").replaceChildren(element("bdi", row.path), document.createTextNode(
      (excerpt ? " (excerpt from " + seconds(excerpt[0]) + " on)" : "") + (row.caption ? ": " : "")), element("bdi", row.caption ?? ""));
    audio.play().catch(() => {}); // what fails is told by the element's error event
    for (const other of body.children) other.className = Number(other.dataset.at) === row.at ? "now" : "";
  }

  function step(by) {
    let at = shown.indexOf(playing) + by;
    while (at >= 0 && at < shown.length && !canPlay(shown[at])) at += by;
    if (at < 0 || at >= shown.length) return;
    play(shown[at]);
    const page = Math.floor(at / PAGE) * PAGE;
    if (page !== place) { place = page; draw(); }
  }

  audio.addEventListener("error", () => {
    if (!playing) return;
    const why = playing.unplayed && !data.excerpts[playing.path] ? playing.unplayed
      : "the browser cannot open it: is the file still where it was when this page was written?";
    byId("playing").replaceChildren(element("bdi", playing.path), document.createTextNode(": " + why));
  });
  audio.addEventListener("ended", () => step(1));
  byId("last").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("before").addEventListener("click", () => { place = Math.max(0, place - PAGE); draw(); });
  byId("after").addEventListener("click", () => { if (place + PAGE < shown.length) place += PAGE; draw(); });
  search.addEventListener("input", update);
  show.addEventListener("change", update);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  body.addEventListener("keydown", (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!by || !event.target.classList.contains("play")) return;
    const buttons = [...body.querySelectorAll(".play")];
    const goal = buttons[buttons.indexOf(event.target) + by];
    if (goal) { goal.focus(); event.preventDefault(); }
  });
  for (const button of document.querySelectorAll("button[data-show]")) {
    button.addEventListener("click", () => {
      show.value = button.dataset.show;
      search.value = "";
      update();
      byId("files").scrollIntoView();
      show.focus({ preventScroll: true });
    });
  }

  head.append(element("td"));
  for (const column of columns) {
    const cell = element("th"), button = element("button", column.title);
    cell.dataset.name = column.name;
    cell.scope = "col";
    button.type = "button";
    button.append(element("span"));
    button.addEventListener("click", () => {
      sorted = { name: column.name, down: sorted.name === column.name && !sorted.down };
      update();
    });
    cell.append(button);
    head.append(cell);
  }
  update();
})();
