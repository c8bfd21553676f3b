"use strict";
// One person's desk. A vote is kept in this browser (localStorage) before anything else happens to it, and leaves it
// only when the server says that it is on disk. So a cut, a reload or a server that dies loses none.
const $ = (id) => document.getElementById(id);
const KEY = "ottava.key", BOX = "ottava.box.", AHEAD = 5, BACK = 50, WAITS = [500, 1000, 2000, 4000, 8000];
const WORDS = { right: "Right", wrong: "Wrong", a: "A is better", b: "B is better", tie: "Equally good", "both bad": "Both bad" };
const KINDS = { right_wrong: "Is the answer right?", choice: "Which one?", pair: "Which is better?", text: "Write the answer",
  steps: "Mark the steps" };

let key = sessionStorage.getItem(KEY) || "";
let me = null, guideline = null, ready = [], current = null, past = [], shownAt = 0, hiddenMs = 0, hiddenAt = 0;
let marks = [], here = 0, adjudicating = false, sending = false, asking = false, failures = 0, cut = false, timer = 0;

// ---- the outbox: one entry of localStorage a row, so that two tabs never overwrite each other

function uid() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");
}
let counter = 0;
function put(row) {
  const order = String(Date.now()).padStart(15, "0") + "." + String(counter++).padStart(6, "0");
  try {
    localStorage.setItem(BOX + order + "." + row.uid, JSON.stringify({ owner: me.name, row }));
    return true;
  } catch {
    say("This browser has no room to keep the vote: wait until the others are sent.", true);
    return false;
  }
}
function box() {
  const names = [];
  for (let i = 0; i < localStorage.length; i++) {
    const name = localStorage.key(i);
    if (name.startsWith(BOX)) names.push(name);
  }
  return names.sort().map((name) => ({ name, ...JSON.parse(localStorage.getItem(name)) }))
    .filter((entry) => me && entry.owner === me.name);
}

async function call(path, body) {
  const answer = await fetch(path, {
    method: "POST", headers: { "Content-Type": "application/json", Authorization: "Bearer " + key },
    body: JSON.stringify(body), signal: AbortSignal.timeout(15000), keepalive: path === "/api/leave",
  });
  if (answer.status === 401) { forget(); throw new Error("key"); }
  if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).error || "status " + answer.status);
  return answer.json();
}

async function send() {
  if (sending || !me) return;
  sending = true;
  try {
    for (let waiting = box(); waiting.length; waiting = box()) {
      const part = [];
      let size = 0;
      for (const entry of waiting) {
        size += JSON.stringify(entry.row).length * 3;
        if (part.length && (size > 2000000 || part.length >= 50)) break;
        part.push(entry);
      }
      const { acks } = await call("/api/votes", { votes: part.map((entry) => entry.row) });
      const by = new Map(acks.map((ack) => [ack.uid, ack]));
      for (const entry of part) {
        const ack = by.get(entry.row.uid);
        if (!ack) continue;
        if (ack.status === "refused") {
          localStorage.setItem("ottava.refused." + entry.row.uid, JSON.stringify({ ...entry, why: ack.why }));
          say("Not taken: " + ack.why, true);
        }
        localStorage.removeItem(entry.name);
      }
      reached();
      if (!part.some((entry) => by.has(entry.row.uid))) throw new Error("no answer to these votes");
    }
  } catch (error) {
    failed(error);
  } finally {
    sending = false;
    showLine();
  }
}

async function ask() {
  if (asking || !key) return;
  asking = true;
  try {
    const holding = [...ready, ...(current ? [current] : [])].map((q) => q.item);
    const want = Math.max(AHEAD - ready.length, 0);
    const body = { want, holding };
    if (guideline) body.guideline = guideline.version;
    const got = await call("/api/next", body);
    me = got.me;
    reached();
    if (got.guideline) {
      if (guideline) say("The guideline has changed: press ?");
      guideline = got.guideline;
    }
    const pending = new Set(box().filter((entry) => entry.row.kind !== "undo").map((entry) => entry.row.item));
    for (const q of got.questions) if (!holding.includes(q.item) && !pending.has(q.item)) ready.push(q);
    showProgress(got);
    if (!current && !adjudicating) next();
    send();
  } catch (error) {
    failed(error);
  } finally {
    asking = false;
  }
}

function reached() { failures = 0; cut = false; showLine(); }
function failed(error) {
  if (error.message === "key") return;
  cut = true;
  clearTimeout(timer);
  timer = setTimeout(again, WAITS[Math.min(failures++, WAITS.length - 1)]);
  showLine();
}
function again() { send(); if (ready.length < AHEAD) ask(); }

// ---- what is shown

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}
function part(title, text) {
  const made = element("div", "part");
  made.append(element("b", "", title), element("div", "text", text));
  return made;
}
function only(id) { 
  for (const one of ["login", "card", "empty"]) $(one).hidden = one !== id;
  document.body.classList.toggle("out", id === "login");
}

function next() {
  current = ready.shift() || null;
  if (!current) {
    only("empty");
    $("emptyTitle").textContent = cut ? "The connection is cut" : "Nothing to ask";
    $("emptyText").textContent = cut ? "What you said is kept here and goes out when the server can be reached."
      : "All questions are answered, or others are at them. New ones come by themselves.";
  } else {
    show(current);
  }
  if (ready.length < AHEAD - 2) ask();
}

function show(q) {
  only("card");
  $("card").classList.toggle("wide", q.kind === "pair");
  $("mode").textContent = (q.said ? "Adjudication. " : "") + KINDS[q.kind];
  $("asked").textContent = q.content.question;
  const shown = $("shown");
  shown.replaceChildren();
  for (const [name, text] of Object.entries(q.content)) {
    if (typeof text === "string" && !["question", "a", "b"].includes(name)) shown.append(part(name, text));
  }
  if (q.kind === "pair") {
    const pair = element("div", "pair");
    const [left, right] = q.swapped ? ["b", "a"] : ["a", "b"];
    pair.append(part("A", q.content[left]), part("B", q.content[right]));
    shown.append(pair);
  }
  marks = []; here = 0;
  if (q.kind === "steps") { marks = q.content.steps.map(() => null); shown.append(element("ol", "steps")); drawSteps(); }
  if (q.said) shown.append(part("What people said", q.said.map((s) => s.votes + " × " + word(q, s.answer)).join("\n")));
  showSuggestions(q);
  showAnswers(q);
  shownAt = performance.now(); hiddenMs = 0; hiddenAt = document.hidden ? shownAt : 0;
  $("undo").disabled = !past.length;
  if (q.kind === "text") $("reply").focus(); else $("asked").focus({ preventScroll: true });
  $("main").scrollTop = 0;
}
function word(q, answer) {
  if (Array.isArray(answer)) return answer.map((mark, k) => k + 1 + " " + (mark || "not judged")).join(", ");
  return q.kind === "choice" || q.kind === "text" ? answer : WORDS[answer];
}
function showSuggestions(q) {
  const said = Object.entries(q.suggestions || {});
  $("hint").hidden = !said.length;
  $("hint").textContent = said.map(([who, answer]) => who + ": " + word(q, answer)).join("  ·  ");
}
function showAnswers(q) {
  const group = $("answers");
  group.replaceChildren();
  const button = (label, press, cap, className) => {
    const made = element("button", className || "");
    made.type = "button";
    if (cap) made.append(element("kbd", "", cap), document.createTextNode(label));
    else made.textContent = label;
    made.addEventListener("click", press);
    group.append(made);
    return made;
  };
  if (q.kind === "text") {
    const area = element("textarea");
    area.id = "reply";
    area.setAttribute("aria-label", "Your answer");
    area.maxLength = 100000;
    group.append(area);
    const done = button("Send", () => answerText(), "", "main");
    done.append(element("kbd", "", "Ctrl+Enter"));
  } else if (q.kind === "steps") {
    button("Right", () => mark("right"), "1");
    button("Wrong", () => mark("wrong"), "2");
    button("The rest is right", () => restRight(), "Space");
    const done = button("Send", () => answerSteps(), "", "main");
    done.append(element("kbd", "", "Enter"));
  } else {
    q.answers.forEach((answer, k) => {
      const made = button(q.kind === "choice" ? answer : WORDS[answer], () => answerWith(unswapped(q, answer)), k < 9 ? String(k + 1) : "");
      made.dataset.answer = answer;
      made.classList.toggle("chosen", q.before === unswapped(q, answer));
    });
  }
  if (q.kind === "text" && typeof q.before === "string") $("reply").value = q.before;
  if (q.kind === "steps" && Array.isArray(q.before)) { marks = [...q.before]; drawSteps(); }
}
function unswapped(q, answer) { return q.swapped && (answer === "a" || answer === "b") ? (answer === "a" ? "b" : "a") : answer; }

function drawSteps() {
  const list = document.querySelector(".steps");
  list.replaceChildren(...current.content.steps.map((text, k) => {
    const row = element("li", (marks[k] || "") + (k === here ? " here" : ""));
    row.append(element("span", "", text), element("em", "", marks[k] === "right" ? "✓ right" : marks[k] === "wrong" ? "✕ wrong" : ""));
    row.addEventListener("click", () => { here = k; drawSteps(); });
    if (k === here) row.setAttribute("aria-current", "step");
    return row;
  }));
  list.querySelector(".here")?.scrollIntoView({ block: "nearest" });
}
function mark(what) {
  marks[here] = what;
  here = Math.min(here + 1, marks.length - 1);
  drawSteps();
  say("Step " + (here + 1) + " of " + marks.length);
}
function restRight() { for (let k = here; k < marks.length; k++) marks[k] = marks[k] || "right"; here = marks.length - 1; drawSteps(); }

// ---- what people do

function answerText() {
  const text = $("reply").value;
  if (text.trim()) answerWith(text); else say("Write something, or press Esc and s to skip.", true);
}
function answerSteps() { if (marks.some(Boolean)) answerWith([...marks]); else say("Mark a step first: 1 right, 2 wrong.", true); }

function row(kind, q, answer, undoes) {
  const ms = Math.round(performance.now() - shownAt - hiddenMs - (hiddenAt ? performance.now() - hiddenAt : 0));
  const made = { uid: uid(), item: q.item, kind, at: Date.now(), ms: Math.max(ms, 0), guideline: q.guideline };
  if (answer !== undefined) made.answer = answer;
  if (undoes) made.undoes = undoes;
  return made;
}
function answerWith(answer) {
  if (!current) return;
  const q = current, made = row(adjudicating ? "decide" : "vote", q, answer);
  if (!put(made)) return;
  past.push({ q, row: made, answer });
  after(adjudicating ? "Decided: " + short(word(q, answer)) : short(word(q, answer)));
}
function skip() {
  if (!current) return;
  if (adjudicating) { leaveConflicts(); return; }
  const made = row("skip", current);
  if (!put(made)) return;
  past.push({ q: current, row: made });
  after("Skipped");
}
function after(what) {
  past = past.slice(-BACK);
  say(what + " · u takes it back");
  current = null;
  if (adjudicating) conflict(); else next();
  $("undo").disabled = false;
  send();
}
function undo() {
  const last = past.pop();
  if (!last) { say("There is nothing to take back."); return; }
  if (last.row.kind !== "decide" && !put(row("undo", last.q, undefined, last.row.uid))) { past.push(last); return; }
  if (current && !current.said) ready.unshift(current);
  adjudicating = last.row.kind === "decide";
  current = { ...last.q, before: last.answer };
  show(current);
  say("Taken back");
  send();
}
const short = (text) => (text.length > 40 ? text.slice(0, 40) + "…" : text);

async function conflict() {
  try {
    await send();
    const { question } = await call("/api/conflict", {});
    if (!question) { say("No conflicts are left."); leaveConflicts(); return; }
    if (current && !current.said) ready.unshift(current);
    adjudicating = true;
    current = question;
    show(current);
  } catch (error) { leaveConflicts(); failed(error); }
}
function leaveConflicts() { adjudicating = false; current = null; next(); }

function say(what, bad) { $("said").textContent = what; $("said").classList.toggle("bad", Boolean(bad)); }
function showLine() {
  const waiting = box().length;
  const line = $("line");
  line.hidden = !me;
  line.classList.toggle("cut", cut);
  line.textContent = cut ? (waiting ? waiting + (waiting > 1 ? " votes are" : " vote is") + " kept here" : "no connection")
    : waiting ? "sending " + waiting : "all saved";
}
function runWords(run) {
  const percent = (share) => (100 * share).toFixed(1) + "%";
  const day = (date) => new Date(date).toLocaleString([], { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" });
  if (run.phase === "done") return [(run.reached ? "certified: at most " : "not certified: at most ") + percent(run.upper) + " wrong"];
  const words = [run.phase === "audit" && run.upper < 1 ? "at most " + percent(run.upper) + " wrong, to be " + percent(run.target) : "to be certified: " + percent(run.target)];
  if (!run.votes) return words;
  words.push(run.votes[0] + " to " + run.votes[2] + " votes to go", run.hours[0].toFixed(1) + " to " + run.hours[2].toFixed(1) + " h of work");
  if (!run.date[2].startsWith("9999")) words.push("done " + day(run.date[0]) + " to " + day(run.date[2]));
  return words;
}
function showProgress(got) {
  const p = got.progress;
  $("who").textContent = me.name;
  const total = p.left === null ? null : p.votes + p.left;
  const share = total ? p.votes / total : 0;
  $("fill").style.setProperty("--part", share);
  $("bar").setAttribute("aria-valuenow", String(Math.round(100 * share)));
  const words = [me.votes + " by you", p.votes + " in all"];
  if (p.left) words.push("about " + p.left + " to go", p.hours >= 1 ? Math.round(p.hours) + " h of work" : Math.ceil(p.hours * 60) + " min of work");
  if (p.finish) words.push("done " + new Date(p.finish).toLocaleString([], { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" }));
  for (const run of p.runs || []) words.push(...runWords(run));
  $("far").textContent = words.join(" · ");
  $("adjudicate").hidden = !got.conflicts;
  $("conflicts").textContent = got.conflicts + (got.conflicts > 1 ? " conflicts" : " conflict");
}
function showGuideline() {
  $("guidelineTitle").textContent = guideline && guideline.version ? "Guideline, version " + guideline.version : "Guideline";
  $("guidelineText").textContent = (guideline && guideline.text) || "There is none for these questions.";
  const rows = [["1 – 9", "answer"], ["← → Enter", "choose an answer, and give it"], ["u", "take the last answer back"], ["s", "skip"],
    ["1 2 ↑ ↓ Space Enter", "steps: right, wrong, move, the rest is right, send"], ["Ctrl+Enter", "send a text; Esc leaves it"], ["?", "this page"]];
  if (me && me.lead) rows.push(["c", "conflicts"]);
  $("keys").replaceChildren(...rows.flatMap(([keys, what]) => {
    const name = element("dt"), caps = keys.split(" ");
    for (const cap of caps) name.append(cap === "–" ? "– " : element("kbd", "", cap));
    return [name, element("dd", "", what)];
  }));
  $("guideline").showModal();
}
function forget() {
  key = ""; sessionStorage.removeItem(KEY);
  $("wrong").textContent = "No such key.";
  only("login"); $("key").focus();
}

// ---- keys

function move(by) {
  const buttons = [...$("answers").querySelectorAll("button")];
  const at = buttons.indexOf(document.activeElement);
  const to = at < 0 ? (by > 0 ? 0 : buttons.length - 1) : (at + by + buttons.length) % buttons.length;
  buttons[to]?.focus();
}
function pressed(event) {
  if ($("guideline").open || $("card").hidden && !["u", "?", "c"].includes(event.key)) return;
  const inText = event.target.tagName === "TEXTAREA" || event.target.tagName === "INPUT";
  if (inText) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.id === "reply") { event.preventDefault(); answerText(); }
    if (event.key === "Escape") { event.target.blur(); $("asked").focus(); }
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const onButton = event.target.tagName === "BUTTON";
  const steps = current && current.kind === "steps";
  const digit = /^[1-9]$/.test(event.key) ? Number(event.key) : 0;
  if (digit) {
    if (event.repeat) return;  // a key held down is one answer
    $("answers").querySelectorAll("button")[digit - 1]?.dispatchEvent(new MouseEvent("click"));
  } else if (event.key === "u") undo();
  else if (event.key === "s") skip();
  else if (event.key === "?") showGuideline();
  else if (event.key === "c" && !$("adjudicate").hidden) conflict();
  else if (event.key === "ArrowRight") move(1);
  else if (event.key === "ArrowLeft") move(-1);
  else if (steps && event.key === "ArrowDown") { here = Math.min(here + 1, marks.length - 1); drawSteps(); }
  else if (steps && event.key === "ArrowUp") { here = Math.max(here - 1, 0); drawSteps(); }
  else if (steps && event.key === "Enter" && !onButton) answerSteps();
  else if (steps && event.key === " " && !onButton) restRight();
  else return;
  event.preventDefault();
}
document.addEventListener("keydown", pressed);
$("undo").addEventListener("click", undo);
$("skip").addEventListener("click", skip);
$("guide").addEventListener("click", showGuideline);
$("adjudicate").addEventListener("click", conflict);
$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  $("key").value = ""; $("wrong").textContent = "";
  sessionStorage.setItem(KEY, key);
  ask();
});
document.addEventListener("visibilitychange", () => {
  const now = performance.now();
  if (document.hidden) hiddenAt = now; else if (hiddenAt) { hiddenMs += now - hiddenAt; hiddenAt = 0; }
});
window.addEventListener("online", again);
window.addEventListener("pagehide", () => { if (me && !cut) call("/api/leave", {}).catch(() => 0); });
let beats = 0;
setInterval(() => { if (key && me && !cut && (beats++ % 6 === 0 || !(current || adjudicating))) ask(); }, 2500);

if (key) ask(); else { only("login"); $("key").focus(); }
