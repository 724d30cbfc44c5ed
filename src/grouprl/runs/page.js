  // What the pages share that have a script: it stands at the beginning of each.
  const $ = (id) => document.getElementById(id);

  // What is put into the page goes in as text or as numbers, never as markup: what a model writes cannot become part of it.
  function make(tag, name, ...children) {
    const node = document.createElement(tag);
    if (name) node.className = name;
    for (const child of children) if (child !== null && child !== undefined) node.append(child);
    return node;
  }
  const number = (x) => x === null || x === undefined ? "–" : String(Math.abs(x) < 100 ? +(+x).toPrecision(3) : Math.round(x)).replace("-", "−");
  const signed = (x) => (x > 0 ? "+" : "") + number(x);
  const plural = (n, word) => n.toLocaleString("en") + " " + word + (n === 1 ? "" : "s");
  const mean = (xs) => xs.length ? xs.reduce((a, b) => a + b, 0) / xs.length : null;
  const side = (x) => x > 0 ? "up" : x < 0 ? "down" : "";

  // Round numbers from `least` to `most`, about `about` of them.
  function ticks(least, most, about) {
    const raw = (most - least) / about || 1, power = 10 ** Math.floor(Math.log10(raw));
    const unit = [1, 2, 5, 10].map((k) => k * power).find((k) => k >= raw);
    const list = [];
    for (let v = Math.ceil(least / unit - 1e-9) * unit; v <= most + unit * 1e-9; v += unit) list.push(Math.abs(v) < unit * 1e-9 ? 0 : v);
    return list;
  }

  function theme(dark) {
    document.documentElement.classList.toggle("dark", dark);
    document.documentElement.classList.toggle("light", !dark);
    $("theme").textContent = dark ? "Light" : "Dark";
  }
  $("theme").onclick = () => theme(!document.documentElement.classList.contains("dark"));
  const prefers = matchMedia("(prefers-color-scheme: dark)");
  prefers.addEventListener("change", () => theme(prefers.matches));
  theme(prefers.matches);
