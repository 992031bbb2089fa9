// What begins below `limit` goes, from the end; of a text that reaches below it, the lines there. A box that clips and
// ends above keeps all it holds: that is hidden, not below, and unseen.js knows more of it.
({limit}) => {
  const body = document.querySelector("body");
  let removed = 0;
  const above = (node) => {
    const {overflowY, display} = getComputedStyle(node);
    const clips = overflowY !== "visible" && !/^(inline|contents)$/.test(display);
    return clips && node.getBoundingClientRect().bottom + scrollY <= limit;
  };
  const clipped = new Set();
  const tops = (node) => [...node.getClientRects()].map((box) => box.top + scrollY);
  for (let round = 0; round < 4; round++) {
    const below = (node) => { const found = tops(node); return found.length > 0 && Math.min(...found) >= limit; };
    const begins = (node) => tops(node).some((top) => top < limit);
    const going = [];
    const visit = (node) => {
      for (const child of [...node.children].reverse()) {
        if (child.localName === "style" || child.closest("svg") || child.localName === "option") continue;
        if (below(child) && ![...child.querySelectorAll("*")].some(begins)) going.push(child);
        else if (above(child)) clipped.add(child);
        else visit(child);
      }
    };
    if (body) visit(body);
    going.forEach((node) => node.remove());
    removed += going.length;
    const texts = document.createTreeWalker(body, NodeFilter.SHOW_TEXT), long = [], range = document.createRange();
    while (texts.nextNode()) {
      range.selectNodeContents(texts.currentNode);
      const found = tops(range), inside = texts.currentNode.parentElement;
      if (found.length && Math.max(...found) >= limit && !inside.closest("svg")
        && ![...clipped].some((box) => box.contains(inside))) long.push(texts.currentNode);
    }
    for (const node of long) {
      let low = 0, high = node.data.length;
      while (low < high) {
        const middle = (low + high) >> 1;
        range.setStart(node, middle);
        range.setEnd(node, Math.min(middle + 1, node.data.length));
        const found = tops(range);
        if (found.length && Math.min(...found) >= limit) high = middle; else low = middle + 1;
      }
      node.data = node.data.slice(0, low).trimEnd();
      removed++;
    }
    if (!going.length && !long.length) break;
  }
  return removed;
}
