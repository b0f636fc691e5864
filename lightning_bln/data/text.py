"""Text to token ids: a tokenizer and a vocabulary, from torchtext where it loads, else from Hugging Face.

Both backends give the same ids for the same text. A tokenizer is any callable from a string to tokens, a vocabulary any
callable from tokens to ids; so torchtext's ``get_tokenizer(...)`` and ``Vocab`` objects fit, whichever backend is used.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, Literal, Protocol, cast

Backend = Literal["auto", "torchtext", "tokenizers"]
Tokenizer = Callable[[str], list[str]]

PAD, UNKNOWN = "<pad>", "<unk>"
_KERAS_FILTER = '!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~\t\n'
# The replacements of torchtext's "basic_english", in its documented order.
_BASIC_ENGLISH = (
    (r"'", " '  "),
    (r'"', ""),
    (r"\.", " . "),
    (r"<br \/>", " "),
    (r",", " , "),
    (r"\(", " ( "),
    (r"\)", " ) "),
    (r"!", " ! "),
    (r"\?", " ? "),
    (r";", " "),
    (r":", " "),
)


class Vocabulary(Protocol):
    """Interface of a pipeline's vocabulary, which ``torchtext.vocab.Vocab`` implements."""

    def __call__(self, tokens: list[str]) -> list[int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, token: str) -> int: ...

    def __contains__(self, token: str) -> bool: ...

    def get_itos(self) -> list[str]: ...


def backends() -> list[str]:
    """Return the backends that can be imported, the preferred one first."""
    return [name for name in ("torchtext", "tokenizers") if _load(name) is not None]


def get_tokenizer(name: str | Tokenizer = "basic_english", backend: Backend = "auto") -> Tokenizer:
    """Return a tokenizer by name.

    Args:
        name: ``"basic_english"`` (torchtext's), ``"keras"`` (the filters behind Keras's IMDB files), ``"whitespace"``,
            ``"characters"``, or any callable from a string to tokens, which is returned unchanged.
        backend: ``"torchtext"``, ``"tokenizers"``, or ``"auto"`` for the first that loads.

    Raises:
        ValueError: The name is none of these.
        ImportError: The backend asked for does not load; the message says how to get it.

    Example:
        >>> get_tokenizer("characters")("ab")
        ['a', 'b']
        >>> get_tokenizer("whitespace")("a  b")
        ['a', 'b']
    """
    if callable(name):
        return name
    if name == "whitespace":
        return str.split
    if name == "characters":
        return cast(Tokenizer, list)
    if name not in ("basic_english", "keras"):
        raise ValueError(f"name={name!r}; use 'basic_english', 'keras', 'whitespace', 'characters' or a callable")
    module = _require(backend)
    if module.__name__ == "torchtext":
        return module.data.utils.get_tokenizer("basic_english") if name == "basic_english" else _keras_words
    return _RustTokenizer(name)


def build_vocabulary(
    tokens: Iterable[list[str]],
    *,
    min_freq: int = 1,
    max_tokens: int | None = None,
    specials: Sequence[str] = (PAD, UNKNOWN),
    unknown: str | None = UNKNOWN,
    backend: Backend = "auto",
) -> Vocabulary:
    """Build a vocabulary of the specials, then tokens by falling frequency, ties by code point.

    Args:
        tokens: One list of tokens per text.
        min_freq: Rarer tokens are left out.
        max_tokens: Largest size, specials included.
        specials: The first tokens.
        unknown: The special that any other token maps to; ``None`` makes such a token an error.
        backend: ``"torchtext"`` gives a ``torchtext.vocab.Vocab``, ``"tokenizers"`` a :class:`WordVocabulary`.

    Example:
        >>> vocabulary = build_vocabulary([["b", "a", "b"]], backend="tokenizers")
        >>> vocabulary(["a", "b", "c"])
        [3, 2, 1]
    """
    module = _require(backend)
    if module.__name__ == "torchtext":
        built = module.vocab.build_vocab_from_iterator(
            tokens, min_freq=min_freq, specials=list(specials), max_tokens=max_tokens
        )
        if unknown is not None:
            built.set_default_index(built[unknown])
        return cast(Vocabulary, built)
    counts = Counter(chain.from_iterable(tokens))
    for special in specials:
        counts.pop(special, None)
    words = sorted((word for word in counts if counts[word] >= min_freq), key=lambda word: (-counts[word], word))
    kept = words if max_tokens is None else words[: max_tokens - len(specials)]
    return WordVocabulary([*specials, *kept], None if unknown is None else list(specials).index(unknown))


class WordVocabulary:
    """A vocabulary with the methods of torchtext's ``Vocab``, which does not need torchtext.

    Args:
        words: The tokens, in order of their ids.
        default_index: The id of any other token; ``None`` makes such a token an error.

    Example:
        >>> WordVocabulary(["<unk>", "film"], default_index=0)(["film", "flim"])
        [1, 0]
    """

    def __init__(self, words: Iterable[str], default_index: int | None = None) -> None:
        self._words = list(words)
        self._ids = {word: index for index, word in enumerate(self._words)}
        self._default = default_index

    def __call__(self, tokens: list[str]) -> list[int]:
        if self._default is None:
            return [self[token] for token in tokens]
        ids, default = self._ids, self._default
        return [ids.get(token, default) for token in tokens]

    def __len__(self) -> int:
        return len(self._words)

    def __contains__(self, token: str) -> bool:
        return token in self._ids

    def __getitem__(self, token: str) -> int:
        if token not in self._ids and self._default is None:
            raise KeyError(f"token {token!r} is not in the vocabulary; give it a default_index")
        return self._ids.get(token, cast(int, self._default))

    def get_itos(self) -> list[str]:
        return list(self._words)

    def get_stoi(self) -> dict[str, int]:
        return dict(self._ids)

    def get_default_index(self) -> int | None:
        return self._default

    def lookup_tokens(self, indices: Sequence[int]) -> list[str]:
        return [self._words[index] for index in indices]


class TextPipeline:
    """A tokenizer followed by a vocabulary: text to token ids.

    Args:
        tokenizer: A name for :func:`get_tokenizer`, or any callable from a string to tokens.
        vocabulary: Any callable from tokens to ids, such as torchtext's ``Vocab``.
        prefix: Ids put before every text, such as a start token.

    Example:
        >>> TextPipeline("whitespace", WordVocabulary(["<unk>", "good"], 0))("good film")
        [1, 0]
    """

    def __init__(self, tokenizer: str | Tokenizer, vocabulary: Vocabulary, prefix: Sequence[int] = ()) -> None:
        self.tokenizer = get_tokenizer(tokenizer)
        self.vocabulary = vocabulary
        self.prefix = list(prefix)

    def __call__(self, text: str) -> list[int]:
        return self.prefix + self.vocabulary(self.tokenizer(text))


class _RustTokenizer:
    """A named tokenizer run by Hugging Face ``tokenizers``; pickled by name, so that loader workers can receive it."""

    def __init__(self, name: str) -> None:
        self.name = name
        tokenizers = _require("tokenizers")
        steps: list[Any] = [tokenizers.normalizers.Lowercase()]
        if name == "basic_english":
            steps += [
                tokenizers.normalizers.Replace(tokenizers.Regex(pattern), text) for pattern, text in _BASIC_ENGLISH
            ]
        else:
            escaped = "".join("\\" + character for character in _KERAS_FILTER if character not in "\t\n")
            steps.append(tokenizers.normalizers.Replace(tokenizers.Regex(f"[{escaped}\t\n]"), " "))
        self._normalizer = tokenizers.normalizers.Sequence(steps)

    def __call__(self, text: str) -> list[str]:
        # Split in Python, since Rust does not count the separators 0x1c to 0x1f as white space.
        tokens = self._normalizer.normalize_str(text).split(None if self.name == "basic_english" else " ")
        return tokens if self.name == "basic_english" else [token for token in tokens if token]

    def __reduce__(self) -> tuple[type[_RustTokenizer], tuple[str]]:
        return type(self), (self.name,)


_KERAS_TABLE = str.maketrans(dict.fromkeys(_KERAS_FILTER, " "))


def _keras_words(text: str) -> list[str]:
    return [token for token in text.lower().translate(_KERAS_TABLE).split(" ") if token]


@functools.cache
def _load(name: str) -> Any | None:
    """Import a backend, or return None; beside another torch than its own, torchtext raises OSError."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(name)
            if name == "torchtext":
                module.disable_torchtext_deprecation_warning()
                importlib.import_module("torchtext.data.utils")
                importlib.import_module("torchtext.vocab")
        return module
    except (ImportError, OSError, AttributeError):
        return None


def _require(backend: str) -> Any:
    if backend not in ("auto", "torchtext", "tokenizers"):
        raise ValueError(f"backend={backend!r}; use 'auto', 'torchtext' or 'tokenizers'")
    for name in ("torchtext", "tokenizers") if backend == "auto" else (backend,):
        if (module := _load(name)) is not None:
            return module
    mend = {
        "torchtext": "install lightning-bln[torchtext] (torchtext 0.18.0 loads only beside torch 2.3)",
        "tokenizers": "install lightning-bln[text]",
        "auto": "install lightning-bln[text], or lightning-bln[torchtext] for torch 2.3",
    }
    raise ImportError(f"backend={backend!r} does not load here; {mend[backend]}")
