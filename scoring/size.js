// The whole page's width and height in CSS pixels, what overflows included.
(options, dom) => {
  const root = dom.root(), body = dom.body();
  const of = (node, type, name) => node ? dom.get(type, name).call(node) : 0;
  const most = (side) => Math.max(
    of(root, Element, `scroll${side}`), of(body, Element, `scroll${side}`),
    of(root, HTMLElement, `offset${side}`), of(body, HTMLElement, `offset${side}`), of(root, Element, `client${side}`));
  return [most("Width"), most("Height")];
}
