"""What a pipeline's folder may name, and what it may ask for.

A folder that comes from a stranger is read as data. diffusers takes each component's library and
class from model_index.json, and before 0.42.1 it imports any module named there; the lines of a
model card are code. So both are checked before any of it reaches diffusers.
"""
import ast
import re
from pathlib import Path

from training.errors import Failure, reason_of
from training.folders import read_json
from training.terminal import quiet_hub

LIBRARIES = (None, "diffusers", "transformers")
# what a card's call may set: how the student samples, and how large; no switch of the library's
CALL = ("num_inference_steps", "guidance_scale", "true_cfg_scale", "sigmas", "height", "width",
        "num_frames", "max_sequence_length", "callback_on_step_end")


def read_index(path, name):
    """The model_index.json of a pipeline, from the disk or else from the hub -> dict. It names only
    what may be loaded. name: of the pipeline, for messages. Raises Failure."""
    index = read_config(path, "model_index.json", name)
    if not isinstance(index.get("_class_name"), str):
        raise Failure(f"{name}: model_index.json has no pipeline's name as its _class_name; "
                      f"download it again")
    for key, entry in index.items():
        if isinstance(entry, (list, tuple)):
            check_entry(key, entry, name)
    return index


def check_entry(key, entry, name):
    """Raises Failure unless a component's entry is [library, class], of a library that is
    trusted."""
    if len(entry) != 2 or not all(word is None or isinstance(word, str) for word in entry):
        raise Failure(f"{name}: {key} of model_index.json is no pair of a library and a class; "
                      f"download it again")
    library, kind = entry
    if library not in LIBRARIES:
        raise Failure(f"{name}: model_index.json takes {key} from {library}, which may be code of "
                      f"its own; only what diffusers and transformers hold is loaded")
    is_whole_folder = kind is not None and "Pipeline" in kind           # with an index of its own
    is_open = re.match(r"Auto(?!encoder)", kind or "")                  # its class is named there
    if (library is None) != (kind is None) or is_whole_folder or is_open:
        raise Failure(f"{name}: model_index.json names {kind} as {key}, which may be code of its "
                      f"own; download the pipeline again")


def read_config(path, file, name):
    """A JSON file of a pipeline, from the disk or else from the hub -> dict. Raises Failure."""
    try:
        if Path(path).exists():
            return read_json(Path(path) / file)
        from huggingface_hub import hf_hub_download
        quiet_hub()
        return read_json(hf_hub_download(path, file))
    except Exception as e:                              # of any class: a proxy's, a connection's
        raise Failure(f"{name}: no such pipeline, here or on the hub ({reason_of(e)}); give a "
                      f"directory with a {file}, or a hub id") from e


def classes_in(index):
    """{component: name of its class} of the components that are there."""
    return {name: entry[1] for name, entry in index.items()
            if isinstance(entry, (list, tuple)) and entry[0]}


def stock_pipeline(kind, name):
    """The pipeline class of diffusers of this name. Raises Failure if there is none."""
    import diffusers
    found = getattr(diffusers, kind, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        raise Failure(f"{name}: a {kind}, which is no pipeline of diffusers")
    return found


def refuse_missing_components(index, needed, optional, name):
    """Raises Failure unless a pipeline has what is needed. Components that read prompts are, unless
    they are optional."""
    readers = [key for key in index if key.startswith(("text_encoder", "tokenizer"))]
    there = classes_in(index)
    for key in (*needed, *readers):
        if key not in there and key not in optional:
            raise Failure(f"{name}: not a whole pipeline of safetensors (its {key} is null in "
                          f"model_index.json, or missing); download it again")


# -------------------------------------------------------------------------------------- model card

def read_card(folder, index):
    """The call in an exported student's model card -> (components it does without, arguments of the
    call, whether it switches experts). Raises ValueError, KeyError, IndexError or SyntaxError for a
    card of another kind, and Failure for one that asks for more than our own cards do."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[0]
    calls = {}                  # name -> keywords of its first call, the pipeline's
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).split(".")[-1]
            calls.setdefault(name, {k.arg: k.value for k in node.keywords})
    without = []
    for key, value in calls["from_pretrained"].items():
        if key not in index or not isinstance(index[key], list) or ast.unparse(value) != "None":
            refuse_keyword(folder, key)
        without.append(key)
    call = {}
    for key, value in calls["pipe"].items():
        if key not in CALL:
            refuse_keyword(folder, key)
        if key != "callback_on_step_end":
            call[key] = ast.literal_eval(value)
    return without, call, "callback_on_step_end" in calls["pipe"]


def refuse_keyword(folder, key):
    keyword = "**" if key is None else f"{key}="
    raise Failure(f"{folder}: its README.md asks for {keyword}, which no model card of ours does; "
                  f"give the export/ folder of a finished run")
