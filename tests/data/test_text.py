"""The text pipeline: both backends, and objects of theirs handed straight in."""

from __future__ import annotations

import pickle
from collections import Counter

import pytest

from lightning_bln.data import (
    LabelledTexts,
    TextPipeline,
    WordVocabulary,
    backends,
    build_vocabulary,
    get_tokenizer,
)
from lightning_bln.data.text import Backend, _keras_words

AVAILABLE = backends()
needs_torchtext = pytest.mark.skipif("torchtext" not in AVAILABLE, reason="torchtext does not load beside this torch")
needs_both = pytest.mark.skipif(len(AVAILABLE) < 2, reason="only one text backend loads here")


@pytest.mark.parametrize("backend", AVAILABLE)
def test_basic_english(backend: Backend) -> None:
    tokens = get_tokenizer("basic_english", backend)('It\'s GREAT!<br />("Really": 9.5, no; yes?)\x85 Ünder\t\n')
    assert tokens == ["it", "'", "s", "great", "!", "(", "really", "9", ".", "5", ",", "no", "yes", "?", ")", "ünder"]


@pytest.mark.parametrize("backend", AVAILABLE)
def test_keras_tokens(backend: Backend) -> None:
    tokens = get_tokenizer("keras", backend)("It's GREAT!<br />(9.5)_x\t\n a-b")
    assert tokens == ["it's", "great", "br", "9", "5", "x", "a", "b"]


@pytest.mark.parametrize("backend", AVAILABLE)
def test_tokenizers_pickle(backend: Backend) -> None:
    tokenize = pickle.loads(pickle.dumps(get_tokenizer("basic_english", backend)))
    assert tokenize("a.b") == ["a", ".", "b"]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="name='spacy'; use 'basic_english'"):
        get_tokenizer("spacy")
    with pytest.raises(ValueError, match="backend='nltk'"):
        get_tokenizer("keras", backend="nltk")  # type: ignore[arg-type]


@pytest.mark.skipif("torchtext" in AVAILABLE, reason="torchtext loads here")
def test_a_backend_that_does_not_load_says_what_to_install() -> None:
    with pytest.raises(ImportError, match=r"install lightning-bln\[torchtext\]"):
        get_tokenizer("basic_english", backend="torchtext")


@pytest.mark.parametrize("backend", AVAILABLE)
def test_vocabulary_order_and_limits(backend: Backend) -> None:
    texts = [["b", "a", "b", "c"], ["a", "d", "b"]]
    vocabulary = build_vocabulary(texts, backend=backend)
    assert vocabulary.get_itos() == ["<pad>", "<unk>", "b", "a", "c", "d"]
    assert vocabulary(["d", "never seen", "b"]) == [5, 1, 2]
    assert len(build_vocabulary(texts, max_tokens=3, backend=backend)) == 3
    assert build_vocabulary(texts, min_freq=2, backend=backend).get_itos()[2:] == ["b", "a"]
    assert "c" in vocabulary
    assert vocabulary["a"] == 3


@pytest.mark.parametrize("backend", AVAILABLE)
def test_unknown_token_without_a_place_is_an_error(backend: Backend) -> None:
    vocabulary = build_vocabulary([["a"]], specials=[], unknown=None, backend=backend)
    with pytest.raises((KeyError, RuntimeError), match=r"not in|not found"):
        vocabulary(["b"])


def test_pipeline_on_real_reviews(reviews: tuple[LabelledTexts, LabelledTexts]) -> None:
    texts = reviews[0].texts[:500]
    tokenize = get_tokenizer("keras")
    vocabulary = build_vocabulary(map(tokenize, texts), max_tokens=300)
    counts = Counter(token for text in texts for token in _keras_words(text))
    common = [word for word, _ in counts.most_common(20)]
    assert set(common) <= set(vocabulary.get_itos()[2:40])
    ids = TextPipeline("keras", vocabulary, prefix=[7])(texts[0])
    assert ids[0] == 7
    assert len(ids) == 1 + len(_keras_words(texts[0]))
    assert max(ids) < 300


@needs_both
@pytest.mark.parametrize("name", ["basic_english", "keras"])
def test_both_backends_give_the_same_ids_on_real_reviews(
    reviews: tuple[LabelledTexts, LabelledTexts], name: str
) -> None:
    texts = reviews[0].texts[::10] + reviews[1].texts[::10]
    results = []
    for backend in ("torchtext", "tokenizers"):
        tokens = [get_tokenizer(name, backend)(text) for text in texts]
        vocabulary = build_vocabulary(tokens, max_tokens=5_000, backend=backend)
        results.append(([vocabulary(text) for text in tokens], vocabulary.get_itos()))
    assert results[0][1] == results[1][1]
    assert results[0][0] == results[1][0]


@needs_torchtext
def test_torchtext_objects_go_straight_in() -> None:
    from torchtext.data.utils import get_tokenizer as theirs
    from torchtext.vocab import build_vocab_from_iterator, vocab

    tokenize = theirs("basic_english")
    built = build_vocab_from_iterator(map(tokenize, ["a good film", "a bad film"]), specials=["<unk>"])
    built.set_default_index(built["<unk>"])
    assert TextPipeline(tokenize, built)("A great film.") == [1, 0, 2, 0]
    assert TextPipeline("whitespace", vocab({"x": 2, "y": 1}))("y x") == [1, 0]


def test_own_vocabulary_has_the_methods_of_torchtext() -> None:
    vocabulary = WordVocabulary(["<unk>", "a"], default_index=0)
    assert vocabulary.get_stoi() == {"<unk>": 0, "a": 1}
    assert vocabulary.get_default_index() == 0
    assert vocabulary.lookup_tokens([1, 0]) == ["a", "<unk>"]
    assert vocabulary["b"] == 0
