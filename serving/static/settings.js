/** The settings of a request: what they are called, how they are shown, read and filled in. */

import { formula, h, say } from "./dom.js";

/*
 * Each setting has the name that the API gives it. `kind` is how it is typed: a whole number or any number, one of
 * some `choices` (a list, or what the model offers), text, or a guidance scale: a number, or one a step. `only` says
 * which models have it; others do not show it.
 */
const number = (name, label, hint, limits = {}) => ({ name, label, hint, kind: "number", step: "any", ...limits });
const whole = (name, label, hint, limits = {}) => number(name, label, hint, { step: 1, min: 0, ...limits });
const choice = (name, label, hint, choices) => ({ name, label, hint, kind: "choice", choices });
const guidance = (name, label, hint) => ({ name, label, hint, kind: "guidance" });
const ofPass = (prefix, scale, hint) => [
  choice(`${prefix}sampler`, "Sampler", "", (model) => model.samplers),
  whole(`${prefix}steps`, "Steps", "", { min: 1, max: (model) => model.limits.steps }),
  guidance(`${prefix}guidance`, scale, hint),
  number(`${prefix}eta`, "Eta", "DDIM’s share of fresh noise, 0 to 1.", { min: 0, max: 1, step: 0.1 }),
  choice(`${prefix}spacing`, "Timesteps", "How they are spaced.", (model) => model.spacings),
];
const method = (name, label, hint) =>
  number(`methods.${name}`, label, hint, { only: (model) => model.methods.includes(name) });

const GROUPS = [
  {
    title: "Pictures",
    settings: [
      whole("seed", "Seed", "The starting noise. Left empty, another one each time.", { empty: "random" }),
      whole("n", "Pictures", "Each with the next seed.", { min: 1, max: (model) => model.limits.n }),
      choice("size", "Size", "In pixels.", (model) => model.sizes.map(([width, height]) => `${width} × ${height}`)),
      whole("windows", "Text windows", "More than 1 reads longer prompts.", {
        min: 1,
        max: (model) => model.limits.windows,
      }),
    ],
  },
  {
    title: "Final pass",
    formula: "ε(_n*_) + _w_·(ε(_p_) − ε(_n*_))",
    settings: [
      ...ofPass("", "Guidance _w_", "1 is the prompt alone. Or a list, with one number a step."),
      number("embedded_guidance", "Embedded guidance", "The scale that this distilled model takes as an input.", {
        only: (model) => model.embedded_guidance,
      }),
      method("rescale", "Rescale _φ_", "Guidance rescale; 0 is none."),
      method("norm_limit", "Norm limit _r_", "Of adaptive projected guidance; 0 is none."),
      method("parallel", "Parallel share _η_", "Of adaptive projected guidance; 1 is all."),
      method("zero_star", "CFG-Zero*", "1 is on."),
      method("norm_cap", "Norm cap", "In norms of the prompt’s output; 0 is none."),
      method("perp_neg", "Perp-Neg", "Weight of the part of n* that does not lie along p."),
    ],
  },
  {
    title: "DNS pass",
    finds: true,
    formula: "ε(∅) + _s_·(ε(∅) − ε(_p_))",
    settings: [
      ...ofPass("dns_", "Guidance _s_", "Larger is farther from the prompt."),
      whole("dns_seed", "Seed", "Left empty, that of the pictures.", { empty: "the same" }),
    ],
  },
  {
    title: "Caption",
    finds: true,
    settings: [
      whole("beams", "Beams", "1 is greedy.", { min: 1 }),
      { name: "prefix", label: "Prefix", hint: "Every caption begins with it.", kind: "text" },
      whole("min_length", "Fewest tokens", ""),
      whole("max_length", "Most tokens", "", { min: 1 }),
    ],
  },
];

/** The settings in the form. Those that differ from the model's defaults are what a request has to say. */
export class Settings {
  #host;
  #fields = new Map(); // by name: {setting, input, error, initial}
  #finding = []; // the groups that say how n* is found
  #changed;

  /** Builds the groups in `host`; `changed` is called whenever a setting is. */
  constructor(host, changed) {
    this.#host = host;
    this.#changed = changed;
    host.addEventListener("input", changed);
  }

  /** Shows the settings of the model `id`, one of `models`, each with its default. `choose(id)` takes another model. */
  show(models, id, choose) {
    const model = models.find((each) => each.id === id).dnp;
    this.#fields.clear();
    const groups = GROUPS.map((group) => this.#group(group, model));
    this.#finding = groups.filter((_, i) => GROUPS[i].finds);
    if (models.length > 1) groups[0].querySelector("legend").after(this.#models(models, id, choose));
    this.#host.replaceChildren(...groups);
    this.#changed();
  }

  /** What differs from the defaults, ready for the API; without what finds n*, where that is not done (`finds`). */
  values(finds = true) {
    const values = {};
    for (const { setting, input, group } of this.#changedOnes()) {
      if (group.finds && !finds) continue;
      const value = read(setting, input.value.trim());
      if (setting.name === "size") [values.width, values.height] = value;
      else if (setting.name.startsWith("methods.")) (values.methods ??= {})[setting.name.slice(8)] = value;
      else values[setting.name] = value;
    }
    return values;
  }

  /** What is typed, by name, to be filled in again. */
  typed() {
    return Object.fromEntries(this.#changedOnes().map(({ setting, input }) => [setting.name, input.value]));
  }

  /** Fills in what `typed` gave, and the defaults elsewhere. */
  fill(typed) {
    for (const [name, { input, initial }] of this.#fields) input.value = typed[name] ?? initial;
    this.#changed();
  }

  /** Whether n* has to be found: where it has not, the settings that say how are switched off. */
  set finds(finds) {
    for (const group of this.#finding) {
      group.disabled = !finds;
      group.querySelector(".unused").hidden = finds;
    }
  }

  /** Says what is wrong with the field `param`, and brings it into view; false where there is no such field. */
  blame(param, message) {
    const name = { width: "size", height: "size" }[param] ?? param;
    const field =
      this.#fields.get(name) ?? [...this.#fields.values()].find(({ setting }) => setting.name.startsWith(`${name}.`));
    if (!field) return false;
    say(field.error, message);
    field.input.setAttribute("aria-invalid", "true");
    field.input.closest("details").open = true;
    field.input.focus();
    return true;
  }

  /** Takes back what `blame` said. */
  forgive() {
    for (const { input, error } of this.#fields.values()) {
      say(error, "");
      input.removeAttribute("aria-invalid");
    }
  }

  #changedOnes() {
    return [...this.#fields.values()].filter(({ input, initial }) => !["", initial].includes(input.value.trim()));
  }

  #group(group, model) {
    return h(
      "fieldset",
      {},
      h("legend", {}, group.title),
      group.formula && h("p", { className: "formula" }, formula(group.formula)),
      group.finds && h("p", { className: "unused aside", hidden: true }, "Not used: n* does not have to be found."),
      group.settings
        .filter((setting) => setting.only?.(model) ?? true)
        .map((setting) => this.#field(setting, model, group)),
    );
  }

  #field(setting, model, group) {
    const id = `set-${setting.name}`;
    const initial = initially(setting, model);
    const input = inputFor(setting, model, initial);
    const error = h("p", { className: "error", id: `${id}-error`, hidden: true });
    Object.assign(input, { id, value: initial });
    input.setAttribute("aria-describedby", `${id}-hint ${id}-error`);
    input.setAttribute("form", "ask");
    this.#fields.set(setting.name, { setting, input, error, initial, group });
    return h(
      "div",
      { className: "setting" },
      h("label", { htmlFor: id }, formula(setting.label)),
      input,
      h("p", { className: "hint", id: `${id}-hint`, hidden: !setting.hint }, setting.hint),
      error,
    );
  }

  #models(models, id, choose) {
    const select = h(
      "select",
      { id: "set-model" },
      models.map((model) => h("option", { selected: model.id === id }, model.id)),
    );
    select.addEventListener("change", () => choose(select.value));
    return h("div", { className: "setting" }, h("label", { htmlFor: "set-model" }, "Model"), select);
  }
}

/** The default of a setting, as it is typed. */
function initially({ name, kind, empty }, { defaults }) {
  if (empty) return "";
  if (name === "size") return `${defaults.width} × ${defaults.height}`;
  if (name === "n") return String(defaults.images);
  const value = name.startsWith("methods.") ? defaults.methods[name.slice(8)] : defaults[name];
  return kind === "guidance" && Array.isArray(value) ? value.join(" ") : String(value ?? "");
}

function inputFor(setting, model, initial) {
  const { kind, choices, empty = "", min, max, step } = setting;
  if (kind === "choice") {
    const options = typeof choices === "function" ? choices(model) : choices;
    const all = options.includes(initial) ? options : [initial, ...options];
    return h(
      "select",
      {},
      all.map((value) => h("option", { value }, value || "usual")),
    );
  }
  if (kind === "number") {
    const most = (typeof max === "function" ? max(model) : max) ?? "";
    return h("input", { type: "number", min: min ?? "", max: most, step, placeholder: empty || initial });
  }
  return h("input", {
    type: "text",
    inputMode: kind === "guidance" ? "decimal" : "text",
    autocomplete: "off",
    placeholder: initial,
  });
}

/** What was typed, as the API takes it. What is no number goes up as it is: the server says what is wrong with it. */
function read({ name, kind }, text) {
  if (name === "size") return text.split(" × ").map(Number);
  if (kind === "number") return Number(text);
  if (kind !== "guidance") return text;
  const numbers = text.split(/[\s,;]+/).map(Number);
  if (numbers.some(Number.isNaN)) return text;
  return numbers.length === 1 ? numbers[0] : numbers;
}
