"""What stands in for modules that need not run."""

from __future__ import annotations

import gc
import weakref

import torch

from scalefl.models.stand_ins import StandIns, template_of


def test_what_a_run_starts_from_is_free_as_soon_as_the_run_is_over():
    """Not only once the garbage is collected: a streamed prefix starts in the middle again and again."""
    template = template_of((torch.zeros(4, 3), [torch.zeros(4)]), 4)
    given = torch.ones(4, 3)
    alive = weakref.ref(given)
    gc.disable()
    try:
        output = StandIns(4, given.device)(template, 0, given)
        assert output[0] is given and output[1][0].shape == (4,)
        del given, output
        assert alive() is None
    finally:
        gc.enable()
