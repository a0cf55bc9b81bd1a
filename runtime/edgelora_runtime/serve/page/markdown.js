// Markdown to DOM nodes. A text never becomes markup, an address is http, https or mailto, and an image is a link: the page asks
// no other machine. Every pass reads the text once from left to right, so that no answer is slow to show.
import { copy, element } from "./dom.js";

const MOST_DEPTH = 8; // nested quotes and lists; deeper ones are plain paragraphs

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s+(.*?))?\s*#*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
const INLINE = /\\[!-/:-@[-`{-~]|`+|\*{1,3}|_{1,3}|~~|!?\[|https?:\/\/[^\s<>"'`*\])]+|<https?:\/\/[^\s<>]+>/g;

const shown = new WeakMap(); // of each block's element: the source that it shows

/** Shows a text in a container. Blocks that have not changed since the last call keep their elements. */
export function renderMarkdown(container, text) {
  const blocks = splitBlocks(text.replace(/\r\n?/g, "\n").split("\n"));
  blocks.forEach((block, at) => {
    const source = block.kind + "\n" + block.lines.join("\n");
    const old = container.children[at];
    if (old && shown.get(old) === source) return;
    const made = renderBlock(block, 0);
    shown.set(made, source);
    if (old) old.replaceWith(made);
    else container.append(made);
  });
  while (container.children.length > blocks.length) container.lastElementChild.remove();
}

/** Splits lines into blocks {kind, lines}. A fence that is not closed yet reaches to the end. */
export function splitBlocks(lines) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    if (!line.trim()) { at += 1; continue; }
    const start = at;
    const kind = kindOf(line, lines[at + 1]);
    at += 1;
    if (kind === "code") {
      const fence = FENCE.exec(line)[1];
      const isEnd = (text) => { const end = text.trim(); return end.length >= fence.length && /^(`+|~+)$/.test(end) && end[0] === fence[0]; };
      while (at < lines.length && !isEnd(lines[at])) at += 1;
      at += 1;
    } else if (kind === "quote") {
      while (at < lines.length && lines[at].trim() && (QUOTE.test(lines[at]) || kindOf(lines[at]) === "paragraph")) at += 1;
    } else if (kind === "list") {
      at = endOfList(lines, start);
    } else if (kind === "table") {
      while (at < lines.length && lines[at].includes("|")) at += 1;
    } else if (kind === "paragraph") {
      while (at < lines.length && lines[at].trim() && interruptsNothing(lines[at], lines[at + 1])) at += 1;
    }
    blocks.push({ kind, lines: lines.slice(start, at) });
  }
  return blocks;
}

function kindOf(line, next) {
  if (FENCE.test(line)) return "code";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (QUOTE.test(line)) return "quote";
  if (ITEM.test(line)) return "list";
  if (next !== undefined && line.includes("|") && next.includes("|") && DIVIDER.test(next)) return "table";
  return "paragraph";
}

const interruptsNothing = (line, next) => kindOf(line, next) === "paragraph";
const indentOf = (line) => line.length - line.trimStart().length;

function endOfList(lines, start) {
  const own = indentOf(lines[start]);
  const isOrdered = (line) => /\d/.test(ITEM.exec(line)[2]);
  const ordered = isOrdered(lines[start]);
  let at = start + 1;
  while (at < lines.length) {
    const line = lines[at];
    if (!line.trim()) {
      const next = lines.slice(at, at + 3).find((text) => text.trim());
      if (next === undefined || !(indentOf(next) > own || (ITEM.test(next) && !RULE.test(next)))) return at;
    } else if (indentOf(line) <= own && !lines[at - 1].trim() && !ITEM.test(line)) {
      return at;
    } else if (indentOf(line) <= own && (ITEM.test(line) ? RULE.test(line) || isOrdered(line) !== ordered : kindOf(line) !== "paragraph")) {
      return at;
    }
    at += 1;
  }
  return at;
}

function renderBlock({ kind, lines }, depth) {
  if (kind === "code") return renderCode(lines);
  if (kind === "heading") {
    const [, marks, text] = HEADING.exec(lines[0]);
    return element(`h${Math.min(6, marks.length + 3)}`, {}, ...renderInline(text ?? "")); // below an answer's own h3
  }
  if (kind === "rule") return element("hr");
  if (kind === "table") return renderTable(lines);
  if (kind === "paragraph" || depth >= MOST_DEPTH) return element("p", {}, ...renderLines(lines));
  if (kind === "quote") return element("blockquote", {}, ...renderNested(lines.map((line) => line.replace(QUOTE, "")), depth));
  return renderList(lines, depth);
}

const renderNested = (lines, depth) => splitBlocks(lines).map((block) => renderBlock(block, depth + 1));

function renderCode(lines) {
  const [, fence, language] = FENCE.exec(lines[0]);
  const last = lines.at(-1).trim();
  const closed = lines.length > 1 && last.length >= fence.length && [...last].every((mark) => mark === fence[0]);
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  const button = element("button", { type: "button", class: "quiet", onclick: () => copy(text, button) }, "Copy");
  const code = element("pre", { tabindex: "0", "aria-label": language ? `Code, ${language}` : "Code" }, element("code", {}, text));
  return element("div", { class: "code" }, element("div", { class: "code-head" }, element("span", {}, language || "text"), button), code);
}

function renderTable([head, divider, ...rows]) {
  const sides = splitCells(divider).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left"));
  const cells = (tag, line) => {
    const texts = splitCells(line);
    return sides.map((side, at) => element(tag, { class: `to-${side}` }, ...renderInline(texts[at] ?? "")));
  };
  const body = rows.map((row) => element("tr", {}, ...cells("td", row)));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...cells("th", head))), element("tbody", {}, ...body));
  return element("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, table);
}

const splitCells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));

function renderList(lines, depth) {
  const [, , marker] = ITEM.exec(lines[0]);
  const ordered = /\d/.test(marker);
  const own = indentOf(lines[0]);
  const items = [];
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (match && indentOf(line) <= own) items.push({ cut: match[0].length, lines: [line.slice(match[0].length)] });
    else items.at(-1).lines.push(line.slice(Math.min(indentOf(line), items.at(-1).cut)));
  }
  const start = ordered ? parseInt(marker, 10) : 1;
  const made = items.map((item) => {
    const blocks = splitBlocks(item.lines);
    const tight = blocks.length && blocks[0].kind === "paragraph" && !item.lines.some((line) => !line.trim());
    const first = tight ? renderLines(blocks[0].lines) : [];
    return element("li", {}, ...first, ...blocks.slice(tight ? 1 : 0).map((block) => renderBlock(block, depth + 1)));
  });
  return element(ordered ? "ol" : "ul", { start: start !== 1 && start }, ...made);
}

/** Lines of a paragraph. A chat keeps its line breaks. */
function renderLines(lines) {
  return lines.flatMap((line, at) => [...(at ? [element("br")] : []), ...renderInline(line.trim())]);
}

/** The inline nodes of a text: code, links, emphasis. Marks without a partner are text. */
export function renderInline(text) {
  const root = { mark: "", nodes: [] };
  const stack = [root];
  const top = () => stack.at(-1).nodes;
  const tags = { "*": ["em"], _: ["em"], "**": ["strong"], __: ["strong"], "***": ["em", "strong"], ___: ["em", "strong"], "~~": ["del"] };
  const ends = countMarks(text);
  let at = 0;
  INLINE.lastIndex = 0;
  for (let match; (match = INLINE.exec(text)); ) {
    const mark = match[0];
    const after = match.index + mark.length;
    if (match.index > at) top().push(text.slice(at, match.index));
    at = after;
    if (mark[0] === "\\") {
      top().push(mark[1]);
    } else if (mark[0] === "`") {
      const end = findTicks(text, after, mark.length, ends);
      if (end < 0) { top().push(mark); continue; }
      top().push(element("code", {}, text.slice(after, end).replace(/^ (.*) $/, "$1")));
      INLINE.lastIndex = at = end + mark.length;
    } else if (mark.endsWith("[")) {
      const link = readLink(text, after);
      if (!link) { top().push(mark); continue; }
      top().push(makeLink(link.address, mark[0] === "!" ? `image: ${link.label}` : link.label, text.slice(match.index, link.end)));
      INLINE.lastIndex = at = link.end;
    } else if (mark[0] === "<") {
      top().push(makeLink(mark.slice(1, -1), mark.slice(1, -1), mark));
    } else if (mark.startsWith("http")) {
      const address = mark.replace(/[.,;:!?]+$/, "");
      top().push(makeLink(address, address, address), mark.slice(address.length));
    } else {
      const open = stack.findLastIndex((level) => level.mark === mark);
      const opens = /\S/.test(text[after] ?? " ");
      const closes = /\S/.test(text[match.index - 1] ?? " ");
      const inWord = mark[0] === "_" && /\w/.test(text[match.index - 1] ?? " ") && /\w/.test(text[after] ?? " ");
      if (inWord) top().push(mark);
      else if (open > 0 && closes) {
        while (stack.length - 1 > open) unwrap(stack);
        const { nodes } = stack.pop();
        top().push(tags[mark].reduceRight((inner, tag) => [element(tag, {}, ...inner)], nodes)[0]);
      } else if (opens && stack.length < MOST_DEPTH) stack.push({ mark, nodes: [] });
      else top().push(mark);
    }
  }
  if (at < text.length) top().push(text.slice(at));
  while (stack.length > 1) unwrap(stack);
  return root.nodes;
}

function unwrap(stack) {
  const { mark, nodes } = stack.pop();
  stack.at(-1).nodes.push(mark, ...nodes);
}

/** The last place of each run of backticks by length, so that a search for one that is not there costs nothing. */
function countMarks(text) {
  const last = new Map();
  for (const match of text.matchAll(/`+/g)) last.set(match[0].length, match.index);
  return last;
}

function findTicks(text, from, length, ends) {
  if ((ends.get(length) ?? -1) < from) return -1;
  const runs = /`+/g;
  runs.lastIndex = from;
  for (let match; (match = runs.exec(text)); ) if (match[0].length === length) return match.index;
  return -1;
}

const MOST_LABEL = 1000; // characters of a link's label or address

/** Reads label](address) from a place. Returns null for anything else. */
function readLink(text, from) {
  const close = text.slice(from, from + MOST_LABEL).indexOf("](");
  if (close < 0) return null;
  const rest = text.slice(from + close + 2, from + close + 2 + MOST_LABEL);
  const match = /^<?([^\s<>]*?)>?(?:\s+"[^"]*")?\)/.exec(rest);
  return match && { label: text.slice(from, from + close), address: match[1], end: from + close + 2 + match[0].length };
}

/** A link with a safe address, or the source as text. */
function makeLink(address, label, source) {
  let parsed;
  try {
    parsed = new URL(address);
  } catch {
    return source; // relative addresses would lead into this server
  }
  if (!["http:", "https:", "mailto:"].includes(parsed.protocol)) return source;
  return element("a", { href: parsed.href, target: "_blank", rel: "noopener noreferrer", title: parsed.href }, label || parsed.href);
}
