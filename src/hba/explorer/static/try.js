// The Try page: clips are dropped, chosen or recorded, go to this server alone, are asked about and labelled, one by one.

const at = (id) => document.getElementById(id);
const say = (text) => { at("state").textContent = text; };
let recorder = null;
let queue = []; // files that wait
let total = 0; // of the queue when it was filled
let leftOut = 0; // files that came along and are no medium
let taken = 0; // clips so far: what answers for an earlier one comes too late
let keeping = false;
const annotatorNow = () => at("annotator")?.value.trim() || localStorage.getItem("hba-annotator") || "me";

async function posted(address, body) {
  const answer = await fetch(address, { method: "POST", body });
  const text = await answer.text();
  if (!answer.ok) {
    const page = new DOMParser().parseFromString(text, "text/html");
    throw new Error(page.querySelector("main p, main .note")?.textContent?.trim() || text.slice(0, 200));
  }
  return text;
}

function show(clip, kind) {
  at("clip").value = clip;
  const player = document.createElement(kind.startsWith("audio") ? "audio" : kind.startsWith("image") ? "img" : "video");
  player.src = `/try/clip/${clip}`;
  if (player.tagName === "IMG") player.alt = "The picture";
  else {
    player.controls = true;
    player.setAttribute("aria-label", "The clip");
  }
  at("player").replaceChildren(player.tagName === "VIDEO" ? staged(player, clip) : player);
  if (player.tagName !== "IMG") draw(clip);
}

// A clip with a place for landmarks over it, which are found when somebody wants to see them.
function staged(player, clip) {
  const stage = document.createElement("div");
  stage.innerHTML = `<div class="stage"></div><p><label class="inline"><input type="checkbox" data-pose> Landmarks over the clip</label> <span class="muted small" data-pose-said></span></p>`;
  stage.firstElementChild.append(player);
  const toggle = stage.querySelector("[data-pose]"), said = stage.querySelector("[data-pose-said]");
  toggle.addEventListener("change", async () => {
    said.textContent = "Looking for a person…";
    const canvas = document.createElement("canvas");
    canvas.className = "pose";
    canvas.dataset.landmarks = `/try/landmarks/${clip}`;
    stage.firstElementChild.append(canvas);
    await followPose(canvas);
    if (canvas.isConnected) said.textContent = "";
    else { toggle.checked = false; toggle.disabled = true; }
  }, { once: true });
  return stage;
}

async function draw(clip) {
  try {
    const answer = await fetch(`/try/sound/${clip}`);
    if (!answer.ok || at("clip").value !== clip) return;
    beside(await answer.text(), "heard");
  } catch { /* without a picture of its sound a clip is still a clip */ }
}

// Put a picture under the player, whose time a playhead in it follows.
function beside(html, kind) {
  const box = document.createElement("div");
  box.className = kind;
  box.innerHTML = html;
  at("player").querySelector(`:scope > .${kind}`)?.remove();
  at("player").append(box);
  start(at("player"));
}

async function curve() {
  const clip = at("clip").value;
  if (!clip) return say("Choose, drop or record a clip first.");
  say("The models are asked window by window…");
  try {
    const html = await posted("/try/curve", new URLSearchParams(new FormData(at("asking"))));
    if (at("clip").value !== clip) return;
    beside(html, "over-time");
    say("Answered over time.");
  } catch (error) { say(error.message); }
}

// The queue: what is known to be no medium is left out (a browser does not know every type), what this annotator has
// labelled for the task is passed over.
function takeAll(files) {
  const given = [...files].filter((file) => !file.name.startsWith("."));
  const media = given.filter((file) => !file.type || /^(video|audio|image)\//.test(file.type));
  if (!media.length) return say(files.length ? "None of these files is a clip, a sound or a picture." : "No files.");
  media.sort((a, b) => (a.webkitRelativePath || a.name).localeCompare(b.webkitRelativePath || b.name));
  [queue, total, leftOut] = [media, media.length, given.length - media.length];
  next();
}

function next() {
  const file = queue.shift();
  at("queue").hidden = total < 2 && !leftOut;
  const without = leftOut ? `; left out, as no clip, sound or picture: ${leftOut}` : "";
  at("left").textContent = `clip ${total - queue.length} of ${total}${without}`;
  at("next").disabled = !queue.length;
  return file && take(file, file.name, total > 1);
}

async function inside(entry) {
  if (entry.isFile) return [await new Promise((done, failed) => entry.file(done, failed))];
  const reader = entry.createReader(), found = [];
  for (;;) { // a reader gives at most a hundred at a time
    const some = await new Promise((done, failed) => reader.readEntries(done, failed));
    if (!some.length) return found;
    for (const one of some) if (!one.name.startsWith(".")) found.push(...await inside(one));
  }
}

async function take(blob, name, queued = false) {
  const turn = ++taken;
  at("clip").value = ""; // nothing of the clip before may be labelled as this one
  at("player").replaceChildren();
  at("answers").replaceChildren();
  say("Sending to this machine…");
  try {
    const about = `name=${encodeURIComponent(name)}&task=${encodeURIComponent(at("task").value)}`;
    const { clip, labels } = JSON.parse(await posted(`/try/clip?${about}`, blob));
    if (turn !== taken) return;
    if (queued && queue.length && annotatorNow() in labels) return next();
    show(clip, blob.type || "video");
    history.replaceState(null, "", `/try?clip=${clip}&task=${encodeURIComponent(at("task").value)}`);
    say("Ready.");
    await ask();
  } catch (error) { if (turn === taken) say(error.message); }
}

async function ask() {
  const turn = taken;
  if (!at("clip").value) return say("Choose, drop or record a clip first.");
  say("The models are asked…");
  try {
    const html = await posted("/try/ask", new URLSearchParams(new FormData(at("asking"))));
    if (turn !== taken) return;
    at("answers").innerHTML = html;
    const annotator = at("annotator");
    if (annotator) annotator.value = localStorage.getItem("hba-annotator") ?? "";
    say("Answered.");
  } catch (error) { if (turn === taken) say(error.message); }
}

async function keep(label) {
  const form = at("keeping"), turn = taken;
  if (keeping || form.dataset.clip !== at("clip").value) return;
  keeping = true;
  localStorage.setItem("hba-annotator", at("annotator").value);
  const said = { clip: form.dataset.clip, task: form.dataset.task, label, annotator: at("annotator").value };
  try {
    at("kept").innerHTML = await posted("/try/keep", new URLSearchParams(said));
  } catch (error) { return say(error.message); } finally { keeping = false; }
  if (turn !== taken) return; // somebody went on by hand
  if (queue.length) return next();
  say(`Kept as ${label}. ${total > 1 ? "That was the last clip." : "Drop or record the next clip."}`);
}

async function record(video) {
  if (!navigator.mediaDevices?.getUserMedia) {
    return say("This browser gives camera and microphone to localhost or https alone: use an SSH tunnel.");
  }
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ audio: true, video });
    const type = video ? "video/webm" : "audio/webm", parts = [];
    recorder = new MediaRecorder(stream, { mimeType: type });
    recorder.ondataavailable = (event) => parts.push(event.data);
    recorder.onstop = () => {
      for (const track of stream.getTracks()) track.stop();
      at("preview").hidden = at("stop").hidden = true;
      at("camera").disabled = at("microphone").disabled = false;
      take(new Blob(parts, { type }), "recorded.webm");
    };
    at("preview").srcObject = stream;
    at("preview").hidden = !video;
    if (video) at("preview").play();
    at("stop").hidden = false;
    at("camera").disabled = at("microphone").disabled = true;
    recorder.start();
    say("Recording…");
  } catch (error) { say(`Nothing can be recorded: ${error.message}`); }
}

at("camera").addEventListener("click", () => record(true));
at("microphone").addEventListener("click", () => record(false));
at("stop").addEventListener("click", () => recorder?.stop());
for (const name of ["file", "folder"]) at(name).addEventListener("change", () => takeAll(at(name).files));
at("next").addEventListener("click", next);
at("curve").addEventListener("click", curve);
at("drop").addEventListener("dragover", (event) => event.preventDefault());
at("drop").addEventListener("drop", async (event) => {
  event.preventDefault();
  const files = [...event.dataTransfer.files];
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  takeAll(entries.length ? (await Promise.all(entries.map(inside))).flat() : files);
});
at("asking").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
at("answers").addEventListener("click", (event) => {
  const button = event.target.closest("[data-label]");
  if (button) keep(button.dataset.label);
});
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input:not([type=checkbox]), select, textarea") || event.ctrlKey || event.metaKey || event.repeat) return;
  if (event.key === "n" && queue.length) return next();
  const button = at("answers").querySelector(`[data-digit="${CSS.escape(event.key)}"]`);
  if (button) keep(button.dataset.label);
});
if (at("drop").dataset.clip) {
  show(at("drop").dataset.clip, at("drop").dataset.kind);
  say("Ready.");
}
