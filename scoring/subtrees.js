// Each different `tag(child, child)` of the document: an element with its children's names, in their order.
(options, dom) => {
  const found = new Set();
  for (const node of dom.all("*")) {
    const inner = dom.childrenOf(node).map((child) => child.localName);
    if (inner.length) found.add(`${node.localName}(${inner.join(", ")})`);
  }
  return [...found];
}
