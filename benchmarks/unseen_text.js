// The words of the body with the boxes in which they would stand, dealt into groups in which no two boxes overlap;
// with `group`, the words of that one become transparent. Text that the browser draws itself (controls, SVG, glyphs
// that cut a background or throw a shadow) goes with its element.
({group, most_groups}) => {
  const body = document.body, words = [];
  const add = (length, boxes, range, owner, show) => words.push({length, range, owner, show,
    boxes: boxes.filter((box) => box.width > 0 && box.height > 0).map((box) => [
      Math.floor(box.left + scrollX), Math.floor(box.top + scrollY),
      Math.ceil(box.right + scrollX), Math.ceil(box.bottom + scrollY)])});
  const length = (text) => text.replace(/\s+/g, "").length;
  const owner = (node) => {
    for (let one = node.parentElement; one; one = one.parentElement) {
      if (one instanceof SVGElement) return {owner: one, show: ["fill", "stroke"]};
      const {backgroundClip, textShadow} = getComputedStyle(one);
      if (/(^|,)\s*text/.test(backgroundClip)) return {owner: one, show: ["background"]};
      if (one === node.parentElement && textShadow !== "none") return {owner: one, show: ["text-shadow", "color"]};
    }
    return {};
  };
  const control = (node) => {
    const boxes = [...node.getClientRects()];
    if (node.localName === "textarea") {
      const whole = node.value, high = node.clientHeight, css = node.getAttribute("style") ?? "";
      node.style.setProperty("height", "0", "important");
      const words = [...whole.matchAll(/\S+/g)], {lineHeight, fontSize, paddingBottom} = getComputedStyle(node);
      const line = (parseFloat(lineHeight) || 1.15 * parseFloat(fontSize)) + parseFloat(paddingBottom);
      const below = words.findIndex((word) => {  // the line that this word begins or goes on, below the box
        node.value = whole.slice(0, word.index + word[0].length);
        return node.scrollHeight - line > high - 1;
      });
      node.value = whole;
      node.setAttribute("style", css);
      const seen = below < 0 ? whole : whole.slice(0, words[below].index);
      add(length(seen), boxes, null, node, ["color"]);
      add(length(whole) - length(seen), [], null, node, ["color"]);
      return;
    }
    const closed = !node.multiple && node.size < 2;
    for (const option of node.options) {
      if (closed) add(length(option.text), option.selected ? boxes : [], null, node, ["color"]);
      else add(length(option.text), [...option.getClientRects()], null, option, ["color"]);
    }
  };
  for (const node of document.querySelectorAll("body select, body textarea")) control(node);
  const texts = document.createTreeWalker(body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode;
    if (node.parentElement.closest("style, script, select, textarea")) continue;
    const drawn = owner(node);
    for (const word of node.data.matchAll(/\S{1,12}/gu)) {
      const range = document.createRange();
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      add(word[0].length, [...range.getClientRects()], range, drawn.owner, drawn.show);
    }
  }
  const CELL = 64, cells = new Map();  // px; which words stand near
  const near = (box) => {
    const found = [];
    for (let x = Math.floor(box[0] / CELL); x <= box[2] / CELL; x++)
      for (let y = Math.floor(box[1] / CELL); y <= box[3] / CELL; y++) found.push(`${x} ${y}`);
    return found.slice(0, 10000);
  };
  const overlap = (one, other) => one[0] < other[2] && other[0] < one[2] && one[1] < other[3] && other[1] < one[3];
  for (const word of words) {
    const taken = new Set();
    for (const box of word.boxes) for (const cell of near(box)) for (const [other, group] of cells.get(cell) ?? [])
      if (overlap(box, other)) taken.add(group);
    word.group = 0;
    while (taken.has(word.group) && word.group < most_groups - 1) word.group++;
    for (const box of word.boxes) for (const cell of near(box)) {
      if (!cells.has(cell)) cells.set(cell, []);
      cells.get(cell).push([box, word.group]);
    }
  }
  if (group === undefined) return {
    title: length(document.title), words: words.map(({length, boxes, group}) => [length, boxes, group])};
  const sheet = new CSSStyleSheet();
  const clear = "color:transparent;-webkit-text-fill-color:transparent;-webkit-text-stroke-color:transparent";
  sheet.replaceSync(`*,*::before,*::after{transition:none!important}::highlight(word){${clear};text-shadow:none}`);
  document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheet];
  const chosen = words.filter((word) => word.group === group);
  CSS.highlights.set("word", new Highlight(...chosen.filter((word) => !word.owner).map((word) => word.range)));
  for (const {owner: node, show} of words) if (show) show.forEach((name) => node.style.removeProperty(name));
  for (const {owner: node, show} of chosen) for (const name of show ?? [])
    node.style.setProperty(name, /background|shadow/.test(name) ? "none" : "transparent", "important");
  return chosen.length;
}
