// Which selectors, conditions and declarations count here, and the page with the marks of unseen.js, which was there
// before; twice, the second time with white space collapsed.
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
  globalThis.pieces.filter((piece, place) => !gone || gone.includes(place)).forEach(({node, other}) =>
    node.replaceWith(...[other].filter(Boolean)));
  answer.after = matches();
  return answer;
}
