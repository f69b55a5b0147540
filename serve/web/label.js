// Labelling: the questions whose right answer teaches most, one after the other; each answer is feedback.
import { call, problem, withKey } from "./service.js";

const at = (id) => document.getElementById(id);
const MANY = 40; // labels, from which on they are typed rather than ticked
let rows = [], given = null, labelled = 0; // given: reads the right answer off the form

function made(tag, attributes = {}, ...children) {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
}

const labelledBy = (words, field) => made("label", {}, `${words} `, field);

const MARKS = { "/9j/": "image/jpeg", iVBOR: "image/png", R0lGO: "image/gif", UklGR: "image/webp", Qk: "image/bmp" };

function picture(base64, alt) {
  const type = Object.entries(MARKS).find(([mark]) => base64.startsWith(mark))?.[1] || "image/png";
  return made("img", { src: `data:${type};base64,${base64}`, alt });
}

function sound(base64, name) {
  const type = { UklGR: "audio/wav", ZkxhQ: "audio/flac", T2dnU: "audio/ogg" }[base64.slice(0, 5)] || "audio/mpeg";
  const node = made("audio", { src: `data:${type};base64,${base64}`, controls: true });
  node.setAttribute("aria-label", name);
  return node;
}

// ---- what is right, by the field that takes it ------------------------------------------------------------------------
function suggested(labels) {
  const list = made("datalist", { id: "label-known" }, ...labels.map((each) => new Option(each, each)));
  const field = made("input", { required: true, autocomplete: "off" });
  field.setAttribute("list", "label-known");
  return [field, list];
}

function one(row) {
  if (row.candidates) {
    const select = made("select", {}, ...row.candidates.map((each, n) => new Option(each.text || `candidate ${n + 1}`, String(n))));
    return [[labelledBy("The right one", select)], () => ({ label: select.value })];
  }
  const [field, list] = suggested(row.labels);
  return [[labelledBy("The right label", field), list], () => ({ label: field.value.trim() })];
}

function several(row) {
  if (!row.labels.length || row.labels.length > MANY) {
    const field = made("input", { autocomplete: "off" });
    return [[labelledBy("The right labels, with commas", field)], () => ({ labels: field.value.split(",").map((each) => each.trim()).filter(Boolean) })];
  }
  const boxes = row.labels.map((each) => made("input", { type: "checkbox", value: each }));
  const set = made("fieldset", {}, made("legend", { textContent: "The right labels" }), ...boxes.map((box) => made("label", {}, box, ` ${box.value}`)));
  return [[set], () => ({ labels: boxes.filter((box) => box.checked).map((box) => box.value) })];
}

function value() {
  const field = made("input", { type: "number", step: "any", required: true });
  return [[labelledBy("The right value", field)], () => ({ value: Number(field.value) })];
}

function text(row) {
  const field = made("textarea", { rows: 3 });
  const nodes = [labelledBy("The right text", field)];
  if (row.words !== undefined) {
    const none = made("button", { type: "button", textContent: "No answer stands in the text" });
    none.onclick = () => send({ text: "" });
    nodes.push(none);
  }
  return [nodes, () => (field.value.trim() ? { text: field.value.trim() } : null)];
}

// Places count characters, where the browser counts UTF-16 units.
const place = (words, unit) => Array.from(words.slice(0, unit)).length;

function spans(row) {
  const words = made("textarea", { readOnly: true, value: row.words, rows: 4 });
  const [field, list] = suggested(row.labels);
  field.required = false;
  const marked = [], shown = made("ul");
  const show = () => shown.replaceChildren(...marked.map((each) => {
    const remove = made("button", { type: "button", textContent: "×" });
    remove.setAttribute("aria-label", `Remove ${each.words}`);
    remove.onclick = () => { marked.splice(marked.indexOf(each), 1); show(); words.focus(); };
    return made("li", {}, `${each.words} (${each.label}) `, remove);
  }));
  const mark = made("button", { type: "button", textContent: "Mark the selection" });
  mark.onclick = () => {
    const [from, to] = [words.selectionStart, words.selectionEnd];
    if (from === to || !field.value.trim()) { tell("Select words of the text and name their label first.", true); return; }
    marked.push({ start: place(row.words, from), end: place(row.words, to), label: field.value.trim(), words: row.words.slice(from, to) });
    tell(""); show();
  };
  const read = () => ({ spans: marked.map(({ start, end, label }) => ({ start, end, label })) });
  return [[labelledBy("The text", words), labelledBy("Label", field), list, mark, shown], read];
}

const FIELDS = { label: one, labels: several, value, text, spans };

// ---- the queue --------------------------------------------------------------------------------------------------------
function tell(words, bad = false) {
  at("label-state").textContent = words;
  at("label-state").classList.toggle("error", bad);
}

async function load() {
  at("label-load").disabled = true;
  tell("Looking for the questions that teach most …");
  const answer = await withKey(() => call("admin/queue"));
  at("label-load").disabled = false;
  if (!answer.ok) { tell(await problem(answer), true); return; }
  const found = await answer.json();
  rows = found.data; labelled = 0;
  tell(rows.length ? `${found.waiting} questions wait for a label.` : "No question waits for a label: none is kept, or all are corrected.");
  show();
}

function show() {
  const row = rows[0];
  at("label").hidden = !row;
  at("label-load").hidden = Boolean(row);
  if (!row) { if (labelled) tell(`${labelled} labelled. Thank you.`); at("label-load").focus(); return; }
  const question = row.messages.map((each) => made("p", { textContent: row.messages.length > 1 ? `${each.role}: ${each.words}` : each.words }));
  question.push(...row.images.map((each, n) => picture(each, `Picture ${n + 1} of the question`)), ...row.audios.map((each, n) => sound(each, `Sound ${n + 1} of the question`)));
  for (const [end, words] of Object.entries(row.ends || {})) question.push(made("p", { textContent: `${end}: ${words}` }));
  for (const [n, each] of (row.candidates || []).entries()) {
    const name = `Candidate ${n + 1}`;
    question.push(made("p", { textContent: `${name}: ${each.text}` }), ...(each.image ? [picture(each.image, name)] : []), ...(each.audio ? [sound(each.audio, name)] : []));
  }
  at("label-question").replaceChildren(...question);
  at("label-said").textContent = `${row.task}: the model says “${row.answered}”, ${Math.round(row.confidence * 100)} % sure.`;
  const [nodes, read] = FIELDS[row.field](row);
  given = read;
  at("label-answer").replaceChildren(...nodes);
  at("label-answer").querySelector("input, select, textarea").focus();
}

async function send(body) {
  const answer = await withKey(() => call("admin/labels", { method: "POST", body: JSON.stringify({ answer: rows[0].answer, ...body }) }));
  if (!answer.ok) { tell(await problem(answer), true); return; }
  labelled += 1;
  next(`${labelled} labelled.`);
}

function next(words) {
  rows.shift();
  tell(rows.length ? `${words} ${rows.length} more are here.` : words);
  show();
}

at("label-load").onclick = load;
at("label").onsubmit = (event) => {
  event.preventDefault();
  const body = given();
  if (body) send(body); else tell("The right answer is wanted.", true);
};
at("label-right").onclick = () => send(rows[0].agreed);
at("label-skip").onclick = () => next("Skipped.");
