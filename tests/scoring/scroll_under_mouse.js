// Scrolls until the box lies under the resting mouse; cards that are laid out on the way move it once more.
([box, x, y]) => {
  const place = box.getBoundingClientRect();
  scrollBy(0, place.top + place.height / 2 - y);
  return document.elementFromPoint(x, y) === box;
}
