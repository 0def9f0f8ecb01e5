"""The `brachium` command: a table of verbs. Nothing heavy is imported before a verb is known."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from . import __version__
from .errors import BrachiumError, ConfigError, did_you_mean

# verb -> (primary config in conf/, one-line summary). The config's `_target_` names the function that runs.
VERBS: dict[str, tuple[str, str]] = {
    "doctor": ("doctor", "check this machine: Python, packages, GPU, MuJoCo rendering, disk"),
    "list": ("list", "list heads, backbones, embodiments, envs, and what outputs/ holds"),
    "record": ("record", "record demonstrations from an env's expert or from a robot into an episode store"),
    "inspect": ("inspect", "look into an episode store: features, lengths, statistics, pictures"),
    "view": ("view", "look at episodes: pictures over time beside every signal, in rerun or on an HTML page"),
    "stats": ("stats", "statistics of the fields of an episode store"),
    "verify": ("verify", "prove a checkpoint, or read an episode store against its checksums"),
    "edit": ("edit", "change instructions, success and tags of episodes, or remove episodes"),
    "filter": ("filter", "make a store of the episodes that fit some conditions"),
    "split": ("split", "split a store into several, for example for training and testing"),
    "merge": ("merge", "make one store of several"),
    "compact": ("compact", "join small segments of a store to large ones"),
    "resize": ("resize", "make a store whose images have other sizes"),
    "convert": ("convert", "foreign episode data (RLDS, LeRobot, HDF5, replay buffers) into an episode store"),
    "export": ("export", "an episode store into a foreign format (LeRobot)"),
    "push": ("push", "copy an episode store to S3, GCS, Azure or the Hugging Face Hub"),
    "pull": ("pull", "copy an episode store from there"),
    "pretrain": ("pretrain", "pretrain a small vision-language model on rendered scenes with questions"),
    "train-positions": ("train_positions", "learn where things are from where a pretrained model points"),
    "train-lm": ("train_lm", "train the tiny language model of the planners"),
    "train-latent": ("train_latent", "train a slow vision-language model and a fast policy that share a latent"),
    "train-reader": ("train_reader", "train what reads scenes for planners"),
    "train-judge": ("train_judge", "learn what a policy's skills can do, and when they are done"),
    "train-visual": ("train_visual", "train generated image subgoals and a policy that reaches them (SuSIE)"),
    "train-video": ("train_video", "train generated videos and inverse dynamics that follow them (UniPi)"),
    "train": ("train", "train a backbone and an action head on episode stores"),
    "profile": ("profile", "see where the time of a chunk and of a training step goes, beside what the device allows"),
    "import-policy": ("import_policy", "a policy of LeRobot or openpi as a checkpoint"),
    "export-policy": ("export_policy", "a checkpoint as a policy of LeRobot"),
    "eval": ("eval", "run a policy (checkpoint=) or a planner (planner=) in closed loop and count successes"),
    "benchmark": ("benchmark", "measure a policy on a suite of others, beside the published figures"),
    "plan": ("plan", "plan what an instruction asks for, and do it in simulation, with a video"),
    "serve": ("serve", "serve a checkpoint to clients: websocket, as openpi's"),
    "twin": ("twin", "a simulated robot in real time, to be deployed to as to a real one"),
    "deploy": ("deploy", "run a policy on a robot: preflight, control loop, safety, log, report"),
    "replay": ("replay", "send the actions of a recorded episode to a robot"),
    "ask": ("ask", "ask a pretrained vision-language model about an image"),
    "demo": ("demo", "record, train and evaluate a small policy from nothing, on a CPU"),
}
COMPLETION = "completion"
# A verb that does another thing when one of these groups is chosen: verb -> (words begin with, config).
VARIANTS: dict[str, dict[tuple[str, ...], str]] = {
    "eval": {
        ("planner=visual", "planner=video", "planner=latent"): "eval_subgoals",
        ("planner=", "planner@"): "eval_planner",
    },
    "record": {("robot=", "teleop="): "record_robot", ("policy=",): "record_policy"},
}
# What may be typed without its name: verb -> option.
BARE = {"plan": "instruction", "benchmark": "protocol"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code.

    0 is success, 1 an unexpected error or a failed check, 2 a mistake in what was typed, 130 an interruption.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    prefix = f"brachium {words[0]}" if words and words[0] in VERBS else "brachium"
    try:
        return _dispatch(words)
    except BrachiumError as error:
        if os.environ.get("BRACHIUM_TRACEBACK") == "1":
            raise
        print(f"{prefix}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if os.environ.get("BRACHIUM_TRACEBACK") == "1":
            raise
        if "RANK" not in os.environ:  # one of several processes: who started them says so
            print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `brachium list | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        print(help_text())
        return 0
    verb, rest = words[0], words[1:]
    if verb in ("--version", "-V"):
        print(f"brachium {__version__}")
        return 0
    if verb == COMPLETION:
        from .cli.completion import print_script

        return print_script(rest)
    if verb == "__complete":
        from .cli.completion import print_candidates

        return print_candidates(" ".join(rest), {name: config for name, (config, _) in VERBS.items()})
    if verb not in VERBS:
        raise ConfigError(f"expected a verb, got {verb!r}. {did_you_mean(verb, VERBS)}\nType: brachium --help")
    from .cli.run import run_verb

    rest = with_names(verb, rest)
    return run_verb(verb, config_of(verb, rest), rest, VERBS[verb][1])


def with_names(verb: str, words: Sequence[str]) -> list[str]:
    """The words, with the name of the option that may be typed without it."""
    found = list(words)
    bare = [k for k, word in enumerate(found) if not re.match(r"-|~|\+|[A-Za-z_][\w.@/]*=", word)]
    if verb in BARE and len(bare) == 1:
        word = found[bare[0]]
        text = word.replace("\\", "\\\\").replace("'", "\\'")
        plain = re.fullmatch(r"(?!(true|false|null|nan|inf)$)[A-Za-z_]\w*", word, re.IGNORECASE)
        found[bare[0]] = f"{BARE[verb]}={word}" if plain else f"{BARE[verb]}='{text}'"
    return found


def config_of(verb: str, words: Sequence[str]) -> str:
    """The primary config of a verb with these words after it."""
    for starts, other in VARIANTS.get(verb, {}).items():
        if any(word.startswith(starts) for word in words):
            return other
    return VERBS[verb][0]


def help_text() -> str:
    """Return what `brachium --help` prints."""
    width = max(len(verb) for verb in VERBS)
    verbs = "\n".join(f"  {verb:<{width}}  {summary}" for verb, (_, summary) in VERBS.items())
    return f"""\
brachium {__version__}: train and run vision-language-action policies for robots

usage: brachium VERB [key=value ...] [--help] [--dry-run] [--multirun] [--config-dir DIR]

verbs
{verbs}

  brachium VERB --help        the options of a verb, with their present values
  brachium VERB --dry-run     compose and check everything, print what would be done, touch nothing
  brachium VERB -m key=1,2    run once for each value
  brachium completion bash    print a completion script (bash, zsh or fish)
  brachium --version
"""


if __name__ == "__main__":
    sys.exit(main())
