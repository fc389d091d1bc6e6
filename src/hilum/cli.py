"""The command line. One function a program: its options, an example, and a lazy import of what it runs.

Nothing heavy is imported here, so that `hilum --help` answers at once. A `HilumError`, and what the system
refuses, becomes one line and exit status 1; a mistake in the options is exit status 2. Past 300 lines,
since every option of every program is declared here.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hilum.core.errors import HilumError
from hilum.core.types import RESEARCH_NOTICE

app = typer.Typer(
    name="hilum",
    help=f"From a folder of chest X-rays to calibrated study-level findings.\n\n{RESEARCH_NOTICE}",
    epilog="Start with: hilum demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Out = Annotated[Path, typer.Option("--out", help="Where the result goes.")]
Seed = Annotated[int, typer.Option(help="Root of every random choice.")]
Workers = Annotated[int | None, typer.Option(help="Processes; default: the processors of this machine.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, any setting of the recipe.", show_default=False)
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Store = Annotated[Path, typer.Option("--data", help="A store made by hilum build.")]


def example(text: str) -> str:
    """The epilog of a command."""
    return f"Example: {text}"


@app.command(epilog=example("hilum demo --out outputs/demo"))
def demo(
    out: Out = Path("outputs/demo"),
    seed: Seed = 0,
    patients: Annotated[int, typer.Option(help="Synthetic patients.")] = 600,
) -> None:
    """Run the whole pipeline on synthetic patients: no data, no network, no GPU."""
    from hilum.commands import demo as program
    from hilum.recipes import demo_plan

    program.run(demo_plan(), out, patients=patients, seed=seed)


@app.command(epilog=example("hilum phantom outputs/phantoms --layout cxrlt --patients 200"))
def phantom(
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    layout: Annotated[str, typer.Option(help="cxrlt, nih, padchest, rsna, ...: a source's.")] = "cxrlt",
    patients: Annotated[int, typer.Option(help="Synthetic patients.")] = 200,
    seed: Seed = 0,
    size: Annotated[int, typer.Option(help="Pixels of the shorter side.")] = 512,
    minimum_patients: Annotated[int, typer.Option(help="At least so many patients for each finding.")] = 8,
    workers: Workers = None,
    faults: Annotated[
        str, typer.Option(help="images (damaged files), or kinds with commas; what must become of them: faults.csv.")
    ] = "",
) -> None:
    """Write synthetic patients in a dataset's real folder and CSV layout, with lesion masks."""
    from hilum.commands import phantom as program

    program.run(out, layout, patients, seed, size, minimum_patients, workers, faults)


@app.command(epilog=example("hilum manifest nih=/data/nih --out manifest.parquet"))
def manifest(
    sources: Annotated[list[str], typer.Argument(help="SOURCE=ROOT, for example cxrlt=/data/cxr-lt nih=/data/nih.")],
    out: Out = Path("manifest.parquet"),
    images: Annotated[list[str] | None, typer.Option(help="SOURCE=ROOT where the images are, if elsewhere.")] = None,
    findings: Annotated[str, typer.Option(help="auto, or a task such as cxrlt2024-task1.")] = "auto",
    split: Annotated[
        Literal["auto", "official", "project"], typer.Option(help="official: the source's own; project: by patient.")
    ] = "auto",
    val_fraction: Annotated[
        float | None, typer.Option(help="Share of images for validation, by whole patients (default 0.1).")
    ] = None,
    test_fraction: Annotated[
        float | None, typer.Option(help="Share of images for testing, by whole patients (default 0.2).")
    ] = None,
    seed: Seed = 0,
    allow_missing: Annotated[
        bool, typer.Option(help="Drop listed images that are not there, and say how many.")
    ] = False,
    uncertain: Annotated[
        Literal["mask", "zero", "one"], typer.Option(help="What a source's own uncertain becomes.")
    ] = "mask",
    blank: Annotated[Literal["mask", "zero"], typer.Option(help="What an empty label cell becomes.")] = "mask",
    table: Annotated[list[str] | None, typer.Option(help="SOURCE=CSV in place of its table (labels.csv).")] = None,
    weak_labels: Annotated[bool, typer.Option("--weak-labels", help="Also believe hints (docs/datasets.md).")] = False,
    imply_negatives: Annotated[
        bool, typer.Option("--imply-negatives", help="Normal images are negative for all that their source names.")
    ] = False,
    hierarchy: Annotated[
        bool, typer.Option("--hierarchy", help="A rib fracture is a fracture: fill unknown findings from relatives.")
    ] = False,
    pool: Annotated[str, typer.Option(help="slides-710k-clean, cxrlt2026-eligible, ...: in place of --split.")] = "",
    accept_leak: Annotated[
        bool, typer.Option("--accept-leak", help="Take a pool that leaks by design; written into every result.")
    ] = False,
) -> None:
    """Read datasets into one checked table: images, patients, studies, views, labels, splits."""
    from hilum.commands import manifest as program

    program.run(
        sources,
        out,
        images=images or [],
        findings=findings,
        split=split,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        seed=seed,
        allow_missing=allow_missing,
        uncertain=uncertain,
        blank=blank,
        tables=table or [],
        weak_labels=weak_labels,
        imply_negatives=imply_negatives,
        hierarchy=hierarchy,
        pool=pool,
        accept_leak=accept_leak,
    )


@app.command(epilog=example("hilum audit manifest.parquet"))
def audit(
    manifest: Annotated[Path, typer.Argument(help="A table made by hilum manifest, or STORE/manifest.parquet.")],
    hash_files: Annotated[bool, typer.Option("--hash-files", help="Also compare the files' bytes.")] = False,
    pixels: Annotated[
        bool, typer.Option("--pixels", help="Also decode images whose pixels have no hashes yet, and compare them.")
    ] = False,
    within: Annotated[bool, typer.Option("--within", help="Look for near duplicates inside the splits too.")] = False,
    weights: Annotated[
        str | None, typer.Option(help="A RUN, a MODEL or the name of public weights: have they seen val or test?")
    ] = None,
    root: Annotated[list[str] | None, typer.Option(help="SOURCE=ROOT, if the images have moved.")] = None,
    workers: Workers = None,
    evidence: Annotated[Path | None, typer.Option(help="CSV to write every pair of near duplicates to.")] = None,
) -> None:
    """Look for leaks, duplicates and conflicts; exit status 1 when evaluation material is on the training side."""
    from hilum.commands import audit as program

    program.run(manifest, hash_files, pixels, within, weights, root or [], workers, evidence)


@app.command(epilog=example("hilum build manifest.parquet --out store"))
def build(
    manifest: Annotated[Path, typer.Argument(help="A table made by hilum manifest.")],
    out: Out = Path("store"),
    size: Annotated[int, typer.Option(help="Pixels of the shorter side; smaller images stay as they are.")] = 512,
    encoding: Annotated[str | None, typer.Option(help="jpeg95 (default), png or raw.")] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: job i of n, counted from 0, as in 0/8.")] = None,
    workers: Workers = None,
    root: Annotated[list[str] | None, typer.Option(help="SOURCE=ROOT, if the images have moved.")] = None,
    budget: Annotated[float, typer.Option(help="Share of unreadable images above which this is an error.")] = 0.01,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Copy no pixels: check every file once, then read it where it is.")
    ] = False,
    intensity: Annotated[
        str, typer.Option(help="DICOM and 16 bits to grey: hilum-grey-1, mimic-cxr-jpg-1, chexpert-1 or chexfound-1.")
    ] = "hilum-grey-1",
    checksums: Annotated[
        bool, typer.Option(help="Compare files with the SHA256SUMS.txt of their root, where there is one.")
    ] = True,
) -> None:
    """Decode every image once into a store; what cannot be read is listed with its reason."""
    from hilum.commands import build as program

    program.run(manifest, out, size, encoding, shard, workers, root or [], budget, in_place, intensity, checksums)


@app.command(epilog=example("hilum verify store"))
def verify(store: Annotated[Path, typer.Argument(help="A store, or a folder of tars made by hilum convert.")]) -> None:
    """Read and decode every record of a store, or every image of tars."""
    from hilum.commands import verify as program

    program.run(store)


@app.command(epilog=example("hilum convert store --out tars --split train"))
def convert(
    inputs: Annotated[list[Path], typer.Argument(help="A store; or tars, or a folder of them.")],
    out: Annotated[Path, typer.Option("--out", help="A folder for tars; or the store.")],
    split: Annotated[
        str | None, typer.Option(help="From a store: only this split. From tars: the split of those that name none.")
    ] = None,
    with_ids: Annotated[
        bool, typer.Option("--with-ids", help="From a store: also the ids of patients, studies and images.")
    ] = False,
    accept_licence: Annotated[
        bool, typer.Option("--accept-licence", help="From a store: also where the licence lets nobody pass copies on.")
    ] = False,
    size: Annotated[int | None, typer.Option(help="From tars: pixels of the shorter side (default 512).")] = None,
    encoding: Annotated[str | None, typer.Option(help="From tars: jpeg95 (default), png or raw.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="From tars: the dataset of those that name none (default webdataset).")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="From tars: the licence tag of those that name none.")] = None,
    workers: Annotated[int | None, typer.Option(help="From tars: processes (default: all processors).")] = None,
    budget: Annotated[
        float | None, typer.Option(help="From tars: share of refused ones above which this is an error (default 0.01).")
    ] = None,
) -> None:
    """Write a store as WebDataset tars, or read WebDataset tars into a store: what INPUTS are decides."""
    from hilum.commands import convert as program

    for_stores: dict[str, Any] = {
        "size": size,
        "encoding": encoding,
        "dataset": dataset,
        "licence": licence,
        "workers": workers,
        "budget": budget,
    }
    if program.is_store(inputs):
        program.refuse({f"--{name}": value for name, value in for_stores.items()}, "a store that becomes tars")
        program.to_tars(inputs[0], out, program.ExportOptions(split, with_ids, accept_licence))
        return
    program.refuse({"--with-ids": with_ids, "--accept-licence": accept_licence}, "tars that become a store")
    given = {name: value for name, value in for_stores.items() if value is not None}
    program.to_store(inputs, out, program.ImportOptions(split=split or "", **given))


@app.command(epilog=example("hilum import-weights microsoft/rad-dino --out rad-dino --patch-size 16"))
def import_weights(
    source: Annotated[
        str, typer.Argument(help="A weights file, a folder with one, or owner/name on the Hub.", show_default=False)
    ] = "",
    out: Out = Path("backbone"),
    patch_size: Annotated[int | None, typer.Option(help="Resample the patch kernel to patches of this side.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Lay positions out for squares of this side, pixels.")] = None,
    backbone: Annotated[str, typer.Option(help="The same as SOURCE, as --head reads better with it.")] = "",
    head: Annotated[
        Path | None, typer.Option(help="Its published head (CheXFound's glori.pth): write a model, not a backbone.")
    ] = None,
    head_name: Annotated[
        str | None, typer.Option(help="Which head of several: its name, a part of it such as lr=0_0001, or best.")
    ] = None,
    findings: Annotated[
        Path | None, typer.Option(help="Text file naming the head's outputs in order; default: CXR-LT 2024's 40.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="For --head-name best: the results file; default: beside the head.")
    ] = None,
) -> None:
    """Convert a public backbone (DINOv2, RAD-DINO, CheXFound, ...), or with --head a whole model, strictly."""
    if bool(source) == bool(backbone):
        raise typer.BadParameter("Name the weights once: as SOURCE, or with --backbone.")
    if head is None:
        if head_name is not None or findings is not None or results is not None:
            raise typer.BadParameter("--head-name, --findings and --results belong to --head FILE.")
        from hilum.commands import import_weights as program

        program.run(source or backbone, out, patch_size, image_size)
        return
    if patch_size is not None:
        raise typer.BadParameter("--patch-size: a published head has been trained on the patches of its backbone.")
    from hilum.commands import import_head

    import_head.run(source or backbone, head, out, head_name, findings, results, image_size)


@app.command(epilog=example("hilum pretrain laptop_128 --data store --out runs/ssl batch_size=32"))
def pretrain(
    recipe: Annotated[str, typer.Argument(help="A recipe (hilum recipes lists them) or a config.yaml.")],
    overrides: Overrides = None,
    data: Store = Path("store"),
    out: Out = Path("run"),
    init: Annotated[Path | None, typer.Option(help="A run or weights to start from.")] = None,
    devices: Annotated[int, typer.Option(help="Processes: one a GPU, or CPU processes.")] = 1,
) -> None:
    """Pretrain a backbone with DINOv2; a higher resolution is the same command with --init. Resumes by itself."""
    from hilum.commands import pretrain as program
    from hilum.recipes import pretrain_recipe

    program.run(pretrain_recipe(recipe, overrides or []), data, out, init=init, devices=devices)


@app.command(epilog=example("hilum slurm slides_vitl16_224 --data store --out runs/ssl --nodes 2 --gpus-per-node 8"))
def slurm(
    recipe: Annotated[str, typer.Argument(help="A recipe (hilum recipes lists them) or a config.yaml.")],
    overrides: Overrides = None,
    data: Store = Path("store"),
    out: Out = Path("run"),
    init: Annotated[str | None, typer.Option(help="A run or weights to start from.")] = None,
    nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs, and processes, on each.")] = 1,
    cpus_per_gpu: Annotated[int, typer.Option(help="Processor cores for each process.")] = 8,
    time: Annotated[str, typer.Option(help="Limit of one turn; at its end the job queues itself again.")] = "24:00:00",
    partition: Annotated[str, typer.Option(help="As in sbatch.")] = "",
    account: Annotated[str, typer.Option(help="As in sbatch.")] = "",
    constraint: Annotated[str, typer.Option(help="As in sbatch.")] = "",
    name: Annotated[str, typer.Option(help="Of the job.")] = "",
    setup: Annotated[
        list[str] | None, typer.Option(help='A line of shell to run first, as in "module load cuda"; may be repeated.')
    ] = None,
    out_script: Annotated[Path, typer.Option(help="Where to write the script; logs go beside it.")] = Path(
        "pretrain.sbatch"
    ),
) -> None:
    """Write a batch script that runs `hilum pretrain` on a SLURM cluster, again and again until it is finished."""
    from hilum.commands import slurm as program
    from hilum.recipes import pretrain_recipe

    config = pretrain_recipe(recipe, overrides or [])
    resources = program.Resources(
        nodes, gpus_per_node, cpus_per_gpu, time, partition, account, constraint, name, tuple(setup or ())
    )
    program.run(config, recipe, overrides or [], data, out, init, resources, out_script)


@app.command(epilog=example("hilum inspect runs/ssl --data store"))
def inspect(
    run: Annotated[Path, typer.Argument(help="A run of hilum pretrain, finished or not.")],
    data: Annotated[Path | None, typer.Option("--data", help="Its store, for the pictures.")] = None,
    device: Device = "auto",
) -> None:
    """Write RUN/report.html again: curves, alarms, patches as colours, nearest neighbours."""
    from hilum.commands import pretrain_report as program

    program.run(run, data, device)


@app.command(epilog=example("hilum fit decoder --data store --backbone runs/ssl --out model"))
def fit(
    recipe: Annotated[str, typer.Argument(help="A recipe (hilum recipes lists them) or a config.yaml.")],
    overrides: Overrides = None,
    data: Store = Path("store"),
    backbone: Annotated[str, typer.Option(help="A run, weights, or random:SIZE.")] = "run",
    out: Out = Path("model"),
    device: Device = "auto",
) -> None:
    """Search learning rates for a head on a frozen backbone, refit, calibrate; writes a self-contained model."""
    from hilum.commands import fit as program
    from hilum.recipes import fit_recipe

    program.run(fit_recipe(recipe, overrides or []), data, backbone, out, device)


@app.command(epilog=example("hilum ablate slides --scale laptop --data store --out ablation seeds=[0,1,2,3,4]"))
def ablate(
    plan: Annotated[str, typer.Argument(help="slides, losses, labels, study; or a plan as YAML.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, of the plan: seeds, bootstraps, ...", show_default=False)
    ] = None,
    data: Store = Path("store"),
    out: Out = Path("ablation"),
    scale: Annotated[
        Literal["full", "laptop"] | None, typer.Option(help="Of a built-in plan; full, if not said.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="The dataset that is judged; others are only learned from.")
    ] = None,
    only: Annotated[str, typer.Option(help="Rows, with commas; all if empty.")] = "",
    backbone: Annotated[
        list[str] | None, typer.Option(help="NAME=RUN, weights in place of pretraining; may be repeated.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Heads made side by side, in processes.")] = 1,
    device: Device = "auto",
    show: Annotated[bool, typer.Option("--show", help="Print the plan as YAML, and run nothing.")] = False,
) -> None:
    """Make a table of configurations beside published numbers, with intervals; goes on where it was."""
    from hilum.plans import carry_out

    rows = [name.strip() for name in only.split(",") if name.strip()]
    carry_out(plan, overrides or [], data, out, scale, target, rows, backbone or [], workers, device, show)


@app.command(epilog=example("hilum extend model --data store --finding Scoliosis --out model_41"))
def extend(
    model: Annotated[Path, typer.Argument(help="A model made by hilum fit or hilum extend.")],
    overrides: Overrides = None,
    finding: Annotated[
        list[str] | None, typer.Option(help="A new finding, or cxrlt2024-task3 for its five; may be repeated.")
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", help="A store with labels of the new findings.")] = None,
    out: Out = Path("extended"),
    shots: Annotated[int | None, typer.Option(help="At most so many positive training images of each finding.")] = None,
    val_shots: Annotated[
        int | None, typer.Option(help="At most so many positive validation images of each; default: as --shots.")
    ] = None,
    ladder: Annotated[
        str | None, typer.Option(help="Ways to try, of rows, adapter, copy, own (default: all); validation chooses.")
    ] = None,
    zero_shot: Annotated[
        Path | None, typer.Option(help="Text vectors (.npz, .safetensors): score the findings without any label.")
    ] = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="One head for old and new findings; old outputs change, behind a gate.")
    ] = False,
    tolerance: Annotated[float, typer.Option(help="--joint: average precision that an old finding may lose.")] = 0.02,
    accept: Annotated[bool, typer.Option("--accept", help="--joint: write it although the gate objects.")] = False,
    device: Device = "auto",
) -> None:
    """Add findings to a model; what it had stays the same to the last bit, unless --joint."""
    from hilum.commands import extend as program

    program.dispatch(
        model,
        data,
        finding or [],
        out,
        overrides or [],
        program.Options(shots, val_shots, ladder, zero_shot, joint, tolerance, accept),
        device,
    )


@app.command()
def recipes(
    name: Annotated[str, typer.Argument(help="One of them, to print it whole.", show_default=False)] = "",
) -> None:
    """List every recipe; or print one with its source, cost and all its settings."""
    from hilum.recipes import describe, show

    typer.echo(show(name) if name else describe())


@app.command(epilog=example("hilum predict model pa.dcm lateral.dcm --out findings.csv"))
def predict(
    model: Annotated[Path, typer.Argument(help="A model, an ensemble, or an export of either.")],
    inputs: Annotated[list[str], typer.Argument(help="Images, folders, a CSV or Parquet of paths, or STORE:split.")],
    out: Out = Path("predictions.parquet"),
    raw: Annotated[bool, typer.Option(help="Without the model's calibrator, for combine.")] = False,
    study: Annotated[
        str | None, typer.Option(help="own (the model's rule), mean, ...: one row per study instead of one per image.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 32,
    device: Device = "auto",
    shard: Annotated[
        str | None, typer.Option(help="i/n: job i of n, counted from 0, as in 0/8; a study is never divided.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="torch, onnx or openvino, for an export of that format; default: what it holds.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16, or auto: bf16 where the processor has it; default: the model's.")
    ] = None,
    study_column: Annotated[
        str | None, typer.Option(help="Of a table: says which images form a study; default: study_id.")
    ] = None,
    devices: Annotated[int, typer.Option(help="Processes, each on a device of its own.")] = 1,
    score_flagged: Annotated[
        bool, typer.Option("--score-flagged", help="Score also what is no upright chest X-ray; it stays flagged.")
    ] = False,
    correct_inverted: Annotated[
        bool, typer.Option("--correct-inverted", help="Exchange bright and dark of inverted images, and score them.")
    ] = False,
    budget: Annotated[
        float, typer.Option(help="Share of refused or withheld inputs above which this ends with status 1.")
    ] = 1.0,
    reports: Annotated[
        Path | None, typer.Option(help="Also a report of every study, each in a folder of its own, in this one.")
    ] = None,
    formats: Annotated[str, typer.Option(help="Of reports: json, html, fhir, fhir-r4b, sr, sc, with commas.")] = "json",
    captures: Annotated[
        str, typer.Option(help="Of format sc: above (findings above the first operating point) or all.")
    ] = "above",
    references: Annotated[
        Path | None, typer.Option(help="Of fhir: a CSV that says whose studies are which on a FHIR server.")
    ] = None,
) -> None:
    """Findings for images or a split of a store, as Parquet, CSV or JSON."""
    from hilum.commands import predict as program
    from hilum.commands.predict_report_options import parse_options

    asked = parse_options(reports, formats, captures, references)

    program.run(
        model, inputs, out, raw=raw, study=study, batch_size=batch_size, device=device, shard=shard, engine=engine,
        precision=precision,
        study_column=study_column, devices=devices, score_flagged=score_flagged, correct_inverted=correct_inverted,
        budget=budget, reports=asked,
    )  # fmt: skip


@app.command(epilog=example("hilum export model --format onnx --out exported"))
def export(
    model: Annotated[Path, typer.Argument(help="A model or an ensemble.")],
    form: Annotated[str, typer.Option("--format", help="onnx, openvino, torch-export, or huggingface (the backbone).")],
    out: Out = Path("exported"),
) -> None:
    """Write a model for other runtimes; nothing is written that says something else than the model."""
    from hilum.commands import export as program

    program.run(model, form, out)


@app.command(epilog=example("hilum explain model pa.dcm lateral.dcm --finding Cardiomegaly --out explained"))
def explain(
    model: Annotated[Path, typer.Argument(help="A model or an ensemble.")],
    inputs: Annotated[list[str], typer.Argument(help="Images, folders, a CSV of paths; or STORE:split, with --maps.")],
    out: Annotated[Path | None, typer.Option(help="A new folder for the pictures.")] = None,
    finding: Annotated[
        list[str] | None, typer.Option(help="Its maps; again for more. Default: findings above their threshold.")
    ] = None,
    threshold: Annotated[
        str | None, typer.Option(help="An operating point of the model: f1 (the first, if no site chose), youden, ...")
    ] = None,
    maps: Annotated[Path | None, typer.Option(help="A .npz for the maps of a store's split.")] = None,
    regions: Annotated[
        Path | None, typer.Option(help="Masks or boxes: only their images and findings; else what is labelled present.")
    ] = None,
    together: Annotated[
        bool, typer.Option("--together", help="All inputs are one study, whatever they say of themselves.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Images at a time, of a store.")] = 32,
    device: Device = "auto",
) -> None:
    """Where the model looked: overlays for each finding and view, or a map file for hilum evaluate."""
    from hilum.commands import explain as program

    program.run(model, inputs, out, finding or (), threshold, maps, regions, together, batch_size, device)


@app.command(epilog=example("hilum embed model store:test --out features.parquet"))
def embed(
    model: Annotated[str, typer.Argument(help="A model, a run, weights, or owner/name on the Hub.")],
    inputs: Annotated[list[str], typer.Argument(help="Images, folders, a CSV of paths, STORE:split, or a STORE.")],
    out: Annotated[Path, typer.Option("--out", help=".parquet, .npz or .npy.")] = Path("features.parquet"),
    what: Annotated[
        str, typer.Option(help="cls or patch-mean, a row per image; study, a row per study (normalised mean of cls).")
    ] = "cls",
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 32,
    device: Device = "auto",
    shard: Annotated[
        str | None, typer.Option(help="i/n: job i of n, counted from 0, as in 0/8; a study is never divided.")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Of a backbone alone: side of the squares it sees, pixels.")
    ] = None,
) -> None:
    """Features of images or studies from a model's backbone, or from any backbone. Goes on where it was."""
    from hilum.commands import embed as program

    program.run(model, inputs, out, what, batch_size, device, shard, resolution)


@app.command(epilog=example("hilum index model --data store --out index --finding 'Pleural Effusion'"))
def index(
    model: Annotated[str, typer.Argument(help="A model or an ensemble.")],
    data: Annotated[str, typer.Option("--data", help="STORE, or STORE:split.")] = "store",
    out: Out = Path("index"),
    finding: Annotated[
        list[str] | None, typer.Option(help="Also index what this finding's query sees; may be repeated; all for all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 32,
    device: Device = "auto",
) -> None:
    """Make the studies of a store searchable by similarity. Goes on where it was."""
    from hilum.commands import index as program

    program.run(model, data, out, finding or [], batch_size, device)


@app.command(epilog=example("hilum similar index pa.dcm lateral.dcm --finding 'Pleural Effusion' --sheet cases.png"))
def similar(
    index: Annotated[Path, typer.Argument(help="Made by hilum index.")],
    inputs: Annotated[list[str], typer.Argument(help="The images of one study.")],
    out: Annotated[Path | None, typer.Option("--out", help="Also write the table, as .csv or .json.")] = None,
    finding: Annotated[str | None, typer.Option(help="By what this finding's query sees, not the whole image.")] = None,
    count: Annotated[int, typer.Option(help="How many.")] = 8,
    sheet: Annotated[Path | None, typer.Option(help="A PNG: the query and what was found, with labels.")] = None,
    model: Annotated[str | None, typer.Option(help="Where the model is now, if it has moved.")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="A patient or study to leave out, beside the query's own; may be repeated.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Find the studies of an index that look like one study."""
    from hilum.commands import similar as program

    program.run(index, inputs, out, finding, count, sheet, model, exclude, device)


@app.command(epilog=example("hilum combine a.parquet b.parquet --study mean --ensemble mean --out both.parquet"))
def combine(
    files: Annotated[list[Path], typer.Argument(help="Raw prediction files, or models to join into an ensemble.")],
    out: Annotated[
        Path | None, typer.Option(help="Where the result goes; if not said, combined.parquet, or ensemble of models.")
    ] = None,
    study: Annotated[
        str | None, typer.Option(help="The images of a study: mean, logit_mean, frontal_weighted:0.8, learned, ...")
    ] = None,
    ensemble: Annotated[str | None, typer.Option(help="The members: mean, logit_mean or rank_mean.")] = None,
    unit: Annotated[str, typer.Option(help="image (each keeps its row) or study (one row each).")] = "image",
    weights: Annotated[str | None, typer.Option(help="Of the members, with commas, as in 2,1. Default: equal.")] = None,
    normal_damping: Annotated[
        str | None, typer.Option(help="power:0.5, linear:0.5 or none: hold abnormal findings down by the Normal score.")
    ] = None,
    choose: Annotated[
        bool,
        typer.Option("--choose", help="Find members, weights, rules on validation; --study choose: study rules too."),
    ] = False,
    labels: Annotated[
        Path | None, typer.Option(help="For --choose or learned on files: a store, a manifest, a CSV.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of --labels; never the test split. Default: val.")] = None,
) -> None:
    """Put together the images of a study and the members of an ensemble, in that order."""
    models = all((path / "config.json").exists() for path in files)
    if models:
        from hilum.commands import combine_models

        where = out or Path("ensemble")
        combine_models.run(files, where, study, ensemble, unit, weights, normal_damping, choose, labels, split)
        return
    from hilum.commands import combine as program

    where = out or Path("combined.parquet")
    program.run(files, where, study, ensemble, unit, weights, normal_damping, choose, labels, split)


@app.command(epilog=example("hilum calibrate val.parquet --labels store --split val --out cal.json"))
def calibrate(
    predictions: Annotated[Path, typer.Argument(help="Predictions, at the stage that will be used.")],
    labels: Annotated[Path | None, typer.Option(help="A store, a manifest or a CSV with an id column.")] = None,
    split: Annotated[str | None, typer.Option(help="The split to fit on; never the test split. Default: val.")] = None,
    out: Out = Path("calibration.json"),
    method: Annotated[
        str,
        typer.Option(help="auto, cross_fitted, temperature, temperature_bias, platt, beta, isotonic or identity."),
    ] = "auto",
    use: Annotated[Path | None, typer.Option(help="Apply this calibration instead of fitting one.")] = None,
    sensitivity: Annotated[
        list[float] | None, typer.Option(help="Another operating point: this sensitivity, such as 0.9.")
    ] = None,
    specificity: Annotated[
        list[float] | None, typer.Option(help="Another operating point: this specificity, such as 0.99.")
    ] = None,
) -> None:
    """Fit calibrators and thresholds on validation predictions, or apply them to others."""
    from hilum.commands import calibrate as program

    program.run(
        predictions,
        labels=labels,
        split=split,
        out=out,
        method=method,
        use=use,
        sensitivity=sensitivity or (),
        specificity=specificity or (),
    )


@app.command(epilog=example("hilum recalibrate model studies --labels labels.csv --sensitivity 0.95 --out model_here"))
def recalibrate(
    model: Annotated[Path, typer.Argument(help="A model or an ensemble.")],
    inputs: Annotated[list[str], typer.Argument(help="Labelled images, folders, a CSV of paths, or STORE:split.")],
    labels: Annotated[Path, typer.Option(help="A CSV with an id column, a manifest or a store.")],
    out: Out = Path("model_here"),
    sensitivity: Annotated[
        list[float] | None, typer.Option(help="An operating point: this sensitivity, such as 0.95; may be repeated.")
    ] = None,
    specificity: Annotated[
        list[float] | None, typer.Option(help="An operating point: this specificity, such as 0.9; may be repeated.")
    ] = None,
    point: Annotated[list[str] | None, typer.Option(help="An operating point by name: f1 or youden.")] = None,
    finding: Annotated[
        list[str] | None, typer.Option(help="Asked about, for the verdict; default: all with enough studies.")
    ] = None,
    minimum_auc: Annotated[float, typer.Option(help="The least useful AUC, fixed before you look.")] = 0.70,
    width: Annotated[float, typer.Option(help="Of the intervals that further studies are counted for.")] = 0.10,
    accept_exposed: Annotated[
        bool, typer.Option("--accept-exposed", help="Take images that the model has met; nothing is called fit then.")
    ] = False,
    keep_cases: Annotated[
        bool, typer.Option("--keep-cases", help="Keep the site's predictions, labels and ids in the new model.")
    ] = False,
    bootstraps: Annotated[int, typer.Option(help="Resamples of patients for the intervals.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 32,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Fit a model's probabilities and cuts to a hospital, and say whether it is fit for it: yes, not shown, or no."""
    from hilum.commands import recalibrate as program

    program.run(
        model, inputs, labels, out, sensitivity or (), specificity or (), point or (), finding or (), minimum_auc,
        width, accept_exposed, keep_cases, bootstraps, seed, batch_size, device,
    )  # fmt: skip


@app.command(epilog=example("hilum evaluate test.parquet --labels store --out evaluation"))
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Predictions to judge.")],
    labels: Annotated[Path, typer.Option(help="A store, a manifest or a CSV with an id column.")],
    out: Out = Path("evaluation"),
    task: Annotated[str | None, typer.Option(help="For example cxrlt2024-task1.")] = None,
    split: Annotated[str | None, typer.Option(help="Only the images of this split.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Where the thresholds come from.")] = None,
    compare: Annotated[Path | None, typer.Option(help="Other predictions, for the paired difference.")] = None,
    bootstraps: Annotated[int, typer.Option(help="Resamples of patients for the intervals.")] = 1000,
    min_positives: Annotated[int, typer.Option(help="Findings with fewer are left out of means, and listed.")] = 0,
    explain: Annotated[
        Path | None, typer.Option(help="A model that shows example studies in the report; labels must be a store.")
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            help="A column, or a finding, whose groups to judge; none for none. Without it: sex, age, view and "
            "dataset, where recorded.",
            show_default=False,
        ),
    ] = None,
    min_group: Annotated[int, typer.Option(help="Groups of fewer patients are listed, not judged.")] = 20,
    ledger: Annotated[Path | None, typer.Option(help="A file that counts the looks at these labels.")] = None,
    accept_exposed: Annotated[
        bool, typer.Option("--accept-exposed", help="Also judge images that the model has met; the result says so.")
    ] = False,
    maps: Annotated[
        list[Path] | None, typer.Option(help="Maps made by hilum explain; again for others to compare with the first.")
    ] = None,
    regions: Annotated[
        Path | None, typer.Option(help="Masks or boxes that judge the maps: masks.csv, BBox_List_2017.csv, VinDr's.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Of pointing, a share of the square's side; default 15 / 224.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Metrics with intervals by patient, and by subgroup: metrics.json and report.html."""
    from hilum.commands import evaluate as program

    program.run(
        predictions,
        labels,
        out,
        task=task,
        split=split,
        calibration=calibration,
        compare=compare,
        bootstraps=bootstraps,
        seed=seed,
        min_positives=min_positives,
        accept_exposed=accept_exposed,
        explain=explain,
        by=by or None,
        min_group=min_group,
        ledger=ledger,
        maps=maps or (),
        regions=regions,
        tolerance=tolerance,
    )


@app.command(epilog=example("hilum submit test.parquet --task cxrlt2024-task1 --ids test.csv --out submission.csv"))
def submit(
    task: Annotated[str, typer.Option(help="cxrlt2023, cxrlt2024-task1 to -task3, cxrlt2026-task1 or -task2.")],
    ids: Annotated[Path, typer.Option(help="The challenge's CSV of image ids.")],
    predictions: Annotated[
        Path | None, typer.Argument(help="Predictions for the images of --ids.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="A .csv, or a .zip with it and code/.")] = Path("submission.csv"),
    study: Annotated[str | None, typer.Option(help="mean, frontal_weighted:0.8, ...: of raw predictions.")] = None,
    scale: Annotated[str | None, typer.Option(help="f1: move each finding's F1-optimal cut to 0.5.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Where the thresholds come from, for --scale.")] = None,
    fill_untrained: Annotated[
        str | None, typer.Option(help="prevalence, or a number in [0, 1]: what findings never trained get.")
    ] = None,
    compress: Annotated[float, typer.Option(help="With --scale: factor of the log-odds toward 0.5.")] = 1.0,
    code: Annotated[Path | None, typer.Option(help="Folder that becomes code/ of the zip.")] = None,
    check: Annotated[Path | None, typer.Option(help="Validate this submission instead of writing one.")] = None,
    labels: Annotated[Path | None, typer.Option(help="With --check: labels to score it by.")] = None,
) -> None:
    """Write a validated CXR-LT submission, or check one."""
    from hilum.commands import submit as program

    if (predictions is None) == (check is None):
        raise typer.BadParameter("Give predictions to write a submission, or --check FILE to validate one.")
    if check is None and labels is not None:
        raise typer.BadParameter("--labels score a submission that is checked: say --check FILE, or leave them out.")
    if check is not None:
        if any(one is not None for one in (study, scale, calibration, fill_untrained, code)) or compress != 1.0:
            raise typer.BadParameter("--check takes --task, --ids and --labels alone; a submission is read as it is.")
        program.check(check, task, ids, labels=labels)
        return
    assert predictions is not None
    program.run(
        predictions,
        task,
        ids,
        out,
        scale=scale,
        calibration=calibration,
        fill_untrained=fill_untrained,
        study=study,
        compress=compress,
        code=code,
    )


@app.command(epilog=example("hilum serve model --port 8000"))
def serve(
    model: Annotated[Path, typer.Argument(help="A MODEL or ensemble directory.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen at; others than this machine's need a token.")] = (
        "127.0.0.1"
    ),
    index: Annotated[Path | None, typer.Option(help="Similar cases, made by hilum index.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="A file whose first line every request must show.")] = None,
    expose: Annotated[bool, typer.Option("--expose", help="With --host: yes, other machines shall reach it.")] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A further name by which the server may be called; may be repeated.")
    ] = None,
    queue: Annotated[int | None, typer.Option(help="Studies that wait before others are refused (8).")] = None,
    accept_licence: Annotated[
        bool,
        typer.Option("--accept-licence", help="Show other machines all cases of the index, whatever their licence."),
    ] = False,
    device: Device = "auto",
) -> None:
    """A page to look at studies with, and the same as an HTTP API. For this machine alone, unless told otherwise."""
    from hilum.commands import serve as program

    try:
        program.run(model, host, port, index, token_file, expose, allow_host or [], queue, accept_licence, device)
    except program.ExposedError as error:
        raise typer.BadParameter(str(error)) from error


@app.command(epilog=example("hilum bench crops"))
def bench(
    name: Annotated[str, typer.Argument(help="A file of benchmarks/: build, crops, similar, ...; or all.")] = "all",
) -> None:
    """Measure speed with a peer or a floor beside each figure."""
    from hilum.commands import bench as program

    program.run(name)


def main() -> None:
    """Entry point of the `hilum` program."""
    # Threads of torch that wait sleep instead of spinning: on a machine that does something else too, spinning made
    # pretraining several times slower (docs/log.md). Read once, when torch is imported, so it stands here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # When a process of several dies, torch's own warnings, dozens of C++ frames, would bury the one line that says so.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        app()
    except (HilumError, OSError) as error:  # what the system refuses (a permission, a full disk) is no fault of ours
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
