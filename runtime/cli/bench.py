"""The command `bench`: cases, breakdown of a step, batches and images."""

import argparse
import json
import sys
from contextlib import ExitStack
from typing import Any

from rich.table import Table

from engines.cli import progress, screen
from engines.errors import BundleError, DeviceError, OptionError
from engines.options import within
from engines.registry import BACKENDS, accepted, available
from runtime.api import Runtime, load
from runtime.bench import breakdown
from runtime.bench.batches import bench_batches
from runtime.bench.cases import Case, bench, cases, check_lengths, check_names, machine, plot, prompts, report, write
from runtime.bench.images import bench_images
from runtime.bench.plots import check_plot
from runtime.decoding.request import check_batch
from runtime.evaluation.exact_match import MOST
from runtime.outputs import FIGURES, check_distinct, check_output

console = screen()
BASELINE = "eager full-greedy"  # if it does not run, ratios refer to the first case


def bench_command(args: argparse.Namespace) -> None:
    """Check all options, load the models, measure, then write, print and draw the figures."""
    names = args.backends.split(",") if args.backends else available()
    for name in names:
        if name not in BACKENDS:
            raise OptionError(f"unknown back end {name!r}; choose --backends from {', '.join(BACKENDS)}")
    policies = check_names(args.policies.split(","))
    sizes = sizes_of(args.batches) if args.batches else []
    within("limit", args.limit, 1, MOST, "problems, or rounds")
    if args.image and (sizes or args.profile or args.plot):
        raise OptionError("--image measures answers about images only; leave --batches, --profile and --plot out")
    check_output(args.out, FIGURES, "choose another --out")
    check_plot(args.plot)
    check_distinct(args.out, args.plot)
    with ExitStack() as stack:
        models = []
        for name in names:
            try:
                models.append(stack.enter_context(load(args.bundle, name, **accepted(name, {"threads": args.threads}))))
            except (DeviceError, BundleError) as error:
                if args.backends or (name == names[-1] and not models):
                    raise
                print(f"note: {name} is skipped: {error}", file=sys.stderr)
        measured = cases(models, policies)
        if args.baseline != BASELINE and args.baseline not in {case.name for case in measured}:
            listed = ", ".join(case.name for case in measured)
            raise OptionError(f"--baseline {args.baseline!r} is no case of this bench; choose from {listed}")
        for size in sizes:
            check_batch(size, models[0].model)
        if args.image:
            return images_command(measured, args)
        if args.profile and all(model.backend != "onnxruntime" for model in models):
            raise OptionError("--profile needs the back end onnxruntime; add it to --backends, or leave --profile out")
        check_lengths(measured, args.prompt_length, args.gen_length)
        with progress("bench", args.limit) as done:
            for number in bench(measured, args.limit, args.prompt_length, args.gen_length):
                done(number)
        figures = report(measured, args.baseline, args.prompt_length, args.gen_length)
        if args.profile:
            figures["breakdown"] = breakdown_of(models, args)
        if sizes:
            figures["batches"] = batches_of(models, sizes, args)
    if args.out:
        write(figures, args.out)
    if args.plot:
        plot(figures, args.plot)
    if args.json:
        print(json.dumps(figures))
    else:
        show(figures)


def show(figures: dict[str, Any]) -> None:
    """Print the figures as tables."""
    table = Table(
        "", "s p50", "s p95", "tokens/s", "steps", "layer-rows", "correct", f"times faster than {figures['baseline']}"
    )
    for row in figures["cases"]:
        seconds, (low, high) = row["seconds"], row["times_faster_quartiles"]
        table.add_row(
            row["case"], f"{seconds['p50']:.3f}", f"{seconds['p95']:.3f}", f"{row['tokens_per_second']:.1f}",
            f"{row['steps']:.1f}", f"{row['computed_fraction']:.1%}", f"{row['exact_match']:.0%}",
            f"{row['times_faster']:.2f} ({low:.2f} … {high:.2f})",
        )  # fmt: skip
    console.print(table)
    if "breakdown" in figures:
        kinds = (f"{kind}, ms ({slices['steps']} steps)" for kind, slices in figures["breakdown"].items())
        split = Table("elastic on onnxruntime", *kinds)
        for line in breakdown.rows(figures["breakdown"]):
            split.add_row(*line)
        console.print(split)
    if "batches" in figures:
        side = Table("side by side", "tokens/s", "times faster than the first", "sequences equal to alone")
        for row in figures["batches"]:
            side.add_row(
                f"{row['backend']} {row['batch']}", f"{row['tokens_per_second']:.0f}", f"{row['times_faster']:.2f}",
                f"{row['equal_to_alone']} of {row['sequences']}",
            )  # fmt: skip
        console.print(side)


def images_command(measured: list[Case], args: argparse.Namespace) -> None:
    """The bench with images: times to the first commit and to the answer, and the images' fraction of it."""
    with progress("bench", args.limit) as done:
        for number, cases_so_far in enumerate(bench_images(measured, args.image, args.limit, args.gen_length), 1):
            done(number)
            finished = cases_so_far
    models = list({id(case.model): case.model for case in measured}.values())
    figures = machine(models) | {"gen_length": args.gen_length, "images": [one.figures() for one in finished]}
    if args.out:
        write(figures, args.out)
    if args.json:
        print(json.dumps(figures))
        return
    table = Table("", "image tokens", "s for the image", "s to the first commit", "s to the answer", "image's fraction")
    for row in figures["images"]:
        table.add_row(
            row["case"], str(row["image_tokens"]), f"{row['image_seconds']:.3f}", f"{row['first_commit_seconds']:.3f}",
            f"{row['answer_seconds']:.3f}", f"{row['image_fraction']:.1%}",
        )  # fmt: skip
    console.print(table)


def sizes_of(text: str) -> list[int]:
    """The batch sizes of --batches."""
    try:
        return [int(size) for size in text.split(",")]
    except ValueError as error:
        raise OptionError(f"--batches takes whole numbers, as 1,2,4; got {text!r}") from error


def batches_of(models: list[Runtime], sizes: list[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures of every batch size on every model; each size decodes whole batches only."""
    count = max(sizes) * -(-args.limit // max(sizes))
    return [row for model in models for row in bench_batches(model, sizes, count, args.prompt_length, args.gen_length)]


def breakdown_of(models: list[Runtime], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The breakdown of a step of `elastic` on ONNX Runtime."""
    model = next(model for model in models if model.backend == "onnxruntime")
    drawn = (prompt for prompt, _ in prompts(model, args.limit, args.prompt_length))
    return breakdown.break_down(model, drawn, args.gen_length, "elastic", {})
