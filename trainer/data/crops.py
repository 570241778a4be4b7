"""Where the crops of a long clip lie in an epoch: they overlap no more than the first of them, which is free, demands.

Crop 0 lies anywhere. The others go to its left and right, as many as fit there. Where what it leaves on both sides
together holds one crop fewer than wanted, one side holds one more than fits, evenly spread: the side that needs less
overlap for it. Where there is room to spare on a side, it is divided among that side's crops by chance.
"""

from __future__ import annotations


def start_beside(first: int, draw: int, crop: int, *, crops: int, segment: int, available: int) -> int:
    """The first frame of crop 1, 2, ... `crops` - 1 of a clip, given where its crop 0 starts.

    first      start of crop 0
    draw       in [0, 2^64), of this crop alone
    available  frames of the clip, which hold at least `crops` segments

    A function of its arguments, so that a crop can be placed without its neighbours.
    """
    first = min(first, available - segment)  # crop 0 may be of a view that is a frame longer
    left, right = first, available - segment - first
    on_left = left // segment
    if on_left + right // segment < crops - 1 and _missing(left, segment) <= _missing(right, segment):
        on_left += 1
    if crop <= on_left:
        return _start(crop - 1, on_left, length=left, draw=draw, segment=segment, overlaps_on=0)
    on_right = crops - 1 - on_left
    begin = first + segment
    return begin + _start(
        crop - 1 - on_left, on_right, length=right, draw=draw, segment=segment, overlaps_on=right - segment
    )


def _missing(length: int, segment: int) -> int:
    """By how many frames a stretch is too short for one crop more than fit into it."""
    return segment - length % segment


def _start(index: int, count: int, *, length: int, draw: int, segment: int, overlaps_on: int) -> int:
    """Start of one of `count` crops in a stretch of `length` frames.

    overlaps_on  the start of a crop that is longer than the stretch, and so overlaps crop 0
    """
    if length < segment:
        return overlaps_on
    spare = length - count * segment
    if spare < 0:
        return index * (length - segment) // (count - 1)
    # The index-th share of what is to spare, so that the crops keep their order whatever each of them draws.
    least, most = index * spare // count, (index + 1) * spare // count
    return index * segment + least + (draw * (most - least + 1) >> 64)
