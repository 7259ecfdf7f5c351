"""An `Atlas`: all that one page shows, as a file, in a notebook, and read back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from attlas.errors import UserError
from attlas.view.look.contents import Contents
from attlas.view.look.page import page
from attlas.view.look.unpack import contents_of


@dataclass(frozen=True)
class Atlas(Contents):
    """What was found in a model, see `Contents`; a notebook shows it as the page does."""

    def page(self, start: str = "") -> str:
        """The page, one file that opens without a network; `start` as in its links ("head=3.4")."""
        return page(self, start)

    def write(self, path: str | Path) -> Path:
        """Write the page.

        Raises:
            ValueError: the folder cannot be written to.
        """
        path = Path(path)
        try:
            path.write_text(self.page(), encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}; choose another folder with --out"
            ) from error
        return path

    def head(self, layer: int, head: int) -> Atlas:
        """What is known of one head alone.

        Raises:
            ValueError: a head that nothing is known of.
        """
        layers, heads = self.shape
        if not (0 <= layer < layers and 0 <= head < heads):
            raise UserError(f"head({layer}, {head}) takes a layer below {layers} and a head below {heads}")
        at = layer, head
        return replace(
            self,
            patterns={at: self.patterns[at]} if at in self.patterns else {},
            neurons={at: self.neurons[at]} if at in self.neurons else {},
            joint={at: self.joint[at]} if at in self.joint else {},
            flow=None, circuit=None, tables=(), says=(),
        )  # fmt: skip

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that its styles and names stay there."""
        shown = [*self.patterns, *self.neurons, *self.joint]
        start = "head={}.{}".format(*shown[0]) if shown else ""
        return (
            f'<iframe title="{escape(self.model)}, looked into" sandbox="allow-scripts" '
            'style="width:100%;height:46rem;border:0;border-radius:10px" '
            f'srcdoc="{escape(self.page(start))}"></iframe>'
        )


def read_back(html: str) -> Atlas:
    """What a page shows, from its own data.

    Raises:
        ValueError: the text is no such page.
    """
    return Atlas(**contents_of(html))
