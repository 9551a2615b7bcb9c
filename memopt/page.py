"""The style and the script of the HTML report, kept in the page so that it works from a mail or a share, offline."""

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1c2330; --soft: #5d6675; --line: #e2e6ec;
  --good: #1a7f4b; --bad: #c0312b; --accent: #2f5fd0; --forward: #2f5fd014; --backward: #d08a2f14;
  --optimizer: #7a4fc014; --b0: #4b73b0; --b1: #8b6bb1; --b2: #93a1b3; --b3: #dd8f36; --b4: #3f9d6d; --b5: #cf5a57; }
@media (prefers-color-scheme: dark) { :root { --page: #12151b; --card: #1b2029; --ink: #e7ebf2; --soft: #9aa5b5;
  --line: #2d3440; --good: #4cc38a; --bad: #ff7b72; --accent: #7aa2ff; --forward: #7aa2ff1c; --backward: #e0a2551c;
  --optimizer: #b08cf01c; --b0: #5f8bd0; --b1: #a283cc; --b2: #7f8da0; --b3: #e0a255; --b4: #52b583; --b5: #e3736f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 15px; margin: 0 0 10px; } h3 { font-size: 13px; margin: 14px 0 4px; }
p { margin: 4px 0; } .soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
code, td.num, td.name { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 12.5px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px;
  margin-top: 16px; overflow-x: auto; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 16px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.card b { display: block; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 12.5px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 12px; }
th, td { padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th.num, td.num { text-align: right; white-space: nowrap; } tr:last-child td { border-bottom: 0; }
.bar { display: block; height: 7px; border-radius: 4px; background: var(--accent); min-width: 1px; margin-top: 7px; }
td.share { width: 22%; } td.name { word-break: break-all; }
.chart { position: relative; } svg.timeline { display: block; width: 100%; height: auto; }
.phase.forward { fill: var(--forward); } .phase.backward { fill: var(--backward); }
.phase.optimizer { fill: var(--optimizer); } .grid { stroke: var(--line); stroke-width: 1; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); } .tick { text-anchor: end; }
.phase-name { text-anchor: middle; } .phase-name.last { text-anchor: end; } .band { stroke: none; opacity: .92; }
.b0 { fill: var(--b0); } .b1 { fill: var(--b1); } .b2 { fill: var(--b2); } .b3 { fill: var(--b3); }
.b4 { fill: var(--b4); } .b5 { fill: var(--b5); }
.budget { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 6 4; }
svg .budget-name { fill: var(--bad); font-weight: 600; } .peak { fill: var(--ink); stroke: var(--card); }
svg .peak-name { fill: var(--ink); font-weight: 600; } .peak.over { fill: var(--bad); }
svg .peak-name.over { fill: var(--bad); }
svg .budget-name, svg .peak-name { paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
.measured { stroke: var(--ink); stroke-width: 2; stroke-dasharray: 2 3; }
.legend i.found { height: 0; border-top: 2px dotted var(--ink); vertical-align: middle; }
.cursor { stroke: var(--ink); stroke-width: 1; opacity: 0; pointer-events: none; }
.tip { position: absolute; pointer-events: none; display: none; background: var(--card); color: var(--ink);
  border: 1px solid var(--line); border-radius: 8px; padding: 8px 10px; font-size: 12px; max-width: 340px;
  box-shadow: 0 4px 16px #0003; z-index: 2; overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 12px; color: var(--soft); margin-top: 8px; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px; }
.legend .b0 { background: var(--b0); } .legend .b1 { background: var(--b1); } .legend .b2 { background: var(--b2); }
.legend .b3 { background: var(--b3); } .legend .b4 { background: var(--b4); } .legend .b5 { background: var(--b5); }
summary { cursor: pointer; color: var(--accent); margin-top: 10px; }
@media print { body { background: #fff; } section, .card { break-inside: avoid; } }
"""

# Shows the step under the pointer. data: a panel's columns as [start x, end x, title, source, total, lines].
SCRIPT = """
for (const chart of document.querySelectorAll(".chart")) {
  const data = JSON.parse(chart.querySelector("script").textContent);
  const svg = chart.querySelector("svg"), cursor = svg.querySelector(".cursor"), tip = chart.querySelector(".tip");
  const line = (text, tag) => { const e = document.createElement(tag); e.textContent = text; tip.append(e); };
  svg.addEventListener("pointerleave", () => { tip.style.display = "none"; cursor.style.opacity = 0; });
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
    const x = (event.clientX - box.left) * view.width / box.width;
    const found = data.find(([start, end]) => start <= x && x < end);
    if (!found) { tip.style.display = "none"; cursor.style.opacity = 0; return; }
    const middle = (found[0] + found[1]) / 2;
    for (const [name, value] of [["x1", middle], ["x2", middle], ["y1", 24], ["y2", view.height - 22]])
      cursor.setAttribute(name, value);
    cursor.style.opacity = .6;
    tip.replaceChildren();
    line(found[4], "b");
    for (const text of [found[2], found[3], ...found[5]]) if (text) line(text, "div");
    tip.style.display = "block";
    const left = middle * box.width / view.width;
    tip.style.left = (left > box.width / 2 ? left - tip.offsetWidth - 12 : left + 12) + "px";
    tip.style.top = "24px";
  });
}
"""
