"""Why this file exists: a student beside its teacher on a list of prompts, from the same noise, with the seconds a sample takes of each.

    python sample.py out/sdxl/export                                              # the embedded teacher and its captions
    python sample.py out/sdxl-lora/export --teacher stabilityai/stable-diffusion-xl-base-1.0 --prompts prompts.txt --bf16

Writes to --out: samples.png (a row each), student/ and teacher/ with a picture a prompt (of videos: still frames, and GIFs of the first two), and result.json.
A student is sampled by the call in its model card.
"""
import argparse
import ast
import json
import time
from pathlib import Path

import torch

from plumbing import Failure, contact_sheet, grid, next_experts, quiet, read_prompts, run


def load_student(folder, dtype=torch.float32):
    """An exported student -> (pipeline, the arguments of the call in its model card; its experts switch as the card's do). Raises Failure if it is none."""
    import diffusers
    folder = Path(folder)
    try:
        code = ast.parse((folder / "README.md").read_text().split("```python\n")[1].split("```")[0])
        calls = {}                                              # the first of each name, which is the pipeline's and not an expert's
        for c in ast.walk(code):
            if isinstance(c, ast.Call):
                calls.setdefault(ast.unparse(c.func).split(".")[-1], {k.arg: k.value for k in c.keywords})
        switches = calls["pipe"].pop("callback_on_step_end", None)
        load, call = ({k: ast.literal_eval(v) for k, v in calls[name].items()} for name in ("from_pretrained", "pipe"))
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, use_safetensors=True, **load).to(dtype)
    except (OSError, IndexError, KeyError, ValueError, SyntaxError) as e:
        raise Failure(f"{folder}: not an exported student; give the export/ folder of a finished run ({str(e).splitlines()[0]})") from e
    if switches:
        facts = json.loads((folder / "experts.json").read_text())
        name, lengths = facts["network"], facts["steps"]
        first = getattr(pipe, name)
        experts = [first, *(type(first).from_pretrained(folder, subfolder=f"{name}_{k}").to(dtype) for k in range(2, len(lengths) + 1))]
        after = next_experts(lengths)

        def switch(pipe, step, t, kwargs):                      # asked after each step
            setattr(pipe, name, experts[after[step]].to(pipe.device))
            return kwargs
        call["callback_on_step_end"] = switch
    return pipe, call


def draw(pipe, prompts, seed, call):
    """One prompt at a time, seeds counting up -> (samples [n,3,H,W] or [n,3,F,H,W] in [-1,1], seconds a sample, the first not counted)."""
    samples, began = [], time.perf_counter()
    for i, prompt in enumerate(prompts):
        out = pipe(prompt, **call, generator=torch.Generator().manual_seed(seed + i), output_type="pt")
        samples.append((out.images if hasattr(out, "images") else out.frames.transpose(1, 2)).float().cpu() * 2 - 1)
        if i == 0 and len(prompts) > 1:
            began = time.perf_counter()
    return torch.cat(samples), (time.perf_counter() - began) / max(len(prompts) - 1, 1)


def main():
    import shapes
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("student", help="export/ of a finished run")
    p.add_argument("--teacher", help="local directory or hub id of its teacher (default: the embedded one)")
    p.add_argument("--prompts", help="text file, one a line (default: eight captions of the embedded teacher)")
    p.add_argument("--seed", type=int, default=0, help="of the first prompt; the others count up")
    p.add_argument("--steps", type=int, default=25, help="of the teacher")
    p.add_argument("--guidance", type=float, help="of the teacher (default: its pipeline's own; the embedded one's is 3)")
    p.add_argument("--bf16", action="store_true")
    p.add_argument("--out", default="out/sample")
    args = p.parse_args()
    quiet()
    prompts = read_prompts(args.prompts) if args.prompts else shapes.CAPTIONS[::9]
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16 if args.bf16 else torch.float32
    student, call = load_student(args.student, dtype)
    from diffusers import DiffusionPipeline
    try:
        teacher = DiffusionPipeline.from_pretrained(args.teacher or Path(__file__).parent / "teacher", use_safetensors=True).to(dtype)
    except (OSError, ValueError) as e:
        raise Failure(f"--teacher {args.teacher}: no such pipeline, here or on the hub; give a directory with a model_index.json, or a hub id") from e
    guidance = 3.0 if args.teacher is None and args.guidance is None else args.guidance
    own = {k: v for k, v in call.items() if k in ("height", "width", "num_frames", "max_sequence_length")}       # and not how the student samples
    own |= dict(num_inference_steps=args.steps) | ({} if guidance is None else dict(guidance_scale=guidance))
    out, rows, result = Path(args.out), {}, {}
    for name, pipe, how in (("teacher", teacher, own), ("student", student, call)):
        pipe.set_progress_bar_config(disable=True)
        samples, seconds = draw(pipe.to(device), prompts, args.seed, how)
        pipe.to("cpu")                                          # both need not fit at once
        steps = how["num_inference_steps"]
        print(f"{name}: {steps} step{'s' * (steps > 1)}, {seconds:.3f} s a sample")
        rows[f"{name}, {steps} step{'s' * (steps > 1)}"], result[name] = samples, dict(steps=steps, seconds=seconds)
        out.mkdir(parents=True, exist_ok=True)
        if samples.dim() == 4:
            (out / name).mkdir(exist_ok=True)
            for i, image in enumerate(pipe.image_processor.postprocess(samples.clamp(-1, 1))):
                image.save(out / name / f"{i:05d}.png")
    shown = {label: samples[:8] for label, samples in rows.items()}
    (grid if samples.dim() == 4 else contact_sheet)(out / "samples.png", shown, prompts[:8])
    (out / "result.json").write_text(json.dumps(dict(result, samples=len(prompts), device=str(device)), indent=1))
    print(f"wrote {out}/samples.png and {out}/result.json")


if __name__ == "__main__":
    run(main)
