"""Text to token files: whole documents, nothing lost, nothing half-made."""

import hashlib
import json

import numpy as np
import pytest

from bitnet_jax.data import DataError, load, prepare, train_tokenizer

DOCUMENTS = [f"document {i}: some wörds, line one\nand line two €{i * i}\n" for i in range(200)]


def write_documents(path, documents):
    path.write_bytes("<|endoftext|>\n".join(documents).encode())
    return str(path)


@pytest.fixture
def text(tmp_path):
    return write_documents(tmp_path / "text.txt", DOCUMENTS)


def split_documents(corpus, split):
    """The texts of a byte corpus, cut at its end-of-text bytes."""
    return bytes(getattr(corpus, split)).split(b"\0")


def test_bytes_round_trip_and_counts(tmp_path, text):
    manifest = prepare([text], "bytes", tmp_path / "out", valid_fraction=0.2)
    corpus = load(tmp_path / "out")
    both = split_documents(corpus, "train") + split_documents(corpus, "valid")
    assert sorted(both) == sorted(document.encode() for document in DOCUMENTS)
    for split in ("train", "valid"):
        counts = manifest["splits"][split]
        documents = split_documents(corpus, split)
        assert counts["documents"] == len(documents)
        assert counts["bytes"] == sum(map(len, documents))
        assert counts["tokens"] == counts["bytes"] + len(documents) - 1
        data = (tmp_path / "out" / f"{split}.bin").read_bytes()
        assert counts["sha256"] == hashlib.sha256(data).hexdigest()
    assert corpus.vocab_size == 256 and corpus.train.dtype == np.uint8
    assert corpus.valid_bytes_per_token == (
        manifest["splits"]["valid"]["bytes"] / manifest["splits"]["valid"]["tokens"]
    )


def test_the_first_bytes_of_the_sources(tmp_path, text):
    """Whole documents, up to the end of the one that passes the number; validation is not cut."""
    more = write_documents(tmp_path / "more.txt", ["more " * 99])
    sizes = np.cumsum([len(document.encode()) for document in DOCUMENTS])
    for most, count in ((sizes[9], 10), (sizes[9] + 1, 11), (1, 1), (10**9, 201)):
        out = tmp_path / f"out{most}"
        options = {"valid_sources": [write_documents(tmp_path / "v.txt", ["held out " * 999])]}
        manifest = prepare([text, more], "bytes", out, most_bytes=int(most), **options)
        assert manifest["splits"]["train"]["documents"] == count
        assert manifest["splits"]["valid"]["bytes"] == 9 * 999
        assert split_documents(load(out), "train")[:10] == [
            document.encode() for document in DOCUMENTS[: min(count, 10)]
        ]
    with pytest.raises(DataError, match="has other content"):
        prepare([text, more], "bytes", out, **options)


def test_document_starts(tmp_path, text):
    prepare([text], "bytes", tmp_path / "out", valid_fraction=0.2)
    corpus = load(tmp_path / "out")
    after_separators = np.flatnonzero(corpus.valid == 0) + 1
    np.testing.assert_array_equal(corpus.valid_documents, [0, *after_separators])


def test_one_document_has_no_end_of_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"just\r\none text")
    (tmp_path / "b.txt").write_bytes(b"another")
    a, b = str(tmp_path / "a.txt"), str(tmp_path / "b.txt")
    prepare([a], "bytes", tmp_path / "out", valid_sources=[b])
    corpus = load(tmp_path / "out")
    assert bytes(corpus.train) == b"just\r\none text"
    assert bytes(corpus.valid) == b"another"


def test_split_is_deterministic_and_depends_on_the_seed(tmp_path, text):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare([text], "bytes", tmp_path / name, valid_fraction=0.2, seed=seed)
    valid = {name: set(split_documents(load(tmp_path / name), "valid")) for name in "abc"}
    assert valid["a"] == valid["b"] != valid["c"]
    assert 20 <= len(valid["a"]) <= 60  # 40 expected of 200, within 3.5 standard deviations


def test_split_does_not_depend_on_order_or_file(tmp_path, text):
    reverse = write_documents(tmp_path / "reverse.txt", DOCUMENTS[::-1])
    prepare([text], "bytes", tmp_path / "a", valid_fraction=0.2)
    prepare([reverse], "bytes", tmp_path / "b", valid_fraction=0.2)
    valid = [set(split_documents(load(tmp_path / name), "valid")) for name in "ab"]
    assert valid[0] == valid[1]


def test_kept_duplicates_stay_on_one_side(tmp_path):
    path = write_documents(tmp_path / "twice.txt", DOCUMENTS + DOCUMENTS)
    prepare([path], "bytes", tmp_path / "out", valid_fraction=0.3, keep_duplicates=True)
    corpus = load(tmp_path / "out")
    train, valid = split_documents(corpus, "train"), split_documents(corpus, "valid")
    assert len(train) + len(valid) == 2 * len(DOCUMENTS)
    assert not set(train) & set(valid)


def test_duplicates_are_left_out(tmp_path, text):
    """But for white space; the rest is as if they had never been there."""
    spaced = [document.replace(" ", "\n\t") + "\n" for document in DOCUMENTS[:150]]
    path = write_documents(tmp_path / "twice.txt", DOCUMENTS + DOCUMENTS[::-1] + spaced)
    twice = prepare([path], "bytes", tmp_path / "a", valid_fraction=0.3)["splits"]
    once = prepare([text], "bytes", tmp_path / "b", valid_fraction=0.3)["splits"]
    for split, dropped in (("train", 350), ("valid", 0)):
        assert twice[split].pop("duplicates") == dropped
        assert once[split].pop("duplicates") == 0
        assert twice[split] == once[split]


def test_training_does_not_see_a_document_that_validates(tmp_path, text):
    valid = write_documents(tmp_path / "valid.txt", ["own\n", *DOCUMENTS[50:60], "own\n"])
    counts = prepare([text], "bytes", tmp_path / "out", valid_sources=[valid])["splits"]
    corpus = load(tmp_path / "out")
    train = split_documents(corpus, "train")
    assert train == [document.encode() for document in DOCUMENTS[:50] + DOCUMENTS[60:]]
    assert len(split_documents(corpus, "valid")) == 11
    assert (counts["train"]["duplicates"], counts["valid"]["duplicates"]) == (10, 1)


def test_what_validates_is_never_trained_on(tmp_path, text):
    twice = write_documents(tmp_path / "twice.txt", DOCUMENTS + DOCUMENTS)
    valid = write_documents(tmp_path / "valid.txt", ["own\n", *DOCUMENTS[50:60], "own\n"])
    options = {"valid_sources": [valid], "keep_duplicates": True}
    counts = prepare([twice], "bytes", tmp_path / "out", **options)["splits"]
    train = split_documents(load(tmp_path / "out"), "train")
    assert train == 2 * [document.encode() for document in DOCUMENTS[:50] + DOCUMENTS[60:]]
    assert (counts["train"]["duplicates"], counts["valid"]["duplicates"]) == (20, 0)
    assert counts["valid"]["documents"] == 12


def test_a_corpus_of_before_may_hold_duplicates(tmp_path, text):
    """So it is the same one only if they may stay."""
    out = tmp_path / "out"
    prepare([text], "bytes", out, valid_fraction=0.2, keep_duplicates=True)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["keep_duplicates"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    again = prepare([text], "bytes", out, valid_fraction=0.2, keep_duplicates=True)
    assert again == manifest
    with pytest.raises(DataError, match="has other content"):
        prepare([text], "bytes", out, valid_fraction=0.2)


def test_same_again_is_left_alone_and_other_content_refused(tmp_path, text):
    out = tmp_path / "out"
    first = prepare([text], "bytes", out, valid_fraction=0.2)
    written = (out / "train.bin").stat().st_mtime_ns
    assert prepare([text], "bytes", out, valid_fraction=0.2) == first
    assert (out / "train.bin").stat().st_mtime_ns == written
    with pytest.raises(DataError, match="has other content"):
        prepare([text], "bytes", out, valid_fraction=0.3)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file"):
        prepare([text], "bytes", tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\n<|endoftext|>\nb\0\n", "line 3: the document has a NUL byte"),
        (b"a\n<|endoftext|>\nb\n\xff\n", "line 4: not UTF-8"),
        (b"only one document", "valid split is empty"),
    ],
)
def test_failure_leaves_nothing(tmp_path, content, message):
    (tmp_path / "in.txt").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        prepare([str(tmp_path / "in.txt")], "bytes", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_interruption_leaves_nothing(tmp_path, text, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("bitnet_jax.data.corpus.SplitWriter.finish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare([text], "bytes", tmp_path / "out", valid_fraction=0.2)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_training_text_as_validation_is_refused(tmp_path, text):
    copy = write_documents(tmp_path / "copy.txt", DOCUMENTS)
    with pytest.raises(DataError, match="would see training text"):
        prepare([text], "bytes", tmp_path / "out", valid_sources=[copy])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_bad_fraction(tmp_path, text, fraction):
    with pytest.raises(DataError, match="valid_fraction="):
        prepare([text], "bytes", tmp_path / "out", valid_fraction=fraction)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / "train.bin").write_bytes(b"short"), "5 bytes, where"),
        (lambda out: (out / "valid.bin").unlink(), "missing"),
        (lambda out: (out / "valid_documents.npy").unlink(), "missing"),
        (lambda out: (out / "manifest.json").write_text("{"), "not JSON"),
        (lambda out: edit_manifest(out, schema=99), "schema 99"),
        (lambda out: edit_manifest(out, vocab_size=300), "vocab_size is 300, not 256"),
        (lambda out: edit_manifest(out, dtype="uint16"), "should be uint8"),
        (lambda out: (out / "manifest.json").unlink(), "not a prepared corpus"),
    ],
)
def test_load_refuses_damage(tmp_path, text, damage, message):
    prepare([text], "bytes", tmp_path / "out", valid_fraction=0.2)
    damage(tmp_path / "out")
    with pytest.raises(DataError, match=message):
        load(tmp_path / "out")


def edit_manifest(out, **changes):
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, **changes}))


@pytest.fixture
def tokenizer(tmp_path, text):
    pytest.importorskip("tokenizers")
    train_tokenizer([text], 300, tmp_path / "tokenizer.json")
    return str(tmp_path / "tokenizer.json")


def test_tokenizer_file_round_trip(tmp_path, text, tokenizer):
    from tokenizers import Tokenizer

    prepare([text], tokenizer, tmp_path / "out", valid_fraction=0.2)
    corpus = load(tmp_path / "out")
    assert corpus.vocab_size == 300 and corpus.train.dtype == np.uint16
    bpe = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    decoded = [
        bpe.decode(tokens.tolist(), skip_special_tokens=False)
        for tokens in (corpus.train, corpus.valid)
    ]
    found = [text for split in decoded for text in split.split("<|endoftext|>")]
    assert sorted(found) == sorted(DOCUMENTS)
    valid_bytes = len(decoded[1].replace("<|endoftext|>", "").encode())
    assert corpus.valid_bytes_per_token == valid_bytes / len(corpus.valid)


def test_long_documents_are_encoded_in_pieces(tmp_path, tokenizer, monkeypatch):
    from tokenizers import Tokenizer

    from bitnet_jax.data.readers import Document
    from bitnet_jax.data.tokenizers import FileTokenizer

    monkeypatch.setattr("bitnet_jax.data.tokenizers._PIECE_CHARACTERS", 50)
    long = "".join(DOCUMENTS) + "ü" * 200  # the last without a line end to cut at
    opened = FileTokenizer(tmp_path / "tokenizer.json")
    (ids,) = opened.encode([Document(long.encode(), "here")])
    assert Tokenizer.from_file(tokenizer).decode(ids.tolist()) == long


def test_text_that_spells_the_special_token_is_text(tmp_path, tokenizer):
    from bitnet_jax.data.readers import Document
    from bitnet_jax.data.tokenizers import FileTokenizer

    opened = FileTokenizer(tmp_path / "tokenizer.json")
    (ids,) = opened.encode([Document(b"a <|endoftext|> inside", "here")])
    assert opened.eot_token not in ids


def test_tokenizers_that_cannot_serve(tmp_path, text):
    tokenizers = pytest.importorskip("tokenizers")
    lossy = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, "[UNK]"))
    lossy.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    lossy.save(str(tmp_path / "no_eot.json"))
    lossy.add_special_tokens(["<|endoftext|>"])
    lossy.save(str(tmp_path / "lossy.json"))
    (tmp_path / "broken.json").write_text("{}")
    for name, message in {
        "no_eot.json": "no token <|endoftext|>",
        "lossy.json": "do not decode to the same text",
        "broken.json": "not a tokenizer file",
        "absent.json": "no such file",
    }.items():
        with pytest.raises(DataError, match=message):
            prepare([text], str(tmp_path / name), tmp_path / "out", valid_fraction=0.2)


def test_train_tokenizer_refuses(tmp_path, text):
    pytest.importorskip("tokenizers")
    out = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match="vocab_size=256: at least 257"):
        train_tokenizer([text], 256, out)
    with pytest.raises(DataError, match="the text gives only"):
        train_tokenizer([text], 100_000, out)
    with pytest.raises(DataError, match="no such file"):
        train_tokenizer([str(tmp_path / "absent.txt")], 300, out)
    assert not out.exists()
