"""Pipelines of diffusers, from a directory or the hub: what one holds, and the whole of it."""
import json
from pathlib import Path

import torch

from training.errors import Failure, none_missing
from training.ranks import quiet

SAFE = dict(use_safetensors=True, trust_remote_code=False)      # loads nothing that runs


def pipeline_config(path, folder=""):
    """model_index.json of a pipeline, or the config of the component in one of its folders -> dict.
    From the disk, or else from the hub. Raises Failure if it is nowhere."""
    name = f"{folder}/config.json" if folder else "model_index.json"
    try:
        if Path(path).exists():
            return dict(json.loads((Path(path) / name).read_text()))
        from huggingface_hub import hf_hub_download, logging
        logging.set_verbosity(logging.CRITICAL)                 # it would tell of each retry
        return dict(json.loads(Path(hf_hub_download(path, name)).read_text()))
    except (OSError, ValueError, TypeError) as e:
        raise Failure(f"--model {path}: no such pipeline, here or on the hub; give a directory "
                      f"with a model_index.json, or a hub id") from e


def pipeline_class(path, families):
    """The class that a pipeline's model_index.json names. Raises Failure if there is none, or if it
    is none of `families`."""
    kind = pipeline_config(path).get("_class_name")
    if kind not in families:
        raise Failure(f"--model {path}: a {kind}; give a {' or a '.join(families)}")
    return kind


def left_out(args, path, kind):
    """Names of optional components that this run, or the pipeline's own directory, does without:
    SD3's T5."""
    if kind != "StableDiffusion3Pipeline":
        return []
    config = pipeline_config(path)
    return [name for name in ("text_encoder_3", "tokenizer_3") if args.no_t5 or not config[name][0]]


def load_pipeline(args, families, default, hollow=None):
    """The pipeline of --model, frozen, in float32, on the host.

    default: its path where --model is not given.
    hollow: "network" for a rank that gets its part of the weights from rank 0: no text encoders,
    and no weights in the network. "all", for a dry run: none in the VAE either. None: all of it.
    Raises Failure if there is no such pipeline, or not a whole one.
    """
    quiet()                                                     # before the imports, which print
    import diffusers
    path = str(args.model or default)
    kind = pipeline_class(path, families)
    given = {name: None for name in left_out(args, path, kind)}
    classes = {}
    for name, entry in pipeline_config(path).items():
        if isinstance(entry, list) and entry[0] and name not in given:
            classes[name] = entry[-1]
    if hollow:
        given.update(hollow_parts(path, classes, families[kind].network, hollow))
    extra = dict(add_watermarker=False) if "XL" in kind else {}
    try:
        given.update(text_encoders(path, {n: c for n, c in classes.items() if n not in given}))
        pipe = getattr(diffusers, kind).from_pretrained(path, **given, **extra, **SAFE)
        for name in classes:
            part = getattr(pipe, name)
            if name not in given and isinstance(part, torch.nn.Module):
                none_missing(f"{name}.{k}" for k, p in part.named_parameters() if p.is_meta)
        pipe.to(torch.float32)
    except Exception as e:                                      # every library has its own
        reason = str(e).split("\n")[0]
        raise Failure(f"--model {path}: not a whole pipeline of safetensors ({reason}); download "
                      f"it again") from e
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return pipe


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


def text_encoders(path, classes):
    """{component: text encoder}, loaded one by one to hear what a file lacks: transformers draws it
    at random, where diffusers leaves it empty."""
    import transformers
    encoders = {}
    for name, kind in classes.items():
        if name.startswith("text_encoder"):
            encoders[name], told = getattr(transformers, kind).from_pretrained(
                path, subfolder=name, output_loading_info=True, **SAFE)
            none_missing(f"{name}.{key}" for key in told["missing_keys"])
    return encoders
