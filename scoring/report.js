// Sorting, filters, keys and light. Reads data- attributes and textContent only, and writes text by textContent: model
// output never becomes markup.
"use strict";
document.documentElement.classList.add("js");
const list = document.getElementById("cards");
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const cards = all(".card").map((node, index) => ({
  node, index, failed: "failed" in node.dataset, chooses: "chooses" in node.dataset,
  scores: new Map(Object.entries(JSON.parse(node.dataset.scores))),
  name: node.querySelector("h3").textContent, causes: all(".cause", node).map((item) => item.textContent),
  text: all("h3, .labels li, .failure", node).map((part) => part.textContent).join(" ").toLowerCase(),
}));
const byId = (id) => document.getElementById(id);
const names = new Intl.Collator("en", {numeric: true});
const state = {order: "worst", bin: null, cause: null};

const optionOf = (score) => [...byId("score").options].find((option) => option.value === score);
const worstOf = (score) => +(optionOf(score)?.dataset.worst ?? 0);
const valueOf = (card, score) => card.failed ? worstOf(score) : card.scores.get(score) ?? null;
const binOf = (value) => Math.min(9, Math.floor(value * 10));

function compare(a, b) {
  if (state.order === "name") return names.compare(a.name, b.name) || a.index - b.index;
  const score = byId("score").value, x = valueOf(a, score), y = valueOf(b, score);
  if (x === null || y === null) return (x === null) - (y === null) || a.index - b.index;
  const near = Math.abs(x - worstOf(score)) - Math.abs(y - worstOf(score));
  return (state.order === "worst" ? near : -near) || a.index - b.index;
}

function passes(card) {
  const wanted = byId("find").value.trim().toLowerCase();
  if (wanted && !card.text.includes(wanted)) return false;
  if (state.cause !== null && !card.causes.includes(state.cause)) return false;
  if (state.bin === null) return true;
  if (card.chooses) return false;  // no bar counts it
  const value = valueOf(card, state.bin.score);
  return value !== null && binOf(value) === state.bin.bin;
}

function sort() {
  for (const button of all("[data-order]")) button.setAttribute("aria-pressed", button.dataset.order === state.order);
  cards.sort(compare);
  list.append(...cards.map((card) => card.node));
}

function filter() {
  let count = 0;
  for (const card of cards) {
    card.node.hidden = !passes(card);
    count += !card.node.hidden;
  }
  for (const button of all("[data-bin]")) {
    const {score, bin} = button.dataset;
    button.setAttribute("aria-pressed", score === state.bin?.score && +bin === state.bin.bin);
  }
  for (const button of all("[data-cause]")) button.setAttribute("aria-pressed", button.dataset.cause === state.cause);
  const parts = [`${count} of ${cards.length} pages`];
  if (state.bin) parts.push(`${optionOf(state.bin.score).text} ${state.bin.bin / 10} to ${(state.bin.bin + 1) / 10}`);
  if (state.cause !== null) parts.push(state.cause);
  byId("status").textContent = parts.join(" · ");
  byId("reset").hidden = count === cards.length;
}

function showAll() {
  state.bin = state.cause = null;
  byId("find").value = "";
  filter();
}

function choose(event) {
  const button = event.target.closest("button"), link = event.target.closest(".failures a, .pick h2 a");
  if (link) showAll();
  if (!button) return;
  if (button.id === "reset") { showAll(); byId("find").focus(); }
  if (button.dataset.order) { state.order = button.dataset.order; sort(); }
  if (button.dataset.bin) {
    const pressed = button.getAttribute("aria-pressed") === "true";
    state.bin = pressed ? null : {score: button.dataset.score, bin: +button.dataset.bin};
    filter();
  }
  if (button.dataset.cause !== undefined) {
    state.cause = state.cause === button.dataset.cause ? null : button.dataset.cause;
    filter();
  }
}

function step(event) {
  const forward = event.key === "j", visible = cards.filter((card) => !card.node.hidden).map((card) => card.node);
  const place = (node) => node.getBoundingClientRect(), last = visible.length - 1;
  const margin = visible.length ? parseFloat(getComputedStyle(visible[0]).scrollMarginTop) : 0;
  const at = visible.findIndex((node) => node.contains(document.activeElement));
  const seen = at >= 0 && place(visible[at]).bottom > 0 && place(visible[at]).top < innerHeight;
  const below = visible.findIndex((node) => place(node).top > margin + 8);
  const above = visible.findLastIndex((node) => place(node).top < margin - 8);
  const next = seen ? at + (forward ? 1 : -1) : forward ? (below < 0 ? last : below) : above;
  const node = visible[Math.max(0, Math.min(last, next))];
  node?.focus({preventScroll: true});
  node?.scrollIntoView({block: "start"});
}

function walk(event, items, current) {
  const to = {ArrowRight: current + 1, ArrowLeft: current - 1, Home: 0, End: items.length - 1}[event.key];
  if (to === undefined || !items.length) return null;
  event.preventDefault();
  return items[(to + items.length) % items.length];
}

// One stop of the Tab key for each histogram and each picture; arrow keys go on from there.
function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("#viewer")) return;
  const bins = event.target.closest(".bins"), boxes = event.target.closest(".boxes");
  if (bins) {
    const items = all("button:enabled", bins), next = walk(event, items, items.indexOf(event.target));
    if (next) { for (const item of items) item.tabIndex = item === next ? 0 : -1; next.focus(); }
  } else if (boxes) {
    const items = all("rect", boxes).filter((item) => getComputedStyle(item).display !== "none");
    const spot = (item) => [item.y.baseVal.value, item.x.baseVal.value];
    items.sort((a, b) => spot(a)[0] - spot(b)[0] || spot(a)[1] - spot(b)[1]);
    const next = walk(event, items, items.indexOf(event.target));
    if (next) { next.setAttribute("tabindex", "-1"); next.focus({preventScroll: false}); }
  }
  const typing = event.target.matches("input:not([type=checkbox]), select");
  if (!typing && (event.key === "j" || event.key === "k")) step(event);
}

// A page that scrolls under a resting mouse fires pointerover too, and must not take the light from the keyboard.
const mouse = {x: -1, y: -1};
function rests(event) { return event.screenX === mouse.x && event.screenY === mouse.y; }

function light(event) {
  if (event.type === "pointerover" && rests(event)) return;
  const box = event.target.closest(".boxes rect"), card = event.target.closest(".card");
  for (const lit of all(".lit")) lit.classList.remove("lit");
  if (!box || !card) return;
  const pair = box.dataset.pair;
  const twins = pair === undefined ? [box] : all("rect", card).filter((item) => item.dataset.pair === pair);
  for (const twin of twins) twin.classList.add("lit");
  const [first, second] = twins.map((twin) => twin.textContent);
  const same = second === undefined || first === second;
  card.querySelector(".readout").textContent = same ? first : `${first}  →  ${second.replace(/^matched: /, "")}`;
}

// A picture as large as there is room, or in its own pixels; the arrow keys go to the page's other pictures.
const viewer = byId("viewer"), view = {images: [], at: 0, from: null};

function show(at) {
  view.at = (at + view.images.length) % view.images.length;
  const image = view.images[view.at], copy = new Image();
  const page = image.closest(".card, .pick").querySelector("bdi").textContent;
  copy.src = image.src;
  copy.alt = image.alt;
  viewer.querySelector(".stage").replaceChildren(copy);
  viewer.querySelector("h2").textContent = `${image.closest("figure").querySelector("b").textContent} · ${page}`;
  for (const button of all("[data-view='1'], [data-view='-1']", viewer)) button.hidden = view.images.length < 2;
}

function enlarge(event) {
  const shot = event.target.closest(".shot");
  if (!shot || getSelection().toString()) return;
  view.images = all("img", shot.closest(".shots"));
  view.from = shot.querySelector(".enlarge");
  show(view.images.indexOf(shot.querySelector("img")));
  viewer.showModal();
  viewer.querySelector("[data-view=close]").focus();
}

function turn(event) {
  const what = event.target === viewer ? "close" : event.target.closest("button")?.dataset.view;
  if (what === "close") viewer.close();
  else if (what === "zoom" || event.target.closest(".stage img")) {
    const zoomed = viewer.classList.toggle("zoomed");
    viewer.querySelector("[data-view=zoom]").setAttribute("aria-pressed", zoomed);
  } else if (what) show(view.at + Number(what));
}

function leaf(event) {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  // In its own pixels a picture may be wider than the window: then the arrows scroll it.
  if (step && !(viewer.classList.contains("zoomed") && event.target.matches(".stage"))) show(view.at + step);
}

if (list) {
  for (const group of all(".bins")) {
    all("button:enabled", group).forEach((item, index) => { item.tabIndex = index ? -1 : 0; });
  }
  for (const svg of all(".boxes")) svg.setAttribute("tabindex", "0");
  document.addEventListener("click", choose);
  document.addEventListener("keydown", press);
  document.querySelector("main").addEventListener("click", enlarge);
  viewer.addEventListener("click", turn);
  viewer.addEventListener("keydown", leaf);
  viewer.addEventListener("close", () => view.from?.focus({preventScroll: true}));
  for (const kind of ["pointerover", "focusin"]) list.addEventListener(kind, light);
  document.addEventListener("pointermove", (event) => {
    const resting = rests(event);  // a box that came under the mouse by scrolling gets the light once the mouse moves
    mouse.x = event.screenX;
    mouse.y = event.screenY;
    if (!resting && event.target.closest?.(".boxes rect:not(.lit)")) light(event);
  });
  byId("score").addEventListener("change", () => { if (state.order === "name") state.order = "worst"; sort(); });
  byId("find").addEventListener("input", filter);
  filter();
}
