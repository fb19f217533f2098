"""What a stranger's model, vision encoder or exported student may not do: run code, or end a run in
a traceback."""
import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import pipelines
from families.family import of_medium
from families.vision import vision_class
from limits import within
from tools.sample import embedded_teacher, load_teacher
from training.checkpoints import save_checkpoint
from training.errors import Failure
from training.export import how_it_was_made, load_student, model_card
from training.flags import parse
from training.loading import left_out, load_pipeline, pipeline_config
from training.output import Output
from training.stage import Run
from training.teacher import Teacher


@pytest.fixture
def model(small, tmp_path):
    """A copy of the small pipeline, to be spoilt. Its large files are links."""
    copy = tmp_path / "model"
    shutil.copytree(small / "model", copy, copy_function=os.link)
    return copy


def change(file, **values):
    """Change a JSON file of a copy; None takes a key out."""
    content = json.loads(file.read_text(encoding="utf-8"))
    content.update(values)
    content = {key: value for key, value in content.items() if value is not None}
    replace(file, json.dumps(content))


def replace(file, text):
    """And not write into it: it is a link."""
    file.unlink(missing_ok=True)
    file.write_text(text, encoding="utf-8")


def arguments(model, *flags):
    before = sys.argv
    sys.argv = ["train_sdxl.py", "--model", str(model), "--prompts", "x", *flags]
    try:
        return parse("", of_medium("image"), ())[0]
    finally:
        sys.argv = before


def make_teacher(model, out, *flags):
    args = arguments(model, "--pair-steps", "2", *flags)
    output = Output(out, None)
    families = of_medium("image")
    return Teacher(args, output, ["a red circle"], [], torch.device("cpu"), families)


# ------------------------------------------------------------------------- 2, 14: model_index.json

@pytest.mark.parametrize("entry", [
    ["evil", "Evil"], ["models.nice.payload", "X"], ["diffusers.utils", "X"],
    ["diffusers", "DiffusionPipeline"], ["diffusers", "StableDiffusionXLPipeline"],
    ["diffusers", "AutoModel"], ["transformers", "AutoModel"], [None, "Evil"],
    ["transformers", None]])
@pytest.mark.parametrize("name", ["unet", "feature_extractor"])
def test_an_index_that_names_code(small, tmp_path, name, entry):
    """Refused before diffusers sees it: before 0.42.1 diffusers imports any module named there."""
    shutil.copy(small / "model" / "model_index.json", tmp_path)
    change(tmp_path / "model_index.json", **{name: entry})
    for load in (pipeline_config, lambda path: load_teacher(str(path), torch.float32),
                 lambda path: load_student(path)):
        with pytest.raises(Failure, match=rf"{tmp_path}: .*may be code of its own"):
            load(tmp_path)


@pytest.mark.parametrize("values", [
    dict(_class_name=["evil.py", "Evil"]), dict(_class_name={}), dict(_class_name=None),
    dict(_class_name="UNet2DConditionModel"), dict(unet=[]), dict(unet=["diffusers"]),
    dict(unet=["diffusers", ["UNet2DConditionModel"]]), dict(unet=[1, 2]), dict(unet=[None, None]),
    dict(vae=None), dict(tokenizer=[None, None]), dict(text_encoder_2=[None, None]),
    dict(scheduler=["diffusers", "UNet2DConditionModel"])])
def test_an_index_of_no_pipeline(model, tmp_path, values):
    change(model / "model_index.json", **values)
    with pytest.raises(Failure, match=f"--model {model}: "):
        make_teacher(model, tmp_path / "out")


@pytest.mark.parametrize("text", ["[" * 100000 + "]" * 100000, "5", "[]", "{", "\udcff"])
def test_an_index_that_is_no_json_object(model, text):
    (model / "model_index.json").unlink()
    (model / "model_index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(Failure, match="no such pipeline"):
        pipeline_config(model)


def test_an_index_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "model_index.json")
    with within(5), pytest.raises(Failure, match="no such pipeline"):
        pipeline_config(tmp_path)


def test_a_student_is_drawn_beside_the_embedded_teacher_of_its_kind():
    """The SD3 that ships has no third text encoder."""
    teacher = embedded_teacher(pipelines.sd3(blocks=1))
    assert teacher.folder.name == "sd3"
    assert load_teacher(teacher.folder, torch.float32).text_encoder_3 is None
    with pytest.raises(Failure, match="is a SimpleNamespace.*--teacher and --prompts"):
        embedded_teacher(SimpleNamespace())


def test_an_sd3_without_a_third_encoder_is_one_that_was_left_out():
    index = dict(_class_name="StableDiffusion3Pipeline", text_encoder=["transformers", "X"])
    assert left_out(index) == ["text_encoder_3", "tokenizer_3"]


# ------------------------------------------------------------------------------- 14: configurations

SCHEDULER = "scheduler/scheduler_config.json"
TOKENIZER = "tokenizer/tokenizer_config.json"


@pytest.mark.parametrize("file, values, words", [
    ("unet/config.json", dict(sample_size=None), "sizes"),
    ("unet/config.json", dict(sample_size=[8, 8]), "sizes"),
    ("unet/config.json", dict(sample_size="8"), "sizes"),
    ("unet/config.json", dict(sample_size=0), "sizes"),
    ("unet/config.json", dict(sample_size=-8), "sizes"),
    ("unet/config.json", dict(sample_size=10**9), "sizes"),
    (SCHEDULER, dict(num_train_timesteps=10), "has 10 times, fewer than --pair-steps 25"),
    (SCHEDULER, dict(prediction_type="magic"), "scheduler"),
    (SCHEDULER, dict(beta_start=float("nan")), "scheduler"),
    (TOKENIZER, dict(model_max_length=-5), "model_max_length of -5")])
def test_numbers_that_are_none(model, tmp_path, file, values, words):
    change(model / file, **values)
    with pytest.raises(Failure, match=f"--model {model}: .*{words}"):
        make_teacher(model, tmp_path / "out", "--pair-steps", "25")


def test_a_tokenizer_without_a_limit_is_given_its_encoders(model, tmp_path):
    """transformers says 10**30 for none."""
    change(model / TOKENIZER, model_max_length=10**30)
    change(model / "text_encoder/config.json", max_position_embeddings=16)
    teacher = make_teacher(model, tmp_path / "out")
    assert teacher.cond(torch.tensor([0]))["encoder_hidden_states"].shape[1] == 16


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_not_finite(model, part):
    file, = (model / part).glob("*.safetensors")
    state = load_file(file)
    last = sorted(state)[-1]
    state[last] = torch.full_like(state[last], float("nan"))
    file.unlink()
    save_file(state, file, metadata=dict(format="pt"))
    with pytest.raises(Failure, match=rf"--model {model}: .*{part}\..*not finite"):
        load_pipeline(SimpleNamespace(model=str(model), no_t5=False), of_medium("image"))


# ---------------------------------------------------------------------------- 15: --pixel-backbone

@pytest.mark.parametrize("text", [
    "[" * 100000 + "]" * 100000, "5", '{"model_type": ["sam"]}', '{"model_type": {}}'])
def test_a_vision_encoder_of_another_kind(tmp_path, text):
    replace(tmp_path / "config.json", text)
    with pytest.raises(Failure, match=f"--pixel-backbone {tmp_path}: "):
        vision_class(str(tmp_path))


# -------------------------------------------------------------------------- 1, 20, 21: model cards

CARD = """---
library_name: diffusers
---
```python
pipe = StableDiffusionXLPipeline.from_pretrained('x'{load})
sample = pipe('a red circle', num_inference_steps=1{call}).images[0]
```
"""


@pytest.mark.parametrize("load, call", [
    (", trust_remote_code=True", ""), (", custom_pipeline='evil'", ""), (", safety_checker=1", ""),
    (", use_safetensors=False", ""), (", use_safetensors=None", ""), (", **{'a': 1}", ""),
    ("", ", output_type='latent'"), ("", ", **{'a': 1}"), ("", ", cross_attention_kwargs={}"),
    ("", ", height=open('x')")])
def test_a_card_that_asks_for_more(model, load, call, monkeypatch, tmp_path):
    """Its own code, another pipeline, pickles: any keyword that no card of ours has."""
    mark = tmp_path / "ran"
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n", encoding="utf-8")
    (model / "pipeline.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n", encoding="utf-8")
    replace(model / "README.md", CARD.format(load=load, call=call))
    with pytest.raises(Failure, match="not an exported student"):
        load_student(model)
    assert not mark.exists()


def test_a_card_may_leave_components_out(model):
    """As an SD3's without its third text encoder does."""
    replace(model / "README.md", CARD.format(load=", feature_extractor=None", call=", height=8"))
    pipe, call = load_student(model)
    assert call == dict(num_inference_steps=1, height=8)
    assert type(pipe).__name__ == "StableDiffusionXLPipeline"


@pytest.mark.parametrize("facts", [
    dict(network="__class__", steps=[1, 1]), dict(network="vae", steps=[1, 1]),
    dict(network="unet", steps=[10**9]), dict(network="unet", steps="x"), dict(network="unet"), [],
    dict(network="unet", steps=[1, 1])])
def test_experts_that_are_none(model, facts):
    card = CARD.format(load="", call=", callback_on_step_end=switch")
    replace(model / "README.md", card)
    replace(model / "experts.json", json.dumps(facts))
    with pytest.raises(Failure, match="not an exported student"):
        load_student(model)


@pytest.fixture
def run(tmp_path):
    """As much of a run as a model card tells."""
    args = SimpleNamespace(model="x", steps=1, seed=0, guidance=[6.0, 8.0], cfg_student=None,
                           method="dmdx", iterations_adm=2, iterations_adp=2)
    family = SimpleNamespace(pipeline="StableDiffusionXLPipeline", medium="image")
    teacher = SimpleNamespace(prompts=["a red circle"], family=family)
    out = SimpleNamespace(path=tmp_path)
    return Run(args, out, teacher, None, ["adp", "adm"], None, None, None)


HOSTILE = "x\n```python\nprint('evil')\n```\n`"


def test_a_card_of_hostile_names(run, model):
    """A --model and a first prompt that hold fences: the card's code is ours, and reads back."""
    run.args.model = HOSTILE
    run.teacher.prompts = [HOSTILE]
    facts = dict(network="unet", steps=[1], switch=False, call=dict(num_inference_steps=1))
    card = model_card(run, model, False, [], "UNet2DConditionModel", facts)
    assert card.count("\n```") == 2 and "\nprint('evil')" not in card
    code = card.split("\n```python\n")[1].split("```")[0]
    assert len(code.splitlines()) == 4
    calls = []
    scope = dict(pipe=lambda prompt, **call: calls.append(prompt))
    line, = (line for line in code.splitlines() if line.startswith("sample = "))
    with pytest.raises(AttributeError):                 # of the picture that there is not
        exec(line, scope)
    assert calls == [HOSTILE]
    replace(model / "README.md", card)
    assert load_student(model)[1] == dict(num_inference_steps=1)


@pytest.mark.parametrize("method, said", [
    ("dmdx", "weights 6 to 8"), ("adp", "weights 3 to 3"), ("reflow", "weights 3 to 3")])
def test_a_card_says_which_guidance_is_in_the_student(run, method, said):
    """Where no real score was at work, that of the pairs."""
    run.args.method = method
    run.args.pair_guidance = 3.0
    run.stages = ["reflow"] if method == "reflow" else ["adp"]
    facts = dict(network="unet", steps=[1], switch=False, call={})
    assert said in model_card(run, "x", False, [], "UNet2DConditionModel", facts)


def test_a_card_says_what_was_trained(run, tmp_path):
    """Not what a later --iterations asked for."""
    net = torch.nn.Linear(1, 1)
    facts = dict(stage="adp", iteration=4, global_iter=4)
    save_checkpoint(tmp_path / "checkpoints", facts, dict(generator=net), ())
    run.done["adm"] = 5
    assert how_it_was_made(run, after_adp=True) == "4 iterations of ADP, 5 iterations of ADM"
