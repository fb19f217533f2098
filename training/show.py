"""The pictures of a run while it trains: student beside teacher, for fixed prompts and seeds."""
import torch

from ode import sample
from phased_dmd import generate
from training.batches import fixed_noise
from training.pictures import contact_sheet, grid
from training.ranks import is_rank_0


def in_words(steps):
    return "1 step" if steps == 1 else f"{steps} steps"


def student_sampler(args, experts, schedule):
    """The student's own sampler(x_T, cond, uncond) -> x_0."""
    def run(x, cond, uncond):
        if args.cfg_student is None:
            return generate(experts, schedule, x, cond)
        (net, stops), = experts
        return sample(net, schedule, x, stops, cond, uncond, args.cfg_student)
    return run


def prompts_to_show(args, teacher):
    """Numbers of the prompts that are drawn, LongTensor: those of --look-at one after the other, or
    some of those that are trained on."""
    n = len(teacher.prompts)
    if teacher.look_at:
        count = args.samples or len(teacher.look_at)
        return n + torch.arange(count) % len(teacher.look_at)
    is_video = teacher.family.medium == "video"
    count = args.samples or (2 if is_video else 8)
    # neighbours in a file are often alike; but where seven divides n, steps of it come back early
    stride = 1 if n % 7 == 0 else 7
    return torch.arange(count) * stride % n


def pictures(args, out, teacher):
    """-> show(file, experts, schedule), which draws the picture and returns what was drawn of the
    student: dict(x_T, prompt, images) on the host."""
    index = prompts_to_show(args, teacher)
    x_T = fixed_noise(args, teacher, "pictures", len(index))
    rows = {}                                       # label -> images; the teacher's are kept

    def draw(sampler):
        return teacher.images(teacher.draw(sampler, x_T, index, args.batch_size))

    def teacher_rows():
        schedule, w = teacher.schedule, args.pair_guidance
        full = teacher.sampler(schedule.stops(args.pair_steps), w, order=2)
        few = teacher.sampler(schedule.stops(args.steps), w)
        rows[f"teacher, {args.pair_steps} second-order steps"] = draw(full)
        rows[f"teacher, {in_words(args.steps)}"] = draw(few)

    def show(file, experts, schedule):
        if not is_rank_0() and not teacher.ranks_draw_together:
            return None
        if not rows:
            teacher_rows()
        images = draw(student_sampler(args, experts, schedule))
        rows[f"student, {in_words(args.steps)}"] = images
        if is_rank_0():
            captions = [teacher.prompt(i) for i in index.tolist()]
            if teacher.family.medium == "image":
                grid(out.path / file, rows, captions)
            else:
                contact_sheet(out.path / file, rows, captions, videos=len(captions))
        return dict(x_T=x_T, prompt=index, images=images)
    return show
