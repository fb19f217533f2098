"""A run's directory (--out): locked while the run lives, with the log in it, and cleaned of what a
killed run left."""
import fcntl
import json
import re
from pathlib import Path

from training.errors import Failure
from training.folders import delete, finish_replacing, read_json
from training.ranks import barrier, is_rank_0
from training.terminal import warn

# in .lock, by which a directory is known as a run's own
MARK = "train_sdxl.py or train_cogvideox.py writes here\n"
# what a run writes, and in time replaces
WRITTEN = ("prompts", "pairs", "checkpoints", "samples", "export", "metrics.jsonl", "result.json",
           "samples.png", "losses.png")
# what a run that is killed while it saves leaves behind: its own names, in their own places
LEFTOVER = re.compile(
    r"(checkpoints/(adp|reflow|adm|phase\d+)-\d{8}|pairs/\d{5,}"
    r"|prompts/(\d{5,}|empty|look-at-[0-9a-f]{16}-\d{5,})|samples|export)(\.old)?\.tmp"
    r"|result\.json\.tmp")


def is_run(path):
    """Whether a run has written to this directory: its .lock says so, or there is a manifest where
    a run puts one."""
    lock = path / ".lock"
    if lock.is_file() and lock.read_bytes()[:200] == MARK.encode():
        return True
    for folder in ("prompts", "pairs", "checkpoints"):
        for manifest in path.glob(f"{folder}/*/manifest.json"):
            try:
                if "seal" in read_json(manifest):
                    return True
            except (OSError, ValueError):
                continue
    return False


class Output:
    """A run's directory. It is locked until the process ends, even by kill -9.

    path: is made if it is not there.
    resume: whether it may hold a run to go on with.
    Raises Failure, before any model is loaded, for a directory that cannot be written, is in use,
    holds a finished run, or holds anything at all without `resume`; with `resume`, for one that
    was never a run and holds something of the names that a run replaces.
    """

    def __init__(self, path, resume):
        self.path = Path(path)
        self.lock = None
        self.was_run = False
        if is_rank_0():
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._claim(path, resume)
            except OSError as e:
                raise Failure(f"--out {path}: {e.strerror}; choose a directory that can be written")
        barrier()               # what rank 0 refuses is refused before any rank goes on

    def _claim(self, path, resume):
        """Lock the directory, and refuse what this run should not overwrite. A directory that is
        refused gets no .lock."""
        if (self.path / ".lock").exists():
            self._lock(path)
        self.was_run = is_run(self.path)
        if self.was_run and (self.path / "result.json").exists():
            raise Failure(f"--out {path} holds a finished run; choose another directory or remove "
                          f"this one")
        held = sorted(file.name for file in self.path.iterdir() if file.name != ".lock")
        if held and not resume and self.was_run:
            raise Failure(f"--out {path} is not empty ({held[0]}, ...); go on with --resume auto "
                          f"or choose another directory")
        if held and not resume:
            raise Failure(f"--out {path} is not empty ({held[0]}, ...) and holds no run that "
                          f"--resume auto could go on with; choose another directory")
        foreign = [name for name in held if name in WRITTEN]
        if foreign and not self.was_run:
            raise Failure(f"--out {path} was never a run and holds {foreign[0]}, which a run would "
                          f"replace; choose another directory")
        if self.lock is None:
            self._lock(path)
        if self.lock.tell() == 0:
            self.lock.write(MARK)
            self.lock.flush()

    def _lock(self, path):
        file = self.path / ".lock"
        if file.exists() and not file.is_file():                # a FIFO would be waited for
            raise Failure(f"--out {path}: its .lock is not a file; choose another directory")
        self.lock = open(file, "a", encoding="utf-8")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Failure(f"--out {path}: another run is writing there; wait for it or choose "
                          f"another directory")

    def clean(self):
        """Delete what a run left that was killed while it saved, and nothing else; only where a
        run had written before this one came. All ranks must call it together, before any of them
        writes."""
        if is_rank_0() and self.was_run:
            for folder in (".", "prompts", "pairs", "checkpoints"):
                for leftover in sorted(self.path.glob(f"{folder}/*.tmp")):
                    name = leftover.relative_to(self.path).as_posix()
                    if not LEFTOVER.fullmatch(name) or leftover.is_symlink():
                        continue
                    finish_replacing(str(leftover).removesuffix(".tmp").removesuffix(".old"))
                    if leftover.exists():
                        delete(leftover)
        barrier()

    def log(self, **entry):
        """Add one line to metrics.jsonl. If the disk is full, the line is lost and the run goes
        on."""
        try:
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as e:
            warn(f"{self.path}/metrics.jsonl: {e.strerror}; training goes on")
