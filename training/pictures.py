"""Pictures of a run: sheets of samples, and the curves of its losses."""
import json
import os
import textwrap
from contextlib import suppress
from pathlib import Path

import torch

from training.terminal import warn

NOT_LOSSES = ("stage", "iteration", "global_iter", "seconds")       # of a line of metrics.jsonl


def pyplot():
    """matplotlib's pyplot, without a screen."""
    os.environ["MPLBACKEND"] = "Agg"        # a notebook's own ends the import of a child of it
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save_picture(path, figure):
    """Save a figure and close it. If it cannot be written, that is a warning, and the run goes
    on."""
    import matplotlib.pyplot as plt
    try:
        figure.savefig(path, dpi=100)
    except OSError as e:
        warn(f"{path}: {e.strerror}; training goes on")
    plt.close(figure)


# ----------------------------------------------------------------------------------------- samples

def grid(path, samples, captions):
    """Save images as a sheet: a row for each label, a column for each caption.

    samples: {label: images [n,3,H,W] in [-1,1]}. captions: n strings.
    """
    plt = pyplot()
    n = len(captions)
    size = (1.5 * n + 0.3, 1.6 * len(samples) + 0.2)                            # inches
    figure, axes = plt.subplots(len(samples), n, figsize=size, squeeze=False, layout="constrained")
    for line, (label, images) in zip(axes, samples.items()):
        for ax, image in zip(line, images):
            pixels = ((image.float() + 1) / 2).clamp(0, 1)                      # [3,H,W]
            ax.imshow(pixels.permute(1, 2, 0).cpu())
            ax.set(xticks=[], yticks=[])
        wrapped = "\n".join(textwrap.fill(part, 20) for part in label.splitlines())
        line[0].set_ylabel(wrapped, fontsize=9, parse_math=False)
    for ax, caption in zip(axes[0], captions):
        title = "\n".join(textwrap.wrap(caption, 24)[:3])
        ax.set_title(title, fontsize=7, parse_math=False)       # a prompt may have dollars in it
    save_picture(path, figure)


def contact_sheet(path, samples, captions, videos=2, frames=8):
    """Save the first videos of each label: as rows of still frames on one sheet, and each as a GIF
    beside the sheet.

    samples: {label: videos [n,3,F,H,W] in [-1,1]}. captions: n strings.
    videos: how many of each label. frames: how many stills of each video.
    """
    stills = {}
    for label, batch in samples.items():
        for k, video in enumerate(batch[:videos]):                              # [3,F,H,W]
            pick = torch.linspace(0, video.shape[1] - 1, frames).round().long()
            caption = textwrap.wrap(textwrap.shorten(captions[k], 40), 18)
            row = "\n".join([label, *caption])
            stills[row] = video[:, pick].transpose(0, 1)                        # [frames,3,H,W]
            save_gif(path, f"{label.replace(',', '').replace(' ', '-')}-{k}", video)
    grid(path, stills, [f"frame {i + 1} of {frames}" for i in range(frames)])


def save_gif(sheet, name, video):
    """A video [3,F,H,W] in [-1,1] as SHEET-NAME.gif. If it cannot be written, that is a warning."""
    from diffusers.utils import export_to_gif
    from PIL import Image
    pixels = ((video.permute(1, 2, 3, 0) + 1) * 127.5).clamp(0, 255).byte()     # [F,H,W,3]
    images = [Image.fromarray(frame) for frame in pixels.cpu().numpy()]
    try:
        export_to_gif(images, f"{Path(sheet).with_suffix('')}-{name}.gif", fps=8)
    except OSError as e:
        warn(f"{sheet}: {e.strerror}; training goes on")


# ------------------------------------------------------------------------------------------ losses

def logged(folder):
    """The lines of a run's metrics.jsonl, as dicts; [] if there is no such file. A line that a full
    disk cut short, or that was damaged since, is passed over."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return []
    entries = []
    for line in file.read_bytes().split(b"\n"):
        with suppress(ValueError):              # of JSON, and of UTF-8
            entry = json.loads(line)
            if isinstance(entry, dict) and {"stage", "iteration"} <= entry.keys():
                entries.append(entry)
    return entries


def losses_in(entries):
    """Names of the losses that were logged, in order: all but counters, clock and stage."""
    names = {}                                  # a dict, as a set that keeps its order
    for entry in entries:
        for name in entry:
            if name not in NOT_LOSSES:
                names[name] = True
    return list(names)


def curves(out):
    """Draw metrics.jsonl as losses.png: a panel for each loss, a colour for each stage. out:
    Output."""
    plt = pyplot()
    entries = logged(out.path)
    stages = dict.fromkeys(entry["stage"] for entry in entries)
    names = losses_in(entries) or ["nothing logged"]
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.8), squeeze=False,
                                layout="constrained")
    for name, ax in zip(names, axes[0]):
        for stage in stages:
            points = {entry["iteration"]: entry[name] for entry in entries
                      if entry["stage"] == stage and name in entry}
            if points:          # those after a killed run's last checkpoint were logged twice
                iterations, losses = zip(*sorted(points.items()))
                ax.plot(iterations, losses, lw=0.8, label=stage)
        ax.set(title=name, xlabel="iteration")
        if entries:
            ax.legend(fontsize=7)
    save_picture(out.path / "losses.png", figure)
