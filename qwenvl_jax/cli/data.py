"""The commands of `qwenvl-jax data`: parsers. The work is done below."""

import argparse

from qwenvl_jax.cli.name import PROG
from qwenvl_jax.errors import ConfigError


def add(commands) -> None:
    """Adds a parser for each to the subparsers of `data`."""
    _add_frames(commands)
    _add_build(commands)
    _add_inspect(commands)
    _add_stats(commands)
    _add_steps(commands)


def _add_frames(commands) -> None:
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
    parser.add_argument(
        "--min-frame-tokens", metavar="N", type=int, help="of a frame at least: fewer frames hold --max-video-tokens"
    )
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
    parser.set_defaults(act=_frames, parser=parser)


def _seconds(text: str) -> list[float]:
    """Numbers with commas between them."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be seconds with commas between, as 1.5,3,8") from error


def _frames(options: argparse.Namespace) -> int:
    from qwenvl_jax.data.frames import show

    names = "sampler fps num_frames min_frames min_fps max_fps timestamps start end max_frame_tokens max_video_tokens "
    names += "min_frame_tokens pool pool_method"
    part = {name: getattr(options, name) for name in names.split()}
    if options.budget is not None:
        name = "num_frames" if options.sampler == "count" else "max_frames"
        if part.get(name) is not None:
            raise ConfigError("--budget and --num-frames say the same of the sampler count; drop one.")
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


def _add_build(commands) -> None:
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
    parser.set_defaults(act=_build, parser=parser)


def _build(options: argparse.Namespace) -> int:
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


def _add_inspect(commands) -> None:
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
    parser.set_defaults(act=_inspect, parser=parser)


def _inspect(options: argparse.Namespace) -> int:
    from qwenvl_jax.data.inspect import show

    show(options.source, index=options.index, model=options.model, as_json=options.json)
    return 0


def _add_stats(commands) -> None:
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
reason. A video given as images has no source_fps, and a duration only where its record gives one.""",
    )
    parser.add_argument("source", metavar="SRC", help="a JSONL file, or a folder of `data build` or tfds")
    parser.add_argument("--model", metavar="NAME|PATH", help=f"{_PROCESSORS}; default: the folder's, else qwen3_vl_4b")
    parser.add_argument("--json", action="store_true", help="as JSON, see below")
    parser.add_argument("--out", metavar="FILE", help="draw histograms into this file, such as stats.png")
    parser.set_defaults(act=_stats, parser=parser)


def _stats(options: argparse.Namespace) -> int:
    from qwenvl_jax.data.stats import show

    show(options.source, model=options.model, as_json=options.json, out=options.out)
    return 0


def _add_steps(commands) -> None:
    parser = commands.add_parser(
        "steps",
        help="what the steps of a training config will hold: slots filled, shares of a mixture",
        description="Plans the steps of a training config without taking one, and tells how much of their token and\n"
        "patch slots they fill, how even the vision groups are, and which part of a mixture their samples are of.",
        epilog=f"""examples:
  {PROG} data steps clips.py --steps 1000
  {PROG} data steps configs/sft/own_data.py --model ./my-model --data.mixture.own.source built
  {PROG} data steps clips.py --steps 200 --out steps.png --data.window 64 --batch.vision auto

Further --name value arguments change settings of the config, as with `{PROG} train`.

--json prints one object, {{"stages": [...]}}; of each stage: name, steps, rows, length, groups, vision (pairs of rows
and patches); tokens and patches, the shares of the slots that are filled; balance, of the mean vision group to the
fullest; text_only_steps, which patches and balance leave out; samples; parts, each with name, samples, epochs,
share_of_samples and share_of_tokens.""",
    )
    parser.add_argument("config", metavar="CONFIG", help="a Python file with a get_config()")
    parser.add_argument("--model", metavar="NAME", help="in place of the config's: a preset, a folder or a hub id")
    parser.add_argument("--steps", metavar="N", type=int, help="of each stage, from its first; default: all")
    parser.add_argument("--json", action="store_true", help="as JSON, see below")
    parser.add_argument("--out", metavar="FILE", help="draw the steps into this file, such as steps.png")
    parser.set_defaults(act=_steps, parser=parser, overrides=[])


def _steps(options: argparse.Namespace) -> int:
    from qwenvl_jax.train.outlook import show

    show(
        options.config,
        options.overrides,
        model=options.model,
        steps=options.steps,
        as_json=options.json,
        out=options.out,
    )
    return 0
