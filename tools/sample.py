"""A student beside its teacher on a list of prompts, from the same noise, with the seconds that a
sample takes of each.

    python -m tools.sample out/sdxl/export              # the embedded teacher and its captions
    python -m tools.sample out/sdxl-lora/export --prompts prompts.txt --bf16 \\
        --teacher stabilityai/stable-diffusion-xl-base-1.0

Writes to --out: samples.png (a row each; of videos still frames, with GIFs of the first two beside
it), result.json, and of images student/ and teacher/ with one for each prompt. A student is sampled
by the call in its model card.
"""
import json
import time

import torch

from teachers import embedded
from training.errors import Failure, is_out_of_memory, read_prompts, reason_of, run_main
from training.export import load_student
from training.loading import SAFE, left_out, pipeline_config
from training.model_index import read_index, stock_pipeline
from training.pictures import contact_sheet, grid
from training.scripts import a_count, folder_for, parser_for, zero_or_more
from training.show import in_words
from training.terminal import quiet, tell


def parse():
    p = parser_for(__doc__)
    p.add_argument("student", help="export/ of a finished run")
    p.add_argument("--teacher", help="local directory or hub id of its teacher (default: the "
                                     "embedded one of its kind)")
    p.add_argument("--prompts", help="text file, one a line (default: some captions of the "
                                     "embedded teacher)")
    p.add_argument("--seed", type=zero_or_more, default=0,
                   help="of the first prompt; the others count up")
    p.add_argument("--steps", type=a_count, default=25, help="of the teacher")
    p.add_argument("--guidance", type=float, help="of the teacher (default: its pipeline's own; "
                                                  "embedded ones': 3)")
    p.add_argument("--bf16", action="store_true")
    p.add_argument("--out", default="out/sample")
    return p.parse_args()


def embedded_teacher(student):
    """The embedded teacher (teachers.embedded.Embedded) of the student's kind. Raises Failure if
    there is none."""
    kind = type(student).__name__
    for teacher in embedded.of_medium("image") + embedded.of_medium("video"):
        if pipeline_config(teacher.folder)["_class_name"] == kind:
            return teacher
    raise Failure(f"no teacher that ships is a {kind}, as the student is; give --teacher and "
                  f"--prompts")


def load_teacher(path, dtype):
    """path: directory or hub id. Raises Failure if there is none."""
    path, flag = str(path), f"--teacher {path}"
    index = read_index(path, flag)
    kind = stock_pipeline(index["_class_name"], flag)
    try:
        pipe = kind.from_pretrained(path, **dict.fromkeys(left_out(index)), **SAFE)
    except Exception as e:                                      # every library has its own
        if is_out_of_memory(e):
            raise
        raise Failure(f"{flag}: not a whole pipeline of safetensors ({reason_of(e)}); download it "
                      f"again") from e
    return pipe.to(dtype)


def teacher_call(args, student_call):
    """What the teacher's pipeline is called with: the student's sizes, but not its way to
    sample."""
    sizes = ("height", "width", "num_frames", "max_sequence_length")
    call = {name: value for name, value in student_call.items() if name in sizes}
    call["num_inference_steps"] = args.steps
    weight = "guidance_scale"
    if "true_cfg_scale" in student_call:        # Qwen-Image, unguided without a negative prompt
        weight = "true_cfg_scale"
        call["negative_prompt"] = " "
    if args.guidance is not None:
        call[weight] = args.guidance
    return call


def draw(pipe, prompts, seed, call):
    """One prompt at a time, seeds counting up -> (samples [n,3,H,W] or [n,3,F,H,W] in [-1,1],
    seconds a sample, the first not counted)."""
    samples = []
    began = time.perf_counter()
    for i, prompt in enumerate(prompts):
        noise = torch.Generator().manual_seed(seed + i)
        out = pipe(prompt, **call, generator=noise, output_type="pt")
        if hasattr(out, "images"):
            sample = out.images                                                 # [1,3,H,W]
        else:
            sample = out.frames.transpose(1, 2)                                 # [1,3,F,H,W]
        samples.append(sample.float().cpu() * 2 - 1)
        if i == 0 and len(prompts) > 1:
            began = time.perf_counter()
    seconds = (time.perf_counter() - began) / max(len(prompts) - 1, 1)
    return torch.cat(samples), seconds


def save_images(pipe, samples, folder):
    folder.mkdir(exist_ok=True)
    for old in folder.glob("[0-9]" * 5 + ".png"):       # of a call with more prompts
        old.unlink()
    for i, image in enumerate(pipe.image_processor.postprocess(samples.clamp(-1, 1))):
        image.save(folder / f"{i:05d}.png")


def main():
    args = parse()
    quiet()
    out = folder_for(args.out)
    prompts = read_prompts(args.prompts) if args.prompts else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    student, student_call = load_student(args.student, dtype)
    if args.teacher is None:
        shipped = embedded_teacher(student)
        args.teacher = shipped.folder
        if args.guidance is None:
            args.guidance = shipped.settings["pair_guidance"]
    if prompts is None:
        prompts = embedded_teacher(student).prompts[::9]
    teacher = load_teacher(args.teacher, dtype)
    rows, result = {}, {}
    for name, pipe, call in (("teacher", teacher, teacher_call(args, student_call)),
                             ("student", student, student_call)):
        pipe.set_progress_bar_config(disable=True)
        samples, seconds = draw(pipe.to(device), prompts, args.seed, call)
        pipe.to("cpu")                                          # both need not fit at once
        steps = call["num_inference_steps"]
        print(f"{name}: {in_words(steps)}, {seconds:.3f} s a sample")
        rows[f"{name}, {in_words(steps)}"] = samples[:8]
        result[name] = dict(steps=steps, seconds=seconds)
        if samples.dim() == 4:
            save_images(pipe, samples, out / name)
    draw_picture = grid if samples.dim() == 4 else contact_sheet
    draw_picture(out / "samples.png", rows, prompts[:8])
    result.update(samples=len(prompts), device=str(device))
    (out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    tell(f"wrote {out}/samples.png and {out}/result.json")


if __name__ == "__main__":
    run_main(main)
