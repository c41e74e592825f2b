"""The manifest's reader: strict, and by field."""

import json
import random

import pytest

from m2jax import layout as layout_module
from m2jax.errors import StoreError
from m2jax.store.manifest import bytes_to_manifest
from tests.small_checkpoints import SMALL_CHUNK_TARGET_BYTES, signed, small_store


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout_module, "CHUNK_TARGET_BYTES", SMALL_CHUNK_TARGET_BYTES)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return small_store(tmp_path_factory.mktemp("made") / "store")


def refused(data, *words):
    with pytest.raises(StoreError) as caught:
        bytes_to_manifest(data)
    message = str(caught.value)
    assert message.startswith("manifest.json: ")
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message


def test_every_prefix_of_a_manifest_is_refused(whole):
    data = (whole / "manifest.json").read_bytes()
    bytes_to_manifest(data)
    for length in range(len(data)):
        with pytest.raises(StoreError):
            bytes_to_manifest(data[:length])


def test_a_flipped_bit_in_the_manifest_is_found(whole):
    data = (whole / "manifest.json").read_bytes()
    seeded = random.Random(0)
    for _ in range(400):
        spoiled = bytearray(data)
        spoiled[seeded.randrange(len(data))] ^= 1 << seeded.randrange(8)
        with pytest.raises(StoreError):
            bytes_to_manifest(bytes(spoiled))


def test_a_manifest_spelled_another_way_is_refused(whole):
    data = (whole / "manifest.json").read_bytes()
    refused(json.dumps(json.loads(data)).encode(), "sha256")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("null", "want an object"),
        ("[]", "want an object"),
        ("\xff", "format"),
        ('{"format": "m2jax-store", "format": "m2jax-store"}', "twice"),
        ('{"format": NaN}', "NaN"),
        ('{"format": 1e999}', "1e999"),
        ("[" * 100_000, "nested too deeply"),
        ('{"format": "zarr"}', "format"),
        ('{"format": "m2jax-store"}', "version"),
        ('{"format": "m2jax-store", "version": 1}', "reads 2, got 1; convert"),
        ('{"format": "m2jax-store", "version": true}', "version"),
        ('{"format": "m2jax-store", "version": 2}', "'banks' is missing"),
    ],
)
def test_what_is_no_manifest_is_refused(text, words):
    data = text.encode("latin-1")
    refused(data, "not UTF-8" if data == b"\xff" else words)


def put(*path_and_value):
    *path, value = path_and_value

    def edit(raw):
        for key in path[:-1]:
            raw = raw[key]
        raw[path[-1]] = value

    return edit


def take(*path):
    def edit(raw):
        for key in path[:-1]:
            raw = raw[key]
        del raw[path[-1]]

    return edit


ENTRY = {"bytes": 1, "sha256": "0" * 64}
CHUNK = "neurons/00/q4/c/0/0"
CASES = [
    (put("surprise", 1), "unknown field 'surprise'"),
    (take("files"), "'files' is missing"),
    (
        put("version", 7),
        "version: this m2jax reads 2, got 7; convert the checkpoint again, or update",
    ),
    (put("model", None), "model"),
    (put("model", "num_layers", 2**63), "num_layers"),
    (put("model", "num_layers", 1000), "windows: wanted 1000 entries"),
    (put("model", "intermediate_size", 1 << 20), "the model implies"),
    (put("model", "hidden_size", 0), "hidden_size"),
    (put("model", "num_heads", 3), "num_kv_heads"),
    (put("model", "num_kv_heads", 0), "num_kv_heads"),
    (put("model", "vocab_size", -1), "vocab_size"),
    (put("model", "rms_norm_eps", "1e-5"), "rms_norm_eps"),
    (take("model", "rope_theta"), "rope_theta"),
    (put("quantiser", "group", 0), "quantiser.group: want one of"),
    (put("quantiser", "kind", "gptq"), "quantiser"),
    (put("quantiser", "width", 65), "quantiser"),
    (put("planes", "q4", "num_chunks", 0), "planes"),
    (put("planes", "q4", "num_chunks", -1), "planes"),
    (put("planes", "q4", "num_chunks", 2**63), "planes"),
    (put("planes", "q4", "num_chunks", 3.0), "planes"),
    (put("planes", "r4", "record_bytes", 95), "planes"),
    (put("planes", "w16", "dtype", "int8"), "planes.w16.dtype: want one of"),
    (put("planes", "w16", "dtype", "float32"), "planes"),
    (put("planes", "q2", {}), "planes"),
    (take("planes", "w16"), "quantiser.of: want one of"),
    (put("shard", "num_shards", 2), "shard"),
    (put("banks", [0]), "banks"),
    (put("banks", [0, 2]), "banks"),
    (put("banks", 2), "banks"),
    (put("source", 3), "source"),
    (put("files", []), "files: want an object"),
    (put("files", {}), "files: the model has"),
    (take("files", CHUNK), f"files: {CHUNK} is not listed"),
    (put("files", CHUNK, "bytes", 1), f"files.{CHUNK}.bytes: the model implies"),
    (put("files", CHUNK, "bytes", -1), "want a size, got -1"),
    (put("files", CHUNK, "bytes", 2**63), "want a size"),
    (put("files", CHUNK, "bytes", True), "want a size, got True"),
    (put("files", CHUNK, "sha256", "0" * 63), "want 64 hex digits"),
    (put("files", CHUNK, "sha256", None), "want 64 hex digits"),
    (put("files", CHUNK, "mtime", 1), "unknown field 'mtime'"),
    (put("files", CHUNK, 7), "want an object, got 7"),
    (put("files", "neurons/00/q4/c/3/0", ENTRY), "is no file of this model"),
    (put("files", "neurons/../../x", ENTRY), "is no file of this model"),
    (put("files", "dense/embed/../../../x", ENTRY), "is no file of this model"),
    (put("files", "dense/embed//x", ENTRY), "is no file of this model"),
    (put("files", "dense/layers/99/x", ENTRY), "is no file of this model"),
    (put("files", "dense/embed", ENTRY), "is no file of this model"),
    (put("files", "/etc/passwd", ENTRY), "is no file of this model"),
    (put("files", "tokenizer/run.py", ENTRY), "is no file of this model"),
    (put("files", "", ENTRY), "is no file of this model"),
]


@pytest.mark.parametrize(("edit", "words"), CASES, ids=range(len(CASES)))
def test_a_manifest_that_disagrees_with_itself_is_refused_by_field(whole, edit, words):
    raw = json.loads((whole / "manifest.json").read_bytes())
    edit(raw)
    refused(signed(raw), words)


def test_a_manifest_that_lists_no_file_of_a_bank_is_refused(whole):
    raw = json.loads((whole / "manifest.json").read_bytes())
    for name in list(raw["files"]):
        if name.startswith("dense/layers/01/"):
            del raw["files"][name]
    refused(signed(raw), "nothing listed under dense/layers/01")


@pytest.mark.parametrize("part", ["model", "quantiser", "planes", "shard", "banks"])
def test_junk_in_a_manifest_is_never_anything_but_a_store_error(whole, part):
    raw = json.loads((whole / "manifest.json").read_bytes())
    original = json.dumps(raw[part])
    leaves = raw[part] if isinstance(raw[part], dict) else dict(enumerate(raw[part]))
    for key in leaves:
        for junk in (0, -1, 2**63, 10**4000, None, "x", True, 0.5, [], {}, [[]]):
            raw[part] = json.loads(original)
            if raw[part][key] == junk:
                continue
            raw[part][key] = junk
            try:
                bytes_to_manifest(signed(raw))
            except StoreError:
                continue
            assert part == "model"
