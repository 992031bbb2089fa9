// What a page shows: its words, the looks of its first paragraph, and the sizes of its grey boxes.
() => {
  const all = (selector) => [...document.querySelectorAll(selector)], first = document.querySelector("p");
  const {color, fontSize} = getComputedStyle(first ?? document.body), size = (node) => {
    const {width, height} = node.getBoundingClientRect();
    return `${Math.round(width)}x${Math.round(height)}`;
  };
  return {text: document.body.innerText.trim().split(/\s+/).join(" "), looks: `${color} ${fontSize}`,
    boxes: all("img, svg").map(size).join(" "), pre: document.querySelector("pre")?.textContent,
    background: getComputedStyle(document.querySelector("h1") ?? document.body).backgroundSize};
}
