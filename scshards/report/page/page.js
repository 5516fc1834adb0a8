// Draws the figures from the page's JSON: anew when another label is chosen, when a part is hidden, and
// when the page becomes light, dark, narrow or wide.
"use strict";
(() => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 600px)");
  const wide = matchMedia("(min-width: 1040px)");
  // Okabe and Ito's colours, told apart by everyone; a little darker on white, lighter on black.
  const COLORS = {
    light: ["#0072b2", "#d98200", "#009e73", "#cc5f9a", "#d55e00", "#3f9fd8", "#7a5cc2", "#8a7a00", "#5b6470", "#a64b4b"],
    dark: ["#56b4e9", "#f0a92e", "#2fc79a", "#e58fc0", "#ff8a4c", "#9ad1f5", "#b49cf0", "#e8d94a", "#a8b1bc", "#e08a8a"],
  };

  function config(width) {
    const isDark = dark.matches;
    const ink = isDark ? "#e4e8ed" : "#1c2127", soft = isDark ? "#a3adb9" : "#57606b";
    const line = isDark ? "#2c343e" : "#e4e8ed", paper = isDark ? "#12161b" : "#ffffff";
    const colors = COLORS[isDark ? "dark" : "light"];
    return {
      background: "transparent",
      font: 'system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif',
      autosize: { type: "fit-x", contains: "padding" },
      view: { stroke: null },
      axis: {
        labelColor: ink, titleColor: soft, gridColor: line, domainColor: soft, tickColor: soft,
        labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal",
        labelLimit: Math.max(90, Math.min(230, width * 0.36)), labelOverlap: "greedy",
      },
      axisY: { labelPadding: 6 },
      axisXQuantitative: { tickCount: Math.max(3, Math.min(8, Math.floor(width / 90))) },
      legend: { labelColor: ink, titleColor: soft, labelFontSize: 12, labelLimit: width * 0.6, columns: Math.max(1, Math.floor(width / 190)), title: null },
      range: {
        category: colors,
        ramp: isDark ? ["#1b2530", "#2f6f9f", "#8fd0ff"] : ["#eef4fa", "#6aa9d8", "#084a80"],
        heatmap: isDark ? ["#1b2530", "#2f6f9f", "#8fd0ff"] : ["#eef4fa", "#6aa9d8", "#084a80"],
      },
      mark: { color: colors[0] },
      bar: { cornerRadiusEnd: 2 },
      text: { color: ink },
      rule: { color: soft },
      style: { median: { color: ink }, pale: { color: ink }, strong: { color: paper }, soft: { color: soft } },
    };
  }

  const state = {};
  for (const name of Object.keys(facts.figures)) state[name] = { choice: 0, hidden: new Set(), view: null };

  function rowsOf(name) {
    const figure = facts.figures[name];
    const rows = Object.values(figure.choices)[state[name].choice];
    return rows.map((row) => Object.fromEntries(figure.fields.map((f, i) => [f, row[i]])));
  }

  async function draw(name) {
    const figure = facts.figures[name], of = state[name];
    const box = document.getElementById(name + "-chart");
    const width = box.clientWidth || 320;
    let rows = rowsOf(name);
    const spec = JSON.parse(JSON.stringify(figure.spec));
    if (figure.legend) {
      const values = [...new Set(rows.map((r) => r[figure.legend]))];
      spec.encoding.color.scale = { ...(spec.encoding.color.scale || {}), domain: values };
      legend(name, rows, values);
      rows = rows.filter((r) => !of.hidden.has(r[figure.legend]));
    }
    spec.data = { values: rows };
    spec.width = "container";
    if (of.view) of.view.finalize();
    of.view = await vegaEmbed(box, spec, {
      ast: true, actions: false, renderer: "svg", config: config(width), defaultStyle: false,
      tooltip: { theme: dark.matches ? "dark" : "light" },
    });
    const svg = box.querySelector("svg");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-labelledby", name + "-title " + name + "-about");
  }

  function legend(name, rows, values) {
    const of = state[name], box = document.getElementById(name + "-legend");
    const colors = COLORS[dark.matches ? "dark" : "light"], field = facts.figures[name].legend;
    const had = box.contains(document.activeElement) ? document.activeElement.dataset.value : undefined;
    const counts = new Map();
    for (const r of rows) counts.set(r[field], (counts.get(r[field]) || 0) + 1);
    box.replaceChildren(...values.map((value, i) => {
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.value = String(i);
      button.textContent = `${value} (${counts.get(value).toLocaleString("en")})`;
      button.style.setProperty("--dot", colors[i % colors.length]);
      button.setAttribute("aria-pressed", String(!of.hidden.has(value)));
      button.addEventListener("click", () => {
        if (!of.hidden.delete(value)) of.hidden.add(value);
        draw(name);
      });
      return button;
    }));
    if (had !== undefined) for (const b of box.children) if (b.dataset.value === had) b.focus();
  }

  for (const select of document.querySelectorAll("select[data-of]")) {
    select.addEventListener("change", () => {
      const name = select.dataset.of;
      state[name].choice = Number(select.value);
      state[name].hidden.clear();
      for (const table of document.querySelectorAll(`#${name} [data-choice]`)) {
        table.hidden = table.dataset.choice !== select.value;
      }
      draw(name);
    });
  }

  async function drawAll() {
    delete document.documentElement.dataset.drawn;
    for (const name of Object.keys(facts.figures)) await draw(name);
    document.documentElement.dataset.drawn = "all";
  }
  for (const query of [dark, narrow, wide]) query.addEventListener("change", drawAll);
  drawAll();
})();
