// Conversations: a tree of turns, kept in the browser, and written as JSON or Markdown.
//
// A conversation is {id, title, updated, first}. A node is {versions, at}: what was asked at this place, once for each edit and each
// new try. A version is {prompt, answers, next}, with one answer for each side. Editing loses nothing: it adds a version.
import { listFacts, showName } from "./variants.js";

const PREFIX = "edgelora.chat.";
const FORMAT = "edgelora-conversation";
const STATES = ["done", "cut", "stopped", "failed"];
const MOST_TURNS = 2000;

const LONGEST_TITLE = 60; // characters

/** Makes a title of a prompt, without marks of Markdown. A long one ends at a word, with an ellipsis. */
function makeTitle(prompt) {
  const text = prompt.replace(/[*`#|~_>\s]+/g, " ").trim();
  if (text.length <= LONGEST_TITLE) return text || "Untitled";
  const cut = text.slice(0, LONGEST_TITLE);
  return `${cut.slice(0, cut.lastIndexOf(" ") > LONGEST_TITLE / 2 ? cut.lastIndexOf(" ") : LONGEST_TITLE).trimEnd()}…`;
}

export const newConversation = () => ({ id: crypto.randomUUID?.() ?? String(Date.now() + Math.random()), title: "", updated: Date.now(), first: null });

export const newAnswer = (model) => ({ model, text: "", reasoning: "", state: "writing", error: "", receipt: null, timings: null, usage: null });

/** The nodes of the versions that are shown, from the first turn on. */
export function listTurns(conversation) {
  const turns = [];
  for (let node = conversation.first; node; node = node.versions[node.at].next) turns.push(node);
  return turns;
}

/** Adds a turn at the end, or a version of an existing one. Returns the version. */
export function addVersion(conversation, node, prompt, models) {
  const version = { prompt, answers: models.map(newAnswer), next: null };
  if (node) {
    node.versions.push(version);
    node.at = node.versions.length - 1;
  } else {
    const turns = listTurns(conversation);
    const made = { versions: [version], at: 0 };
    if (turns.length) turns.at(-1).versions[turns.at(-1).at].next = made;
    else conversation.first = made;
  }
  if (!conversation.title) conversation.title = makeTitle(prompt);
  return version;
}

/** The messages that a side's next answer continues: all turns up to a version, and its prompt. */
export function listMessages(conversation, version, side, system) {
  const messages = system.trim() ? [{ role: "system", content: system }] : [];
  for (const node of listTurns(conversation)) {
    const shown = node.versions[node.at];
    if (shown === version) break;
    const { text } = shown.answers[side] ?? shown.answers[0];
    if (text) messages.push({ role: "user", content: shown.prompt }, { role: "assistant", content: text });
  }
  messages.push({ role: "user", content: version.prompt });
  return messages;
}

// --- kept in the browser -------------------------------------------------------------------------------------------------------

/** Every kept conversation, the latest first. Entries that cannot be read are left where they are. */
export function loadConversations() {
  const found = [];
  try {
    for (let at = 0; at < localStorage.length; at += 1) {
      const key = localStorage.key(at);
      if (!key.startsWith(PREFIX)) continue;
      try {
        found.push(readConversation(JSON.parse(localStorage.getItem(key))));
      } catch { /* written by another version of the page */ }
    }
  } catch { /* storage is switched off */ }
  return found.sort((one, other) => other.updated - one.updated);
}

/** Keeps a conversation. Returns false if the browser has no room, or keeps nothing. */
export function saveConversation(conversation) {
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    return true;
  } catch {
    return false;
  }
}

export function deleteConversation(id) {
  try { localStorage.removeItem(PREFIX + id); } catch { /* nothing was kept */ }
}

export const isConversationKey = (key) => key === null || key.startsWith(PREFIX);

// --- as files ------------------------------------------------------------------------------------------------------------------

export const toJson = (conversation) => JSON.stringify({ format: FORMAT, version: 1, conversation }, null, 1);

/** Reads what toJson wrote, as a new conversation. Throws an Error that says what is wrong. */
export function fromJson(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    throw new Error("This file is no JSON.");
  }
  if (value?.format !== FORMAT) throw new Error("This file is no conversation that this page exported.");
  if (value.version !== 1) throw new Error(`This conversation has format ${value.version}; this page reads 1.`);
  return { ...readConversation(value.conversation), id: newConversation().id };
}

/** Checks a conversation from a file or the browser's storage, and takes over the fields that it knows. */
export function readConversation(value) {
  const text = (given) => (typeof given === "string" ? given : "");
  const numbers = (given) => (given && typeof given === "object"
    ? Object.fromEntries(Object.entries(given).filter(([, item]) => ["number", "boolean", "string"].includes(typeof item)))
    : null);
  const receipts = (given) => (Number.isFinite(given?.milliseconds) ? numbers(given) : null);
  let room = MOST_TURNS;
  const readAnswer = (given) => ({
    model: text(given.model) || "?",
    text: text(given.text),
    reasoning: text(given.reasoning),
    state: STATES.includes(given.state) ? given.state : "stopped", // one that was being written when the page closed
    error: text(given.error),
    receipt: receipts(given.receipt),
    timings: numbers(given.timings),
    usage: numbers(given.usage),
  });
  const readNode = (given) => {
    if (given === null || given === undefined) return null;
    if ((room -= 1) < 0) throw new Error(`This conversation has more than ${MOST_TURNS} turns.`);
    if (!Array.isArray(given.versions) || !given.versions.length) throw new Error("A turn of this conversation has no prompt.");
    const versions = given.versions.map((version) => {
      if (typeof version?.prompt !== "string" || !Array.isArray(version.answers) || !version.answers.length) {
        throw new Error("A turn of this conversation has no prompt or no answer.");
      }
      return { prompt: version.prompt, answers: version.answers.slice(0, 2).map(readAnswer), next: readNode(version.next) };
    });
    return { versions, at: versions[given.at] ? given.at : versions.length - 1 };
  };
  if (typeof value?.id !== "string") throw new Error("This conversation has no id.");
  return { id: value.id, title: text(value.title), updated: Number(value.updated) || 0, first: readNode(value.first) };
}

/** The turns that are shown, as Markdown. */
export function toMarkdown(conversation) {
  const parts = [`# ${conversation.title || "Conversation"}`];
  for (const node of listTurns(conversation)) {
    const { prompt, answers } = node.versions[node.at];
    parts.push(`## You\n\n${prompt}`);
    for (const answer of answers) {
      const facts = listFacts(answer).map(([name, value]) => `${name} ${value}`).join(", ");
      parts.push(`## ${showName(answer.model)}\n\n${answer.text || answer.error}${facts ? `\n\n*${facts}*` : ""}`);
    }
  }
  return `${parts.join("\n\n")}\n`;
}
