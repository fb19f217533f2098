"""export/: the student as a pipeline that stock diffusers samples, with a model card; and the way
back, from such a folder to a pipeline."""
import ast
import inspect
import json
from copy import deepcopy
from pathlib import Path

import torch

from training.errors import Failure
from training.loading import left_out, load_pipeline
from training.lora import Lora
from training.teacher import text_arguments

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

def export(run, families, default, experts, schedule, weights):
    """Write export/. weights: of each expert, {name: tensor}; of a LoRA's none.

    Further experts lie beside the first (unet_2, ...), or where the pipeline itself has a second
    network (Wan 2.2), and experts.json has their boundaries. LoRAs also go to lora/.
    """
    args, teacher, family = run.args, run.teacher, run.teacher.family
    folder = run.out.path / "export"
    pipe = load_pipeline(args, families, default)       # anew: the run freed its text encoders, and
    students = []                                       # may have kept bf16
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
        (folder / "experts.json").write_text(json.dumps(facts, indent=1))
    missing = left_out(args, str(args.model or default), family.pipeline)
    network = type(getattr(pipe, family.network)).__name__
    (folder / "README.md").write_text(model_card(run, folder, missing, network, facts))


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


def how_it_was_made(run):
    args = run.args
    if args.method == "phased_dmd":
        return f"{args.iterations_phase} iterations a phase of Phased DMD"
    parts = []
    for stage in run.stages:
        name = "DMD" if stage == "adm" and args.method == "dmd" else MADE_BY[stage]
        count = args.iterations_adm if stage == "adm" else args.iterations_adp
        parts.append(f"{count} iterations of {name}")
    return ", ".join(parts)


def model_card(run, folder, missing, network, facts):
    """What the student is, and the lines that sample it. missing: components it has not. network:
    the name of its class."""
    args, family = run.args, run.teacher.family
    pipeline, name, lengths = family.pipeline, facts["network"], facts["steps"]
    path = repr(str(folder))
    without = "".join(f", {component}=None" for component in missing)
    call = ", ".join(f"{key}={value!r}" for key, value in facts["call"].items())
    imports, switch, callback = f"from diffusers import {pipeline}", "", ""
    if facts["switch"]:                     # the pipeline asks after each step who does the next
        imports += f", {network}"
        switch = (f"experts = [pipe.{name}] + [{network}.from_pretrained({path}, "
                  f"subfolder=f\"{name}_{{k}}\") for k in range(2, {len(lengths) + 1})]\n"
                  f"def switch(pipe, step, t, kwargs):\n"
                  f"    pipe.{name} = experts[{next_experts(lengths)}[step]]\n"
                  f"    return kwargs\n")
        callback = ", callback_on_step_end=switch"
    result, save = RESULT[family.medium]
    model = args.model or "the embedded teacher of captioned shapes"
    own_guidance = "" if args.cfg_student is None else ", and the student takes its own besides"
    return f"""---
library_name: diffusers
pipeline_tag: text-to-{family.medium}
---
A {args.steps}-step student of `{model}`: {how_it_was_made(run)}, seed {args.seed}. Guidance
is distilled in (weights {args.guidance[0]:g} to {args.guidance[1]:g}){own_guidance}.

```python
{imports}
pipe = {pipeline}.from_pretrained({path}{without})
{switch}sample = pipe({run.teacher.prompts[0]!r}, {call}{callback}).{result}[0]
{save}
```
"""


# ----------------------------------------------------------------------------------- and back again

def load_student(folder, dtype=torch.float32):
    """An exported student -> (pipeline, the arguments of the call in its model card; its experts
    switch as the card's do). Raises Failure if it is none."""
    import diffusers
    folder = Path(folder)
    try:
        code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        calls = {}              # name -> keywords of its first call, the pipeline's
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).split(".")[-1]
                calls.setdefault(name, {k.arg: k.value for k in node.keywords})
        switches = calls["pipe"].pop("callback_on_step_end", None)
        load = {key: ast.literal_eval(value) for key, value in calls["from_pretrained"].items()}
        call = {key: ast.literal_eval(value) for key, value in calls["pipe"].items()}
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, use_safetensors=True, **load)
        pipe.to(dtype)
    except (OSError, IndexError, KeyError, ValueError, SyntaxError) as e:
        raise Failure(f"{folder}: not an exported student; give the export/ folder of a finished "
                      f"run ({str(e).splitlines()[0]})") from e
    if switches:
        call["callback_on_step_end"] = expert_switch(pipe, folder, dtype)
    return pipe, call


def expert_switch(pipe, folder, dtype):
    """-> the callback that puts the next step's expert into the pipeline."""
    facts = json.loads((folder / "experts.json").read_text())
    name, lengths = facts["network"], facts["steps"]
    first = getattr(pipe, name)
    experts = [first]
    for k in range(2, len(lengths) + 1):
        expert = type(first).from_pretrained(folder, subfolder=f"{name}_{k}")
        experts.append(expert.to(dtype))
    after = next_experts(lengths)

    def switch(pipe, step, t, kwargs):                      # asked after each step
        setattr(pipe, name, experts[after[step]].to(pipe.device))
        return kwargs
    return switch
