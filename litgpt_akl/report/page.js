// a figure is made when it comes near the screen, so that a long page opens at once
const plots = new Map();
for (const item of JSON.parse(document.getElementById("figures").textContent)) {
  plots.set(document.getElementById(item.target_id), item);
}
const figures = [];
const hidden = new Set();
async function draw(place) {
  const item = plots.get(place);
  if (item === undefined) return;
  plots.delete(place);
  const views = await Bokeh.embed.embed_item(item);
  // beside the figure there is one for Bokeh's notifications
  figures.push(...[...views].filter((view) => view.model.id === item.root_id));
  choose();
  place.dataset.drawn = "true";
}
const observer = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    observer.unobserve(entry.target);
    draw(entry.target);
  }
}, { rootMargin: "200px" });
for (const place of plots.keys()) observer.observe(place);
// the others follow when there is nothing else to do, so that all are there to be printed
async function drawOthers() {
  for (const place of [...plots.keys()]) {
    await new Promise((resolve) => requestIdleCallback(resolve));
    if (place.checkVisibility()) await draw(place);
  }
}
addEventListener("load", () => setTimeout(drawOthers, 1000));
// paper is light, and shows the settings
let folded = [];
addEventListener("beforeprint", () => {
  document.documentElement.dataset.printed = "";
  folded = [...document.querySelectorAll("details.card:not([open])")];
  for (const fold of folded) fold.open = true;
  // at once, and all of it: a request would come too late
  for (const figure of figures) { figure.invalidate_painters(); figure.paint(); }
});
addEventListener("afterprint", () => {
  delete document.documentElement.dataset.printed;
  for (const fold of folded) fold.open = false;
  for (const figure of figures) figure.request_repaint();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const figure of figures) figure.request_repaint();
});

// runs that are ticked
function choose() {
  for (const element of document.querySelectorAll("[data-run]")) element.classList.toggle("off", hidden.has(+element.dataset.run));
  for (const figure of figures) for (const renderer of figure.model.renderers) renderer.visible = !hidden.has(renderer.tags[0]);
}
for (const box of document.querySelectorAll("input.run")) {
  box.addEventListener("change", () => { hidden[box.checked ? "delete" : "add"](+box.value); choose(); });
}

// what both models hold most probable at a token
const tip = document.getElementById("tip"), tips = JSON.parse(document.getElementById("tips").textContent);
const spans = new Map([...document.querySelectorAll(".answer .heat i")].map((span, place) => [span, tips[place]]));
function percent(share) { return share === null ? "-" : share < 0.001 ? "<0.1%" : `${(100 * share).toFixed(1)}%`; }
function show(span) {
  document.querySelector("i.open")?.classList.remove("open");
  tip.hidden = !spans.has(span);
  if (tip.hidden) return;
  const [kl, teacher, student] = spans.get(span), table = document.createElement("table");
  span.classList.add("open");
  const add = (kind, texts) => { const row = table.insertRow(); for (const text of texts) row.appendChild(document.createElement(kind)).textContent = text; };
  add("th", ["teacher", "", "student", ""]);
  teacher.forEach(([token, share], rank) => add("td", [token, percent(share), student[rank][0], percent(student[rank][1])]));
  const title = document.createElement("div");
  title.textContent = `${span.textContent.trim()}  KL ${kl === null ? "is no number" : `${kl.toPrecision(3)} nats`}`;
  tip.replaceChildren(title, table);
  const box = span.getBoundingClientRect(), wide = document.documentElement.clientWidth;
  tip.style.left = `${scrollX + Math.max(8, Math.min(box.left, wide - tip.offsetWidth - 8))}px`;
  tip.style.top = `${scrollY + (box.bottom + tip.offsetHeight + 8 < innerHeight ? box.bottom + 6 : box.top - tip.offsetHeight - 6)}px`;
}
addEventListener("pointerover", (event) => show(event.target));
addEventListener("click", (event) => show(event.target));

// while the run goes on the page comes anew, as its reader left it
const isReload = performance.getEntriesByType("navigation")[0]?.type === "reload";
const kept = JSON.parse((isReload && sessionStorage.getItem(location.pathname)) || "{}");
for (const id of kept.open ?? []) document.getElementById(id)?.setAttribute("open", "");
if (kept.follow === false && run.goesOn) document.getElementById("follow").checked = false;
if (kept.scroll !== undefined) scrollTo(0, kept.scroll);
addEventListener("pagehide", () => sessionStorage.setItem(location.pathname, JSON.stringify({
  scroll: scrollY,
  open: [...document.querySelectorAll("details[open]")].map((fold) => fold.id),
  follow: document.getElementById("follow")?.checked,
})));
const EVERY = 15;
function follow() {
  const age = Date.now() / 1000 - run.refreshed, minutes = Math.floor(age / 60);
  const isLost = age > run.patience;
  document.getElementById("news").textContent = isLost
    ? `Nothing new for ${minutes} minutes: the run may have been stopped. Reload the page when it goes on.`
    : `Last news ${minutes < 1 ? "less than a minute" : `${minutes} min`} ago.`;
  const isRead = document.hidden || !tip.hidden || !getSelection().isCollapsed;
  if (!isLost && !isRead && document.getElementById("follow").checked) location.reload();
}
if (run.goesOn) { setInterval(follow, EVERY * 1000); }
