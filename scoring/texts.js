// Every text that may show, whatever element it stands in, but for what CSS generates (generated.py), in the document's
// order: [text, [[x, y, width, height], ...], whether the boxes are its own]; then [x, y] of where the picture begins,
// left of 0 where a page overflows to the left. Boxes in pixels of the whole page's picture: those of a text's lines, or
// of the element whose form text it is, which holds other things, too. What of them is painted, the pictures tell.
(options, dom) => {
  const found = [], scrolled = [scrollX, scrollY];  // a field with autofocus scrolls the page
  scrollTo({left: -1e6, top: -1e6, behavior: "instant"});
  const origin = [scrollX, scrollY];
  scrollTo({left: scrolled[0], top: scrolled[1], behavior: "instant"});
  let left = scrollX - origin[0], top = scrollY - origin[1];  // of the document that is walked, in the picture
  const boxes = (thing, type) => [...type.prototype.getClientRects.call(thing)]
    .map((box) => [box.x + left, box.y + top, box.width, box.height]).filter((box) => box[2] > 0 && box[3] > 0);
  const styleOf = (node) => getComputedStyle(node);
  const one = (text) => text.replace(/\s+/g, " ").trim();
  const shown = (text, style) => {  // as it is painted: an upper-case title reads like one that was typed so
    const natural = /[\p{Script=Hebrew}\p{Script=Arabic}]/u.test(text) ? "rtl" : "ltr";
    if (style.unicodeBidi.endsWith("override") && style.direction !== natural) text = [...text].reverse().join("");
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

  const unlettered = new Set(["hidden", "checkbox", "radio", "range", "color", "image"]);
  const labels = {submit: "Submit", reset: "Reset"};
  const blanks = {  // of fields in which the browser itself writes what is missing, and no placeholder
    date: "mm/dd/yyyy", time: "--:-- --", "datetime-local": "mm/dd/yyyy, --:-- --", month: "--------- ----",
    week: "Week --, ----", file: "Choose File No file chosen",
  };
  const valueOf = (node) => {
    if (node.localName === "textarea") {
      return dom.get(HTMLTextAreaElement, "value").call(node) || dom.attribute(node, "placeholder") || "";
    }
    const type = dom.get(HTMLInputElement, "type").call(node);
    if (unlettered.has(type)) return "";
    const value = dom.get(HTMLInputElement, "value").call(node);
    if (type === "password" && value) return "\u2022".repeat(value.length);
    if (blanks[type]) return value || blanks[type];
    return value || (dom.attribute(node, "value") === null ? labels[type] : "") || dom.attribute(node, "placeholder") || "";
  };
  const isList = (node) =>
    dom.attribute(node, "multiple") !== null || dom.get(HTMLSelectElement, "size").call(node) > 1;
  const field = (node) => {
    if (node.localName === "input" || node.localName === "textarea") {
      add(shown(valueOf(node), styleOf(node)), boxes(node, Element), false);
    } else if (node.localName === "img") {  // without a source it is its alternative text; others show a grey placeholder
      const source = dom.attribute(node, "src") ?? dom.attribute(node, "srcset");
      if (source === null) add(shown(dom.attribute(node, "alt") ?? "", styleOf(node)), boxes(node, Element), false);
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
      }
    }
  };
  walk(dom.root());
  return [found, origin];
}
