// Finds what nobody sees and how little of it keeps the layout: `flags` tells of each word of words.js (which was there
// before) whether it has a pixel. Layout alone is asked here, for that costs no render; pixels decide later. The pieces
// stay in our world, as `pieces`, and stand between marks; the answer is each one's replacement, mostly "".
({flags, most_checks}) => {
  const {list, page, visible, region, box, meet, area} = globalThis.words;
  const root = document.documentElement, body = document.querySelector("body") ?? root;
  const all = (selector, node = document) => [...node.querySelectorAll(selector)];
  const none = (colour) => /^transparent$|, 0\)$|\/ 0\)$/.test(colour);

  // --- what is seen: texts up to their last word with a pixel, and boxes that paint something
  const runs = new Map();  // text: [start, end, whether it has a pixel] of its words, neighbours alike joined
  list.forEach(({node, start, end}, place) => {
    const own = runs.get(node) ?? [], last = own.at(-1), held = flags[place] === "1";
    runs.set(node, own);
    if (last && last[2] === held) last[1] = end; else own.push([start, end, held, end]);
  });
  const seen = new Set([...runs].filter(([, own]) => own.some(([,, held]) => held)).map(([node]) => node));
  const REPLACED = "img, svg, input, select, textarea, button, progress, meter, hr, video, canvas, iframe, object";
  const drawn = (node, pseudo) => {
    const {content, display} = getComputedStyle(node, pseudo);
    return display !== "none" && !/^(none|normal)$/.test(content);
  };
  const paints = (node) => {
    if (node.matches(REPLACED)) return true;
    const own = getComputedStyle(node);
    return !none(own.backgroundColor) || own.backgroundImage !== "none" || own.boxShadow !== "none"
      || ["Top", "Right", "Bottom", "Left"].some((side) => own[`border${side}Style`] !== "none"
        && own[`border${side}Width`] !== "0px" && !none(own[`border${side}Color`]))
      || (own.outlineStyle !== "none" && own.outlineWidth !== "0px")
      || (own.display === "list-item" && (own.listStyleType !== "none" || own.listStyleImage !== "none"))
      || drawn(node, "::before") || drawn(node, "::after");
  };
  const within = (node) => area(meet(meet(box(node), region(node)), page));
  const full = new Set(), painters = [];
  const fill = (node) => { for (let one = node; one && !full.has(one); one = one.parentElement) full.add(one); };
  for (const node of seen) fill(node.parentElement);
  for (const node of all("*", body)) {
    if (node.matches("style, br, wbr, option, optgroup, svg *") || !visible(node)) continue;
    if (!paints(node) || (!within(node) && !drawn(node, "::before") && !drawn(node, "::after"))) continue;
    if (!area(meet(region(node), page))) continue;
    painters.push([node, region(node)]);
    fill(node);
  }

  // --- where everything is, and in which colours (:nth-child() counts what nobody sees), to be asked before and after
  const range = document.createRange(), standins = new Map();
  const places = () => {
    const high = Math.max(root.scrollHeight, body.scrollHeight);
    const now = [Math.max(root.scrollWidth, body.scrollWidth), Math.min(high, page[3])];
    for (const [node, around] of painters) {
      const part = meet(box(standins.get(node) ?? node), around);
      now.push(...(area(part) ? part : [0, 0, 0, 0]));
      const {color, backgroundColor, borderTopColor, borderTopWidth} = getComputedStyle(standins.get(node) ?? node);
      now.push(`${color} ${backgroundColor} ${borderTopColor} ${borderTopWidth}`);
    }
    for (const node of seen) {
      range.selectNodeContents(node);
      const {left, top, right, bottom} = range.getBoundingClientRect();
      now.push(left, top, right, bottom);
    }
    return now;
  };
  let before = null, checks = 0;
  const still = () => {
    checks++;
    const now = places();
    return now.length === before.length
      && now.every((one, place) => one === before[place] || Math.abs(one - before[place]) < 0.02);
  };

  // --- pieces: each with ways to go without it, the shortest first; a way does it and returns how to undo it
  const swap = (nodes, other = null) => {
    const mark = document.createComment("");
    nodes[0].before(mark);
    nodes.forEach((node) => node.remove());
    if (other) mark.before(other);
    standins.set(nodes[0], other);
    return {other, undo: () => { mark.replaceWith(...nodes); other?.remove(); standins.delete(nodes[0]); }};
  };
  const emptied = (node, sides, filling) => {
    const other = node.cloneNode(false), {width, height, display} = getComputedStyle(node);
    if (other.localName === "svg") return null;
    if (display === "none") return other;
    if (filling) other.append(filling);
    if (display === "inline") {
      other.style.setProperty("display", "inline-block");
      other.style.setProperty("width", `${Math.round(node.getBoundingClientRect().width * 100) / 100}px`);
      return other;
    }
    for (const [name, value] of [["width", width], ["height", height]])
      if (sides.includes(name) && value.endsWith("px")) other.style.setProperty(name, value);
    return other;
  };
  const elementWays = (node, brief) => {
    const ways = node.localName === "legend" ? [] : [() => swap([node])];  // its frame would close over it
    const sized = (sides, filling) => () => {
      const other = emptied(node, sides, filling);
      return other && swap([node], other);
    };
    const both = ["width", "height"];
    if (!brief) ways.push(sized([]), sized(["height"]), sized(both), sized(both, "\u00a0"));
    return ways;
  };
  const textWays = (node) => {
    const spacer = () => {
      range.selectNodeContents(node);
      const boxes = [...range.getClientRects()];
      if (boxes.length !== 1) return null;
      const other = document.createElement("span");
      other.setAttribute("style", `display:inline-block;width:${Math.round(boxes[0].width * 100) / 100}px`);
      return swap([node], other);
    };
    return [() => swap([node]), () => swap([node], document.createTextNode("\u00a0")), spacer];
  };
  const pieces = [];
  const shortened = (node) => {  // an ellipsis stands for what does not fit
    for (let outer = node.parentElement; outer; outer = outer.parentElement) {
      const {textOverflow, webkitLineClamp} = getComputedStyle(outer);
      if (textOverflow === "ellipsis" || webkitLineClamp !== "none") return true;
    }
    return false;
  };
  const inText = (node) => {
    const own = runs.get(node), dots = own.length > 1 && shortened(node);
    runs.delete(node);
    seen.delete(node);
    for (const [start, end, held, first] of [...own].reverse()) {  // from the end, so that places stay right
      const tail = !held && start > 0 && own.at(-1)[1] === end;
      const from = tail ? (dots ? first : node.data.slice(0, start).trimEnd().length) : start;
      if (from >= end) continue;
      if (end < node.data.length) node.splitText(end);
      const part = from > 0 ? node.splitText(from) : node;
      if (held) seen.add(part);
      else pieces.push({nodes: [part], ways: textWays(part)});
    }
  };
  const inSelect = (node) => {
    const closed = !node.multiple && node.size < 2, options = [...node.options];
    const bottom = node.getBoundingClientRect().top + node.clientTop + node.clientHeight - 3;  // px above the first ink
    const kept = options.filter((option, place) => closed ? place === node.selectedIndex
      : option.getBoundingClientRect().top < bottom || option.selected);
    if (kept.length === options.length) return;
    const way = (sized) => () => {
      const other = node.cloneNode(false);
      for (const option of kept) {
        const copy = option.cloneNode(true);
        if (closed) ["value", "selected", "disabled", "hidden"].forEach((name) => copy.removeAttribute(name));
        other.append(copy);
      }
      if (!closed) other.append(document.createElement("option"));  // what overflows may be scrolled, and is drawn so
      if (sized) other.style.setProperty("width", getComputedStyle(node).width);
      return swap([node], other);
    };
    pieces.push({nodes: [node], ways: [way(false), way(true)]});
  };
  const inTextarea = (node) => {
    if (!node.value.trim() || node.scrollHeight <= node.clientHeight) return;
    const other = node.cloneNode(true), whole = node.value;
    const {lineHeight, fontSize, paddingBottom} = getComputedStyle(node);
    const line = (parseFloat(lineHeight) || 1.15 * parseFloat(fontSize)) + parseFloat(paddingBottom);  // px
    node.after(other);
    other.style.setProperty("height", "0", "important");
    const ends = [...whole.matchAll(/\S+/g)].map((word) => word.index + word[0].length);
    let low = 0, high = ends.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      other.value = whole.slice(0, ends[middle]);
      if (other.scrollHeight - line > node.clientHeight - 1) high = middle; else low = middle + 1;
    }
    other.remove();
    if (low === 0 || low === ends.length) return;
    const shorter = node.cloneNode(false);
    shorter.textContent = `${whole.slice(0, ends[low - 1])}\n\n`;  // still overflows
    pieces.push({nodes: [node], ways: [() => swap([node], shorter)]});
  };
  const used = all("use, textPath, [fill^='url('], [filter^='url('], [mask^='url('], [clip-path^='url(']").length > 0;
  const defines = (node) => used && node.querySelector("[id]")
    && (node.localName === "svg" || node.querySelector("svg"));
  const unsized = (node) => [...node.getClientRects()].every((one) => one.width === 0 && one.height === 0)
    && !drawn(node, "::before") && !drawn(node, "::after");
  const goes = (node) => {
    if (full.has(node) || node.querySelector("style") || defines(node)) return false;
    const rendered = node.getClientRects().length > 0 || getComputedStyle(node).display === "contents";
    if (rendered && node.matches("[type=checkbox], [type=radio]")) return false;
    return !rendered || node.textContent.trim() || unsized(node) || !visible(node) || !within(node);
  };
  const KEPT = "style, br, wbr, title, option, optgroup, col, colgroup, area, source";
  const visit = (node) => { for (const child of Array.from(node.childNodes)) {
    if (child.nodeType === 3) { if (runs.has(child)) inText(child); continue; }
    if (child.nodeType !== 1) continue;
    if (child.localName === "svg" && !goes(child)) {
      const inks = (one) => [...runs.keys()].some((text) => seen.has(text) && one.contains(text));
      const idle = used ? [] : all("text", child).filter((one) => one.textContent.trim() && !inks(one));
      [...all("title, desc, metadata", child), ...idle].forEach((one) => pieces.push({nodes: [one], ways: elementWays(one, true)}));
    } else if (!child.matches(KEPT) && goes(child)) {
      const brief = !child.textContent.trim();
      pieces.push({nodes: [child], ways: elementWays(child, brief), inside: brief ? null : child});
    } else if (child.localName === "select") inSelect(child);
    else if (child.localName === "textarea") inTextarea(child);
    else visit(child);
  } };
  visit(body);
  before = places();

  // --- all at once, then halves of what moves something
  const taken = [];
  const solve = (group, way) => {
    if (!group.length) return [];
    if (checks >= most_checks) return group;
    group.forEach((piece) => { piece.done = piece.ways[way]?.() ?? null; });
    const done = group.filter((piece) => piece.done);
    if (done.length && still()) {
      taken.push(...done);
      return group.filter((piece) => !piece.done);
    }
    done.reverse().forEach((piece) => { piece.done.undo(); piece.done = null; });
    if (group.length === 1) return group;
    const half = group.length >> 1;
    return [...solve(group.slice(0, half), way), ...solve(group.slice(half), way)];
  };
  let rest = pieces.splice(0);
  for (let round = 0; rest.length && round < 4; round++) {
    const most = Math.max(...rest.map((piece) => piece.ways.length));
    for (let way = 0; way < most; way++) rest = [...solve(rest.filter((piece) => way < piece.ways.length), way),
      ...rest.filter((piece) => way >= piece.ways.length)];
    rest.forEach((piece) => piece.inside && visit(piece.inside));  // finer ones
    rest = pieces.splice(0);
  }

  // --- marks where they stood
  const gone = [...taken].reverse();
  gone.forEach((piece) => piece.done.undo());
  taken.sort((one, two) => one.nodes[0].compareDocumentPosition(two.nodes[0]) & 4 ? -1 : 1);
  globalThis.pieces = taken.map(({nodes: [node], done}, number) => {
    node.before(document.createComment(`drop ${number}`));
    node.after(document.createComment(`/drop ${number}`));
    return {node, other: done.other};
  });
  const written = (other) => other.nodeType === 3 ? "&nbsp;" : other.outerHTML;
  const shell = (node) => {
    if (node.nodeType !== 1 || !node.textContent.trim() || node.matches("select, textarea, svg *")) return null;
    return emptied(node, ["width", "height"])?.outerHTML;
  };
  return {replacements: globalThis.pieces.map(({other}) => other ? written(other) : ""),
    shells: globalThis.pieces.map(({node}) => shell(node) ?? null), checks};
}
