"""Which tokens may come next, so that what a model writes is one of given texts, or several in a row.

A sentence of `Choices` is made of pieces: each option but the last with the separator behind it, the last with the end
behind it. A piece is encoded as a whole and on its own, and a sentence's tokens are its pieces' one after another. So
an option and what follows it are cut into tokens as a model has seen them (`.` and a line end are often one token);
only the cut behind a separator, and before the first option, is ours. What `encode` gives must therefore mean the text
in the middle of a text: no begin-of-text token, no space of the tokenizer's own.

The positions in the trie that a text can be at are kept as a set, for one text may be cut into options in several ways.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ....errors import ConfigError
from .base import Choices

State = frozenset[tuple[int, int]]
"""Pairs (options that are over, node)."""

_MORE, _LAST, _EMPTY, _DONE = 0, 1, 2, 3
"""Nodes: where a piece with a separator begins, where the last one does, an end without options, and behind it all."""


class TokenConstraint:
    """The tokens that may come next.

    Args:
        encode: Tokens of a text in the middle of a text.
        choices: What may be written.
        end_id: The model's end-of-sequence token, which ends a sentence where `choices` has no `end`.

    Raises:
        ConfigError: No options, options without tokens or with the same tokens, no way to tell where a sentence ends.
    """

    def __init__(self, encode: Callable[[str], list[int]], choices: Choices, end_id: int | None) -> None:
        if choices.repeat < 1:
            raise ConfigError(f"expected at least one option in a row, got repeat={choices.repeat}")
        if not choices.options:
            raise ConfigError("expected options to choose from, got none")
        if not choices.end and end_id is None:
            raise ConfigError("expected an end: a text in choices.end, or the model's end-of-sequence token")
        self.choices = choices
        self._next: list[dict[int, int]] = [{}, {}, {}, {}]
        self._over: set[int] = set()
        """Nodes at which an option and the separator behind it are over."""
        self._build(encode, [] if choices.end or end_id is None else [end_id])
        self._refuse_open_ends()

    def start(self) -> State:
        """Before the first token."""
        return frozenset((0, node) for node in self._heads(0))

    def allowed(self, state: State) -> frozenset[int]:
        """Tokens that may come next; none where the sentence is over."""
        return frozenset(token for _, node in state for token in self._next[node])

    def advance(self, state: State, token: int) -> State:
        """What comes after a token.

        Raises:
            ConfigError: A token that is not allowed.
        """
        fewest: dict[int, int] = {}  # of options at a node: whoever has used up fewer may write whatever others may
        for count, node in state:
            after = self._next[node].get(token)
            if after is None:
                continue
            fewest[after] = min(count, fewest.get(after, count))
            if after in self._over:
                for head in self._heads(count + 1):
                    fewest[head] = min(count + 1, fewest.get(head, count + 1))
        if not fewest:
            some = ", ".join(map(str, sorted(self.allowed(state))[:8]))
            raise ConfigError(f"expected an allowed token ({some or 'none: the text is over'}), got {token}")
        return frozenset((count, node) for node, count in fewest.items() if self._next[node] or node == _DONE)

    def finished(self, state: State) -> bool:
        """Whether the sentence is over; nothing is allowed then."""
        return any(node == _DONE for _, node in state)

    def _heads(self, count: int) -> tuple[int, ...]:
        """Nodes at which the text goes on after `count` options."""
        last = (_LAST,) if count + 1 >= self.choices.repeat else (_MORE, _LAST)
        return (*last, _EMPTY) if count == 0 and self.choices.may_be_empty else last

    def _build(self, encode: Callable[[str], list[int]], ending: list[int]) -> None:
        owners: dict[tuple[int, ...], str] = {}
        for option in dict.fromkeys(self.choices.options):
            tokens = tuple(encode(option))
            if not tokens:
                raise ConfigError(f"expected options that have tokens, got {option!r}")
            if tokens in owners:
                raise ConfigError(
                    f"expected options that differ, got the same tokens for {owners[tokens]!r} and {option!r}: "
                    "words that the tokenizer does not know?"
                )
            owners[tokens] = option
            self._insert(_LAST, [*encode(option + self.choices.end), *ending], _DONE)
            if self.choices.repeat > 1:
                self._over.add(self._insert(_MORE, encode(option + self.choices.separator), None))
        if self.choices.may_be_empty:
            self._insert(_EMPTY, [*(encode(self.choices.end) if self.choices.end else []), *ending], _DONE)

    def _insert(self, head: int, tokens: Sequence[int], last: int | None) -> int:
        """Add a piece and return its last node, which is `last` where given."""
        node = head
        for i, token in enumerate(tokens):
            known = self._next[node].get(token)
            if last is not None and i == len(tokens) - 1:
                if known is not None and known != last:
                    raise ConfigError(self._open_end())
                known = self._next[node][token] = last
            elif known is None:
                known = self._next[node][token] = len(self._next)
                self._next.append({})
            elif known == _DONE:
                raise ConfigError(self._open_end())
            node = known
        return node

    def _refuse_open_ends(self) -> None:
        """Every set of nodes that can be reached, whatever the number of options: none may be over and go on."""
        first = frozenset(node for _, node in self.start())
        seen, rest = {first}, [first]
        while rest:
            nodes = rest.pop()
            for token in {token for node in nodes for token in self._next[node]}:
                after = {self._next[node][token] for node in nodes if token in self._next[node]}
                if after & self._over:
                    after |= {_MORE, _LAST}
                after = {node for node in after if self._next[node] or node == _DONE}
                if _DONE in after and len(after) > 1:
                    raise ConfigError(self._open_end())
                if (found := frozenset(after)) not in seen:
                    seen.add(found)
                    rest.append(found)

    def _open_end(self) -> str:
        what = f"the end {self.choices.end!r}" if self.choices.end else "the model's end-of-sequence token"
        return (
            f"expected options and a separator that cannot be mistaken for {what}, got some that can: give another end"
        )
