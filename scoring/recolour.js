// Gives each element of `tags` a colour of its own, and everything else none; the texts of a pass, with their colours.
// A page with more such elements than colours is coloured in several passes; `shift` is added to each part of a colour,
// so that two renders tell a text from whatever happens to have its colour. With a shift: the number of elements.
({levels, tags, shift, pass: wanted}, dom) => {
  const still = new CSSStyleSheet();
  still.replaceSync("*,*::before,*::after{transition:none!important}");
  document.adoptedStyleSheets = [still];
  const count = levels.length, coloured = new Map();
  for (const node of dom.all("*")) {
    if ("style" in node) dom.setStyle(node, "background-color", "rgba(255, 255, 255, 0)");
  }
  dom.all(tags).forEach((node, index) => {
    const pass = Math.floor(index / count ** 3), number = count ** 3 - 1 - index % count ** 3;
    const parts = [Math.floor(number / count ** 2), Math.floor(number / count) % count, number % count];
    const colour = parts.map((part) => (levels[part] + shift) % 256);
    coloured.set(node, [pass, ...parts.map((part) => levels[part])]);
    dom.setStyle(node, "color", pass === wanted ? `rgb(${colour})` : "transparent");
    dom.setStyle(node, "opacity", "1");
  });
  if (shift) return coloured.size;
  const body = dom.body(), found = [];
  if (!body) return found;
  const unseen = new Set(["SCRIPT", "STYLE", "TEMPLATE", "NOSCRIPT"]);
  const walker = Document.prototype.createTreeWalker.call(document, body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const text = node.data.trim();
    if (!text || unseen.has(dom.parentOf(node).nodeName)) continue;
    for (let owner = dom.parentOf(node); owner && owner !== body; owner = dom.parentOf(owner)) {
      if (coloured.has(owner)) {
        if (coloured.get(owner)[0] === wanted) found.push([text, ...coloured.get(owner).slice(1)]);
        break;
      }
      if (dom.attribute(owner, "style")?.match(/(^|;)\s*color\s*:/)) break;
    }
  }
  return found;
}
