"""`tailor train`, `base` and `demo`: making adapters, and seeing it all work."""

from pathlib import Path
from typing import Annotated

import typer

from gateway.commands.common import Json, Key, Url, progress, settings_of, show, show_table, tenant_client, told

app = typer.Typer()
base_app = typer.Typer(help="Base models.", no_args_is_help=True)


@app.command()
def train(
    data: Annotated[Path, typer.Argument(help="Chat JSONL, as OpenAI's fine-tuning takes it.")],
    base: Annotated[Path, typer.Option(help="Folder of the base model.")],
    out: Annotated[Path, typer.Option(help="Folder to make for the adapter.")],
    rank: Annotated[int | None, typer.Option(help="LoRA rank.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    quantization: Annotated[str | None, typer.Option(help="nf4: train on the base in four bits (QLoRA).")] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal bytes.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; equal numbers give equal bytes.")] = None,
    as_json: Json = False,
) -> None:
    """Train a LoRA adapter on this machine; publish it with `tailor adapter push`."""
    given = {
        "rank": rank,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "quantization": quantization,
        "seed": seed,
    }
    with told(), progress() as on_progress:
        from gateway.local_training import train_adapter

        report = train_adapter(
            data, base, out, {name: value for name, value in given.items() if value is not None}, on_progress, threads
        )
    show(report, as_json, f"{out}: loss {report['final_loss']:.4f} after {report['steps']} steps; next: "
          f"tailor adapter push {out} --name NAME")  # fmt: skip


@base_app.command("show")
def base_show(url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Show what adapters are checked against; with --json, all that `tailor adapter check --base` needs."""
    with told():
        found = tenant_client(url, key).call("GET", "/v1/base-model")
    limits = ", ".join(f"{name} {limit}" for name, limit in found["limits"].items())
    text = f"{found['name']}: {found['architecture']} in {found['dtype']}, {len(found['modules'])} layers; {limits}"
    show(found, as_json, text)


@base_app.command("tiny")
def base_tiny(
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    seed: Annotated[int, typer.Option(help="Equal seeds give equal bytes.")] = 0,
    as_json: Json = False,
) -> None:
    """Build a small Llama from a seed, without any download, to try everything with."""
    with told(), progress() as on_progress:
        from gateway.local_training import build_tiny_base

        report = build_tiny_base(out, seed, on_progress)
    show(report, as_json, f"{out}: held-out accuracy {report['heldout_accuracy']:.3f}")


@app.command()
def demo(as_json: Json = False) -> None:
    """Two tenants, one base, end to end on a real engine; writes demo.json into the home folder."""
    from gateway.demo import run_demo

    with told():
        report = run_demo(settings_of(), quiet=as_json)
    if as_json:
        show_table(report, True, ())
