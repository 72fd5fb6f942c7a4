"""The command line: parsers, and the one place where errors become a line and an exit status. The work is done below.

Exit status: 0 done; 1 the demo's figures fall short; 2 a mistake in the arguments, a file or the surroundings, told in
one line on standard error; 130 interrupted. Anything else is a defect of this package and shows its traceback.
"""

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Sequence

from qwenvl_jax import __version__
from qwenvl_jax.errors import QwenVLError

PROG = "qwenvl-jax"
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


def _fail(message: str) -> int:
    print(f"{PROG}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


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
    parser.add_argument("--full", action="store_true", help="train to the end, up to an hour, and judge that model")
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
        usage=f"{PROG} train CONFIG [--model NAME] [--out DIR] [--key value ...]",
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
    parser.set_defaults(work=_train, overrides=[])


def _train(options: argparse.Namespace) -> int:
    from qwenvl_jax.train.loop import train_command

    result = train_command(options.config, options.overrides, model=options.model, out=options.out)
    if result.model is None:  # stopped by a signal, with a checkpoint written
        return INTERRUPTED
    print(f"{result.steps} steps are done; the model is in {result.model}")
    return 0


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
  {PROG} export runs/clips ./public""",
    )
    parser.add_argument("src", metavar="SRC", help="a native folder, a run's folder, or a folder in the public layout")
    parser.add_argument("dst", metavar="DST", help="a new or empty folder")
    parser.add_argument("--verify", action="store_true", help="read both again and compare every tensor")
    parser.set_defaults(work=_export)


def _export(options: argparse.Namespace) -> int:
    from qwenvl_jax.convert.advice import advice
    from qwenvl_jax.convert.to_public import export

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
    parser.add_argument("model", metavar="MODEL", help="a folder in the Hugging Face layout, or a hub id (owner/name)")
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
    _add_data_frames(inner)
    _add_data_build(inner)
    _add_data_inspect(inner)
    _add_data_stats(inner)
    _add_data_steps(inner)
    parser.set_defaults(work=_data)


def _data(options: argparse.Namespace) -> int:
    return options.act(options)


def _add_data_frames(commands) -> None:
    parser = commands.add_parser(
        "frames",
        help="which frames of a video a sampler takes, at which times, for how many tokens",
        description="Shows which frames of a video are looked at, when they are shown, why each was taken, what is\n"
        "written into the prompt, and how many tokens the video takes; as a processor has it with the same options.",
        epilog=f"""examples:
  {PROG} data frames clip.mp4
  {PROG} data frames clip.mp4 --sampler dynamic --budget 64 --out sheet.png
  {PROG} data frames clip.mp4 --sampler timestamps --timestamps 1.5,3,8 --json
  {PROG} data frames film.mp4 --start 60 --end 90 --fps 4 --model ./my-model

samplers:
  uniform     evenly, by the rule of the model's generation, 2 fps unless it says otherwise (default)
  count       --num-frames (or --budget) frames, evenly
  dynamic     1 to 4 fps, as much moves; --fps or --num-frames spends that many frames in this ratio
  event       the same rates, dense within a second of cuts and where motion sets in or ends
  keyframes   the frames on both sides of each cut, then ends and middles of shots
  timestamps  the frame nearest to each of --timestamps

Times are those of the file, from its first frame shown, also within --start and --end.

--json prints one object: duration (seconds) and source_fps of the file; frames, each with index and time in the file
and why; groups, the temporal patches, each with time, the mean of its frames, and text, what is written into the prompt
(empty for models that write no times); grid, [t, h, w] in patches; tokens, the video's vision tokens after merging and
pooling.""",
    )
    parser.add_argument("video", metavar="VIDEO", help="the file, or an address that --remote-media allows")
    parser.add_argument("--sampler", metavar="NAME", help="one of those below; default: uniform")
    parser.add_argument("--fps", metavar="X", type=float, help="frames per second, on average")
    parser.add_argument("--num-frames", metavar="N", type=int, help="frames, exactly")
    parser.add_argument("--budget", metavar="N", type=int, help="frames at most; of count, how many")
    parser.add_argument("--min-frames", metavar="N", type=int, help="frames at least; default: the model's, 4")
    parser.add_argument("--min-fps", metavar="X", type=float, help="where nothing moves; default: 1")
    parser.add_argument("--max-fps", metavar="X", type=float, help="where most moves; default: 4")
    parser.add_argument("--timestamps", metavar="S,S,...", type=_seconds, help="seconds in the file")
    parser.add_argument("--start", metavar="S", type=float, help="seconds in the file from which on frames are taken")
    parser.add_argument("--end", metavar="S", type=float, help="seconds in the file up to which frames are taken")
    parser.add_argument("--max-frame-tokens", metavar="N", type=int, help="vision tokens of a frame at most")
    parser.add_argument("--max-video-tokens", metavar="N", type=int, help="vision tokens of the video at most")
    parser.add_argument("--pool", metavar="P", type=int, help="make one token of each P x P of a frame; default: 1")
    parser.add_argument("--pool-method", metavar="NAME", help="bilinear (default) or mean")
    parser.add_argument("--model", metavar="NAME|PATH", help="a preset, a folder or a hub id; default: qwen3_vl_4b")
    parser.add_argument(
        "--remote-media",
        metavar="PREFIX",
        action="append",
        default=[],
        help="addresses that begin so may be fetched, as gs://my-bucket/; may be given several times",
    )
    parser.add_argument("--json", action="store_true", help="as JSON, see below")
    parser.add_argument("--out", metavar="FILE", help="draw frames and timeline into this file, such as sheet.png")
    parser.set_defaults(act=_data_frames, parser=parser)


def _seconds(text: str) -> list[float]:
    """Numbers with commas between them."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be seconds with commas between, as 1.5,3,8") from error


def _data_frames(options: argparse.Namespace) -> int:
    from qwenvl_jax.data.frames import show

    names = "sampler fps num_frames min_frames min_fps max_fps timestamps start end max_frame_tokens max_video_tokens "
    names += "pool pool_method"
    part = {name: getattr(options, name) for name in names.split()}
    if options.budget is not None:
        name = "num_frames" if options.sampler == "count" else "max_frames"
        if part.get(name) is not None:
            raise _UsageError("--budget and --num-frames say the same of the sampler count; drop one.")
        part[name] = options.budget
    show(
        options.video,
        model=options.model,
        as_json=options.json,
        out=options.out,
        remote_media=options.remote_media,
        **part,
    )
    return 0


_PROCESSORS = "a folder, a hub id or a preset"


def _add_data_build(commands) -> None:
    parser = commands.add_parser(
        "build",
        help="JSONL files as a data set in ArrayRecord, for tensorflow-datasets and for training",
        description="Writes records into a data set in ArrayRecord that tensorflow-datasets reads, with the facts by\n"
        "which training plans. A stage takes the folder as its data.source and gives the batches of the files.",
        epilog=f"""examples:
  {PROG} data build clips.jsonl ./clips --model Qwen/Qwen3-VL-4B-Instruct
  {PROG} data build a.jsonl b.jsonl ./clips --model ./my-model --embed-media --shards 16
  {PROG} data build clips.jsonl ./clips --beam DirectRunner --beam-option direct_num_workers=8 \\
      --beam-option direct_running_mode=multi_processing

From Python, also without TensorFlow: tfds.builder_from_directory("./clips").as_data_source("train").

Records that cannot be used are left out and listed in DST/quarantine.jsonl; too many, and DST is not written. DST comes
whole or not at all: until then what is done lies beside it in .DST.building, and started again, a build that was killed
or failed goes on from there. With --beam a cluster measures and writes; its workers have this package and see SRC, the
media and DST under the same paths. Needed: pip install 'qwenvl_jax[tfds]', for --beam 'qwenvl_jax[beam]'.""",
    )
    parser.add_argument("sources", metavar="SRC", nargs="+", help="JSONL files, or folders of tensorflow-datasets")
    parser.add_argument("destination", metavar="DST", help="a new or empty folder")
    parser.add_argument("--model", metavar="NAME|PATH", help=f"{_PROCESSORS}; default: qwen3_vl_4b")
    media = parser.add_mutually_exclusive_group()
    media.add_argument("--embed-media", action="store_true", help="put images and videos into DST/media, each once")
    media.add_argument(
        "--reference-media", dest="embed_media", action="store_false", help="refer to them by path (default)"
    )
    parser.add_argument("--shards", metavar="N", type=int, help="files of records; default: one for each 256 MiB")
    parser.add_argument(
        "--max-failed", metavar="X", type=float, default=0.02, help="share that may fail; default: %(default)s"
    )
    parser.add_argument("--beam", metavar="RUNNER", help="measure and write with Apache Beam, such as by FlinkRunner")
    parser.add_argument(
        "--beam-option", metavar="NAME=VALUE", action="append", default=[], help="of Beam's pipeline; may be repeated"
    )
    parser.set_defaults(act=_data_build, parser=parser)


def _data_build(options: argparse.Namespace) -> int:
    from qwenvl_jax.data.build import build_command

    build_command(
        options.sources,
        options.destination,
        model=options.model,
        embed_media=options.embed_media,
        shards=options.shards,
        max_failed=options.max_failed,
        beam=options.beam,
        beam_options=options.beam_option,
    )
    return 0


def _add_data_inspect(commands) -> None:
    parser = commands.add_parser(
        "inspect",
        help="a record as the model sees it: conversation, tokens, what is learnt, grids, times",
        description="Shows what a record becomes: its conversation, its tokens with those that are learnt marked, the\n"
        "grids of its images and videos, and the times of their temporal patches.",
        epilog=f"""examples:
  {PROG} data inspect clips.jsonl --model ./my-model
  {PROG} data inspect ./clips --index 7 --json

--json prints one object: where, id; conversation and options, as the processor takes them; tokens and learnt, how
many; pieces, runs of tokens, each with first, tokens, kind (read, learnt or vision) and text; ids and taught (0 or 1)
of every token; media, each with type, grid [t, h, w] in patches, and times in seconds.""",
    )
    parser.add_argument("source", metavar="SRC", help="a JSONL file, or a folder of `data build` or tfds")
    parser.add_argument("--index", metavar="N", type=int, default=0, help="of the record, from 0; default: %(default)s")
    parser.add_argument("--model", metavar="NAME|PATH", help=f"{_PROCESSORS}; default: the folder's, else qwen3_vl_4b")
    parser.add_argument("--json", action="store_true", help="as JSON, see below")
    parser.set_defaults(act=_data_inspect, parser=parser)


def _data_inspect(options: argparse.Namespace) -> int:
    from qwenvl_jax.data.inspect import show

    show(options.source, index=options.index, model=options.model, as_json=options.json)
    return 0


def _add_data_stats(commands) -> None:
    parser = commands.add_parser(
        "stats",
        help="counts, lengths, durations, frame rates, frames, patches, and why records fail",
        description="Tells what a data set holds: how many records, images and videos, their lengths in tokens, their\n"
        "durations, frame rates, frames and patches, and how many records cannot be used for which reason.",
        epilog=f"""examples:
  {PROG} data stats clips.jsonl --model ./my-model
  {PROG} data stats ./clips --out stats.png --json

--json prints one object: records, usable, images, videos; figures, by name (tokens, learnt, turns, duration,
source_fps, frames, video_patches, image_patches), each with count, sum, min, median, mean, p90 and max; failures, by
reason.""",
    )
    parser.add_argument("source", metavar="SRC", help="a JSONL file, or a folder of `data build` or tfds")
    parser.add_argument("--model", metavar="NAME|PATH", help=f"{_PROCESSORS}; default: the folder's, else qwen3_vl_4b")
    parser.add_argument("--json", action="store_true", help="as JSON, see below")
    parser.add_argument("--out", metavar="FILE", help="draw histograms into this file, such as stats.png")
    parser.set_defaults(act=_data_stats, parser=parser)


def _data_stats(options: argparse.Namespace) -> int:
    from qwenvl_jax.data.stats import show

    show(options.source, model=options.model, as_json=options.json, out=options.out)
    return 0


def _add_data_steps(commands) -> None:
    parser = commands.add_parser(
        "steps",
        help="what the steps of a training config will hold: slots filled, shares of a mixture",
        description="Plans the steps of a training config without taking one, and tells how much of their token and\n"
        "patch slots they fill, how even the vision groups are, and which part of a mixture their samples are of.",
        epilog=f"""examples:
  {PROG} data steps clips.py --steps 1000
  {PROG} data steps clips.py --steps 200 --out steps.png --data.window 64 --batch.vision auto

Further --name value arguments change settings of the config, as with `{PROG} train`.

--json prints one object, {{"stages": [...]}}; of each stage: name, steps, rows, length, groups, vision (pairs of rows
and patches); tokens and patches, the shares of the slots that are filled; balance, of the mean vision group to the
fullest; text_only_steps, which patches and balance leave out; samples; parts, each with name, samples, epochs,
share_of_samples and share_of_tokens.""",
    )
    parser.add_argument("config", metavar="CONFIG", help="a Python file with a get_config()")
    parser.add_argument("--steps", metavar="N", type=int, help="of each stage, from its first; default: all")
    parser.add_argument("--json", action="store_true", help="as JSON, see below")
    parser.add_argument("--out", metavar="FILE", help="draw the steps into this file, such as steps.png")
    parser.set_defaults(act=_data_steps, parser=parser, overrides=[])


def _data_steps(options: argparse.Namespace) -> int:
    from qwenvl_jax.train.outlook import show

    show(options.config, options.overrides, steps=options.steps, as_json=options.json, out=options.out)
    return 0
