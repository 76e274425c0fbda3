"use strict";

(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const { layers: L, top: K, modes } = page;
  const BASE = modes.indexOf("base");
  const EXPERT = modes.indexOf("expert");
  const MINUS = "\u2212";
  const main = document.getElementById("main");
  const details = document.getElementById("details");
  const hint = [...details.childNodes];
  const controls = document.getElementById("controls").elements;
  const state = { colour: "gate", layer: -1, mode: EXPERT, scale: "fitted", current: null, kept: false };

  // ---- data

  function unpack(text, Type) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return new Type(bytes.buffer);
  }

  const excerpts = page.excerpts.map((packed, number) => ({
    number,
    title: packed.title,
    T: packed.length,
    start: packed.start,
    facts: packed.facts && new Set(packed.facts),
    shown: packed.shown,
    tokens: unpack(packed.tokens, Uint32Array),
    gates: unpack(packed.gates, Uint8Array),
    logProbs: unpack(packed.logProbs, Float32Array),
    topTokens: unpack(packed.topTokens, Uint32Array),
    topLogProbs: unpack(packed.topLogProbs, Float32Array),
    context: unpack(packed.context, Uint32Array),
  }));

  const gateAt = (e, mode, layer, i) => e.gates[(mode * L + layer) * e.T + i] / 255;
  const logProbAt = (e, mode, i) => e.logProbs[mode * e.T + i];
  const gainAt = (e, i) => logProbAt(e, EXPERT, i) - logProbAt(e, BASE, i);
  const textOf = (e, i) => e.shown[i] ?? page.texts[e.tokens[i]];

  function meanGates(e, mode) {
    const sums = new Float64Array(e.T);
    for (let layer = 0; layer < L; layer++) {
      const offset = (mode * L + layer) * e.T;
      for (let i = 0; i < e.T; i++) sums[i] += e.gates[offset + i];
    }
    return sums.map((sum) => sum / (255 * L));
  }

  /** What colours the tokens of an excerpt; the first one's value means nothing. */
  function values(e) {
    if (state.colour === "gain") return Float64Array.from({ length: e.T }, (_, i) => gainAt(e, i));
    if (state.layer < 0) return meanGates(e, state.mode);
    return Float64Array.from({ length: e.T }, (_, i) => gateAt(e, state.mode, state.layer, i));
  }

  function quantile(numbers, share) {
    const sorted = Float64Array.from(numbers).sort();
    return sorted[Math.round(share * (sorted.length - 1))];
  }

  const wide = (low, high) => (low < high ? [low, high] : [Math.max(0, low - 0.5), low + 0.5]);

  /** The scale of the tokens' colours. */
  function limitsOf(all) {
    const numbers = all.flatMap((of) => Array.from(of.subarray(1)));
    if (state.colour === "gain") {
      const most = quantile(numbers.map(Math.abs), 0.95) || 1;
      return [-most, most];
    }
    return state.scale === "full" ? [0, 1] : wide(quantile(numbers, 0.01), quantile(numbers, 0.99));
  }

  /** The scale of the heat maps, by counting the 256 values that a gate may have. */
  function mapLimits() {
    if (state.scale === "full") return [0, 1];
    const counts = new Float64Array(256);
    for (const e of excerpts) {
      for (let layer = 0; layer < L; layer++) {
        const offset = (state.mode * L + layer) * e.T;
        for (let i = 1; i < e.T; i++) counts[e.gates[offset + i]]++;
      }
    }
    const total = counts.reduce((a, b) => a + b, 0);
    const at = (share) => {
      let seen = 0;
      return counts.findIndex((count) => (seen += count) > share * (total - 1)) / 255;
    };
    return wide(at(0.01), at(0.99));
  }

  const unit = (value, [low, high]) => Math.min(1, Math.max(0, (value - low) / (high - low)));

  // ---- text

  function number(value, digits) {
    return value.toFixed(digits).replace("-", MINUS);
  }

  function signed(value, digits) {
    return (value > 0 ? "+" : "") + number(value, digits);
  }

  /** White space that would not be seen by itself. */
  function visible(text) {
    const signs = { "\n": "⏎", "\r": "␍", "\t": "⇥" };
    return text.replace(/[\n\r\t]/g, (c) => signs[c]).replace(/^ +| +$/g, (s) => "␣".repeat(s.length));
  }

  function element(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children);
    return node;
  }

  function heading(names) {
    const cells = names.map((name) => element("th", { scope: "col" }, name));
    return element("thead", {}, element("tr", {}, ...cells));
  }

  function svg(tag, attributes, text) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    return node;
  }

  // ---- what is built once

  function tokenSpan(e, i) {
    const span = document.createElement("span");
    const kinds = ["token"];
    if (i === 0) kinds.push("first");
    if (e.start !== null && i >= e.start) kinds.push("answer");
    if (e.facts?.has(i)) kinds.push("fact");
    span.className = kinds.join(" ");
    span.id = `t${e.number}-${i}`;
    span.setAttribute("role", "option");
    const text = textOf(e, i);
    // A token of line breaks shows as such and still breaks the line; one without a text of its own is a dot.
    span.textContent = text === "" ? "·" : text.replaceAll("\t", "⇥\t").replaceAll("\n", "⏎\n");
    return span;
  }

  function buildExcerpt(e) {
    const small = `${e.T} tokens` + (e.start === null ? "" : `, answer from token ${e.start}`);
    const box = { class: "tokens", role: "listbox", tabindex: "0", "aria-label": `Tokens of ${e.title}` };
    e.box = element("div", box);
    e.box.dataset.excerpt = e.number;
    e.spans = Array.from({ length: e.T }, (_, i) => tokenSpan(e, i));
    e.box.append(...e.spans);

    e.canvas = element("canvas", { width: e.T, height: L, "aria-hidden": "true" });
    e.canvas.dataset.excerpt = e.number;
    e.column = element("div", { class: "column" });
    e.row = element("div", { class: "row" });
    e.sheet = element("div", { class: "sheet" }, e.canvas, e.row, e.column);
    // Cells are square up to a size; long texts scroll.
    const cell = Math.max(3, Math.min(6, 330 / L));
    e.sheet.style.height = `${Math.max(90, Math.min(480, cell * L))}px`;
    e.sheet.style.minWidth = `${3 * e.T}px`;
    e.sheet.style.maxWidth = `${24 * e.T}px`;
    e.readout = element("div", { class: "across", role: "status" });
    e.caption = element("figcaption");
    const ends = ["layer 1", `${L}`].map((text) => element("span", {}, text));
    const axis = element("div", { class: "axis" }, ...ends);
    const label = { tabindex: "0", role: "group", "aria-label": "Heat map of gates" };
    e.plane = element("div", { class: "plane", ...label }, e.sheet);
    const map = element("div", { class: "map" }, axis, e.plane, e.readout);

    const keys = [];
    if (e.start !== null) keys.push(element("span", { class: "key answer" }, "answer"));
    if (e.facts) keys.push(element("span", { class: "key fact" }, "T_fact: about facts"));
    e.means = element("span", {});
    const contexts = e.context.filter((context, i) => context < i);
    const windows =
      "Longer than a window: computed in windows that overlap by half, so that after the first one a token " +
      `sees at least ${Math.min(...contexts)} tokens before it.`;
    return element(
      "section",
      { class: "excerpt", id: `excerpt-${e.number + 1}` },
      element("h2", {}, e.title, element("small", {}, small)),
      element("p", { class: "note" }, ...keys, e.means),
      ...(contexts.length ? [element("p", { class: "note" }, windows)] : []),
      e.box,
      element("figure", {}, e.caption, map),
    );
  }

  function buildContents() {
    if (excerpts.length < 2) return;
    const list = document.querySelector("#contents ol");
    for (const e of excerpts) {
      // Of a prompt with an answer, what stands around the answer: prompts may all begin alike.
      const first = Math.max(0, (e.start ?? 0) - 24);
      const texts = Array.from({ length: Math.min(e.T - first, 48) }, (_, i) => textOf(e, first + i));
      const start = (first ? "…" : "") + texts.join("").replace(/\s+/g, " ");
      list.append(
        element(
          "li",
          {},
          element(
            "a",
            { href: `#excerpt-${e.number + 1}` },
            element("span", { class: "title" }, e.title),
            element("span", { class: "start" }, start),
            element("span", { class: "number" }, `${e.T} tokens`),
          ),
        ),
      );
    }
    document.getElementById("contents").hidden = false;
  }

  // ---- colours

  /** 256 colours of a ramp as the style sheet mixes them. */
  function ramp() {
    const style = getComputedStyle(document.documentElement);
    const [weak, strong] = ["--weak", "--gate"].map((name) => style.getPropertyValue(name).trim());
    const canvas = element("canvas", { width: 256, height: 1 });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    for (let i = 0; i < 256; i++) {
      context.fillStyle = `color-mix(in oklab, ${strong} ${(100 * i) / 255}%, ${weak})`;
      context.fillRect(i, 0, 1, 1);
    }
    return new Uint32Array(context.getImageData(0, 0, 256, 1).data.buffer);
  }

  function colourTokens() {
    const all = excerpts.map(values);
    const limits = limitsOf(all);
    main.dataset.colour = state.colour;
    excerpts.forEach((e, n) => {
      for (let i = 1; i < e.T; i++) {
        const value = all[n][i];
        const span = e.spans[i];
        const share = state.colour === "gain" ? unit(Math.abs(value), [0, limits[1]]) : unit(value, limits);
        span.style.setProperty("--v", share.toFixed(3));
        span.classList.toggle("less", state.colour === "gain" && value < 0);
      }
    });
    const gain = state.colour === "gain";
    const legend = document.getElementById("legend");
    const full = !gain && state.scale === "full";
    const show = gain ? signed : number;
    const [low, high] = limits.map((limit) => show(limit, 2));
    document.getElementById("low").textContent = (full ? "" : "≤ ") + low;
    document.getElementById("high").textContent = (full ? "" : "≥ ") + high;
    legend.classList.toggle("gain", gain);
    legend.setAttribute("aria-label", `Colours from ${low} to ${high}`);
    controls.layer.closest("label").hidden = gain;
  }

  function drawMaps() {
    const colours = ramp();
    const limits = mapLimits();
    const table = colours.map((_, gate) => colours[Math.round(255 * unit(gate / 255, limits))]);
    for (const e of excerpts) {
      const image = new ImageData(e.T, L);
      const pixels = new Uint32Array(image.data.buffer);
      const offset = state.mode * L * e.T;
      for (let k = 0; k < pixels.length; k++) if (k % e.T) pixels[k] = table[e.gates[offset + k]];
      e.canvas.getContext("2d").putImageData(image, 0, 0);
      const [low, high] = limits.map((limit) => number(limit, 2));
      e.caption.replaceChildren(
        `Gates in ${modes[state.mode]} mode, layer by token: `,
        `${low} `,
        element("span", { class: "ramp" }),
        ` ${high}`,
      );
    }
    for (const name of document.querySelectorAll(".mode-name")) name.textContent = modes[state.mode];
  }

  function markLayer() {
    for (const e of excerpts) {
      const shown = state.colour === "gate" && state.layer >= 0;
      e.row.style.display = shown ? "block" : "none";
      e.row.style.top = `${(100 * state.layer) / L}%`;
      e.row.style.height = `${100 / L}%`;
    }
  }

  function showMeans() {
    for (const e of excerpts) {
      const gates = meanGates(e, state.mode);
      const mean = (keep) => {
        const kept = Array.from(gates).filter((_, i) => i > 0 && keep(i));
        return kept.length ? number(kept.reduce((a, b) => a + b) / kept.length, 3) : "–";
      };
      const parts = [`mean gate ${mean(() => true)}`];
      if (e.start !== null) parts.push(`prompt ${mean((i) => i < e.start)}`);
      if (e.start !== null && !e.facts) parts.push(`answer ${mean((i) => i >= e.start)}`);
      if (e.facts) {
        parts.push(`T_fact ${mean((i) => e.facts.has(i))}`);
        parts.push(`rest of the answer ${mean((i) => i >= e.start && !e.facts.has(i))}`);
      }
      e.means.textContent = `${parts.join(", ")} (${modes[state.mode]} mode)`;
    }
  }

  // ---- summary by layer

  function drawLayers() {
    const rows = page.summary;
    const wanted = ["T_fact", "answer outside T_fact", "answer", "prompt", "all tokens"];
    const of = (region) => rows.find((row) => row.region === region);
    let chosen = wanted.filter(of);
    if (of("T_fact")) chosen = chosen.filter((region) => region !== "answer");
    if (chosen.length > 1) chosen = chosen.filter((region) => region !== "all tokens");
    const [W, H, left, right, up, down] = [720, 190, 44, 8, 8, 30];
    const series = chosen.map((region) => of(region).layers[state.mode]);
    const top = Math.max(...series.flat());
    const bottom = Math.min(...series.flat());
    const pad = 0.08 * (top - bottom || 1);
    const [low, high] = state.scale === "full" ? [0, 1] : [Math.max(0, bottom - pad), Math.min(1, top + pad)];
    const x = (layer) => left + ((W - left - right) * layer) / Math.max(1, L - 1);
    const y = (gate) => up + ((H - up - down) * (high - gate)) / (high - low);
    const label = "Mean gate of every layer";
    const drawing = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label });
    for (const share of [0, 0.25, 0.5, 0.75, 1]) {
      const gate = low + share * (high - low);
      drawing.append(
        svg("line", { class: "grid", x1: left, x2: W - right, y1: y(gate), y2: y(gate) }),
        svg("text", { x: left - 6, y: y(gate) + 4, "text-anchor": "end" }, number(gate, 2)),
      );
    }
    const step = Math.max(1, Math.ceil(L / 10));
    for (let layer = 0; layer < L; layer += step) {
      drawing.append(svg("text", { x: x(layer), y: H - 14, "text-anchor": "middle" }, layer + 1));
    }
    drawing.append(svg("text", { x: (left + W) / 2, y: H - 1, "text-anchor": "middle" }, "layer"));
    series.forEach((gates, n) => {
      const points = gates.map((gate, layer) => `${x(layer).toFixed(1)},${y(gate).toFixed(1)}`).join(" ");
      drawing.append(svg("polyline", { class: `series-${n % 3}`, points }));
    });
    document.getElementById("chart").replaceChildren(drawing);
    const swatch = (n) => element("span", { class: `swatch series-${n % 3}` });
    const key = chosen.flatMap((region, n) => [swatch(n), region]);
    document.getElementById("chart-key").replaceChildren(...key);

    const head = heading(["layer", ...rows.map((row) => row.region)]);
    const body = Array.from({ length: L }, (_, layer) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, `${layer + 1}`),
        ...rows.map((row) => element("td", {}, number(row.layers[state.mode][layer], 3))),
      ),
    );
    document.getElementById("layer-table").replaceChildren(head, element("tbody", {}, ...body));
  }

  // ---- the token pointed at

  function probability(logProb) {
    const p = Math.exp(logProb);
    return p >= 0.001 ? p.toFixed(3) : p.toExponential(0).replace("-", MINUS);
  }

  function describe(e, i) {
    const kinds = [`id ${e.tokens[i]}`, `token ${i}`];
    if (e.start !== null) kinds.push(i >= e.start ? "answer" : "prompt");
    if (e.facts?.has(i)) kinds.push("T_fact");
    const parts = [
      element("button", { type: "button", class: "close", "aria-label": "Close" }, "×"),
      element("div", { class: "text" }, visible(page.texts[e.tokens[i]])),
      element("div", { class: "where" }, kinds.join(" · ")),
    ];
    if (i === 0) return [...parts, element("p", { class: "hint" }, "Nobody predicts the first token.")];
    if (e.context[i] < i) {
      const seen = `computed from the ${e.context[i]} tokens before it (windows)`;
      parts.push(element("div", { class: "where" }, seen));
    }

    const gain = gainAt(e, i);
    parts.push(
      element("h3", {}, "Log-probability of this token"),
      element(
        "table",
        {},
        heading([...modes, `expert ${MINUS} base`]),
        element(
          "tbody",
          {},
          element(
            "tr",
            {},
            ...modes.map((_, mode) => element("td", {}, number(logProbAt(e, mode, i), 3))),
            element("td", { class: "chosen" }, signed(gain, 3)),
          ),
        ),
      ),
    );

    const gates = Array.from({ length: L }, (_, layer) => gateAt(e, state.mode, layer, i));
    const mean = gates.reduce((a, b) => a + b) / L;
    const bars = element("div", { class: "bars", "aria-hidden": "true" });
    gates.forEach((gate, layer) => {
      const title = `layer ${layer + 1}: ${number(gate, 2)}`;
      const bar = element("i", { class: layer === state.layer && "chosen", title });
      bar.style.setProperty("--v", gate.toFixed(3));
      bars.append(bar);
    });
    const numbers = gates.map((gate, layer) => {
      const name = element("span", {}, `${layer + 1}`);
      const item = element("li", { class: layer === state.layer && "chosen" }, name, number(gate, 2));
      item.dataset.layer = layer;
      return item;
    });
    parts.push(
      element("h3", {}, `Gate by layer in ${modes[state.mode]} mode, mean ${number(mean, 3)}`),
      bars,
      element("ol", { class: "numbers" }, ...numbers),
    );

    const rows = Array.from({ length: K }, (_, k) =>
      element(
        "tr",
        {},
        ...modes.map((_, mode) => {
          const place = (mode * e.T + i) * K + k;
          const id = e.topTokens[place];
          return element(
            "td",
            { class: id === e.tokens[i] && "chosen" },
            element("code", {}, visible(page.texts[id])),
            element("span", { class: "probability" }, probability(e.topLogProbs[place])),
          );
        }),
      ),
    );
    parts.push(
      element("h3", {}, "Most likely here, with probability"),
      element(
        "table",
        { class: "predictions" },
        heading(modes),
        element("tbody", {}, ...rows),
      ),
    );
    return parts;
  }

  function unpoint() {
    if (!state.current) return;
    const { e, i } = state.current;
    e.spans[i].classList.remove("current");
    e.spans[i].removeAttribute("aria-selected");
    e.box.removeAttribute("aria-activedescendant");
    e.column.style.display = "none";
    e.readout.textContent = "";
    state.current = null;
    details.replaceChildren(...hint);
  }

  function point(e, i, layer = -1) {
    unpoint();
    state.current = { e, i };
    e.spans[i].classList.add("current");
    e.spans[i].setAttribute("aria-selected", "true");
    e.box.setAttribute("aria-activedescendant", e.spans[i].id);
    e.column.style.display = "block";
    e.column.style.left = `${(100 * i) / e.T}%`;
    e.column.style.width = `${100 / e.T}%`;
    e.readout.textContent = `token ${i} ${visible(textOf(e, i))}`;
    if (layer >= 0 && i > 0) {
      const gate = number(gateAt(e, state.mode, layer, i), 2);
      e.readout.textContent += ` · layer ${layer + 1} · gate ${gate}`;
    }
    details.replaceChildren(...describe(e, i));
  }

  /** Scrolls an excerpt's own boxes, not the page, to the token pointed at. */
  function reveal(box, start, size) {
    const vertical = box.classList.contains("tokens");
    const [scroll, extent] = vertical ? ["scrollTop", "clientHeight"] : ["scrollLeft", "clientWidth"];
    if (start < box[scroll]) box[scroll] = start - size;
    else if (start + size > box[scroll] + box[extent]) box[scroll] = start + 2 * size - box[extent];
  }

  function revealToken({ e, i }) {
    reveal(e.box, e.spans[i].offsetTop, e.spans[i].offsetHeight);
  }

  function revealColumn({ e, i }) {
    const width = e.sheet.offsetWidth / e.T;
    reveal(e.plane, i * width, width);
  }

  function keep(kept) {
    state.kept = kept;
    details.classList.toggle("kept", kept);
  }

  function chooseLayer(layer) {
    controls.layer.value = String(layer);
    controls.colour.value = "gate";
    update();
  }

  function update() {
    state.colour = controls.colour.value;
    state.layer = Number(controls.layer.value);
    state.scale = controls.scale.value;
    state.mode = Number(controls.mode.value);
    colourTokens();
    drawMaps();
    markLayer();
    showMeans();
    drawLayers();
    if (state.current) point(state.current.e, state.current.i);
  }

  // ---- events: one listener each, whatever the number of tokens

  function tokenOf(target) {
    const span = target.closest?.(".token");
    if (!span) return null;
    const [number, i] = span.id.slice(1).split("-").map(Number);
    return [excerpts[number], i];
  }

  function cellOf(event) {
    if (event.target.tagName !== "CANVAS") return null;
    const e = excerpts[Number(event.target.dataset.excerpt)];
    const box = event.target.getBoundingClientRect();
    const place = (at, size, count) => Math.min(count - 1, Math.max(0, Math.floor((at / size) * count)));
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    return [e, place(x, box.width, e.T), place(y, box.height, L)];
  }

  const container = document.getElementById("excerpts");
  container.addEventListener("pointerover", (event) => {
    const token = tokenOf(event.target);
    if (!token || state.kept) return;
    point(...token);
    revealColumn(state.current);
  });
  container.addEventListener("pointermove", (event) => {
    const cell = cellOf(event);
    if (!cell || state.kept) return;
    point(...cell);
    revealToken(state.current);
  });
  container.addEventListener("click", (event) => {
    const hit = tokenOf(event.target) ?? cellOf(event);
    if (!hit) return;
    const { current, kept } = state;
    const same = kept && current.e === hit[0] && current.i === hit[1];
    point(...hit);
    keep(!same);
  });
  container.addEventListener("keydown", (event) => {
    const e = excerpts[event.target.dataset?.excerpt];
    if (!e || event.altKey || event.ctrlKey || event.metaKey) return;
    const here = state.current?.e === e ? state.current.i : 0;
    const places = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: e.T - 1 };
    const layers = { ArrowUp: state.layer - 1, ArrowDown: state.layer + 1 };
    if (event.key in places) {
      const i = Math.min(e.T - 1, Math.max(0, places[event.key]));
      point(e, i);
      revealToken(state.current);
      revealColumn(state.current);
    } else if (event.key in layers) chooseLayer(Math.min(L - 1, Math.max(-1, layers[event.key])));
    else if (event.key === "Enter" || event.key === " ") keep(state.current !== null);
    else if (event.key === "Escape") keep(false);
    else return;
    event.preventDefault();
  });
  details.addEventListener("click", (event) => {
    if (event.target.closest(".close")) {
      keep(false);
      unpoint();
    }
    const item = event.target.closest("[data-layer]");
    if (item) chooseLayer(Number(item.dataset.layer) === state.layer ? -1 : Number(item.dataset.layer));
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") keep(false);
  });
  document.getElementById("controls").addEventListener("change", update);
  document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMaps);

  container.append(...excerpts.map(buildExcerpt));
  buildContents();
  update();
})();
