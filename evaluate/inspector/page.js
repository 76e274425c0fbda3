"use strict";

(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const { layers: L, top: K, modes } = page;
  const [BASE, EXPERT] = [modes.indexOf("base"), modes.indexOf("expert")];
  const MINUS = "\u2212";
  const main = document.getElementById("main");
  const details = document.getElementById("details");
  const hint = [...details.childNodes];
  const controls = document.getElementById("controls").elements;
  const state = { current: null, kept: false };

  // ---- data

  function unpack(text, Type) {
    return new Type(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  }

  const excerpts = page.excerpts.map((packed, number) => {
    const find = (selector) => document.querySelector(`#excerpt-${number + 1} ${selector}`);
    return {
      number,
      T: packed.length,
      start: packed.start,
      facts: packed.facts && new Set(packed.facts),
      shown: packed.shown,
      tokens: unpack(packed.tokens, Uint32Array),
      gates: unpack(packed.gates, Uint8Array), // [M, L, T]
      logProbs: unpack(packed.logProbs, Float32Array), // [M, T]
      topTokens: unpack(packed.topTokens, Uint32Array), // [M, T, K]
      topLogProbs: unpack(packed.topLogProbs, Float32Array),
      context: unpack(packed.context, Uint32Array),
      box: find(".tokens"),
      plane: find(".plane"),
      canvas: find("canvas"),
      column: find(".column"),
      readout: find(".across"),
    };
  });

  const gateAt = (e, layer, i) => e.gates[(state.mode * L + layer) * e.T + i] / 255;
  const logProbAt = (e, mode, i) => e.logProbs[mode * e.T + i];
  const gainAt = (e, i) => logProbAt(e, EXPERT, i) - logProbAt(e, BASE, i);
  const textOf = (e, i) => e.shown[i] ?? page.texts[e.tokens[i]];
  const mean = (numbers) => numbers.reduce((a, b) => a + b, 0) / numbers.length;
  const gatesOf = (e, i) => Array.from({ length: L }, (_, layer) => gateAt(e, layer, i));

  /** What colours token i. */
  function valueOf(e, i) {
    if (state.colour === "gain") return gainAt(e, i);
    return state.layer < 0 ? mean(gatesOf(e, i)) : gateAt(e, state.layer, i);
  }

  /** The value below which a share of all numbers lies. */
  const quantile = (sorted, share) => sorted[Math.round(share * (sorted.length - 1))];

  /** The ends of a scale of gates, which are sorted here. */
  function gateLimits(gates) {
    if (state.scale === "full") return [0, 1];
    gates.sort();
    const [low, high] = [quantile(gates, 0.01), quantile(gates, 0.99)];
    return low < high ? [low, high] : [low - 0.5, low + 0.5];
  }

  const unit = (value, [low, high]) => Math.min(1, Math.max(0, (value - low) / (high - low)));

  // ---- text and elements

  const number = (value, digits) => value.toFixed(digits).replace("-", MINUS);
  const signed = (value, digits) => (value > 0 ? "+" : "") + number(value, digits);

  function probability(logProb) {
    const p = Math.exp(logProb);
    return p >= 0.001 ? p.toFixed(3) : p.toExponential(0).replace("-", MINUS);
  }

  /** White space that would not be seen by itself. */
  function visible(text) {
    const signs = { "\n": "⏎", "\r": "␍", "\t": "⇥" };
    return text.replace(/[\n\r\t]/g, (c) => signs[c]).replace(/^ +| +$/g, (s) => "␣".repeat(s.length));
  }

  function element(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) if (value) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  function table(attributes, heads, rows) {
    const head = element("tr", {}, ...heads.map((text) => element("th", { scope: "col" }, text)));
    const body = rows.map((cells) => element("tr", {}, ...cells));
    return element("table", attributes, element("thead", {}, head), element("tbody", {}, ...body));
  }

  function buildTokens(e) {
    e.spans = Array.from({ length: e.T }, (_, i) => {
      const kinds = ["token"];
      if (i === 0) kinds.push("first");
      if (e.start !== null && i >= e.start) kinds.push("answer");
      if (e.facts?.has(i)) kinds.push("fact");
      // A line break shows as such and still breaks the line; a token without a text of its own is a dot.
      const text = textOf(e, i).replaceAll("\t", "⇥\t").replaceAll("\n", "⏎\n") || "·";
      return element("span", { class: kinds.join(" "), id: `t${e.number}-${i}`, role: "option" }, text);
    });
    e.box.append(...e.spans);
  }

  // ---- colours

  function colourTokens() {
    const gain = state.colour === "gain";
    const all = excerpts.map((e) => Float64Array.from({ length: e.T }, (_, i) => valueOf(e, i)));
    const numbers = Float64Array.from(all.flatMap((values) => [...values.subarray(1)]));
    const most = gain && (quantile(numbers.map(Math.abs).sort(), 0.95) || 1);
    const limits = gain ? [-most, most] : gateLimits(numbers);
    main.dataset.colour = state.colour;
    excerpts.forEach((e, n) => {
      for (let i = 1; i < e.T; i++) {
        const value = all[n][i];
        const share = gain ? unit(Math.abs(value), [0, most]) : unit(value, limits);
        e.spans[i].style.setProperty("--v", share.toFixed(3));
        e.spans[i].classList.toggle("less", gain && value < 0);
      }
    });
    document.getElementById("low").textContent = number(limits[0], 2);
    document.getElementById("high").textContent = gain ? signed(most, 2) : number(limits[1], 2);
    controls.layer.closest("label").hidden = gain;
  }

  /** 256 colours as the style sheet mixes them, as pixels. */
  function ramp() {
    const style = getComputedStyle(document.documentElement);
    const canvas = element("canvas", { width: 256, height: 1 });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    for (let i = 0; i < 256; i++) {
      const strong = `${style.getPropertyValue("--gate")} ${(100 * i) / 255}%`;
      context.fillStyle = `color-mix(in oklab, ${strong}, ${style.getPropertyValue("--weak")})`;
      context.fillRect(i, 0, 1, 1);
    }
    return new Uint32Array(context.getImageData(0, 0, 256, 1).data.buffer);
  }

  function drawMaps() {
    const gates = excerpts.flatMap((e) => {
      const all = e.gates.subarray(state.mode * L * e.T, (state.mode + 1) * L * e.T);
      return Array.from(all).filter((_, k) => k % e.T);
    });
    const limits = gateLimits(Float64Array.from(gates, (gate) => gate / 255));
    const colours = ramp();
    const pixelOf = colours.map((_, gate) => colours[Math.round(255 * unit(gate / 255, limits))]);
    for (const e of excerpts) {
      const image = new ImageData(e.T, L);
      const pixels = new Uint32Array(image.data.buffer);
      const offset = state.mode * L * e.T;
      for (let k = 0; k < pixels.length; k++) if (k % e.T) pixels[k] = pixelOf[e.gates[offset + k]];
      e.canvas.getContext("2d").putImageData(image, 0, 0);
    }
  }

  function drawLayerTable() {
    const rows = Array.from({ length: L }, (_, layer) => [
      element("th", { scope: "row" }, `${layer + 1}`),
      ...page.summary.map((row) => element("td", {}, number(row.layers[state.mode][layer], 3))),
    ]);
    const heads = ["layer", ...page.summary.map((row) => row.region)];
    document.getElementById("layer-table").replaceWith(table({ id: "layer-table" }, heads, rows));
  }

  // ---- the token pointed at

  function describe(e, i) {
    const kinds = [`id ${e.tokens[i]}`, `token ${i}`];
    if (e.start !== null) kinds.push(i >= e.start ? "answer" : "prompt");
    if (e.facts?.has(i)) kinds.push("T_fact");
    const parts = [
      element("button", { type: "button", class: "close", "aria-label": "Close" }, "×"),
      element("div", { class: "text" }, visible(page.texts[e.tokens[i]])),
      element("div", { class: "note" }, kinds.join(" · ")),
    ];
    if (i === 0) return [...parts, element("p", { class: "note" }, "Nobody predicts the first token.")];
    if (e.context[i] < i) {
      parts.push(element("div", { class: "note" }, `computed from the ${e.context[i]} tokens before it (windows)`));
    }
    const logProbs = modes.map((_, mode) => element("td", {}, number(logProbAt(e, mode, i), 3)));
    const gain = element("td", { class: "chosen" }, signed(gainAt(e, i), 3));
    const gates = gatesOf(e, i);
    const numbers = gates.map((gate, layer) => {
      const kind = layer === state.layer && "chosen";
      const style = `--v: ${gate.toFixed(3)}`;
      return element("li", { class: kind, style, "data-layer": `${layer}` },
        element("span", {}, `${layer + 1}`), element("span", {}, number(gate, 2)));
    });
    const likely = Array.from({ length: K }, (_, k) =>
      modes.map((_, mode) => {
        const at = (mode * e.T + i) * K + k;
        const id = e.topTokens[at];
        const shown = element("code", {}, visible(page.texts[id]));
        const share = element("span", { class: "probability" }, probability(e.topLogProbs[at]));
        return element("td", { class: id === e.tokens[i] && "chosen" }, shown, share);
      }),
    );
    return [
      ...parts,
      element("h3", {}, "Log-probability of this token"),
      table({}, [...modes, `expert ${MINUS} base`], [[...logProbs, gain]]),
      element("h3", {}, `Gate by layer in ${modes[state.mode]} mode, mean ${number(mean(gates), 3)}`),
      element("ol", { class: "numbers" }, ...numbers),
      element("h3", {}, "Most likely here, with probability"),
      table({ class: "predictions" }, modes, likely),
    ];
  }

  function unpoint() {
    if (!state.current) return;
    const { e, i } = state.current;
    e.spans[i].classList.remove("current");
    e.box.removeAttribute("aria-activedescendant");
    e.column.style.display = "none";
    e.readout.textContent = "";
    state.current = null;
    details.replaceChildren(...hint);
  }

  /** Shows a token's numbers, its column in the heat map, and the cell's gate where a layer is given. */
  function point(e, i, layer) {
    unpoint();
    state.current = { e, i };
    e.spans[i].classList.add("current");
    e.box.setAttribute("aria-activedescendant", e.spans[i].id);
    Object.assign(e.column.style, { display: "block", left: `${(100 * i) / e.T}%`, width: `${100 / e.T}%` });
    const cell = layer === undefined || i === 0 ? "" : ` · layer ${layer + 1} · gate ${number(gateAt(e, layer, i), 2)}`;
    e.readout.textContent = `token ${i} ${visible(textOf(e, i))}${cell}`;
    details.replaceChildren(...describe(e, i));
  }

  // These scroll an excerpt's own boxes, not the page.
  function revealToken({ e, i }) {
    const { offsetTop: top, offsetHeight: height } = e.spans[i];
    const box = e.box;
    if (top < box.scrollTop || top + height > box.scrollTop + box.clientHeight) box.scrollTop = top - box.clientHeight / 2;
  }

  function revealColumn({ e, i }) {
    e.plane.scrollLeft = (i / e.T) * e.plane.scrollWidth - e.plane.clientWidth / 2;
  }

  function keep(kept) {
    state.kept = kept;
    details.classList.toggle("kept", kept);
  }

  function chooseLayer(layer) {
    controls.layer.value = String(Math.min(L - 1, Math.max(-1, layer)));
    controls.colour.value = "gate";
    update();
  }

  function update() {
    state.colour = controls.colour.value;
    state.scale = controls.scale.value;
    state.layer = Number(controls.layer.value);
    state.mode = Number(controls.mode.value);
    colourTokens();
    drawMaps();
    drawLayerTable();
    if (state.current) point(state.current.e, state.current.i);
  }

  // ---- events: one listener each, whatever the number of tokens

  /** The excerpt, token and, in a heat map, layer of a pointer event. */
  function targetOf(event) {
    const span = event.target.closest?.(".tokens .token");
    if (span) {
      const [excerpt, i] = span.id.slice(1).split("-").map(Number);
      return [excerpts[excerpt], i];
    }
    if (event.target.tagName !== "CANVAS") return null;
    const e = excerpts[event.target.dataset.excerpt];
    const box = event.target.getBoundingClientRect();
    const cell = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
    const layer = cell((event.clientY - box.top) / box.height, L);
    return [e, cell((event.clientX - box.left) / box.width, e.T), layer];
  }

  const container = document.getElementById("excerpts");
  container.addEventListener("pointermove", (event) => {
    const target = state.kept ? null : targetOf(event);
    const { current } = state;
    if (!target || (target.length === 2 && current?.e === target[0] && current.i === target[1])) return;
    point(...target);
    (target.length === 2 ? revealColumn : revealToken)(state.current);
  });
  container.addEventListener("click", (event) => {
    const target = targetOf(event);
    if (!target) return;
    const same = state.kept && state.current.e === target[0] && state.current.i === target[1];
    point(...target);
    keep(!same);
  });
  container.addEventListener("keydown", (event) => {
    const e = excerpts[event.target.dataset?.excerpt];
    if (!e || event.altKey || event.ctrlKey || event.metaKey) return;
    const here = state.current?.e === e ? state.current.i : 0;
    const tokens = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: e.T - 1 };
    const layers = { ArrowUp: state.layer - 1, ArrowDown: state.layer + 1 };
    if (event.key in tokens) {
      point(e, Math.min(e.T - 1, Math.max(0, tokens[event.key])));
      revealToken(state.current);
      revealColumn(state.current);
    } else if (event.key in layers) chooseLayer(layers[event.key]);
    else if (event.key === "Enter" || event.key === " ") keep(state.current !== null);
    else return;
    event.preventDefault();
  });
  details.addEventListener("click", (event) => {
    if (event.target.closest(".close")) {
      keep(false);
      unpoint();
    }
    const layer = event.target.closest("[data-layer]")?.dataset.layer;
    if (layer !== undefined) chooseLayer(Number(layer) === state.layer ? -1 : Number(layer));
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") keep(false);
  });
  document.getElementById("controls").addEventListener("change", update);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMaps);

  excerpts.forEach(buildTokens);
  update();
})();
