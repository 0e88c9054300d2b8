"""Generates text with a decoder whose tokens leave at exits; keys and values stay true.

Modes say what becomes of the layers that a token skipped, when a later token needs their keys and values:
*deferred* (exact): the token's hidden state waits at the exit, and all that wait go through the deeper segment
together, as one chunk; *copy*: only keys and values are made, of the hidden state at the exit (CALM, arXiv
2207.07061, section 3.3); *lossless*: tokens are proposed at the first open exit and verified by the other segments in
one chunk (self-speculation, arXiv 2404.16710, section 4.3), so that the text is that of full depth. Greedy only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import Manifest, load_manifest, read_file, read_policy
from offramp.errors import OptionError
from offramp.policy import Policy
from offramp.runtime.decoder import Decoder, open_decoder
from offramp.runtime.sampling import Sampling, sampled
from offramp.runtime.stepping import Decided, Stepper
from offramp.runtime.text import Detokenizer, checked_tokens

MODES = ("deferred", "copy", "lossless")


@dataclass(frozen=True)
class GenerateOptions:
    """How texts are continued. Raises OptionError.

    `stop_tokens` end a text and are not part of it, beside those of the bundle. `draft` is how many tokens are read
    before they are verified (lossless mode): one less is proposed, for full depth says what follows the last one.
    `capacity` is the share of FFNs that run, where the model has routers.
    """

    max_new_tokens: int = 128
    sampling: Sampling = Sampling()  # noqa: RUF009  (frozen)
    stop_tokens: tuple[int, ...] = ()
    mode: str = "deferred"
    draft: int = 4
    capacity: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise OptionError(f"generating: got mode {self.mode!r}, expected one of {', '.join(MODES)}")
        if self.mode == "lossless" and not self.sampling.is_greedy:
            raise OptionError("generating: lossless mode is greedy; use temperature 0, or mode deferred or copy")
        if self.max_new_tokens < 1 or self.draft < 1:
            raise OptionError(
                f"generating: got max_new_tokens {self.max_new_tokens}, draft {self.draft}; expected 1 or more"
            )


class Token(NamedTuple):
    """One token of one text, as it comes."""

    prompt: int  # which of the prompts it continues
    token: int
    exit_index: int  # where it was decided; in lossless mode, where it was proposed if that was right


@dataclass
class Completion:
    """What was generated for one prompt."""

    tokens: list[int] = field(default_factory=list)
    exit_indices: list[int] = field(default_factory=list)
    reason: str = ""  # "stop": a stop token came; "length": as many tokens as asked for, or as fit
    text: str = ""  # empty when the bundle has no tokenizer


@dataclass
class _Sequence:
    """A prompt that is being continued, in the slot of its position among the live ones."""

    number: int
    last: int  # the token that is to be read next
    completion: Completion
    random: np.random.Generator
    room: int  # tokens that may still come


class Generator:
    """A decoder's bundle, ready to generate; one call at a time."""

    def __init__(self, decoder: Decoder, policy: Policy, tokenizer: bytes = b"") -> None:
        """Raises OptionError when the policy is for another model."""
        self.decoder, self.manifest = decoder, decoder.manifest
        self.policy = policy
        self._text = Detokenizer(tokenizer, self.manifest.name)

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        policy: Policy | None = None,
        precision: str = "fp32",
        threads: int = 0,
        max_batch: int = 0,
    ) -> Generator:
        """A generator over the bundle in directory `bundle`; `policy=None` takes the bundle's own.

        `max_batch` prompts are continued together; 0: 8, or what the bundle takes if that is less.

        Raises OptionError, BundleError (CorruptError, VersionError) or BackendError.
        """
        path = Path(bundle)
        manifest: Manifest = load_manifest(path)
        chosen = Policy.from_json(read_policy(path, manifest)) if policy is None else policy
        tokenizer = read_file(path, manifest.text.tokenizer) if manifest.text else b""
        return cls(open_decoder(path, manifest, precision, threads, max_batch), chosen, tokenizer)

    @property
    def policy(self) -> Policy:
        """The policy of the next call."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        policy.check_model(self.manifest)
        self._policy = policy

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        options: GenerateOptions = GenerateOptions(),
    ) -> list[Completion]:
        """Continue every prompt, texts or token ids, in their order. Raises InputError, BackendError."""
        completions = [Completion() for _ in prompts]
        for _ in self._steps(prompts, options, completions):
            pass
        for completion in completions:
            completion.text = self._text.decode(completion.tokens) if self._text.is_there else ""
        return completions

    def stream(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        options: GenerateOptions = GenerateOptions(),
    ) -> Iterator[Token]:
        """The tokens of all prompts as they come; stop tokens are left out. Raises as `generate`."""
        for tokens in self._steps(prompts, options, [Completion() for _ in prompts]):
            yield from tokens

    def encode(self, text: str) -> list[int]:
        """The token ids of a text. Raises InputError when the bundle has no tokenizer."""
        return self._text.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids. Raises InputError when the bundle has no tokenizer."""
        return self._text.decode(tokens)

    def close(self) -> None:
        """Let go of everything."""
        self.decoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _steps(
        self, prompts: Sequence[Any], options: GenerateOptions, completions: list[Completion]
    ) -> Iterator[list[Token]]:
        """Admit prompts while there are slots, let all live sequences take a step, retire those that are over."""
        waiting = checked_tokens(prompts, self._text, self.manifest)
        live: list[_Sequence] = []
        stop = {*options.stop_tokens, *self.decoder.spec.stop_tokens}

        def choose(slot: int, logits: NDArray[np.float32]) -> int:
            return sampled(logits, options.sampling, live[slot].random)

        self.decoder.set_capacity(options.capacity)
        chosen = None if options.sampling.is_greedy else choose
        stepper = Stepper(self.decoder, self.policy, options.mode, options.draft, chosen)
        position = 0
        while live or position < len(waiting):
            while len(live) < self.decoder.slots and position < len(waiting):
                tokens = waiting[position]
                room = min(options.max_new_tokens, self.decoder.spec.max_positions - len(tokens) + 1)
                random = options.sampling.generator(position)
                live.append(_Sequence(position, 0, completions[position], random, room))
                yield self._taken(live[-1], [stepper.prompt(len(live) - 1, tokens)], stop)
                self._retire(live)
                position += 1
            if live:
                room = max(sequence.room for sequence in live)
                found = stepper.step(0, [sequence.last for sequence in live], room)
                yield [token for s, new in zip(live, found, strict=True) for token in self._taken(s, new, stop)]
                self._retire(live)

    @staticmethod
    def _taken(sequence: _Sequence, decided: Iterable[Decided], stop: set[int]) -> list[Token]:
        """Write down the new tokens of one sequence, up to where it ends."""
        tokens = []
        for token, exit_index in decided:
            if token in stop:
                sequence.completion.reason = "stop"
                break
            sequence.completion.tokens.append(token)
            sequence.completion.exit_indices.append(exit_index)
            tokens.append(Token(sequence.number, token, exit_index))
            sequence.last, sequence.room = token, sequence.room - 1
            if not sequence.room:
                sequence.completion.reason = "length"
                break
        return tokens

    def _retire(self, live: list[_Sequence]) -> None:
        """Take out sequences that are over; the last one moves into a slot that becomes free."""
        for slot in reversed(range(len(live))):
            if live[slot].completion.reason:
                last = live.pop()
                if slot < len(live):
                    self.decoder.move(len(live), slot)
                    live[slot] = last
