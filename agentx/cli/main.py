"""The command line: what `agentx` and its commands take, and how they end.

Every command is a thin wrapper: it imports what it needs when it runs, calls one function and
prints where the results are and what to run next. So `agentx --help` imports neither jax nor numpy.

How a command ends: 0 when it did what was asked; 2 after `error: one sentence` for a user's
mistake; 130 after Ctrl-C; a traceback for every fault of ours. A user's mistake is a ValueError
that our own code raised (its sentence names the file, the line and the fix), or a file that cannot
be read. AGENTX_TRACEBACK=1 keeps the traceback there too.
"""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer

# The exit code after Ctrl-C, as in every shell.
STOPPED = 130

# What a wrong command line raises: typer has no public name for it.
_USAGE_ERROR: Any = typer.BadParameter.__base__

app = typer.Typer(
    name="agentx",
    help="Train agent models end to end: pretraining, SFT, RL in tool environments, evaluation.",
    epilog="AGENTX_TRACEBACK=1 shows the traceback behind an error.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
tokenizer_app = typer.Typer(help="Train a tokenizer, or look at one.")
model_app = typer.Typer(help="What a model takes, and its programs for others.")
data_app = typer.Typer(help="Build a token store, or look into one.")
env_app = typer.Typer(help="Check an environment.")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")
app.add_typer(model_app, name="model")
app.add_typer(env_app, name="env")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line (the process's by default) and returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments:
        arguments = ["--help"]
    overrides = [a for a in arguments if a.startswith("--gin.")]
    rest = [a for a in arguments if not a.startswith("--gin.")]
    try:
        result = app(args=rest, prog_name="agentx", standalone_mode=False, obj=overrides)
        code = result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    except Exception as error:
        if isinstance(error, _USAGE_ERROR):
            sentence = _usage_sentence(error)
        elif _is_users(error) and os.environ.get("AGENTX_TRACEBACK") != "1":
            sentence = _sentence(error)
        else:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    if code == STOPPED:
        print("stopped", file=sys.stderr)
    return code


def _usage_sentence(error: Any) -> str:
    command = error.ctx.command_path if error.ctx else "agentx"
    return f"{error.format_message()} See `{command} --help`."


def _is_users(error: BaseException) -> bool:
    """Whether our own code refused what the user gave, or a file could not be read or written.

    A ValueError from inside jax or numpy is a fault of ours and keeps its traceback. A loss that is
    no number is a FloatingPointError.
    """
    if isinstance(error, OSError) and error.filename is not None:
        return True
    refused = isinstance(error, ValueError | FloatingPointError | OSError)
    return refused and _raised_by_us(error.__traceback__)


def _raised_by_us(traceback: TracebackType | None) -> bool:
    name = ""
    while traceback is not None:
        name = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return name.split(".")[0] in ("agentx", "agentx_kernels")


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror.lower()}"
    return " ".join(str(error).split())


def _done(results: str, *next_commands: str) -> None:
    """The closing lines of every command."""
    print(f"\n{results}")
    for number, command in enumerate(next_commands):
        print(f"{'Next: ' if number == 0 else '      '}{command}")


def _refuse_overrides(context: typer.Context) -> None:
    if context.obj:
        raise ValueError(
            f"{context.obj[0]}: `{context.command_path}` reads no run file to override"
        )


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"agentx {importlib.metadata.version('agentx')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "-v", "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


Context = typer.Context
Checkpoint = Annotated[Path, typer.Option(help="A run's folder, as `agentx train` leaves it.")]
Run = Annotated[Path, typer.Argument(help="A run's folder, as `agentx train` leaves it.")]


@app.command()
def quickstart(
    context: Context,
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("quickstart"),
    seed: Annotated[int, typer.Option(help="Of the data, the weights and the sampling.")] = 0,
    ablate: Annotated[
        str, typer.Option(help='"objectives": also train without the tool objectives.')
    ] = "",
) -> int:
    """The whole pipeline on this machine, from text to a served checkpoint. Takes --gin.X=Y."""
    from agentx.quickstart import run

    if ablate not in ("", "objectives"):
        raise ValueError(f"--ablate {ablate}: only 'objectives' can be left out")
    return run(out, seed, ablate, context.obj)


@app.command()
def train(
    context: Context,
    config: Annotated[str, typer.Argument(help="A .gin file, or its name below configs/.")],
    run: Annotated[
        Path | None, typer.Option(help="The run's folder; runs/ and the file's name by default.")
    ] = None,
) -> None:
    """Pretraining, SFT, RL or a mixture, as a run file says. Overrides: --gin.Name.field=value.

    Started again with the same folder, it goes on from the newest checkpoint. SIGTERM saves and
    ends.
    """
    from agentx.cli.config import load_config

    resolved = load_config(config, context.obj)

    from agentx.cli.runs import prepare_run
    from agentx.host import prepare_cpu
    from agentx.train import train as train_run

    prepare_cpu(resolved.mesh.cpu_devices)
    folder = Path("runs") / Path(config).stem if run is None else run
    print(prepare_run(resolved, folder))
    summary = train_run(resolved, folder)
    if summary.interrupted:
        _done(
            f"Stopped at step {summary.step}, saved in {folder}",
            shlex.join(["agentx", *sys.argv[1:]]),
        )
    else:
        _done(
            f"Step {summary.step} in {summary.seconds:.0f} s; the run is in {folder}",
            f"agentx report {folder}",
            f"agentx export {folder} {folder}/huggingface",
            f"agentx sample --checkpoint {folder} PROMPT",
        )


@app.command("eval")
def evaluate(
    context: Context,
    checkpoint: Checkpoint,
    suite: Annotated[str, typer.Option(help="library, library_new_tool or library_dev.")],
    episodes: Annotated[int, typer.Option(help="How many tasks, one episode each.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the choice of tasks and of their worlds.")] = 0,
    save: Annotated[
        Path | None, typer.Option(help="Also write the episodes, as JSONL for agentx data build.")
    ] = None,
) -> None:
    """Plays the tasks of a suite greedily and prints the scores, with 95 % intervals."""
    from agentx.cli.play import evaluate_suite

    _refuse_overrides(context)
    print(evaluate_suite(checkpoint, suite, num_episodes=episodes, seed=seed, save=save))
    _done(
        f"That was {suite} with {checkpoint}" + (f"; its episodes are in {save}" if save else ""),
        f"agentx export {checkpoint} OUT",
    )


@app.command()
def sample(
    context: Context,
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    suite: Annotated[str, typer.Option(help="Offer the tools of this suite's environment.")] = "",
    raw: Annotated[
        bool, typer.Option("--raw", help="Go on with the prompt as plain text.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="The most tokens a turn.")] = 64,
) -> None:
    """Talks to a checkpoint. With --suite library, its tools are on offer and calls are made."""
    from agentx.cli.play import sample_text

    _refuse_overrides(context)
    text = sample_text(
        checkpoint, prompt, suite=suite, raw=raw, temperature=temperature, max_tokens=max_tokens
    )
    print(text)
    _done(f"That was {checkpoint}", f"agentx eval --checkpoint {checkpoint} --suite library")


@app.command("import")
def import_(
    context: Context,
    source: Annotated[Path, typer.Argument(help="A Hugging Face folder, or a GGUF file.")],
    out: Annotated[Path, typer.Argument(help="The folder to write, as a run's.")],
    dtype: Annotated[
        str, typer.Option(help="What the parameters are kept in: float32 or bfloat16.")
    ] = "float32",
    tokenizer: Annotated[
        Path | None, typer.Option(help="Of a GGUF file: its tokenizer.json, or a folder with it.")
    ] = None,
) -> None:
    """A model of others as a run's folder, to train from, to sample, to export again.

    Tensors go into the checkpoint block by block. No code of the folder is run, no pickle opened.
    """
    from agentx.cli.importing import import_run

    _refuse_overrides(context)
    for line in import_run(source, out, dtype, tokenizer):
        print(line)
    _done(
        f"The model is in {out}; a run file begins from it with include "
        f"{str(out / 'model.gin')!r}, TrainConfig.tokenizer = {str(out / 'tokenizer.model')!r} and "
        f"TrainConfig.init_from = {str(out)!r}",
        f"agentx sample --checkpoint {out} --raw PROMPT",
        f"agentx export {out} FOLDER",
    )


@app.command()
def export(
    context: Context,
    run: Run,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    shard_size: Annotated[
        str, typer.Option(help="The most a weights file holds: 5GB, 500MB.")
    ] = "5GB",
    quantize: Annotated[
        str | None, typer.Option(help="int8 or fp8: linear layers in eight bits, for vLLM.")
    ] = None,
    rows: Annotated[
        Path | None, typer.Option(help="Measure what --quantize costs on this store's text.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Run it in transformers too, and compare.")
    ] = False,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a LoRA run: the adapter alone, for PEFT.")
    ] = False,
) -> int:
    """A run's newest checkpoint as a Hugging Face folder, for transformers, vLLM and SGLang.

    A model that was imported keeps its own tokenizer and chat template, unless it was trained in
    our tool format. --check compares logits and greedy text, both sides in float32 on the weights
    as they were written, and ends with 1 where they differ by more than 0.001.
    """
    if adapter:
        return _export_adapter(context, run, out)
    from agentx.cli.exporting import check_transformers, compare, export_policy, parse_size
    from agentx.cli.runs import load_run

    _refuse_overrides(context)
    size = parse_size(shard_size)
    if check:
        check_transformers(quantize)
    policy = load_run(run)
    options: dict[str, Any] = {"dtype": dtype, "quantize": quantize}
    if quantize is not None:
        from agentx.cli.quantized import accuracy_table

        print(accuracy_table(policy, **options, store=rows))
    elif rows is not None:
        raise ValueError(f"--rows {rows} measures what --quantize costs; give int8 or fp8 there")
    folder = export_policy(policy, out, **options, shard_bytes=size)
    agrees = True
    if check:
        lines, agrees = compare(policy, folder, dtype)
        print("\n".join(lines))
    _done(
        f"The model is in {folder}" + ("" if agrees else ", and transformers runs another one"),
        f"vllm serve {folder}",
    )
    return 0 if agrees else 1


def _export_adapter(context: typer.Context, run: Path, out: Path) -> int:
    from agentx.cli.runs import load_run_adapters
    from agentx.interop.peft import export_peft

    _refuse_overrides(context)
    loaded, config, base = load_run_adapters(run)
    folder = export_peft(loaded.adapters, config, loaded.lora, out, base=base)
    _done(f"The adapter is in {folder}", f"agentx export {base} BASE, for the model it adapts")
    return 0


@app.command()
def report(
    context: Context,
    run: Annotated[Path, typer.Argument(help="A quickstart's folder, or a run's.")],
) -> None:
    """Draws report.html: curves, scores and trajectories, with every token's role and weight."""
    from agentx.report import write_report, write_run_report

    _refuse_overrides(context)
    if not run.is_dir():
        raise ValueError(f"{run}: there is no such folder; give what `agentx train --run` wrote to")
    page = write_report(run) if (run / "results.json").exists() else write_run_report(run)
    _done(f"The report is {page}", f"python -m webbrowser {page.resolve().as_uri()}")


@app.command()
def sweep(
    context: Context,
    config: Annotated[str, typer.Argument(help="A sweep's .gin file, or its name below configs/.")],
    on: Annotated[str, typer.Option(help="Where the runs go: local, for this machine.")] = "local",
    out: Annotated[
        Path | None, typer.Option(help="Its folder; sweeps/ and the file's name by default.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command of every run, and start none.")
    ] = False,
) -> int:
    """Many runs from one run file, by arms, grid and seeds, in one table and one plot.

    Overrides: --gin.Name.field=value for the sweep, --gin.run/Name.field=value for every run.
    Started again with the same folder, runs that are done are taken as they are.
    """
    if on != "local":
        raise ValueError(f"--on {on}: runs can only go to this machine so far; leave --on out")

    from agentx.sweep import run_sweep

    return run_sweep(config, out, dry_run=dry_run, overrides=context.obj)


@tokenizer_app.command("train")
def tokenizer_train(
    context: Context,
    files: Annotated[list[Path], typer.Argument(help="UTF-8 text files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("tokenizer.model"),
    vocab_size: Annotated[int, typer.Option(help="Pieces, markers and bytes included.")] = 32768,
) -> None:
    """Trains byte-fallback BPE on text files."""
    from agentx.data.curate import text_of
    from agentx.data.formats import read_documents
    from agentx.tokenizer import Tokenizer

    _refuse_overrides(context)
    documents = (document for file in files for document in read_documents(file, format="text"))
    tokenizer = Tokenizer.train(map(text_of, documents), vocab_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out)
    _done(
        f"A tokenizer of {tokenizer.vocab_size} pieces is in {out}", f"agentx tokenizer info {out}"
    )


@tokenizer_app.command("info")
def tokenizer_info(
    context: Context,
    path: Annotated[Path, typer.Argument(help="A tokenizer.model.")],
    text: Annotated[str, typer.Option(help="Text to cut into pieces.")] = "",
) -> None:
    """What a tokenizer holds, and how it cuts a text."""
    from agentx.tokenizer import Tokenizer

    _refuse_overrides(context)
    tokenizer = Tokenizer.load(path)
    print(f"pieces       {tokenizer.vocab_size}")
    print(f"fingerprint  {tokenizer.fingerprint}")
    print(f"markers      {' '.join(tokenizer.special)}")
    if text:
        ids = tokenizer.encode(text)
        print(f"cut          {' '.join(repr(tokenizer.decode([i])) for i in ids)}")
        print(f"ids          {' '.join(map(str, ids))}")
    _done(f"That was {path}", f"agentx tokenizer info {path} --text 'a text to cut into pieces'")


@data_app.command("build")
def data_build(
    context: Context,
    paths: Annotated[
        list[str],
        typer.Argument(
            help="A .gin file with a BuildConfig; or files, globs, folders, gs://, s3://"
        ),
    ],
    tokenizer: Annotated[str, typer.Option(help="A tokenizer.model or tokenizer.json.")] = "",
    out: Annotated[str, typer.Option(help="The folder of the token store to write.")] = "",
    field: Annotated[
        str, typer.Option(help='Records of texts: the field that holds them, "text" for instance.')
    ] = "",
    trace: Annotated[
        str, typer.Option(help="Of the same records: the field of a reasoning trace, if any.")
    ] = "",
    format: Annotated[
        str, typer.Option(help="text, or of conversations: openai, sharegpt, ...; else recognised.")
    ] = "",
    on_error: Annotated[
        str, typer.Option(help="raise, or skip records that cannot be read, and count them.")
    ] = "raise",
    processes: Annotated[int, typer.Option(help="How many processes tokenise.")] = 1,
) -> None:
    """Tokenises documents into a store, once. Started again after a kill, it goes on.

    With a run file: filters, duplicates, several sources (docs/data.md); takes --gin.X=Y.
    """
    from agentx.cli.config import load_config
    from agentx.cli.documents import build_store
    from agentx.data.prepare import BuildConfig, Input, describe

    if paths[0].endswith(".gin"):
        options = (tokenizer, out, field, trace, format)
        if paths[1:] or any(options) or on_error != "raise" or processes != 1:
            raise ValueError(
                f"{paths[0]} says it all: override it with --gin.BuildConfig.field=value"
            )
        config = load_config(paths[0], context.obj, root="BuildConfig")
    else:
        _refuse_overrides(context)
        if not tokenizer or not out:
            raise ValueError("give --tokenizer and --out, or a .gin file that binds a BuildConfig")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"--on-error {on_error}: it must be raise or skip")
        config = BuildConfig(
            tuple(Input(path, format=format, field=field, trace=trace) for path in paths),
            tokenizer,
            out,
            on_error="skip" if on_error == "skip" else "raise",
            num_processes=processes,
        )
    store = build_store(config)
    print(describe(store.manifest["notes"]))
    _done(
        f"Documents: {len(store):,}, tokens: {store.num_tokens:,}, in {store.path}",
        f"agentx data stats {store.path}",
        f"agentx data inspect {store.path} --tokenizer {config.tokenizer}",
    )


@data_app.command("inspect")
def data_inspect(
    context: Context,
    path: Annotated[str, typer.Argument(help="A run's .gin file, or a token store.")],
    row: Annotated[int | None, typer.Option(help="Of a run: which row of the batch.")] = None,
    step: Annotated[int | None, typer.Option(help="Of a run: the batch of which step.")] = None,
    tokenizer: Annotated[str, typer.Option(help="Of a store: what it was built with.")] = "",
    index: Annotated[int | None, typer.Option(help="Of a store: which document.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also draw it, as a page of its own.")] = None,
) -> None:
    """Shows a row that a run trains on, or a document of a store: every token with its weight.

    Roles are colours; what stands together in a row, and who sees whom, is shown too. With a run
    file it takes --gin.X=Y.
    """
    from agentx.cli.config import load_config

    again = ["agentx", "data", "inspect", path]
    if path.endswith(".gin"):
        if tokenizer or index is not None:
            raise ValueError(
                f"{path} is a run file, which names its tokenizer and has rows: leave out "
                "--tokenizer and --index, and choose with --row and --step"
            )
        config = load_config(path, context.obj)

        from agentx.cli.rows import read_row

        number, at = row or 0, step or 0
        shown = read_row(config, path, number, at)
        num_rows = len(shown.batch.tokens)
        said = f"row {number} of the {num_rows} of batch {at} of {path}"
        following = (number + 1) % num_rows
        at = (at + (not following)) % config.num_steps
        again += ["--row", str(following), *(["--step", str(at)] if at else []), *context.obj]
    else:
        _refuse_overrides(context)
        if row is not None or step is not None:
            raise ValueError(f"{path} is no run file (.gin), so it has no --row and --step")
        if not tokenizer:
            raise ValueError(f"give the tokenizer that {path} was built with: --tokenizer FILE")

        from agentx.cli.rows import read_document

        shown, num_documents = read_document(path, tokenizer, index or 0)
        said = f"document {index or 0} of the {num_documents} in {path}"
        following = ((index or 0) + 1) % num_documents
        again += ["--tokenizer", tokenizer, "--index", str(following)]

    from agentx.cli.screen import print_row

    print_row(shown)
    if html is not None:
        from agentx.cli.rows import page_fields
        from agentx.report.row import write_row_page

        write_row_page(html, page_fields(shown))
        said += f"; the page is {html}"
        again = ["python", "-m", "webbrowser", html.resolve().as_uri()]
    _done(f"That was {said}", shlex.join(again))


@data_app.command("stats")
def data_stats(
    context: Context,
    stores: Annotated[list[str], typer.Argument(help="Token stores, one or more.")],
    plot: Annotated[
        Path | None, typer.Option(help="Also draw it, to this .png, .svg or .pdf.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every file, and refuse one that has changed.")
    ] = False,
) -> None:
    """Counts the tokens of stores by role, outcome and length."""
    from agentx.cli.stats import plot_stats, print_stats, read_stats

    _refuse_overrides(context)
    stats = read_stats(stores, verify=verify)
    print_stats(stats)
    if plot is not None:
        plot_stats(stats, plot)
    _done(
        f"That was {', '.join(stores)}"
        + (", every file as it was written" if verify else "")
        + (f"; the picture is {plot}" if plot else ""),
        f"agentx data stats {shlex.join(stores)} --plot stats.png",
    )


@model_app.command("info")
def model_info(
    context: Context,
    name: Annotated[str, typer.Argument(help="A .gin file of a run or a model, or its name.")],
    length: Annotated[
        int | None, typer.Option(help="Of a row, in tokens; the model's longest by default.")
    ] = None,
    mesh: Annotated[
        str, typer.Option(help="Devices by axis, fsdp=8,tensor=2 for instance; one by default.")
    ] = "",
) -> None:
    """What a model takes: parameters, arithmetic, memory. Takes --gin.ModelConfig.field=value."""
    from agentx.cli.models import load_model, model_table

    print(model_table(load_model(name, context.obj), length, mesh))
    _done(f"That was the model of {name}", "agentx train RUN.gin, for a run that includes it")


@model_app.command("stablehlo")
def model_stablehlo(
    context: Context,
    run: Run,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    rows: Annotated[int, typer.Option(help="How many rows the programs take.")] = 1,
    tokens: Annotated[int, typer.Option(help="The most tokens of a prompt.")] = 128,
    columns: Annotated[
        int | None, typer.Option(help="Of the cache; as many as the model has by default.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the parameters: float32, bfloat16.")] = "float32",
) -> None:
    """A run's newest checkpoint as StableHLO of prefill and decode, which run without agentx."""
    from agentx.cli.runs import load_run
    from agentx.interop.stablehlo import export_stablehlo

    _refuse_overrides(context)
    policy = load_run(run)
    columns = policy.config.max_length if columns is None else columns
    shapes = {"rows": rows, "tokens": tokens, "columns": columns}
    folder = export_stablehlo(policy.params, policy.config, out, **shapes, dtype=dtype)
    _done(f"The programs are in {folder}", f"less {folder}/manifest.json")


@env_app.command("check")
def env_check(
    context: Context,
    name: Annotated[str, typer.Argument(help="A task set by its name, LibraryTasks for instance.")],
) -> None:
    """Plays some tasks of an environment, well and badly, and names what breaks its contract."""
    from agentx.cli.environments import check_environment

    _refuse_overrides(context)
    print(check_environment(name))
    _done(f"{name} keeps the contract of an environment", "agentx quickstart")
