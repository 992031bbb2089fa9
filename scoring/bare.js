// Hides every text and leaves all else where and as it is, or shows the texts again: where two pictures then differ, a
// text is seen. Not by `color`, which borders and drawings use, too.
({hide}, dom) => {
  const state = globalThis.bare ??= {styles: new Map(), sheets: new Map()};
  if (!hide) {
    for (const [node, style] of state.styles) {
      if (style === null) dom.removeAttribute(node, "style"); else dom.setAttribute(node, "style", style);
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
    text, tspan, textPath { fill: transparent !important; stroke: transparent !important; transition: none !important }
  }`;
  const enter = (root, owner) => {
    const sheet = new (dom.get(Document, "defaultView").call(owner).CSSStyleSheet)();  // of a frame's own: others are refused
    sheet.replaceSync(rules);
    root.adoptedStyleSheets = [...root.adoptedStyleSheets, sheet];
    state.sheets.set(root, sheet);
    for (const node of (root === owner ? Document : DocumentFragment).prototype.querySelectorAll.call(root, "*")) {
      if (getComputedStyle(node).webkitBackgroundClip === "text") {  // a gradient in the shape of letters
        state.styles.set(node, dom.attribute(node, "style"));
        dom.setStyle(node, "background", "none");
      }
      const shadow = dom.get(Element, "shadowRoot").call(node), inner = dom.frameOf(node);
      if (shadow) enter(shadow, owner);
      if (inner) enter(dom.parentOf(inner), dom.parentOf(inner));
    }
  };
  enter(document, document);
}
