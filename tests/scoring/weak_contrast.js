// Every text of the document whose contrast against what lies behind it is under 4.5 to 1 (WCAG 2, level AA).
() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (color) => rgba(color).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, place) => sum + v * [0.2126, 0.7152, 0.0722][place], 0);
  const behind = (node) => {
    while (node && rgba(getComputedStyle(node).backgroundColor)[3] < 255) node = node.parentElement;
    return node ? getComputedStyle(node).backgroundColor : "white";
  };
  const weak = [];
  for (const node of document.querySelectorAll("body *")) {
    const text = [...node.childNodes].map((part) => part.nodeType === 3 ? part.data : "").join("").trim();
    if (!text || node.matches("script, noscript, title, option") || !node.checkVisibility()) continue;
    const style = getComputedStyle(node), drawn = node.matches("svg text") ? style.fill : style.color;
    const [low, high] = [light(drawn), light(behind(node))].sort((a, b) => a - b);
    if ((high + 0.05) / (low + 0.05) < 4.5) weak.push(text.slice(0, 40) + " " + drawn);
  }
  return weak;
}
