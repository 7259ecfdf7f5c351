"""The compressed cache layer carries its index through all that a cache may be asked."""

import pytest
import torch

from attlas.errors import UserError
from attlas.storage.layer import LayerState, StoredLayer


@pytest.fixture
def layer():
    layer = StoredLayer({"Part": LayerState(0, (0,), tensors={"mean": torch.arange(3.0)})})
    keys = torch.arange(3 * 2 * 10).float().view(3, 2, 10, 1).expand(-1, -1, -1, 4)
    layer.update(keys, keys + 0.5)
    slots = torch.tensor([[[0, 4, 7], [1, 2, 9]]]).expand(3, -1, -1)
    filled = torch.ones_like(slots, dtype=torch.bool)
    filled[1, :, 2] = False
    layer.keep(slots, filled)
    layer.fixed = layer.seen
    layer.update(keys[:, :, :2], keys[:, :, :2])
    return layer


def test_columns_and_lengths(layer):
    assert layer.original_positions()[0].tolist() == [[0, 4, 7, 10, 11], [1, 2, 9, 10, 11]]
    assert layer.original_positions()[1, 0].tolist() == [0, 4, -1, 10, 11]
    assert layer.ragged
    assert layer.get_seq_length() == 12
    assert layer.get_mask_sizes(3) == (15, 0)
    assert layer.keys[0, 0, :3, 0].tolist() == [0, 4, 7]
    assert layer.keys.untyped_storage().nbytes() == layer.keys.numel() * 4


def test_rows(layer):
    before = layer.original_positions()
    layer.reorder_cache(torch.tensor([1, 0, 2]))
    assert torch.equal(layer.original_positions(), before[[1, 0, 2]])
    assert layer.learned["Part"].tensors["mean"].tolist() == [1, 0, 2]
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.original_positions(), before[[1, 1, 0, 0, 2, 2]])
    layer.batch_select_indices(torch.tensor([4, 0]))
    assert torch.equal(layer.original_positions(), before[[2, 1]])
    assert layer.learned["Part"].tensors["mean"].tolist() == [2, 1]
    assert layer.keys.shape[0] == 2


def test_crop(layer):
    layer.crop(-1)
    assert layer.get_seq_length() == 11
    assert layer.original_positions()[0, 0].tolist() == [0, 4, 7, 10]
    with pytest.raises(UserError, match="compressed context"):
        layer.crop(-2)
    layer.crop(0)


def test_reset(layer):
    layer.compressed = True
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer.original_positions() is None
    assert not layer.compressed
    assert not layer.learned["Part"].tensors
    layer.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    assert layer.get_seq_length() == 3
