"""The table at the end of an embedded teacher's run: teacher, untrained and trained student, each
marked by the reader of its world."""
from ode import predict
from phased_dmd import generate
from training.batches import fixed_noise
from training.pairs import load_pairs
from training.ranks import is_rank_0
from training.show import in_words, student_sampler


def report_of_student(shipped, run, experts, schedule):
    """Print the table -> dict for result.json. Half of the pairs are the teacher's row; the other
    half are the reference that places are compared with. shipped: teachers.embedded.Embedded."""
    args, teacher = run.args, run.teacher
    _, x_0, prompt = load_pairs(args, run.out, teacher)
    half = len(prompt) // 2
    captions = [teacher.prompts[i] for i in prompt[:half]]
    reference = teacher.images(x_0[half:])
    x_T = fixed_noise(args, teacher, "report", half)

    def draw(sampler):
        return teacher.images(teacher.draw(sampler, x_T, prompt[:half], 128))

    stops = teacher.schedule.stops(args.steps)
    steps = in_words(args.steps)
    # without guidance is what a student of several steps starts from
    labels = dict(teacher=f"teacher, {args.pair_steps} steps, guided",
                  untrained=f"teacher, {steps}, guided",
                  unguided=f"teacher, {steps}, unguided",
                  student=f"student, {steps}")
    samples = dict(teacher=teacher.images(x_0[:half]),
                   untrained=draw(teacher.sampler(stops, args.pair_guidance)),
                   unguided=draw(teacher.sampler(stops, None)),
                   student=draw(student_sampler(args, experts, schedule)))
    table = {row: shipped.marks(samples[row], captions, reference) for row in labels}
    left = noise_left(teacher, experts, schedule, x_T, prompt[:half])
    if is_rank_0():
        print_table(f"{half} samples each", labels, table, shipped.columns)
        for k, share in enumerate(left, 1):
            print(f"expert {k} hands on x_s with {share:.3f} of the noise it should have")
    return dict(table, noise_left=left)


def print_table(title, labels, table, columns):
    """labels: {row: what it is called}. table: {row: its marks}. columns: {mark: its heading}."""
    print("\n" + title.ljust(31) + "".join(f"{heading:>16s}" for heading in columns.values()))
    for row, label in labels.items():
        print(label.ljust(30) + "".join(f"{table[row][mark]:16.3f}" for mark in columns))


def noise_left(teacher, experts, schedule, x_T, prompt):
    """For each expert but the last, how much noise is in the x_s it hands on, as a share of what
    its time asks for: the teacher, asked for the noise in x_s, should find a root mean square of 1.
    """
    shares = []
    for k, expert in enumerate(experts[:-1], 1):
        def to_x_s(x, cond, uncond):
            return generate(experts[:k], schedule, x, cond)

        def to_eps_hat(x, cond, uncond):
            return predict(teacher.net, schedule, x, expert.stops[-1], cond)[1]

        x_s = teacher.draw(to_x_s, x_T, prompt, 128)
        eps_hat = teacher.draw(to_eps_hat, x_s, prompt, 128)
        shares.append(eps_hat.square().mean().sqrt().item())
    return shares
