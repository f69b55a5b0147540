// The view for administrators: what answers, where, how much; deploying, going back, and who waits for a person.
import { call, problem, withKey } from "./service.js";

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
