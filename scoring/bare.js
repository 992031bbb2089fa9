// Hides every text and leaves all else where and as it is, or shows the texts again: where two pictures then differ, a
// text is seen. Not by `color`, which borders and drawings use, too.
({hide}, dom) => {
  const state = globalThis.bare ??= {styles: new Map(), sheets: new Map(), marks: new Map()};
  if (!hide) {
    for (const [node, style] of state.styles) {
      if (style === null) dom.removeAttribute(node, "style"); else dom.setAttribute(node, "style", style);
    }
    for (const [node, mark] of state.marks) {
      if (mark === null) dom.removeAttribute(node, "data-bare"); else dom.setAttribute(node, "data-bare", mark);
    }
    for (const [root, sheet] of state.sheets) {
      root.adoptedStyleSheets = [...root.adoptedStyleSheets].filter((other) => other !== sheet);
    }
    globalThis.bare = undefined;
    return;
  }
  const nothing = "-webkit-text-fill-color:transparent!important;-webkit-text-stroke-color:transparent!important;"
    + "text-shadow:none!important;text-emphasis-color:transparent!important;transition:none!important";
  const rules = `@layer bare {
    *, ::before, ::after, ::placeholder, ::marker, ::file-selector-button { ${nothing} }
    text, text * { fill: transparent !important; stroke: transparent !important; transition: none !important }
    [data-bare~="before"]::before, [data-bare~="after"]::after, [data-bare~="line"]::first-line,
    [data-bare~="letter"]::first-letter { background: none !important }
  }`;
  const set = (node, name, value) => {
    if (!state.styles.has(node)) state.styles.set(node, dom.attribute(node, "style"));
    dom.setStyle(node, name, value);
  };
  const parts = {before: "::before", after: "::after", line: "::first-line", letter: "::first-letter"};
  const isClipped = (style) => style.webkitBackgroundClip.includes("text");
  const clear = (node) => {
    const style = getComputedStyle(node);
    // What no layer of ours overrules: !important in a style attribute, and in a layer of the page's, which comes first.
    for (const name of ["-webkit-text-fill-color", "-webkit-text-stroke-color"]) {
      if (style.getPropertyValue(name) === "rgba(0, 0, 0, 0)") continue;
      set(node, "transition", "none");
      set(node, name, "transparent");
    }
    if (style.textShadow !== "none") set(node, "text-shadow", "none");
    if (node instanceof SVGTextContentElement || dom.parentOf(node) instanceof SVGTextContentElement) {
      for (const name of ["fill", "stroke"]) {
        if (!["rgba(0, 0, 0, 0)", "none"].includes(style[name])) set(node, name, "transparent");
      }
    }
    if (isClipped(style)) {  // gradients in the shape of letters, beside backgrounds that are none
      const clips = style.webkitBackgroundClip.split(", "), sizes = style.backgroundSize.split(", ");
      if (clips.every((clip) => clip === "text")) set(node, "background", "none");
      else set(node, "background-size", clips.map((clip, n) => clip === "text" ? "0 0" : sizes[n % sizes.length]).join(", "));
    }
    const marked = Object.keys(parts).filter((part) => isClipped(getComputedStyle(node, parts[part])));
    if (!marked.length) return;
    state.marks.set(node, dom.attribute(node, "data-bare"));
    dom.setAttribute(node, "data-bare", marked.join(" "));
  };
  const enter = (root, owner) => {
    const sheet = new (dom.get(Document, "defaultView").call(owner).CSSStyleSheet)();  // of a frame's own: others are refused
    sheet.replaceSync(rules);
    root.adoptedStyleSheets = [...root.adoptedStyleSheets, sheet];
    state.sheets.set(root, sheet);
    for (const node of (root === owner ? Document : DocumentFragment).prototype.querySelectorAll.call(root, "*")) {
      clear(node);
      const shadow = dom.get(Element, "shadowRoot").call(node), inner = dom.frameOf(node);
      if (shadow) enter(shadow, owner);
      if (inner) enter(dom.parentOf(inner), dom.parentOf(inner));
    }
  };
  enter(document, document);
}
