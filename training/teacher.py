"""The teacher: a pipeline taken apart for distillation, and the embeddings of the prompts."""
import hashlib
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch

from ode import Schedule, join_batches, sample
from training.draws import to_device
from training.errors import Failure, first_not_finite
from training.folders import open_tensors, write_folder
from training.loading import load_pipeline
from training.model_checks import clamp_tokenizers, latent_of, schedule_of
from training.networks import (
    decode_in_bf16, place, recompute_activations, tensors_to, units_of)
from training.ranks import barrier, broadcast, is_rank_0, world
from training.sharding import fsdp_arguments
from training.terminal import warn

PER_FILE = 256                  # prompts, or pairs, in a file
PIXELS_AT_ONCE = 2**20          # of the pictures that are decoded together
UNTILED = 2**17                 # pixels of a frame up to which a video is decoded in one piece


def text_arguments(args):
    return dict(max_sequence_length=args.text_tokens) if args.text_tokens else {}


class Teacher:
    """A frozen pipeline as the stages use it.

    net: the network, F_phi. units: the one or two networks it consists of, noisier first.
    backbone: of the latent discriminator, the last of them.
    schedule: net's. line: ADP's straight one.
    latent: families.family.Latent; shape: of one latent, without the batch.
    prompts: what is trained on. look_at: what is only drawn, numbered on after the prompts.
    facts: what pairs and checkpoints of this teacher are marked with.
    fsdp: fully_shard's arguments, or None.
    ranks_draw_together: each pass through the network needs all ranks.
    The text encoders are freed once the prompts are embedded.
    """

    def __init__(self, args, out, prompts, look_at, device, families):
        self.fsdp = fsdp_arguments(args.fsdp, args.cpu_offload, args.bf16, device)
        self.ranks_draw_together = bool(self.fsdp) or args.context_parallel > 1
        is_hollow = self.fsdp and not is_rank_0()
        pipe = load_pipeline(args, families, hollow="network" if is_hollow else None,
                             dtype=torch.bfloat16 if args.bf16 else torch.float32)
        self.family = families[type(pipe).__name__]
        self.prompts = prompts
        self.look_at = look_at
        self.device = device
        self.vae = pipe.vae.to(device)
        self.net = self.family.net_of(pipe)
        self.units = units_of(self.net)
        self.backbone = self.units[-1]
        self.latent = latent_of(self.family, pipe, self.net, args)
        self.shape = self.latent.shape
        self.schedule = schedule_of(self.family, pipe, self.latent, args).to(device)
        clamp_tokenizers(pipe, args)
        self.line = Schedule.straight(self.schedule.T, self.family.last_timestep).to(device)
        self.constant = tensors_to(device, self.family.constant(pipe, self.latent))
        # for the message of an iteration that fails: its name, its prompts
        self.at = ""
        self.asked = []
        self.facts = dict(teacher=self.mark(), prompts=hash_of(prompts), shape=list(self.shape),
                          size=[self.latent.height, self.latent.width],
                          text_tokens=args.text_tokens)
        self.embed(args, pipe, out)
        for name in pipe.components:
            if name.startswith("text_encoder"):
                setattr(pipe, name, None)                       # before the network needs the room
        if args.context_parallel > 1:
            self.family.context_parallel(self.net, args.context_parallel)
        for net in self.units:
            place(args, net, self.fsdp, device)
        if args.bf16:
            decode_in_bf16(self.vae)
        if args.grad_checkpointing and self.family.last_timestep is not None:
            recompute_activations(self.vae)                     # ADP looks through it

    def mark(self):
        """A hash of up to 2,000 values from each of the network's tensors."""
        some = []
        for p in self.net.parameters():
            some.append(p.detach().flatten()[::1 + p.numel() // 1000].float())
        if some[0].is_meta:                                     # rank 0 has the weights
            return broadcast(None)
        return broadcast(hashlib.sha256(torch.cat(some).cpu().numpy().tobytes()).hexdigest()[:16])

    def unit_of(self, stops):
        """Which of its units, counted from 0, the teacher would use for the last of these steps."""
        if len(self.units) == 1:
            return 0
        return int(float(self.schedule.timestep[stops[-2]]) < self.net.boundary)

    # ------------------------------------------------------------------------------------ prompts

    @torch.no_grad()
    def embed(self, args, pipe, out):
        """prompts/: embeddings in files, made by all ranks together (by rank 0, the only one with
        text encoders, of a sharded run), then read from the disk as they are needed."""
        self.warn_of_long(args, pipe)
        rank, ranks = (world()[0], 1) if self.fsdp else world()
        jobs = embedding_files(out.path / "prompts", self.prompts, self.look_at)
        mine = []
        for number, job in enumerate(jobs):
            if number % ranks == rank and not job.path.exists():
                mine.append(job)
        for name, part in pipe.components.items():
            if mine and name.startswith("text_encoder") and part is not None:
                part.to(self.device)
        for job in mine:
            conds = []
            for i in range(0, len(job.prompts), 64):
                cond, uncond = self.family.encode(pipe, job.prompts[i:i + 64], self.latent,
                                                  self.device, empty=job.is_empty,
                                                  **text_arguments(args))
                conds.append(uncond if job.is_empty else cond)
            tensors = flat(reduce(join_batches, conds))
            wrong = first_not_finite(tensors)
            if wrong:
                raise Failure(f"--model {args.model}: its text encoders give values that are not "
                              f"finite ({wrong} of {job.path.name}); download it again")
            write_folder(job.path, {"embeddings.safetensors": tensors}, self.facts_of(job))
        barrier()
        self.files = {}                                         # number of its first prompt -> file
        for job in jobs:
            file = open_tensors(job.path, self.facts_of(job), "embeddings.safetensors")
            if job.is_empty:
                self.empty = {name: self.as_input(file.get_tensor(name)) for name in file.keys()}
            else:
                self.files[job.first] = file

    def facts_of(self, job):
        if job.is_look_at:
            return dict(self.facts, prompts=hash_of(self.look_at))
        return self.facts

    def warn_of_long(self, args, pipe):
        """Say once how many prompts the text encoder will cut."""
        if not is_rank_0():
            return
        most = self.family.most_tokens
        if args.text_tokens and not args.no_t5:
            most = args.text_tokens
        tokenizer = pipe.tokenizer
        if getattr(pipe, "tokenizer_3", None) is not None:      # SD3's T5, which reads further
            tokenizer = pipe.tokenizer_3
        limit = min(tokenizer.model_max_length, most)
        prompts = self.prompts + self.look_at
        long = sum(len(tokenizer(prompt).input_ids) > limit for prompt in prompts)
        if long:
            warn(f"{long} of {len(prompts)} prompts are longer than {limit} tokens and are cut "
                 f"there")

    def prompt(self, i):
        """The text of prompt i; those to look at are numbered on after the others."""
        n = len(self.prompts)
        return self.prompts[i] if i < n else self.look_at[i - n]

    def cond(self, index):
        """LongTensor [B] of prompts -> the network's conditioning for that batch."""
        index = index.tolist()
        self.asked += index
        places = [self.place_of(i) for i in index]
        tensors = {}
        for name in places[0][0].keys():
            parts = [file.get_slice(name)[row:row + 1] for file, row in places]
            tensors[name] = self.as_input(torch.cat(parts))
        return nested(tensors) | self.constant

    def place_of(self, i):
        """Where prompt i's embedding lies, (file, row); those to look at have their own files."""
        n = len(self.prompts)
        if i < n:
            row = i % PER_FILE
        else:
            row = (i - n) % PER_FILE
        return self.files[i - row], row

    def as_input(self, embedding):
        """An embedding of any type as the network takes it: in float32, if it is a number."""
        if embedding.is_floating_point():
            embedding = embedding.float()
        return to_device(embedding, self.device)

    def uncond(self, n):
        """The conditioning of the empty prompt, n times."""
        repeated = {name: v.expand(n, *v.shape[1:]) for name, v in self.empty.items()}
        return nested(repeated) | self.constant

    # ------------------------------------------------------------------------------------ samples

    def sampler(self, stops, w, order=1):
        """The teacher's own, under guidance of weight w (None: without): sampler(x_T, cond, uncond)
        -> x_0."""
        if w == 1:                                              # the same, at half the cost
            w = None

        def run(x, cond, uncond):
            return sample(self.net, self.schedule, x, stops, cond, uncond, w, order)
        return run

    @torch.no_grad()
    def draw(self, sampler, x_T, index, batch):
        """Any number of latents on the host through sampler(x_T, cond, uncond), `batch` at a time
        on the device. index: LongTensor of their prompts."""
        drawn = []
        for x, i in zip(x_T.split(batch), index.split(batch)):
            drawn.append(sampler(x.to(self.device), self.cond(i), self.uncond(len(x))).cpu())
        return torch.cat(drawn)

    def decode(self, x0):
        """Latents [B,...] -> images [B,3,H,W] or videos [B,3,F,H,W] in [-1,1], with gradient."""
        return self.family.decode(self.vae, x0, self.latent)

    @torch.no_grad()
    def images(self, x0):
        """The same on the host, of any number of latents: PIXELS_AT_ONCE, since a decoder takes
        2 GiB for a megapixel. A video of CogVideoX in one piece takes 15, in tiles 4."""
        batch = min(8, max(1, PIXELS_AT_ONCE // (self.latent.height * self.latent.width)))
        if self.family.medium == "video":
            batch = 1
            if self.latent.height * self.latent.width > UNTILED:
                self.vae.enable_tiling()
        return torch.cat([self.decode(x.to(self.device)).cpu() for x in x0.split(batch)])


# --------------------------------------------------------------------------- embeddings on the disk

class Embeddings(NamedTuple):
    """One file of embeddings."""
    path: Path
    prompts: list
    first: int = 0                  # the number of its first prompt
    is_empty: bool = False          # of the empty prompt
    is_look_at: bool = False


def embedding_files(folder, prompts, look_at):
    """The files of all prompts, of those to look at, and of the empty one."""
    files = []
    for first in range(0, len(prompts), PER_FILE):
        path = folder / f"{first // PER_FILE:05d}"
        files.append(Embeddings(path, prompts[first:first + PER_FILE], first))
    files.append(Embeddings(folder / "empty", prompts[:1], is_empty=True))
    for first in range(0, len(look_at), PER_FILE):
        path = folder / f"look-at-{hash_of(look_at)}-{first // PER_FILE:05d}"
        files.append(Embeddings(path, look_at[first:first + PER_FILE], len(prompts) + first,
                                is_look_at=True))
    return files


def hash_of(prompts):
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]


def flat(cond, prefix=""):
    """{"a": {"b": x}} -> {"a/b": x}, as a file keeps it; `nested` is the way back."""
    values = {}
    for name, value in cond.items():
        if isinstance(value, dict):
            values.update(flat(value, f"{prefix}{name}/"))
        else:
            values[prefix + name] = value
    return values


def nested(values):
    cond = {}
    for name, value in values.items():
        *path, last = name.split("/")
        inner = cond
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return cond
