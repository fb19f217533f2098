"""The metrics of the papers, for folders of real images, by the libraries that are kept for them,
from local weights. All of them are optional.

    pip install torchmetrics torch-fidelity torchvision     # for FID and LPIPS, not for CLIP
    python -m tools.quality out/sample/student --prompts prompts.txt \\
        --clip clip-vit-large-patch14
    python -m tools.quality out/sample/student --reference out/sample/teacher \\
        --inception weights-inception-2015-12-05-6726825d.pth
    python -m tools.quality out/seed0 out/seed1 --lpips alexnet-owt-7be5be79.pth

The last takes the same prompts with other seeds: diversity. Pictures are taken in the order of
their names; tools/sample.py writes them in the order of its prompts.
"""
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from training.errors import Failure, none_missing, read_prompts, reason_of, run_main
from training.scripts import folder_for, parser_for
from training.terminal import quiet


def files_of(folder):
    """Folder -> its PNG or JPEG files, by name. Raises Failure if there are none."""
    endings = (".png", ".jpg", ".jpeg")
    files = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in endings)
    if not files:
        raise Failure(f"{folder}: no PNG or JPEG files there; give a folder of pictures")
    return files


def pictures(files):
    """Files -> PIL images; a batch of them, as thousands do not fit in memory. Raises Failure
    naming one that is not whole."""
    from PIL import Image
    images = []
    for file in files:
        try:
            images.append(Image.open(file).convert("RGB"))
        except OSError as e:
            raise Failure(f"{file}: not a whole picture ({e}); remove it or draw it again") from e
    return images


def tensor(files):
    """Files of pictures of one size -> uint8 [B,3,H,W]."""
    arrays = [torch.from_numpy(np.array(image)) for image in pictures(files)]   # [H,W,3] each
    return torch.stack([array.permute(2, 0, 1) for array in arrays])


@torch.no_grad()
def clip_score(files, prompts, folder, batch=32):
    """Mean cosine between picture and prompt, times 100 (the papers' CLIP score). Raises Failure
    unless there is one prompt for each picture."""
    from transformers import CLIPModel, CLIPProcessor
    if len(prompts) != len(files):
        raise Failure(f"--prompts: {len(prompts)} prompts for {len(files)} pictures; "
                      f"give one a picture")
    try:
        model, told = CLIPModel.from_pretrained(folder, output_loading_info=True)
        none_missing(told["missing_keys"])
        processor = CLIPProcessor.from_pretrained(folder)
    except Exception as e:                                  # transformers has several of its own
        raise Failure(f"--clip {folder}: not a whole CLIP model ({reason_of(e)}); "
                      f"download it again") from e
    scores = []
    for i in range(0, len(files), batch):
        inputs = processor(text=prompts[i:i + batch], images=pictures(files[i:i + batch]),
                           return_tensors="pt", padding=True, truncation=True)
        out = model(**inputs)
        cosines = (out.image_embeds * out.text_embeds).sum(1)   # [B], both are of unit length
        scores += (100 * cosines).tolist()
    return sum(scores) / len(scores)


@torch.no_grad()
def fid(files, reference, weights, batch=32):
    """Frechet distance between two sets of pictures in Inception's features. Sets of under some
    thousands are not comparable with published values."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    metric = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=weights)
    for is_real, side in ((False, files), (True, reference)):
        for i in range(0, len(side), batch):
            metric.update(tensor(side[i:i + batch]), real=is_real)
    return metric.compute().item()


@torch.no_grad()
def lpips_diversity(folders, weights):
    """Mean LPIPS between pictures of one prompt drawn with different seeds (ADM Tab. 6): larger is
    more diverse. folders: [[file of each prompt], ...], one for each seed."""
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity
    if len({len(files) for files in folders}) > 1 or len(folders) < 2:
        raise Failure("--lpips: give two folders or more, one a seed, with as many pictures each")
    distances = []
    with tempfile.TemporaryDirectory() as home:     # torchvision looks for its weights nowhere else
        checkpoints = Path(home) / "hub" / "checkpoints"
        checkpoints.mkdir(parents=True)
        shutil.copy(weights, checkpoints / "alexnet-owt-7be5be79.pth")
        os.environ["TORCH_HOME"] = home
        for of_prompt in zip(*folders):
            x = tensor(of_prompt).float() / 127.5 - 1                           # [seeds,3,H,W]
            for i in range(len(x)):
                for j in range(i):
                    distance = learned_perceptual_image_patch_similarity(
                        x[i:i + 1], x[j:j + 1], net_type="alex")
                    distances.append(distance.item())
    return sum(distances) / len(distances)


def parse():
    """Raises Failure for weights that are not there."""
    p = parser_for(__doc__)
    p.add_argument("images", nargs="+", help="folder of pictures; for --lpips one a seed")
    p.add_argument("--prompts", help="text file, one a picture")
    p.add_argument("--clip", metavar="FOLDER", help="a CLIP model of transformers (papers: their "
                                                    "choice differs; say which you used)")
    p.add_argument("--reference", metavar="FOLDER", help="pictures to compare with")
    p.add_argument("--inception", metavar="FILE", help="torch-fidelity's weights of Inception")
    p.add_argument("--lpips", metavar="FILE", help="torchvision's weights of AlexNet")
    p.add_argument("--out", default="out/quality", help="folder for result.json")
    args = p.parse_args()
    alone = bool(args.clip) != bool(args.prompts) or bool(args.inception) != bool(args.reference)
    if alone or not (args.clip or args.inception or args.lpips):
        p.error("give --clip with --prompts, --inception with --reference, or --lpips")
    for flag in ("clip", "inception", "lpips"):
        path = getattr(args, flag)
        if path and not Path(path).exists():
            raise Failure(f"--{flag} {path}: not there; download it first")
    return args


def measure(args):
    """-> {metric: value} of those that were asked for."""
    folders = [files_of(folder) for folder in args.images]
    result = dict(pictures=len(folders[0]))
    try:
        if args.clip:
            result["clip"] = clip_score(folders[0], read_prompts(args.prompts), args.clip)
        if args.inception:
            result["fid"] = fid(folders[0], files_of(args.reference), args.inception)
        if args.lpips:
            result["lpips"] = lpips_diversity(folders, args.lpips)
    except ImportError as e:
        raise Failure(f"{e.name or e}: missing; "
                      f"pip install torchmetrics torch-fidelity torchvision") from e
    return result


def main():
    args = parse()
    quiet()
    out = folder_for(args.out)
    result = measure(args)
    for name, value in result.items():
        form = "12.5g" if isinstance(value, float) else "12d"
        print(f"{name:10s}{value:{form}}")
    (out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
