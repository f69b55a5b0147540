// The view for administrators: what answers, where, how much; deploying, going back, and who waits for a person.
import { call, problem, withKey } from "./service.js";
import "./label.js";

const at = (id) => document.getElementById(id);
let timer = null;

export function admin(on) {
  clearInterval(timer);
  if (!on) return;
  refresh();
  timer = setInterval(refresh, 5000);
}

function row(cells) {
  const line = document.createElement("tr");
  for (const cell of cells) line.insertCell().textContent = cell ?? "–";
  return line;
}

async function refresh() {
  const answer = await withKey(() => call("admin/status"));
  if (!answer.ok) { at("facts").replaceChildren(document.createTextNode(await problem(answer))); clearInterval(timer); return; }
  const status = await answer.json();
  const metrics = await (await call("metrics")).text();
  const mean = (name) => {
    const sum = total(metrics, `${name}_sum`), count = total(metrics, `${name}_count`);
    return count ? sum / count : null;
  };
  const latency = mean("mmagent_request_seconds"), sure = mean("mmagent_confidence");
  const facts = {
    Channel: status.channel, Bundle: status.bundle, Canary: status.canary ? `${status.canary} (${Math.round(status.share * 100)} %)` : null,
    Trouble: status.trouble, "Requests now": status.waiting, "Mean time": latency === null ? null : `${(1000 * latency).toFixed(0)} ms`,
    "Mean confidence": sure === null ? null : `${(100 * sure).toFixed(1)} %`, "Feedback stored": status.feedback_lines, "Waiting for a person": status.handovers,
  };
  at("facts").replaceChildren(...Object.entries(facts).flatMap(([term, words]) => {
    const dt = document.createElement("dt"), dd = document.createElement("dd");
    dt.textContent = term; dd.textContent = words ?? "–";
    return [dt, dd];
  }));
  at("replicas").replaceChildren(...status.replicas.map((each) => row([each.replica, each.bundle, each.canary, each.trouble])));
  const traffic = [...metrics.matchAll(/^mmagent_requests_total\{route="([^"]*)",status="(\d+)"\} ([\d.e+]+)/gm)];
  at("traffic").replaceChildren(...traffic.map(([, route, code, count]) => row([route, code, Math.round(Number(count))])));
  at("drift").replaceChildren(...Object.entries(status.drift).map(([kind, found]) =>
    row([kind, features(found), ...["inputs", "labels", "confidence"].map((of) => found[of]?.toFixed(2))])));
  if (!status.drift.all) at("drift").replaceChildren(row(["nothing is told of so few answers"]));
  await rounds();
  const waiting = (await (await call("admin/handovers")).json()).data;
  at("handovers").replaceChildren(...waiting.map((each) => {
    const item = document.createElement("li");
    item.textContent = `${each.asked || "(no words)"}: understood as ${each.understood}, ${Math.round(each.confidence * 100)} % sure `;
    const done = document.createElement("button");
    done.type = "button"; done.textContent = "Done";
    done.onclick = async () => { await call("admin/handovers/done", { method: "POST", body: JSON.stringify({ id: each.id }) }); refresh(); };
    item.append(done);
    return item;
  }));
}

const features = (found) => Object.entries(found).filter(([of]) => of.startsWith("features.")).map(([of, far]) => `${of.slice(9)} ${far.toFixed(2)}`).join(", ") || null;

let shown = ""; // the rounds as they are on the page: what is open stays open until they change

async function rounds() {
  const answer = await call("admin/rounds");
  if (!answer.ok) return;
  const found = (await answer.json()).data;
  if (JSON.stringify(found) === shown) return;
  shown = JSON.stringify(found);
  at("rounds").replaceChildren(...found.map(round));
  if (!found.length) at("rounds").append(node("li", "No round yet: python -m jobs.refine makes one."));
}

function round(each) {
  const item = document.createElement("li"), box = document.createElement("details");
  const verdict = { accepted: "accepted by the gate", refused: `refused by the gate (${each.failed} checks)` }[each.state] || each.state;
  box.append(node("summary", `${each.name}: ${verdict}; ${each.train} new rows, ${each.replayed} replayed, ${each.aside} set aside`));
  const table = document.createElement("table"), head = table.createTHead().insertRow();
  for (const name of ["Check", "Before", "After", "Rule", "Holds"]) head.append(node("th", name));
  const body = table.createTBody();
  for (const one of each.checks) body.append(row([one.name, one.before.toFixed(3), one.after.toFixed(3), one.rule, { true: "yes", false: "no" }[one.passed] || "not judged"]));
  box.append(table);
  item.append(box);
  return item;
}

function node(tag, words) {
  const made = document.createElement(tag);
  made.textContent = words;
  return made;
}

function total(metrics, name) {
  return [...metrics.matchAll(new RegExp(`^${name}(?:\\{[^}]*\\})? ([\\d.e+-]+)$`, "gm"))].reduce((sum, [, value]) => sum + Number(value), 0);
}

async function act(path, body) {
  at("deployed").textContent = "…";
  const answer = await withKey(() => call(path, { method: "POST", body: JSON.stringify(body) }));
  if (!answer.ok) { at("deployed").textContent = await problem(answer); return; }
  const told = await answer.json();
  at("deployed").textContent = told.canary ? `${told.canary} is a canary beside ${told.bundle}.` : `${told.bundle} answers.`;
  refresh();
}

at("deploy").onsubmit = (event) => {
  event.preventDefault();
  act("admin/bundles", { bundle: at("deploy-bundle").value.trim(), share: Number(at("deploy-share").value) });
};
at("rollback").onclick = () => act("admin/rollback", {});
