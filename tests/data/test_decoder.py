"""What all decoders' blocks go through."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.decoder import mono


@pytest.mark.parametrize("channels", [1, 2, 3, 6, 8])
def test_mono_is_numpys_mean_over_channels_to_the_bit(channels: int) -> None:
    random = np.random.default_rng(channels)
    # All magnitudes that float32 has, so that sums round and their halves are subnormal, too.
    block = random.standard_normal((20_000, channels)) * 10.0 ** random.uniform(-45, 37, (20_000, channels))
    block = block.astype(np.float32)
    assert np.array_equal(mono(block), block.mean(axis=1, dtype=np.float32))
    assert block.flags.c_contiguous and mono(block).dtype == np.float32
