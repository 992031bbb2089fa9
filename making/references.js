// The page as its parser reads it, in a document that loads and runs nothing: complete HTML with a placeholder wherever
// something from a file comes in, and what is wanted there, as [kind, text or address, more].
async ({html, xml, token, scripts}) => {
  const NOSCRIPT = /(<!--[\s\S]*?-->|<(script|style|textarea|title)\b[\s\S]*?<\/\2\s*>)|<noscript\b[\s\S]*?<\/noscript\s*>/gi;
  if (scripts) html = html.replace(NOSCRIPT, (found, other) => other ?? "");  // this parser takes what is in it for shown
  const parsed = new DOMParser().parseFromString(html, xml ? "application/xhtml+xml" : "text/html");
  const fault = xml && parsed.querySelector("parsererror");
  if (fault) return {broken: `not well-formed XML: ${fault.textContent.trim()}`};
  const CANDIDATE = /[\s,]*(\S*[^\s,])(?:(,)|\s*((?:[^,(]|\([^)]*\))*)(?:,|$))?/g;  // of a srcset: address, descriptor
  const HTML = "http://www.w3.org/1999/xhtml", XLINK = "http://www.w3.org/1999/xlink";
  const document = xml ? new DOMParser().parseFromString("<!DOCTYPE html>", "text/html") : parsed;
  const create = (name) => document.createElement(name);
  if (xml) {  // element by element, in the words of HTML: no prefixes, no CDATA
    const plain = (node) => {
      if (node.nodeType === 3 || node.nodeType === 4) return document.createTextNode(node.data);
      if (node.nodeType !== 1 || node.localName === "template") return document.createTextNode("");  // no shadow root here
      const copy = document.createElementNS(node.namespaceURI, node.localName);
      for (const {name, localName, namespaceURI, value} of node.attributes)
        if (namespaceURI === XLINK) copy.setAttributeNS(XLINK, `xlink:${localName}`, value);
        else if (!/^xmlns\b/.test(name) && !(name === "lang" && node.hasAttribute("xml:lang")))
          copy.setAttribute(localName, value);
      copy.append(...[...node.childNodes].map(plain));
      return copy;
    };
    const {localName, namespaceURI} = parsed.documentElement;
    if (localName !== "html" || namespaceURI !== HTML)  // a browser shows its source, or a drawing
      return {broken: `its root is ${localName} in ${namespaceURI || "no namespace"}, not html in ${HTML}`};
    document.documentElement.replaceWith(plain(parsed.documentElement));
    if (!document.head) document.documentElement.prepend(create("head"));
    for (const {target, data} of [...parsed.childNodes].reverse()) if (target === "xml-stylesheet") {
      const link = create("link");
      link.setAttribute("rel", /\balternate\s*=\s*["']yes/.test(data) ? "alternate stylesheet" : "stylesheet");
      for (const [, name, value] of data.matchAll(/\b(href|type|title|media)\s*=\s*["']([^"']*)["']/g))
        link.setAttribute(name, value);
      document.head.prepend(link);
    }
  }
  const all = (selector) => [...document.querySelectorAll(selector)];
  const lower = (node, name) => (node.getAttribute(name) ?? "").trim().toLowerCase();
  if (document.body?.localName === "frameset") return {frames: true};
  const HOSTS = "article aside blockquote body div footer h1 h2 h3 h4 h5 h6 header main nav p section span".split(" ");
  const roots = all("template[shadowrootmode]").filter((node) => /^(open|closed)$/.test(lower(node, "shadowrootmode")));
  const shadow = roots.some(({parentElement: {localName}}) => localName.includes("-") || HOSTS.includes(localName));

  const wants = [], want = (...wanted) => `${token}${wants.push(wanted) - 1};`;
  const comments = document.createTreeWalker(document, NodeFilter.SHOW_COMMENT), gone = [];
  while (comments.nextNode()) gone.push(comments.currentNode);
  gone.forEach((node) => node.remove());
  if (!scripts) all("noscript").forEach((node) => node.replaceWith(...node.childNodes));  // what a visitor without sees
  const bases = all("base[href]").filter((node) => node.namespaceURI === HTML);
  const base = bases.find((node) => !/^[^!-\uffff]*(data|javascript):/i.test(node.getAttribute("href")));
  const early = (node) => Boolean(base && node.compareDocumentPosition(base) & Node.DOCUMENT_POSITION_FOLLOWING);
  let preferred = "";  // the first title in the document, unless that is in a meta's words
  const isSheet = (node) => node.localName === "style" || lower(node, "rel").split(/\s+/).includes("stylesheet");
  for (const node of all("link, style, meta[http-equiv]")) {
    if (lower(node, "http-equiv") === "default-style") preferred ||= node.getAttribute("content") ?? "";
    if (!isSheet(node)) continue;
    const title = node.getAttribute("title") ?? "", linked = node.localName === "link";
    const alternate = linked && lower(node, "rel").split(/\s+/).includes("alternate");
    const type = linked ? lower(node, "type") : (node.getAttribute("type") ?? "").toLowerCase();
    const css = (linked ? /^(text\/css(\s*;.*)?)?$/ : /^(text\/css)?$/).test(type);
    const disabled = linked && node.hasAttribute("disabled");
    if (css && title && !alternate && !disabled) preferred ||= title;
    const off = !css || (title ? title !== preferred : alternate) || disabled;
    if (off || (linked && !node.getAttribute("href"))) { node.remove(); continue; }
    if (linked) {
      const style = create("style");
      if (node.getAttribute("media")) style.setAttribute("media", node.getAttribute("media"));
      style.textContent = want(early(node) ? "early sheet" : "sheet", node.getAttribute("href"), node.getAttribute("charset") ?? "");
      node.replaceWith(style);
    } else {
      ["title", "type"].forEach((name) => node.removeAttribute(name));
      node.textContent = want(node.namespaceURI === HTML ? "style" : "vector style", node.textContent);
    }
  }
  all("base, meta[http-equiv]").forEach((node) => node.remove());  // a policy or a redirect would stand in our way
  for (const node of scripts ? all("script[src]") : []) {
    const late = node.hasAttribute("defer") && lower(node, "type") !== "module";  // an inline script would not wait
    node.textContent = want("script", node.getAttribute("src"), node.getAttribute("charset") ?? "");
    ["src", "defer", "async", "integrity", "crossorigin", "charset"].forEach((name) => node.removeAttribute(name));
    if (late) (document.body ?? document.documentElement).append(node);
  }
  const put = (node, name, kind) => {
    const value = node.getAttribute(name);
    if (value?.trim() && !/^\s*data:/i.test(value) && !value.startsWith(token)) node.setAttribute(name, want(kind ?? "picture", value.trim()));
  };
  // Which candidate of a srcset is shown decides the browser, for a copy in its own document. Only that one stays: of
  // several data: addresses Chromium takes the densest.
  const live = window.document, chosen = [];
  for (const node of all("img")) {
    const beside = node.parentElement?.localName === "picture" ? [...node.parentElement.children] : [];
    const sources = beside.filter((one) => one.localName === "source" && one.hasAttribute("srcset"));
    if (!sources.length && !node.hasAttribute("srcset")) continue;
    const picture = live.createElement("picture"), candidates = [];
    const candidate = (...facts) => `${live.baseURI}candidate/${candidates.push(facts) - 1}`;
    for (const one of [...sources, node]) {
      const copy = live.createElement(one.localName);
      for (const name of ["media", "type", "sizes"])
        if (one.hasAttribute(name)) copy.setAttribute(name, one.getAttribute(name));
      if (one === node && node.getAttribute("src"))
        copy.setAttribute("src", candidate(one, node.getAttribute("src"), ""));
      const found = (one.getAttribute("srcset") ?? "").matchAll(CANDIDATE);
      copy.setAttribute("srcset", [...found].map(([, address, , descriptor]) =>
        `${candidate(one, address, descriptor?.trim() ?? "")} ${descriptor ?? ""}`).join(", "));
      picture.append(copy);
    }
    live.body.append(picture);
    chosen.push([node, picture.lastChild, sources, candidates]);
  }
  if (chosen.length) await new Promise((done) => setTimeout(done, 0));  // it chooses when nothing else is to be done
  for (const [node, copy, sources, candidates] of chosen) {
    const [one, address, descriptor] = candidates[copy.currentSrc.match(/candidate\/(\d+)$/)?.[1]] ?? [];
    sources.forEach((source) => source.remove());
    node.removeAttribute("srcset");
    if (!one) continue;
    for (const name of ["sizes", "width", "height"])
      if (one.hasAttribute(name)) node.setAttribute(name, one.getAttribute(name));
    const shown = /^data:/i.test(address) ? address : want("picture", address);
    node.removeAttribute("src");
    node.setAttribute(descriptor ? "srcset" : "src", `${shown} ${descriptor}`.trim());
  }
  all("img, input[type=image i]").forEach((node) => { put(node, "src"); node.removeAttribute("loading"); });
  all("video").forEach((node) => put(node, "poster"));
  for (const node of all("svg image")) ["href", "xlink:href"].forEach((name) => put(node, name));
  const sized = (node, address) => {  // no plug-in draws them here: only their size is wanted
    if (!["width", "height"].some((side) => node.hasAttribute(side)))
      ["width", "height"].forEach((side) => node.setAttribute(side, want(side, address)));
  };
  all("embed[src]").forEach((node) => sized(node, node.getAttribute("src")));
  for (const node of all("object")) {  // what it holds is shown where it shows nothing itself
    const address = node.getAttribute("data")?.trim() ?? "";
    const plugin = /^application\/(?!(xhtml\+)?xml|pdf|json)/.test(lower(node, "type"));
    ["data", "type", "classid", "codebase"].forEach((name) => node.removeAttribute(name));
    if (!address || plugin) continue;
    sized(node, address);
    node.setAttribute("data", want("object", address));
  }
  for (const node of all("[style]")) {
    const css = node.getAttribute("style");
    if (/url\(|image-set\(/i.test(css)) node.setAttribute("style", want("declarations", css));
  }
  if (scripts) {  // a closed shadow root would hide what it shows from us
    const open = create("script");
    open.textContent = "{const own=Element.prototype.attachShadow;Element.prototype.attachShadow=function(options)"
      + "{return own.call(this,{...options,mode:'open'})}}";
    document.head.prepend(open);
  }
  for (const node of all("plaintext")) {  // whose end no markup can say
    const pre = create("pre");
    pre.append(...node.childNodes);
    for (const {name, value} of node.attributes) pre.setAttribute(name, value);
    node.replaceWith(pre);
  }
  const broken = ({firstChild}) => firstChild?.nodeType === 3 && firstChild.data.startsWith("\n");
  all("pre, textarea, listing").filter(broken).forEach((node) => node.prepend("\n"));  // a parser drops the first
  const type = document.doctype, quirks = document.compatMode !== "CSS1Compat";
  const ids = type && [type.publicId && ` PUBLIC "${type.publicId}"`, !type.publicId && type.systemId && " SYSTEM",
    type.systemId && ` "${type.systemId}"`].filter(Boolean).join("");
  const declared = type && !(quirks && !ids) ? `<!DOCTYPE ${type.name}${ids}>\n` : "";
  return {html: declared + document.documentElement.outerHTML, wants, shadow, frames: false,
    base: base?.getAttribute("href") ?? ""};
}
