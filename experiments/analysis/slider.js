// The page's slider: filters left in each layer, and accuracy over FLOPs, at any cut of any method. Draws SVG.
const data = JSON.parse(document.getElementById("cuts").textContent);
const [experiment, method] = document.querySelectorAll(".controls select");
const slider = document.querySelector(".controls input"), said = document.querySelector(".controls output");
const svg = document.querySelector("svg"), table = svg.nextElementSibling.firstElementChild;

const shape = (name, attributes, text = "") => {
  const given = Object.entries(attributes).map(([key, value]) => `${key}="${value}"`).join(" ");
  return `<${name} ${given}>${text}</${name}>`;
};
const label = (x, y, text, anchor = "middle") => shape("text", { x, y, "text-anchor": anchor }, text);

function options(select, entries) {
  const before = select.value;
  select.innerHTML = entries.map(([value, text]) => `<option value="${value}">${text}</option>`).join("");
  if (entries.some(([value]) => value === before)) select.value = before;
}

function bars(run, own, at) {
  const [left, width, bottom, height] = [64, 396, 280, 240], top = Math.max(...run.dense), step = width / run.dense.length;
  const bar = (n, layer, fill) => {
    const tall = (n / top) * height;
    return shape("rect", { x: left + layer * step, y: bottom - tall, width: 0.85 * step, height: tall, fill });
  };
  const drawn = run.dense.map((n, layer) => bar(n, layer, "#9995") + bar(own.widths[at][layer], layer, own.color));
  const marks = label(left - 6, bottom - height + 4, top, "end") + label(left - 6, bottom, 0, "end");
  return drawn.join("") + marks + label(left + width / 2, bottom + 46, "filters left, first to last layer (grey: dense)");
}

function curves(run, own, at) {
  const [left, width, bottom, height] = [530, 335, 280, 240], most = Math.max(...own.mflops);
  const x = (mflops) => left + (mflops / most) * width, y = (accuracy) => bottom - (accuracy / 100) * height;
  let drawn = "";
  for (const percent of [0, 25, 50, 75, 100]) {
    drawn += shape("path", { d: `M${left} ${y(percent)}h${width}`, stroke: "#9994" });
    drawn += label(left - 6, y(percent) + 4, percent, "end");
  }
  const counts = [1, ...own.tuned.map(([target]) => target)].sort((a, b) => b - a);
  const apart = counts.reduce((kept, count) => kept.at(-1) - count < 0.19 ? kept : [...kept, count], []);
  for (const count of apart) drawn += label(x(count * most), bottom + 20, `${Math.round(100 * count)}%`);
  for (const each of [...Object.values(run.methods).filter((each) => each !== own), own]) {
    const d = each.mflops.map((mflops, i) => `${i ? "L" : "M"}${x(mflops).toFixed(1)} ${y(each.accuracy[i]).toFixed(1)}`);
    drawn += shape("path", { d: d.join(""), fill: "none", stroke: each.color, "stroke-width": each === own ? 3 : 1.5 });
    for (const [, mflops, accuracy] of each.tuned)
      drawn += shape("circle", { cx: x(mflops), cy: y(accuracy), r: 3.5, fill: each.color });
  }
  const now = { cx: x(own.mflops[at]), cy: y(own.accuracy[at]), r: 7, fill: own.color, stroke: "currentColor" };
  return drawn + shape("circle", now) + label(left + width / 2, bottom + 46, "accuracy (%) over FLOPs left");
}

let share = 0.7; // of the FLOPs; kept when the experiment changes

function show(event) {
  const run = data[experiment.value], last = run.shares.length - 1;
  options(method, Object.entries(run.methods).map(([name, each]) => [name, each.label]));
  if (event?.target === slider) share = run.shares[last - slider.value];
  const distances = run.shares.map((each) => Math.abs(each - share));
  const at = distances.indexOf(Math.min(...distances)), own = run.methods[method.value];
  slider.max = last;
  slider.value = last - at;
  said.textContent = `${(100 * run.shares[at]).toFixed(0)}% of the FLOPs`;
  svg.innerHTML = bars(run, own, at) + curves(run, own, at);
  const rows = Object.values(run.methods).map((each) => {
    const left = each.widths[at].reduce((sum, n) => sum + n, 0);
    const tuned = each.tuned.find(([target]) => Math.abs(target - run.shares[at]) < 0.006);
    return `<tr><td><b style="color:${each.color}">■</b> ${each.label}</td><td>${each.mflops[at].toFixed(1)}</td>` +
      `<td>${left}</td><td>${each.accuracy[at].toFixed(1)}</td>` +
      `<td>${tuned ? tuned[2].toFixed(1) : "–"}</td></tr>`;
  });
  table.innerHTML = "<tr><th>method</th><th>MFLOPs</th><th>filters left</th><th>recalibrated only, first trial (%)</th><th>fine-tuned, mean of trials (%)</th></tr>" + rows.join("");
}

options(experiment, Object.entries(data).map(([name, run]) => [name, run.title]));
for (const control of [experiment, method, slider]) control.addEventListener("input", show);
show();
