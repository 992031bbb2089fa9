"""Pages packed into one row.

    batch = pack(rows, sizes, before=len(encoder.before), ignored=IGNORED)

A row has no padding; `page_bounds` and positions of its own keep each page to itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.positions import page_positions


def pack(
    rows: Sequence[tuple[list[int], list[int]]], sizes: Sequence[tuple[int, int]], before: int, ignored: int
) -> dict[str, torch.Tensor | int]:
    """Pages as one row. `rows` (ids, labels) of each page, `sizes` (rows, columns) of each picture in tokens, which
    begins after `before` tokens. Returns `input_ids` (1, T), `position_ids` (4, 1, T), `image_places`,
    `supervised_places` and `targets` (all 1-D), `page_bounds` (pages + 1), `longest_page`."""
    lengths = [len(ids) for ids, _ in rows]
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    labels = torch.tensor([label for _, row in rows for label in row])
    pictures = [torch.arange(height * width) + start + before for start, (height, width) in zip(starts, sizes)]
    positions = [page_positions(before, *size, length) for size, length in zip(sizes, lengths)]
    # The state at a place predicts the next token. No page begins with a supervised one, so none looks across.
    supervised = (labels != ignored).nonzero().flatten()
    return {
        "input_ids": torch.tensor([[token for ids, _ in rows for token in ids]]),
        "position_ids": torch.cat(positions, dim=1)[:, None],
        "image_places": torch.cat(pictures),
        "supervised_places": supervised - 1,
        "targets": labels[supervised],
        "page_bounds": torch.tensor(starts, dtype=torch.int32),
        "longest_page": max(lengths),
    }
