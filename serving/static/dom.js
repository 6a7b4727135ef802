/** Small helpers for building the page. */

/**
 * A new element. `properties` are set on it as they are, those with a dash as attributes; what is undefined, null or
 * false among `children` is left out, and text stays text.
 */
export function h(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes("-") || key === "role") element.setAttribute(key, value);
    else element[key] = value;
  }
  element.append(...children.flat().filter((child) => child || child === 0));
  return element;
}

/** Text with symbols of the paper between underscores: `"_p_ against _n*_"`. */
export function formula(text) {
  return text.split("_").map((part, i) => (i % 2 ? h("i", { className: "symbol" }, part) : part));
}

/** The element with that id. */
export const $ = (id) => document.getElementById(id);

/** Says `words` in `element`, and hides it where there are none. Does nothing where nothing changes. */
export function say(element, words) {
  if (element.textContent !== (words ?? "")) element.textContent = words ?? "";
  element.hidden = !words;
}
