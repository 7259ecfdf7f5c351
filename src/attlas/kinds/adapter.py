"""Adapter: what converts or fine-tunes a pretrained model, and can be taken out again.

    adapter = attlas.make("gate-norm", layers=3)
    with adapter.inject(model):                       # leaving the block restores the model to the bit
        model.generate(**inputs)

    undo = adapter.inject(model)                      # or by hand
    adapter.save("difference.safetensors")            # the difference alone, not the model
    undo()
    adapter = Adapter.load("difference.safetensors", model)     # into the same model, later
    adapter.merge().save_pretrained("folder")         # a plain Transformers model again

A paper's file overrides `check` and `change`; if it trains something `trainable`, if it trains by
another loss `loss`, if it can be told in the model's own weights `folded`, and `difference` where that
is more than what was trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attlas.catalog import registry
from attlas.catalog.kinds import ADAPTER, Kind
from attlas.errors import UserError
from attlas.kinds import difference
from attlas.kinds.injection import Injection, refuse
from attlas.options import Configured


class Adapter(Configured):
    """Base of all adapters; an object serves one model at a time.

    Options are numbers, texts and lists that JSON holds, so that a saved difference tells with which
    it was made.

    Attributes:
        nothing: options with which it changes no logit when it is injected; none for an adapter that
            always starts there, as one whose second low-rank factor is zero.
        injection: what it did to the model that it is in; None outside a model.
        saved: the tensors of the file that it was loaded from, for `change` to read what was chosen.
    """

    kind: ClassVar[Kind] = ADAPTER
    nothing: ClassVar[Mapping[str, Any]] = {}

    def setup(self) -> None:
        """It is in no model yet."""
        self.injection: Injection | None = None
        self.saved: Mapping[str, Tensor] | None = None

    # What a paper overrides ------------------------------------------------------------------------

    def check(self, model: Any) -> None:
        """Refuse a model that it cannot work on, before anything is changed.

        Raises:
            ValueError: naming what it cannot work on and what it takes.
        """

    def change(self, injection: Injection) -> None:
        """Change `injection.model`, through `injection` alone, so that all of it can be undone."""
        raise NotImplementedError

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters to train, by a name that is the same in every run; all others are frozen.

        They may be parameters of the model itself: undoing then gives them their old values back.
        """
        return {}

    def loss(
        self, model: Any, ids: Int[Tensor, "batch tokens"], progress: float
    ) -> Float[Tensor, ""]:
        """What training lowers; the model's own loss on its next token unless overridden.

        Args:
            model: the injected model.
            ids: texts, without padding.
            progress: share of the training that is done, from 0 to below 1; for what is annealed.
        """
        found: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return found

    def difference(self) -> dict[str, Tensor]:
        """All that tells the changed model from the one before, beside the options."""
        return {name: parameter.detach() for name, parameter in self.trainable().items()}

    def folded(self) -> dict[str, Tensor]:
        """New values of the model's own parameters, by name, with which it computes the same alone.

        Raises:
            ValueError: the change cannot be told in the weights of the model's own class.
        """
        raise UserError(
            f"{self.name} cannot be merged: its change is none that weights of the model alone could "
            "hold; save() keeps the difference and Adapter.load() puts it back"
        )

    # What all have ---------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Under which it is registered; its class's otherwise."""
        entry = registry.entry_of(type(self))
        return type(self).__name__ if entry is None else entry.name

    def inject(self, model: Any) -> Injection:
        """Put it into a model; what comes back undoes that, called or left as a `with` block.

        Raises:
            TypeError: no Transformers model.
            ValueError: a model that it cannot work on, one that is in use, an adapter that is in a
                model already, or two that do not go together; the model is then unchanged.
        """
        refuse(self, model)
        self.check(model)
        injection = Injection(self, model)
        try:
            self.change(injection)
            self.injection = injection
            injection.settle()
            if self.saved is not None:
                self._restore(self.saved)
        except BaseException:
            injection.undo()
            raise
        return injection

    def merge(self) -> Any:
        """Put the change into the model's own weights, for good; the plain model comes back.

        Raises:
            ValueError: it cannot be told in them, is in no model, or another adapter came after it.
        """
        injection = self._injected("merge()")
        folded = {name: tensor.detach().clone() for name, tensor in self.folded().items()}
        injection.undo()
        injection.merged = True
        with torch.no_grad():
            for name, tensor in folded.items():
                injection.model.get_parameter(name).copy_(tensor)
        return injection.model

    def save(self, path: str | Path) -> Path:
        """Write the difference to a safetensors file, at once or not at all.

        Raises:
            ValueError: it is in no model, or the file cannot be written.
        """
        return difference.save(self, self._injected("save()").base, path)

    @staticmethod
    def load(path: str | Path, model: Any) -> Adapter:
        """Make what `save` wrote and inject it into the model that it was made for.

        Raises:
            ValueError: no such file, a damaged one, another model, or as `inject`.
        """
        made: Adapter
        made, made.saved = difference.load(path, model)
        made.inject(model)
        return made

    def _injected(self, what: str) -> Injection:
        if self.injection is None:
            raise UserError(f"{what} of {self.name} needs a model; inject(model) comes first")
        return self.injection

    def _restore(self, saved: Mapping[str, Tensor]) -> None:
        """Take over what was saved.

        Raises:
            ValueError: of other names or shapes than this model's difference has.
        """
        wanted = {name: tuple(tensor.shape) for name, tensor in self.difference().items()}
        found = {name: tuple(tensor.shape) for name, tensor in saved.items()}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise UserError(
                    f"the saved difference does not fit {self.name} on this model: {name} is "
                    f"{found.get(name)} there, {wanted.get(name)} here"
                )
        with torch.no_grad():
            for name, parameter in self.trainable().items():
                parameter.copy_(saved[name])
