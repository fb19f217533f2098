"""Folders of tensors that are whole or not there: checkpoints, pairs, embeddings, samples.

A folder holds safetensors files and manifest.json. The manifest has the facts about the run that
wrote it, each file's size and SHA-256, and a hash of itself, its seal. The folder is written under
another name, synced to the disk and then renamed, so a kill or a full disk leaves no half of it. A
seal is a plain hash: it finds damage, not forgery. A checkpoint that an attacker made is read as
any other; only JSON and safetensors are ever read, neither of which runs code.
"""
import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from training.errors import Failure, cure_of, number_of


def sha256(path):
    """The hash of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path):
    """A file with one JSON object -> dict. Raises OSError or ValueError if it is none."""
    if Path(path).exists() and not Path(path).is_file():        # a FIFO would be waited for
        raise ValueError(f"{path} is not a file")
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply")
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def sync(path):
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def seal(facts):
    """The hash that a manifest carries of the rest of itself."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def delete(path):
    """Delete a file, a folder, or a link; of a link not what it leads to."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def remove(path):
    """Delete a folder, if it is there. It is renamed first: no half of it may be left under its
    name."""
    if os.path.lexists(path):
        os.rename(path, f"{path}.old.tmp")
        delete(f"{path}.old.tmp")


def replace(tmp, path):
    """Give the finished folder `tmp` the name `path`, and delete what had it. A kill leaves either
    of them under that name, or both under others: then finish_replacing is for them."""
    old = Path(f"{path}.old.tmp")
    if os.path.lexists(path):
        os.rename(path, old)
    os.rename(tmp, path)
    sync(Path(path).parent)
    if os.path.lexists(old):
        delete(old)


def finish_replacing(path):
    """What `replace` had begun for this name when it was killed between its two renames."""
    tmp = Path(f"{path}.tmp")
    if tmp.exists() and Path(f"{path}.old.tmp").exists() and not Path(path).exists():
        os.rename(tmp, path)


# ----------------------------------------------------------------------------------------- writing

def on_host(tensors):
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def write_folder(path, files, facts, gather=on_host):
    """Write tensors {file: {name: tensor}} and a manifest to the folder `path`, all or nothing. It
    replaces what was there. Raises Failure, naming path and bytes, if it cannot be written.

    gather: brings the tensors of a file to the host, one file after the other: a checkpoint of
    SDXL's is 38 GiB.
    """
    path = Path(path)
    tmp = Path(f"{path}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        _write_files(tmp, files, facts, gather)
        replace(tmp, path)
    except Exception as e:              # of any class: safetensors has its own for a full disk
        shutil.rmtree(tmp, ignore_errors=True)
        if number_of(e) is None:        # not the disk
            raise
        size = sum(tensor.numel() * tensor.element_size()
                   for tensors in files.values() for tensor in tensors.values())
        raise Failure(f"{path}: could not write {size:,} bytes ({e}); {cure_of(e)}, then "
                      f"--resume auto") from e


def _write_files(tmp, files, facts, gather):
    """The files, then the manifest, synced to the disk."""
    tmp.mkdir(parents=True)
    stamps = {}
    for name, tensors in files.items():
        whole = {key: tensor.contiguous() for key, tensor in gather(tensors).items()}
        save_file(whole, tmp / name)
        del whole                       # before the next is gathered
        sync(tmp / name)
        stamps[name] = dict(bytes=(tmp / name).stat().st_size, sha256=sha256(tmp / name))
    facts = dict(facts, files=stamps)
    manifest = json.dumps(dict(facts, seal=seal(facts)), indent=1)
    (tmp / "manifest.json").write_text(manifest, encoding="utf-8")
    sync(tmp / "manifest.json")
    sync(tmp)


# ----------------------------------------------------------------------------------------- reading

def read_manifest(path):
    """The facts of a folder that write_folder wrote; its files, which may be large, are not looked
    at. Raises Failure if its manifest is missing, damaged, or not to be read."""
    path = Path(path)
    try:
        facts = read_json(path / "manifest.json")
        if facts.pop("seal") != seal(facts):
            raise ValueError
        facts["files"].items()
        return facts
    except PermissionError as e:
        raise Failure(f"{path}: {e.strerror}; make it readable")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Failure(f"{path}: not whole (its manifest.json is missing or damaged); delete {path} "
                      f"and go on with --resume auto")


def verify(path):
    """The facts of a folder that write_folder wrote, once every file in it is found whole. Raises
    Failure naming the file that is not."""
    path = Path(path)
    facts = read_manifest(path)
    for name, stamp in facts["files"].items():
        file = path / Path(name).name           # a name with ../ in it stays inside
        if not _is_intact(file, stamp):
            raise Failure(f"{file}: missing, truncated or altered; delete {path} and go on with "
                          f"--resume auto")
    return facts


def _is_intact(file, stamp):
    """Whether a file has the size and hash of its stamp, and is safetensors."""
    try:
        if not file.is_file() or file.stat().st_size != stamp["bytes"]:
            return False
        if sha256(file) != stamp["sha256"]:
            return False
        safe_open(file, "pt")                   # raises for a pickle: that has a hash, too
        return True
    except PermissionError as e:
        raise Failure(f"{file}: {e.strerror}; make it readable")
    except (OSError, SafetensorError, TypeError, KeyError):
        return False


def same_facts(path, found, facts):
    """Raises Failure if a folder comes from a run that differs from this one.

    found: the folder's facts. facts: this run's; only the keys in it are compared.
    """
    for key in facts:
        if found.get(key) != facts[key]:
            raise Failure(f"{path}: its {key} is {found.get(key)}, this run's is {facts[key]}; "
                          f"choose the run it belongs to, or remove it")


def open_tensors(path, facts, name):
    """Open one file of a folder, once the folder is found whole and of a run with these facts. Its
    tensors stay on the disk until they are asked for (safetensors' safe_open)."""
    same_facts(path, verify(path), facts)
    return safe_open(path / name, "pt")


def read_folder(path):
    """-> (facts, {file: {name: tensor}}). Raises Failure if it is not whole."""
    facts = verify(path)
    return facts, {name: load_file(Path(path) / Path(name).name) for name in facts["files"]}
