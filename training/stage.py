"""What the stages of a run share, and the body of their loops: average, log, save, show."""
import time
from dataclasses import dataclass

from tqdm import tqdm

from training.checkpoints import load_checkpoint, save_checkpoint
from training.ranks import world


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


@dataclass
class Stage:
    """One stage: what its loop trains, and how its student is drawn."""
    name: str
    iterations: int
    ema: object             # optimizer.EMA of the generator
    networks: dict          # name -> network besides the generator's
    optimizers: tuple       # the generator's first
    facts: dict             # what a checkpoint must agree in
    experts: list           # [Expert, ...] that draw a sample
    schedule: object        # theirs

    def checkpointed(self):
        """{name: network}, all that a checkpoint holds."""
        return dict(self.ema.networks(), **self.networks)


def begin(run, stage):
    """(genIter, globalIter) to go on from: the checkpoint's, loaded into place, if the run was
    stopped in this stage."""
    if run.reached != stage.name:
        return 0, 0
    found = load_checkpoint(run.checkpoint, stage.facts, stage.checkpointed(), stage.optimizers)
    return found["iteration"], found["global_iter"]


def follow(run, stage, losses_of_steps, start):
    """Drive a stage's loop to its end -> False if it was stopped early. start: the generator's
    iteration it goes on from."""
    args, first = run.args, stage.optimizers[0]
    full_rate, began, bar = first.rate, time.time(), None
    first.rate = rate_at(args, full_rate, start, stage.iterations)
    for losses in losses_of_steps:
        stage.ema.update()
        i = losses["iteration"]
        is_last = i == stage.iterations
        is_stopping = bool(run.stop)
        first.rate = rate_at(args, full_rate, i, stage.iterations)
        if world()[0] == 0:
            if bar is None:
                bar = tqdm(total=stage.iterations, initial=i - 1, desc=stage.name, unit="it",
                           mininterval=1.0)
            bar.update()
            if i % 10 == 0 or is_last:
                log(run.out, stage.name, losses, time.time() - began, bar)
        if i % args.save_every == 0 or is_last or is_stopping:
            counters = dict(stage=stage.name, iteration=i, global_iter=losses.get("global_iter", i))
            save_checkpoint(run.out.path / "checkpoints",
                            dict(stage.facts, **counters, flags=vars(args)),
                            stage.checkpointed(), stage.optimizers)
        if i % args.sample_every == 0 and not is_last:
            run.show(f"samples-{stage.name}-{i:06d}.png", stage.experts, stage.schedule)
        if is_stopping and not is_last:
            return False
    return True


def rate_at(args, full_rate, iteration, iterations):
    """The generator's learning rate after so many iterations: with --decay a straight line to
    zero."""
    return full_rate * (1 - iteration / iterations) if args.decay else full_rate


def log(out, name, losses, seconds, bar):
    """A line of metrics.jsonl. Here, and not in the method's loop, the device is waited for."""
    values = {key: round(float(value), 6) for key, value in losses.items()}
    out.log(stage=name, seconds=round(seconds, 2), **values)
    bar.set_postfix({key: f"{value:.3f}" for key, value in values.items() if "iter" not in key})
