"""A readable terminal: all messages go to `log.txt`; the terminal gets our lines and relevant warnings."""

import logging
import os
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rlhf_recipes.recipe.secrets import redacted

PASSING = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning, ImportWarning)
"""Kinds of warnings for the authors of libraries, not for their users."""

NOISE = (
    "deprecated",
    "The tokenizer has new PAD/BOS/EOS tokens",  # transformers has already corrected the difference
    "MatMul8bitLt: inputs will be cast",  # 8-bit layers do that at each call
    "Gradient accumulation steps mismatch",  # accelerate counts 1; the trainer and DeepSpeed have the true number
    "Failed to load CPU gemm_4bit_forward",  # bitsandbytes then uses its own kernel
)
"""Texts of library warnings that a user cannot act on."""

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def say(line: str = "") -> None:
    """Print one line."""
    _print(line, sys.stdout)


def complain(message: str) -> None:
    """Print an error on stderr."""
    _print(f"error: {message}", sys.stderr)


def _print(line: str, stream: TextIO) -> None:
    """Print a line. If it cannot be written (`| head` has ended, a disk is full), drop it and all later ones."""
    try:
        print(redacted(line), file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # for what libraries print, too


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[str] = ("",), wrap: bool = False
) -> None:
    """Print a table without rules: bold headings, then the rows.

    Args:
        headings: One for each column.
        rows: Cells as shown; rich's markup has no effect.
        left: Headings of the left-aligned columns (words); the others are right-aligned (numbers).
        wrap: Whether cells wrap in a narrow terminal. False: the table is as wide as it needs to be.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(Text(heading), justify="left" if heading in left else "right", no_wrap=not wrap)
    for row in rows:
        table.add_row(*map(Text, row))
    needed = 0 if wrap else Console(width=1000).measure(table).maximum
    console = Console(width=max(Console().width, needed), highlight=False)
    with console.capture() as shown:
        console.print(table)
    say(shown.get().rstrip("\n"))


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def log_to(file: Path | None) -> None:
    """Send all logging and Python warnings to `file` (None: nowhere), and only relevant warnings to the terminal."""
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    for handler in list(root.handlers):
        root.removeHandler(handler)
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setLevel(logging.WARNING)
    terminal.addFilter(_is_relevant)
    terminal.setFormatter(_Formatter("%(levelname)s: %(message)s"))
    root.addHandler(terminal)
    if file is not None:
        everything = logging.FileHandler(file, encoding="utf-8")
        everything.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(everything)
    warnings.showwarning = _show_warning


def hush_libraries() -> None:
    """Send the libraries' logging to our handlers and switch their progress bars off. It imports the libraries."""
    import datasets
    import huggingface_hub.utils
    import transformers

    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.set_verbosity_info()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.utils.logging.disable_propagation()
    huggingface_hub.utils.disable_progress_bars()
    # The cache would hash every lambda; preparing data is fast compared to training.
    datasets.disable_caching()


@contextmanager
def expected(text: str) -> Iterator[None]:
    """Inside, warnings that contain `text` go to `log.txt` only: the code causes them on purpose."""

    def other(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    terminals = [handler for handler in logging.getLogger().handlers if not isinstance(handler, logging.FileHandler)]
    for terminal in terminals:
        terminal.addFilter(other)
    try:
        yield
    finally:
        for terminal in terminals:
            terminal.removeFilter(other)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    level = logging.INFO if issubclass(category, PASSING) else logging.WARNING
    logging.getLogger("py.warnings").log(level, "%s (%s:%s)", message, filename, lineno)


def _is_relevant(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(noise in message for noise in NOISE)
