// The Try page: a clip is dropped, chosen or recorded, goes to this server alone, is asked about and labelled.

const at = (id) => document.getElementById(id);
const say = (text) => { at("state").textContent = text; };
let recorder = null;

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
  at("player").replaceChildren(player);
  at("sound").replaceChildren();
  if (player.tagName !== "IMG") draw(clip);
}

async function draw(clip) {
  try {
    const answer = await fetch(`/try/sound/${clip}`);
    if (!answer.ok || at("clip").value !== clip) return;
    at("sound").innerHTML = await answer.text();
    const sound = at("sound").querySelector("[data-sound]");
    if (sound) at("player").append(sound); // beside its player, whose playhead follows
    if (sound) start(at("player"));
  } catch { /* without a picture of its sound a clip is still a clip */ }
}

async function take(blob, name) {
  say("Sending to this machine…");
  try {
    const { clip } = JSON.parse(await posted(`/try/clip?name=${encodeURIComponent(name)}`, blob));
    show(clip, blob.type || "video");
    history.replaceState(null, "", `/try?clip=${clip}&task=${encodeURIComponent(at("task").value)}`);
    say("Ready.");
    await ask();
  } catch (error) { say(error.message); }
}

async function ask() {
  if (!at("clip").value) return say("Choose, drop or record a clip first.");
  say("The models are asked…");
  try {
    at("answers").innerHTML = await posted("/try/ask", new URLSearchParams(new FormData(at("asking"))));
    const annotator = at("annotator");
    if (annotator) annotator.value = localStorage.getItem("hba-annotator") ?? "";
    say("Answered.");
  } catch (error) { say(error.message); }
}

async function keep(label) {
  const form = at("keeping");
  localStorage.setItem("hba-annotator", at("annotator").value);
  const said = { clip: form.dataset.clip, task: form.dataset.task, label, annotator: at("annotator").value };
  try {
    at("kept").innerHTML = await posted("/try/keep", new URLSearchParams(said));
    say(`Kept as ${label}. Drop or record the next clip.`);
  } catch (error) { say(error.message); }
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
at("file").addEventListener("change", () => at("file").files[0] && take(at("file").files[0], at("file").files[0].name));
at("drop").addEventListener("dragover", (event) => event.preventDefault());
at("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  const file = event.dataTransfer.files[0];
  if (file) take(file, file.name);
});
at("asking").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
at("answers").addEventListener("click", (event) => {
  const button = event.target.closest("[data-label]");
  if (button) keep(button.dataset.label);
});
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input:not([type=checkbox]), select, textarea") || event.ctrlKey || event.metaKey) return;
  const button = at("answers").querySelector(`[data-digit="${CSS.escape(event.key)}"]`);
  if (button) keep(button.dataset.label);
});
if (at("drop").dataset.clip) {
  show(at("drop").dataset.clip, at("drop").dataset.kind);
  say("Ready.");
}
