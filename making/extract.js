// The page as text, its style sheets taken out of it, in order: a mark stands in each one's place.
() => {
  const sheets = [], root = document.querySelector("html").cloneNode(true);
  for (const style of root.querySelectorAll("style")) {
    const type = style.getAttribute("type");
    if (!style.textContent.trim() || (type && !/^text\/css$/i.test(type.trim()))) { style.remove(); continue; }
    sheets.push([style.textContent, style.getAttribute("media") ?? ""]);
    style.getAttributeNames().forEach((name) => style.removeAttribute(name));
    style.textContent = `/*sheet ${sheets.length - 1}*/`;
  }
  for (const node of root.querySelectorAll("pre, textarea, listing"))  // a parser drops the first line break
    if (node.firstChild?.data?.startsWith("\n")) node.prepend("\n");
  const type = document.doctype;
  const ids = type && [type.publicId && ` PUBLIC "${type.publicId}"`, !type.publicId && type.systemId && " SYSTEM",
    type.systemId && ` "${type.systemId}"`].filter(Boolean).join("");
  return {html: root.outerHTML, sheets, doctype: type ? `<!DOCTYPE ${type.name}${ids}>` : "",
    shadow: [...document.querySelectorAll("*")].some((node) => node.shadowRoot),
    quirks: document.compatMode !== "CSS1Compat", text: (document.querySelector("body")?.innerText ?? "").trim()};
}
