// The page: asks, shows what streams in, and keeps conversations.
import * as conversations from "./conversations.js";
import { download, element, find } from "./dom.js";
import { Panel } from "./panel.js";
import { ServerError, listModels, streamAnswer } from "./server.js";
import { renderThread, renderWelcome } from "./thread.js";
import { showName } from "./variants.js";

let kept = conversations.loadConversations();
let current = conversations.newConversation();
let cards = new Map();
let running = null; // the AbortController of the answers that are being written
let undo = null;

const panel = new Panel((keyChanged) => (keyChanged ? loadModels() : showAsked()));

// --- showing -------------------------------------------------------------------------------------------------------------------

const say = (text) => { find("status").textContent = text; };

function toast(text, label = "", action = null) {
  find("toast-text").textContent = text;
  find("toast-action").textContent = label;
  find("toast-action").hidden = !action;
  undo = action;
  find("toast").hidden = false;
}

function showAsked() {
  const names = panel.asked.map(showName);
  find("asked").replaceChildren(element("span", { class: "dot", "aria-hidden": "true" }), names.filter(Boolean).join(" and ") || "no variant");
  find("asked").setAttribute("aria-label", `Asks ${names.join(" and ")}. Choose others`);
}

/** True for a reader of the thread's end, who is kept there while it grows. */
const isAtEnd = (thread) => thread.scrollHeight - thread.scrollTop - thread.clientHeight < 80;

function showThread(stay = false) {
  const turns = conversations.listTurns(current);
  const thread = find("thread");
  const place = stay && !isAtEnd(thread) ? thread.scrollTop : Infinity;
  if (turns.length) cards = renderThread(thread, turns, { edit: editTurn, again: (node) => editTurn(node, node.versions[node.at].prompt), flip: flipTurn });
  else renderWelcome(thread, panel.models, (text) => { find("prompt").value = text; fitPrompt(); find("prompt").focus(); });
  find("title").textContent = current.title || "New conversation";
  document.title = current.title ? `${current.title} – edgelora` : "edgelora";
  find("exports").hidden = !turns.length;
  thread.scrollTop = Math.min(place, thread.scrollHeight);
}

function showList() {
  find("no-chats").hidden = kept.length > 0;
  find("chat-list").replaceChildren(...kept.map((conversation) => element("li", {},
    element("button", { type: "button", class: "open", "aria-current": conversation.id === current.id && "true", onclick: () => open(conversation) }, conversation.title || "Untitled"),
    element("button", { type: "button", class: "quiet icon delete", "aria-label": `Delete ${conversation.title}`, onclick: () => remove(conversation) }, "✕"))));
}

function fitPrompt() {
  const field = find("prompt");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, 240)}px`;
}

function setBusy(busy) {
  find("stop").hidden = !busy;
  find("send").hidden = busy;
}

// --- asking --------------------------------------------------------------------------------------------------------------------

function keep(conversation) {
  conversation.updated = Date.now();
  kept = [conversation, ...kept.filter((other) => other.id !== conversation.id)];
  if (!conversations.saveConversation(conversation)) {
    toast("The browser has no room to keep this conversation. Export it, or delete others.");
  }
  showList();
}

async function ask(prompt, node = null) {
  const names = panel.asked;
  if (running || !prompt.trim() || !names.every(Boolean)) return;
  const conversation = current;
  const version = conversations.addVersion(conversation, node, prompt, names);
  const abort = (running = new AbortController());
  setBusy(true);
  showThread(node !== null);
  keep(conversation);
  say(`${names.map(showName).join(" and ")}: writing`);
  await Promise.all(version.answers.map((answer, side) => write(conversation, version, answer, side, abort.signal)));
  running = null;
  setBusy(false);
  if (kept.some((other) => other.id === conversation.id)) keep(conversation); // it may have been deleted meanwhile
  if (conversation === current) showThread(true);
  say(version.answers.map((answer) => `${showName(answer.model)}: ${answer.error || answer.text.slice(0, 500)}`).join(". "));
}

async function write(conversation, version, answer, side, signal) {
  const messages = conversations.listMessages(conversation, version, side, panel.system);
  let waiting = false;
  const update = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      const thread = find("thread");
      const follows = isAtEnd(thread);
      cards.get(answer)?.update();
      if (follows) thread.scrollTop = thread.scrollHeight;
    });
  };
  try {
    await streamAnswer({ model: answer.model, messages, ...panel.options }, panel.key, signal, (event) => {
      const choice = event.choices?.[0];
      answer.text += choice?.delta?.content ?? "";
      answer.reasoning += choice?.delta?.reasoning_content ?? "";
      if (choice?.finish_reason) answer.state = choice.finish_reason === "length" ? "cut" : "done";
      for (const name of ["receipt", "timings", "usage"]) answer[name] = event[name] ?? answer[name];
      update();
    });
    if (answer.state === "writing") answer.state = "done";
  } catch (error) {
    if (error.name === "AbortError") answer.state = "stopped";
    else {
      answer.state = "failed";
      answer.error = error instanceof ServerError ? error.message : `The page failed: ${error.message}`;
      if (error.status === 401) askForKey();
    }
  }
  update();
}

const stop = () => running?.abort();

function editTurn(node, prompt) {
  ask(prompt, node);
}

function flipTurn(node, to) {
  node.at = to;
  keep(current);
  showThread(true);
}

function askForKey() {
  openDrawer("panel");
  find("settings").open = true;
  find("key").focus();
}

// --- conversations -------------------------------------------------------------------------------------------------------------

function open(conversation) {
  stop();
  current = conversation;
  closeDrawers();
  showThread();
  showList();
}

function remove(conversation) {
  if (conversation === current) stop();
  conversations.deleteConversation(conversation.id);
  kept = kept.filter((other) => other.id !== conversation.id);
  if (conversation.id === current.id) open(conversations.newConversation());
  else showList();
  toast(`Deleted ${conversation.title || "the conversation"}.`, "Undo", () => { keep(conversation); open(conversation); });
}

const fileName = (ending) => `${(current.title || "conversation").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40)}.${ending}`;

find("exports").addEventListener("click", (event) => { if (event.target.tagName === "BUTTON") find("exports").open = false; });
find("exports").addEventListener("focusout", (event) => { if (!find("exports").contains(event.relatedTarget)) find("exports").open = false; });
find("export-json").addEventListener("click", () => download(fileName("json"), "application/json", conversations.toJson(current)));
find("export-markdown").addEventListener("click", () => download(fileName("md"), "text/markdown", conversations.toMarkdown(current)));
find("import").addEventListener("click", () => find("import-file").click());
find("import-file").addEventListener("change", async () => {
  const [file] = find("import-file").files;
  find("import-file").value = "";
  try {
    const read = conversations.fromJson(await file.text());
    keep(read);
    open(read);
  } catch (error) {
    toast(error.message);
  }
});
addEventListener("storage", (event) => {
  if (running || !conversations.isConversationKey(event.key)) return;
  kept = conversations.loadConversations();
  showList();
});

// --- drawers, keys and the start -----------------------------------------------------------------------------------------------

function openDrawer(id) {
  closeDrawers();
  find(id).classList.add("open");
  find(`open-${id}`).setAttribute("aria-expanded", "true");
  find("shade").hidden = false;
}

function closeDrawers() {
  for (const id of ["chats", "panel"]) {
    find(id).classList.remove("open");
    find(`open-${id}`).setAttribute("aria-expanded", "false");
  }
  find("shade").hidden = true;
}

for (const id of ["chats", "panel"]) {
  find(`open-${id}`).addEventListener("click", () => { openDrawer(id); find(id).querySelector("button.close").focus(); });
  find(id).querySelector(".close").addEventListener("click", () => { closeDrawers(); find(`open-${id}`).focus(); });
}
find("shade").addEventListener("click", closeDrawers);
find("asked").addEventListener("click", () => { openDrawer("panel"); find("variants").querySelector("input:checked, input")?.focus(); });
find("new-chat").addEventListener("click", () => { open(conversations.newConversation()); find("prompt").focus(); });
find("stop").addEventListener("click", stop);
find("toast-close").addEventListener("click", () => { find("toast").hidden = true; });
find("toast-action").addEventListener("click", () => { find("toast").hidden = true; undo?.(); });
find("prompt").addEventListener("input", fitPrompt);
find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = find("prompt").value;
  if (running || !text.trim() || !panel.asked.every(Boolean)) return;
  find("prompt").value = "";
  fitPrompt();
  ask(text);
});
find("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  find("composer").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  const types = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) && event.target.type !== "radio" && event.target.type !== "range";
  if (event.key === "Escape") {
    if (running) stop();
    else if (find("exports").open) find("exports").open = false;
    else closeDrawers();
  } else if (event.key === "/" && !types && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    closeDrawers();
    find("prompt").focus();
  }
});

async function loadModels() {
  try {
    panel.setModels(await listModels(panel.key));
  } catch (error) {
    if (error.status === 401) askForKey();
    toast(error.message, "Try again", loadModels);
    return;
  }
  find("toast").hidden = true;
  showAsked();
  if (!current.first) showThread();
}

if (kept.length) current = kept[0];
showThread();
showList();
showAsked();
find("prompt").focus();
loadModels();
