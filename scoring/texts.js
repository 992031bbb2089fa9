// Every text that may show, whatever element it stands in, in the document's order: [text, [[x, y, width, height], ...],
// whether the boxes are its own]. Boxes in CSS pixels of the whole page: those of a text's lines, or of the element whose
// generated or form text it is, which holds other things, too. What of them is painted, the pictures tell.
(options, dom) => {
  const found = [];
  let left = 0, top = 0;  // of the document that is walked, in the page: 0, or a frame's
  const boxes = (thing, type) => [...type.prototype.getClientRects.call(thing)]
    .map((box) => [box.x + left, box.y + top, box.width, box.height]).filter((box) => box[2] > 0 && box[3] > 0);
  const styleOf = (node, pseudo) => getComputedStyle(node, pseudo);
  const one = (text) => text.replace(/\s+/g, " ").trim();
  const shown = (text, style) => {  // as it is painted: an upper-case title reads like one that was typed so
    if (style.textTransform === "uppercase") return text.toUpperCase();
    if (style.textTransform === "lowercase") return text.toLowerCase();
    if (style.textTransform === "capitalize") return text.replace(/(^|\s)(\S)/g, (all, gap, first) => gap + first.toUpperCase());
    return text;
  };
  const add = (text, rects, own) => {
    const clean = one(text);
    // Icon fonts' letters, of Unicode's private areas, are pictures that nobody can read.
    if (clean.replace(/[\s\p{Co}]/gu, "") && rects.length) found.push([clean, rects, own]);
  };

  const markerOf = (node, style) => {
    const own = styleOf(node);
    if (own.display !== "list-item") return "";
    return style.content !== "normal" ? style.content : own.listStyleType;  // a string, or the name of a kind of number
  };
  const generated = (node, pseudo) => {
    const style = styleOf(node, pseudo), content = pseudo === "::marker" ? markerOf(node, style) : style.content;
    if (!content || content === "none" || content === "normal" || style.display === "none") return;
    const parts = content.match(/"(?:\\.|[^"\\])*"|attr\([^)]*\)|counters?\([^)]*\)/g) ?? [];
    const words = parts.map((part) => {
      if (part.startsWith("attr(")) return dom.attribute(node, part.slice(5, -1).split(/[\s,]/)[0]) ?? "";
      return part.startsWith('"') ? part.slice(1, -1).replace(/\\(.)/g, "$1") : part;
    });
    add(shown(words.join(""), style), boxes(node, Element), false);
  };

  const unlettered = new Set(["hidden", "checkbox", "radio", "range", "color", "image", "file"]);
  const labels = {submit: "Submit", reset: "Reset"};
  const valueOf = (node) => {
    if (node.localName === "textarea") {
      return dom.get(HTMLTextAreaElement, "value").call(node) || dom.attribute(node, "placeholder") || "";
    }
    const type = dom.get(HTMLInputElement, "type").call(node);
    if (unlettered.has(type)) return "";
    const value = dom.get(HTMLInputElement, "value").call(node);
    if (type === "password" && value) return "\u2022".repeat(value.length);
    return value || (dom.attribute(node, "value") === null ? labels[type] : "") || dom.attribute(node, "placeholder") || "";
  };
  const isList = (node) =>
    dom.attribute(node, "multiple") !== null || dom.get(HTMLSelectElement, "size").call(node) > 1;
  const field = (node) => {
    if (node.localName === "input" || node.localName === "textarea") {
      add(shown(valueOf(node), styleOf(node)), boxes(node, Element), false);
    } else if (node.localName === "select") {
      if (isList(node)) return;
      const chosen = dom.get(HTMLSelectElement, "selectedOptions").call(node)[0];
      if (chosen) add(dom.get(HTMLOptionElement, "label").call(chosen), boxes(node, Element), false);
    } else if (node.localName === "option" || node.localName === "optgroup") {
      // What a list box shows; a closed one's have no boxes. A group's box holds its options', too.
      const type = node.localName === "option" ? HTMLOptionElement : HTMLOptGroupElement;
      add(dom.get(type, "label").call(node), boxes(node, Element), type === HTMLOptionElement);
    }
  };

  const walk = (root) => {
    const walker = Document.prototype.createTreeWalker.call(document, root, NodeFilter.SHOW_ELEMENT | NodeFilter.SHOW_TEXT);
    for (let node = root; node; node = walker.nextNode()) {
      if (node.nodeType === Node.TEXT_NODE) {
        if (dom.parentOf(node)?.localName === "option") continue;  // its label, above
        const text = dom.get(CharacterData, "data").call(node);
        if (!text.trim()) continue;
        const range = Document.prototype.createRange.call(document);
        range.selectNodeContents(node);
        const parent = dom.parentOf(node);
        add(parent.nodeType === Node.ELEMENT_NODE ? shown(text, styleOf(parent)) : text, boxes(range, Range), true);
      } else if (node.nodeType === Node.ELEMENT_NODE) {
        generated(node, "::marker");
        generated(node, "::before");
        field(node);
        const shadow = dom.get(Element, "shadowRoot").call(node);
        if (shadow) walk(shadow);
        const inner = dom.frameOf(node);
        if (inner) {
          const box = Element.prototype.getBoundingClientRect.call(node), style = styleOf(node), before = [left, top];
          left += box.x + parseFloat(style.borderLeftWidth) + parseFloat(style.paddingLeft);
          top += box.y + parseFloat(style.borderTopWidth) + parseFloat(style.paddingTop);
          walk(inner);
          [left, top] = before;
        }
        generated(node, "::after");
      }
    }
  };
  walk(dom.root());
  return found;
}
