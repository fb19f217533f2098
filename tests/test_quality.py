"""tools/quality.py's CLIP score, held against the two halves of a CLIP."""
import json

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import pipelines
from cli import Run, failed, succeeded

PROMPTS = ["a dog", "two small cats", "rain"]


def small_clip():
    """-> (model, processor), random."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor
    torch.manual_seed(0)
    tok = pipelines.clip_tokenizer()
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = dict(sizes, vocab_size=len(tok), max_position_embeddings=32,
                eos_token_id=tok.eos_token_id, bos_token_id=tok.bos_token_id)
    vision = dict(sizes, image_size=32, patch_size=8)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    images = CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    return model, CLIPProcessor(images, tok)


@torch.no_grad()
def cosine(model, processor, image, prompt):
    """By the two halves of a CLIP, called one by one; times 100."""
    pixels = processor.image_processor(image, return_tensors="pt")
    seen = model.visual_projection(model.vision_model(**pixels).pooler_output)
    words = processor.tokenizer(prompt, return_tensors="pt")
    said = model.text_projection(model.text_model(**words).pooler_output)
    return 100 * torch.cosine_similarity(seen, said).item()


def test_clip_score_is_the_cosine(tmp_path):
    def run(*flags):
        return Run("-m", "tools.quality", tmp_path / "images", *flags, "--out",
                   tmp_path / "out").wait()

    model, processor = small_clip()
    clip, prompts = tmp_path / "clip", tmp_path / "prompts.txt"
    model.save_pretrained(clip)
    processor.save_pretrained(clip)
    prompts.write_text("\n".join(PROMPTS))
    (tmp_path / "images").mkdir()
    expected = []
    for i, prompt in enumerate(PROMPTS):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        image.save(tmp_path / "images" / f"{i}.png")
        expected.append(cosine(model, processor, image, prompt))
    succeeded(run("--clip", clip, "--prompts", prompts))
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["pictures"] == 3
    assert abs(found["clip"] - sum(expected) / 3) < 1e-3, (found, expected)
    prompts.write_text("a dog")
    failed(run("--clip", clip, "--prompts", prompts), 1, "1 prompts for 3 pictures")
    failed(run("--lpips", tmp_path / "none"), 1, "--lpips", "not there")
    file = clip / "model.safetensors"
    state = {k: v for k, v in load_file(file).items() if "visual_projection" not in k}
    save_file(state, file, metadata=dict(format="pt"))
    prompts.write_text("\n".join(PROMPTS))
    failed(run("--clip", clip, "--prompts", prompts), 1, "visual_projection")
