// The prototypes' own functions: a form's field called `body`, `style` or `parentNode` would stand in for the
// document's or the form's own property.
() => {
  const get = (type, name) => Object.getOwnPropertyDescriptor(type.prototype, name).get;
  const kindOf = (node) =>
    node instanceof SVGElement ? SVGElement : node instanceof HTMLElement ? HTMLElement : MathMLElement;
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
    setStyle: (node, name, value) =>
      CSSStyleDeclaration.prototype.setProperty.call(styleOf(node), name, value, "important"),
  };
}
