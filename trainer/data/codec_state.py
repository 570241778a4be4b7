"""What the window of a track leaves for the next one: the LSTM's state, and where in the track it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class State:
    """What a window leaves for the next one of the same track, on the device.

    lstm     hidden and cell state, each (layers, R, D), after the last frame seen, of the rows that a window takes
    outputs  (R, D, n), the LSTM's last n outputs: those that the last convolution needs to the left of the next frame,
             then those whose codes depend on outputs to come
    """

    lstm: tuple[Tensor, Tensor]
    outputs: Tensor

    def copied(self) -> State:
        """The same without the rest of the pass that it came out of, which it would hold in memory."""
        hidden, cell = self.lstm
        return State(lstm=(hidden.clone(), cell.clone()), outputs=self.outputs.clone())

    def of_rows(self, rows: slice) -> State:
        """The state of some rows alone, as a batch of them."""
        hidden, cell = (part[:, rows].contiguous() for part in self.lstm)
        return State(lstm=(hidden, cell), outputs=self.outputs[rows])


@dataclass(frozen=True)
class Place:
    """Where in its track a window stands, as far as shapes depend on it: windows of one place can share a pass.

    lead     frames of audio before the window that go through the convolutions with it
    kept     the n of `State.outputs`; 0 before the first window
    emitted  how many of these n frames, from the left, have had their codes returned
    """

    lead: int = 0
    kept: int = 0
    emitted: int = 0


def joined(states: Sequence[State], rows: int) -> State:
    """The states as one of so many rows; those without a track are zero."""

    def together(parts: Sequence[Tensor], dim: int) -> Tensor:
        shape = list(parts[0].shape)
        shape[dim] = rows - sum(part.shape[dim] for part in parts)
        return torch.cat([*parts, parts[0].new_zeros(shape)], dim=dim)

    hidden, cell = (together([state.lstm[part] for state in states], 1) for part in (0, 1))
    return State(lstm=(hidden, cell), outputs=together([state.outputs for state in states], 0))
