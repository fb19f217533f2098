"""The pixel discriminator's backbones: the vision half of a SAM model (the paper), or a DINOv2
(ablation A2)."""
from pathlib import Path

import torch
import torch.nn.functional as F

from discriminators import Taps, to_grid
from training.errors import Failure, first_not_finite, none_missing, reason_of
from training.folders import read_json
from training.terminal import quiet


def quarters(layers):
    """Layers 3, 6, 9 and 12 of a ViT of twelve (B.1); of deeper ones the same four places."""
    return [layers[len(layers) * k // 4 - 1] for k in (1, 2, 3, 4)]


def vision_taps(net):
    """Taps on a vision encoder of transformers, SAM's or a DINOv2, for images [B,3,H,W] in [-1,1].
    Raises ValueError for another network."""
    device = next(net.parameters()).device
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225], device=device).view(3, 1, 1)

    def prepare(images):
        """To the encoder's own size, with ImageNet's mean and deviation."""
        side = net.config.image_size
        images = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True,
                               align_corners=False)
        return ((images + 1) / 2 - mean) / deviation

    def sam_map(x, output, cond):
        return output.permute(0, 3, 1, 2)       # channels last

    def dinov2_map(x, output, cond):
        patch = net.config.patch_size
        grid = x.shape[2] // patch, x.shape[3] // patch
        return to_grid(output[:, 1:], *grid)                # the first token is CLS

    kind = type(net).__name__
    if kind == "SamVisionModel":
        return Taps(net, quarters(net.vision_encoder.layers), sam_map, prepare)
    if kind == "Dinov2Model":
        return Taps(net, quarters(net.encoder.layer), dinov2_map, prepare)
    raise ValueError(f"no taps are known for a {kind}; known are SamVisionModel and Dinov2Model")


def vision_class(path):
    """transformers' class of the encoder there, by its config alone. Raises Failure if it is
    neither a SAM nor a DINOv2."""
    quiet()
    from transformers import AutoConfig, Dinov2Model, SamVisionModel
    try:
        if Path(path).exists():
            read_json(Path(path) / "config.json")
        kind = str(AutoConfig.from_pretrained(path, trust_remote_code=False).model_type)
    except Exception as e:                                  # transformers has several of its own
        raise Failure(f"--pixel-backbone {path}: no such model, here or on the hub "
                      f"({reason_of(e)}); give a SAM or DINOv2 directory or hub id") from e
    classes = {"sam": SamVisionModel, "sam_vision_model": SamVisionModel, "dinov2": Dinov2Model}
    if kind not in classes:
        raise Failure(f"--pixel-backbone {path}: a {kind} model; give a SAM or a DINOv2")
    return classes[kind]


def load_vision_encoder(path, device):
    """The encoder in float32 on `device`. Raises Failure if it is neither a SAM nor a DINOv2, or
    not whole."""
    kind = vision_class(path)
    try:
        net, told = kind.from_pretrained(path, use_safetensors=True, output_loading_info=True)
        none_missing(told["missing_keys"])
        wrong = first_not_finite(net.state_dict())
        if wrong:
            raise ValueError(f"{wrong} holds values that are not finite")
        return net.to(device, torch.float32)
    except Exception as e:                                  # transformers has several of its own
        raise Failure(f"--pixel-backbone {path}: not a whole model of safetensors "
                      f"({reason_of(e)}); download it again") from e
