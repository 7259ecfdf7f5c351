"""Classes typed in a notebook, where there is no file to read: checked, registered, shown, copied."""

from __future__ import annotations

import subprocess
import sys

CELLS = '''
import sys
sys.modules["__main__"].__doc__ = "Automatically created module for IPython interactive environment"
import torch
from torch import nn
import attlas
from attlas import option
from attlas.cache.policy import CachePolicy


class Capped(attlas.Attention):
    """Attention with capped logits."""

    cap: float = option("largest logit", default=50.0, above=0)

    @property
    def score_mod(self):
        return lambda score, b, h, q, k: self.cap * (score / self.cap).tanh()


class ByValue(CachePolicy):
    """Keep the tokens of largest value."""

    def scores(self, state, slots):
        return slots.values.float().norm(dim=-1)


layer = Capped(32, 4, cap=20.0, causal=True)
layer(torch.randn(1, 5, 32))
try:
    Capped(32, 4, kap=20.0)
except ValueError as error:
    print(error)
for thing in (Capped, layer):
    assert {r.status for r in attlas.check(thing)} <= {"passed", "skipped"}
attlas.mechanism("by-value", paper="", example={"keep": 0.5})(ByValue)
attlas.mechanism("capped", paper="", reduces_to=attlas.Reduction("softmax", {"cap": 1e9}))(Capped)
failed = {r.check: r.reason for r in attlas.check("capped", raises=False) if r.status == "failed"}
assert set(failed) == {"described"}, failed
print(failed["described"])
assert {r.status for r in attlas.check("by-value")} <= {"passed", "skipped"}
from attlas.catalog.command import show
show("capped")
'''


def test_classes_typed_in_a_notebook_are_checked_and_shown() -> None:
    done = subprocess.run(
        [sys.executable, "-"], input=CELLS, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Capped takes no option 'kap'; did you mean 'cap'" in done.stdout
    assert "no 'Cost:': write it with operations and memory" in done.stdout
    assert "largest logit" in done.stdout
    assert "IPython" not in done.stdout
