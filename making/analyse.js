// Which selectors, conditions and declarations count here, and the page with marks around what nobody sees; twice, the
// second time with white space collapsed.
({selectors, media, supports, declared, gone}) => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const PSEUDO = /(?<!\\)(?:::?(?:before|after|first-line|first-letter)(?![\w-])|::[\w-]+(?:\([^()]*\))?)/gi;
  const matches = () => selectors.map((selector) => {
    const alone = (place) => place === 0 || /[\s>+~,(]/.test(selector[place - 1]);
    const plain = selector.replace(PSEUDO, (found, place) => alone(place) ? "*" : "");
    try { return document.querySelector(plain) ? 1 : 0; }
    catch { return CSS.supports(`selector(${selector})`) ? 1 : -1; }
  });
  const works = (check) => { try { return Boolean(check()); } catch { return true; } };
  const answer = {media: media.map((query) => works(() => matchMedia(query).matches)),
    supports: supports.map((condition) => works(() => CSS.supports(condition))),
    declared: declared.map(([name, value]) => CSS.supports(name, value.replace(/\s*!\s*important\s*$/i, "")))};

  const used = new Set(all("use, textPath, [fill^='url('], [filter^='url('], [mask^='url('], [clip-path^='url(']"));
  const SKIPPED = "style, br, wbr, title, option, optgroup, col, colgroup, area, source, svg *, legend, rt, rp";
  const drawn = (node) => ["::before", "::after"].some((pseudo) => {
    const {content, display} = getComputedStyle(node, pseudo);
    return display !== "none" && !/^(none|normal)$/.test(content);
  });
  const unseen = (node) => node.getClientRects().length === 0
    ? getComputedStyle(node).display !== "contents" || !node.textContent.trim()
    : [...node.getClientRects()].every((box) => box.width === 0 && box.height === 0) && !drawn(node);
  const out = (node) => /absolute|fixed/.test(getComputedStyle(node).position);
  const hidden = (node) => {
    if (node.querySelector("style")) return false;
    const vector = node.localName === "svg" || node.querySelector("svg");
    if (vector && used.size && node.querySelector("[id]")) return false;  // others may draw what it defines
    const inner = all("*", node);
    if (unseen(node) && inner.every(unseen)) return true;
    if (!out(node) || inner.some(out) || /checkbox|radio/.test(node.getAttribute("type") ?? "")) return false;
    const style = getComputedStyle(node);
    return [...node.getClientRects()].every((box) => (box.width <= 1 && box.height <= 1 && style.overflow === "hidden")
      || box.right <= 0 || box.bottom + scrollY <= 0 || style.opacity === "0" || style.visibility === "hidden");
  };
  const found = [];
  const visit = (node) => { for (const child of node.children) {
    if (child.matches(SKIPPED)) continue;
    if (hidden(child)) found.push(child); else visit(child);
  } };
  const body = document.querySelector("body");
  if (body) visit(body);
  for (const select of all("select:not([multiple])").filter((node) => node.size < 2)) {
    const options = all("option", select);
    const longest = options.reduce((one, other) => one && one.text.length >= other.text.length ? one : other, null);
    if (!found.some((node) => node.contains(select)))
      found.push(...options.filter((option) => !option.selected && option !== longest));  // the longest sets the width
  }
  found.forEach((node, place) => {
    node.before(document.createComment(`drop ${place}`));
    node.after(document.createComment(`/drop ${place}`));
  });
  const page = () => {
    const root = document.querySelector("html").cloneNode(true);
    all("style", root).forEach((style, place) => style.textContent = `/*sheet ${place}*/`);
    all("img[src]", root).forEach((image) => image.setAttribute("src", "data:,"));  // the renderer put its grey there
    all("pre, textarea, listing", root).filter((node) => node.firstChild?.data?.startsWith("\n"))
      .forEach((node) => node.prepend("\n"));  // a parser drops the first line break
    return root.outerHTML;
  };
  answer.plain = page();
  const texts = document.createTreeWalker(document.querySelector("html"), NodeFilter.SHOW_TEXT), spaced = [];
  while (texts.nextNode()) {
    const node = texts.currentNode, parent = node.parentElement;
    if (!/[ \t\n\r\f]{2}|[\t\r\f]/.test(node.data) || /^(style|textarea|title|pre)$/.test(parent.localName)) continue;
    if (/^(normal|nowrap)$/.test(getComputedStyle(parent).whiteSpace)) spaced.push(node);
  }
  const collapsed = (space) => space.includes("\n") ? "\n" : " ";
  for (const node of spaced) node.data = node.data.replace(/[ \t\n\r\f]+/g, collapsed);
  answer.spaced = page();
  answer.dropped = found.length;
  found.filter((node, place) => !gone || gone.includes(place)).forEach((node) => node.remove());
  answer.after = matches();
  return answer;
}
