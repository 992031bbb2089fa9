// Scripts, pictures, comments and metadata go. Every picture keeps the size at which it is drawn: by the page's own
// rules where they suffice, else by its attributes, else by a style of its own.
async ({scripts, grey, most_tried, most_svg_characters}) => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const first = (selector) => document.querySelector(selector);
  const comments = document.createTreeWalker(document, 128 | 64);  // processing instructions, too
  const gone = [];
  while (comments.nextNode()) gone.push(comments.currentNode);
  gone.forEach((node) => node.remove());
  if (scripts) {
    const written = all("style").filter((style) => !style.textContent.trim()).map((style) => [style, style.sheet]);
    // settle.js' are none of the page's
    const adopted = [...document.adoptedStyleSheets].filter((sheet) => !globalThis.stillSheets?.has(sheet));
    for (const [element, sheet] of [...written, ...adopted.map((sheet) => [null, sheet])]) {
      const css = [...(sheet?.cssRules ?? [])].map((rule) => rule.cssText).join("\n");
      (element ?? first("head").appendChild(document.createElement("style"))).textContent = css;
    }
    for (const input of all("input, textarea")) {
      if (input.localName === "textarea") input.textContent = input.value;
      else if (["checkbox", "radio"].includes(input.type)) input.toggleAttribute("checked", input.checked);
      else if (!["file", "image"].includes(input.type) && input.value !== (input.getAttribute("value") ?? ""))
        input.setAttribute("value", input.value);
    }
    for (const option of all("option")) option.toggleAttribute("selected", option.selected);
  }
  const remove = (nodes) => nodes.forEach((node) => node.remove());
  remove(all("script, noscript, template, noframes, noembed, link, base, param, track"));
  remove(all("meta").filter((node) => !/^(viewport|color-scheme)$/i.test(node.getAttribute("name") ?? "")));
  remove(all("head > *").filter((node) => !["meta", "title", "style"].includes(node.localName)));
  remove(all("title").slice(1).filter((node) => !node.closest("svg")));
  all("svg style").forEach((node) => {
    const style = first("head").appendChild(document.createElement("style"));
    style.textContent = node.textContent;
    if (node.hasAttribute("media")) style.setAttribute("media", node.getAttribute("media"));
    node.remove();
  });
  const charset = document.createElement("meta");
  charset.setAttribute("charset", "utf-8");
  first("head").prepend(charset);
  for (const node of all("*")) {
    for (const name of node.getAttributeNames()) {
      const value = node.getAttribute(name);
      if (/^on|["'<=]/i.test(name) || name === "autofocus" || name === "srcdoc") node.removeAttribute(name);
      else if (/^\s*javascript:/i.test(value)) node.setAttribute(name, "#");
      else if (name === "style" && /url\(/i.test(value))
        node.setAttribute(name, value.replace(/url\((?!\s*["']?#)[^)]*\)/gi, grey));
    }
    if (node.hasAttribute("background") && !node.closest("svg")) {
      node.removeAttribute("background");
      node.style.setProperty("background-image", grey);
    }
  }
  const rendered = (node) => node.getClientRects().length > 0;
  const texts = document.createTreeWalker(first("body") ?? first("html"), NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode;
    if (/[\ue000-\uf8ff]/.test(node.data)) node.data = node.data.replace(/[\ue000-\uf8ff]/g, "\u25a0");
  }

  const SIDES = ["top", "right", "bottom", "left"], of = (name) => SIDES.map((side) => name.replace("*", side));
  const LAYOUT = ["display", "width", "height", ...of("margin-*"), ...of("padding-*"), ...of("border-*-width"),
    ...SIDES, ..."box-sizing position float vertical-align z-index order align-self transform opacity".split(" "),
    "flex-grow", "flex-shrink", "border-top-left-radius"];
  const look = (node) => {
    const style = getComputedStyle(node);
    return Object.fromEntries(LAYOUT.map((name) => [name, style.getPropertyValue(name)]));
  };
  const size = (node) => { const {width, height} = getComputedStyle(node); return `${width} ${height}`; };
  const rule = document.createElement("style");
  const bare = all("img").some((node) => !node.currentSrc && !node.hasAttribute("src"));  // it draws nothing
  rule.textContent = `${bare ? "img[src]" : "img"}{content:${grey}}`;
  let greyed = 0;
  const restyle = (node, before) => {  // the layout it had, in words of its own
    for (let round = 0; round < 2; round++) {
      const now = look(node);
      for (const name of LAYOUT) if (now[name] !== before[name]) node.style.setProperty(name, before[name]);
    }
    const {width, height} = before;
    for (const [limit, off] of [["max", "none"], ["min", "0"]]) {
      if (size(node) === `${width} ${height}`) break;
      ["width", "height"].forEach((side) => node.style.setProperty(`${limit}-${side}`, off));
    }
  };
  const replace = (node) => {
    const before = look(node), picture = document.createElement("img");
    const edge = node.localName === "iframe" && node.clientTop ? getComputedStyle(node).border : "";  // a browser's own
    for (const name of ["class", "id", "style"])
      if (node.hasAttribute(name)) picture.setAttribute(name, node.getAttribute(name));
    picture.setAttribute("src", "data:,");
    node.replaceWith(picture);
    if (before.display === "inline") delete before.display;
    if (edge) picture.style.setProperty("border", edge);
    restyle(picture, before);
    greyed++;
  };
  all("object[data='']").forEach((node) => node.removeAttribute("data"));  // what it holds stands in its place
  const images = all("img").filter((node) => node.currentSrc || node.hasAttribute("src"));
  const wanted = images.map((node) => rendered(node) ? size(node) : null);
  const natural = images.map((node) => look(node));
  const REPLACED = "input[type=image], video, canvas, iframe, frame, object[data], embed";
  if (images.length || all(`${REPLACED}, svg`).length) first("head").append(rule);
  remove(all("picture > source"));
  for (const image of images) {
    ["srcset", "sizes", "alt", "loading", "longdesc", "usemap", "ismap"].forEach((name) => image.removeAttribute(name));
    image.setAttribute("src", "data:,");
    greyed++;
  }
  const attributes = images.map((node) => ["width", "height"].map((name) => node.getAttribute(name)));
  const put = (image, sides) => ["width", "height"].forEach((name, side) =>
    sides[side] === null ? image.removeAttribute(name) : image.setAttribute(name, sides[side]));
  images.forEach((image, place) => { if (wanted[place]) {
    const px = natural[place];
    const number = (name) => parseFloat(px[name]) || 0;
    const frame = (side) => number(`padding-${side}`) + number(`border-${side}-width`);
    const bordered = px["box-sizing"] === "border-box";
    const around = bordered ? [frame("left") + frame("right"), frame("top") + frame("bottom")] : [0, 0];
    const inner = ["width", "height"].map((name, side) => Math.max(0, Math.round(number(name) - around[side])));
    put(image, inner.map(String));
  } });
  images.forEach((image, place) => {
    if (!wanted[place]) return put(image, [null, null]);
    const full = ["width", "height"].map((name) => image.getAttribute(name));
    const tries = place < most_tried ? [[null, null], attributes[place], full] : [full];
    for (const sides of tries) { put(image, sides); if (size(image) === wanted[place]) return; }
    put(image, [null, null]);
    restyle(image, natural[place]);
  });
  const target = (use) => `${use.getAttribute("href") ?? use.getAttribute("xlink:href")}`;
  const targets = (node) => all("use", node).map(target);
  for (const svg of all("svg").filter((node) => !node.parentElement.closest("svg") && rendered(node))) {
    const parts = targets(svg).map((name) => name.startsWith("#") && document.getElementById(name.slice(1)));
    const long = svg.outerHTML.length + parts.reduce((sum, part) => sum + (part ? part.outerHTML.length : 1e6), 0);
    if (long >= most_svg_characters) replace(svg);
  }
  for (const image of all("svg image, svg foreignObject image")) {
    const box = document.createElementNS("http://www.w3.org/2000/svg", "rect"), drawn = image.getBBox();
    for (const side of ["width", "height"]) if (drawn[side]) box.setAttribute(side, drawn[side]);
    for (const name of ["x", "y", "width", "height", "transform", "class", "style"])
      if (image.hasAttribute(name)) box.setAttribute(name, image.getAttribute(name));
    box.setAttribute("fill", "#ccc");
    image.replaceWith(box);
    greyed++;
  }
  const used = new Set(targets(document));
  all("symbol[id]").filter((node) => !used.has("#" + node.id)).forEach((node) => node.remove());
  for (const node of all(REPLACED)) rendered(node) ? replace(node) : node.remove();
  all("audio").forEach((node) => { node.removeAttribute("src"); node.replaceChildren(); });
  return greyed;
}
