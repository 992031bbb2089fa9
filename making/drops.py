"""Why a page was left out.

    raise PageDropped("blank", "every pixel has the same colour")

Whoever makes a page raises it; folder counts it and names the page in dropped.jsonl.
"""

from __future__ import annotations

REASONS = {  # of a dropped page, with what the summary calls them
    "unreadable": "unreadable",
    "encoding": "in no encoding that is sure",
    "empty": "empty",
    "frames": "a frameset",
    "shadow": "with shadow roots",
    "without text": "without text",
    "render": "did not render",
    "died": "ended the process that made it",
    "blank": "blank",
    "too long": "too long",
    "duplicate": "duplicate",
    "changing": "did not render twice alike",
}


class PageDropped(Exception):
    """`reason` is a key of REASONS, the message says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
