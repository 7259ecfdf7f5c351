"""Small models run fastest on one thread, above all when other tests run beside them."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(request):
    before = torch.get_num_threads()
    if "smollm2" not in request.fixturenames:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
