"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { prompts, letters, page } = data;
  const byId = (id) => document.getElementById(id);
  const audio = byId("audio"), sounds = [...document.querySelectorAll(".sound")];
  const choices = [...document.querySelectorAll("#choice input")], STORE = "musicgen-trainer listening " + page;
  const element = (tag, text, kind) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };
  const name = (text) => element("bdi", text);

  // What is judged, by the places A, B and so on, as it is shown: choice is a place, "none" or null.
  const nothing = () => ({
    session: [...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0")).join(""),
    listener: "", revealed: false,
    judged: prompts.map(() => ({ choice: null, marks: [...letters].map(() => null), note: "" })),
  });
  let state = nothing(), at = 0, last = 0, loaded = null, pressed = "";

  const isMark = (value) => value === null || [1, 2, 3, 4, 5].includes(value);
  const isChoice = (value) => value === null || value === "none" || (Number.isInteger(value) && value >= 0 && value < letters.length);
  const isState = (value) => Boolean(value) && typeof value.session === "string" && typeof value.listener === "string"
    && typeof value.revealed === "boolean" && Array.isArray(value.judged) && value.judged.length === prompts.length
    && value.judged.every((one) => one && isChoice(one.choice) && typeof one.note === "string" && Array.isArray(one.marks)
      && one.marks.length === letters.length && one.marks.every(isMark));

  function warn(text) {
    byId("warning").hidden = false;
    byId("warning").textContent = text;
  }
  function keep() {
    if (pressed) say(""); // a question that was asked before
    try {
      localStorage.setItem(STORE, JSON.stringify(state));
    } catch (error) {
      warn("This browser keeps nothing for a page that is opened from a file. Judging works all the same, but closing or"
        + " reloading the page loses it: save it as a file first.");
    }
  }
  function recall() {
    try {
      const text = localStorage.getItem(STORE), value = text && JSON.parse(text);
      if (isState(value)) state = value;
    } catch (error) { /* keep() says that this browser keeps nothing; a text that is no JSON is written over */ }
    keep();
  }

  // The key: what is behind each place. It is only hidden from a glance.
  let opened = null;
  function key() {
    const bytes = Uint8Array.from(atob(data.key), (sign, n) => sign.charCodeAt(0) ^ page.charCodeAt(n % page.length));
    opened ??= JSON.parse(new TextDecoder().decode(bytes));
    return opened;
  }

  const isJudged = (one) => (data.marks_only ? one.marks.every((mark) => mark !== null) : one.choice !== null);
  const judgedCount = () => state.judged.filter(isJudged).length;
  const clock = (s) => Math.floor(s / 60) + ":" + String(Math.floor(s % 60)).padStart(2, "0");

  function draw() {
    const prompt = prompts[at], judged = state.judged[at];
    byId("count").textContent = judgedCount() + " of " + prompts.length + " judged";
    [...byId("prompts").children].forEach((button, n) => {
      const done = isJudged(state.judged[n]);
      button.className = done ? "done" : "";
      button.setAttribute("aria-label", "Prompt " + (n + 1) + (done ? ", judged" : ""));
      if (n === at) button.setAttribute("aria-current", "step"); else button.removeAttribute("aria-current");
    });
    byId("place").textContent = "Prompt " + (at + 1) + " of " + prompts.length;
    byId("text").textContent = prompt.text || "(no prompt)";
    byId("about").replaceChildren("Seed " + prompt.seed, ...(prompt.clip === null ? []
      : [". All go on from the same first " + prompt.continued + " s of ", name(prompt.clip)]),
      prompt.even ? "" : ". These sounds could not be made equally loud: do not judge by that.");
    sounds.forEach((sound, place) => {
      for (const input of sound.querySelectorAll(".marks input")) {
        input.checked = Number(input.value) === judged.marks[place];
        input.disabled = state.revealed;
      }
      const which = sound.querySelector(".which");
      which.hidden = !state.revealed;
      if (state.revealed) {
        const behind = key().prompts[at][place];
        which.replaceChildren(letters[place] + " is ", name(key().sides[behind.side].name), " ", name(behind.file));
        which.lastChild.className = "soft";
      }
    });
    for (const input of choices) {
      input.checked = input.value === String(judged.choice);
      input.disabled = state.revealed;
    }
    byId("note").value = judged.note;
    byId("note").readOnly = byId("listener").readOnly = state.revealed;
    byId("listener").value = state.listener;
    byId("back").disabled = at === 0;
    byId("next").disabled = at === prompts.length - 1;
    byId("reveal").disabled = state.revealed;
    byId("results").hidden = !state.revealed;
    if (state.revealed) drawResults();
  }

  function go(to) {
    if (to < 0 || to >= prompts.length) return;
    stop();
    at = to;
    last = 0;
    draw();
    byId("prompt").focus({ preventScroll: true });
    if (byId("judge").getBoundingClientRect().top < 0) byId("judge").scrollIntoView();
  }

  // One element plays, so that no two sounds are heard at once.
  function load(place) {
    last = place;
    if (loaded === at + " " + place) return;
    loaded = at + " " + place;
    audio.src = "data:audio/mpeg;base64," + prompts[at].sounds[place];
  }
  function play(place) {
    if (loaded === at + " " + place && !audio.paused) { audio.pause(); return; }
    load(place);
    audio.play().catch(() => {}); // what fails is told by the element's error event
  }
  function stop() {
    audio.pause();
    loaded = null;
    for (const sound of sounds) show(sound, 0, 0);
    drawPlaying();
  }
  function show(sound, seconds, duration) {
    sound.querySelector(".seek").value = duration ? Math.round((1000 * seconds) / duration) : 0;
    sound.querySelector(".time").textContent = clock(seconds);
  }
  function drawPlaying() {
    sounds.forEach((sound, place) => {
      const now = loaded === at + " " + place, plays = now && !audio.paused && !audio.ended;
      sound.classList.toggle("now", plays);
      sound.querySelector(".sign").textContent = plays ? "■\ufe0e" : "▶\ufe0e";
      sound.querySelector(".play").setAttribute("aria-label", (plays ? "Stop " : "Play ") + letters[place]);
      if (!now) show(sound, 0, 0);
    });
  }
  for (const event of ["play", "pause", "ended"]) audio.addEventListener(event, drawPlaying);
  audio.addEventListener("timeupdate", () => { if (loaded) show(sounds[last], audio.currentTime, audio.duration); });
  audio.addEventListener("error", () => { if (loaded) warn("This browser cannot play mp3."); });

  function mark(place, value) {
    if (state.revealed) return;
    state.judged[at].marks[place] = value;
    keep();
    draw();
  }
  function choose(value) {
    if (state.revealed || data.marks_only) return;
    state.judged[at].choice = value;
    keep();
    draw();
  }
  sounds.forEach((sound, place) => {
    sound.querySelector(".play").addEventListener("click", () => play(place));
    sound.querySelector(".seek").addEventListener("input", (event) => {
      const share = event.target.value / 1000, move = () => { audio.currentTime = share * audio.duration; };
      load(place);
      if (audio.readyState > 0) move(); else audio.addEventListener("loadedmetadata", move, { once: true });
    });
    for (const input of sound.querySelectorAll(".marks input")) input.addEventListener("change", () => mark(place, Number(input.value)));
  });
  for (const input of choices) {
    input.addEventListener("change", () => choose(input.value === "none" ? "none" : Number(input.value)));
  }
  byId("note").addEventListener("input", () => { state.judged[at].note = byId("note").value; keep(); });
  byId("listener").addEventListener("input", () => { state.listener = byId("listener").value; keep(); });
  byId("back").addEventListener("click", () => go(at - 1));
  byId("next").addEventListener("click", () => go(at + 1));
  prompts.forEach((_, n) => {
    const button = element("button", String(n + 1));
    button.type = "button";
    button.addEventListener("click", () => go(n));
    byId("prompts").append(button);
  });

  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches?.("textarea, input:not([type=radio]):not([type=range]):not([type=file])");
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const place = event.key.length === 1 ? letters.indexOf(event.key.toUpperCase()) : -1;
    if (place >= 0 && event.shiftKey) choose(place);
    else if (place >= 0) play(place);
    else if (/^[1-5]$/.test(event.key)) mark(last, Number(event.key));
    else if (event.key === "0") choose("none");
    else if (event.key === "n") go(at + 1);
    else if (event.key === "p") go(at - 1);
    else return;
    event.preventDefault();
  });

  // Files. They name sides in clear and in the order of the key, so that files of other orders can be joined.
  function saved() {
    const { sides, prompts: places } = key();
    return {
      format: data.format, version: data.version, page, seed: data.seed, session: state.session, listener: state.listener,
      saved: Date.now() / 1000, revealed: state.revealed, sides,
      judgements: prompts.map((prompt, n) => {
        const one = state.judged[n];
        return {
          prompt: prompt.text, seed: prompt.seed,
          sounds: places[n].map((behind, place) => ({
            shown: letters[place], side: sides[behind.side].name, run: sides[behind.side].run, step: sides[behind.side].step,
            file: behind.file, mark: one.marks[place],
          })),
          choice: one.choice === null ? null : one.choice === "none" ? "no difference" : sides[places[n][one.choice].side].name,
          note: one.note,
        };
      }),
    };
  }
  function restored(file) {
    const { sides, prompts: places } = key();
    return {
      session: file.session, listener: file.listener, revealed: file.revealed,
      judged: file.judgements.map((one, n) => ({
        choice: one.choice === "no difference" ? "none" : one.choice === null ? null
          : places[n].findIndex((behind) => sides[behind.side].name === one.choice),
        marks: one.sounds.map((sound) => sound.mark), note: one.note,
      })),
    };
  }
  byId("save").addEventListener("click", () => {
    const link = element("a"), who = state.listener.replace(/[^\p{L}\p{N}]+/gu, "_").replace(/^_+|_+$/g, "");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(saved(), null, 1)], { type: "application/json" }));
    link.download = "listening_" + (who || state.session.slice(0, 6)) + ".json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    say("Saved as " + link.download + ", where this browser puts downloads.");
  });
  byId("load").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    if (!file) return;
    event.target.value = ""; // so that the same file can be chosen again
    let read = null;
    try {
      const values = JSON.parse(await file.text());
      if (values.format === data.format && values.page !== page) { say("That file is of another listening page."); return; }
      if (values.format === data.format && values.version === data.version) read = restored(values);
    } catch (error) { /* said below: it is no JSON, or lacks what a file of ours has */ }
    if (!isState(read)) { say("That is no file that this page has saved."); return; }
    state = read;
    keep();
    go(0);
    say("Loaded: " + judgedCount() + " of " + prompts.length + " judged.");
  });

  function say(text) { byId("said").textContent = text; pressed = ""; }
  function twice(button, question) {
    if (pressed === button) { say(""); return true; }
    say(question);
    pressed = button;
    return false;
  }
  byId("reveal").addEventListener("click", () => {
    const left = prompts.length - judgedCount();
    if (left && !twice("reveal", left + " of " + prompts.length + " are not judged yet. Press again to reveal all the same.")) return;
    state.revealed = true;
    say("");
    keep();
    draw();
    byId("results").scrollIntoView();
    byId("outcome").focus({ preventScroll: true });
  });
  byId("restart").addEventListener("click", () => {
    if (!twice("restart", "This forgets all that is judged on this page. Press again to do so.")) return;
    state = nothing();
    keep();
    go(0);
    say("All is as it was at first.");
  });

  // The outcome; trainer/report/blind_score.py computes the same of the files of several people.
  function preference(one, places, first, second) {
    const placeOf = (side) => places.findIndex((behind) => behind.side === side);
    const a = placeOf(first), b = placeOf(second);
    if (one.choice === "none") return 0;
    if (one.choice === a) return 1;
    if (one.choice === b) return -1;
    // Without a choice, or where a third sound was chosen, the marks tell.
    return one.marks[a] === null || one.marks[b] === null ? null : Math.sign(one.marks[a] - one.marks[b]);
  }
  function signTest(wins, losses) {
    const n = wins + losses;
    let term = 2 ** -n, sum = 0;
    for (let k = 0; k <= Math.min(wins, losses); k++) { sum += term; term *= (n - k) / (k + 1); }
    return Math.min(1, 2 * sum);
  }
  function meanOf(marks) {
    if (!marks.length) return "";
    const mean = marks.reduce((a, b) => a + b, 0) / marks.length;
    if (marks.length === 1) return mean.toFixed(2);
    const square = marks.reduce((sum, mark) => sum + (mark - mean) ** 2, 0) / (marks.length - 1);
    return mean.toFixed(2) + " ± " + (1.96 * Math.sqrt(square / marks.length)).toFixed(2);
  }
  function row(head, cells) {
    const made = element("tr"), first = element("th");
    first.scope = "row";
    first.append(...head);
    made.append(first, ...cells.map((text) => element("td", String(text), "n")));
    return made;
  }
  function drawResults() {
    const { sides, prompts: places, notes } = key(), pairs = [];
    byId("marks").tBodies[0].replaceChildren(...sides.map((side, n) => {
      const mine = state.judged.map((one, at) => [one, places[at].findIndex((behind) => behind.side === n)]);
      const marks = mine.map(([one, place]) => one.marks[place]).filter((mark) => mark !== null);
      const chosen = mine.filter(([one, place]) => one.choice === place).length;
      return row([name(side.name)], [...(data.marks_only ? [] : [chosen]), marks.length, meanOf(marks)]);
    }));
    sides.forEach((_, a) => { for (let b = a + 1; b < sides.length; b++) pairs.push([a, b]); });
    const counted = pairs.map(([a, b]) => {
      const said = state.judged.map((one, at) => preference(one, places[at], a, b));
      const [wins, losses, ties] = [1, -1, 0].map((value) => said.filter((one) => one === value).length);
      return { a, b, wins, losses, ties, p: wins + losses ? signTest(wins, losses) : null };
    });
    const titles = [...byId("pairs").tHead.rows[0].cells].slice(1).map((cell) => cell.textContent);
    byId("pairs").tBodies[0].replaceChildren(...counted.map((one) => {
      const made = row([name(sides[one.a].name), " against ", name(sides[one.b].name)],
        [one.wins, one.losses, one.ties, one.p === null ? "none" : one.p.toFixed(3)]);
      [...made.cells].slice(1).forEach((cell, n) => { cell.dataset.label = titles[n]; }); // on a phone, without the head
      return made;
    }));
    byId("verdict").replaceChildren(...(counted.length === 1 ? verdict(sides, counted[0]) : []));
    byId("remarks").replaceChildren(...notes.map((note) => element("li", note)));
  }
  function verdict(sides, { a, b, wins, losses, ties, p }) {
    if (p === null) return [ties ? "No difference was heard at any prompt that is judged." : "Nothing was judged."];
    if (wins === losses) return ["Both were better equally often: " + wins + " times each."];
    const [more, most, least] = wins > losses ? [a, wins, losses] : [b, losses, wins];
    return [name(sides[more].name), " was better at " + most + " of " + (wins + losses + ties) + " prompts, the other at " + least + ". "
      + (p < 0.05 ? "That is more than chance explains well (p = " : "Chance alone could give that (p = ") + p.toFixed(3) + ")."];
  }

  byId("main").hidden = false;
  recall();
  draw();
})();
