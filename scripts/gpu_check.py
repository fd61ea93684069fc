"""Check the CUDA path on a machine with a GPU: what is right, and how fast it is.

    python scripts/gpu_check.py --out report
    python scripts/gpu_check.py --out report --stages 0,1,2
    python scripts/gpu_check.py --out report --emulate

Each stage (see `gpu_stages`) runs in a process of its own, within a limit of time; after each,
``report.md`` and ``report.json`` are written to the folder.  The last line tells the verdict of
each stage.  The exit status is not 0 if one of the stages 0 to 6 fails.

``--emulate`` runs what can be run without a GPU on an emulated one, made of the host: it shows
that the checks themselves work, and that the CUDA path keeps CUDA's rules.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from gpu_stages import STAGES, Result, run_program, run_stage

_GRACE = 15  # seconds to start a process, beyond a stage's own limit
_REQUIRED = range(7)


def run_apart(number: int, emulated: bool, folder: Path) -> Result:
    """Run a stage in a process of its own; what it found until it ended is kept."""
    stage = STAGES[number]
    if emulated and not stage.emulated_limit:
        return Result("not run", [f"Not emulated: {stage.needs}"])
    limit = stage.emulated_limit if emulated else stage.limit
    file = folder / f"stage{number}.json"
    command = [sys.executable, __file__, "--stage", str(number), "--out", str(file)]
    ended = ""
    try:
        done = run_program(command + ["--emulate"] * emulated, limit + _GRACE)
        if done.returncode:
            ended = f"Its process ended with status {done.returncode}: {done.stderr[-2000:]}"
    except subprocess.TimeoutExpired:
        ended = f"Stopped after {limit + _GRACE} seconds."
    result = Result(**json.loads(file.read_text("utf-8"))) if file.exists() else Result("FAIL", [])
    if ended:
        return Result("FAIL", [*result.paragraphs, ended])
    return result


def write(results: dict[int, Result], emulated: bool, folder: Path) -> None:
    """Write what is known as Markdown and JSON."""
    where = "emulated on the host, without a GPU" if emulated else "on a GPU"
    parts = [f"# The CUDA path, checked on {date.today().isoformat()} {where}"]
    for number, result in results.items():
        parts.append(f"## {number}. {STAGES[number].title}: {result.verdict}")
        parts += result.paragraphs
    (folder / "report.md").write_text("\n\n".join(parts) + "\n", "utf-8")
    found = {number: vars(result) for number, result in results.items()}
    (folder / "report.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the report")
    add("--stages", metavar="0,1,...", help="all by default")
    add("--emulate", action="store_true", help="on an emulated GPU, made of the host")
    add("--stage", type=int, help=argparse.SUPPRESS)  # in a process of its own; --out is a file
    args = parser.parse_args()
    known = {str(number): number for number in STAGES}
    chosen = known if args.stages is None else args.stages.split(",")
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"unknown stages: {', '.join(unknown)}; known: {', '.join(known)}")
    args.stages = [known[name] for name in chosen]
    return args


def main() -> int:
    args: Any = parse_args()
    if args.stage is not None:
        run_stage(args.stage, args.emulate, args.out)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[int, Result] = {}
    with tempfile.TemporaryDirectory() as work:
        for number in args.stages:
            results[number] = run_apart(number, args.emulate, Path(work))
            write(results, args.emulate, args.out)
            title = STAGES[number].title
            print(f"## {number}. {title}: {results[number].verdict}", flush=True)
            print("\n\n".join(results[number].paragraphs), end="\n\n", flush=True)
    print("; ".join(f"{n} {STAGES[n].title}: {r.verdict}" for n, r in results.items()))
    return int(any(r.verdict == "FAIL" for n, r in results.items() if n in _REQUIRED))


if __name__ == "__main__":
    sys.exit(main())
