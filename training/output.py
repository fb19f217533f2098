"""A run's directory (--out): locked while the run lives, with the log in it."""
import fcntl
import json
import shutil
import sys
from pathlib import Path

from training.errors import Failure
from training.ranks import barrier, world


class Output:
    """A run's directory. It is locked until the process ends, even by kill -9.

    path: is made if it is not there.
    resume: whether it may hold a run to go on with.
    Raises Failure, before any model is loaded, for a directory that cannot be written, is in use,
    holds a finished run, or holds anything at all without `resume`.
    """

    def __init__(self, path, resume):
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / ".lock", "a")
        except OSError as e:
            raise Failure(f"--out {path}: {e.strerror}; choose a directory that can be written")
        if world()[0] == 0:
            self._claim(path, resume)
        barrier()               # what rank 0 refuses is refused before any rank goes on

    def _claim(self, path, resume):
        """Lock the directory and refuse what this run should not overwrite."""
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Failure(f"--out {path}: another run is writing there; wait for it or choose "
                          f"another directory")
        if (self.path / "result.json").exists():
            raise Failure(f"--out {path} holds a finished run; choose another directory or remove "
                          f"this one")
        held = sorted(file.name for file in self.path.iterdir() if file.name != ".lock")
        if held and not resume:
            raise Failure(f"--out {path} is not empty ({held[0]}, ...); go on with --resume auto "
                          f"or choose another directory")
        for leftover in self.path.glob("**/*.tmp"):     # of a run that was killed while it saved
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()

    def log(self, **entry):
        """Add one line to metrics.jsonl. If the disk is full, the line is lost and the run goes
        on."""
        try:
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as e:
            print(f"warning: {self.path}/metrics.jsonl: {e.strerror}; training goes on",
                  file=sys.stderr)
