"""What a teacher's configuration may say: each number in it is asked once, where the teacher is
made. What is wrong is one line that names --model."""
import math

from training.errors import Failure, reason_of

LARGEST = 16384                 # pixels of a side
MOST_VALUES = 2**31             # of a latent
READER_LIMIT = 2**20            # tokens; tokenizers without a limit of their own say 10**30


def latent_of(family, pipe, net, args):
    """The family's Latent, from the flags or the model's own sizes. Raises Failure unless these are
    sizes."""
    try:
        latent = family.latent(pipe, net, args)
        numbers = [*latent.shape, latent.height, latent.width]
        is_sane = (all(type(n) is int and n > 0 for n in numbers)
                   and max(latent.height, latent.width) <= LARGEST
                   and math.prod(latent.shape) <= MOST_VALUES)
    except (TypeError, ValueError, AttributeError, ArithmeticError):
        is_sane = False
    if not is_sane:
        raise Failure(f"{whose(args)}: the sizes in its {family.network}'s config are none that "
                      f"can be drawn; give --height and --width, or download it again")
    return latent


def schedule_of(family, pipe, latent, args):
    """The family's Schedule. Raises Failure for a scheduler of an unknown kind, or one with fewer
    times than the run has steps, or no more than --dt."""
    try:
        schedule = family.schedule(pipe, latent)
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError, RuntimeError) as e:
        raise Failure(f"{whose(args)}: its scheduler's config is none that can be trained on "
                      f"({reason_of(e)}); download it again") from e
    if not (schedule.alpha.isfinite().all() and schedule.sigma.isfinite().all()):
        raise Failure(f"{whose(args)}: its scheduler's table is not finite; download it again")
    for name in ("steps", "pair_steps"):
        steps = getattr(args, name)
        if steps > schedule.T:
            raise Failure(f"{whose(args)}: its scheduler has {schedule.T} times, fewer than "
                          f"--{name.replace('_', '-')} {steps}; give fewer")
    if args.dt is not None and max(args.dt) >= schedule.T:
        raise Failure(f"{whose(args)}: its scheduler has {schedule.T} times, no more than --dt "
                      f"{max(args.dt)}; give a smaller one")
    return schedule


def clamp_tokenizers(pipe, args):
    """Let no tokenizer pad further than its text encoder can read. Raises Failure for a length that
    is none."""
    for name, tokenizer in pipe.components.items():
        if not name.startswith("tokenizer") or tokenizer is None:
            continue
        length = tokenizer.model_max_length
        if isinstance(length, bool) or not isinstance(length, (int, float)) or not length >= 1:
            raise Failure(f"{whose(args)}: {name} has a model_max_length of {length}; download it "
                          f"again")
        encoder = getattr(pipe, name.replace("tokenizer", "text_encoder"), None)
        most = getattr(getattr(encoder, "config", None), "max_position_embeddings", None)
        if not isinstance(most, int):
            most = READER_LIMIT                             # T5's, which is told a length
        tokenizer.model_max_length = int(min(length, most))
    # SD3's pipeline noted it when it was made
    if hasattr(pipe, "tokenizer_max_length"):
        pipe.tokenizer_max_length = min(pipe.tokenizer_max_length, pipe.tokenizer.model_max_length)


def whose(args):
    return f"--model {args.model}"
