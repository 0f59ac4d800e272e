"""Progress of a run on a terminal: a bar with loss, tokens a second and time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from momkit.training.folder import Record


@contextmanager
def show_progress(console: Console, title: str, steps: int) -> Iterator[Callable[[Record], None]]:
    """A bar for a run of `steps`; gives the function that takes the lines of its log."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s "),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=console)
    bar = progress.add_task(title, total=steps, loss=float("nan"), speed=0.0)
    speed = 0.0
    try:

        def show(record: Record) -> None:
            nonlocal speed
            progress.start()  # not before: a run that is refused shows one line, no bar
            if record["kind"] == "step":
                now = record["tokens"] / record["seconds"]
                speed = now if speed == 0 else 0.95 * speed + 0.05 * now
                progress.update(bar, completed=record["step"], loss=record["cross_entropy"], speed=speed)
            elif record["kind"] == "eval":
                progress.console.print(f"{title}: step {record['step']}: {describe(record)}", highlight=False)
            else:
                progress.update(bar, completed=record["step"])

        yield show
    finally:
        progress.stop()


def describe(record: Record) -> str:
    """An evaluation on one line."""
    parts = [f"loss {record['loss']:.3f}", f"accuracy {record['accuracy']:.3f}"]
    if "bits_per_byte" in record:
        parts.append(f"{record['bits_per_byte']:.3f} bits a byte")
    if "by_group" in record:
        parts.append(
            "(" + ", ".join(f"{group}: {accuracy:.3f}" for group, accuracy in record["by_group"].items()) + ")"
        )
    return " ".join(parts)
