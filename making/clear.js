// Makes the words of `turn`, or all, transparent, and moves nothing. words.js was there before.
({turn}) => {
  const sheet = new CSSStyleSheet();
  sheet.replaceSync("*,*::before,*::after{transition:none!important}::highlight(clear){color:transparent;"
    + "-webkit-text-fill-color:transparent;-webkit-text-stroke-color:transparent;text-shadow:none}");
  document.adoptedStyleSheets = [sheet];
  const chosen = globalThis.words.list.filter((word) => !word.own && (turn === null || word.turn === turn));
  const ranges = chosen.map((word) => {
    const range = document.createRange();
    range.setStart(word.node, word.start);
    range.setEnd(word.node, word.end);
    return range;
  });
  CSS.highlights.set("clear", new Highlight(...ranges));
  return ranges.length;
}
