"""export/: the student as a pipeline that stock diffusers samples, with a model card; and the way
back, from such a folder to a pipeline."""
import inspect
import json
import shutil
from copy import deepcopy
from pathlib import Path

import torch

from training.checkpoints import newest_checkpoint
from training.errors import (
    Failure, cure_of, first_not_finite, is_out_of_memory, number_of, reason_of)
from training.folders import read_json, read_manifest, replace, sync
from training.loading import SAFE, left_out, load_pipeline, pipeline_config
from training.lora import Lora
from training.model_index import read_card, read_index, stock_pipeline
from training.teacher import text_arguments
from training.terminal import printable

RESULT = dict(                  # medium -> (where a pipeline leaves its samples, how one is saved)
    image=("images", 'sample.save("sample.png")'),
    video=("frames",
           'from diffusers.utils import export_to_gif\nexport_to_gif(sample, "sample.gif")'))
MADE_BY = dict(reflow="rectified flow (A1)", adp="ADP", adm="ADM")


def next_experts(lengths):
    """Experts of so many steps each -> after each step, which of them (from 0) does the next; after
    the last step, the first again."""
    expert_of_step = [k for k, n in enumerate(lengths) for _ in range(n)]
    return expert_of_step[1:] + [0]


def refuse_without_callback(args, family):
    """Raises Failure for Phased DMD on a pipeline that could not switch its experts: one whose call
    does not name the callback would swallow it, and let the first expert do all steps."""
    if args.method != "phased_dmd" or args.phases == 1 or family.second_network is not None:
        return
    import diffusers
    call = getattr(diffusers, family.pipeline).__call__
    if "callback_on_step_end" not in inspect.signature(call).parameters:
        raise Failure(f"--method phased_dmd: {family.pipeline} takes no callback_on_step_end, so "
                      f"its experts could not be switched; choose another method, or --phases 1")


# ---------------------------------------------------------------------------------------- to export

def export(run, families, experts, schedule, weights):
    """Write export/, all or nothing: under another name, which is then changed. weights: of each
    expert, {name: tensor}; of a LoRA's none. Raises Failure where it cannot be written, or where
    the student has weights that are not finite."""
    folder = run.out.path / "export"
    tmp = run.out.path / "export.tmp"
    for expert, values in zip(experts, weights):
        wrong = first_not_finite(values or dict(expert.net.named_parameters()))
        if wrong:
            raise Failure(f"{folder}: the student's {wrong} is not finite, so nothing was exported")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        write_pipeline(run, families, experts, schedule, weights, tmp)
        for file in tmp.rglob("*"):
            sync(file)
        replace(tmp, folder)
    except Exception as e:                              # of any class: safetensors has its own
        shutil.rmtree(tmp, ignore_errors=True)
        if number_of(e) is None:                        # not the disk
            raise
        raise Failure(f"{folder}: could not be written ({e}); {cure_of(e)}, then --resume "
                      f"auto") from e


def write_pipeline(run, families, experts, schedule, weights, folder):
    """The student as a pipeline, and its model card, into a folder.

    Further experts lie beside the first (unet_2, ...), or where the pipeline itself has a second
    network (Wan 2.2), and experts.json has their boundaries. LoRAs also go to lora/.
    """
    args, teacher, family = run.args, run.teacher, run.teacher.family
    # anew: the run freed its text encoders, and may have kept bf16
    pipe = load_pipeline(args, families)
    students = []
    for k, (expert, values) in enumerate(zip(experts, weights), 1):
        if hasattr(expert.net, "units"):
            load_both(pipe, family, values)
            continue
        is_second = teacher.unit_of(expert.stops) == 1
        network = deepcopy(getattr(pipe, family.second_network if is_second else family.network))
        if isinstance(expert.net, Lora):
            merge_lora(expert.net, pipe, folder / "lora" / (str(k) if len(experts) > 1 else ""),
                       family.network, network)
        else:
            network.load_state_dict(values)
        students.append(network)
    boundaries = [float(schedule.timestep[expert.stops[-1]]) for expert in experts[:-1]]
    if students:
        setattr(pipe, family.network, students[0])
    if len(students) == 2 and family.second_network is not None:
        pipe.register_modules(**{family.second_network: students.pop()})
        # between the timesteps of the first's last step and of the second's first
        last = float(schedule.timestep[experts[0].stops[-2]])
        pipe.register_to_config(boundary_ratio=(boundaries[0] + last) / 2 / teacher.schedule.T)
    is_straight = schedule is teacher.line
    pipe.scheduler, call = family.student_scheduler(pipe.scheduler, is_straight,
                                                    schedule.stops(args.steps))
    pipe.save_pretrained(folder)
    for k, network in enumerate(students[1:], 2):
        network.save_pretrained(folder / f"{family.network}_{k}")
    call.update(call_arguments(args, family))
    lengths = [len(expert.stops) - 1 for expert in experts]
    facts = dict(network=family.network, steps=lengths, switch=len(students) > 1,
                 boundaries=boundaries, call=call)
    if len(experts) > 1:
        (folder / "experts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    missing = left_out(pipeline_config(args.model), args.no_t5)
    network_class = type(getattr(pipe, family.network)).__name__
    card = model_card(run, folder.with_suffix(""), is_straight, missing, network_class, facts)
    (folder / "README.md").write_text(card, encoding="utf-8")


def load_both(pipe, family, values):
    """The weights of a student that is two networks, as its teacher is, into the pipeline's."""
    for part, component in (("high", family.network), ("low", family.second_network)):
        own = {name.removeprefix(f"{part}."): value for name, value in values.items()
               if name.startswith(f"{part}.")}
        getattr(pipe, component).load_state_dict(own)


def merge_lora(lora, pipe, folder, prefix, network):
    """Save a LoRA, and add it to a network's weights through the very file that a user would
    load."""
    lora.save(pipe, folder, prefix)
    network.load_lora_adapter(folder, prefix=prefix, weight_name="pytorch_lora_weights.safetensors")
    network.fuse_lora()
    network.unload_lora()


def call_arguments(args, family):
    """What the exported pipeline is called with, besides the prompt and what its scheduler
    wants."""
    sizes = dict(height=args.height, width=args.width, num_frames=args.frames)
    call = {name: value for name, value in sizes.items() if value}
    call.update(text_arguments(args))
    call.update(family.unguided or dict(guidance_scale=args.cfg_student or 0))
    return call


def iterations_of(run, stage):
    """How many iterations a stage has had: in this run, or before it."""
    if stage in run.done:
        return run.done[stage]
    path = newest_checkpoint(run.out.path / "checkpoints", stage)
    if path is not None:
        return read_manifest(path)["iteration"]
    if stage.startswith("phase"):               # all further stages: of a run in another --out
        return run.args.iterations_phase
    return run.args.iterations_adm if stage == "adm" else run.args.iterations_adp


def how_it_was_made(run, after_adp):
    args = run.args
    if args.method == "phased_dmd":
        counts = dict.fromkeys(iterations_of(run, stage) for stage in run.stages)
        return f"{' and '.join(map(str, counts))} iterations a phase of Phased DMD"
    stages = list(run.stages)
    if stages == ["adm"] and after_adp:
        stages = ["adp", "adm"]                 # one by one, by --stage
    parts = []
    for stage in stages:
        name = "DMD" if stage == "adm" and args.method == "dmd" else MADE_BY[stage]
        parts.append(f"{iterations_of(run, stage)} iterations of {name}")
    return ", ".join(parts)


def quoted(text):
    """A text as Python writes it, without the marks that end a model card's code."""
    return repr(str(text)).replace("`", "\\x60")


def model_card(run, folder, after_adp, missing, network_class, facts):
    """What the student is, and the lines that sample it. missing: components it has not."""
    args, family = run.args, run.teacher.family
    pipeline, name, lengths = family.pipeline, facts["network"], facts["steps"]
    path = quoted(folder)
    without = "".join(f", {component}=None" for component in missing)
    call = ", ".join(f"{key}={value!r}" for key, value in facts["call"].items())
    imports, switch, callback = f"from diffusers import {pipeline}", "", ""
    if facts["switch"]:                     # the pipeline asks after each step who does the next
        imports += f", {network_class}"
        switch = (f"experts = [pipe.{name}] + [{network_class}.from_pretrained({path}, "
                  f"subfolder=f\"{name}_{{k}}\") for k in range(2, {len(lengths) + 1})]\n"
                  f"def switch(pipe, step, t, kwargs):\n"
                  f"    pipe.{name} = experts[{next_experts(lengths)}[step]].to(pipe.device)\n"
                  f"    return kwargs\n")
        callback = ", callback_on_step_end=switch"
    result, save = RESULT[family.medium]
    model = printable(args.model).replace("`", "'")
    made = how_it_was_made(run, after_adp)
    low, high = args.guidance
    if args.method in ("adp", "reflow"):        # all they know of guidance is in the pairs
        low = high = args.pair_guidance
    own_guidance = "" if args.cfg_student is None else ", and the student takes its own besides"
    return f"""---
library_name: diffusers
pipeline_tag: text-to-{family.medium}
---
A {args.steps}-step student of `{model}`: {made}, seed {args.seed}. Guidance
is distilled in (weights {low:g} to {high:g}){own_guidance}.

```python
{imports}
pipe = {pipeline}.from_pretrained({path}{without})
{switch}sample = pipe({quoted(run.teacher.prompts[0])}, {call}{callback}).{result}[0]
{save}
```
"""


# ----------------------------------------------------------------------------------- and back again

def load_student(folder, dtype=torch.float32):
    """An exported student -> (pipeline, the arguments of the call in its model card; its experts
    switch as the card's do). Its folder may come from a stranger. Raises Failure if it is none, or
    asks for what no export of ours does."""
    folder = Path(folder)
    try:
        if not folder.is_dir():
            raise ValueError("no such folder")
        index = read_index(folder, str(folder))
        without, call, switches = read_card(folder, index)
        kind = stock_pipeline(index["_class_name"], str(folder))
        pipe = kind.from_pretrained(folder, **dict.fromkeys(without), **SAFE)
        pipe.to(dtype)
        if switches:
            call["callback_on_step_end"] = expert_switch(pipe, folder, index, dtype)
    except Exception as e:                              # every library has its own
        if is_out_of_memory(e):
            raise
        raise Failure(f"{folder}: not an exported student; give the export/ folder of a finished "
                      f"run ({reason_of(e)})") from e
    return pipe, call


def expert_switch(pipe, folder, index, dtype):
    """-> the callback that puts the next step's expert into the pipeline. Raises ValueError for an
    experts.json that is none."""
    facts = read_json(folder / "experts.json")
    name, lengths = facts["network"], facts["steps"]
    if name not in ("unet", "transformer") or name not in index:
        raise ValueError(f"experts.json: no network {name}")
    if not all(type(n) is int and 0 < n <= 1000 for n in lengths):
        raise ValueError(f"experts.json: steps are {lengths}")
    first = getattr(pipe, name)
    experts = [first]
    for k in range(2, len(lengths) + 1):
        expert = type(first).from_pretrained(folder, subfolder=f"{name}_{k}", use_safetensors=True)
        experts.append(expert.to(dtype))
    after = next_experts(lengths)

    def switch(pipe, step, t, kwargs):                      # asked after each step
        setattr(pipe, name, experts[after[step]].to(pipe.device))
        return kwargs
    return switch
