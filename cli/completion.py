"""Shell completion: the scripts, and the candidates they ask for with `brachium __complete WORDS`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import ConfigError, did_you_mean

FLAGS = ("--help", "--dry-run", "--multirun", "--config-dir")

# bash breaks words at '=' and puts back only the last piece, so what stands before it is cut from the candidates.
BASH = r"""
_brachium_complete() {
    local line="${COMP_LINE:0:$COMP_POINT}" cur strip="" IFS=$'\n'
    cur="${line##* }"
    case "$COMP_WORDBREAKS$cur" in *=*=*) strip="${cur%=*}=" ;; esac
    COMPREPLY=($("${COMP_WORDS[0]}" __complete "${line#*brachium }" 2>/dev/null))
    COMPREPLY=("${COMPREPLY[@]#"$strip"}")
    if [ "${#COMPREPLY[@]}" -eq 1 ]; then
        case "${COMPREPLY[0]}" in *= | */ | *. | "") ;; *) COMPREPLY[0]+=" " ;; esac
    fi
}
complete -o nospace -F _brachium_complete brachium
"""
ZSH = r"""
#compdef brachium
_brachium() {
    local -a replies
    replies=("${(@f)$(brachium __complete "${LBUFFER#*brachium }" 2>/dev/null)}")
    compadd -Q -S '' -- $replies
}
compdef _brachium brachium
"""
FISH = r"""
function __brachium_complete
    brachium __complete (string replace -r '^.*?brachium ' '' -- (commandline -cp)) 2>/dev/null
end
complete -c brachium -f -a '(__brachium_complete)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
HELP = """\
usage: brachium completion bash|zsh|fish

  bash    eval "$(brachium completion bash)"     (put this line into ~/.bashrc)
  zsh     eval "$(brachium completion zsh)"      (into ~/.zshrc, after compinit)
  fish    brachium completion fish | source      (into ~/.config/fish/config.fish)
"""


def print_script(words: Sequence[str]) -> int:
    """Print the completion script of the shell named in `words`."""
    if not words or words[0] in ("--help", "-h"):
        print(HELP)
        return 0
    if words[0] not in SCRIPTS:
        raise ConfigError(
            f"completion: expected a shell, got {words[0]!r}. {did_you_mean(words[0], SCRIPTS)}\n"
            "Type: brachium completion bash"
        )
    print(SCRIPTS[words[0]].strip())
    return 0


def print_candidates(line: str, verbs: Mapping[str, str]) -> int:
    """Print one candidate a line for the last word of `line`; nothing when there is none."""
    print("\n".join(candidates(line, verbs)))
    return 0


def candidates(line: str, verbs: Mapping[str, str]) -> list[str]:
    """Return what the last word of `line` can become.

    Args:
        line: What was typed after ``brachium``; a trailing space starts a new word.
        verbs: Verb -> config name.
    """
    *before, word = line.split(" ")
    before = [item for item in before if item]
    if not before:
        return [verb for verb in [*verbs, "completion"] if verb.startswith(word)]
    verb, words = before[0], before[1:]
    if verb == "completion":
        return [shell for shell in SCRIPTS if shell.startswith(word)]
    if verb not in verbs:
        return []
    if word.startswith("-"):
        return [flag for flag in FLAGS if flag.startswith(word)]
    overrides = [item for item in words if not item.startswith("-")]
    flagged = {"--multirun", "-m"} & set(words)
    try:
        found = _query(verbs[verb], overrides, word, multirun=bool(flagged))
    except Exception:  # a half-typed line must never print a traceback between two key presses
        return []
    return [item for item in found if word.startswith("hydra") or not item.startswith(("hydra", "_"))]


def _query(config_name: str, overrides: Sequence[str], word: str, *, multirun: bool) -> list[str]:
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.plugins.completion_plugin import DefaultCompletionPlugin

    from .compose import CONF_MODULE, Composer

    with initialize_config_module(config_module=CONF_MODULE, version_base="1.3"):
        plugin = DefaultCompletionPlugin(GlobalHydra.instance().config_loader())
        words = [*(["--multirun"] if multirun else []), *overrides, word]
        found = [str(item) for item in plugin._query(config_name, " ".join(words))]
    composer = Composer()
    key, equals, value = word.partition("=")
    if equals and (options := composer.choices(key)):
        stem, comma, last = value.rpartition(",")  # model/head=flow,tok: complete the last of several
        found = [f"{key}={stem}{comma}{option}" for option in options if option.startswith(last)]
    elif not equals:  # a group that holds both options and groups is offered as both
        for group in [item for item in found if not item.endswith(("=", "/", "."))]:
            found.remove(group)
            found += [f"{group}=", f"{group}/"]
    return [item for item in sorted(set(found)) if not item.rpartition(".")[2].startswith("_")]
