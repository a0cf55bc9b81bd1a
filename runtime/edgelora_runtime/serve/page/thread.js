// The thread: turns with their prompts, answers side by side, receipts and buttons.
import { copy, element } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { bundleOf, listFacts, parseMix, showName } from "./variants.js";

const STATES = {
  writing: "writing…",
  cut: "cut off at the limit of tokens",
  stopped: "stopped",
  failed: "failed",
};

/** Shows all turns. actions: {edit, again, flip, ask} of a node. Returns the elements to update by answer. */
export function renderThread(container, turns, actions) {
  const cards = new Map();
  const items = turns.map((node) => renderTurn(node, cards, actions));
  container.replaceChildren(...items);
  return cards;
}

/** Shows an empty thread's welcome. */
export function renderWelcome(container, models, onSuggest) {
  const many = models.filter((model) => model.kind !== "router").length;
  const suggestions = ["Explain what a LoRA adapter is in two sentences.", "Write a haiku about small models.", "List three uses of SQL, as a table."];
  container.replaceChildren(
    element("div", { class: "welcome" },
      element("h2", {}, many ? `${many} ${many === 1 ? "variant" : "variants"}, one base` : "Welcome"),
      element("p", {}, "Choose who answers, mix adapters with the sliders, or compare two answers to one prompt. Each answer shows what the switch to its variant cost."),
      element("div", { class: "suggestions" }, ...suggestions.map((text) => element("button", { type: "button", onclick: () => onSuggest(text) }, text))),
    ),
  );
}

function renderTurn(node, cards, actions) {
  const version = node.versions[node.at];
  const answers = version.answers.map((answer) => {
    const card = makeCard(answer);
    cards.set(answer, card);
    return card.root;
  });
  const busy = version.answers.some((answer) => answer.state === "writing");
  const prompt = element("div", { class: "prompt" }, element("p", {}, version.prompt));
  const edit = element("button", { type: "button", class: "quiet", disabled: busy, onclick: () => editPrompt(prompt, node, actions) }, "Edit");
  const again = element("button", { type: "button", class: "quiet", disabled: busy, onclick: () => actions.again(node) }, "Ask again");
  const tools = element("div", { class: "tools" }, renderPager(node, busy, actions), edit, again);
  return element("article", { class: "turn", "aria-label": "Turn" },
    element("div", { class: "asked" }, element("h2", { class: "hidden" }, "You"), prompt, tools),
    element("div", { class: answers.length > 1 ? "answers two" : "answers" }, ...answers),
  );
}

function renderPager(node, busy, actions) {
  const count = node.versions.length;
  if (count < 2) return null;
  const button = (label, sign, to) =>
    element("button", { type: "button", class: "quiet icon", "aria-label": label, disabled: busy || !node.versions[to], onclick: () => actions.flip(node, to) }, sign);
  return element("span", { class: "pager" }, button("Earlier version", "‹", node.at - 1), `${node.at + 1} of ${count}`, button("Later version", "›", node.at + 1));
}

function editPrompt(prompt, node, actions) {
  const before = [...prompt.childNodes];
  const field = element("textarea", { rows: "3", "aria-label": "Edit the prompt" });
  field.value = node.versions[node.at].prompt;
  const leave = () => prompt.replaceChildren(...before);
  const ask = () => { if (field.value.trim()) actions.edit(node, field.value); };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
    if (event.key === "Escape") { event.stopPropagation(); leave(); }
  });
  const buttons = element("div", { class: "tools" },
    element("button", { type: "button", class: "quiet", onclick: leave }, "Cancel"),
    element("button", { type: "button", class: "primary", onclick: ask }, "Ask"));
  prompt.replaceChildren(field, buttons);
  field.focus();
}

/** An answer's card with its update(), which shows the answer as it is now. */
function makeCard(answer) {
  const kind = parseMix(answer.model) ? "mix" : "variant";
  const state = element("span", { class: "state" });
  const thought = element("div", { class: "markdown" });
  const reasoning = element("details", { class: "reasoning", hidden: true }, element("summary", {}, "Reasoning"), thought);
  const body = element("div", { class: "markdown" });
  const error = element("p", { class: "error", hidden: true });
  const facts = element("ul", { class: "facts", "aria-label": "Receipt" });
  const copyButton = element("button", { type: "button", class: "quiet", onclick: () => copy(answer.text, copyButton) }, "Copy");
  const head = element("header", {}, element("span", { class: `dot ${kind}`, "aria-hidden": "true" }), element("h3", {}, showName(answer.model)), state, copyButton);
  const root = element("div", { class: "answer", role: "group", "aria-label": `Answer of ${showName(answer.model)}` }, head, reasoning, body, error, facts);
  const update = () => {
    root.classList.toggle("writing", answer.state === "writing");
    const routed = answer.receipt && answer.model === `${bundleOf(answer.model)}auto` ? `by ${answer.receipt.variant}` : "";
    state.textContent = [routed, STATES[answer.state]].filter(Boolean).join(", ");
    reasoning.hidden = !answer.reasoning;
    if (answer.reasoning) renderMarkdown(thought, answer.reasoning);
    renderMarkdown(body, answer.text);
    error.hidden = !answer.error;
    error.textContent = answer.error;
    facts.replaceChildren(...listFacts(answer).map(([name, value, meaning, look]) =>
      element("li", { title: meaning }, element("span", {}, `${name} `), element("b", { class: look }, value))));
    facts.hidden = !facts.childElementCount;
    copyButton.hidden = !answer.text || answer.state === "writing";
  };
  update();
  return { root, update };
}
