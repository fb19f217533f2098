"""Distil a video pipeline of diffusers to a few steps by ADM, DMD or Phased DMD: CogVideoX (2b, 5b,
1.5) and Wan (2.1, and 2.2 with its two transformers).

    python train_cogvideox.py                           # the embedded teacher, two cores, minutes
    python train_cogvideox.py --method phased_dmd --out out/phased      # two experts of two steps

    # one GPU, by LoRA
    python train_cogvideox.py --model THUDM/CogVideoX-2b --prompts prompts.txt \\
        --out out/cogvideox --bf16 --grad-checkpointing --lora-rank 64 --lora-rank-fake 64 \\
        --batch-size 1 --lr-generator 1e-5 --lr-fake 1e-4 --lr-discriminator 5e-5
    python train_cogvideox.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts prompts.txt \\
        --out out/wan --method phased_dmd --bf16 --grad-checkpointing --batch-size 1 \\
        --lora-rank-fake 64 --lr-fake 1e-4
    # eight; two ranks share each video's tokens; all weights sharded
    torchrun --nproc-per-node 8 train_cogvideox.py --model THUDM/CogVideoX-5b \\
        --context-parallel 2 ...
    torchrun --nproc-per-node 8 train_cogvideox.py --model Wan-AI/Wan2.2-T2V-A14B-Diffusers \\
        --method phased_dmd --fsdp --accumulate 2 ...

The stages are train_sdxl.py's, without ADP, which is for images. Writes what that writes;
samples.png is a contact sheet, and each sampled video is a GIF beside it.
"""
import training.interrupt  # noqa: F401, I001  first: the libraries take seconds
from training.errors import run_main
from train_sdxl import main

if __name__ == "__main__":
    run_main(lambda: main(__doc__, "video"))
