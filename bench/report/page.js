// What the page does: draw the chosen scene, filter and sort the table, show a case. Text goes in as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// Charts -----------------------------------------------------------------------------------------------------------
let tip = null;
function tooltip(_handler, event, _item, value) {
  tip?.remove();
  tip = null;
  if (value === null || value === undefined || value === "") return;
  tip = element("div", "", { id: "tip", role: "tooltip" });
  for (const [name, text] of typeof value === "object" ? Object.entries(value) : [["", value]]) {
    const line = element("div", "");
    line.append(element("b", name), element("span", String(text)));
    tip.append(line);
  }
  document.body.append(tip);
  const [wide, high] = [tip.offsetWidth, tip.offsetHeight];
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - wide - 4))}px`;
  tip.style.top = `${event.clientY + 14 + high > innerHeight ? event.clientY - high - 10 : event.clientY + 14}px`;
}

class Drawing {
  constructor(container, { spec, beside }, rows) {
    this.container = container;
    this.beside = beside;
    // Panels above each other share one width, which Vega-Lite calls childWidth.
    this.width = spec.signals?.some((signal) => signal.name === "childWidth") ? "childWidth" : "width";
    spec.data.find((one) => one.name === "rows").values = rows;
    // 1: errors. A scene in which nothing could be measured has scales without an extent, and that is no fault.
    const options = { mode: "vega", renderer: "svg", actions: false, defaultStyle: false, logLevel: 1, tooltip };
    this.ready = window.vegaEmbed(container, spec, options).then(({ view }) => {
      view.addEventListener("click", (_event, item) => {
        if (Number.isInteger(item?.datum?.case)) location.hash = `case-${item.datum.case}`;
      });
      new ResizeObserver(() => this.fit(view)).observe(container);
      return view;
    });
  }
  async show(rows) {
    const view = await this.ready;
    await view.data("rows", rows).signal(this.width, this.room()).resize().runAsync();
  }
  async fit(view) {
    if (this.container.clientWidth && view.signal(this.width) !== this.room())
      await view.signal(this.width, this.room()).resize().runAsync();
  }
  room() {
    return Math.max(120, Math.min(760, this.container.clientWidth - this.beside - 22));
  }
}

const drawings = new Map();
const drawn = [];
function draw(key, container, chart, rows) {
  if (!drawings.has(key)) drawings.set(key, new Drawing(container, chart, rows));
  drawn.push(drawings.get(key).show(rows));
}

function figures(chart, rows) {
  const table = element("table", "");
  const head = table.createTHead().insertRow();
  for (const [, heading] of chart.columns) head.append(element("th", heading, { scope: "col" }));
  const body = table.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    chart.columns.forEach(([field], column) => {
      const value = row[field];
      const text = value === null || value === "" ? "–" : typeof value === "number" ? String(+value.toPrecision(3)) : value;
      const cell = element(column ? "td" : "th", column ? text : "", column ? {} : { scope: "row" });
      if (!column) cell.append(element("a", text, { href: `#case-${row.case}` }));
      line.append(cell);
    });
  }
  return table;
}

function showScene(key) {
  const view = data.views.find((one) => one.key === key);
  if (!view) return;
  byId("scene").value = key;
  for (const [name, chart] of Object.entries(data.charts)) {
    const figure = byId(`chart-${name}`);
    const rows = chart.rows[view.charts[name]] ?? [];
    figure.hidden = rows.length === 0;
    byId(`missing-${name}`).hidden = rows.length > 0;
    figure.querySelector("figcaption").textContent = chart.captions[view.charts[name]] ?? "";
    figure.querySelector("details div").replaceChildren(figures(chart, rows));
    if (rows.length) draw(name, figure.querySelector(".drawing"), chart, rows);
  }
}

for (const view of data.views) {
  const runs = new Set(data.views.map((one) => one.run)).size;
  byId("scene").append(element("option", (runs > 1 ? `run ${view.run + 1}: ` : "") + view.title, { value: view.key }));
}
byId("scene").addEventListener("change", (event) => showScene(event.target.value));
for (const button of document.querySelectorAll("#best [data-view]"))
  button.addEventListener("click", () => {
    showScene(button.dataset.view);
    byId("charts").scrollIntoView();
    byId("scene").focus({ preventScroll: true });
  });
// Of the run that was named last the scene of which most is known.
const last = data.views.filter((view) => view.run === data.views.at(-1).run);
const fullest = last.reduce((best, view) => (best && best.measured >= view.measured ? best : view), null);
if (fullest) showScene(fullest.key);

// Table ------------------------------------------------------------------------------------------------------------
const table = byId("table");
const rows = [...table.tBodies[0].rows];
function filter() {
  const words = byId("find").value.toLowerCase().split(/\s+/).filter(Boolean);
  const chosen = [...document.querySelectorAll("#filters [data-axis]")].filter((one) => one.value !== "");
  let shown = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !(
      words.every((word) => text.includes(word)) && chosen.every((one) => row.dataset[one.dataset.axis] === one.value)
    );
    shown += row.hidden ? 0 : 1;
  }
  byId("count").textContent = `${shown} of ${rows.length} cases`;
}
byId("filters").addEventListener("input", filter);
byId("filters").addEventListener("reset", () => setTimeout(filter));
byId("filters").addEventListener("submit", (event) => event.preventDefault());

// The figure a cell begins with; words and dashes have none and come last, whichever way the others go.
const number = (text) => (/^[\d.]/.test(text) ? parseFloat(text.replaceAll(",", "")) : NaN);
function sort(heading, column) {
  const down = heading.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const keyed = rows.map((row, place) => [row, row.cells[column].textContent, number(row.cells[column].textContent), place]);
  const figures = heading.classList.contains("n");
  keyed.sort(([, text, value, place], [, otherText, otherValue, otherPlace]) => {
    if (figures && Number.isNaN(value) !== Number.isNaN(otherValue)) return Number.isNaN(value) ? 1 : -1;
    const order = figures ? value - otherValue || 0 : text.localeCompare(otherText);
    return (down ? -order : order) || place - otherPlace;
  });
  table.tBodies[0].append(...keyed.map(([row]) => row));
}
[...table.tHead.rows[0].cells].forEach((heading, column) => {
  if (heading.classList.contains("still")) return;
  const button = element("button", heading.textContent, { type: "button" });
  button.addEventListener("click", () => sort(heading, column));
  heading.replaceChildren(button);
});

// A case -----------------------------------------------------------------------------------------------------------
const dialog = byId("case");
function openCase() {
  const found = /^#case-(\d+)$/.exec(location.hash);
  const one = found && data.cases[+found[1]];
  if (!one) return;
  byId("case-id").textContent = one.id;
  byId("case-status").textContent = [one.status, one.reason].filter(Boolean).join(": ");
  byId("case-status").className = one.status === "ok" ? "soft" : "bad";
  byId("case-warnings").textContent = one.warnings.join(" ");
  byId("case-warnings").hidden = one.warnings.length === 0;
  byId("case-repeat").textContent = one.repeat;
  const spent = Object.entries(one.spent_s).map(([phase, seconds]) => [`${phase}, s`, seconds]);
  const axes = one.axes.map((value, place) => [data.axes[place], value]);
  const figures = one.figures.map(([place, value]) => [data.names[place], value]);
  const all = [...axes, ...figures, ...spent, ["started", one.started]];
  byId("case-figures").replaceChildren(
    ...all.map(([name, text]) => {
      const pair = element("div", "");
      pair.append(element("dt", name), element("dd", String(text)));
      return pair;
    }),
  );
  if (!dialog.open) dialog.showModal();
  const timed = one.samples.map(([at_s, ms, low_ms, high_ms, mark, mhz]) => ({ at_s, ms, low_ms, high_ms, mark, mhz }));
  dialog.querySelector(".missing").hidden = timed.length > 0;
  byId("case-samples").hidden = timed.length === 0;
  if (timed.length) draw("samples", byId("case-samples"), data.samples, timed);
}
addEventListener("hashchange", openCase);
dialog.addEventListener("close", () => {
  const row = document.querySelector(location.hash || "#table");
  history.replaceState(null, "", location.pathname + location.search);
  row?.querySelector("a")?.focus();
});
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
openCase();
await Promise.all(drawn);
document.documentElement.dataset.ready = "yes";
