"""Texts that a page's CSS generates, ::before, ::after and list markers, as the browser has laid them out.

    generated_texts(snapshot, origin)[0]                     # ("3.", [(28.0, 86.0, 20.0, 19.0)], True)

No script can ask where such a text stands or what a counter, a quotation mark or a list's number has come to; the
layout that Chromium hands out (CDP's DOMSnapshot.captureSnapshot, SNAPSHOT of scoring/renders.py) has both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Box = tuple[float, float, float, float]  # x, y, width, height in pixels of the page's picture
PSEUDO = ("::before", "::after", "::marker")
READABLE = re.compile(r"[^\W_]")  # a marker without it is a bullet or a triangle: drawn by the list, not written


def generated_texts(snapshot: Mapping[str, Any], origin: Sequence[float]) -> list[tuple[str, list[Box], bool]]:
    """(text, its boxes, True) of each text that CSS generates, in the document's order, frames' after the page's own.
    `origin` is where the picture begins in the page's coordinates: left of 0 where a page overflows to the left."""
    strings, documents = snapshot["strings"], snapshot["documents"]
    offsets: dict[int, tuple[float, float]] = {0: (-origin[0], -origin[1])}
    found = []
    for number, document in enumerate(documents):
        if number not in offsets:  # of a frame that is not laid out
            continue
        nodes, layout = document["nodes"], document["layout"]
        names = [strings[name] for name in nodes["nodeName"]]
        lines: dict[int, list[Sequence[float]]] = {}
        for place, box in zip(document["textBoxes"]["layoutIndex"], document["textBoxes"]["bounds"]):
            lines.setdefault(place, []).append(box)
        left, top = offsets[number]
        texts: dict[int, tuple[list[str], list[Box]]] = {}  # by node: one content may be laid out in several parts
        inner = dict(zip(nodes["contentDocumentIndex"]["index"], nodes["contentDocumentIndex"]["value"]))
        for place, node in enumerate(layout["nodeIndex"]):
            if node in inner:
                x, y = layout["bounds"][place][:2]
                edges = [float(strings[style].removesuffix("px")) for style in layout["styles"][place]]
                scrolled = documents[inner[node]]
                x += edges[0] + edges[2] - scrolled["scrollOffsetX"]
                y += edges[1] + edges[3] - scrolled["scrollOffsetY"]
                offsets[inner[node]] = left + x, top + y
            elif names[node] in PSEUDO and layout["text"][place] >= 0:
                words, boxes = texts.setdefault(node, ([], []))
                words.append(strings[layout["text"][place]])
                boxes += [(left + x, top + y, width, height) for x, y, width, height in lines.get(place, ())]
        for node, (words, boxes) in sorted(texts.items()):
            text = " ".join("".join(words).split())
            if text and boxes and (names[node] != "::marker" or READABLE.search(text)):
                found.append((text, boxes, True))
    return found
