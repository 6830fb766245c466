"""Files of runs that nobody has trained, and damage to those of runs that somebody has."""

from bitnet_jax.files import SCHEMA_VERSION, write_json
from bitnet_jax.results import endpoint_row

PROVENANCE = {"device": "1x cpu", "jax_version": "0.0", "git_commit": "abc"}


def endpoint_rows(spec, loss=3.0, status="ok"):
    """A row for each endpoint of a run, all with the same results."""
    endpoint = {"loss": loss, "loss_stderr": 0.1, "bits_per_byte": 4.0, "train_loss": 2.5}
    if status != "ok":
        endpoint = dict.fromkeys(endpoint)
    more = {"unique_tokens": 9, "status": status, "wall_s": 1.0}
    return [endpoint_row(spec, {"end": end, **endpoint, **more}, PROVENANCE) for end in spec.ends]


def write_summary(directory, spec, **more):
    """What makes a run finished; gives the file's path."""
    directory.mkdir(parents=True, exist_ok=True)
    header = {"schema_version": SCHEMA_VERSION, "run_id": spec.run_id, "status": "ok",
              "wall_s": 1.0, "total_flops": float(spec.total_flops)}  # fmt: skip
    path = directory / "summary.json"
    write_json(path, {**header, "endpoints": endpoint_rows(spec), **more})
    return path


def cut(path):
    """To half its length."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def emptied(path):
    path.write_bytes(b"")


def lost(path):
    path.unlink()


def flipped(path, bit=None):
    """One bit, of the byte in the middle unless said otherwise."""
    content = bytearray(path.read_bytes())
    bit = len(content) // 2 * 8 + 4 if bit is None else bit
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


DAMAGES = {"cut": cut, "emptied": emptied, "lost": lost, "flipped": flipped}
