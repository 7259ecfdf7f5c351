"""`attlas inspect`: what the heads of a model do, in the terminal, in files and on a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from attlas.errors import UserError

if TYPE_CHECKING:
    from attlas.inspect.look import Looked
    from attlas.inspect.subject import Subject
    from attlas.kinds.analysis import Scores

#: Heads of each score that the terminal tells.
TOLD = 5


def inspect_command(
    model: Annotated[str, typer.Argument(help="Name, folder or Hugging Face id.")],
    text: Annotated[str | None, typer.Option(help="The text to read.")] = None,
    file: Annotated[Path | None, typer.Option(help="A text file to read.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Pairs of prompts: indirect-objects, induction, colours, greater-than, …"),
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option("--with", help="Recorders and analyses in place of the preset's."),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="roles, flow, circuits, weights, sinks or compare.")
    ] = "roles",
    against: Annotated[
        str | None,
        typer.Option(help="With compare: another model, or +snapkv(keep=0.5), this one with a part."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text at most.")] = 2048,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of prompts of the task.")] = 16,
    drawn: Annotated[int, typer.Option(min=0, help="Heads whose patterns are drawn.")] = 4,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Decides what is drawn.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of findings and the page.")] = Path("attlas-inspect"),
) -> None:
    """Look into a model: which heads retrieve, copy, sink, look back; how attention flows.

    Reads Shakespeare unless a text is given. Every finding is kept as it comes: the same command goes
    on where it was stopped.
    """
    from attlas.devices import device_here
    from attlas.inspect.find import PRESETS, chosen
    from attlas.inspect.look import Looked, findings, interesting, patterns
    from attlas.inspect.store import Store, key_of
    from attlas.models.load import load, load_tokenizer

    if preset not in PRESETS:
        chosen(preset)  # raises, with the nearest
    if (against is not None) != (preset == "compare"):
        raise UserError("--preset compare and --against, what it is held against, go together")
    said = _said(text, file)
    lookers = chosen(preset, names or [])
    place = device_here(device)
    loaded, tokenizer = load(model).to(place), load_tokenizer(model)
    subject = _subject(loaded, tokenizer, said, tokens, task, pairs, seed, lookers)
    store = Store(out, key_of(subject, model, preset=preset))
    console = Console()
    with _progress(console) as progress:
        bar = progress.add_task("", total=1.0)

        def tick(what: str, share: float) -> None:
            progress.update(bar, description=what, completed=share)

        try:
            looked = Looked(subject, model, findings(subject, lookers, store, tick))
            if against is not None:
                looked.against = _other(against, looked, lookers, tick)
            tick("drawing patterns", 0.0)
            looked.patterns, looked.neurons = patterns(subject, interesting(looked.scores, drawn))
        except KeyboardInterrupt:
            progress.stop()
            console.print(
                f"\nstopped: what was found is kept in {out}; the same command goes on from there",
                highlight=False,
            )
            raise typer.Exit(130) from None
    _write(looked, out)
    _tell(looked, console)
    console.print(f"page: {out / 'index.html'}; every head: {out / 'heads.jsonl'}", highlight=False)


def _said(text: str | None, file: Path | None) -> str | None:
    """The text that was given; None for Shakespeare."""
    if text is not None and file is not None:
        raise UserError("give --text or --file, not both")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"file {file} cannot be read: {error}") from error
    if text is not None and not text.strip():
        raise UserError("the text is empty; give one of at least one word")
    return text


def _subject(
    model: Any, tokenizer: Any, said: str | None, tokens: int, task: str | None, pairs: int, seed: int,
    lookers: Any,
) -> Subject:  # fmt: skip
    """What is looked at: the text cut to size, and prompts where a task is named or needed."""
    from attlas.inspect.look import text_ids
    from attlas.inspect.subject import Subject
    from attlas.inspect.tasks import draw
    from attlas.kinds.analysis import Analysis

    room = getattr(model.config.get_text_config(), "max_position_embeddings", tokens)
    ids = text_ids(said, tokenizer, min(tokens, room), seed)
    needed = any(isinstance(n.looker, Analysis) and n.looker.needs == "prompts" for n in lookers)
    prompts = None
    if task is not None or needed:
        prompts = draw(task or "indirect-objects", tokenizer, pairs, seed)
        prompts = prompts.to(next(model.parameters()).device)
    return Subject(model, input_ids=ids, prompts=prompts, tokenizer=tokenizer, seed=seed)


def _other(
    against: str, looked: Looked, lookers: Any, tick: Any
) -> tuple[str, dict[str, Scores]]:
    """The name and scores of what is compared with: another model, or this one with a part."""
    from dataclasses import replace

    from attlas.compare.methods import parse_method
    from attlas.inspect.find import fresh
    from attlas.inspect.look import Looked as Found
    from attlas.inspect.look import findings, text_ids
    from attlas.models.load import load, load_tokenizer

    again = fresh(lookers)
    if against.startswith("+"):
        parts = parse_method(against[1:]).parts()
        found = findings(looked.subject, again, None, tick, parts)
        return f"{looked.name} {against}", Found(looked.subject, against, found).scores
    place = looked.subject.device
    other = replace(
        looked.subject, model=load(against).to(place), tokenizer=load_tokenizer(against)
    )
    if other.tokenizer.get_vocab() != looked.subject.tokenizer.get_vocab():
        assert looked.subject.input_ids is not None
        said = looked.subject.tokenizer.decode(looked.subject.input_ids[0])
        other = replace(other, input_ids=text_ids(said, other.tokenizer))
    shape, own = (other.layers, other.heads), (looked.subject.layers, looked.subject.heads)
    if shape != own:
        raise UserError(
            f"{against} has {shape[0]} layers of {shape[1]} heads, {looked.name} {own[0]} of {own[1]}: "
            "their heads cannot be laid side by side; inspect each by itself"
        )
    return against, Found(other, against, findings(other, again, None, tick)).scores


def _write(looked: Looked, out: Path) -> None:
    """heads.jsonl and the page."""
    from attlas.inspect.page import atlas

    lines = (json.dumps(line, ensure_ascii=False) for line in looked.lines())
    (out / "heads.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    atlas(looked).write(out / "index.html")


def _tell(looked: Looked, console: Console) -> None:
    """The first heads of every score, and what was said."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("score", "the first heads (layer.head)", "what it says"):
        table.add_column(column, overflow="fold")
    for name, scores in looked.scores.items():
        top = [f"{a}.{b} {float(scores.values[a, b]):.3g}" for a, b in scores.top(TOLD)]
        table.add_row(Text(name), Text("  ".join(top)), Text(scores.meaning, "dim"))
    console.print(table)
    for found in looked.findings.values():
        for sentence in found.says:
            console.print(sentence, highlight=False, markup=False)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)
