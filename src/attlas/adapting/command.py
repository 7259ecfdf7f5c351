"""`attlas adapt`: an adapter injected into a model, trained if it trains something, and saved."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from attlas.attach.session import cache_bytes
from attlas.catalog import registry
from attlas.catalog.kinds import ADAPTER
from attlas.errors import UserError
from attlas.hf.caches import cache_of
from attlas.journal import unwritable
from attlas.kinds.adapter import Adapter
from attlas.kinds.injection import refuse
from attlas.train.checkpoint import written_whole

DIFFERENCE, MERGED, SETTINGS, RESULT = (
    "adapter.safetensors",
    "merged",
    "settings.json",
    "result.json",
)
STEPS = 100
#: Tokens over which a cache is weighed.
WEIGHED = 64


def adapt(
    model: Annotated[str, typer.Argument(help="Name, folder or Hugging Face id.")],
    adapter: Annotated[str, typer.Option("--with", help="gate-norm(layers=3), ...")],
    out: Annotated[Path, typer.Option(help="Folder for the difference and what was measured.")],
    text: Annotated[
        Path | None, typer.Option(help="A text to train on; Shakespeare unless given.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help=f"Of training; {STEPS} unless given.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pieces of text of a step.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a piece.")] = 256,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    tested: Annotated[int, typer.Option(min=1, help="Held-out tokens to judge by.")] = 4096,
    merge: Annotated[
        bool, typer.Option("--merge", help="Also write a merged Transformers model.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Decides what is read in which order.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
) -> None:
    """Convert or fine-tune a pretrained model with an adapter; write the difference.

    Perplexity is that of held-out Shakespeare, before and after. Interrupted, the same command goes
    on from the last step.
    """
    from attlas.adapting.loop import Job
    from attlas.models.load import load, load_tokenizer

    made = _made(adapter)
    if not 0 < rate < float("inf"):
        raise UserError(f"rate must be a positive number, got {rate}")
    said = _read(text)
    place = _device(device)
    loaded, tokenizer = load(model).to(place), load_tokenizer(model)
    if not loaded.can_generate():
        raise UserError(f"model: adapt takes causal language models, {model!r} is none")
    refuse(made, loaded)  # before anything is measured
    made.check(loaded)
    job = Job(steps or STEPS, batch, rate, seed)
    settings = {
        "model": model, "adapter": made.name, "options": made.options, "steps": job.steps,
        "text": said and hashlib.sha256(said.encode()).hexdigest()[:16], "batch": batch,
        "length": length, "rate": rate, "tested": tested, "seed": seed,
    }  # fmt: skip
    console = Console()
    try:
        run = _Run(made, loaded, tokenizer, out, settings, console)
        injection = made.inject(loaded)
        if not made.trainable() and (text is not None or steps is not None):
            injection.undo()
            which = "text" if text is not None else "steps"
            raise UserError(f"{made.name} trains nothing, so --{which} has no use; leave it out")
        run.go(job, said, merge)
    except KeyboardInterrupt:
        console.print(
            f"\nstopped: what was done is kept in {out}; the same command goes on", soft_wrap=True
        )
        raise typer.Exit(130) from None
    except OSError as error:
        raise unwritable(out, error, "step") from error


class _Run:
    """A model, its adapter and the folder where their results go."""

    def __init__(
        self,
        adapter: Adapter,
        model: Any,
        tokenizer: Any,
        out: Path,
        settings: Any,
        console: Console,
    ) -> None:
        from attlas.adapting.texts import held_out

        self.adapter, self.model, self.tokenizer = adapter, model, tokenizer
        self.out, self.settings, self.console = out, settings, console
        self.pieces = held_out(tokenizer, settings["tested"], settings["length"])
        out.mkdir(parents=True, exist_ok=True)
        self.before = self._known() or self._measured("before")
        told = {"settings": settings, "before": self.before}
        written_whole(out / SETTINGS, json.dumps(told, indent=1).encode())

    def go(self, job: Any, said: str | None, merge: bool) -> None:
        """Train, measure, write and tell."""
        losses = self._trained(job, said) if self.adapter.trainable() else []
        after = self._measured("after")
        path = self.adapter.save(self.out / DIFFERENCE)
        result = {
            "settings": self.settings, "before": self.before, "after": after, "losses": losses,
            "trained": sum(p.numel() for p in self.adapter.trainable().values()),
            "difference_bytes": path.stat().st_size,
        }  # fmt: skip
        written_whole(self.out / RESULT, json.dumps(result, indent=1).encode())
        self.console.print(_table(self.before, after))
        self.console.print(
            f"difference: {path} ({path.stat().st_size} bytes)", highlight=False, soft_wrap=True
        )
        if merge:
            self.adapter.merge().save_pretrained(self.out / MERGED)
            self.tokenizer.save_pretrained(self.out / MERGED)
            self.console.print(f"merged: {self.out / MERGED}", highlight=False, soft_wrap=True)

    def _known(self) -> Any:
        """What was measured before, if the folder is of the same run.

        Raises:
            UserError: it is of another run.
        """
        try:
            told = json.loads((self.out / SETTINGS).read_text("utf-8"))
            known = told["settings"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.out / SETTINGS} cannot be read; take another --out") from error
        for name, value in self.settings.items():
            if known.get(name) != value:
                raise UserError(
                    f"{self.out} holds a run with {name}={known.get(name)!r}, not {value!r}; take "
                    "another folder with --out"
                )
        return told["before"]

    def _measured(self, when: str) -> dict[str, Any]:
        from attlas.adapting.texts import judged

        with self.console.status(f"perplexity {when}"):
            found = judged(self.model, self.pieces)
        ids = self.pieces[0][:, :WEIGHED].to(self.model.device)
        with torch.no_grad():
            cache = cache_of(self.model(input_ids=ids, use_cache=True))
        return {
            "perplexity": found.value,
            "interval": [found.low, found.high],
            "weight_bytes": sum(p.nbytes for p in self.model.parameters()),
            "cache_bytes_per_token": cache_bytes(cache) / ids.shape[1],
        }

    def _trained(self, job: Any, said: str | None) -> list[float]:
        from attlas.adapting.loop import train
        from attlas.adapting.texts import Texts

        texts = Texts(self.tokenizer, said, self.settings["length"])
        columns = (
            TextColumn("{task.description}"), BarColumn(),
            TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self.console) as progress:
            bar = progress.add_task(f"training {self.adapter.name}", total=job.steps, loss="")

            def tick(done: int, loss: float) -> None:
                progress.update(bar, completed=done, loss=f"loss {loss:.3f}")

            return train(self.adapter, self.model, texts, job, self.out / "checkpoint", tick)


def _made(written: str) -> Adapter:
    from attlas.compare.methods import parse_call

    name, options = parse_call("with", written)
    entry = registry.find(name, ADAPTER)
    try:
        made: Adapter = registry.make(entry.name, **options)
    except (ValueError, TypeError) as error:
        raise UserError(f"--with {written}: {error}") from error
    return made


def _read(text: Path | None) -> str | None:
    if text is None:
        return None
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text {text} cannot be read: {error}") from error


def _device(name: str) -> torch.device:
    """The device called `name`; a GPU for auto, where there is one.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not here; use cpu, cuda, cuda:N or auto") from error


def _table(before: dict[str, Any], after: dict[str, Any]) -> Table:
    table = Table(box=None, header_style="bold")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, title, scale in (
        ("perplexity", "perplexity ↓", 1),
        ("weight_bytes", "weights MB ↓", 1e6),
        ("cache_bytes_per_token", "cache kB a token ↓", 1e3),
    ):
        table.add_row(title, *(f"{one[name] / scale:.2f}" for one in (before, after)))
    return table
