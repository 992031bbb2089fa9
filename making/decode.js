// Bytes as a browser reads them: {encoding, text, agreed}. The encoding is `label`'s or, where there is none, the one
// that the browser found for this document, which holds the same bytes; null where it has no such encoding. `agreed`:
// whether `second`, an encoding's label, too, makes the same text of them.
({base64, label, second}) => {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const read = (name) => { try { return new TextDecoder(name).decode(bytes); } catch { return null; } };
  const encoding = label ?? document.characterSet, text = read(encoding);
  return text === null ? null : {encoding, text, agreed: Boolean(second) && read(second) === text};
}
