"""A set of shards tells that it is one: shards of two sets are never read as one model."""

import itertools
import os
import shutil
import signal
from pathlib import Path

import gguf
import numpy as np
import pytest
from test_atomic import write_set

import gguf_io
from gguf_io.metadata import Field
from gguf_io.reader import SET_KEY
from tbq import FileFormatError


def values(path):
    with gguf_io.open_gguf(path) as file:
        return [float(t.dequantize()[0, 0]) for t in file.tensors.values()]


def test_a_set_opens(tmp_path):
    assert values(write_set(tmp_path / "m", 2.0)[0]) == [2, 2, 2]


def test_the_same_set_is_the_same_set(tmp_path):
    """Its mark is made of its bytes: what is written again is bytewise what it was."""
    first, again = write_set(tmp_path / "a", 2.0), write_set(tmp_path / "b", 2.0)
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]


@pytest.mark.parametrize(
    "other", [t for t in itertools.product((0, 1), repeat=3) if 0 < sum(t) < 3]
)
def test_a_mixed_set_is_refused(tmp_path, quantize, inspect, other):
    sets = write_set(tmp_path / "a", 1.0), write_set(tmp_path / "b", 2.0)
    mixed = [Path(str(path).replace("a-0", "m-0")) for path in sets[0]]
    for which, paths, path in zip(other, zip(*sets, strict=True), mixed, strict=True):
        shutil.copy(paths[which], path)
    with pytest.raises(FileFormatError, match=f"is not of the set that .* is of: {SET_KEY}"):
        gguf_io.open_gguf(mixed[0])
    assert inspect(mixed[0])[0] == 3
    assert quantize(mixed[0], tmp_path / "o.gguf", "q8_0")[0] == 3
    assert not (tmp_path / "o.gguf").exists()


@pytest.mark.parametrize("renamed", [1, 2])
def test_killed_between_the_renames(tmp_path, renamed):
    write_set(tmp_path / "m", 1.0)
    pid = os.fork()
    if not pid:
        try:
            real, calls = os.replace, []

            def replace(source, target):
                calls.append(target)
                if len(calls) > renamed:
                    os.kill(os.getpid(), signal.SIGKILL)
                real(source, target)

            os.replace = replace
            write_set(tmp_path / "m", 2.0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    with pytest.raises(FileFormatError, match="is not of the set"):
        gguf_io.open_gguf(tmp_path / "m-00001-of-00003.gguf")
    shards = write_set(tmp_path / "m", 2.0)  # again, and all is well and tidy
    assert values(shards[0]) == [2, 2, 2]
    assert sorted(tmp_path.iterdir()) == shards


def test_one_shard_with_the_mark_and_one_without(tmp_path):
    """As when a set of another program is partly replaced."""
    shards = write_set(tmp_path / "m", 1.0)
    data = shards[1].read_bytes()
    shards[1].write_bytes(data.replace(SET_KEY.encode(), b"x" * len(SET_KEY)))
    with pytest.raises(FileFormatError, match="is not of the set"):
        gguf_io.open_gguf(shards[0])
    for path in (shards[0], shards[2]):
        path.write_bytes(path.read_bytes().replace(SET_KEY.encode(), b"x" * len(SET_KEY)))
    assert values(shards[0]) == [1, 1, 1]  # sets of other programs have none


def test_the_mark_is_an_ordinary_key(tmp_path):
    for i, path in enumerate(write_set(tmp_path / "m", 1.0)):
        reader = gguf.GGUFReader(path)
        assert reader.fields["split.no"].contents() == i
        assert reader.fields[SET_KEY].contents() > 0
        assert np.all(reader.tensors[0].data == 1)


def test_a_mark_in_the_source_is_not_copied(tmp_path):
    shards = write_set(tmp_path / "m", 1.0)
    with gguf_io.open_gguf(shards[0]) as file:
        tensors = [gguf_io.OutputTensor.from_tensor(t) for t in file.tensors.values()]
        gguf_io.write_gguf(tmp_path / "one.gguf", file.metadata, tensors)
        gguf_io.write_gguf_shards(tmp_path / "two", file.metadata, [tensors[:1], tensors[1:]])
    with gguf_io.open_gguf(tmp_path / "one.gguf") as file:
        assert SET_KEY not in file.metadata
    assert values(tmp_path / "two-00001-of-00002.gguf") == [1, 1, 1]


def test_the_mark_is_found_behind_much_metadata(tmp_path):
    """It is looked for where it is, not where it could be taken for a value."""
    decoy = gguf_io.writer.pack_string(SET_KEY) + bytes([4, 0, 0, 0])
    metadata = {"big": Field.of(np.zeros(1 << 24, np.uint8)), "decoy": Field.of(decoy)}
    tensor = gguf_io.OutputTensor.from_array("t", np.zeros((1, 32), np.float32))
    gguf_io.write_gguf_shards(tmp_path / "m", metadata, [[tensor], []])
    path = tmp_path / "m-00001-of-00002.gguf"
    with gguf_io.open_gguf(path) as file:
        assert file.metadata[SET_KEY] > 0
        assert bytes(file.metadata.fields["decoy"].raw) == bytes(metadata["decoy"].raw)
