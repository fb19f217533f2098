"""Train the teacher of lesson/glyphs.py, from nothing.

    python -m lesson.train_glyphs               # about 4 minutes on one core

Writes teachers/glyphs/unet.safetensors (bf16, 1.1 MB) and report.json beside it: what the reader
says of 1,024 of its pages, by the number of sampling steps.
"""
import json
import math
from copy import deepcopy
from pathlib import Path

import torch
from safetensors.torch import save_file

from adm import score_loss
from lesson.glyphs import SCHEDULE, SHAPE, TEACHER, generated, measure, no_prompt, pages, unet
from lesson.students import average_in
from training.draws import Draws, stream
from training.errors import run_main
from training.scripts import a_count, a_factor, folder_for, parser_for, zero_or_more


def train(iterations, batch, lr, seed):
    """-> the EMA of a UNet trained by the score loss."""
    torch.manual_seed(seed)
    net = unet()
    average = deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.0,
                                  fused=True)

    def rate(i):
        """Of lr: up for 100 iterations, then down to 0 as a cosine."""
        return min(1, (i + 1) / 100) * 0.5 * (1 + math.cos(math.pi * i / iterations))

    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for i in range(iterations):
        draws = Draws((seed, 0), i, [0], SHAPE, block=batch)
        x_0 = pages(batch, stream(seed, 1, i))
        loss = score_loss(net, SCHEDULE, x_0, draws.normal(), draws.integers(1, SCHEDULE.T),
                          no_prompt(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        weight = 1 - min(0.998, (i + 1) / (i + 10))
        average_in(average, net, weight)
        if (i + 1) % 100 == 0:
            print(f"{i + 1:5d}   loss {loss:.3f}", flush=True)
    return average


def main():
    p = parser_for(__doc__)
    p.add_argument("--iterations", type=a_count, default=800)
    p.add_argument("--batch-size", type=a_count, default=64)
    p.add_argument("--lr", type=a_factor, default=1.5e-3)
    p.add_argument("--seed", type=zero_or_more, default=0)
    p.add_argument("--out", type=Path, default=TEACHER.parent, help="folder for the weights")
    args = p.parse_args()
    torch.set_num_threads(1)
    net = train(args.iterations, args.batch_size, args.lr, args.seed).bfloat16()
    folder_for(args.out)
    save_file(net.state_dict(), args.out / TEACHER.name)

    net = net.float()                           # as it will be loaded
    x_T = torch.randn(1024, *SHAPE, generator=stream(args.seed, 2))
    report = {}
    for steps in (1, 2, 4, 8, 25):
        report[steps] = measure(generated(net, x_T, SCHEDULE.stops(steps)))
        print(f"{steps:2d} steps   cell {report[steps]['cell']:.3f}   "
              f"page {report[steps]['page']:.3f}   tv {report[steps]['tv']:.3f}", flush=True)
    (args.out / "report.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_main(main)
