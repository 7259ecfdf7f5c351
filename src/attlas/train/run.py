"""All runs of a plan, one after the other; what one of them does cannot hurt the others."""

from __future__ import annotations

import gc
import os
from statistics import median
from typing import Any

from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from attlas.compare.machine import machine, versions
from attlas.compare.units import OutOfMemory, memory_watched
from attlas.errors import UserError
from attlas.journal import Line, unwritable
from attlas.tasks.train import Task
from attlas.train import checkpoint, measure
from attlas.train.loop import Diverged, Trainer, TrainingBench, fresh_state
from attlas.train.plan import Plan, Run
from attlas.train.results import Results

#: Points of a stored curve at most; longer ones are means of blocks of steps.
POINTS = 400


def accelerated(device: str, dtype: str) -> Accelerator:
    """An Accelerator on the device; `accelerate launch` says how many processes there are.

    Raises:
        UserError: it was launched for sharded weights, which are not stored here.
    """
    if "WORLD_SIZE" not in os.environ:
        # Another precision or device earlier in this process must not be an error.
        AcceleratorState._reset_state(reset_partial_state=True)
    made = Accelerator(
        cpu=device == "cpu",
        mixed_precision="bf16" if dtype == "bfloat16" else "no",
        # A mechanism may have weights that a batch does not touch.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    whole = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if made.distributed_type not in whole:
        raise UserError(
            f"train spreads rows over devices with whole models, not {made.distributed_type.value}; "
            "launch it with `accelerate launch --multi_gpu`"
        )
    return made


def train(
    plan: Plan, task: Task, results: Results, accelerator: Accelerator, console: Console
) -> None:
    """Train what is missing from the results; what stands there is not touched.

    Raises:
        UserError: the results or a checkpoint cannot be written.
    """
    todo = results.todo(plan)
    accelerator.wait_for_everyone()  # all have read the results before one adds to them
    if not todo:
        console.print(f"all {len(plan.runs())} runs are finished in {results.folder}")
        return
    if len(todo) < len(plan.runs()):
        console.print(
            f"{len(plan.runs()) - len(todo)} of {len(plan.runs())} runs are finished; going on"
        )
    with _progress(console) as progress:
        bar = progress.add_task("", total=plan.steps * len(todo), loss="")
        for number, run in enumerate(todo):
            progress.update(bar, completed=number * plan.steps, loss="",
                            description=f"{run.mechanism}, seed {run.seed}")  # fmt: skip

            def tick(steps: int, loss: float) -> None:
                progress.update(bar, advance=steps, loss=f"loss {loss:.3f}" if loss == loss else "")

            bench = TrainingBench(plan, task, accelerator, results.folder, tick)
            line = _guarded(bench, run)
            if accelerator.is_main_process:
                results.append(line)
                if line["status"] in ("ok", "diverged"):
                    checkpoint.drop(checkpoint.folder_of(results.folder, run))
            if line["status"] not in ("ok", "diverged"):
                console.print(f"{run.mechanism}, seed {run.seed}: {line['status']} ({line['reason']})",
                              style="yellow", markup=False)  # fmt: skip
                if accelerator.num_processes > 1:
                    # The others may wait for this process inside a step; the launcher ends them.
                    raise RuntimeError(f"{run.mechanism}, seed {run.seed}: {line['reason']}")


def _guarded(bench: TrainingBench, run: Run) -> Line:
    """A run's line, whatever becomes of it; memory and errors are results."""
    found: dict[str, Any] = {"status": "ok", "reason": ""}
    trainer = None
    try:
        with memory_watched():
            trainer = Trainer(bench, run)
            trainer.train()
            found |= _measured(bench, trainer)
    except Diverged as error:
        found |= {"status": "diverged", "reason": str(error), "diverged_at": error.step}
    except OutOfMemory as error:
        found |= {"status": "out of memory", "reason": str(error)}
    except UserError:
        raise
    except OSError as error:
        raise unwritable(bench.out, error, Results.piece) from error
    except Exception as error:
        found |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    line = _line(bench, run, found, fresh_state() if trainer is None else trainer.state)
    del trainer
    gc.collect()
    bench.accelerator.free_memory()
    return line


def _measured(bench: TrainingBench, trainer: Trainer) -> dict[str, Any]:
    scores = {split: trainer.score(split) for split in bench.task.splits}
    trainer.state["scores"].append([bench.plan.steps, scores[bench.task.splits[0]]])
    return {
        "scores": scores,
        "parameters": measure.parameters(trainer.net),
        "operations": measure.operations(trainer.net, bench.task),
        **measure.cache_weight(trainer.net, bench.task, bench.accelerator),
    }


def _line(bench: TrainingBench, run: Run, found: dict[str, Any], state: dict[str, Any]) -> Line:
    losses = state["losses"]
    block = -(-len(losses) // POINTS) or 1
    curve = [
        [min(k + block, len(losses)), sum(losses[k : k + block]) / len(losses[k : k + block])]
        for k in range(0, len(losses), block)
    ]
    measured = ("parameters", "operations", "cache_bytes_per_token", "cache_growth")
    unknown: Line = {"scores": {}, **dict.fromkeys(measured)}
    return {
        **run._asdict(),
        **unknown,
        **found,
        "diverged_at": found.get("diverged_at"),
        "steps_done": state["step"],
        "seconds": round(state["seconds"], 4),
        "step_ms": round(1e3 * median(state["paces"]), 3) if state["paces"] else None,
        "curve": curve,
        "score_curve": state["scores"],
        "processes": bench.accelerator.num_processes,
        "settings": bench.plan.settings,
        "versions": versions(),
        "machine": machine(bench.accelerator.device),
    }


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=600,
    )
