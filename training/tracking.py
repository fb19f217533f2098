"""Reports of a run to TensorBoard or to Weights & Biases (--report-to), by accelerate's trackers.

Losses go there as STAGE/NAME at the stage's own iterations, and the sheets of samples as
STAGE/samples. All of it stands in --out as well, so a tracker that fails while the run trains is a
warning, and the run goes on without it.
"""
import importlib.util
import os
import secrets

from training.errors import Failure, reason_of
from training.pictures import losses_in
from training.ranks import is_rank_0
from training.terminal import warn

TRACKERS = ("tensorboard", "wandb")


def problem_of(name):
    """A sentence for the user if this tracker cannot be imported here, or None. It is only looked
    for: to import it takes seconds."""
    missing = [package for package in ("accelerate", name)
               if importlib.util.find_spec(package) is None]
    if not missing:
        return None
    return f"--report-to {name}: not installed; pip install {' '.join(missing)}"


class Report:
    """What a run tells its tracker.

    tracker: an accelerate.tracking.GeneralTracker. None, as without --report-to and on all ranks
    but the first: nothing is told to anybody.
    """

    def __init__(self, tracker=None):
        self.tracker = tracker

    def losses(self, stage, values):
        """values: {name: number} of a line of metrics.jsonl, with its "iteration"."""
        entry = {f"{stage}/{name}": values[name] for name in losses_in([values])}
        self._attempt(self._log, entry, stage, int(values["iteration"]))

    def picture(self, stage, iteration, path):
        """path: of a PNG file. One that a full disk has lost was warned of already."""
        if path.exists():
            self._attempt(self._log_picture, path, stage, iteration)

    def finish(self):
        self._attempt(lambda: self.tracker.finish())

    def _log(self, entry, stage, iteration):
        step = iteration
        if self.tracker.name == "wandb":
            # it drops every step below an earlier one, and each stage begins at 1
            entry = entry | {f"{stage}/iteration": iteration}
            step = None
        self.tracker.log(entry, step=step)

    def _log_picture(self, path, stage, iteration):
        import numpy
        from PIL import Image
        name = f"{stage}/samples"
        with Image.open(path) as image:
            pixels = numpy.asarray(image.convert("RGB"))                        # [H,W,3]
        if self.tracker.name == "wandb":
            import wandb
            self._log({name: wandb.Image(pixels)}, stage, iteration)
        else:
            self.tracker.log_images({name: pixels[None]}, step=iteration, dataformats="NHWC")

    def _attempt(self, call, *args):
        """Tell the tracker, if there is one."""
        if self.tracker is None:
            return
        try:
            call(*args)
        except Exception as e:                  # the libraries' errors have no class in common
            warn(f"--report-to {self.tracker.name}: {reason_of(e)}; training goes on without it")
            self.tracker = None


def report_of(args, out, stages):
    """The Report of this run, started. out: Output. stages: names of what the run trains.

    Raises Failure where the tracker does not start: nobody is logged in, say.
    """
    if args.report_to is None or not is_rank_0():
        return Report()
    from accelerate import PartialState
    try:
        # accelerate's trackers log about themselves, which needs its state: that reads the process
        # group there is, and makes none
        PartialState()
        if args.report_to == "tensorboard":
            tracker = open_tensorboard(out)
        else:
            tracker = open_wandb(args, out, stages)
    except Exception as e:                      # the libraries' errors have no class in common
        raise Failure(f"--report-to {args.report_to}: {reason_of(e)}; put that right or leave the "
                      f"flag out") from e
    return Report(tracker)


def open_tensorboard(out):
    """To see it: tensorboard --logdir OUT. A resumed run adds a file, and goes on in its curves."""
    from accelerate.tracking import TensorBoardTracker
    tracker = TensorBoardTracker("tensorboard", out.path)
    tracker.start()
    return tracker


def open_wandb(args, out, stages):
    """Project WANDB_PROJECT or "distillation". OUT/wandb-run keeps the run's id, by which a resumed
    run is the same one there."""
    from accelerate.tracking import WandBTracker
    kept = out.path / "wandb-run"
    if not kept.exists():
        kept.write_text(secrets.token_hex(4), encoding="utf-8")
    tracker = WandBTracker(os.environ.get("WANDB_PROJECT", "distillation"), name=out.path.name,
                           id=kept.read_text(encoding="utf-8"), resume="allow", dir=str(out.path),
                           config=vars(args))
    tracker.start()
    for stage in stages:                        # what each curve is drawn over
        tracker.tracker.define_metric(f"{stage}/*", step_metric=f"{stage}/iteration")
    return tracker
