// How the page speaks to the service: with a key where one is wanted, and with the service's own words for what went wrong.
const at = (id) => document.getElementById(id);
let key = sessionStorage.getItem("mmagent-key") || "";

export function call(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  return fetch(path, { ...options, headers });
}

export async function problem(answer) {
  try {
    return (await answer.clone().json()).error.message;
  } catch {
    return `The service answers ${answer.status}.`;
  }
}

// Tries once more with another key where the service refuses this one.
export async function withKey(send) {
  const answer = await send();
  if (answer.status !== 401) return answer;
  await asked(await problem(answer));
  return send();
}

function asked(reason) {
  const dialog = at("key-dialog");
  at("key-reason").textContent = reason;
  at("key").value = "";
  dialog.showModal();
  return new Promise((done) => {
    dialog.addEventListener("close", () => {
      key = at("key").value.trim();
      sessionStorage.setItem("mmagent-key", key);
      done();
    }, { once: true });
  });
}
