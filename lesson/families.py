"""The three teachers that ship, each distilled by ADM, DMD and Phased DMD: one table, family by
family.

    python -m lesson.families           # two runs at a time, one thread each

Every row is a run of a training script with the flags that stand here and no others, seed 0. Writes
lesson/results/families.json. Finished runs are kept: a second call goes on where the first was
stopped, and the seconds of a run that was stopped are those since.
"""
import json
import time
from typing import NamedTuple

from lesson.runs import parse_with_folders, result_of, run_script, side_by_side
from teachers import embedded
from training.checkpoints import newest_checkpoint
from training.errors import run_main
from training.folders import read_manifest
from training.scripts import parser_for


class Rows(NamedTuple):
    """What is trained of one family."""
    title: str
    teacher: embedded.Embedded
    script: str
    students: dict                  # {row: its flags}


DMD_OF_VIDEOS = "--method dmd --ttur 5 --iterations-adm 200 --warm-up 0 --lr-generator 5e-5"
FAMILIES = {
    "sdxl": Rows("SDXL", embedded.SDXL, "train_sdxl.py", {
        "adm": "",
        "dmd": "--method dmd",
        "phased": "--method phased_dmd",
    }),
    "sd3": Rows("SD3", embedded.SD3, "train_sdxl.py", {
        "adm": "--model teachers/sd3",
        "dmd": "--model teachers/sd3 --method dmd --ttur 5 --iterations-adm 400",
        "phased": "--model teachers/sd3 --method phased_dmd",
    }),
    "cogvideox": Rows("CogVideoX", embedded.COGVIDEOX, "train_cogvideox.py", {
        "adm": "--steps 4",
        "adm_cfg": "--steps 4 --cfg-student 2",
        "dmd": f"--steps 4 {DMD_OF_VIDEOS}",
        "phased": "--method phased_dmd",
        "adm_8": "",
        "adm_2": "--steps 2",
        "dmd_2": f"--steps 2 {DMD_OF_VIDEOS}",
    }),
}
LABELS = dict(adm="ADM", adm_2="ADM", adm_8="ADM", adm_cfg="ADM w/ CFG", dmd="DMD", dmd_2="DMD",
              phased="Phased DMD")
LABELS_AFTER_ADP = dict(adm="DMDX", dmd="ADP, DMD")     # of students of one step


def folder_of(out, family, row):
    return out / f"{family}-{row}"


def train(out, name, row):
    """One student, if that is not done yet."""
    family = FAMILIES[name]
    folder = folder_of(out, name, row)
    run_script(folder, family.script, family.students[row].split())
    found = result_of(folder)
    print(f"{time.strftime('%H:%M:%S')}  {name:10s} {row:8s} accuracy "
          f"{found['student']['accuracy']:.3f}   {found['seconds']:.0f} s", flush=True)


def train_all(out, names, at_a_time):
    """Every student of these families."""
    with side_by_side(at_a_time) as pool:
        futures = [pool.submit(train, out, name, row)
                   for name in names for row in FAMILIES[name].students]
        for future in futures:
            future.result()


def entry(label, steps, evaluations, marks, seconds=0.0):
    """One row. seconds: of training, none for a teacher's."""
    return dict(label=label, steps=steps, evaluations=evaluations, **marks, seconds=seconds)


def rows_of(out, name):
    """{row: {label, steps, network evaluations, marks, seconds}} of a family whose runs are done.
    For every number of steps that its students have, first the teacher's rows: guided, and as the
    students of several steps start, unguided."""
    rows = {}
    for row in FAMILIES[name].students:
        folder = folder_of(out, name, row)
        found = result_of(folder)
        stage = "phase2" if row == "phased" else "adm"
        flags = read_manifest(newest_checkpoint(folder / "checkpoints", stage))["flags"]
        steps, full = flags["steps"], flags["pair_steps"]
        if not rows:
            rows["teacher"] = entry("teacher", full, 2 * full, found["teacher"])
        if f"teacher_{steps}" not in rows:
            rows[f"teacher_{steps}"] = entry("teacher", steps, 2 * steps, found["untrained"])
            if steps > 1:
                rows[f"unguided_{steps}"] = entry("teacher, unguided", steps, steps,
                                                  found["unguided"])
        evaluations = steps if flags["cfg_student"] is None else 2 * steps
        label = LABELS[row]
        if steps == 1 and stage == "adm":
            label = LABELS_AFTER_ADP[row]
        rows[row] = entry(label, steps, evaluations, found["student"], found["seconds"])
    return rows


def summary(results):
    """families.json as README.md prints it: one table of markdown."""
    lines = ["| | | steps | accuracy | diversity | seconds |", "|---|---|---|---|---|---|"]
    for name, rows in results.items():
        title = FAMILIES[name].title
        for found in rows.values():
            lines.append(f"| {title} | {found['label']} | {found['steps']} "
                         f"| {found['accuracy']:.3f} | {found['diversity']:.3f} "
                         f"| {seconds_of(found)} |")
            title = ""
    return "\n".join(lines)


def table(results):
    """families.json as docs/results.md prints it: a table of markdown for each family, with all its
    marks."""
    parts = []
    for name, rows in results.items():
        columns = FAMILIES[name].teacher.columns
        lines = [f"| {FAMILIES[name].title} | steps | network evaluations | "
                 + " | ".join(columns.values()) + " | seconds |",
                 "|---" * (4 + len(columns)) + "|"]
        for found in rows.values():
            marks = " | ".join(f"{found[mark]:.3f}" for mark in columns)
            lines.append(f"| {found['label']} | {found['steps']} | {found['evaluations']} "
                         f"| {marks} | {seconds_of(found)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def seconds_of(found):
    """Empty for the teacher, which is not trained here."""
    return f"{found['seconds']:.0f}" if found["seconds"] else ""


def main():
    p = parser_for(__doc__)
    p.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES),
                   help="to train; the others' figures stay as they are")
    args, out, results = parse_with_folders(p, "out/families")
    began = time.time()
    train_all(out, args.families, args.jobs)
    file = results / "families.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for name in args.families:
        found[name] = rows_of(out, name)
    found = {name: found[name] for name in FAMILIES if name in found}       # in their order
    file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"\n{summary(found)}\n\n{table(found)}\n")
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    run_main(main)
