"""A Slurm job array with a task for each cell."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dissect_clip.errors import SetupError
from experiments.cells import Runs
from experiments.jobs import Job

ROOT = Path(__file__).resolve().parent.parent
EXIT_STOPPED = 75
"""The exit status after a signal: a task with it is queued again."""

_SBATCH = """\
#!/usr/bin/env bash
# Written by `python -m experiments`: a task for each cell of {grids}. Submit it with
#   sbatch {file}
# and again for the rest: a task whose cell is finished ends at once, an interrupted one resumes. Arguments after the
# file's name are passed on: --retry-failed runs failed cells again. When all are done:
#   {collect}

#SBATCH --job-name="{name}"
#SBATCH --array=0-{last}
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
#SBATCH --open-mode=append
#SBATCH --output="{runs}/slurm-%A_%a.out"
{options}
set -euo pipefail
cd {cwd}
export PATH={python}:$PATH
export PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}

CELLS=(
{cells}
)

# Five minutes before the time limit Slurm sends TERM to this script only; the training saves, and is queued again.
{command} --cell "${{CELLS[$SLURM_ARRAY_TASK_ID]}}" "$@" &
task=$!
trap 'kill -TERM "$task" 2>/dev/null || true' TERM
status=0
wait "$task" || status=$?
if kill -0 "$task" 2>/dev/null; then # TERM has come, and ended the first wait
    status=0
    wait "$task" || status=$?
fi
if [[ "$status" == {stopped} ]]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
    exit 0
fi
exit "$status"
"""


def _quoted(option: str) -> str:
    """An option of sbatch; a value with spaces is quoted."""
    name, equals, value = option.partition("=")
    return f'{name}{equals}"{value}"' if any(map(str.isspace, value)) else option


def write_slurm(jobs: Sequence[Job], runs: Runs, options: argparse.Namespace) -> int:
    """Write a job array of the unfinished cells; returns the number of tasks.

    Raises:
        SetupError: the grids have different Slurm options.
    """
    left = [job.cell.name for job in jobs if runs.state(job.cell) != "done"]
    asked = {tuple(job.grid.slurm) for job in jobs}
    if len(asked) > 1:
        raise SetupError("--slurm: the grids have different options (key slurm): write a script for each")
    if not left:
        return 0
    grids = [str(file.resolve()) for file in options.grids]
    data = [word for name, value in options.data.items() for word in ("--data", f"{name}={value}")]
    recorded = [word for folder in options.recorded for word in ("--from", str(folder.resolve()))]
    base = [sys.executable, "-m", "experiments", *grids, "--runs", str(runs.folder), *recorded]
    text = _SBATCH.format(
        grids=", ".join(str(file) for file in options.grids), file=options.slurm, name=jobs[0].grid.name,
        collect=shlex.join([*base, "--collect", "--out", str(options.out.resolve())]),
        last=len(left) - 1, runs=str(runs.folder).replace("%", "%%"),
        options="".join(f"#SBATCH {_quoted(option)}\n" for option in next(iter(asked))),
        cwd=shlex.quote(str(Path.cwd())),
        python=shlex.quote(str(Path(sys.executable).parent)), root=shlex.quote(str(ROOT)),
        cells="\n".join(f"    {name}" for name in left), command=shlex.join([*base, *data]), stopped=EXIT_STOPPED,
    )  # fmt: skip
    options.slurm.write_text(text, encoding="utf-8")
    options.slurm.chmod(0o755)
    return len(left)
