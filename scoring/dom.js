// The prototypes' own functions: a form's field called `body`, `style` or `parentNode` would stand in for the
// document's or the form's own property.
() => {
  const get = (type, name) => Object.getOwnPropertyDescriptor(type.prototype, name).get;
  const kinds = {"http://www.w3.org/2000/svg": SVGElement, "http://www.w3.org/1998/Math/MathML": MathMLElement};
  const kindOf = (node) => kinds[get(Element, "namespaceURI").call(node)] ?? HTMLElement;  // of a frame's, too
  const styleOf = (node) => get(kindOf(node), "style").call(node);
  return {
    get,
    all: (selector) => [...Document.prototype.querySelectorAll.call(document, selector)],
    body: () => get(Document, "body").call(document),
    root: () => get(Document, "documentElement").call(document),
    parentOf: (node) => get(Node, "parentNode").call(node),
    childrenOf: (node) => [...get(Element, "children").call(node)],
    attribute: (node, name) => Element.prototype.getAttribute.call(node, name),
    setAttribute: (node, name, value) => Element.prototype.setAttribute.call(node, name, value),
    removeAttribute: (node, name) => Element.prototype.removeAttribute.call(node, name),
    frameOf: (node) => {  // the root of a frame's document, where it is one that came with the page
      const inner = node.localName === "iframe" ? get(HTMLIFrameElement, "contentDocument").call(node) : null;
      return inner && get(Document, "documentElement").call(inner);
    },
    setStyle: (node, name, value) =>
      CSSStyleDeclaration.prototype.setProperty.call(styleOf(node), name, value, "important"),
  };
}
