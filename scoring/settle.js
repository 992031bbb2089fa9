// Waits until the page looks as it will stay: pictures, fonts, animations. With `pictures`, those that cannot load
// become a grey placeholder, since a broken picture ignores its size and moves the layout.
async ({pictures}, dom) => {
  const grey = "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'%3E%3Crect width='100%25' height='100%25'"
    + " fill='%23ccc'/%3E%3C/svg%3E";
  const wait = (promise, ms) => Promise.race([promise, new Promise((done) => setTimeout(done, ms))]);
  const isData = (node, name) => /^\s*data:/i.test(dom.attribute(node, name) ?? "");
  const sourceless = (node) => node.localName === "img" && !dom.get(HTMLImageElement, "currentSrc").call(node)
    && dom.attribute(node, "src") === null && dom.attribute(node, "srcset") === null;  // it draws nothing, not even a frame
  for (const node of dom.all("marquee")) dom.setAttribute(node, "scrollamount", "0");
  for (const node of dom.all("marquee:not(marquee marquee)")) {  // one that moves already goes on; a copy stands still
    Element.prototype.replaceWith.call(node, Node.prototype.cloneNode.call(node, true));
  }
  if (pictures) {
    for (const node of dom.all("img, input[type=image i]")) {
      dom.removeAttribute(node, "loading");
      const chosen = node.localName === "img" ? dom.get(HTMLImageElement, "currentSrc").call(node) : "";
      if (/^data:/i.test(chosen) || sourceless(node)) continue;
      const beside = dom.parentOf(node)?.localName === "picture" ? dom.childrenOf(dom.parentOf(node)) : [];
      [node, ...beside].forEach((one) => dom.removeAttribute(one, "srcset"));
      if (!isData(node, "src")) dom.setAttribute(node, "src", grey);
    }
    for (const node of dom.all("svg image")) {
      for (const name of ["href", "xlink:href"]) {
        if (dom.attribute(node, name) !== null && !isData(node, name)) dom.setAttribute(node, name, grey);
      }
    }
  }
  const images = dom.all("img").filter((node) => !sourceless(node));
  const decoded = (otherwise) => Promise.all(
    images.map((node) => HTMLImageElement.prototype.decode.call(node).catch(() => otherwise(node))));
  await wait(decoded((node) => { if (pictures) dom.setAttribute(node, "src", grey); }), 2000);
  if (pictures) await wait(decoded(() => 0), 1000);
  await wait(document.fonts.ready, 1000);
  // A screenshot past the window narrows the window for a moment, and other media queries hold: what changes then must
  // not slide back in the picture. In a layer, whose !important wins over the page's, but for those of a layer of its
  // own or of a style attribute. After the rest, since scripts may wait for a transition's end.
  globalThis.stillSheets = new Set();  // ours, for who writes down the page's own
  const still = (root, owner) => {
    // In each root by itself: a document's own list leaves out what shadows and frames hold.
    for (const moving of (root === owner ? Document : ShadowRoot).prototype.getAnimations.call(root)) {
      // One by scrolling is cut off from it for a moment when the window grows to the page; an endless one has no end.
      if (dom.get(Animation, "timeline").call(moving) instanceof ScrollTimeline) moving.cancel();
      else try { moving.finish(); } catch { moving.cancel(); }
    }
    const sheet = new (dom.get(Document, "defaultView").call(owner).CSSStyleSheet)();  // a frame refuses another's
    sheet.replaceSync(`@layer still { *, ::before, ::after, ::marker, ::placeholder, ::file-selector-button {
      transition: none !important } }`);
    root.adoptedStyleSheets = [...root.adoptedStyleSheets, sheet];
    globalThis.stillSheets.add(sheet);
    for (const node of (root === owner ? Document : DocumentFragment).prototype.querySelectorAll.call(root, "*")) {
      const shadow = dom.get(Element, "shadowRoot").call(node), inner = dom.frameOf(node);
      if (shadow) still(shadow, owner);
      if (inner) still(dom.parentOf(inner), dom.parentOf(inner));
    }
  };
  still(document, document);
  for (const node of dom.all("svg")) {
    SVGSVGElement.prototype.pauseAnimations.call(node);
    SVGSVGElement.prototype.setCurrentTime.call(node, 3600);  // s: past the end of those that have one
  }
}
