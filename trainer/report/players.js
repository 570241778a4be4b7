(() => {
  const audio = document.getElementById("audio"), grid = document.getElementById("grid");
  if (!grid) return;
  const rows = [...grid.tBodies].map((body) => [...body.rows[1].cells].map((cell) => cell.querySelector(".sound")));
  const titles = [...grid.tHead.rows[0].cells].map((cell) => cell.querySelector("bdi").textContent);
  const prompts = [...grid.tBodies].map((body) => body.querySelector(".prompt bdi, .prompt em").textContent);
  const places = new Map();
  rows.forEach((row, r) => row.forEach((sound, c) => { if (sound) places.set(sound, [r, c]); }));
  let playing = null;

  function say(text) {
    const [r, c] = places.get(playing);
    document.getElementById("playing").replaceChildren(element("bdi", titles[c]), ": ", element("bdi", prompts[r]), text);
  }
  function load(sound) {
    if (playing === sound) return;
    if (playing) {
      playing.classList.remove("now", "on");
      playing.querySelector(".wave").style.removeProperty("--at");
    }
    playing = sound;
    sound.classList.add("now");
    const made = data.sounds[sound.dataset.sound];
    audio.src = made.mp3 ? "data:audio/mpeg;base64," + made.mp3 : made.link;
    document.getElementById("player").hidden = false;
    say("");
  }
  function start() {
    audio.play().catch(() => {}); // what fails is told by the element's error event
  }
  function toggle(sound) {
    const other = playing !== sound;
    load(sound);
    if (other || audio.paused) start(); else audio.pause();
  }
  function seek(sound, share) {
    load(sound);
    const go = () => { if (Number.isFinite(audio.duration)) audio.currentTime = share * audio.duration; start(); };
    if (audio.readyState >= 1) go(); else audio.addEventListener("loadedmetadata", () => { if (playing === sound) go(); }, { once: true });
  }
  for (const sound of places.keys()) {
    sound.querySelector(".play").addEventListener("click", () => toggle(sound));
    sound.querySelector(".wave").addEventListener("click", (event) => {
      const box = event.currentTarget.getBoundingClientRect();
      sound.querySelector(".play").focus({ preventScroll: true });
      seek(sound, (event.clientX - box.left) / box.width);
    });
  }

  let frame = 0;
  function follow() {
    if (playing && audio.duration > 0) playing.querySelector(".wave").style.setProperty("--at", 100 * audio.currentTime / audio.duration + "%");
    frame = audio.paused ? 0 : requestAnimationFrame(follow);
  }
  for (const kind of ["play", "pause", "ended", "seeked"]) {
    audio.addEventListener(kind, () => {
      playing?.classList.toggle("on", !audio.paused && !audio.ended);
      if (!frame) follow();
    });
  }
  audio.addEventListener("error", () => {
    if (!playing) return;
    playing.classList.remove("on");
    say(" (the browser cannot open it: this page plays linked sounds from samples/ beside the place where it was written)");
  });

  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  grid.addEventListener("keydown", (event) => {
    const move = moves[event.key], here = event.target.closest(".sound");
    if (!move || !here || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    let [r, c] = places.get(here);
    do { r += move[0]; c += move[1]; } while (rows[r] && c >= 0 && c < rows[r].length && !rows[r][c]);
    const goal = rows[r]?.[c];
    if (!goal) return;
    goal.querySelector(".play").focus({ preventScroll: true });
    const box = goal.closest("td"), view = document.getElementById("scroll");
    const fixed = grid.querySelector("thead .fixed")?.offsetWidth ?? 0;
    if (!box.classList.contains("fixed")) {
      if (box.offsetLeft < view.scrollLeft + fixed) view.scrollLeft = box.offsetLeft - fixed;
      if (box.offsetLeft + box.offsetWidth > view.scrollLeft + view.clientWidth) view.scrollLeft = box.offsetLeft + box.offsetWidth - view.clientWidth;
    }
    goal.scrollIntoView({ block: "nearest", inline: "nearest" });
  });
  document.addEventListener("keydown", (event) => { // a button that has the focus hears it by itself
    if (event.key !== " " || event.target.closest("button, input, select, audio, summary, a")) return;
    event.preventDefault();
    const sound = playing ?? places.keys().next().value;
    if (sound) toggle(sound);
  });
  const view = document.getElementById("scroll");
  if (data.newest_last) view.scrollLeft = view.scrollWidth; // the newest beside the base model, which stays in view
})();
