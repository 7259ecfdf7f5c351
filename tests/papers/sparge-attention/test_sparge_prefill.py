"""sparge-prefill: the part reads the blocks of the op's map."""

import pytest
import torch

from attlas import masks
from attlas.attach.thinned import Text
from attlas.ops.sparge_attention import sparge_attention
from attlas.parts.select.sparge import SpargePrefill


@pytest.mark.parametrize(("queries", "keys"), [(37, 37), (9, 40)])
@pytest.mark.parametrize("options", [{"mass": 0.5, "similar": -1.0}, {"mass": 1.0}, {"sink": True}])
def test_sparge_attention_of_a_prompt_is_the_op(options, queries, keys):
    q, k, v = (torch.randn(2, n, t, 8) for n, t in ((4, queries), (2, keys), (2, keys)))
    sizes = {"q_block": 4, "k_block": 2}
    part = SpargePrefill(**sizes, **options)
    found = part.attended(Text(0, q, k, v, scale=8**-0.5))
    wanted, _ = sparge_attention(q, k, v, mask=masks.causal, **sizes, **options)
    torch.testing.assert_close(found, wanted)
    if options.get("similar") == -1.0:
        assert part.density[0].max() < 1
