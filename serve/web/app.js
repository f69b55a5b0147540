// The page: one conversation with the agent, and a view for administrators. No library, nothing from another host.
import { recordings, wav } from "./sound.js";
import { admin } from "./admin.js";
import { call, problem, withKey } from "./service.js";

const at = (id) => document.getElementById(id);
const MAX_BYTES = 20 * 1024 * 1024;
let conversation = name();
let parts = []; // of the question that is being made: {kind, url, format, label}
let running = null; // the AbortController of the answer that is coming

function name() {
  return "page-" + Array.from(crypto.getRandomValues(new Uint8Array(12)), (n) => n.toString(16).padStart(2, "0")).join("");
}

function tell(words, bad = false) {
  at("status").textContent = words;
  at("status").classList.toggle("error", bad);
}

// ---- what is attached -----------------------------------------------------------------------------------------------
const read = (blob) =>
  new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(blob);
  });

async function attach(files) {
  for (const file of files) {
    if (file.size > MAX_BYTES) {
      tell(`${file.name} has ${Math.round(file.size / 1048576)} MB; ${MAX_BYTES / 1048576} MB at most can be sent.`, true);
      continue;
    }
    const kind = file.type.split("/")[0];
    if (kind === "image") {
      parts.push({ kind, url: await read(file), label: file.name || "picture" });
    } else if (kind === "audio") {
      const format = { wav: "wav", "x-wav": "wav", wave: "wav", flac: "flac", "x-flac": "flac", mpeg: "mp3", mp3: "mp3", ogg: "ogg" }[file.type.split("/")[1].split(";")[0]];
      const blob = format ? file : await wav(file).catch(() => null);
      if (!blob) { tell(`${file.name || "The sound"} cannot be read: wav, flac, mp3 and ogg are.`, true); continue; }
      parts.push({ kind, url: await read(blob), format: format || "wav", label: file.name || "recording" });
    } else {
      tell(`${file.name} is neither a picture nor a sound.`, true);
    }
  }
  showParts();
}

function showParts() {
  at("parts").replaceChildren(
    ...parts.map((part) => {
      const item = document.createElement("li");
      item.append(shown(part));
      const remove = document.createElement("button");
      remove.type = "button";
      remove.textContent = "×";
      remove.setAttribute("aria-label", `Remove ${part.label}`);
      remove.onclick = () => { parts = parts.filter((each) => each !== part); showParts(); at("words").focus(); };
      item.append(remove);
      return item;
    }),
  );
}

function shown(part) {
  const node = document.createElement(part.kind === "image" ? "img" : "audio");
  node.src = part.url;
  if (part.kind === "image") node.alt = part.label;
  else { node.controls = true; node.setAttribute("aria-label", part.label); }
  return node;
}

// ---- asking ---------------------------------------------------------------------------------------------------------
function question(words) {
  const content = parts.map((part) =>
    part.kind === "image"
      ? { type: "image_url", image_url: { url: part.url } }
      : { type: "input_audio", input_audio: { data: part.url.slice(part.url.indexOf(",") + 1), format: part.format } },
  );
  if (words) content.push({ type: "text", text: words });
  const body = { messages: [{ role: "user", content }], stream: true, conversation, explain: at("why").checked };
  if (!at("task-choice").hidden && at("task").value) body.task = at("task").value;
  if (at("aloud").checked) Object.assign(body, { modalities: ["text", "audio"], audio: { format: "wav" } });
  return body;
}

async function ask(event) {
  event?.preventDefault();
  if (running) { running.abort(); return; }
  const words = at("words").value.trim();
  if (!words && !parts.length) { tell("There is nothing to ask yet."); return; }
  const body = question(words);
  const turn = at("turn").content.firstElementChild.cloneNode(true);
  turn.querySelector(".asked").append(...parts.map(shown), ...(words ? [words] : []));
  const sent = parts;
  at("log").append(turn);
  at("empty").hidden = true;
  parts = []; showParts(); at("words").value = ""; grow();
  running = new AbortController();
  at("send").textContent = "Stop"; tell("…");
  turn.scrollIntoView({ block: "end" });
  try {
    await stream(body, turn, sent, words, running.signal);
    tell("");
  } catch (error) {
    const said = turn.querySelector(".words");
    said.textContent = error.name === "AbortError" ? "(stopped)" : error.message;
    said.classList.add("error");
    turn.querySelector(".sure").hidden = true;
    tell(""); at("words").value = words; parts = sent; showParts(); // nothing that was typed is lost
  } finally {
    running = null;
    at("send").textContent = "Send";
    turn.scrollIntoView({ block: "end" });
    at("words").focus();
  }
}

async function stream(body, turn, sent, words, signal) {
  const answer = await withKey(() => call("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal }));
  if (!answer.ok) throw new Error(await problem(answer));
  const lines = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "", id = "";
  const said = turn.querySelector(".words");
  for (;;) {
    const { value, done } = await lines.read();
    if (done) break;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") continue;
      const chunk = JSON.parse(data);
      id = chunk.id;
      const delta = chunk.choices[0]?.delta || {};
      if (delta.content) said.textContent += delta.content;
      if (delta.tool_calls) said.textContent += delta.tool_calls.map((each) => `${each.function.name}(${each.function.arguments})`).join("\n");
      if (delta.audio) speak(turn, delta.audio.data);
      if (chunk.mmagent) finish(turn, id, chunk.mmagent, sent, words);
    }
  }
}

function speak(turn, data) {
  const audio = turn.querySelector(".said > audio");
  audio.src = `data:audio/wav;base64,${data}`;
  audio.hidden = false;
  audio.play().catch(() => {}); // a browser may want a click first: the control is there
}

function finish(turn, id, found, sent, words) {
  const sure = turn.querySelector(".sure");
  sure.querySelector("meter").value = found.confidence;
  const percent = `${Math.round(found.confidence * 100)} % sure`;
  sure.querySelector("span").textContent = found.abstained ? `${percent}: better ask a person` : percent;
  if (found.evidence) evidence(turn.querySelector(".why"), found.evidence, words);
  steps(turn.querySelector(".steps"), id, found);
  verdict(turn.querySelector(".verdict"), id, found);
}

function evidence(box, found, words) {
  const inside = box.querySelector("div");
  if (found.tokens.length) {
    const line = document.createElement("p");
    for (const token of found.tokens) {
      const mark = document.createElement("mark");
      mark.textContent = token.text;
      mark.style.setProperty("--weight", token.weight * 0.8);
      mark.title = `${Math.round(token.weight * 100)} %`;
      line.append(mark, " ");
    }
    inside.append(line);
  }
  for (const image of found.images) {
    const node = document.createElement("img");
    node.src = image.picture;
    node.alt = `The picture, with what speaks for “${found.target}” in warm colour`;
    inside.append(node);
  }
  for (const audio of found.audios) {
    const bar = document.createElement("div");
    bar.className = "spans";
    bar.setAttribute("role", "img");
    const best = audio.spans.reduce((a, b) => (b[2] > a[2] ? b : a));
    bar.setAttribute("aria-label", `The sound; most speaks for the answer between ${best[0].toFixed(1)} and ${best[1].toFixed(1)} s`);
    for (const [, , weight] of audio.spans) {
      const span = document.createElement("span");
      span.style.setProperty("--weight", weight);
      bar.append(span);
    }
    inside.append(bar);
  }
  box.hidden = false;
  box.open = true;
}

function steps(box, id, found) {
  const inside = box.querySelector("div");
  for (const source of found.sources || []) {
    const quote = document.createElement("blockquote");
    quote.textContent = source.text;
    const where = document.createElement("footer");
    where.textContent = `${source.title || source.source} (${source.source})`;
    quote.append(where);
    inside.append(quote);
  }
  const list = document.createElement("dl");
  inside.append(list);
  const add = (term, words) => {
    const dt = document.createElement("dt"), dd = document.createElement("dd");
    dt.textContent = term; dd.textContent = words;
    list.append(dt, dd);
  };
  add("task", found.task);
  add("bundle", found.channel ? `${found.bundle} (${found.channel})` : found.bundle);
  for (const [label, chance] of Object.entries(found.probabilities).slice(0, 3)) add(label, `${(chance * 100).toFixed(1)} %`);
  add("time", Object.entries(found.timings_ms).map(([stage, ms]) => `${stage} ${ms.toFixed(0)} ms`).join(", "));
  box.hidden = false;
  box.addEventListener("toggle", async () => {
    if (!box.open || box.dataset.read) return;
    box.dataset.read = "yes";
    const answer = await call(`v1/answers/${id}`);
    if (!answer.ok) return;
    for (const step of (await answer.json()).steps) {
      if (step.kind === "tool") add(`tool ${step.tool}`, step.error || JSON.stringify(step.arguments));
      else add(step.kind, `${step.ms} ms`);
    }
  });
}

function verdict(box, id, found) {
  const form = box.querySelector("form"), status = box.querySelector("[role=status]");
  const wrong = box.querySelector(".wrong"), right = box.querySelector(".right");
  const field = found.label !== undefined ? "label" : found.value !== undefined ? "value" : found.labels ? "labels" : "text";
  const send = async (body) => {
    const answer = await call("v1/feedback", { method: "POST", body: JSON.stringify({ answer: id, ...body }) });
    status.textContent = answer.ok ? "Thank you." : await problem(answer);
    if (answer.ok) { right.disabled = wrong.disabled = true; form.hidden = true; }
  };
  right.onclick = () => send({ verdict: "right" });
  wrong.onclick = () => {
    form.hidden = !form.hidden;
    wrong.setAttribute("aria-expanded", String(!form.hidden));
    if (!form.hidden) form.querySelector("input").focus();
  };
  form.onsubmit = (event) => {
    event.preventDefault();
    const words = form.querySelector("input").value.trim();
    const given = field === "value" ? Number(words) : field === "labels" ? words.split(",").map((each) => each.trim()) : words;
    send({ verdict: "wrong", [field]: given });
  };
  box.hidden = false;
}

// ---- the form -------------------------------------------------------------------------------------------------------
function grow() {
  const box = at("words");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

at("ask").addEventListener("submit", ask);
at("words").addEventListener("input", grow);
at("words").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event);
});
at("file").addEventListener("change", (event) => { attach([...event.target.files]); event.target.value = ""; });
document.addEventListener("paste", (event) => { if (event.clipboardData?.files.length) { event.preventDefault(); attach([...event.clipboardData.files]); } });
document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("drop"); });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("drop"); });
document.addEventListener("drop", (event) => { event.preventDefault(); document.body.classList.remove("drop"); attach([...event.dataTransfer.files]); });
at("anew").onclick = () => {
  call(`v1/conversations/${conversation}`, { method: "DELETE" }).catch(() => {});
  conversation = name();
  at("log").replaceChildren();
  at("empty").hidden = false;
  at("words").focus();
};
recordings(at("record"), (blob) => attach([blob]), (words) => tell(words, true));

for (const [button, view, other] of [["show-talk", "talk", "admin"], ["show-admin", "admin", "talk"]]) {
  at(button).onclick = () => {
    at(view).hidden = false;
    at(other).hidden = true;
    at("ask").hidden = view === "admin";
    at("show-talk").setAttribute("aria-pressed", String(view === "talk"));
    at("show-admin").setAttribute("aria-pressed", String(view === "admin"));
    admin(view === "admin");
  };
}

async function begin() {
  const answer = await call("healthz");
  const health = await answer.json();
  at("bundle").textContent = answer.ok ? `${health.bundle}${health.channel ? ` · ${health.channel}` : ""} · ${health.modalities.join(", ")}` : health.reason;
  if (health.tasks.length > 1) {
    at("task").replaceChildren(...health.tasks.map((each) => new Option(each, each, each === health.task, each === health.task)));
    at("task-choice").hidden = false;
  }
}
begin().catch(() => tell("The service does not answer.", true));
at("words").focus();
