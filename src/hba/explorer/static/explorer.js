// What the pages cannot do without script: keys, the theme, a playhead over pictures of sound, landmarks over a clip.

const byId = (id) => document.getElementById(id);

// Theme -------------------------------------------------------------------------------------------------------------
byId("theme")?.addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  const next = dark ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  localStorage.setItem("hba-theme", next);
});

// Keys: j and k (or the arrows) move, Enter opens, / searches, r and w decide ----------------------------------------
function move(step) {
  const items = [...document.querySelectorAll("[data-item]")];
  if (!items.length) return false;
  const now = items.indexOf(document.activeElement?.closest?.("[data-item]"));
  const next = items[Math.min(Math.max(now + step, 0), items.length - 1)] ?? items[0];
  next.focus();
  next.scrollIntoView({ block: "nearest" });
  return true;
}

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input:not([type=checkbox]), select, textarea");
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const item = document.activeElement?.closest?.("[data-item]");
  const decide = item?.querySelector(`[data-key="${CSS.escape(event.key)}"]`);
  if (event.key === "j") move(1) && event.preventDefault();
  else if (event.key === "k") move(-1) && event.preventDefault();
  else if (event.key === "/") {
    const search = document.querySelector("input[type=search]");
    if (search) { search.focus(); event.preventDefault(); }
  } else if (event.key === "Enter" && event.target === item) item.querySelector("[data-open]")?.click();
  else if (decide) decide.click();
});

// A filter that changes shows its result at once ---------------------------------------------------------------------
document.addEventListener("change", (event) => {
  if (event.target.matches(".filters select, .filters input[type=checkbox]")) event.target.form.requestSubmit();
});

// Sound: the playhead follows the player of the same figure, a click jumps ---------------------------------------------
function followSound(sound) {
  const player = sound.closest("[data-medium]")?.querySelector("audio, video");
  const head = sound.querySelector(".head"), track = sound.querySelector(".track");
  const seconds = Number(sound.dataset.seconds);
  if (!player || !head || !seconds) return;
  const draw = () => { head.style.left = `${Math.min(100, 100 * player.currentTime / seconds)}%`; };
  player.addEventListener("timeupdate", draw);
  player.addEventListener("seeked", draw);
  track.addEventListener("click", (event) => {
    const box = track.getBoundingClientRect();
    player.currentTime = seconds * (event.clientX - box.left) / box.width;
  });
}

// Pose: landmarks in [0, 1] of the frame, drawn for the time that is shown ---------------------------------------------
async function followPose(canvas) {
  const figure = canvas.closest("[data-medium]"), video = figure.querySelector("video");
  const toggle = figure.querySelector("[data-pose]"), said = figure.querySelector("[data-pose-said]");
  const answer = await fetch(canvas.dataset.landmarks);
  if (!answer.ok || !answer.headers.get("content-type").startsWith("application/json")) {
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const why = page.querySelector(".empty, .note, main p");
    if (said) said.textContent = why?.textContent.trim() ?? "No landmarks.";
    canvas.remove();
    return;
  }
  const { frames: found, rate, total } = await answer.json();
  const draw = () => {
    const width = canvas.width = video.clientWidth, height = canvas.height = video.clientHeight;
    const pen = canvas.getContext("2d");
    pen.clearRect(0, 0, width, height);
    if (!toggle.checked || !video.duration) return;
    // The picture lies centred in the player's box, with bars where the shapes differ.
    const scale = Math.min(width / video.videoWidth, height / video.videoHeight);
    const w = video.videoWidth * scale, h = video.videoHeight * scale;
    pen.fillStyle = "#ff2d75";
    // Frames of a long clip end before it does: nothing is drawn from there on.
    const pace = rate ?? total / video.duration;
    const at = Math.min(Math.floor(pace * video.currentTime), Math.round(pace * video.duration) - 1);
    for (const frames of Object.values(found)) {
      for (const [x, y] of frames[at] ?? []) {
        pen.fillRect((width - w) / 2 + x * w - 1.5, (height - h) / 2 + y * h - 1.5, 3, 3);
      }
    }
  };
  for (const name of ["timeupdate", "seeked", "loadeddata"]) video.addEventListener(name, draw);
  toggle.addEventListener("change", draw);
  addEventListener("resize", draw);
  canvas.dataset.ready = "1";
  draw();
}

// What the browser cannot play as it is stored is asked for once more, made anew for it ---------------------------------
function convert(player) {
  const address = player.getAttribute?.("src") ?? "";
  if (!address.startsWith("/media/")) return;
  player.src = address.replace("/media/", "/picture/playable/");
  byId("said").textContent = "A medium that browsers do not play as it is stored is shown converted; a long one is cut.";
}
document.addEventListener("error", (event) => convert(event.target), true);
// What had failed before this script ran.
for (const player of document.querySelectorAll("audio, video, img")) {
  if (player.error || (player.complete && !player.naturalWidth)) convert(player);
}

const started = new WeakSet();
function start(root) {
  for (const [selector, run] of [["[data-sound]", followSound], ["[data-landmarks]", followPose]]) {
    for (const found of root.querySelectorAll(selector)) {
      if (!started.has(found)) { started.add(found); run(found); }
    }
  }
}
document.addEventListener("htmx:afterSettle", () => start(document));
start(document);

// Say aloud what failed: a request without an answer must not look like a page that waits -------------------------------
for (const name of ["htmx:sendError", "htmx:responseError", "htmx:timeout"]) {
  document.addEventListener(name, (event) => {
    const what = event.detail.xhr?.status ? `The server answered ${event.detail.xhr.status}.` : "The server does not answer.";
    byId("said").textContent = `${what} Reload the page.`;
    event.detail.elt?.removeAttribute("aria-busy");
  });
}
