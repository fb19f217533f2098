"""Pipelines of diffusers, from a directory or the hub: what one holds, and the whole of it."""
import warnings

import torch

from training.errors import (
    Failure, first_not_finite, is_out_of_memory, none_missing, reason_of)
from training.model_index import classes_in, refuse_missing_components, read_config, read_index
from training.terminal import quiet

SAFE = dict(use_safetensors=True, trust_remote_code=False)      # loads nothing that runs
OPTIONAL = ("text_encoder_3", "tokenizer_3")                    # SD3's T5


def pipeline_config(path, folder=""):
    """model_index.json of a pipeline, or the config of the component in one of its folders -> dict.
    From the disk, or else from the hub. Raises Failure if it is nowhere, or names what may not be
    loaded."""
    if folder:
        return read_config(path, f"{folder}/config.json", f"--model {path}")
    return read_index(path, f"--model {path}")


def pipeline_class(path, families):
    """The class that a pipeline's model_index.json names. Raises Failure if there is none, or if it
    is none of `families`."""
    kind = pipeline_config(path)["_class_name"]
    if kind not in families:
        raise Failure(f"--model {path}: a {kind}; give a {' or a '.join(families)}")
    return kind


def left_out(index, no_t5=False):
    """Names of optional components that this run (--no-t5), or the pipeline itself, does without:
    SD3's T5. index: its model_index.json."""
    if index["_class_name"] != "StableDiffusion3Pipeline":
        return []
    return [name for name in OPTIONAL if no_t5 or name not in classes_in(index)]


def load_pipeline(args, families, hollow=None, dtype=torch.float32):
    """The pipeline of --model, frozen, on the host. dtype: of its weights, as they are read: each
    rank reads them all.

    hollow: "network" for a rank that gets its part of the weights from rank 0: no text encoders,
    and no weights in the network. "all", for a dry run: none in the VAE either. None: all of it.
    Raises Failure if there is no such pipeline, or not a whole one.
    """
    quiet()                                                     # before the imports, which print
    import diffusers
    path = args.model
    kind = pipeline_class(path, families)
    index = pipeline_config(path)
    needed = ("vae", "scheduler", "tokenizer", "text_encoder", families[kind].network)
    refuse_missing_components(index, needed, OPTIONAL, f"--model {path}")
    given = {name: None for name in left_out(index, args.no_t5)}
    classes = {name: c for name, c in classes_in(index).items() if name not in given}
    extra = dict(add_watermarker=False) if "XL" in kind else {}
    try:
        if hollow:
            given.update(hollow_parts(path, classes, families[kind].network, hollow))
        encoders = {n: c for n, c in classes.items() if n not in given}
        given.update(text_encoders(path, encoders, dtype))
        # newer ones call it dtype, older ones know this name alone
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
        pipe = getattr(diffusers, kind).from_pretrained(path, torch_dtype=dtype, **given, **extra,
                                                        **SAFE)
        check_weights(pipe, classes, given)
    except Exception as e:                                      # every library has its own
        if is_out_of_memory(e):
            raise
        raise Failure(f"--model {path}: not a whole pipeline of safetensors ({reason_of(e)}); "
                      f"download it again") from e
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return pipe


def check_weights(pipe, classes, given):
    """Raises ValueError unless every weight that was to be loaded was, and is finite."""
    for name in classes:
        part = getattr(pipe, name)
        if not isinstance(part, torch.nn.Module):
            continue
        if name not in given:
            none_missing(f"{name}.{key}" for key, p in part.named_parameters() if p.is_meta)
        key = first_not_finite(dict(part.named_parameters()))
        if key:
            raise ValueError(f"{name}.{key} holds values that are not finite")


def hollow_parts(path, classes, network, hollow):
    """{component: None for a text encoder, a network without weights for what is distilled}."""
    import diffusers
    from accelerate import init_empty_weights
    parts = {}
    with init_empty_weights():
        for name, kind in classes.items():
            if name.startswith("text_encoder"):
                parts[name] = None
            elif name.startswith(network) or (name == "vae" and hollow == "all"):
                parts[name] = getattr(diffusers, kind).from_config(pipeline_config(path, name))
    return parts


def text_encoders(path, classes, dtype):
    """{component: text encoder}, loaded one by one to hear what a file lacks: transformers draws it
    at random, where diffusers leaves it empty."""
    import transformers
    encoders = {}
    for name, kind in classes.items():
        if name.startswith("text_encoder"):
            encoders[name], told = getattr(transformers, kind).from_pretrained(
                path, subfolder=name, output_loading_info=True, dtype=dtype, **SAFE)
            none_missing(f"{name}.{key}" for key in told["missing_keys"])
    return encoders
