/** Draws rounds, the history and the close look at a picture. Reads rounds, and tells `actions` what a person wants. */

import { $, formula, h, say } from "./dom.js";
import { MAKES, findsNegative, kindsOf, negativeOf, progress } from "./rounds.js";

/** What is said of each kind of picture: its name, how it is made, and, before there is one, what it is for. */
const KINDS = {
  plain: {
    name: "Plain",
    made: "_p_ against ∅",
    about: "Ordinary guidance: the prompt _p_ against the empty prompt ∅.",
  },
  dns: {
    name: "DNS",
    made: "the least like _p_",
    about:
      "Diffusion-negative sampling: guidance with its sign reversed draws what the model finds the least like _p_. " +
      "A captioner puts it into words: _n*_.",
  },
  alone: { name: "n* alone", made: "∅ against _n*_" },
  final: {
    name: "DNP",
    made: "_p_ against _n*_",
    about:
      "The prompt _p_ against _n*_, from the same noise. Change _n*_, press Enter, and this picture alone is drawn again.",
  },
};

const kindIn = (round, kind) => KINDS[kind === "final" && round.ask.make === "plain" ? "plain" : kind];

const PHASES = {
  dns: "DNS: sampling what the model finds the least like p",
  caption: "Caption: putting the DNS image into words, n*",
  plain: "Plain guidance: sampling p against ∅",
  final: "DNP: sampling p against n*",
  alone: "n* alone: sampling ∅ against n*",
};

/** What a job is doing, in words, and how far that is: `["DNS: …", "step 3 of 25"]`. */
function doing({ round, rows }) {
  const { busyFor, status, phase } = round;
  if (busyFor) return ["The server is busy. Asking again by itself", `in ${busyFor} s`];
  if (status === "waiting") return ["Waiting for a place", ""];
  const { step, steps } = rows.map((row) => row.pictures[phase]).find((each) => each?.step) ?? {};
  const words = PHASES[phase === "final" && round.ask.make === "plain" ? "plain" : phase];
  return [words ?? "Working", step ? `step ${step} of ${steps}` : ""];
}

/** The page before anything was made: what each picture will be. */
export function welcome() {
  const cards = ["plain", "dns", "final"].map((kind) =>
    h(
      "figure",
      { className: "card" },
      heading(KINDS[kind], "h2"),
      h("div", { className: "frame about" }, h("p", {}, formula(KINDS[kind].about))),
    ),
  );
  return h(
    "div",
    { className: "row welcome" },
    h(
      "p",
      { className: "lead" },
      "Three pictures from the same noise. What a model draws when it is told to stay away from the prompt is, put into " +
        "words, the negative prompt that it understands best (",
      h("a", { href: "https://arxiv.org/abs/2411.05473" }, "Desai and Vasconcelos, ECCV 2024"),
      ").",
    ),
    cards,
  );
}

/** A round on the page. `update` brings it up to date without touching what a person is typing. */
export class RoundView {
  /** `actions`: regenerate(row, negative), choose(row, number), look(row, kind), reuse(), remove(). */
  constructor(round, actions) {
    this.round = round;
    this.rows = round.rows.map((row, i) => new RowView(round, row, i, actions));
    this.meta = h("p", { className: "meta" });
    this.warnings = h("ul", { className: "warnings", hidden: true });
    this.details = h("pre", { tabIndex: 0, role: "region", "aria-label": "Every setting, as JSON" });
    this.explicit = h(
      "details",
      { className: "explicit", hidden: true },
      h("summary", {}, "Every setting of this round"),
      this.details,
    );
    this.element = h(
      "article",
      { className: "round" },
      h(
        "header",
        {},
        h("h2", {}, round.ask.prompt || "∅, the empty prompt"),
        this.meta,
        h(
          "div",
          { className: "tools" },
          h("button", { type: "button", className: "quiet", onclick: actions.reuse }, "Use these settings"),
          h("button", { type: "button", className: "quiet", onclick: actions.remove }, "Remove"),
        ),
      ),
      this.warnings,
      this.rows.map((row) => row.element),
      this.explicit,
    );
  }

  /** `busy` while a round is made, so that no other picture can be asked for. */
  update(busy) {
    const { round } = this;
    this.meta.textContent = summary(round);
    const words = [...new Set(round.warnings.map(({ message }) => message))];
    this.warnings.replaceChildren(...words.map((message) => h("li", {}, message)));
    this.warnings.hidden = words.length === 0;
    this.explicit.hidden = !round.request;
    if (round.request) say(this.details, JSON.stringify(round.request, null, 1));
    for (const row of this.rows) row.update(busy);
  }
}

/** One seed of a round: its pictures side by side, and n* below them. */
class RowView {
  constructor(round, row, index, actions) {
    Object.assign(this, { round, row, actions, cards: new Map() });
    this.title = h("h3", { className: "seed", hidden: round.rows.length === 1 });
    this.editor = this.#editor(`negative-${index}`);
    this.element = h("section", { className: "row" }, this.title);
  }

  update(busy) {
    const { round, row } = this;
    const kinds = kindsOf(round);
    this.title.textContent = `Seed ${row.seed}`;
    for (const kind of kinds)
      if (!this.cards.has(kind)) this.cards.set(kind, new CardView(round, row, kind, this.actions));
    const edited = round.ask.make !== "plain";
    const order = [this.title, ...kinds.map((kind) => this.cards.get(kind).element)];
    // n* comes before what is drawn against it.
    const drawn = kinds.findIndex((kind) => kind === "alone" || kind === "final");
    if (edited) order.splice(drawn < 0 ? order.length : drawn + 1, 0, this.editor);
    // A node that is moved loses the focus, so only what is new is put in.
    order.forEach(
      (node, i) =>
        this.element.children[i] === node || this.element.insertBefore(node, this.element.children[i] ?? null),
    );
    this.element.dataset.kinds = kinds.join(" ");
    for (const card of this.cards.values()) card.update();
    this.busy = busy;
    if (edited) this.#updateEditor();
  }

  #editor(id) {
    this.shown = null; // the n* that was last put into the field
    this.text = h("textarea", { id, rows: 1, autocomplete: "off", spellcheck: false, enterKeyHint: "go" });
    this.text.setAttribute("aria-describedby", `${id}-hint ${id}-error`);
    this.button = h("button", {}, "Draw");
    this.error = h("p", { className: "error", id: `${id}-error`, role: "alert", hidden: true });
    this.takes = h("ol", { className: "takes", "aria-label": "Tried so far", hidden: true });
    this.hint = h("p", { className: "hint", id: `${id}-hint` });
    const form = h(
      "form",
      { className: "editor", noValidate: true, "aria-label": `Negative prompt n*, seed ${this.row.seed}` },
      h("label", { htmlFor: id }, formula("Negative prompt _n*_")),
      this.text,
      this.button,
      this.hint,
      this.error,
      this.takes,
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!this.button.disabled) this.actions.regenerate(this.row, this.text.value.trim());
    });
    this.text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        form.requestSubmit();
      } else if (event.key === "Escape" && this.text.value !== this.shown) {
        event.stopPropagation();
        this.text.value = this.shown;
        this.#updateEditor();
      }
    });
    this.text.addEventListener("input", () => this.#updateEditor());
    return form;
  }

  #updateEditor() {
    const { round, row } = this;
    const negative = negativeOf(round, row);
    const known = row.found !== null || row.takes.length > 0;
    if (negative !== this.shown) this.text.value = this.shown = negative;
    const edited = this.text.value.trim() !== negative;
    this.text.disabled = !known;
    this.text.placeholder = known ? "∅, the empty prompt" : "";
    this.button.disabled = this.busy || !known || (!edited && row.takes.length > 0);
    this.editor.classList.toggle("edited", edited);
    say(this.hint, this.#advice(edited, known));
    say(this.error, row.problem);
    this.#updateTakes();
  }

  #advice(edited, known) {
    const { round, row, busy } = this;
    if (!known)
      return findsNegative(round.ask) ? "What the captioner makes of the DNS image will be here." : "Written by hand.";
    if (busy) return "It can be changed as soon as this round is made.";
    if (edited) return "Enter draws the DNP picture against it, from the same noise. Esc takes the change back.";
    if (row.takes.length === 0) return "Found by DNS. Draw against it, or against your own.";
    const origin = negativeOf(round, row) === row.found ? "Found by DNS." : "Written by hand.";
    return `${origin} Change it and press Enter: the DNP picture alone is drawn again, from the same noise.`;
  }

  #updateTakes() {
    const { row, takes } = this;
    takes.hidden = row.takes.length < 2;
    // Added to, never built anew: a button that is pressed keeps the focus.
    for (const [number, { negative, final }] of [...row.takes.entries()].slice(takes.children.length)) {
      const choose = () => this.actions.choose(row, number);
      takes.append(
        h("li", {}, h("button", { type: "button", onclick: choose }, thumbnail(final), h("span", {}, negative || "∅"))),
      );
    }
    [...takes.children].forEach((item, number) => item.firstChild.setAttribute("aria-pressed", number === row.chosen));
  }
}

/** One picture: on its way, there, or not to come. */
class CardView {
  constructor(round, row, kind, actions) {
    Object.assign(this, { round, row, kind });
    const named = kindIn(round, kind);
    this.name = named.name;
    this.image = h("img", { hidden: true, alt: "", onload: fit });
    this.frame = h(
      "button",
      { type: "button", className: "frame", disabled: true, onclick: () => actions.look(row, kind) },
      this.image,
    );
    this.frame.style.aspectRatio = round.size.join(" / ");
    this.bar = h("progress", { "aria-label": `Steps of the picture ${named.name}, seed ${row.seed}` });
    this.save = h(
      "button",
      {
        type: "button",
        className: "quiet",
        "aria-label": `Save the picture ${named.name}, seed ${row.seed}`,
        onclick: () => download(round, row, kind),
      },
      "Save",
    );
    this.element = h(
      "figure",
      { className: "card" },
      heading(named, round.rows.length > 1 ? "h4" : "h3", this.save),
      this.frame,
      this.bar,
    );
    this.element.dataset.kind = kind;
  }

  update() {
    const { picture, step, steps } = this.row.pictures[this.kind] ?? {};
    const done = picture && !picture.partial;
    const words = `${this.name}: ${this.round.ask.prompt}${done ? "" : ", unfinished"}`;
    if (picture && this.shown !== picture) {
      this.shown = picture;
      this.image.src = urlOf(picture);
      this.image.alt = words;
    }
    this.image.hidden = !picture;
    this.frame.disabled = !done;
    this.frame.ariaLabel = picture ? null : `${this.name}: not made yet`; // else what the picture shows
    this.frame.classList.toggle("partial", Boolean(picture?.partial || step));
    this.bar.style.visibility = step && !done ? "visible" : "hidden"; // it keeps its place
    if (step) Object.assign(this.bar, { value: step, max: steps });
    this.save.hidden = !done;
  }
}

/** The rounds made in this tab, newest first. `show` is called with the one that is asked for. */
export function listHistory(rounds, current, show) {
  $("history").hidden = rounds.length === 0;
  $("made").replaceChildren(
    ...rounds.map((round) => {
      const [row] = round.rows;
      const pictures = kindsOf(round)
        .map((kind) => row.pictures[kind]?.picture)
        .filter((picture) => picture && !picture.partial);
      return h(
        "li",
        {},
        h(
          "button",
          { type: "button", "aria-current": String(round === current), onclick: () => show(round) },
          h("span", { className: "thumbnails" }, pictures.map(thumbnail)),
          h("span", { className: "words" }, round.ask.prompt || "∅"),
          h("span", { className: "aside" }, round.status === "done" ? seeds(round) : "being made"),
        ),
      );
    }),
  );
}

/** Shows the pictures of a row one at a time, as large as the window: arrow keys flip between them. */
export class Viewer {
  constructor(dialog) {
    this.dialog = dialog;
    this.title = h("h2", { id: "viewer-title" });
    this.image = h("img", { alt: "", onload: fit });
    this.words = h("p", { className: "aside" });
    const button = (words, action) => h("button", { type: "button", className: "quiet", onclick: action }, words);
    dialog.append(
      h(
        "header",
        {},
        this.title,
        button("Save", () => download(this.round, this.row, this.kind)),
        button("Close", () => dialog.close()),
      ),
      this.image,
      h(
        "footer",
        {},
        button("← Before", () => this.#turn(-1)),
        this.words,
        button("Next →", () => this.#turn(1)),
      ),
    );
    dialog.addEventListener("keydown", ({ key }) => {
      if (key === "ArrowLeft") this.#turn(-1);
      if (key === "ArrowRight") this.#turn(1);
    });
    dialog.addEventListener("click", ({ target }) => target === dialog && dialog.close());
  }

  open(round, row, kind) {
    Object.assign(this, { round, row });
    this.#show(kind);
    this.dialog.showModal();
  }

  #turn(by) {
    const kinds = kindsOf(this.round).filter((kind) => this.row.pictures[kind]?.picture);
    this.#show(kinds[(kinds.indexOf(this.kind) + by + kinds.length) % kinds.length]);
  }

  #show(kind) {
    this.kind = kind;
    const { round, row } = this;
    const { name, made } = kindIn(round, kind);
    const negative = kind === "dns" ? row.found : negativeOf(round, row);
    this.title.replaceChildren(name, " ", h("span", { className: "aside" }, formula(made)));
    this.words.textContent = name === KINDS.plain.name ? round.ask.prompt : `n* = ${negative || "∅"}`;
    this.image.src = urlOf(row.pictures[kind].picture);
    this.image.alt = `${name}: ${round.ask.prompt}`;
  }
}

/** What `job` is doing, and how much of it is done; without one how the last one ended. */
export function showState(job, ended) {
  const [words, step] = job ? doing(job) : [ended, ""];
  $("state").classList.toggle("busy", Boolean(job));
  $("done").hidden = !job;
  $("keys").hidden = Boolean(job);
  if ($("phase").textContent !== words) $("phase").textContent = words; // it is read out
  $("step").textContent = step;
  if (job && job.round.status !== "waiting") $("done").value = progress(job);
  else $("done").removeAttribute("value");
}

function heading({ name, made }, level, ...more) {
  return h("figcaption", {}, h(level, {}, name), h("span", { className: "aside" }, formula(made)), more);
}

function thumbnail(picture) {
  return h("img", { src: urlOf(picture), alt: "", onload: fit });
}

const urlOf = ({ type, data }) => `data:${type};base64,${data}`;

/** Small pictures are enlarged without blur: see the style sheet. */
function fit({ target }) {
  target.classList.toggle("small", target.naturalWidth <= 256);
}

/** The seeds of a round, in words. */
function seeds({ rows }) {
  return rows.length > 1 ? `seeds ${rows[0].seed} to ${rows.at(-1).seed}` : `seed ${rows[0].seed}`;
}

/** What a round was made with, in one line. */
function summary(round) {
  const { request, seconds, ask } = round;
  const final = request && ask.make !== "dns";
  return [
    seeds(round),
    ...(final ? [request.sampler, `${request.steps} steps`, `w ${[request.guidance].flat().join(" ")}`] : []),
    seconds && `${seconds.total.toFixed(seconds.total < 10 ? 2 : 0)}\u00a0s`,
  ]
    .filter(Boolean)
    .join(" · ");
}

/** Saves a picture as the server made it, its settings inside. */
function download(round, row, kind) {
  const { data, type } = row.pictures[kind].picture;
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const url = URL.createObjectURL(new Blob([bytes], { type }));
  const words =
    round.ask.prompt
      .toLowerCase()
      .replace(/[^\p{L}\p{N}]+/gu, "-")
      .replace(/^-|-$/g, "")
      .slice(0, 80) || "image";
  const last = round.ask.make === "plain" ? "plain" : "dnp";
  const number = kind === "final" && row.chosen > 0 ? `-${row.chosen + 1}` : "";
  const name = `${words}-${row.seed}-${kind === "final" ? last : kind}${number}.${type.split("/")[1]}`;
  h("a", { href: url, download: name }).click();
  URL.revokeObjectURL(url);
}

/** The choices of what to make. */
export function listMakes(select) {
  select.replaceChildren(...Object.entries(MAKES).map(([value, { name }]) => h("option", { value }, name)));
}
