// The words of the body with the boxes in which they could be seen: inside all that clips them, and above `limit` px.
// Words whose boxes overlap get different turns, so that each one's pixels can be told from the other's. The list stays
// in our world, as `words`, for the steps that follow in the same job.
({limit, most_turns}) => {
  const root = document.documentElement, texts = [], list = [];
  const page = [0, 0, Math.max(root.scrollWidth, innerWidth), limit];
  const meet = (one, two) => [Math.max(one[0], two[0]), Math.max(one[1], two[1]),
    Math.min(one[2], two[2]), Math.min(one[3], two[3])];
  const area = (box) => box[2] > box[0] && box[3] > box[1];
  const remembered = (make) => {
    const known = new Map();
    return (node) => { if (!known.has(node)) known.set(node, make(node)); return known.get(node); };
  };
  const style = remembered((node) => {
    const all = getComputedStyle(node);
    return {position: all.position, display: all.display, visibility: all.visibility, x: all.overflowX,
      y: all.overflowY, clip: all.clip, skips: all.contentVisibility === "hidden",
      paint: /paint|strict|content/.test(all.contain),
      holds: all.transform !== "none" || all.filter !== "none"
        || all.perspective !== "none" || /paint|layout|strict|content/.test(all.contain),
      own: /(^|, *)text/.test(all.backgroundClip)};
  });
  const shadow = remembered((node) => getComputedStyle(node).textShadow !== "none");
  const visible = remembered((node) => node.isConnected && style(node).visibility === "visible"
    && (style(node).display === "contents" ? visible(node.parentElement)
      : node.checkVisibility({opacityProperty: true})));
  const box = (node) => {
    const {left, top, right, bottom} = node.getBoundingClientRect();
    return [left + scrollX, top + scrollY, right + scrollX, bottom + scrollY];
  };
  // Where an element may show, and where its content may: what is out of the flow is clipped by its container alone.
  const region = remembered((node) => {
    const {position, clip} = style(node);
    const holds = (one) => style(one).holds || (position === "absolute" && style(one).position !== "static");
    let outer = node.parentElement;
    if (/absolute|fixed/.test(position)) while (outer && !holds(outer)) outer = outer.parentElement;
    const around = outer ? inner(outer) : page;
    const sides = /absolute|fixed/.test(position) && clip.startsWith("rect") && clip.match(/-?[\d.]+px|auto/g);
    if (!sides || sides.length !== 4 || sides.includes("auto")) return around;
    const [left, top] = box(node), [up, right, down, far] = sides.map(parseFloat);
    return meet(around, [left + far, top + up, left + right, top + down]);
  });
  const inner = remembered((node) => {
    const {display, paint} = style(node), around = region(node);
    const [x, y] = paint ? ["clip", "clip"] : [style(node).x, style(node).y];
    const drawing = node.localName === "svg" && !node.ownerSVGElement;  // which clips though it is inline
    if (node === root || node === document.body || (/^(inline|contents)$/.test(display) && !drawing)) return around;
    if (x === "visible" && y === "visible" && !paint) return around;
    const [left, top] = box(node), across = left + node.clientLeft, down = top + node.clientTop;
    return meet(around, [x === "visible" ? -Infinity : across, y === "visible" ? -Infinity : down,
      x === "visible" ? Infinity : across + node.clientWidth, y === "visible" ? Infinity : down + node.clientHeight]);
  });
  const own = remembered((node) => Boolean(node)
    && (node instanceof SVGElement || style(node).own || own(node.parentElement)));
  const walker = document.createTreeWalker(document.querySelector("body") ?? root, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (!/\S/.test(node.data) || parent.closest("style, script, textarea, select, title")) continue;
    texts.push(node);
    const range = document.createRange();
    range.selectNodeContents(node);
    const shows = visible(parent) && !style(parent).skips && !parent.matches("details:not([open])")
      && !parent.closest("svg defs, symbol, clipPath, mask, pattern, marker");
    const around = shows ? inner(parent) : [0, 0, 0, 0];
    const boxes = () => [...range.getClientRects()].map(({left, top, right, bottom}) =>
      meet(around, [left + scrollX, top + scrollY, right + scrollX, bottom + scrollY])).filter(area);
    const shown = area(around) && boxes().length > 0;
    for (const word of node.data.matchAll(/\S{1,12}/gu)) {
      const end = word.index + word[0].length;
      range.setStart(node, word.index);
      range.setEnd(node, end);
      const alone = shadow(parent) || own(parent);
      list.push({node, start: word.index, end, own: alone, boxes: shown ? boxes() : [], turn: 0});
    }
  }
  const CELL = 64, cells = new Map();  // px
  const lean = ([left, top, right, bottom]) => [left + 1, top + 2, right - 1, bottom - 2];  // lines may touch
  const near = ([left, top, right, bottom]) => {
    const found = [];
    for (let x = Math.floor(left / CELL); x <= right / CELL; x++)
      for (let y = Math.floor(top / CELL); y <= bottom / CELL; y++) {
        const key = x * 100000 + y;
        if (!cells.has(key)) cells.set(key, []);
        found.push(cells.get(key));
      }
    return found;
  };
  for (const word of list) {
    const boxes = word.boxes.map(lean).filter(area), taken = new Set();
    for (const one of boxes) for (const cell of near(one)) for (const [other, turn] of cell)
      if (area(meet(one, other))) taken.add(turn);
    while (taken.has(word.turn) && word.turn < most_turns - 1) word.turn++;
    for (const one of boxes) for (const cell of near(one)) cell.push([one, word.turn]);
  }
  globalThis.words = {list, texts, page, visible, region, box, meet, area};
  return list.map(({boxes, own, turn}) => [own, turn, boxes.map((one) => [Math.floor(one[0]), Math.floor(one[1]),
    Math.ceil(one[2]), Math.ceil(one[3])])]);
}
