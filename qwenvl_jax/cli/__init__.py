"""The command line: parsers, and the one place where errors become a line and an exit status. The work is done below.

Exit status: 0 done; 1 the demo's figures fall short, a plan does not fit, or a bucket fails on the way; 2 a mistake in
the arguments, a file or the surroundings, told in one line on standard error; 130 interrupted. Anything else is a
defect of this package and shows its traceback.
"""

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Sequence

from qwenvl_jax import __version__
from qwenvl_jax.cli import data
from qwenvl_jax.cli.name import PROG
from qwenvl_jax.errors import QwenVLError, StoreError

INTERRUPTED = 130  # as a shell reports a program that Ctrl-C ended

# What an operating system refuses because of where the user pointed us, not because of how we asked.
_SURROUNDINGS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR}


class _UsageError(QwenVLError):
    """Arguments that the parser refuses."""


class _Parser(argparse.ArgumentParser):
    """Raises its errors instead of printing its usage, and takes no abbreviated options."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise _UsageError(f"{message}; see `{self.prog} --help`.")

    def options(self) -> list[str]:
        """Every option this parser knows, such as "--seed"."""
        return [option for action in self._actions for option in action.option_strings]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      arguments: without the program's name; those of this process by default.

    Returns:
      The exit status.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _dispatch(arguments)
    except QwenVLError as error:
        return _fail(str(error))
    except StoreError as error:  # whoever starts runs again starts no mistake again
        return _fail(str(error), 1)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # The reader of our output has gone, as in `qwenvl-jax chat ... | head`. Python would complain once more
            # when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        if error.errno in _SURROUNDINGS and error.filename is not None:
            return _fail(f"{error.filename}: {error.strerror}; choose a place that can be written, or make room.")
        raise
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _fail(message: str, status: int = 2) -> int:
    print(f"{PROG}: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _dispatch(arguments: list[str]) -> int:
    """Parses, calls the function of the command, and returns its exit status."""
    parser, commands = _parsers()
    if not arguments:
        parser.print_help()
        return 0
    if not arguments[0].startswith("-") and arguments[0] not in commands:
        raise _UsageError(_unknown("command", arguments[0], commands) + f"; see `{PROG} --help`.")
    options, rest = parser.parse_known_args(arguments)
    if hasattr(options, "overrides"):
        options.overrides = rest
    elif rest:
        used = getattr(options, "parser", commands[options.command])  # a command's own command names itself
        odd = next((argument for argument in rest if argument.startswith("-")), rest[0])
        raise _UsageError(_unknown("argument", odd, used.options()) + f"; see `{used.prog} --help`.")
    return options.work(options)


def _unknown(kind: str, name: str, known) -> str:
    near = difflib.get_close_matches(name.partition("=")[0], known, n=1)
    return f"unknown {kind} {name!r}" + (f", did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}")


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser, and that of each command by its name."""
    parser = _Parser(
        prog=PROG,
        description="Qwen-VL in JAX: from video files to a trained model and its answers.",
        epilog=f"`{PROG} COMMAND --help` tells more about each.",
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_assemble(commands)
    _add_train(commands)
    _add_plan(commands)
    _add_info(commands)
    _add_convert(commands)
    _add_export(commands)
    _add_chat(commands)
    _add_data(commands)
    return parser, commands.choices


def _add_demo(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="the whole job at toy scale on this machine, with a report",
        description="Makes video files, trains a tiny model on them through S0 to S3, asks the model that ships with\n"
        "this package when things happen in clips it never saw, exports it, and writes report.html.",
        epilog=f"""examples:
  {PROG} demo
  {PROG} demo --full --out runs/full     trains from nothing to the quality of the shipped model

Exit status 1 means that a figure fell short of what the demo has to show; the report says which. Started again in the
same folder, it continues where it was.""",
    )
    parser.add_argument("--out", metavar="DIR", default="runs/demo", help="the demo's folder; default: %(default)s")
    parser.add_argument(
        "--full", action="store_true", help="train to the end, 34 to 75 minutes on two cores, and judge that model"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of clips and training; default: %(default)s")
    parser.set_defaults(work=_demo)


def _demo(options: argparse.Namespace) -> int:
    from qwenvl_jax.demo.run import demo

    return demo(options.out, full=options.full, seed=options.seed)


def _add_assemble(commands) -> None:
    parser = commands.add_parser(
        "assemble",
        help="an untrained Qwen3-VL out of a SigLIP 2 and a Qwen3: where S0 begins",
        description="Builds an untrained Qwen3-VL from its ingredients: the image tower of a SigLIP 2, a Qwen3 or "
        "Qwen3-MoE\nwith its tokenizer, and fresh mergers between them. Writes the Hugging Face layout and prints what "
        "came\nfrom where.",
        epilog=f"""examples:
  {PROG} assemble --vision google/siglip2-so400m-patch16-384 --text Qwen/Qwen3-8B-Base models/s0-8b
  {PROG} train configs/demo/s0.py --model models/s0-8b --trainable mergers

MODEL is a folder in the Hugging Face layout, or a hub id (owner/name).""",
    )
    parser.add_argument("out", metavar="DST", help="the folder to make")
    parser.add_argument("--vision", metavar="MODEL", required=True, help="a SigLIP 2: whole, or its image tower alone")
    parser.add_argument("--text", metavar="MODEL", required=True, help="a Qwen3 or Qwen3-MoE with its tokenizer")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the mergers; default: %(default)s")
    parser.add_argument(
        "--deepstack",
        metavar="I,J,K",
        type=_numbers,
        help="tower blocks to tap, from 0; default: 5,11,17 of 24 and so on",
    )
    parser.add_argument(
        "--positions", metavar="SIDE", type=int, default=48, help="side of the position table; default: %(default)s"
    )
    parser.set_defaults(work=_assemble)


def _numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them; none of an empty text."""
    try:
        return tuple(int(number) for number in text.split(",")) if text else ()
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas between, as 5,11,17") from error


def _assemble(options: argparse.Namespace) -> int:
    from qwenvl_jax.assemble.build import assemble

    summary = assemble(
        options.vision,
        options.text,
        options.out,
        dtype=options.dtype,
        seed=options.seed,
        deepstack=options.deepstack,
        side=options.positions,
    )
    print(summary)
    return 0


def _add_train(commands) -> None:
    parser = commands.add_parser(
        "train",
        help="a stage or a whole curriculum, from a config file",
        usage=f"{PROG} train CONFIG [--model NAME] [--out DIR] [--profile STEPS] [--key value ...]",
        description="Trains as a config file says. Started again with the same arguments after it was stopped or "
        "killed,\na run continues from its latest checkpoint as if nothing had happened.",
        epilog=f"""examples:
  {PROG} train configs/demo/s1.py
  {PROG} train configs/demo/s1.py --out runs/short --steps 20 --optimizer.learning_rate 0.001

--key value changes a setting of the config file by its dotted name; a setting of a stage, without its prefix, is
changed in every stage.""",
    )
    parser.add_argument("config", metavar="CONFIG", help="a Python file with get_config(), such as those in configs/")
    parser.add_argument("--model", metavar="NAME", help="in place of the config's: a preset, a folder or a hub id")
    parser.add_argument("--out", metavar="DIR", help="the run's folder; default: runs/, by the config's name")
    parser.add_argument(
        "--profile",
        metavar="STEPS",
        help="trace so many steps, or these (10-15), for XProf, into profile/ of that folder",
    )
    parser.set_defaults(work=_train, overrides=[])


def _train(options: argparse.Namespace) -> int:
    from qwenvl_jax.train.loop import train_command
    from qwenvl_jax.train.processes import join

    join()
    result = train_command(
        options.config, options.overrides, model=options.model, out=options.out, profile=options.profile
    )
    if result.model is None:  # stopped by a signal, with a checkpoint written
        return INTERRUPTED
    print(f"{result.steps} steps are done; the model is in {result.model}")
    return 0


def _add_plan(commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="what a stage takes on a TPU slice, compiled without having one",
        usage=f"{PROG} plan CONFIG --topology SLICE [--model NAME] [--stage NAME] [--json] [--quick] [--search [N]] "
        "[--slices N] [--key value ...]\n"
        f"       {PROG} plan MODEL --serve --topology SLICE [--context N ...] [--rows N] [--mesh.AXIS N ...] [--json] "
        "[--quick]",
        description="Compiles the step that `train` would run for a TPU slice that need not be there: memory, FLOPs,\n"
        "what devices exchange, and the bounds that follow on time. Needs libtpu: pip install 'qwenvl_jax[tpu]'.",
        epilog=f"""examples:
  {PROG} plan configs/pretrain/s1.py --model qwen3_vl_8b --topology v5p:8x8x8
  {PROG} plan configs/pretrain/s3.py --model qwen3_vl_8b --topology v5p:8x8x8 --mesh.fsdp 32 --mesh.context 16
  {PROG} plan configs/pretrain/curriculum.py --stage s1 --topology v5e:16x16 --search 6
  {PROG} plan qwen3_vl_8b --serve --topology v5e:2x4 --context 32768

Without --mesh a rule chooses the mesh and the microbatches, and says so. No data is read; what is assumed of it is
told. Exit status 1 means that a stage does not fit.""",
    )
    parser.add_argument(
        "config",
        metavar="CONFIG|MODEL",
        help="a Python file with get_config(), such as those in configs/; with --serve a model, or a config with one",
    )
    parser.add_argument("--topology", metavar="SLICE", required=True, help="such as v5p:8x8x8, v5e:16x16, tpu7x:4x4x8")
    parser.add_argument("--model", metavar="NAME", help="in place of a config's: a preset, a folder or a hub id")
    parser.add_argument("--stage", metavar="NAME", help="of the config's stages the one of this name; default: all")
    parser.add_argument("--json", action="store_true", help="as JSON; bytes are those of a device")
    parser.add_argument("--quick", action="store_true", help="stop once memory is assigned: no code is generated")
    parser.add_argument(
        "--search",
        metavar="N",
        type=int,
        nargs="?",
        const=8,
        default=0,
        help="try N meshes and remat policies (8 if it is not said), and rank them",
    )
    parser.add_argument("--slices", metavar="N", type=int, default=1, help="so many of them, joined by their network")
    parser.add_argument("--serve", action="store_true", help="plan answers about a video in place of a stage")
    parser.add_argument(
        "--context",
        metavar="N",
        type=int,
        nargs="+",
        help="with --serve: tokens of a row; default: of 8192, 32768 and 262144 those that the model reads",
    )
    parser.add_argument(
        "--rows", metavar="N", type=int, default=0, help="with --serve: prompts at once; default: one on each share"
    )
    parser.set_defaults(work=_plan, overrides=[])


def _plan(options: argparse.Namespace) -> int:
    if options.serve:
        if options.stage or options.search or options.slices != 1:
            raise QwenVLError("--stage, --search and --slices are of training; leave them out with --serve.")
        from qwenvl_jax.plan.show_serving import serve_command

        return serve_command(
            options.config,
            options.overrides,
            topology=options.topology,
            model=options.model,
            contexts=options.context or (),
            rows=options.rows,
            as_json=options.json,
            quick=options.quick,
        )
    from qwenvl_jax.plan.show import plan_command

    if options.search < 0:
        raise QwenVLError(f"--search {options.search}: expected how many to try, at least 1.")
    if options.context or options.rows:
        raise QwenVLError("--context and --rows are of answers; add --serve, or leave them out.")
    return plan_command(
        options.config,
        options.overrides,
        topology=options.topology,
        slices=options.slices,
        model=options.model,
        stage=options.stage,
        as_json=options.json,
        tries=options.search,
        quick=options.quick,
    )


def _add_info(commands) -> None:
    parser = commands.add_parser(
        "info",
        help="shape, parameters and context of a preset or a folder, without loading it",
        description="Tells what a preset, a model's folder or a hub id is: its shape, how many parameters it has, how\n"
        "many tokens it reads, how large its files are. Weights are neither loaded nor fetched.",
        epilog=f"""examples:
  {PROG} info qwen3_vl_4b
  {PROG} info ./my-model --json""",
    )
    parser.add_argument("model", metavar="NAME|PATH", help="a preset, a model's or a run's folder, or a hub id")
    parser.add_argument("--json", action="store_true", help="as JSON, with every setting")
    parser.set_defaults(work=_info)


def _info(options: argparse.Namespace) -> int:
    from qwenvl_jax.info import show

    show(options.model, as_json=options.json)
    return 0


def _add_convert(commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="a public checkpoint to the native layout",
        description="Writes a model of the public layout in the native one, a file a layer, which loads in slices.\n"
        "FP8 becomes bfloat16. All is checked before the first byte is written, and little is held in memory.",
        epilog=f"""examples:
  {PROG} convert Qwen/Qwen3-VL-4B-Instruct ./native
  {PROG} convert ./public ./native --processes 4 --verify

Killed and started again with the same arguments, it continues with the file it was at. The same command on another
machine with the same file system helps: each takes files that nobody else has. A half conversion is not loaded.""",
    )
    parser.add_argument("src", metavar="SRC", help="a folder in the Hugging Face layout, a run's folder, or a hub id")
    parser.add_argument("dst", metavar="DST", help="a new or empty folder, or the one to continue with")
    parser.add_argument("--processes", metavar="N", type=int, default=1, help="share the work; default: %(default)s")
    parser.add_argument("--verify", action="store_true", help="read both again and compare every tensor")
    parser.set_defaults(work=_convert)


def _convert(options: argparse.Namespace) -> int:
    from qwenvl_jax.convert.to_native import convert

    convert(options.src, options.dst, processes=options.processes, verify=options.verify)
    same = ", and every tensor is that of the source" if options.verify else ""
    print(f"the native checkpoint in {options.dst} is complete{same}")
    return 0


def _add_export(commands) -> None:
    parser = commands.add_parser(
        "export",
        help="a checkpoint of ours to the public layout, for other tools",
        description="Writes a native checkpoint or the model of a training run in the public layout, whole or not at\n"
        "all, and says which command serves it elsewhere and what that tool will do differently.",
        epilog=f"""examples:
  {PROG} export ./native ./public --verify
  {PROG} export runs/clips ./public
  {PROG} export runs/clips ./public --step 2000

With --step a run need not be done: the model is that of a checkpoint, with what its adapters learnt in adapter/.""",
    )
    parser.add_argument("src", metavar="SRC", help="a native folder, a run's folder, or a folder in the public layout")
    parser.add_argument("dst", metavar="DST", help="a new or empty folder")
    parser.add_argument("--verify", action="store_true", help="read both again and compare every tensor")
    parser.add_argument("--step", metavar="N", help="of a run's folder: the checkpoint of this step, or `latest`")
    parser.set_defaults(work=_export)


def _export(options: argparse.Namespace) -> int:
    from qwenvl_jax.convert.advice import advice
    from qwenvl_jax.convert.to_public import export

    if options.step is not None:
        if options.verify:
            raise QwenVLError("--verify compares two folders, and a checkpoint is none; leave it out with --step.")
        from qwenvl_jax.train.export import export_step

        print(advice(export_step(options.src, options.dst, options.step)))
        return 0
    print(advice(export(options.src, options.dst, verify=options.verify)))
    return 0


def _add_chat(commands) -> None:
    parser = commands.add_parser(
        "chat",
        help="one answer about images and videos, written as it comes",
        description="Asks a model one question about images and videos, and writes its answer as it comes.",
        epilog=f"""examples:
  {PROG} chat Qwen/Qwen3-VL-4B-Instruct --video clip.mp4 "When does the door open?"
  {PROG} chat ./my-model --image a.png --image b.png "What changed between the two?"

Images stand before videos, each in the order given, and the question after them.""",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder in the Hugging Face or the native layout, or a hub id")
    parser.add_argument("question", metavar="QUESTION", help="the text of the question")
    parser.add_argument("--image", metavar="FILE", action="append", default=[], help="may be repeated")
    parser.add_argument("--video", metavar="FILE", action="append", default=[], help="may be repeated")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=512, help="default: %(default)s")
    parser.add_argument(
        "--temperature", metavar="X", type=float, default=0.0, help="0 takes the likeliest token (default)"
    )
    parser.add_argument("--top-p", metavar="X", type=float, help="draw among the tokens that reach this probability")
    parser.add_argument("--top-k", metavar="N", type=int, help="draw among this many tokens")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the draws; default: %(default)s")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of weights and activations; default: %(default)s",
    )
    parser.add_argument(
        "--dialect",
        choices=("official", "transformers"),
        help="the form of positions and placeholders; default: what the model was trained with",
    )
    parser.set_defaults(work=_chat)


def _chat(options: argparse.Namespace) -> int:
    from qwenvl_jax.generate import chat

    chat(
        options.model,
        options.question,
        images=options.image,
        videos=options.video,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
        dtype=options.dtype,
        dialect=options.dialect,
    )
    return 0


def _add_data(commands) -> None:
    parser = commands.add_parser(
        "data",
        help="data sets and videos as a model sees them; JSONL files as ArrayRecord",
        description="Looks at data as a model would see it, and makes data sets for training.",
        epilog=f"""examples:
  {PROG} data frames clip.mp4
  {PROG} data inspect clips.jsonl --index 3
  {PROG} data stats clips.jsonl --out stats.png
  {PROG} data build clips.jsonl ./clips --embed-media
  {PROG} data steps config.py --steps 1000

`{PROG} data COMMAND --help` tells more about each.""",
    )
    inner = parser.add_subparsers(dest="action", metavar="COMMAND", required=True)
    data.add(inner)
    parser.set_defaults(work=_data)


def _data(options: argparse.Namespace) -> int:
    return options.act(options)
