"""What the stages of a run share, and the body of their loops: average, log, save, show."""
import time
from dataclasses import dataclass, field

from tqdm import tqdm

from training.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from training.folders import read_manifest
from training.pictures import losses_in
from training.ranks import is_rank_0, tell_once
from training.tracking import Report


@dataclass
class Run:
    """What every stage is handed."""
    args: object            # the command line
    out: object             # output.Output, the directory
    teacher: object         # teacher.Teacher
    stop: object            # ranks.StopSignal
    stages: list            # what this run trains, in order: the names its checkpoints go by
    checkpoint: object      # path of the checkpoint to go on from, or None
    reached: object         # name of that checkpoint's stage, or None
    show: object            # show(file, experts, schedule): draw a picture of the student
    done: dict = field(default_factory=dict)        # stage -> the generator's iterations so far
    report: Report = field(default_factory=Report)  # to a tracker; mostly to none


@dataclass
class Stage:
    """One stage: what its loop trains, and how its student is drawn."""
    name: str
    iterations: int
    ema: object             # optimizer.EMA of the generator
    optimizers: tuple       # the generator's first
    facts: dict             # what a checkpoint must agree in
    networks: dict          # name -> network besides the generator's
    experts: list           # [Expert, ...] that draw a sample
    schedule: object        # theirs
    warm_up: int = 0        # first iterations, in which the generator rests

    def checkpointed(self):
        """{name: network}, all that a checkpoint holds."""
        return dict(self.ema.networks(), **self.networks)


def begin(run, stage):
    """(genIter, globalIter) to go on from: the checkpoint's, loaded into place, if the run was
    stopped in this stage."""
    run.done[stage.name] = 0
    if run.reached != stage.name:
        return 0, 0
    found = load_checkpoint(run.checkpoint, stage.facts, stage.checkpointed(), stage.optimizers)
    run.done[stage.name] = found["iteration"]
    return found["iteration"], found["global_iter"]


def follow(run, stage, losses_of_steps):
    """Drive a stage's loop to its end -> False if it was stopped early."""
    args, first = run.args, stage.optimizers[0]
    full_rate, began, bar = first.rate, time.time(), None
    first.rate = rate_at(args, full_rate, run.done[stage.name], stage)
    for losses in losses_of_steps:
        stage.ema.update()
        i = losses["iteration"]
        run.done[stage.name] = i
        is_last = i == stage.iterations
        is_stopping = run.stop.asked_of_any_rank()
        first.rate = rate_at(args, full_rate, i, stage)
        if is_rank_0():
            if bar is None:
                bar = tqdm(total=stage.iterations, initial=i - 1, desc=stage.name, unit="it",
                           mininterval=1.0)
            bar.update()
            if i % 10 == 0 or is_last:
                values = log(run.out, stage.name, losses, time.time() - began, bar)
                run.report.losses(stage.name, values)
        if i % args.save_every == 0 or is_last or is_stopping:
            counters = dict(stage=stage.name, iteration=i, global_iter=losses.get("global_iter", i))
            save_checkpoint(run.out.path / "checkpoints",
                            dict(stage.facts, **counters, flags=vars(args)),
                            stage.checkpointed(), stage.optimizers)
        if i % args.sample_every == 0 and not is_last:
            file = f"samples-{stage.name}-{i:06d}.png"
            run.show(file, stage.experts, stage.schedule)
            run.report.picture(stage.name, i, run.out.path / file)
        if is_stopping and not is_last:
            goodbye(run)
            return False
    return True


def cure_of_divergence(run):
    """What to do when a gradient was not finite. The weights that lead there may be in the newest
    checkpoint, saved after the last step that was: then it has to go."""
    stage = list(run.done)[-1]                                  # the one at work
    names = [stage, *reversed(run.stages[:run.stages.index(stage)])]
    for name in names:
        path = newest_checkpoint(run.out.path / "checkpoints", name)
        if path is None:
            continue
        saved = read_manifest(path)["iteration"] if name == stage else 0
        if saved < run.done[stage]:                             # good steps were made since
            return f"go on from {path} with --resume auto and a lower learning rate"
        return (f"delete {path}, whose weights lead there, then --resume auto with a lower "
                f"learning rate")
    return (f"no checkpoint is there yet; go on with --resume {to_resume(run)} and a lower "
            f"learning rate")


def to_resume(run):
    """What --resume has to name: auto; or, before a run's first checkpoint, the one of another
    --out that it had gone on from, which auto would not find."""
    if run.checkpoint and not list(run.out.path.glob("checkpoints/*")):
        return run.checkpoint
    return "auto"


def goodbye(run):
    """Tell the user that a stopped run can go on."""
    tell_once(f"stopped; everything is in {run.out.path}; go on with --resume {to_resume(run)}")


def rate_at(args, full_rate, iteration, stage):
    """The generator's learning rate after so many iterations: 0 in a warm-up; then, with --decay, a
    straight line to zero."""
    if iteration < stage.warm_up:
        return 0.0
    if not args.decay:
        return full_rate
    return full_rate * (1 - (iteration - stage.warm_up) / (stage.iterations - stage.warm_up))


def log(out, name, losses, seconds, bar):
    """A line of metrics.jsonl -> its losses and counters, as numbers. Here, and not in the method's
    loop, the device is waited for."""
    values = {key: round(float(value), 6) for key, value in losses.items()}
    out.log(stage=name, seconds=round(seconds, 2), **values)
    bar.set_postfix({key: f"{values[key]:.3f}" for key in losses_in([values])})
    return values
