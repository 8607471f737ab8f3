"""Run the whole matrix, print it, and write docs/fault-matrix.md. Exit status 1 where a cell is unexplained.

python tests/faults/matrix.py [--only TEXT] [--stages N] [--no-docs]
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from concurrent.futures import as_completed
from pathlib import Path

import table
from cases import BUCKETS, CASES
from pool import STAGES, running
from rich.console import Console

DOCS = Path(__file__).parents[2] / "docs" / "fault-matrix.md"


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", default="", help="cases with this in their name (worker-kill, b3, ...); no docs are written"
    )
    parser.add_argument("--stages", type=int, default=STAGES, help="pairs of engines at once")
    parser.add_argument("--no-docs", action="store_true")
    options = parser.parse_args()
    console, start = Console(width=220 if not sys.stdout.isatty() else None), time.monotonic()
    cases = [case for case in CASES if options.only in case.name]
    with running(cases, options.stages) as futures:
        for done, future in enumerate(as_completed(futures.values()), 1):
            result = future.result()
            line = f"{done}/{len(cases)} {result.case.name}: {result.cell} in {result.seconds:.1f} s"
            console.print("\n    ".join([line, *result.violations]), markup=False, highlight=False)
        results = {case: future.result() for case, future in futures.items()}
    table.show(results, console)
    wrong = [case.name for case, result in results.items() if result.violations]
    for result in results.values():
        if result.violations:  # again: where output is cut, its end is kept
            console.print("\n    ".join([f"{result.case.name}: {result}", *result.violations]), markup=False)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    console.print(f"{(usage.ru_utime + usage.ru_stime) / 60:.1f} minutes of one core")
    console.print(
        f"{len(results)} cells in {(time.monotonic() - start) / 60:.1f} min, unexplained: {len(wrong)} {wrong}"
    )
    if not options.only and not options.no_docs:
        DOCS.write_text(table.page(results, BUCKETS))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
